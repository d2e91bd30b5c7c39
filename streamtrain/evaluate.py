"""One exact corpus CER: every clip of a split once, whatever the number of ranks, and the scorecard made of it."""

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from sharding.audio import SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.format import ShardIndex, read_index
from sharding.ipa import normalize
from sharding.sample import Sample
from sharding.store import open_store
from streamtrain.decode import Hypothesis, join_pieces, read_out
from streamtrain.metrics import EditCounts, bootstrap_interval, count_edits, spoken_words
from streamtrain.model import load_trained
from streamtrain.network import CTCModel
from streamtrain.plan import plan_evaluation
from streamtrain.stream import ShardStream
from streamtrain.world import PreemptedError, Preemption, World

DURATION_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, of the scorecard's groups
LENGTH_EDGES = (5, 10, 20, 40, 80)  # symbols, likewise
CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # likewise
WORST_CLIPS = 20
CONFUSIONS = 30


@dataclass(frozen=True, slots=True)
class Piece:
    """What was decoded of one sample."""

    recording_id: str
    piece: int
    child_id: str
    session_id: str
    corpus: str
    age_bucket: str
    seconds: float
    decoded: bool  # whether its audio could be
    reference: str  # of the whole recording where this is its first piece, else empty
    hypothesis: str
    confidence: float


@dataclass(frozen=True, slots=True)
class ClipScore:
    """One recording, scored once."""

    utterance_id: str
    child_id: str
    session_id: str
    corpus: str
    age_bucket: str
    seconds: float
    decoded: bool
    reference: str
    hypothesis: str
    confidence: float
    counts: EditCounts  # over symbols
    words: EditCounts | None  # over words as the challenge compares them, of the word track

    @property
    def speaker(self) -> str:
        """As far as the shard set tells: the child, else the session, else the clip itself."""
        return self.child_id or self.session_id or self.utterance_id


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The total over all ranks, and, on every rank, the clips it is made of."""

    total: EditCounts
    words: EditCounts | None  # of the word track
    clips: tuple[ClipScore, ...]  # sorted by id
    track: str


def evaluate(
    model: CTCModel,
    stream: ShardStream,
    split: str,
    batch_seconds: float,
    world: World,
    preemption: Preemption | None = None,
    keep_bar: bool = False,
    beam: int = 0,
) -> Evaluation:
    """Decode every clip of a split once and add up its edits; the same counts at any world size.

    Batches are formed without regard to the ranks, then dealt out in turn; ranks run equally many forwards (ZeRO-3
    needs that), the spare ones over a silent row. Raises StreamtrainError where a clip comes twice or never, and
    PreemptedError on all ranks where `preemption` was asked for on one.
    """
    rows = stream.index.split(split)
    if len(rows) == 0:
        raise StreamtrainError(
            f"the shard set has no clips in split {split!r}", "which splits it has: sharding inspect"
        )
    if model.vocab.track != stream.index.track:
        raise StreamtrainError(
            f"the model writes the {model.vocab.track} track, the labels are of the {stream.index.track} track",
            "build the shard set with the other --track, or evaluate another model",
        )
    batches = [rows[batch] for batch in plan_evaluation(stream.index.samples["samples"][rows], batch_seconds)]
    mine = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    mine += [np.zeros(0, np.int64)] * (rounds - len(mine))
    was_training = model.training
    model.eval()
    pieces: list[Piece] = []
    bar = tqdm(
        total=sum(map(len, mine)), desc="evaluating", unit="clip", leave=keep_bar, disable=None if world.main else True
    )
    with torch.no_grad(), bar:  # inference mode would leave ZeRO-3 tensors that cannot be trained on
        for batch, samples in stream.batches(mine):
            on_device = batch.to(world.device)
            log_probs = model(on_device.inputs, on_device.input_lengths)  # (B, T, V)
            hypotheses = read_out(log_probs, model.frame_counts(batch.input_lengths), model.vocab, beam)
            seconds = (batch.input_lengths / SAMPLE_RATE).tolist()
            pieces += [
                _piece(sample, hypothesis, length, sample.key not in batch.failed)
                for sample, hypothesis, length in zip(samples, hypotheses, seconds, strict=False)
            ]
            bar.update(len(samples))
            if preemption is not None and world.gather_floats([preemption.asked]).any():
                raise PreemptedError("stopped while it was evaluated")
    model.train(was_training)
    return _score(pieces, stream.index, len(rows), world)


def evaluate_model(
    model_folder: str, shards: str, split: str, batch_seconds: float, out: Path, world: World, beam: int = 0
) -> dict[str, Any]:
    """Score a saved model on a split of a shard set; rank 0 writes the scorecard to `out` and prints it."""
    store = open_store(shards)
    index = read_index(store)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before the work
    model = load_trained(model_folder).to(world.device)
    stream = ShardStream(index, store, model.vocab, model.normalize, world)
    evaluation = evaluate(model, stream, split, batch_seconds, world, keep_bar=True, beam=beam)
    card = scorecard(evaluation, index.notes, model=model_folder, shards=shards, split=split)
    if world.main:
        write_scorecard(card, evaluation.clips, out)
        print(render(card))
    return card


def _piece(sample: Sample, hypothesis: Hypothesis, seconds: float, decoded: bool) -> Piece:
    shared = sample.recording_id != sample.utterance_id
    return Piece(
        sample.recording_id,
        sample.piece if shared else 0,
        sample.child_id,
        sample.session_id,
        sample.corpus,
        sample.age_bucket,
        seconds,
        decoded,
        (sample.parent_text or "") if shared else sample.text,
        hypothesis.text,
        hypothesis.confidence,
    )


def _score(pieces: list[Piece], index: ShardIndex, expected: int, world: World) -> Evaluation:
    """Pieces of all ranks → recordings → counts. Each rank counts the recordings dealt to it, then all are summed."""
    everywhere = [piece for rank in world.gather(pieces) for piece in rank]
    seen = Counter((piece.recording_id, piece.piece) for piece in everywhere)
    if len(seen) != expected or max(seen.values(), default=1) > 1:
        raise StreamtrainError(
            f"{len(everywhere)} clips were decoded, {len(seen)} of them distinct, {expected} expected"
        )
    recordings: dict[str, list[Piece]] = defaultdict(list)
    for piece in everywhere:
        recordings[piece.recording_id].append(piece)
    names = sorted(recordings)
    mine = {name: _count(recordings[name], index.track) for name in names[world.rank :: world.size]}
    total = world.sum(sum((symbols for symbols, _ in mine.values()), EditCounts()))
    words = world.sum(sum((words for _, words in mine.values() if words), EditCounts()))
    counted = {name: counts for rank in world.gather(mine) for name, counts in rank.items()}
    clips = tuple(_clip(name, recordings[name], *counted[name]) for name in names)
    return Evaluation(total, words if index.track == "word" else None, clips, index.track)


def _count(pieces: Iterable[Piece], track: str) -> tuple[EditCounts, EditCounts | None]:
    """Edits of a recording over symbols, and of the word track over words."""
    ordered = sorted(pieces, key=lambda piece: piece.piece)
    reference = normalize(ordered[0].reference, track)
    hypothesis = normalize(join_pieces([piece.hypothesis for piece in ordered]), track)
    words = count_edits(spoken_words(reference), spoken_words(hypothesis)) if track == "word" else None
    return count_edits(reference, hypothesis), words


def _clip(name: str, pieces: Sequence[Piece], counts: EditCounts, words: EditCounts | None) -> ClipScore:
    ordered = sorted(pieces, key=lambda piece: piece.piece)
    first = ordered[0]
    return ClipScore(
        utterance_id=name,
        child_id=first.child_id,
        session_id=first.session_id,
        decoded=all(piece.decoded for piece in ordered),
        corpus=first.corpus,
        age_bucket=first.age_bucket,
        seconds=round(sum(piece.seconds for piece in ordered), 3),
        reference=first.reference,
        hypothesis=join_pieces([piece.hypothesis for piece in ordered]),
        confidence=sum(piece.confidence * piece.seconds for piece in ordered)
        / max(sum(piece.seconds for piece in ordered), 1e-9),
        counts=counts,
        words=words,
    )


# --- the scorecard ----------------------------------------------------------------------------------------------


def scorecard(evaluation: Evaluation, notes: dict[str, Any], **context: Any) -> dict[str, Any]:
    """What a person needs to believe a score: the total with its interval, its groups, its confusions, its worst clips.

    `notes` are the shard set's, on how validation was chosen and what it lost.
    """
    total, clips = evaluation.total, evaluation.clips
    by_child = _group(clips, lambda clip: clip.speaker)
    by_corpus = _group(clips, lambda clip: clip.corpus)
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
            "cer_interval_95": bootstrap_interval({child: _total(theirs) for child, theirs in by_child.items()}),
            "edits": total.edits,
            "reference_length": total.reference_length,
            "clips": len(clips),
            "substitutions": total.substitutions,
            "deletions": total.deletions,
            "insertions": total.insertions,
            "macro_cer_by_child": _macro(by_child),
            "macro_cer_by_corpus": _macro(by_corpus),
            "children": len(by_child),
            "groups": {
                "corpus": _rows(by_corpus),
                "age_bucket": _rows(_group(clips, lambda clip: clip.age_bucket or "unknown")),
                "duration": _rows(_edged_groups(clips, lambda clip: clip.seconds, DURATION_EDGES, " s")),
                "label_length": _rows(_edged_groups(clips, lambda clip: clip.counts.reference_length, LENGTH_EDGES)),
            },
            "calibration": _calibration(clips),
            "confusions": _confusions(clips, evaluation.track),
            "worst": [asdict(clip) for clip in worst],
            "undecodable": [clip.utterance_id for clip in clips if not clip.decoded],
            "validation": notes.get("validation", {}),
        }
        | of_words
    )


def write_scorecard(card: dict[str, Any], clips: Sequence[ClipScore], folder: Path) -> None:
    """`scorecard.json`, and every clip's reference and hypothesis in `hypotheses.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scorecard.json").write_text(json.dumps(card, ensure_ascii=False, indent=1), encoding="utf-8")
    with open(folder / "hypotheses.jsonl", "w", encoding="utf-8") as lines:
        for clip in clips:
            lines.write(json.dumps(asdict(clip), ensure_ascii=False) + "\n")


def render(card: dict[str, Any]) -> str:
    """The scorecard as a person reads it in a terminal."""
    lines = [
        f"CER {card['cer']:.4f}  ({render_interval(card)})   "
        f"{card['edits']:,} edits ÷ {card['reference_length']:,} symbols, {card['clips']:,} clips",
        f"{card['substitutions']:,} substitutions, {card['deletions']:,} deletions, {card['insertions']:,} insertions"
        f"   macro CER: by child {card['macro_cer_by_child']:.4f}, by corpus {card['macro_cer_by_corpus']:.4f}",
    ]
    if "wer" in card:
        lines[0] += f"\nWER {card['wer']:.4f}   {card['word_edits']:,} edits ÷ {card['reference_words']:,} words"
    for title, group in card["groups"].items():
        lines.append(f"{title:>12}  " + "   ".join(f"{row['name']} {row['cer']:.3f} ({row['clips']})" for row in group))
    sure = (f"{row['name']} right {row['accuracy']:.3f} ({row['clips']})" for row in card["calibration"])
    lines.append(f"{'confidence':>12}  " + "   ".join(sure))
    if card["undecodable"]:
        lines.append(f"{len(card['undecodable'])} clips did not decode and were scored as silence: see scorecard.json")
    lost = card["validation"].get("rejected", 0)
    if lost:
        lines.append(f"{lost} validation clips were rejected at the build and are not in this score")
    if not card["validation"].get("disjoint_by_speaker", True):
        lines.append("validation is not disjoint by speaker: this score flatters the model")
    return "\n".join(lines)


def render_interval(card: dict[str, Any]) -> str:
    interval = card["cer_interval_95"]
    if not interval:
        return "one child: no interval"
    return f"95 % interval {interval[0]:.4f} – {interval[1]:.4f} over {card['children']} children"


def _group(clips: Iterable[ClipScore], key: Callable[[ClipScore], str]) -> dict[str, list[ClipScore]]:
    groups: dict[str, list[ClipScore]] = defaultdict(list)
    for clip in clips:
        groups[key(clip)].append(clip)
    return dict(sorted(groups.items()))


def _total(clips: Iterable[ClipScore]) -> EditCounts:
    return sum((clip.counts for clip in clips), EditCounts())


def _rows(groups: dict[str, list[ClipScore]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "cer": counts.rate, "edits": counts.edits, "reference_length": counts.reference_length,
         "clips": len(clips)}
        for name, clips in groups.items()
        for counts in [_total(clips)]
    ]  # fmt: skip


def _macro(groups: dict[str, list[ClipScore]]) -> float:
    return sum(_total(clips).rate for clips in groups.values()) / len(groups)


def _edged_groups(
    clips: Iterable[ClipScore], value: Callable[[ClipScore], float], edges: Sequence[float], unit: str = ""
) -> dict[str, list[ClipScore]]:
    """Clips by the first edge that their value does not exceed, the least first."""
    names = [*(f"≤ {edge:g}{unit}" for edge in edges), f"> {edges[-1]:g}{unit}"]
    groups = _group(clips, lambda clip: names[bisect.bisect_left(edges, value(clip))])
    return {name: groups[name] for name in names if name in groups}


def _calibration(clips: Iterable[ClipScore]) -> list[dict[str, Any]]:
    """Whether the model knows when it is right: by its confidence, the mean of it beside 1 − CER."""
    groups = _edged_groups(clips, lambda clip: clip.confidence, CONFIDENCE_EDGES)
    return [
        {"name": name, "clips": len(theirs), "confidence": sum(clip.confidence for clip in theirs) / len(theirs),
         "accuracy": 1 - _total(theirs).rate}
        for name, theirs in groups.items()
    ]  # fmt: skip


def _confusions(clips: Iterable[ClipScore], track: str) -> list[dict[str, Any]]:
    """The most frequent single edits: reference symbol, what was heard (empty: nothing), how often."""
    pairs: Counter[tuple[str, str]] = Counter()
    for clip in clips:
        reference, hypothesis = normalize(clip.reference, track), normalize(clip.hypothesis, track)
        for operation in Levenshtein.editops(reference, hypothesis):
            spoken = "" if operation.tag == "insert" else reference[operation.src_pos]
            heard = "" if operation.tag == "delete" else hypothesis[operation.dest_pos]
            pairs[spoken, heard] += 1
    return [{"reference": a, "hypothesis": b, "count": n} for (a, b), n in pairs.most_common(CONFUSIONS)]
