"""Align a shard set's labels in time: each word of a recording, and the words before each cut of the build."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
import zstandard
from tqdm import tqdm

from sharding.audio.codec import FRAME_SAMPLES, SAMPLE_RATE, Waveform, decode
from sharding.errors import AudioError, ShardError
from sharding.files.writing import written
from sharding.segment.ctc_align import GAP_FRAMES, NEAR_FRAMES, AlignError, align, deletion_gaps, word_llrs, worst_gaps
from sharding.shardset.index import ShardIndex, read_index
from sharding.shardset.sample import Sample
from sharding.shardset.store import Store, open_store
from streamtrain.data.dataset import read_ahead
from streamtrain.distributed import World
from streamtrain.infer.inputs import read_pieces, rows_of_recordings
from streamtrain.model.ctc import CTCModel, count_frames
from streamtrain.model.decode import join_texts
from streamtrain.model.inference import batched_log_probs, chunk_by_memory
from streamtrain.model.labels import take_labels
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

WINDOW_SEC = 20.0  # windows of a long recording …
CONTEXT_SEC = 2.5  # … have this context on either side, whose frames are dropped
WHOLE_SEC = 25.0  # a recording up to this length is one window, as in training
READERS = 2


@dataclass(frozen=True, eq=False)
class LabelledRecording:
    """Hold a recording with its whole label, joined from its pieces."""

    utterance_id: str
    text: str
    waveform: Waveform
    cuts: tuple[int, ...]  # samples at which its pieces begin, except the first
    error: str | None = None

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Window:
    """Describe a stretch of a recording (in samples) for one forward, and its frames that enter the recording's."""

    recording: int
    start: int
    end: int
    skip: int  # leading frames of context
    first: int  # position in the recording, frames
    frames: int


def align_shards(model_folder: Path, shards: str, out: Path, batch_seconds: float | None = None) -> int:
    """Write a compressed JSONL row for each recording that has a label or an error; return the number of rows.

    Fields: `utterance_id`, `text`, `seconds`, `words` (each with `start` and `end` in seconds, as `confidence` the
    probability that both are right within 60 ms, as `evidence` the log-likelihood ratio in nats of the label with and
    without it, as `order` that of the label and the label with this word and the next swapped), `cuts` (each with its
    second, the likeliest number of words before it, the probability of that number, and the probability that it falls
    `inside` a word), `pieces` (for each the log-likelihood ratio in nats of the best path and the label, in the half
    second in which they differ most), `without` (the same around deleted words, for some words: what wrong labels look
    like to this model), `log_prob` (of the label, per frame, relative to the best path), `error`.
    """
    store = open_store(shards)
    index = read_index(store)
    model = load_trained(model_folder).to(World().device)
    warn_unless_finished(model_folder)
    take_labels(model, index.labels)
    groups = list(rows_of_recordings(store, index))
    count = 0
    loaded = read_ahead(lambda group: _load(store, index, *group), iter(groups), READERS)
    with (
        written(out) as file,
        zstandard.ZstdCompressor().stream_writer(file, closefd=False) as lines,
        tqdm(total=len(groups), unit="clip") as bar,
    ):
        for chunk in chunk_by_memory(loaded):
            labelled = [recording for recording in chunk if recording.text or recording.error]
            for row in _align_chunk(model, labelled, batch_seconds):
                lines.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            count += len(labelled)
            bar.update(len(chunk))
    return count


def _load(store: Store, index: ShardIndex, key: str, rows: Sequence[int]) -> LabelledRecording:
    try:
        samples = read_pieces(store, index, rows)
        pieces = [decode(sample.audio)[0] for sample in samples]
    except (ShardError, AudioError) as error:
        return LabelledRecording(unquote(key), "", np.zeros(0, np.float32), (), error.message)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    name = samples[0].parent_id or samples[0].utterance_id
    return LabelledRecording(name, _label_of(samples), np.concatenate(pieces), tuple(ends[:-1]))


def _label_of(samples: Sequence[Sample]) -> str:
    """Return a recording's whole label: the parent text if an uncertain piece keeps it, else that of its pieces."""
    whole = [sample.parent_text for sample in samples if sample.parent_text is not None]
    return whole[0] if whole else join_texts([sample.text for sample in samples])


def windows_of(recording: int, samples: int, geometry: Sequence[tuple[int, int]]) -> Iterator[Window]:
    """Yield windows that cover each frame of a recording once, given the (kernel, stride) of each convolution."""
    frames = max(int(count_frames(torch.tensor(samples), geometry)), 0)
    hop = math.prod(stride for _, stride in geometry)
    in_window, in_context = (round(seconds * SAMPLE_RATE / hop) for seconds in (WINDOW_SEC, CONTEXT_SEC))
    if samples <= WHOLE_SEC * SAMPLE_RATE:
        yield Window(recording, 0, samples, 0, 0, frames)
        return
    for first in range(0, frames, in_window):
        count = min(in_window, frames - first)
        skip = min(in_context, first)
        end = (first + count + in_context) * hop
        yield Window(recording, (first - skip) * hop, min(end, samples), skip, first, count)


def _align_chunk(
    model: CTCModel, recordings: Sequence[LabelledRecording], batch_seconds: float | None
) -> Iterator[dict[str, Any]]:
    loaded = {number: recording for number, recording in enumerate(recordings) if recording.error is None}
    windows_by_number = {number: list(windows_of(number, len(recording.waveform), model.geometry))
                         for number, recording in loaded.items()}  # fmt: skip
    outputs = {number: torch.zeros(sum(window.frames for window in windows), len(model.vocab), device=model.device)
               for number, windows in windows_by_number.items()}  # fmt: skip
    windows = list(chain.from_iterable(windows_by_number.values()))
    waveforms = [loaded[window.recording].waveform[window.start : window.end] for window in windows]
    for batch, log_probs, _ in batched_log_probs(model, waveforms, batch_seconds):
        for window, frames in zip((windows[i] for i in batch), log_probs, strict=True):
            without_context = frames[window.skip : window.skip + window.frames]
            outputs[window.recording][window.first : window.first + window.frames] = without_context
    for number, recording in enumerate(recordings):
        yield _row(recording, outputs.get(number), model)


def _row(recording: LabelledRecording, log_probs: torch.Tensor | None, model: CTCModel) -> dict[str, Any]:
    row: dict[str, Any] = {
        "utterance_id": recording.utterance_id,
        "text": recording.text,
        "seconds": round(recording.seconds, 3),
        "words": [],
        "cuts": [],
        "pieces": [],
        "without": [],
        "log_prob": None,
        "error": recording.error,
    }
    if log_probs is None:
        return row
    cuts = [min(cut // model.frame_samples, len(log_probs) - 1) for cut in recording.cuts]
    near, width = (max(round(frames * FRAME_SAMPLES / model.frame_samples), 1) for frames in (NEAR_FRAMES, GAP_FRAMES))
    try:
        alignment = align(log_probs, recording.text, model.vocab, cuts, near)
    except AlignError as error:
        return row | {"error": str(error)}
    second = model.frame_samples / SAMPLE_RATE  # length of a frame
    evidence, order = word_llrs(log_probs, alignment.words, model.vocab)
    without = deletion_gaps(log_probs, alignment.words, recording.utterance_id, model.vocab, width) if cuts else []
    return row | {
        "words": [
            {"word": word.text, "start": round(word.first_frame * second, 3), "end": round(word.end_frame * second, 3),
             "confidence": round(word.confidence, 4), "evidence": round(nats, 2), "order": round(before_next, 2)}
            for word, nats, before_next in zip(alignment.words, evidence, order, strict=True)
        ],
        "cuts": [
            {"at": round(cut / SAMPLE_RATE, 6), "words_before": int(before.argmax()),
             "probability": round(float(before.max()), 6), "inside": round(max(1 - float(before.sum()), 0.0), 6)}
            for cut, before in zip(recording.cuts, alignment.before, strict=True)
        ],
        "pieces": [{"gap": round(gap, 3)} for gap in worst_gaps(alignment.gap, cuts, width)],
        "without": [round(gap, 3) for gap in without],
        "log_prob": round((alignment.log_prob - alignment.best_log_prob) / len(log_probs), 4),
    }  # fmt: skip
