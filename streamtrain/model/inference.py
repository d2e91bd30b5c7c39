"""Waveforms to log-probabilities, for all who only listen: in batches that suit the machine.

This file travels as it is into a submission.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
import torch

from sharding.audio.codec import SAMPLE_RATE, Waveform
from streamtrain.model.ctc import CTCModel

GPU_BATCH_SEC, CPU_BATCH_SEC = 400.0, 30.0  # padded seconds of a forward, at most
CACHED_BYTES = 50e6
CHUNK_SEC, CHUNK_RECORDINGS = 900.0, 512  # held in memory, sorted by length, and written together


class Lasting(Protocol):
    @property
    def seconds(self) -> float: ...


Item = TypeVar("Item", bound=Lasting)


def zero_mean_unit_variance(waveform: np.ndarray) -> np.ndarray:
    """As Transformers' Wav2Vec2FeatureExtractor does it, over the clip alone."""
    normalized: np.ndarray = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    return normalized.astype(np.float32)


def usual_batch_seconds(model: CTCModel) -> float:
    """A batch for the machine at hand: large on a GPU; on CPU no larger than caches can serve.

    There wav2vec2-base, whose first layer makes 6.5 MB of a second, runs quicker in batches of 8 s than in larger ones.
    """
    if model.device.type != "cpu":
        return GPU_BATCH_SEC
    bytes_a_second: float = 4 * model.network.config.conv_dim[0] * SAMPLE_RATE / model.network.config.conv_stride[0]
    return min(max(CACHED_BYTES / bytes_a_second, 2.0), CPU_BATCH_SEC)


def chunk_by_memory(recordings: Iterator[Item]) -> Iterator[list[Item]]:
    """Consecutive recordings; where a chunk ends depends on them alone, so a run that goes on makes the same ones."""
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
    """Run a model as it is scored wherever that happens: fp32 weights, no autocast, no TF32, no gradients."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def compute_log_probs(model: CTCModel, waveforms: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, T, V) of waveforms of like lengths, and the frames (B,) that each of them has."""
    rows = [zero_mean_unit_variance(waveform) if model.normalize else waveform for waveform in waveforms]
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    with scoring_mode():
        return model(inputs.to(model.device), lengths), model.frame_counts(lengths)
