"""Compute one exact corpus CER: each clip of a split is scored once, whatever the number of ranks."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import ShardError, StoreError, StreamtrainError, UnreachableError
from sharding.files.writing import explaining
from sharding.labels.policy import LabelPolicy
from sharding.shardset.index import ShardIndex, check_presence, read_index, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.store import open_store
from streamtrain.data.collate import Batch, silence_too_dense
from streamtrain.data.dataset import ShardStream
from streamtrain.distributed import PreemptedError, Preemption, World
from streamtrain.eval.compare import check_comparable, compare
from streamtrain.eval.compare import render as render_comparison
from streamtrain.eval.html import write_page
from streamtrain.eval.metrics import EditCounts, TextEdits
from streamtrain.eval.scorecard import ClipScore, Evaluation, read_scorecard, render, scorecard, write_scorecard
from streamtrain.model.batches import batch_by_length
from streamtrain.model.ctc import CTCModel, ctc_losses
from streamtrain.model.decode import decode_log_probs, join_texts
from streamtrain.model.inference import scoring_mode
from streamtrain.model.labels import take_labels
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

SCORED_SPLITS = ("valid", "test", "train")
PAGE_BYTES = 20_000_000  # audio in scorecard.html at most


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """Hold the hypothesis of one sample."""

    row: int  # in the index
    sample: Sample  # without its audio
    seconds: float
    decoded: bool  # false: its audio could not be, so silence was scored
    hypothesis: str
    confidence: float
    nats: (
        float | None
    )  # CTC loss of its label; None for a segment of a longer recording, or if no path spells the label
    symbols: int  # of its label, in the model's ids

    @property
    def piece(self) -> int:
        """Return its position among the samples that are scored together."""
        return self.sample.piece if self.sample.recording_id != self.sample.utterance_id else 0


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
    """Decode each clip of a split once, sum the edits and the CTC loss; both are the same at any world size.

    Batches are formed independently of the ranks, then dealt out in turn. All ranks take equally many, the spare ones
    with one silent row, so that they can exchange `preemption` after each. Raises StreamtrainError if the split has
    nothing to score, the model writes other labels, or a clip is decoded twice or never, and PreemptedError on all
    ranks if `preemption` was requested on any rank.
    """
    rows = _find_labelled(stream.index, stream.store.url, split)
    stream.index.labels.check_digest(stream.store.url)
    take_labels(model, stream.index.labels)
    if stream.vocab != model.vocab:
        raise StreamtrainError("the stream has another vocabulary than the model", "make it after `take_labels`")
    batches = [rows[batch] for batch in batch_by_length(stream.index.samples["samples"][rows], batch_seconds)]
    share = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    share += [np.zeros(0, np.int64)] * (rounds - len(share))
    segments: list[DecodedSegment] = []
    bar = tqdm(
        total=sum(map(len, share)), desc="evaluating", unit="clip", leave=keep_bar, disable=None if world.main else True
    )
    with scoring_mode(), bar:
        for row_ids, (batch, samples) in zip(share, stream.batches(share), strict=True):
            on_device, frames = batch.to(model.device), model.frame_counts(batch.input_lengths)
            log_probs = model(on_device.inputs, on_device.input_lengths)  # (B, T, V)
            hypotheses = decode_log_probs(log_probs, frames, model.vocab, beam)
            nats = _losses(log_probs, frames, on_device, samples, model.vocab.blank)
            seconds, symbols = (batch.input_lengths / SAMPLE_RATE).tolist(), batch.target_lengths.tolist()
            segments += [
                DecodedSegment(row, replace(sample, audio=b""), length, sample.key not in batch.failed, hypothesis.text,
                               hypothesis.confidence, loss, count)
                for row, sample, hypothesis, length, loss, count
                in zip(row_ids.tolist(), samples, hypotheses, seconds, nats, symbols, strict=False)
            ]  # fmt: skip
            bar.update(len(samples))
            if preemption is not None and world.gather_floats([preemption.asked]).any():
                raise PreemptedError("stopped during evaluation")
    return _score(segments, stream.index, len(rows), world)


def _losses(
    log_probs: torch.Tensor, frames: torch.Tensor, batch: Batch, samples: Sequence[Sample], blank: int
) -> list[float | None]:
    """Return the CTC loss of each clip in nats, None for those that `DecodedSegment.nats` leaves out."""
    spelt = silence_too_dense(batch, frames)
    losses = ctc_losses(log_probs, frames, spelt.targets, spelt.target_lengths, spelt.weights, blank).tolist()
    whole = [sample.recording_id == sample.utterance_id for sample in samples]
    return [
        loss if is_whole and weight and math.isfinite(loss) else None
        for loss, weight, is_whole in zip(losses, spelt.weights.tolist(), whole, strict=False)
    ]


def _find_labelled(index: ShardIndex, url: str, split: str) -> npt.NDArray[np.int64]:
    """Return the rows of a split that can be scored. Raises StreamtrainError if there is none."""
    rows = index.split(split)
    if split not in SCORED_SPLITS or not len(rows):
        raise StreamtrainError(
            f"{url}: has no labelled clips in split {split!r}, so nothing was scored",
            "--split valid or train scores these; or build a set of other speakers with --valid-fraction 1",
        )
    return rows


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

    `compare_to` is a folder with another model's scorecard on the same clips. Other ranks return an empty scorecard.
    """
    baseline = None
    if compare_to is not None:
        baseline = read_scorecard(compare_to)
        if compare_to.resolve() == out.resolve():
            raise StreamtrainError(f"--compare-to {compare_to}: is --out itself", "name another model's evaluation")
    store = open_store(shards)
    index = read_index(store)
    _find_labelled(index, store.url, split)  # before the model is loaded
    with world.on_main("check that the shards exist") as is_main:
        if is_main:
            check_presence(store, index)
    with explaining(out):  # fail before the work, not after it, if the folder cannot be written
        out.mkdir(parents=True, exist_ok=True)
    model = load_trained(model_folder).to(world.device)
    take_labels(model, index.labels)
    if world.main:
        warn_unless_finished(Path(model_folder))
    stream = ShardStream(index, store, model.vocab, model.normalize, world)
    evaluation = evaluate(model, stream, split, batch_seconds, world, keep_bar=True, beam=beam)
    card: dict[str, Any] = {}
    with world.on_main(f"write the scorecard to {out}") as is_main:
        if is_main:
            card = scorecard(evaluation, index, model=model_folder, shards=shards, split=split)
            write_scorecard(card, evaluation.clips, out)
            print(render(card))
            comparison = None
            if baseline is not None:
                check_comparable(baseline[0], card)
                comparison = compare(baseline[1], evaluation.clips, str(compare_to), card["metric"])
                print(render_comparison(comparison))
            clip_audio = _worst_clip_audio(card, evaluation, stream)
            write_page(card, evaluation.clips, clip_audio, out / "scorecard.html", comparison)
    return card


def _worst_clip_audio(card: dict[str, Any], evaluation: Evaluation, stream: ShardStream) -> dict[str, list[bytes]]:
    """Return the FLAC pieces of the worst clips up to PAGE_BYTES in total, without clips that cannot be read.

    Reading stops at the first UnreachableError: the remaining clips would only wait for the same server.
    """
    clip_audio: dict[str, list[bytes]] = {}
    bytes_left = PAGE_BYTES
    for clip in card["worst"]:
        name = clip["utterance_id"]
        try:
            pieces = [read_sample(stream.store, stream.index, row).audio for row in evaluation.rows[name]]
            if sum(map(len, pieces)) <= bytes_left:
                clip_audio[name] = pieces
                bytes_left -= sum(map(len, pieces))
        except UnreachableError:
            break
        except (ShardError, StoreError):
            continue
    return clip_audio


def _score(segments: list[DecodedSegment], index: ShardIndex, expected: int, world: World) -> Evaluation:
    """Join the segments of all ranks into recordings; each rank counts its share of them, then counts are summed."""
    gathered = (segment for rank in world.gather(segments) for segment in rank)
    all_segments = sorted(gathered, key=lambda segment: (segment.sample.recording_id, segment.piece))
    occurrences = Counter((segment.sample.recording_id, segment.piece) for segment in all_segments)
    if len(occurrences) != expected or max(occurrences.values(), default=1) > 1:
        raise StreamtrainError(
            f"{len(all_segments)} clips were decoded, {len(occurrences)} distinct; expected {expected}, each once"
        )
    recordings: dict[str, list[DecodedSegment]] = defaultdict(list)
    for segment in all_segments:
        recordings[segment.sample.recording_id].append(segment)
    names = list(recordings)
    local_counts = {name: _count(recordings[name], index.labels) for name in names[world.rank :: world.size]}
    total = _sum_over_ranks(world, sum(local_counts.values(), TextEdits()))
    counts_by_name = {name: counts for rank in world.gather(local_counts) for name, counts in rank.items()}
    clips = tuple(_clip(name, recordings[name], counts_by_name[name]) for name in names)
    rows = {name: tuple(segment.row for segment in recordings[name]) for name in names}
    loss, loss_clips = _mean_loss(all_segments)
    return Evaluation(total, clips, index.labels, rows, loss, loss_clips)


def _mean_loss(segments: Sequence[DecodedSegment]) -> tuple[float | None, int]:
    """Return nats ÷ label symbols of the clips that have a loss, and their number. The sum is rounded once."""
    covered = [segment for segment in segments if segment.nats is not None]
    symbols = sum(segment.symbols for segment in covered)
    nats = math.fsum(segment.nats or 0.0 for segment in covered)
    return (nats / symbols if symbols else None), len(covered)


def _sum_over_ranks(world: World, edits: TextEdits) -> TextEdits:
    """Sum integer counts over ranks, in one reduction."""
    kinds, size = astuple(edits), len(fields(EditCounts))
    counts = world.sum([count for kind in kinds for count in kind])
    return TextEdits(*(EditCounts(*counts[start : start + size]) for start in range(0, len(counts), size)))


def _label_of(segments: Sequence[DecodedSegment]) -> str:
    """Return the label of the whole recording, which the first of its samples has."""
    first = segments[0].sample
    return (first.parent_text or "") if first.recording_id != first.utterance_id else first.text


def _count(segments: Sequence[DecodedSegment], labels: LabelPolicy) -> TextEdits:
    """Count the edits of a recording."""
    return TextEdits.of(_label_of(segments), join_texts([segment.hypothesis for segment in segments]), labels)


def _clip(name: str, segments: Sequence[DecodedSegment], edits: TextEdits) -> ClipScore:
    first = segments[0].sample
    return ClipScore(
        utterance_id=name,
        child_id=first.child_id,
        session_id=first.session_id,
        decoded=all(segment.decoded for segment in segments),
        corpus=first.corpus,
        age_bucket=first.age_bucket,
        seconds=round(sum(segment.seconds for segment in segments), 3),
        reference=_label_of(segments),
        hypothesis=join_texts([segment.hypothesis for segment in segments]),
        confidence=sum(segment.confidence * segment.seconds for segment in segments)
        / max(sum(segment.seconds for segment in segments), 1e-9),
        counts=edits.symbols,
        words=edits.words,
        characters=None if edits.characters == edits.symbols else edits.characters,
    )
