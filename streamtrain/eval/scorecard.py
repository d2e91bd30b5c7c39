"""What a person needs to believe a score: its interval, its groups, its confusions, its worst clips. Without torch."""

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rapidfuzz.distance import Levenshtein
from typing_extensions import TypedDict

from sharding.errors import StreamtrainError
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
from sharding.labels.ipa import normalize
from sharding.shardset.index import ShardIndex
from streamtrain.eval.metrics import EditCounts, Floats, Resampling

DURATION_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, of the groups
LENGTH_EDGES = (5, 10, 20, 40, 80)  # symbols, likewise
CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # likewise
WORST_CLIPS = 20
CONFUSIONS = 30
MAY_LACK = 0.01  # of the draws a group
SCORECARD, HYPOTHESES = "scorecard.json", "hypotheses.jsonl"

Groups = dict[str, list["ClipScore"]]


@dataclass(frozen=True, slots=True)
class ClipScore:
    """One recording, scored once."""

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
    words: EditCounts | None  # over words as the challenge compares them, of the word track

    @property
    def speaker(self) -> str:
        """As far as the shard set tells: the child, else the session, else the clip itself."""
        return self.child_id or self.session_id or self.utterance_id


class _Rate(TypedDict):
    cer: Number


class _Card(_Rate):
    """What others read of a scorecard."""

    cer_interval_95: tuple[Number, Number] | None
    children: Size
    clips: Size
    split: str


_RATE, _CARD, _CLIP = TypeAdapter(_Rate), TypeAdapter(_Card), TypeAdapter(ClipScore)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The total over all ranks, and, on every rank, the clips it is made of."""

    total: EditCounts
    words: EditCounts | None  # of the word track
    clips: tuple[ClipScore, ...]  # sorted by id
    track: str
    rows: dict[str, tuple[int, ...]]  # of the index, by the clip's id: its pieces in order


def scorecard(evaluation: Evaluation, index: ShardIndex, **context: Any) -> dict[str, Any]:
    """The scorecard as it is written. The index tells what validation has lost."""
    total, clips = evaluation.total, evaluation.clips
    drawn = Resampling(clip.speaker for clip in clips)
    by_child = group(clips, lambda clip: clip.speaker)
    groups = groupings(clips)
    worst = sorted(clips, key=lambda clip: (-clip.counts.edits, clip.utterance_id))[:WORST_CLIPS]
    words = evaluation.words
    of_words = (
        {"wer": words.rate, "word_edits": words.edits, "reference_words": words.reference_length} if words else {}
    )
    return (
        context
        | {
            "track": evaluation.track,
            "cer": total.rate,
            "cer_interval_95": drawn.interval(drawn.rates(*sums({"all": list(clips)}, drawn.speakers))[:, 0]),
            "edits": total.edits,
            "reference_length": total.reference_length,
            "clips": len(clips),
            "substitutions": total.substitutions,
            "deletions": total.deletions,
            "insertions": total.insertions,
            "children": len(by_child),
            "macro": {"child": _macro_by_child(by_child, drawn)}
            | {name: _macro(each, drawn) for name, each in groups.items()},
            "groups": {name: _rows(each, drawn) for name, each in groups.items()},
            "by_child": _rows(by_child, None),
            "calibration": _calibration(clips),
            "confusions": [
                {"reference": spoken, "hypothesis": heard, "count": count}
                for (spoken, heard), count in count_confusions(clips, evaluation.track).most_common()
                if spoken != heard
            ][:CONFUSIONS],
            "worst": [asdict(clip) for clip in worst],
            "undecodable": [clip.utterance_id for clip in clips if not clip.decoded],
            "validation": index.notes.get("validation", {}),
        }
        | of_words
    )


def write_scorecard(card: dict[str, Any], clips: Sequence[ClipScore], folder: Path) -> None:
    """`scorecard.json`, and every clip's reference and hypothesis in `hypotheses.jsonl`."""
    write_inside(folder / SCORECARD, json.dumps(card, ensure_ascii=False, indent=1))
    write_inside(folder / HYPOTHESES, "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips))


def read_scorecard(folder: Path) -> tuple[dict[str, Any], list[ClipScore]]:
    """What `write_scorecard` wrote. Raises StreamtrainError where it is not there, or not that."""
    try:
        card = parse_json(read_document(folder / SCORECARD))
        validate(card, _CARD)
        lines = read_document(folder / HYPOTHESES, LARGE_BYTES).split(b"\n")
        return card, [parse(line, _CLIP) for line in lines if line]
    except (OSError, ValueError) as error:
        raise StreamtrainError(
            f"{folder}: no scorecard ({error})", "train first, or score a model with launch/evaluate.py"
        ) from error


def read_rate(path: Path) -> float:
    """Return the CER that a file says. Raises StreamtrainError if it says none."""
    try:
        return parse(read_document(path), _RATE)["cer"]
    except (OSError, ValueError) as error:
        raise StreamtrainError(f"{path}: no score ({error})", "train first") from error


def render(card: dict[str, Any]) -> str:
    """The scorecard as a person reads it in a terminal."""
    macro = ", ".join(f"by {name.replace('_', ' ')} {card['macro'][name]['cer']:.4f}" for name in ("child", "corpus"))
    lines = [
        f"CER {card['cer']:.4f}  ({render_interval(card)})   "
        f"{card['edits']:,} edits ÷ {card['reference_length']:,} symbols, {card['clips']:,} clips",
        f"{card['substitutions']:,} substitutions, {card['deletions']:,} deletions, {card['insertions']:,} insertions"
        f"   macro CER: {macro}",
    ]
    if "wer" in card:
        lines[0] += f"\nWER {card['wer']:.4f}   {card['word_edits']:,} edits ÷ {card['reference_words']:,} words"
    for title, rows in card["groups"].items():
        lines.append(f"{title:>12}  " + "   ".join(f"{row['name']} {row['cer']:.3f} ({row['clips']})" for row in rows))
    sure = (f"{row['name']} right {row['accuracy']:.3f} ({row['clips']})" for row in card["calibration"])
    lines.append(f"{'confidence':>12}  " + "   ".join(sure))
    return "\n".join(lines + warnings(card))


def warnings(card: dict[str, Any]) -> list[str]:
    """What makes a score say less than it seems to."""
    said = []
    if card["undecodable"]:
        said.append(f"{len(card['undecodable'])} clips did not decode and were scored as silence: see scorecard.json")
    lost = card["validation"].get("rejected", 0)
    if lost:
        said.append(f"{lost} validation clips were rejected at the build and are not in this score")
    if not card["validation"].get("disjoint_by_speaker", True):
        said.append("validation is not disjoint by speaker: this score flatters the model")
    return said


def render_interval(card: dict[str, Any]) -> str:
    interval = card["cer_interval_95"]
    if not interval:
        return "one child: no interval"
    return f"95 % interval {interval[0]:.4f} – {interval[1]:.4f} over {card['children']} children"


# --- groups -------------------------------------------------------------------------------------------------------


def groupings(clips: Sequence[ClipScore]) -> dict[str, Groups]:
    """The clips by corpus, age, duration and label length; each clip once in each."""
    return {
        "corpus": group(clips, lambda clip: clip.corpus),
        "age_bucket": group(clips, lambda clip: clip.age_bucket or UNKNOWN, age_order),
        "duration": _edged_groups(clips, lambda clip: clip.seconds, DURATION_EDGES, " s"),
        "label_length": _edged_groups(clips, lambda clip: clip.counts.reference_length, LENGTH_EDGES),
    }


def group(
    clips: Iterable[ClipScore], key: Callable[[ClipScore], str], order: Callable[[str], Any] | None = None
) -> Groups:
    """Group clips by the key, in the order of keys."""
    groups: Groups = defaultdict(list)
    for clip in clips:
        groups[key(clip)].append(clip)
    return {name: groups[name] for name in sorted(groups, key=order)}


def total_of(clips: Iterable[ClipScore]) -> EditCounts:
    return sum((clip.counts for clip in clips), EditCounts())


def sums(groups: Groups, speakers: Sequence[str]) -> tuple[Floats, Floats]:
    """Edits and reference lengths of each speaker in each group, shape (speakers, groups)."""
    place = {speaker: row for row, speaker in enumerate(speakers)}
    edits, lengths = np.zeros((2, len(speakers), len(groups)))
    for column, clips in enumerate(groups.values()):
        for clip in clips:
            edits[place[clip.speaker], column] += clip.counts.edits
            lengths[place[clip.speaker], column] += clip.counts.reference_length
    return edits, lengths


def _rows(groups: Groups, drawn: Resampling | None) -> list[dict[str, Any]]:
    rates = drawn.rates(*sums(groups, drawn.speakers)) if drawn else None
    rows = []
    for column, (name, clips) in enumerate(groups.items()):
        counts, speakers = total_of(clips), len({clip.speaker for clip in clips})
        row = {"name": name, "cer": counts.rate, "edits": counts.edits, "reference_length": counts.reference_length,
               "clips": len(clips)}  # fmt: skip
        if drawn is not None and rates is not None:
            known = speakers > 1
            row |= {"children": speakers, "interval_95": drawn.interval(rates[:, column]) if known else None}
        rows.append(row)
    return rows


def _macro(groups: Groups, drawn: Resampling) -> dict[str, Any]:
    """The mean of the groups' rates, whatever their sizes.

    Where each speaker is in one group, speakers are drawn within it, so that every draw has every group. Otherwise
    draws that lack a group are left out. There is no interval where a group has one speaker, or is lacking often.
    """
    speakers = [sorted({clip.speaker for clip in clips}) for clips in groups.values()]
    interval = None
    if min(map(len, speakers)) > 1 and sum(map(len, speakers)) == len(drawn.speakers):
        parts = [(Resampling(of, seed=number), {name: clips})
                 for number, (of, (name, clips)) in enumerate(zip(speakers, groups.items(), strict=True))]  # fmt: skip
        rates = np.stack([part.rates(*sums(own, part.speakers))[:, 0] for part, own in parts], axis=1)
        interval = drawn.interval(rates.mean(axis=1))
    elif min(map(len, speakers)) > 1:
        means = drawn.rates(*sums(groups, drawn.speakers)).mean(axis=1)  # NaN where a group is lacking
        interval = drawn.interval(means) if np.isnan(means).mean() <= MAY_LACK else None
    return {"cer": _mean_rate(groups), "interval_95": interval}


def _macro_by_child(by_child: Groups, drawn: Resampling) -> dict[str, Any]:
    rates = np.array([total_of(by_child[speaker]).rate for speaker in drawn.speakers])
    means = drawn.times @ rates / max(len(rates), 1)
    return {"cer": _mean_rate(by_child), "interval_95": drawn.interval(means)}


def _mean_rate(groups: Groups) -> float:
    return sum(total_of(clips).rate for clips in groups.values()) / len(groups)


def _edged_groups(
    clips: Iterable[ClipScore], value: Callable[[ClipScore], float], edges: Sequence[float], unit: str = ""
) -> Groups:
    """Clips by the first edge that their value does not exceed, the least first."""
    names = [*(f"≤ {edge:g}{unit}" for edge in edges), f"> {edges[-1]:g}{unit}"]
    groups = group(clips, lambda clip: names[bisect.bisect_left(edges, value(clip))])
    return {name: groups[name] for name in names if name in groups}


def _calibration(clips: Iterable[ClipScore]) -> list[dict[str, Any]]:
    """Whether the model knows when it is right: by its confidence, the mean of it beside 1 − CER."""
    groups = _edged_groups(clips, lambda clip: clip.confidence, CONFIDENCE_EDGES)
    return [
        {"name": name, "clips": len(theirs), "confidence": sum(clip.confidence for clip in theirs) / len(theirs),
         "accuracy": 1 - total_of(theirs).rate}
        for name, theirs in groups.items()
    ]  # fmt: skip


def count_confusions(clips: Iterable[ClipScore], track: str) -> Counter[tuple[str, str]]:
    """How often each reference symbol was heard as which: ("a", "a") right, ("a", "") not heard, ("", "a") made up."""
    pairs: Counter[tuple[str, str]] = Counter()
    for clip in clips:
        reference, hypothesis = normalize(clip.reference, track), normalize(clip.hypothesis, track)
        for run in Levenshtein.opcodes(reference, hypothesis):  # of equal symbols, or of one kind of edit
            spoken, heard = reference[run.src_start : run.src_end], hypothesis[run.dest_start : run.dest_end]
            pairs.update(zip_longest(spoken, heard, fillvalue=""))
    return pairs
