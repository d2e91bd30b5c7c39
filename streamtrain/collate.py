"""Samples become a `Batch`: decoded, normalised, padded. A clip that fails to decode becomes a silent row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sharding.audio import MIN_SAMPLES, decode
from sharding.errors import AudioError
from sharding.sample import Sample
from streamtrain.vocab import Vocab


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. B clips, S samples of the longest, L symbols of the longest label."""

    inputs: torch.Tensor  # (B, S) float32, zero beyond each clip
    input_lengths: torch.Tensor  # (B,) int64, samples
    targets: torch.Tensor  # (B, L) int64
    target_lengths: torch.Tensor  # (B,) int64, symbols
    weights: torch.Tensor  # (B,) float32, 1 for a clip, 0 for a silent row
    keys: tuple[str, ...]  # "" for a silent row that stands for no clip
    failed: tuple[str, ...] = ()  # keys of clips that did not decode

    def to(self, device: torch.device) -> "Batch":
        """On CPU, and for what stays there (lengths), itself."""
        if device.type == "cpu":
            return self
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.inputs, self.targets, self.weights))
        inputs, targets, weights = moved
        return Batch(inputs, self.input_lengths, targets, self.target_lengths, weights, self.keys, self.failed)


def collate(samples: Sequence[Sample], lengths: Sequence[int], vocab: Vocab, normalize: bool) -> Batch:
    """Decode and pad. `lengths` are the planned ones, in samples: a clip that decodes otherwise is silenced too.

    No sample at all makes one silent row, so that every rank runs as many forwards as the others.
    """
    waveforms, texts, failed = [], [], []
    for sample, length in zip(samples, lengths, strict=True):
        waveform = _decode(sample.audio)
        if waveform is None or len(waveform) != length:
            failed.append(sample.key)
            waveform = np.zeros(length, np.float32)
        elif normalize:
            waveform = zero_mean_unit_variance(waveform)
        waveforms.append(waveform)
        texts.append(vocab.encode(sample.text))
    keys = tuple(sample.key for sample in samples)
    if not waveforms:
        waveforms, texts, keys = [np.zeros(MIN_SAMPLES * 4, np.float32)], [[]], ("",)
    broken = set(failed)
    return Batch(
        inputs=pad([torch.from_numpy(waveform) for waveform in waveforms]),
        input_lengths=torch.tensor([len(waveform) for waveform in waveforms]),
        targets=pad([torch.tensor(text, dtype=torch.int64) for text in texts]),
        target_lengths=torch.tensor([len(text) for text in texts]),
        weights=torch.tensor([float(key != "" and key not in broken) for key in keys]),
        keys=keys,
        failed=tuple(failed),
    )


def pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of shape (n_i,) as one (B, max n_i) tensor, zero beyond each."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def zero_mean_unit_variance(waveform: np.ndarray) -> np.ndarray:
    """As Transformers' Wav2Vec2FeatureExtractor does it, over the clip alone."""
    normalized: np.ndarray = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    return normalized.astype(np.float32)


def _decode(audio: bytes) -> np.ndarray | None:
    try:
        return decode(audio)[0]
    except AudioError:
        return None
