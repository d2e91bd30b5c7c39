"""Noise is as loud as it was asked to be, a clip's own in each epoch, and none in what pads it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamtrain.data.collate import Batch
from streamtrain.training.noise import RoomNoise, room_noise

LENGTHS = (16_000, 7_001, 400)


def batch_of(keys: tuple[str, ...] = ("a", "b", "c")) -> Batch:
    inputs = torch.zeros(len(keys), LENGTHS[0])
    for row, samples in zip(inputs, LENGTHS, strict=False):
        row[:samples] = 0.3 * torch.sin(torch.arange(samples) / 20)
    lengths = torch.tensor(LENGTHS[: len(keys)])
    empty = torch.zeros(len(keys), 1, dtype=torch.int64)
    return Batch(inputs, lengths, empty, lengths * 0, torch.ones(len(keys)), keys)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_noise_is_so_much_below_its_clip(snr_db: float) -> None:
    before = batch_of()
    after = RoomNoise(0, (snr_db, snr_db), normalize=False).add(0, before)
    for row, samples in enumerate(LENGTHS):
        clip, noise = before.inputs[row, :samples], (after.inputs - before.inputs)[row, :samples]
        assert 20 * float(torch.log10(clip.square().mean().sqrt() / noise.square().mean().sqrt())) == pytest.approx(
            snr_db, abs=0.01
        )
        assert not after.inputs[row, samples:].any()
    assert not torch.equal(before.inputs, after.inputs)


def test_it_depends_on_seed_epoch_and_clip_alone() -> None:
    noise = RoomNoise(1, (5.0, 20.0), normalize=True)
    first = noise.add(0, batch_of())
    assert torch.equal(noise.add(0, batch_of()).inputs, first.inputs)
    alone = noise.add(0, batch_of(("a",)))
    assert torch.equal(alone.inputs[0], first.inputs[0])
    assert not torch.equal(noise.add(1, batch_of()).inputs, first.inputs)
    assert not torch.equal(replace(noise, seed=2).add(0, batch_of()).inputs, first.inputs)


def test_a_normalised_clip_stays_normalised_and_silence_silent() -> None:
    noise = RoomNoise(0, (0.0, 5.0), normalize=True)
    after = noise.add(0, batch_of())
    for row, samples in enumerate(LENGTHS):
        clip = after.inputs[row, :samples]
        assert float(clip.mean()) == pytest.approx(0, abs=1e-5)
        assert float(clip.square().mean()) == pytest.approx(1, rel=1e-2)
    silent = replace(batch_of(), inputs=torch.zeros(3, LENGTHS[0]))
    assert not noise.add(0, silent).inputs.any()


def test_its_colours_differ_and_its_loudness_does_not() -> None:
    shares = []
    for seed in range(50):
        noise = room_noise(16_000, np.random.default_rng(seed))
        power = np.square(np.abs(np.fft.rfft(noise)))
        shares.append(power[:1_000].sum() / power.sum())  # below 1 kHz
        assert np.square(noise).mean() == pytest.approx(1, rel=1e-3)
    assert min(shares) < 0.25
    assert max(shares) > 0.8
