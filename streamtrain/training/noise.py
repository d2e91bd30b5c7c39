"""Add noise to each training clip, of another loudness and colour in each epoch."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from sharding.audio.codec import SAMPLE_RATE, Waveform
from streamtrain.data.augment import keyed_random
from streamtrain.data.collate import Batch, silence_too_dense
from streamtrain.model.ctc import count_frames
from streamtrain.model.inference import zero_mean_unit_variance
from streamtrain.training.spec_augment import SpecAugment

DULL_HZ = (100.0, 8_000.0)  # range of corner frequencies; above its corner the noise falls by 6 dB an octave


def augment_batch(masking: SpecAugment, noise: "RoomNoise | None", epoch: int, batch: Batch) -> Batch:
    """Augment a batch, as the last work of the threads or processes that load it."""
    batch = silence_too_dense(batch, count_frames(batch.input_lengths, masking.geometry))
    return masking.hide(epoch, noise.add(epoch, batch) if noise else batch)


@dataclass(frozen=True)
class RoomNoise:
    """Draw noise when batches are loaded, keyed by (seed, epoch, utterance)."""

    seed: int
    snr_db: tuple[float, float]  # range of the signal-to-noise ratio, drawn evenly
    normalize: bool  # whether the model takes clips at zero mean and unit variance

    def add(self, epoch: int, batch: Batch) -> Batch:
        """Return the batch with noise in every clip; its padding stays silent."""
        inputs = batch.inputs.numpy().copy()
        for row, key, samples in zip(inputs, batch.keys, batch.input_lengths.tolist(), strict=True):
            clip = row[:samples]
            random = keyed_random("noise", self.seed, epoch, key)
            loudness = float(np.sqrt(np.mean(np.square(clip)))) * 10 ** (-random.uniform(*self.snr_db) / 20)
            clip += loudness * room_noise(samples, random)
            if self.normalize and loudness:
                clip[:] = zero_mean_unit_variance(clip)
        return replace(batch, inputs=torch.from_numpy(inputs))


def room_noise(samples: int, random: np.random.Generator) -> Waveform:
    """Return stationary noise of so many samples with an RMS of 1, of a random colour."""
    corner = np.exp(random.uniform(*np.log(DULL_HZ)))
    spectrum = np.fft.rfft(random.standard_normal(samples, np.float32))
    spectrum /= 1 + np.fft.rfftfreq(samples, 1 / SAMPLE_RATE) / corner
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / np.sqrt(np.mean(np.square(noise)) + 1e-12), np.float32)
