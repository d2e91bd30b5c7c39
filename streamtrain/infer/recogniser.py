"""Transcribe one recording at a time from Python: a file, or samples that are there already."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import AudioError, StreamtrainError
from sharding.labels.ipa import TRACKS
from sharding.segment.cuts import split_at_pauses
from streamtrain.distributed import World
from streamtrain.infer.inputs import Recording, find_recordings
from streamtrain.infer.transcribe import DecodingOptions, LoadedRecording, decode_recordings, load
from streamtrain.model.ctc import CTCModel
from streamtrain.model.pretrained import load_trained


@dataclass(frozen=True, slots=True)
class TimedWord:
    """Hold a word with its start and end, s, and its confidence in [0, 1]."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Transcription:
    """Hold the text of a recording, its confidence in [0, 1], its words, and an n-best list of texts, best first."""

    text: str
    confidence: float
    words: tuple[TimedWord, ...]
    nbest: tuple[str, ...] = ()


class Recogniser:
    """Transcribe recordings with a trained model; `network` is the torch module."""

    def __init__(self, network: CTCModel) -> None:
        self.network = network

    def transcribe(
        self,
        audio: str | Path | npt.NDArray[np.floating],
        sample_rate: int | None = None,
        *,
        beam: int = 0,
        nbest: int = 0,
    ) -> Transcription:
        """Return the transcription of a recording of any length; over 25 s it is split at pauses.

        Args:
            audio: A file, or samples in [-1, 1], shape (samples,) or (samples, channels).
            sample_rate: Of samples, Hz.
            beam: Width of the prefix beam search; 0: the best path.
            nbest: Texts of the n-best list, which needs a beam of at least that width.

        Raises:
            AudioError: If the file cannot be decoded, or the samples are not finite.
            StreamtrainError: If the sample rate is missing.

        Example:
            >>> load_model("runs/zero2/best").transcribe("clip.flac").text
        """
        loaded = _from_samples(audio, sample_rate) if isinstance(audio, np.ndarray) else _from_file(Path(audio))
        (row,) = decode_recordings(self.network, [loaded], DecodingOptions(beam=max(beam, nbest), nbest=nbest))
        words = (TimedWord(word["word"], word["start"], word["end"], word["confidence"]) for word in row["words"])
        texts = (hypothesis["text"] for hypothesis in row.get("nbest", ()))
        return Transcription(row[TRACKS[self.network.vocab.track]], row["confidence"], tuple(words), tuple(texts))


def load_model(folder: str | Path) -> Recogniser:
    """Load a trained model for inference, onto a GPU if there is one.

    Args:
        folder: RUN/best, or an exported model.

    Raises:
        StreamtrainError: If the folder holds no model, or one that is damaged or incomplete.

    Example:
        >>> model = load_model("runs/zero2/best")
        >>> model.transcribe(waveform, sample_rate=44_100).words
    """
    return Recogniser(load_trained(folder).to(World().device))


def _from_file(path: Path) -> LoadedRecording:
    loaded = load(find_recordings([str(path)])[0])
    if loaded.error is not None:
        raise AudioError(f"{path}: {loaded.error}")
    return loaded


def _from_samples(samples: npt.NDArray[np.floating], sample_rate: int | None) -> LoadedRecording:
    if sample_rate is None:
        raise StreamtrainError(
            "samples were given without their sample_rate", "transcribe(samples, sample_rate=16_000)"
        )
    mono = samples.astype(np.float32) if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)
    if mono.ndim != 1 or not len(mono) or not np.isfinite(mono).all():
        raise AudioError(
            f"samples of shape {samples.shape}: finite ones of shape (samples,) or (samples, channels) expected"
        )
    waveform = soxr.resample(mono, sample_rate, SAMPLE_RATE) if sample_rate != SAMPLE_RATE else mono
    cut: Sequence[tuple[int, npt.NDArray[np.float32]]] = list(split_at_pauses(waveform))
    recording = Recording("samples", "", load=list, stamp="")
    starts = tuple(start / SAMPLE_RATE for start, _ in cut)
    return LoadedRecording(recording, "samples", tuple(piece for _, piece in cut), starts)
