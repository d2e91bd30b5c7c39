"""Random spans to mask in training, keyed by (seed, epoch, utterance): who computes a clip does not matter."""

import numpy as np
import numpy.typing as npt
import xxhash


def keyed_random(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone, not on the process or on what was drawn before."""
    return np.random.default_rng(xxhash.xxh3_64_intdigest(repr(key).encode()))


def time_mask(frames: int, share: float, length: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Frames to hide from the encoder, shape (frames,): spans of `length` frames that cover about `share` of all.

    SpecAugment in time as wav2vec2 does it (Baevski et al. 2020, arXiv 2006.11477): spans may overlap.
    """
    hidden = np.zeros(frames, bool)
    if share <= 0 or frames <= length:  # a clip shorter than a span would vanish whole
        return hidden
    spans = int(share * frames / length + random.random())
    for start in random.choice(frames - length + 1, min(spans, frames - length + 1), replace=False):
        hidden[start : start + length] = True
    return hidden
