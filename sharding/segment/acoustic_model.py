"""Train a small acoustic model on the corpus's own labels, to align words without a trained recogniser.

It has one Gaussian per symbol over cepstra, trained from a flat start: each recording's speech is first divided evenly
among its symbols, then CTC's forward–backward over the labels re-estimates the occupancies a few times. A word rarely
spans a pause. Half an hour of speech is enough to find the pauses between which a word lies, not to recognise words.
"""

import functools
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from sharding.audio.codec import FRAME_SAMPLES, SAMPLE_RATE, Waveform
from sharding.audio.vad import MAX_STOP_SEC, Stretch, detect_speech, find_pauses, find_stretches, one_thread
from sharding.labels.policy import LabelPolicy
from sharding.labels.units import Units, split_symbols
from sharding.segment.evidence import Evidence, choose_max_gap, hash_label

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

WINDOW = 400  # samples of a frame: 25 ms
BANDS, CEPSTRA = 24, 13
BAND_HZ = (60.0, 7_600.0)
ROUNDS = 8  # training iterations
PRIOR_FRAMES = 20.0  # frames of all speech that are added to those of each symbol
MIN_VARIANCE = 0.1  # share of the variance of all speech
TRAIN_SCALE = 0.1  # acoustic scale in training: frames are correlated, so log-likelihoods are scaled down …
DECODE_SCALE = 0.2  # … and in decoding
QUIET_NATS = 50.0  # penalty of a symbol in a pause
PAUSE_NATS = 10.0  # penalty of a pause within a word …
LONGEST_STOP = round(MAX_STOP_SEC * SAMPLE_RATE / FRAME_SAMPLES)  # … if it is longer than these frames
BLOCK_FRAMES = 1_250  # 25 s
MAX_LATTICE = 4e9  # largest frames × symbols that is aligned: three quarters of an hour


# On several threads OpenBLAS sums products otherwise, on some processors: the bytes of an index would depend on them
one_blas_thread = ThreadpoolController().wrap(limits=1, user_api="blas")


@dataclass(frozen=True, eq=False)
class TrainingExample:
    """Hold the features and the label of a recording for training."""

    name: str
    text: str
    features: Floats  # (T, D), one row every 20 ms
    quiet: npt.NDArray[np.bool_]  # (T,)


@dataclass(frozen=True, eq=False)
class PhoneGMM:
    """Model each symbol id by a Gaussian. Id 0 is silence, which is CTC's blank; spaces have no id."""

    alphabet: tuple[str, ...]
    units: Units
    mean: Floats  # (symbols, D)
    precision: Floats  # (symbols, D): 1 / variance
    max_gap: float = 0.0  # nats, largest lead of the best path over a label in half a second

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.alphabet, 1)}

    @property
    def blank(self) -> int:
        return 0

    @property
    def blank_inside(self) -> int:
        return len(self.mean)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a normalised label; symbols outside the alphabet share the id of any speech."""
        ids, other = self._ids, len(self.alphabet) + 1
        return [ids.get(symbol, other) for symbol in split_symbols(text, self.units) if symbol != " "]

    @one_blas_thread  # type: ignore[untyped-decorator]
    def log_probs(self, features: Floats, quiet: npt.NDArray[np.bool_], scale: float) -> "torch.Tensor":
        """Return the log-probability of each symbol, and of silence within a word, at each frame: (T, symbols + 1)."""
        import torch

        density = np.square(features) @ self.precision.T - 2 * features @ (self.mean * self.precision).T
        density += (np.square(self.mean) * self.precision - np.log(self.precision)).sum(axis=1)
        density *= -scale / 2
        density[quiet, 1:] -= QUIET_NATS
        log_probs = torch.log_softmax(torch.from_numpy(density), dim=1)
        inside = log_probs[:, 0].clone()
        pauses = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
        inside[[sum(pause) // 2 for pause in pauses.tolist() if pause[1] - pause[0] > LONGEST_STOP]] -= PAUSE_NATS
        return torch.cat([log_probs, inside[:, None]], dim=1)

    def pack(self) -> dict[str, Any]:
        """Return the model as it is stored in an index, so that a repair needs no training."""
        values = np.stack([self.mean, self.precision]).astype("<f4")
        packed = {"max_gap": self.max_gap, "values": b64encode(values.tobytes()).decode()}
        if self.units == "characters":
            return {"alphabet": "".join(self.alphabet), **packed}
        return {"alphabet": list(self.alphabet), "units": self.units, **packed}

    @one_thread()
    def align(self, text: str, waveform: Waveform, stretches: Sequence[Stretch], cuts: Sequence[int]) -> Evidence:
        """Return the evidence for a label's words in a recording that is cut at these samples."""
        from sharding.segment.ctc_align import AlignError, align, word_llrs, worst_gaps

        label = hash_label(text)
        failed = Evidence(label, tuple(cuts), (), (), (), (), (), (), (), (), "not aligned")
        if len(waveform) // FRAME_SAMPLES * len(split_symbols(text, self.units)) > MAX_LATTICE:
            return failed
        features, quiet = mfcc_features(waveform, stretches)
        log_probs = self.log_probs(features, quiet, DECODE_SCALE)
        frames = [min(cut // FRAME_SAMPLES, len(log_probs) - 1) for cut in cuts]
        try:
            alignment = align(log_probs, text, self, frames)
        except AlignError:
            return failed
        words, order = word_llrs(log_probs, alignment.words, self)
        return Evidence(
            label=label,
            cuts=tuple(cuts),
            words_before=tuple(alignment.before.argmax(axis=1).tolist()),
            probability=tuple(alignment.before.max(axis=1).tolist()),
            inside=tuple(np.maximum(1 - alignment.before.sum(axis=1), 0).tolist()),
            gaps=tuple(worst_gaps(alignment.gap, frames)),
            words=tuple(words),
            order=tuple(order),
            starts=tuple(word.first_frame * FRAME_SAMPLES for word in alignment.words),
            ends=tuple(word.end_frame * FRAME_SAMPLES for word in alignment.words),
            error=None,
        )


def unpack_model(packed: dict[str, Any]) -> PhoneGMM:
    """Return the model that `PhoneGMM.pack` stored."""
    values = np.frombuffer(b64decode(packed["values"]), "<f4").reshape(2, len(packed["alphabet"]) + 2, -1)
    units = packed.get("units", "characters")
    return PhoneGMM(tuple(packed["alphabet"]), units, values[0], values[1], packed["max_gap"])


def example_of(name: str, text: str, waveform: Waveform) -> TrainingExample:
    """Return the training example of a 16 kHz recording and its normalised label."""
    activity = detect_speech(waveform)
    stretches = find_stretches(activity, find_pauses(activity), len(waveform))
    return TrainingExample(name, text, *mfcc_features(waveform, stretches))


@one_blas_thread  # type: ignore[untyped-decorator]
@np.errstate(over="ignore", invalid="ignore")  # if too loud for a float, the example is left out
def mfcc_features(waveform: Waveform, stretches: Sequence[Stretch]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return MFCCs and their slopes every 20 ms, normalised by the recording's speech, and the mask of quiet frames."""
    frames = len(waveform) // FRAME_SAMPLES
    padded = np.pad(waveform, ((WINDOW - FRAME_SAMPLES) // 2, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::FRAME_SAMPLES][:frames]
    levels = np.concatenate([_levels(windows[i : i + BLOCK_FRAMES]) for i in range(0, frames, BLOCK_FRAMES)])
    cosines = np.cos(np.pi / BANDS * (np.arange(BANDS)[:, None] + 0.5) * np.arange(CEPSTRA))
    cepstra = levels @ cosines.astype(np.float32)
    slopes = np.zeros_like(cepstra)
    slopes[2:-2] = (2 * (cepstra[4:] - cepstra[:-4]) + cepstra[3:-1] - cepstra[1:-3]) / 10
    features = np.concatenate([cepstra, slopes], axis=1)
    quiet = np.ones(frames, bool)
    for stretch in stretches:
        quiet[stretch.start // FRAME_SAMPLES : stretch.end // FRAME_SAMPLES] = False
    speech = features if quiet.all() else features[~quiet]
    return (features - speech.mean(axis=0)) / (speech.std(axis=0) + 1e-3), quiet


def _levels(windows: Floats) -> Floats:
    """Return the log energy of each band, shape (T, BANDS)."""
    power = np.square(np.abs(np.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32), 512)))
    levels: Floats = np.log(power.astype(np.float32) @ _mel_bands() + 1e-8)
    return levels


@functools.cache
def _mel_bands() -> Floats:
    """Return triangular filters on the mel scale, shape (257, BANDS)."""
    low, high = (2_595 * np.log10(1 + hertz / 700) for hertz in BAND_HZ)
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2_595) - 1) * 512 / SAMPLE_RATE
    rising = (np.arange(257)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - np.arange(257)[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


@one_thread()
def fit(examples: Sequence[TrainingExample], policy: LabelPolicy, max_false_accept: float) -> PhoneGMM | None:
    """Return a model trained on these examples, or None if they have no usable speech."""
    alphabet = tuple(sorted(policy.symbols))
    usable = [
        example
        for example in examples
        if example.text and not example.quiet.all() and np.isfinite(example.features).all()
    ]
    if not usable:
        return None
    stats = _Statistics(len(alphabet) + 2, usable[0].features.shape[1])
    model = PhoneGMM(alphabet, policy.units, *np.zeros((2, *stats.values.shape), np.float32))  # for its encode()
    for example in usable:
        speech, ids = np.flatnonzero(~example.quiet), np.array(model.encode(example.text))
        occupancy = np.zeros((len(example.quiet), len(alphabet) + 2))
        occupancy[speech, ids[np.arange(len(speech)) * len(ids) // len(speech)]] = 1.0
        occupancy[example.quiet, 0] = 1.0
        stats.add(occupancy, example.features)
    for _ in tqdm(range(ROUNDS), desc="    training", unit="round", leave=False, disable=None):  # None: on a terminal
        model, stats = stats.estimate(model), _Statistics(*stats.values.shape)
        for example in usable:
            stats.add(_occupancy(model, example), example.features)
        if not stats.frames[1:].sum():  # no label could be aligned
            return None
    model = stats.estimate(model)
    return _calibrate(model, usable, max_false_accept)


class _Statistics:
    """Accumulate each symbol's occupied frames, and sums over them."""

    def __init__(self, symbols: int, size: int) -> None:
        self.frames = np.zeros(symbols)
        self.values = np.zeros((symbols, size))
        self.squares = np.zeros((symbols, size))

    def add(self, occupancy: npt.NDArray[np.float64], features: Floats) -> None:
        """Add the frames of a recording; `occupancy` (T, symbols) has the probability of each symbol at each frame."""
        import torch

        weights, rows = torch.from_numpy(occupancy).T, torch.from_numpy(features).double()  # one thread, unlike numpy
        self.frames += occupancy.sum(axis=0)
        self.values += (weights @ rows).numpy()
        self.squares += (weights @ rows.square()).numpy()

    def estimate(self, previous: PhoneGMM) -> PhoneGMM:
        """Return the model with the means and precisions of what was accumulated."""
        mean, square = (totals[1:].sum(axis=0) / self.frames[1:].sum() for totals in (self.values, self.squares))
        variance = square - mean**2  # of all speech
        count = (self.frames + PRIOR_FRAMES)[:, None]
        means = (self.values + PRIOR_FRAMES * mean) / count
        variances = (self.squares + PRIOR_FRAMES * square) / count - means**2
        precision = 1 / np.maximum(variances, MIN_VARIANCE * np.maximum(variance, 1e-6))
        return replace(previous, mean=means.astype(np.float32), precision=precision.astype(np.float32))


def _occupancy(model: PhoneGMM, example: TrainingExample) -> npt.NDArray[np.float64]:
    """Return the occupancies (T, symbols) given the label; zeros if the label cannot be aligned."""
    import torch

    from sharding.segment.ctc_align import AlignError, Lattice, posteriors

    lattice = Lattice(example.text, model, torch.device("cpu"))
    occupancy = torch.zeros(len(example.quiet), model.blank_inside + 1)
    try:
        _, blocks = posteriors(model.log_probs(example.features, example.quiet, TRAIN_SCALE), lattice)
    except AlignError:
        return occupancy[:, :-1].double().numpy()
    for first, posterior in blocks:
        occupancy[first : first + len(posterior)].index_add_(1, lattice.labels, posterior)
    occupancy[:, model.blank] += occupancy[:, model.blank_inside]
    return occupancy[:, :-1].double().numpy()


def _calibrate(model: PhoneGMM, examples: Sequence[TrainingExample], max_false_accept: float) -> PhoneGMM:
    """Return the model with its max_gap, from trials of the examples' labels with a word left out."""
    from sharding.segment.ctc_align import AlignError, align, deletion_gaps, worst_gaps

    gaps, wrong = list[float](), list[float]()
    for example in examples:
        log_probs = model.log_probs(example.features, example.quiet, DECODE_SCALE)
        try:
            alignment = align(log_probs, example.text, model)
        except AlignError:
            continue
        gaps += worst_gaps(alignment.gap, range(BLOCK_FRAMES, len(alignment.gap), BLOCK_FRAMES))
        wrong += deletion_gaps(log_probs, alignment.words, example.name, model)
    return replace(model, max_gap=choose_max_gap(gaps, wrong, max_false_accept))
