"""Augment clips for training: keyed random draws, speed perturbation, span masks.

Each draw is keyed by (seed, epoch, utterance), so it is the same after a resume, on any rank and in any batch.
"""

import numpy as np
import numpy.typing as npt
import soxr
import xxhash

from sharding.audio.codec import SAMPLE_RATE, Waveform

Floats = npt.NDArray[np.float64]


def keyed_random(*key: object) -> np.random.Generator:
    """Return a generator that depends only on the key, not on the process or on earlier draws."""
    return np.random.default_rng(_hash(key))


def keyed_uniform(names: npt.NDArray[np.uint64], *key: object) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1), shape (N,), each a function of its name and the key; vectorised for millions of names.

    The mix is splitmix64's (Steele, Lea and Flood 2014).
    """
    mixed = names ^ np.uint64(_hash(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def length_at(samples: npt.NDArray[np.integer] | int, speed: Floats | float) -> npt.NDArray[np.int64]:
    """Return the number of samples of a clip after a change of its speed."""
    return np.rint(samples / np.asarray(speed)).astype(np.int64)


def change_speed(waveform: Waveform, speed: float) -> Waveform:
    """Return the clip resampled to `length_at` samples: tempo and pitch change together, as with `sox speed`.

    Ko et al. 2015, "Audio augmentation for speech recognition".
    """
    length = int(length_at(len(waveform), speed))
    changed = soxr.resample(waveform, SAMPLE_RATE * speed, SAMPLE_RATE, quality="HQ")[:length]
    return np.pad(changed, (0, length - len(changed)))  # soxr may round a half the other way


def span_mask(count: int, share: float, span: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return the frames or features to hide from the encoder, shape (count,): spans that cover about `share` of all.

    SpecAugment (Park et al. 2019) as in wav2vec2 (Baevski et al. 2020, arXiv 2006.11477): spans may overlap, but some
    of a clip always stays visible.
    """
    hidden = np.zeros(count, bool)
    if share <= 0 or count <= span:  # a span would hide a shorter clip completely
        return hidden
    spans = int(share * count / span + random.random())
    for start in random.choice(count - span + 1, min(spans, count - span + 1), replace=False):
        hidden[start : start + span] = True
    if hidden.all():
        start = int(random.integers(count - span + 1))
        hidden[start : start + span] = False
    return hidden


def _hash(key: object) -> int:
    return xxhash.xxh3_64_intdigest(repr(key).encode())
