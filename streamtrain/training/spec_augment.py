"""Mask spans of frames and of features of each training clip (SpecAugment)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from streamtrain.data.augment import keyed_random, span_mask
from streamtrain.data.collate import Batch
from streamtrain.model.ctc import count_frames


@dataclass(frozen=True)
class Spans:
    """Describe spans of `length` that cover about `share` of a sequence."""

    share: float
    length: int


@dataclass(frozen=True)
class SpecAugment:
    """Draw masks when batches are loaded, keyed by (seed, epoch, utterance)."""

    seed: int
    of_frames: Spans
    of_features: Spans
    features: int
    geometry: tuple[tuple[int, int], ...]  # of the network's convolutions

    def hide(self, epoch: int, batch: Batch) -> Batch:
        """Return the batch with its masks: frames (B, T) and features (B, H); None if nothing is ever masked."""
        frames = count_frames(batch.input_lengths, self.geometry).tolist()
        return replace(
            batch,
            time_mask=self._draw("mask", epoch, batch.keys, frames, self.of_frames),
            feature_mask=self._draw("features", epoch, batch.keys, [self.features] * len(frames), self.of_features),
        )

    def _draw(
        self, kind: str, epoch: int, keys: Sequence[str], lengths: Sequence[int], spans: Spans
    ) -> torch.Tensor | None:
        if spans.share == 0:
            return None
        masks = np.zeros((len(keys), max(lengths)), bool)
        for row, key, length in zip(masks, keys, lengths, strict=True):
            random = keyed_random(kind, self.seed, epoch, key)
            row[:length] = span_mask(length, spans.share, spans.length, random)
        return torch.from_numpy(masks)
