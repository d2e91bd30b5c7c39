"""What each symbol of the labels sounds like, learned from the corpus itself: which words lie where, with no model.

One Gaussian a symbol over cepstra, learned from nothing ("flat start"): at first each recording's speech is shared out
evenly among its symbols, then CTC's forward–backward over the labels says anew which frames are whose, a few times.
A word hardly goes on after a pause. Half an hour of speech is enough to tell between which pauses it lies; this is no
recogniser.
"""

import functools
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from sharding.audio.codec import FRAME_SAMPLES, SAMPLE_RATE, Waveform
from sharding.audio.vad import MAX_STOP_SEC, Stretch, detect_speech, find_pauses, find_stretches, one_thread
from sharding.labels.ipa import alphabet_of
from sharding.segment.evidence import Evidence, choose_max_gap, hash_label

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

WINDOW = 400  # samples that a frame hears: 25 ms
BANDS, CEPSTRA = 24, 13
BAND_HZ = (60.0, 7_600.0)
ROUNDS = 8  # of learning
PRIOR_FRAMES = 20.0  # of all speech that are added to those of each symbol
MIN_VARIANCE = 0.1  # of all speech's
TRAIN_SCALE = 0.1  # what a log-density counts when it is learned from: the frames of a sound are not independent …
DECODE_SCALE = 0.2  # … and when it is told by it
QUIET_NATS = 50.0  # by which a symbol is unlikelier in a pause
PAUSE_NATS = 10.0  # by which a pause is unlikelier within a word than between two …
LONGEST_STOP = round(MAX_STOP_SEC * SAMPLE_RATE / FRAME_SAMPLES)  # … if it has more frames
PIECE_FRAMES = 1_250  # 25 s
MAX_SAMPLES = 4e9  # frames × symbols of a recording that is listened to: three quarters of an hour


@dataclass(frozen=True, eq=False)
class TrainingExample:
    """A labelled recording, as it is learned from."""

    name: str
    text: str
    features: Floats  # (T, D), one row every 20 ms
    quiet: npt.NDArray[np.bool_]  # (T,)


@dataclass(frozen=True, eq=False)
class PhoneGMM:
    """Symbols as ids: 0 is silence, which CTC takes for its blank. Spaces have none."""

    alphabet: str
    mean: Floats  # (symbols, D)
    precision: Floats  # (symbols, D): 1 / variance
    max_gap: float = 0.0  # nats, how much likelier what is heard may be than a label, in half a second

    @property
    def blank(self) -> int:
        return 0

    @property
    def blank_inside(self) -> int:
        return len(self.mean)

    def encode(self, text: str) -> list[int]:
        """Ids of a normalised label; what is not in the alphabet sounds like any speech."""
        other = len(self.alphabet) + 1
        return [self.alphabet.find(symbol) + 1 or other for symbol in text if symbol != " "]

    def log_probs(self, features: Floats, quiet: npt.NDArray[np.bool_], scale: float) -> "torch.Tensor":
        """Of each symbol at each frame, and of silence within a word, shape (T, symbols + 1)."""
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
        """As an index keeps it: what was learned is not learned again for a repair."""
        values = np.stack([self.mean, self.precision]).astype("<f4")
        return {"alphabet": self.alphabet, "max_gap": self.max_gap, "values": b64encode(values.tobytes()).decode()}

    def align(self, text: str, waveform: Waveform, stretches: Sequence[Stretch], cuts: Sequence[int]) -> Evidence:
        """What a label's words sound like in a recording that is cut at these samples."""
        with one_thread():
            return self._hear(text, waveform, stretches, cuts)

    def _hear(self, text: str, waveform: Waveform, stretches: Sequence[Stretch], cuts: Sequence[int]) -> Evidence:
        from sharding.segment.ctc_align import AlignError, align, word_llrs, worst_gaps

        label = hash_label(text)
        unheard = Evidence(label, tuple(cuts), (), (), (), (), (), (), (), (), "not heard")
        if len(waveform) // FRAME_SAMPLES * len(text) > MAX_SAMPLES:
            return unheard
        features, quiet = mfcc_features(waveform, stretches)
        log_probs = self.log_probs(features, quiet, DECODE_SCALE)
        frames = [min(cut // FRAME_SAMPLES, len(log_probs) - 1) for cut in cuts]
        try:
            found = align(log_probs, text, self, frames)
        except AlignError:
            return unheard
        words, order = word_llrs(log_probs, found.words, self)
        return Evidence(
            label=label,
            cuts=tuple(cuts),
            words_before=tuple(found.before.argmax(axis=1).tolist()),
            probability=tuple(found.before.max(axis=1).tolist()),
            inside=tuple(np.maximum(1 - found.before.sum(axis=1), 0).tolist()),
            gaps=tuple(worst_gaps(found.gap, frames)),
            words=tuple(words),
            order=tuple(order),
            starts=tuple(word.first_frame * FRAME_SAMPLES for word in found.words),
            ends=tuple(word.end_frame * FRAME_SAMPLES for word in found.words),
            error=None,
        )


def unpack_model(packed: dict[str, Any]) -> PhoneGMM:
    """What `Sounds.pack` made."""
    values = np.frombuffer(b64decode(packed["values"]), "<f4").reshape(2, len(packed["alphabet"]) + 2, -1)
    return PhoneGMM(packed["alphabet"], values[0], values[1], packed["max_gap"])


def example_of(name: str, text: str, waveform: Waveform) -> TrainingExample:
    """A recording of 16 kHz and its normalised label."""
    activity = detect_speech(waveform)
    stretches = find_stretches(activity, find_pauses(activity), len(waveform))
    return TrainingExample(name, text, *mfcc_features(waveform, stretches))


@np.errstate(over="ignore", invalid="ignore")  # what is too loud for a float is heard by nobody
def mfcc_features(waveform: Waveform, stretches: Sequence[Stretch]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Cepstra and their slopes every 20 ms, as deviations of the recording's speech; and which frames are quiet."""
    frames = len(waveform) // FRAME_SAMPLES
    around = np.pad(waveform, ((WINDOW - FRAME_SAMPLES) // 2, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(around, WINDOW)[::FRAME_SAMPLES][:frames]
    levels = np.concatenate([_levels(windows[some : some + PIECE_FRAMES]) for some in range(0, frames, PIECE_FRAMES)])
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
    """Of each band, on a logarithmic scale, shape (T, BANDS)."""
    power = np.square(np.abs(np.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32), 512)))
    levels: Floats = np.log(power.astype(np.float32) @ _mel_bands() + 1e-8)
    return levels


@functools.cache
def _mel_bands() -> Floats:
    """Triangles on the mel scale, shape (257, BANDS)."""
    low, high = (2_595 * np.log10(1 + hertz / 700) for hertz in BAND_HZ)
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2_595) - 1) * 512 / SAMPLE_RATE
    rising = (np.arange(257)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - np.arange(257)[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


def fit(examples: Sequence[TrainingExample], track: str, max_false_accept: float) -> PhoneGMM | None:
    """What the symbols of these examples sound like; None where there is no speech."""
    with one_thread():
        return _fit(examples, track, max_false_accept)


def _fit(examples: Sequence[TrainingExample], track: str, max_false_accept: float) -> PhoneGMM | None:
    alphabet = "".join(sorted(alphabet_of(track) - {" "}))
    spoken = [
        example
        for example in examples
        if example.text and not example.quiet.all() and np.isfinite(example.features).all()
    ]
    if not spoken:
        return None
    sums = _Sums(len(alphabet) + 2, spoken[0].features.shape[1])
    model = PhoneGMM(alphabet, *np.zeros((2, *sums.values.shape), np.float32))  # to spell with
    for example in spoken:
        speech, ids = np.flatnonzero(~example.quiet), np.array(model.encode(example.text))
        owner = np.zeros((len(example.quiet), len(alphabet) + 2))
        owner[speech, ids[np.arange(len(speech)) * len(ids) // len(speech)]] = 1.0
        owner[example.quiet, 0] = 1.0
        sums.add(owner, example.features)
    for _ in tqdm(range(ROUNDS), desc="    sounds", unit="round", leave=False, disable=None):  # None: on a terminal
        model, sums = sums.estimate(alphabet), _Sums(*sums.values.shape)
        for example in spoken:
            sums.add(_occupancy(model, example), example.features)
        if not sums.frames[1:].sum():  # no label fits
            return None
    model = sums.estimate(alphabet)
    return _calibrate(model, spoken, max_false_accept)


class _Sums:
    """Frames, and sums over them, of each symbol."""

    def __init__(self, symbols: int, size: int) -> None:
        self.frames = np.zeros(symbols)
        self.values = np.zeros((symbols, size))
        self.squares = np.zeros((symbols, size))

    def add(self, owner: npt.NDArray[np.float64], features: Floats) -> None:
        """`owner` (T, symbols) says with which probability each frame is whose."""
        import torch

        whose, activity = torch.from_numpy(owner).T, torch.from_numpy(features).double()  # on one thread, unlike numpy
        self.frames += owner.sum(axis=0)
        self.values += (whose @ activity).numpy()
        self.squares += (whose @ activity.square()).numpy()

    def estimate(self, alphabet: str) -> PhoneGMM:
        mean, square = (sums[1:].sum(axis=0) / self.frames[1:].sum() for sums in (self.values, self.squares))
        variance = square - mean**2  # of all speech
        count = (self.frames + PRIOR_FRAMES)[:, None]
        means = (self.values + PRIOR_FRAMES * mean) / count
        variances = (self.squares + PRIOR_FRAMES * square) / count - means**2
        precision = 1 / np.maximum(variances, MIN_VARIANCE * np.maximum(variance, 1e-6))
        return PhoneGMM(alphabet, means.astype(np.float32), precision.astype(np.float32))


def _occupancy(model: PhoneGMM, example: TrainingExample) -> npt.NDArray[np.float64]:
    """Whose each frame is, given the label; nobody's where no path spells it."""
    import torch

    from sharding.segment.ctc_align import AlignError, Lattice, posteriors

    lattice = Lattice(example.text, model, torch.device("cpu"))
    owner = torch.zeros(len(example.quiet), model.blank_inside + 1)
    try:
        _, blocks = posteriors(model.log_probs(example.features, example.quiet, TRAIN_SCALE), lattice)
    except AlignError:
        return owner[:, :-1].double().numpy()
    for first, likely in blocks:
        owner[first : first + len(likely)].index_add_(1, lattice.labels, likely)
    owner[:, model.blank] += owner[:, model.blank_inside]
    return owner[:, :-1].double().numpy()


def _calibrate(model: PhoneGMM, examples: Sequence[TrainingExample], max_false_accept: float) -> PhoneGMM:
    """With the largest gap of a label that is believed: labels of the examples are tried with a word left out."""
    from sharding.segment.ctc_align import AlignError, align, deletion_gaps, worst_gaps

    gaps, wrong = list[float](), list[float]()
    for example in examples:
        log_probs = model.log_probs(example.features, example.quiet, DECODE_SCALE)
        try:
            found = align(log_probs, example.text, model)
        except AlignError:
            continue
        gaps += worst_gaps(found.gap, range(PIECE_FRAMES, len(found.gap), PIECE_FRAMES))
        wrong += deletion_gaps(log_probs, found.words, example.name, model)
    return replace(model, max_gap=choose_max_gap(gaps, wrong, max_false_accept))
