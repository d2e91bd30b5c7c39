"""Build a `Batch` from samples: decode, normalise, pad. A clip that fails to decode becomes a silent row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sharding.audio.codec import MIN_SAMPLES, decode_native
from sharding.errors import AudioError
from sharding.shardset.sample import Sample
from streamtrain.data.augment import change_speed, length_at
from streamtrain.data.plan import Perturbation
from streamtrain.model.inference import zero_mean_unit_variance
from streamtrain.model.vocab import Vocab

SILENT_SAMPLES = 4 * MIN_SAMPLES  # length of a row that stands for no clip
DEVICE_TENSORS = ("inputs", "targets", "time_mask", "feature_mask")  # tensors of a batch that go to the GPU


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold one micro-batch: B clips, S samples in the longest clip, L symbols in the longest label.

    Example:
        >>> batch = next(iter(ShardDataset(open_shards("data/shards"), batch_seconds=160)))
        >>> batch.to(torch.device("cuda")).inputs.shape, batch.input_lengths / 16_000  # s
    """

    inputs: torch.Tensor  # (B, S) float32, zero beyond each clip
    input_lengths: torch.Tensor  # (B,) int64, samples
    targets: torch.Tensor  # (B, L) int64
    target_lengths: torch.Tensor  # (B,) int64, symbols
    weights: torch.Tensor  # (B,) float32, 1 for a clip, 0 for a silent row
    keys: tuple[str, ...]  # "" for a silent row that stands for no clip
    failed: tuple[str, ...] = ()  # keys of clips that did not decode
    too_dense: tuple[str, ...] = ()  # keys of clips whose label needs more frames than the model outputs for the clip
    time_mask: torch.Tensor | None = None  # (B, T) bool, frames that training hides from the encoder
    feature_mask: torch.Tensor | None = None  # (B, H) bool, features that training hides from the encoder

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; lengths and weights stay on the CPU, where the loss is prepared."""
        tensors = {name: tensor for name in DEVICE_TENSORS if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def collate(samples: Sequence[Sample], perturbation: Perturbation, vocab: Vocab, normalize: bool) -> Batch:
    """Decode and pad samples. A clip that fails to decode, or does not have the planned length, is silenced.

    An empty sequence makes one silent row, so that every rank runs the same number of forwards.
    """
    lengths = perturbation.lengths.tolist()
    inputs = np.zeros((max(len(samples), 1), max(lengths, default=SILENT_SAMPLES)), np.float32)
    failed = []
    changes = zip(lengths, perturbation.speeds.tolist(), perturbation.gains.tolist(), strict=True)
    for row, sample, (length, speed, gain) in zip(inputs, samples, changes, strict=bool(samples)):
        waveform = row[:length]
        if not _decode_into(waveform, sample.audio, speed, gain):
            failed.append(sample.key)
        elif normalize:
            waveform[:] = zero_mean_unit_variance(waveform)
    labels = [vocab.encode(sample.text) for sample in samples] or [[]]
    targets = np.zeros((len(labels), max(map(len, labels))), np.int64)
    for target, label in zip(targets, labels, strict=True):
        target[: len(label)] = label
    keys = tuple(sample.key for sample in samples) or ("",)
    silent_keys = {"", *failed}
    return Batch(
        inputs=torch.from_numpy(inputs),
        input_lengths=torch.tensor(lengths or [inputs.shape[1]]),
        targets=torch.from_numpy(targets),
        target_lengths=torch.tensor([len(label) for label in labels]),
        weights=torch.tensor([float(key not in silent_keys) for key in keys]),
        keys=keys,
        failed=tuple(failed),
    )


def silence_too_dense(batch: Batch, frames: torch.Tensor) -> Batch:
    """Set the weight of clips to 0 if their `frames` (B,) cannot spell their label: their CTC loss would be infinite.

    A label needs a frame for each symbol, and one for a blank between equal neighbours.
    """
    symbols = torch.arange(1, max(batch.targets.shape[1], 1)) < batch.target_lengths[:, None]  # all but the first
    blanks = (symbols & (batch.targets[:, 1:] == batch.targets[:, :-1])).sum(1)
    too_dense = (batch.weights > 0) & (batch.target_lengths + blanks > frames)
    if not too_dense.any():
        return batch
    keys = tuple(key for key, dense in zip(batch.keys, too_dense.tolist(), strict=True) if dense)
    return replace(batch, weights=batch.weights * ~too_dense, too_dense=keys)


def _decode_into(waveform: np.ndarray, audio: bytes, speed: float, gain: float) -> bool:
    """Fill `waveform` with the decoded clip; return False if it does not decode or has another length."""
    try:
        recorded, is_int16, _ = decode_native(audio)
    except AudioError:
        return False
    if length_at(len(recorded), speed) != len(waveform):
        return False
    scale = np.float32(gain * (2**-15 if is_int16 else 1))
    if speed != 1:
        recorded = change_speed(recorded.astype(np.float32), speed)
    np.multiply(recorded, scale, out=waveform)
    return True
