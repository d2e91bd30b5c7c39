"""Detect voice activity: pauses on which the Silero voice detector and the energy floor agree."""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sharding.audio.codec import SAMPLE_RATE, Waveform

HOP = SAMPLE_RATE // 100  # level and mask are sampled every 10 ms
VAD_WINDOW = 512  # samples per speech probability, fixed by Silero at 16 kHz …
VAD_CONTEXT = 64  # … and samples before them
VAD_BATCH = 4_096  # windows
QUIET_PROBABILITY = 0.30  # below it a window has no speech
SPEECH_PROBABILITY = 0.50  # from it on it has speech
ABOVE_FLOOR_DB = 8.0  # a pause stays within this of the recording's noise floor, its 10th percentile
STEADY_HOPS = 9  # width of the level's median: rooms rumble, and a click of 40 ms must not end a pause
MIN_PAUSE_SEC = 0.20
MAX_STOP_SEC = 0.3  # a longer silence is not part of a phone, so it lies between words
CUT_SEC = 0.10  # a cut lies in the quietest stretch of this length near the pause's middle

_thread_count_lock = threading.Lock()  # torch has one number of threads per process


@dataclass(frozen=True, slots=True)
class Pause:
    """Hold a pause in samples; `quality` in [0, 1] is the confidence that a cut in it falls between words."""

    start: int
    end: int
    cut: int
    quality: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """Hold a stretch between two pauses, in samples."""

    start: int
    end: int
    voiced: bool  # the detector finds speech in it


@dataclass(frozen=True, eq=False)
class SpeechActivity:
    """Hold the level and the speech probability of a recording, on a 10 ms grid."""

    level_db: npt.NDArray[np.float32]  # (frames,)
    speech: npt.NDArray[np.float32]  # (frames,) probability of speech
    floor_db: float
    speech_db: float  # 90th percentile: the level of the speaker

    @property
    def silent(self) -> bool:
        """Return whether the detector finds no speech anywhere."""
        return not self.speaks(0, len(self.speech) * HOP)

    def speaks(self, start: int, end: int) -> bool:
        """Return whether the detector finds speech between two samples."""
        return bool((self.speech[start // HOP : -(-end // HOP)] >= SPEECH_PROBABILITY).any())


@np.errstate(over="ignore", invalid="ignore")  # in the energy of a sound too loud for a float
def detect_speech(waveform: Waveform) -> SpeechActivity:
    """Return level and speech probability of a 16 kHz recording, shape (frames,) each at 10 ms."""
    frames = max(len(waveform) // HOP, 1)
    padded = np.pad(waveform, (0, max(0, frames * HOP - len(waveform))))[: frames * HOP].reshape(frames, HOP)
    level = _steady(10 * np.log10(np.square(padded, dtype=np.float32).mean(axis=1) + 1e-10))
    windows = np.minimum(np.arange(frames) * HOP // VAD_WINDOW, -(-len(waveform) // VAD_WINDOW) - 1)
    return SpeechActivity(
        level_db=level,
        speech=_speech_probability(waveform)[windows],
        floor_db=float(np.percentile(level, 10)),
        speech_db=float(np.percentile(level, 90)),
    )


def _steady(level_db: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the median around each frame, which keeps edges where they are."""
    padded = np.pad(level_db, STEADY_HOPS // 2, mode="edge")
    median: npt.NDArray[np.float32] = np.median(np.lib.stride_tricks.sliding_window_view(padded, STEADY_HOPS), axis=1)
    return median


def find_pauses(activity: SpeechActivity) -> list[Pause]:
    """Return every stretch of at least 0.2 s inside the recording with no speech and a level near the floor."""
    quiet = (activity.speech < QUIET_PROBABILITY) & (activity.level_db < activity.floor_db + ABOVE_FLOOR_DB)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    runs = [(int(start), int(end)) for start, end in edges.reshape(-1, 2) if end - start >= MIN_PAUSE_SEC * 100]
    return [_pause(activity, start, end) for start, end in runs if start > 0 and end < len(quiet)]


def find_stretches(activity: SpeechActivity, pauses: Sequence[Pause], samples: int) -> list[Stretch]:
    """Return the stretches between pauses; those of 0.1 s or less, at the edges, are no speech."""
    edges = [0, *(edge for pause in pauses for edge in (pause.start, pause.end)), samples]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [Stretch(start, end, activity.speaks(start, end)) for start, end in pairs if end - start > 10 * HOP]


def quietest_cut(activity: SpeechActivity, start: int, end: int) -> int:
    """Return the middle, in samples, of the quietest 100 ms between two frames."""
    width = min(int(CUT_SEC * 100), end - start)
    means = np.convolve(activity.level_db[start:end], np.full(width, 1 / width), "valid")
    return (start + int(means.argmin()) + width // 2) * HOP


def _pause(activity: SpeechActivity, start: int, end: int) -> Pause:
    quarter = (end - start) // 4
    cut = quietest_cut(activity, start + quarter, end - quarter)
    cut_db = float(activity.level_db[cut // HOP])
    length = min((end - start) / 100, 1.0)
    loudness = float(np.clip((activity.speech_db - cut_db) / 20, 0, 1))
    quality = length * (1 - float(activity.speech[start:end].mean())) * loudness
    return Pause(start * HOP, end * HOP, cut, quality)


@functools.cache
def _load_detector() -> Any:
    import silero_vad

    return silero_vad.load_silero_vad()._model  # for 16 kHz


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch without gradients on one thread, for many small operations, then restore the number of threads."""
    import torch

    with _thread_count_lock:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)


@one_thread()
def _speech_probability(waveform: Waveform) -> npt.NDArray[np.float32]:
    """Return Silero's speech probability per window of 32 ms, shape (windows,).

    Its own `audio_forward` runs the network on one window at a time. Only the LSTM depends on the window before, so all
    else is computed for thousands at once: the same numbers to 1e-4, ten times as fast. On one thread, because the
    operations are small; importing the detector sets that too, for the whole process.
    """
    import torch

    network = _load_detector()
    padded = torch.nn.functional.pad(torch.from_numpy(waveform), (VAD_CONTEXT, -len(waveform) % VAD_WINDOW))
    windows = padded.unfold(0, VAD_CONTEXT + VAD_WINDOW, VAD_WINDOW)
    rnn = network.decoder.rnn
    weights = [rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh]
    state = (torch.zeros(1, 1, rnn.weight_hh.shape[1]),) * 2  # (hidden, cell)
    probabilities = []
    for batch in torch.split(windows, VAD_BATCH):
        features = network.encoder(network.run_extractors(batch.contiguous())).permute(0, 2, 1)  # (windows, 1, values)
        outputs, hidden, cell = torch.lstm(features, state, weights, True, 1, 0.0, False, False, False)
        state = (hidden, cell)
        probabilities.append(network.decoder.decoder(outputs.permute(0, 2, 1)).flatten())
    return torch.cat(probabilities).numpy().astype(np.float32)
