"""Compare two models on the same clips: score differences with intervals, and the clips that changed most."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.errors import StreamtrainError
from streamtrain.eval.metrics import Resampling
from streamtrain.eval.scorecard import ClipScore, Groups, groupings, read_scorecard, sums, total_of

CHANGED_CLIPS = 20
LISTED = 5  # ids listed in an error message


@dataclass(frozen=True, slots=True)
class Difference:
    """Hold the error rate of a group of clips before and after."""

    group: str
    name: str
    before: float
    after: float
    interval_95: tuple[float, float] | None  # of the difference

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Change:
    """Hold the two hypotheses for a clip and the change in its edits."""

    utterance_id: str
    reference: str
    before: str
    after: str
    edits: int  # after minus before; negative: improved


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold the score differences between two models; `other` names the one before."""

    other: str
    metric: str  # cer | per, of the groups
    rows: tuple[Difference, ...]  # for all clips first, then for each group
    changed: tuple[Change, ...]


def compare(before: Sequence[ClipScore], after: Sequence[ClipScore], other: str, metric: str = "cer") -> Comparison:
    """Compare two scores. Speakers are drawn once for both, so variation common to both cancels out. Raises
    StreamtrainError if the two are not of the same clips with the same labels."""
    labels = [{clip.utterance_id: clip.reference for clip in clips} for clips in (before, after)]
    if labels[0] != labels[1]:
        differing = sorted(
            name for name in labels[0].keys() | labels[1].keys() if labels[0].get(name) != labels[1].get(name)
        )
        raise StreamtrainError(
            f"the two scores are not of the same clips: {len(differing):,} are in only one or have different labels: "
            f"{', '.join(differing[:LISTED])}",
            "score both models on the same split of the same shard set",
        )
    before_by_id = {clip.utterance_id: clip for clip in before}
    draws = Resampling(clip.speaker for clip in after)
    rows = [
        row
        for name, groups in {"all": {"": list(after)}, **groupings(after)}.items()
        for row in _differences(name, groups, before_by_id, draws)
    ]
    changes = [
        Change(new.utterance_id, new.reference, old.hypothesis, new.hypothesis, new.counts.edits - old.counts.edits)
        for new in after
        for old in [before_by_id[new.utterance_id]]
    ]
    changed = sorted((item for item in changes if item.edits), key=lambda item: (-abs(item.edits), item.utterance_id))
    return Comparison(other, metric, tuple(rows), tuple(changed[:CHANGED_CLIPS]))


def compare_folders(before: Path, after: Path) -> Comparison:
    """Compare the scorecards in two folders. Raises StreamtrainError if they are not of the same profile and units."""
    (card, clips), (new_card, new_clips) = read_scorecard(before), read_scorecard(after)
    check_comparable(card, new_card)
    return compare(clips, new_clips, str(before), new_card["metric"])


def check_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise StreamtrainError if two scorecards count other things."""
    kinds = [f"{card['metric'].upper()} of profile {card['profile']} in {card['units']}" for card in (before, after)]
    if kinds[0] != kinds[1]:
        raise StreamtrainError(f"the two scores are a {kinds[0]} and a {kinds[1]}",
                               "score both models on one shard set")  # fmt: skip


def _differences(name: str, groups: Groups, before: dict[str, ClipScore], draws: Resampling) -> list[Difference]:
    old_groups = {key: [before[clip.utterance_id] for clip in clips] for key, clips in groups.items()}
    rates = draws.rates(*sums(groups, draws.speakers)) - draws.rates(*sums(old_groups, draws.speakers))
    return [
        Difference(
            name, key, total_of(old_groups[key]).rate, total_of(clips).rate,
            draws.interval(rates[:, column]) if len({clip.speaker for clip in clips}) > 1 else None,
        )
        for column, (key, clips) in enumerate(groups.items())
    ]  # fmt: skip


def to_json(comparison: Comparison) -> str:
    """Return a comparison as JSON."""
    rows = [asdict(row) | {"difference": row.difference} for row in comparison.rows]
    return json.dumps(asdict(comparison) | {"rows": rows}, ensure_ascii=False)


def render(comparison: Comparison) -> str:
    """Return a comparison as text for a terminal."""
    lines = [f"{'':>24}  {'before':>8} {'after':>8} {'difference':>10}   95 % interval over the speakers"]
    for row in comparison.rows:
        title = f"{row.group} {row.name}".strip()
        interval = "" if row.interval_95 is None else f"{row.interval_95[0]:+.4f} – {row.interval_95[1]:+.4f}"
        lines.append(f"{title:>24}  {row.before:8.4f} {row.after:8.4f} {row.difference:+10.4f}   {interval}")
    total = comparison.rows[0]
    if total.interval_95 is not None:
        low, high = total.interval_95
        if high < 0 or low > 0:
            lines.append(f"the {comparison.metric.upper()} after is {'lower' if high < 0 else 'higher'}")
        else:
            lines.append("no clear difference: the interval contains 0")
    if comparison.changed:
        lines += ["", "clips that changed most"]
    for change in comparison.changed[:10]:
        lines.append(f"  {change.edits:+d}  {change.utterance_id}\n      label   {change.reference}\n"
                     f"      before  {change.before}\n      after   {change.after}")  # fmt: skip
    return "\n".join(lines)
