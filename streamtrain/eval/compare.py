"""Two models on the same clips: the difference of their scores, with its interval, and the clips that changed most."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sharding.errors import StreamtrainError
from streamtrain.eval.metrics import Resampling
from streamtrain.eval.scorecard import ClipScore, Groups, groupings, read_scorecard, sums, total_of

CHANGED_CLIPS = 20
LISTED = 5  # ids named in a message


@dataclass(frozen=True, slots=True)
class Difference:
    """CER of a group of clips before and after."""

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
    """A clip that the two hear differently."""

    utterance_id: str
    reference: str
    before: str
    after: str
    edits: int  # more than before; negative: fewer


@dataclass(frozen=True, slots=True)
class Comparison:
    other: str
    rows: tuple[Difference, ...]  # of all clips first, then of each group
    changed: tuple[Change, ...]


def compare(before: Sequence[ClipScore], after: Sequence[ClipScore], other: str) -> Comparison:
    """Score `after` beside `before`. Speakers are drawn for both at once, so what is common to both cancels out.

    Raises StreamtrainError where the two are not of the same clips with the same labels.
    """
    labels = [{clip.utterance_id: clip.reference for clip in clips} for clips in (before, after)]
    if labels[0] != labels[1]:
        differ = sorted(
            name for name in labels[0].keys() | labels[1].keys() if labels[0].get(name) != labels[1].get(name)
        )
        raise StreamtrainError(
            f"the two scores are not of the same clips: {len(differ):,} are in one alone, or have another label: "
            f"{', '.join(differ[:LISTED])}",
            "score both models on the same split of the same shard set",
        )
    place = {clip.utterance_id: clip for clip in before}
    drawn = Resampling(clip.speaker for clip in after)
    rows = [
        row
        for name, groups in {"all": {"": list(after)}, **groupings(after)}.items()
        for row in _differences(name, groups, place, drawn)
    ]
    changes = [
        Change(new.utterance_id, new.reference, old.hypothesis, new.hypothesis, new.counts.edits - old.counts.edits)
        for new in after
        for old in [place[new.utterance_id]]
    ]
    changed = sorted((one for one in changes if one.edits), key=lambda one: (-abs(one.edits), one.utterance_id))
    return Comparison(other, tuple(rows), tuple(changed[:CHANGED_CLIPS]))


def compare_folders(before: Path, after: Path) -> Comparison:
    """Of two folders, each with a scorecard."""
    return compare(read_scorecard(before)[1], read_scorecard(after)[1], str(before))


def _differences(name: str, groups: Groups, place: dict[str, ClipScore], drawn: Resampling) -> list[Difference]:
    olds = {key: [place[clip.utterance_id] for clip in clips] for key, clips in groups.items()}
    rates = drawn.rates(*sums(groups, drawn.speakers)) - drawn.rates(*sums(olds, drawn.speakers))
    return [
        Difference(
            name, key, total_of(olds[key]).rate, total_of(clips).rate,
            drawn.interval(rates[:, column]) if len({clip.speaker for clip in clips}) > 1 else None,
        )
        for column, (key, clips) in enumerate(groups.items())
    ]  # fmt: skip


def to_json(comparison: Comparison) -> str:
    """For programs."""
    rows = [asdict(row) | {"difference": row.difference} for row in comparison.rows]
    return json.dumps(asdict(comparison) | {"rows": rows}, ensure_ascii=False)


def render(comparison: Comparison) -> str:
    """As a person reads it in a terminal."""
    lines = [f"{'':>24}  {'before':>8} {'after':>8} {'difference':>10}   95 % interval over the children"]
    for row in comparison.rows:
        title = f"{row.group} {row.name}".strip()
        sure = "" if row.interval_95 is None else f"{row.interval_95[0]:+.4f} – {row.interval_95[1]:+.4f}"
        lines.append(f"{title:>24}  {row.before:8.4f} {row.after:8.4f} {row.difference:+10.4f}   {sure}")
    total = comparison.rows[0]
    if total.interval_95 is not None:
        low, high = total.interval_95
        if high < 0 or low > 0:
            lines.append(f"the CER after is {'lower' if high < 0 else 'higher'}")
        else:
            lines.append("no clear difference: the interval holds 0")
    lines += ["", "clips that changed most"]
    for change in comparison.changed[:10]:
        lines.append(f"  {change.edits:+d}  {change.utterance_id}\n      label   {change.reference}\n"
                     f"      before  {change.before}\n      after   {change.after}")  # fmt: skip
    return "\n".join(lines)
