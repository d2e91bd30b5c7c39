"""Build, write, read and render the scorecard: interval, groups, confusions, worst clips. Imports no torch."""

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter
from rapidfuzz.distance import Levenshtein
from typing_extensions import TypedDict

from sharding.errors import StreamtrainError, counted, reason_of
from sharding.files.document import (
    LARGE_BYTES,
    STRICT,
    Number,
    Second,
    Size,
    parse,
    parse_json,
    read_document,
    validate,
)
from sharding.files.names import UNKNOWN, age_order
from sharding.files.writing import write_inside
from sharding.labels.policy import LabelPolicy
from sharding.shardset.index import ShardIndex
from streamtrain.eval.metrics import EditCounts, Floats, Resampling, TextEdits

DURATION_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, upper edges of the groups
LENGTH_EDGES = (5, 10, 20, 40, 80)  # symbols, likewise
CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # likewise
WORST_CLIPS = 20
CONFUSIONS = 30
MAX_LACKING = 0.01  # share of the draws that may lack a group
SCORECARD, HYPOTHESES = "scorecard.json", "hypotheses.jsonl"

Groups = dict[str, list["ClipScore"]]


@dataclass(frozen=True, slots=True)
class ClipScore:
    """Hold the score of one recording."""

    __pydantic_config__ = STRICT

    utterance_id: str
    child_id: str
    session_id: str
    corpus: str
    age_bucket: str
    seconds: Second
    decoded: bool
    reference: str
    hypothesis: str
    confidence: Number
    counts: EditCounts  # over symbols
    words: EditCounts  # as the profile compares them
    characters: EditCounts | None = None  # if the symbols are others

    @property
    def speaker(self) -> str:
        """Return the best speaker id that the shard set has: the child, else the session, else the clip."""
        return self.child_id or self.session_id or self.utterance_id


class _Card(TypedDict):
    """Describe the fields that other modules read from a scorecard."""

    metric: Literal["cer", "per"]
    profile: str
    units: str
    cer: Number
    wer: Number
    interval_95: tuple[Number, Number] | None
    speakers: Size
    clips: Size
    split: str


_CARD, _CLIP, _METRICS = TypeAdapter(_Card), TypeAdapter(ClipScore), TypeAdapter(dict[str, Number])

COUNTS: dict[str, Callable[[ClipScore], EditCounts]] = {  # of a clip, by the metric whose rate they make
    "wer": attrgetter("words"),
    "per": attrgetter("counts"),
    "cer": lambda clip: clip.characters or clip.counts,
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Hold the total over all ranks and, on every rank, the clips in it."""

    edits: TextEdits
    clips: tuple[ClipScore, ...]  # sorted by id
    labels: LabelPolicy
    rows: dict[str, tuple[int, ...]]  # rows of the index by clip id: its pieces in order
    loss: float | None = None  # CTC loss in nats ÷ label symbols, over `loss_clips`; None if there are none
    loss_clips: int = 0  # without those that were split, that did not decode, or whose label needs more frames

    @property
    def total(self) -> EditCounts:
        """Return the edits over symbols."""
        return self.edits.symbols

    @property
    def cer(self) -> float:
        """Return the pooled character error rate."""
        return self.edits.characters.rate

    @property
    def wer(self) -> float:
        """Return the pooled word error rate, of words as the profile compares them."""
        return self.edits.words.rate

    @property
    def per(self) -> float | None:
        """Return the pooled error rate of phones or other tokens; None if the units are characters."""
        return self.total.rate if self.labels.metric == "per" else None

    @property
    def metrics(self) -> dict[str, float]:
        """Return the loss and the pooled error rates that this evaluation has, by the names that logs give them."""
        rates = {name: getattr(self, name) for name in self.labels.metrics}
        return rates if self.loss is None else {"loss": self.loss, **rates}

    def score(self, select: str) -> float | None:
        """Return the score that `eval.select` names, such as "cer" or "cer/corpus"; None if there is none."""
        metric, _, name = (self.labels.metric if select == "auto" else select).partition("/")
        if not name or metric not in self.metrics:
            return self.metrics.get(metric)
        groups = _by_speaker(self.clips) if name == "speaker" else groupings(self.clips)[name]
        return _mean_rate(groups, COUNTS[metric])


def metrics_of(index: ShardIndex) -> tuple[str, ...]:
    """Return the metrics that the labels of a shard set can be scored by."""
    return (*index.labels.metrics, "loss")


def scorecard(evaluation: Evaluation, index: ShardIndex, **context: Any) -> dict[str, Any]:
    """Return the scorecard as it is written. `index` has the counts of rejected validation clips."""
    total, clips = evaluation.total, evaluation.clips
    draws = Resampling(clip.speaker for clip in clips)
    by_speaker = _by_speaker(clips)
    groups = groupings(clips)
    worst = sorted(clips, key=lambda clip: (-clip.counts.edits, clip.utterance_id))[:WORST_CLIPS]
    words, plain = evaluation.edits.words, evaluation.edits.plain_words
    rates = {"cer": evaluation.cer, "wer": evaluation.wer}
    rates |= {} if evaluation.per is None else {"per": evaluation.per}
    rates |= {} if words == plain else {"wer_plain": plain.rate}
    return (
        context
        | {"profile": evaluation.labels.profile, "units": evaluation.labels.units, "metric": evaluation.labels.metric}
        | rates
        | {
            "interval_95": draws.interval(draws.rates(*sums({"all": list(clips)}, draws.speakers))[:, 0]),
            "edits": total.edits,
            "reference_length": total.reference_length,
            "clips": len(clips),
            "loss": evaluation.loss,
            "loss_clips": evaluation.loss_clips,
            "substitutions": total.substitutions,
            "deletions": total.deletions,
            "insertions": total.insertions,
            "speakers": len(by_speaker),
            "speakers_known": all(clip.child_id for clip in clips),
            "macro": {"speaker": _macro_by_speaker(by_speaker, draws)}
            | {name: _macro(grouping, draws) for name, grouping in groups.items()},
            "groups": {name: _rows(grouping, draws) for name, grouping in groups.items()},
            "by_speaker": _rows(by_speaker, None),
            "calibration": _calibration(clips),
            "confusions": [
                {"reference": reference, "hypothesis": hypothesis, "count": count}
                for (reference, hypothesis), count in count_confusions(clips, evaluation.labels).most_common()
                if reference != hypothesis
            ][:CONFUSIONS],
            "worst": [asdict(clip) for clip in worst],
            "undecodable": [clip.utterance_id for clip in clips if not clip.decoded],
            "validation": index.notes.get("validation", {}) | _test_notes(index, context.get("split")),
            "word_edits": words.edits,
            "reference_words": words.reference_length,
        }
    )


def _test_notes(index: ShardIndex, split: str | None) -> dict[str, Any]:
    """Return the counts of the test split, if that was scored."""
    return dict(index.notes.get("test", {})) if split == "test" else {}


def write_scorecard(card: dict[str, Any], clips: Sequence[ClipScore], folder: Path) -> None:
    """Write `scorecard.json`, and each clip's reference and hypothesis to `hypotheses.jsonl`."""
    write_inside(folder / SCORECARD, json.dumps(card, ensure_ascii=False, indent=1))
    write_inside(folder / HYPOTHESES, "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips))


def read_scorecard(folder: Path) -> tuple[dict[str, Any], list[ClipScore]]:
    """Return what `write_scorecard` wrote. Raises StreamtrainError if it is missing or malformed."""
    try:
        card = parse_json(read_document(folder / SCORECARD))
        validate(card, _CARD)
        lines = read_document(folder / HYPOTHESES, LARGE_BYTES).split(b"\n")
        return card, [parse(line, _CLIP) for line in lines if line]
    except (OSError, ValueError) as error:
        raise StreamtrainError(
            f"{folder}: no scorecard ({reason_of(error)})", "train first, or score a model with `streamtrain evaluate`"
        ) from error


def read_metrics(path: Path) -> dict[str, float]:
    """Return the scores that a run wrote before its training. Raises StreamtrainError if they cannot be read."""
    try:
        return parse(read_document(path), _METRICS)
    except (OSError, ValueError) as error:
        raise StreamtrainError(f"{path}: no score ({reason_of(error)})", "train first") from error


def render(card: dict[str, Any]) -> str:
    """Return the scorecard as text for a terminal."""
    macro = ", ".join(f"by {name} {card['macro'][name]['rate']:.4f}" for name in ("speaker", "corpus"))
    metric = card["metric"]
    lines = [
        f"{metric.upper()} {card[metric]:.4f}  ({render_interval(card)})   "
        f"{card['edits']:,} edits ÷ {card['reference_length']:,} symbols, {card['clips']:,} clips",
        f"{card['substitutions']:,} substitutions, {card['deletions']:,} deletions, {card['insertions']:,} insertions"
        f"   macro {metric.upper()}: {macro}",
    ]
    plain = f" (of plain words {card['wer_plain']:.4f})" if "wer_plain" in card else ""
    words = f"WER {card['wer']:.4f}{plain}   {card['word_edits']:,} edits ÷ {card['reference_words']:,} words   "
    words = "" if card["units"] == "tokens" else words  # tokens are words: their error rate is above
    lines[0] += f"\n{words}profile {card['profile']}, {card['units']}"
    if card["loss"] is not None:
        lines.append(f"loss {card['loss']:.4f} nats per symbol, {counted(card['loss_clips'], 'clip')}")
    for title, rows in card["groups"].items():
        lines.append(f"{title:>12}  " + "   ".join(f"{row['name']} {row['rate']:.3f} ({row['clips']})" for row in rows))
    calibration = (f"{row['name']} right {row['accuracy']:.3f} ({row['clips']})" for row in card["calibration"])
    lines.append(f"{'confidence':>12}  " + "   ".join(calibration))
    return "\n".join(lines + warnings(card))


def warnings(card: dict[str, Any]) -> list[str]:
    """Return the reasons why a score may mislead."""
    notes = []
    if card["undecodable"]:
        clips = counted(len(card["undecodable"]), "clip")
        notes.append(f"{clips} did not decode: scored as silence, see scorecard.json")
    lost = card["validation"].get("rejected", 0)
    if lost:
        kind = "test" if card.get("split") == "test" else "validation"
        notes.append(f"the build rejected {counted(lost, f'{kind} clip')}: not in this score")
    if not card["validation"].get("disjoint_by_speaker", True):
        notes.append("some of these speakers may be in training too, or are not known: the score may be too optimistic")
    return notes


def render_interval(card: dict[str, Any]) -> str:
    interval = card["interval_95"]
    if not interval:
        return "one speaker: no interval"
    whose = "speakers" if card.get("speakers_known", True) else "clips or sessions of unknown speakers"
    return f"95 % interval {interval[0]:.4f} – {interval[1]:.4f} over {card['speakers']} {whose}"


# --- groups -------------------------------------------------------------------------------------------------------


def groupings(clips: Sequence[ClipScore]) -> dict[str, Groups]:
    """Group the clips by corpus, age, duration and label length; each grouping has each clip once."""
    return {
        "corpus": group(clips, lambda clip: clip.corpus),
        "age_bucket": group(clips, lambda clip: clip.age_bucket or UNKNOWN, age_order),
        "duration": _edged_groups(clips, lambda clip: clip.seconds, DURATION_EDGES, " s"),
        "label_length": _edged_groups(clips, lambda clip: clip.counts.reference_length, LENGTH_EDGES),
    }


def group(
    clips: Iterable[ClipScore], key: Callable[[ClipScore], str], order: Callable[[str], Any] | None = None
) -> Groups:
    """Group clips by `key`; the groups are sorted by `order` of their keys, or by the keys."""
    groups: Groups = defaultdict(list)
    for clip in clips:
        groups[key(clip)].append(clip)
    return {name: groups[name] for name in sorted(groups, key=order)}


def _by_speaker(clips: Iterable[ClipScore]) -> Groups:
    return group(clips, lambda clip: clip.speaker)


def total_of(clips: Iterable[ClipScore], counts: Callable[[ClipScore], EditCounts] = COUNTS["per"]) -> EditCounts:
    return sum(map(counts, clips), EditCounts())


def sums(groups: Groups, speakers: Sequence[str]) -> tuple[Floats, Floats]:
    """Return edits and reference lengths of each speaker in each group, each of shape (speakers, groups)."""
    place = {speaker: row for row, speaker in enumerate(speakers)}
    edits, lengths = np.zeros((2, len(speakers), len(groups)))
    for column, clips in enumerate(groups.values()):
        for clip in clips:
            edits[place[clip.speaker], column] += clip.counts.edits
            lengths[place[clip.speaker], column] += clip.counts.reference_length
    return edits, lengths


def _rows(groups: Groups, draws: Resampling | None) -> list[dict[str, Any]]:
    rates = draws.rates(*sums(groups, draws.speakers)) if draws else None
    rows = []
    for column, (name, clips) in enumerate(groups.items()):
        counts, speakers = total_of(clips), len({clip.speaker for clip in clips})
        row = {"name": name, "rate": counts.rate, "edits": counts.edits, "reference_length": counts.reference_length,
               "clips": len(clips)}  # fmt: skip
        if draws is not None and rates is not None:
            known = speakers > 1
            row |= {"speakers": speakers, "interval_95": draws.interval(rates[:, column]) if known else None}
        rows.append(row)
    return rows


def _macro(groups: Groups, draws: Resampling) -> dict[str, Any]:
    """Return the mean of the groups' rates, unweighted, with its interval.

    If each speaker is in one group, speakers are drawn within it, so that every draw has every group. Otherwise draws
    that lack a group are left out. There is no interval if a group has one speaker or is often missing from the draws.
    """
    speakers = [sorted({clip.speaker for clip in clips}) for clips in groups.values()]
    interval = None
    if min(map(len, speakers)) > 1 and sum(map(len, speakers)) == len(draws.speakers):
        parts = [(Resampling(ids, seed=number), {name: clips})
                 for number, (ids, (name, clips)) in enumerate(zip(speakers, groups.items(), strict=True))]  # fmt: skip
        rates = np.stack([part.rates(*sums(part_groups, part.speakers))[:, 0] for part, part_groups in parts], axis=1)
        interval = draws.interval(rates.mean(axis=1))
    elif min(map(len, speakers)) > 1:
        means = draws.rates(*sums(groups, draws.speakers)).mean(axis=1)  # NaN if a draw lacks a group
        interval = draws.interval(means) if np.isnan(means).mean() <= MAX_LACKING else None
    return {"rate": _mean_rate(groups), "interval_95": interval}


def _macro_by_speaker(by_speaker: Groups, draws: Resampling) -> dict[str, Any]:
    rates = np.array([total_of(by_speaker[speaker]).rate for speaker in draws.speakers])
    means = draws.times @ rates / max(len(rates), 1)
    return {"rate": _mean_rate(by_speaker), "interval_95": draws.interval(means)}


def _mean_rate(groups: Groups, counts: Callable[[ClipScore], EditCounts] = COUNTS["per"]) -> float:
    return sum(total_of(clips, counts).rate for clips in groups.values()) / len(groups)


def _edged_groups(
    clips: Iterable[ClipScore], value: Callable[[ClipScore], float], edges: Sequence[float], unit: str = ""
) -> Groups:
    """Group clips by the first edge that their value does not exceed, in ascending order."""
    names = [*(f"≤ {edge:g}{unit}" for edge in edges), f"> {edges[-1]:g}{unit}"]
    groups = group(clips, lambda clip: names[bisect.bisect_left(edges, value(clip))])
    return {name: groups[name] for name in names if name in groups}


def _calibration(clips: Iterable[ClipScore]) -> list[dict[str, Any]]:
    """Return mean confidence and accuracy (1 − error rate) of the clips, grouped by confidence."""
    groups = _edged_groups(clips, lambda clip: clip.confidence, CONFIDENCE_EDGES)
    return [
        {"name": name, "clips": len(members), "confidence": sum(clip.confidence for clip in members) / len(members),
         "accuracy": 1 - total_of(members).rate}
        for name, members in groups.items()
    ]  # fmt: skip


def count_confusions(clips: Iterable[ClipScore], labels: LabelPolicy) -> Counter[tuple[str, str]]:
    """Count symbol pairs (reference, hypothesis): ("a", "a") correct, ("a", "") a deletion, ("", "a") an insertion."""
    pairs: Counter[tuple[str, str]] = Counter()
    for clip in clips:
        reference, hypothesis = (
            labels.scored_symbols(labels.compare(text)) for text in (clip.reference, clip.hypothesis)
        )
        for run in Levenshtein.opcodes(reference, hypothesis):  # a run of equal symbols, or of one kind of edit
            expected, decoded = reference[run.src_start : run.src_end], hypothesis[run.dest_start : run.dest_end]
            pairs.update(zip_longest(expected, decoded, fillvalue=""))
    return pairs
