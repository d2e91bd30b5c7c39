"""Compute and decode log-probabilities of waveforms for inference, in batches that suit the machine.

This file is copied unchanged into a submission.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from sharding.audio.codec import SAMPLE_RATE, Waveform
from streamtrain.model.batches import Rows, batch_by_length
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import Hypothesis, decode_log_probs

GPU_BATCH_SEC, CPU_BATCH_SEC = 400.0, 30.0  # maximum padded seconds of a forward
CACHED_BYTES = 50e6
CHUNK_SEC, CHUNK_RECORDINGS = 900.0, 512  # held in memory, sorted by length, and written together


LogProbs = npt.NDArray[np.float32]  # (T, V)


class HasDuration(Protocol):
    @property
    def seconds(self) -> float: ...


Item = TypeVar("Item", bound=HasDuration)


def zero_mean_unit_variance(waveform: np.ndarray) -> np.ndarray:
    """Normalise a waveform as Transformers' Wav2Vec2FeatureExtractor does, over the clip alone."""
    normalized: np.ndarray = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    return normalized.astype(np.float32)


def usual_batch_seconds(model: CTCModel) -> float:
    """Return the seconds of a batch for this machine: many on a GPU, on CPU no more than its caches serve.

    There wav2vec2-base, which outputs 6.5 MB a second in its first layer, runs faster in batches of 8 s than in more.
    """
    if model.device.type != "cpu":
        return GPU_BATCH_SEC
    bytes_per_sec: float = 4 * model.network.config.conv_dim[0] * SAMPLE_RATE / model.network.config.conv_stride[0]
    return min(max(CACHED_BYTES / bytes_per_sec, 2.0), CPU_BATCH_SEC)


def chunk_by_memory(recordings: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield chunks of consecutive recordings, cut by these alone, so that a resumed run gets the same chunks."""
    chunk: list[Item] = []
    seconds = 0.0
    for recording in recordings:
        chunk.append(recording)
        seconds += recording.seconds
        if len(chunk) == CHUNK_RECORDINGS or seconds >= CHUNK_SEC:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk


@contextmanager
def scoring_mode() -> Iterator[None]:
    """Run a model as it is always scored: fp32 weights, no autocast, no TF32, no gradients."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    previous = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = previous


def compute_log_probs(model: CTCModel, waveforms: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (B, T, V) of waveforms of similar lengths, and their frame counts (B,)."""
    rows = [zero_mean_unit_variance(waveform) if model.normalize else waveform for waveform in waveforms]
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    with scoring_mode():
        return model(inputs.to(model.device), lengths), model.frame_counts(lengths)


def batched_log_probs(
    model: CTCModel, waveforms: Sequence[Waveform], batch_seconds: float | None
) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
    """Yield batches of similar lengths: numbers of waveforms (B,), log-probabilities (B, T, V), frame counts (B,).

    `batch_seconds` are the padded seconds of a batch; None: chosen by the machine. A batch too large for the memory of
    a GPU is halved.
    """
    seconds = batch_seconds or usual_batch_seconds(model)
    pending = batch_by_length([len(waveform) for waveform in waveforms], seconds)[::-1]
    while pending:
        batch = pending.pop()
        try:
            log_probs, frames = compute_log_probs(model, [waveforms[i] for i in batch])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
        else:
            yield batch, log_probs, frames
            continue
        torch.cuda.empty_cache()  # after the error is dropped, as it holds the tensors of the failed forward


def decode_waveforms(
    model: CTCModel, waveforms: Sequence[Waveform], batch_seconds: float | None, beam: int = 0
) -> list[tuple[Hypothesis, LogProbs]]:
    """Return the hypothesis and the log-probabilities (T, V) of each waveform; they do not depend on the batches."""
    decoded: dict[int, tuple[Hypothesis, LogProbs]] = {}
    for batch, log_probs, frames in batched_log_probs(model, waveforms, batch_seconds):
        hypotheses = decode_log_probs(log_probs, frames, model.vocab, beam)
        rows = log_probs.cpu().numpy()
        for i, row, length, hypothesis in zip(batch.tolist(), rows, frames.tolist(), hypotheses, strict=True):
            decoded[i] = hypothesis, row[:length]
    return [decoded[i] for i in range(len(waveforms))]
