"""One exact corpus CER: every clip of a split once, whatever the number of ranks."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import ShardError, StoreError, StreamtrainError, UnreachableError
from sharding.files.writing import explaining
from sharding.labels.ipa import normalize
from sharding.shardset.index import ShardIndex, check_presence, read_index, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.store import open_store
from streamtrain.data.dataset import ShardStream
from streamtrain.data.plan import plan_evaluation
from streamtrain.distributed import PreemptedError, Preemption, World
from streamtrain.eval.compare import compare
from streamtrain.eval.compare import render as render_comparison
from streamtrain.eval.html import write_page
from streamtrain.eval.metrics import EditCounts, count_edits, spoken_words
from streamtrain.eval.scorecard import ClipScore, Evaluation, read_scorecard, render, scorecard, write_scorecard
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import Hypothesis, decode_log_probs, join_texts
from streamtrain.model.inference import scoring_mode
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

PAGE_BYTES = 20_000_000  # of audio in scorecard.html


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """What was decoded of one sample."""

    row: int  # of the index
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

    Batches are formed without regard to the ranks, then dealt out in turn; ranks take equally many, the spare ones of a
    silent row, so that they can tell one another of `preemption` after each. Raise StreamtrainError if a clip comes
    twice or never, and PreemptedError on all ranks if `preemption` was asked for on one.
    """
    rows = stream.index.split(split)
    if model.vocab.track != stream.index.track:
        raise StreamtrainError(
            f"the model writes the {model.vocab.track} track, the labels are of the {stream.index.track} track",
            "build the shard set with the other --track, or evaluate another model",
        )
    batches = [rows[batch] for batch in plan_evaluation(stream.index.samples["samples"][rows], batch_seconds)]
    mine = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    mine += [np.zeros(0, np.int64)] * (rounds - len(mine))
    pieces: list[DecodedSegment] = []
    bar = tqdm(
        total=sum(map(len, mine)), desc="evaluating", unit="clip", leave=keep_bar, disable=None if world.main else True
    )
    with scoring_mode(), bar:
        for here, (batch, samples) in zip(mine, stream.batches(mine), strict=True):
            on_device = batch.to(world.device)
            log_probs = model(on_device.inputs, on_device.input_lengths)  # (B, T, V)
            hypotheses = decode_log_probs(log_probs, model.frame_counts(batch.input_lengths), model.vocab, beam)
            seconds = (batch.input_lengths / SAMPLE_RATE).tolist()
            pieces += [
                _piece(row, sample, hypothesis, length, sample.key not in batch.failed)
                for row, sample, hypothesis, length in zip(here.tolist(), samples, hypotheses, seconds, strict=False)
            ]
            bar.update(len(samples))
            if preemption is not None and world.gather_floats([preemption.asked]).any():
                raise PreemptedError("stopped while it was evaluated")
    return _score(pieces, stream.index, len(rows), world)


def evaluate_model(
    model_folder: str,
    shards: str,
    split: str,
    batch_seconds: float,
    out: Path,
    world: World,
    beam: int = 0,
    compare_to: Path | None = None,
) -> dict[str, Any]:
    """Score a saved model on a split of a shard set; rank 0 writes the scorecard to `out`, prints and returns it.

    `beside` is the folder of another model's scorecard on the same clips, to compare it with.
    """
    other = None
    if compare_to is not None:
        _, other = read_scorecard(compare_to)
        if compare_to.resolve() == out.resolve():
            raise StreamtrainError(f"--compare-to {compare_to}: is --out itself", "name another model's evaluation")
    store = open_store(shards)
    index = read_index(store)
    if not len(index.split(split)):
        raise StreamtrainError(
            f"{shards}: has no clips in split {split!r}: nothing was scored",
            "score on a shard set of other speakers, built with --valid-fraction 1, or on --split train",
        )
    with world.on_main("look for the shards") as mine:
        if mine:
            check_presence(store, index)
    with explaining(out):  # what cannot be written is better known before the work
        out.mkdir(parents=True, exist_ok=True)
    model = load_trained(model_folder).to(world.device)
    if world.main:
        warn_unless_finished(Path(model_folder))
    stream = ShardStream(index, store, model.vocab, model.normalize, world)
    evaluation = evaluate(model, stream, split, batch_seconds, world, keep_bar=True, beam=beam)
    card: dict[str, Any] = {}
    with world.on_main(f"write the scorecard to {out}") as mine:
        if mine:
            card = scorecard(evaluation, index, model=model_folder, shards=shards, split=split)
            write_scorecard(card, evaluation.clips, out)
            print(render(card))
            compared = compare(other, evaluation.clips, str(compare_to)) if other is not None else None
            if compared:
                print(render_comparison(compared))
            sounds = _worst_clip_audio(card, evaluation, stream)
            write_page(card, evaluation.clips, sounds, out / "scorecard.html", compared)
    return card


def _worst_clip_audio(card: dict[str, Any], evaluation: Evaluation, stream: ShardStream) -> dict[str, list[bytes]]:
    """The audio of the worst clips, to listen to, as far as a page can hold it; what cannot be read is left out.

    Of a server that is away, no more is asked.
    """
    sounds: dict[str, list[bytes]] = {}
    left = PAGE_BYTES
    for clip in card["worst"]:
        name = clip["utterance_id"]
        try:
            pieces = [read_sample(stream.store, stream.index, row).audio for row in evaluation.rows[name]]
            if sum(map(len, pieces)) <= left:
                sounds[name] = pieces
                left -= sum(map(len, pieces))
        except UnreachableError:
            break
        except (ShardError, StoreError):
            continue
    return sounds


def _piece(row: int, sample: Sample, hypothesis: Hypothesis, seconds: float, decoded: bool) -> DecodedSegment:
    shared = sample.recording_id != sample.utterance_id
    return DecodedSegment(
        row,
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


def _score(pieces: list[DecodedSegment], index: ShardIndex, expected: int, world: World) -> Evaluation:
    """Pieces of all ranks → recordings → counts. Each rank counts the recordings dealt to it, then all are summed."""
    everywhere = [piece for rank in world.gather(pieces) for piece in rank]
    seen = Counter((piece.recording_id, piece.piece) for piece in everywhere)
    if len(seen) != expected or max(seen.values(), default=1) > 1:
        raise StreamtrainError(
            f"{len(everywhere)} clips were decoded, {len(seen)} of them distinct, {expected} expected"
        )
    recordings: dict[str, list[DecodedSegment]] = defaultdict(list)
    for piece in everywhere:
        recordings[piece.recording_id].append(piece)
    names = sorted(recordings)
    mine = {name: _count(recordings[name], index.track) for name in names[world.rank :: world.size]}
    total = _sum_over_ranks(world, (symbols for symbols, _ in mine.values()))
    words = _sum_over_ranks(world, (words for _, words in mine.values() if words))
    counted = {name: counts for rank in world.gather(mine) for name, counts in rank.items()}
    clips = tuple(_clip(name, recordings[name], *counted[name]) for name in names)
    rows = {name: tuple(piece.row for piece in _in_order(recordings[name])) for name in names}
    return Evaluation(total, words if index.track == "word" else None, clips, index.track, rows)


def _sum_over_ranks(world: World, counts: Iterable[EditCounts]) -> EditCounts:
    return EditCounts(*world.sum(astuple(sum(counts, EditCounts()))))


def _in_order(pieces: Iterable[DecodedSegment]) -> list[DecodedSegment]:
    return sorted(pieces, key=lambda piece: piece.piece)


def _count(pieces: Iterable[DecodedSegment], track: str) -> tuple[EditCounts, EditCounts | None]:
    """Edits of a recording over symbols, and of the word track over words."""
    ordered = _in_order(pieces)
    reference = normalize(ordered[0].reference, track)
    hypothesis = normalize(join_texts([piece.hypothesis for piece in ordered]), track)
    words = count_edits(spoken_words(reference), spoken_words(hypothesis)) if track == "word" else None
    return count_edits(reference, hypothesis), words


def _clip(name: str, pieces: Sequence[DecodedSegment], counts: EditCounts, words: EditCounts | None) -> ClipScore:
    ordered = _in_order(pieces)
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
        hypothesis=join_texts([piece.hypothesis for piece in ordered]),
        confidence=sum(piece.confidence * piece.seconds for piece in ordered)
        / max(sum(piece.seconds for piece in ordered), 1e-9),
        counts=counts,
        words=words,
    )
