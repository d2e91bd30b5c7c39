"""Transcribe one recording at a time from Python: a file, or samples that are there already."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from sharding.errors import AudioError, StreamtrainError
from streamtrain.distributed import own_device
from streamtrain.infer.inputs import AudioChunk, Recording
from streamtrain.infer.transcribe import DecodingOptions, LoadedRecording, decode_recordings, load
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import Word
from streamtrain.model.labels import field_of
from streamtrain.model.pretrained import load_trained


@dataclass(frozen=True, slots=True)
class Transcription:
    """Hold the text of a recording, as `Recogniser.transcribe` returns it.

    Example:
        >>> for word in model.transcribe("clip.flac").words: print(word.text, word.start, word.end, word.confidence)
    """

    text: str
    confidence: float  # in [0, 1]
    words: tuple[Word, ...]  # each with its start and end, s
    nbest: tuple[str, ...] = ()  # texts, best first, if they were asked for


class Recogniser:
    """Transcribe recordings with a trained model, as `load_model` returns it.

    Args:
        network: The torch module, on the device that computes.

    Example:
        >>> model = load_model("runs/zero2/best")
        >>> model.transcribe("clip.flac").text, model.network.labels.profile
    """

    def __init__(self, network: CTCModel) -> None:
        self.network = network

    def transcribe(
        self,
        audio: str | Path | npt.NDArray[Any],
        sample_rate: int | None = None,
        *,
        beam: int = 0,
        nbest: int = 0,
    ) -> Transcription:
        """Return the transcription of a recording of any length; over 25 s it is split at pauses.

        Args:
            audio: A file on disk, or samples, shape (samples,) or (samples, channels): floats, int16, int32.
            sample_rate: Of samples, Hz.
            beam: Width of the prefix beam search; 0: the best path.
            nbest: Texts of the n-best list. The beam is at least as wide.

        Raises:
            AudioError: If the file cannot be read, or is refused as in `transcribe`; likewise samples.
            StreamtrainError: If the sample rate is missing.

        Example:
            >>> load_model("runs/zero2/best").transcribe("clip.flac").text
        """
        if isinstance(audio, np.ndarray):
            data = _encode(audio, sample_rate)
            loaded = _load("samples", lambda: [AudioChunk(data)])
        else:
            loaded = _load(str(audio), lambda: [AudioChunk(Path(audio).read_bytes())])
        (row,) = decode_recordings(self.network, [loaded], DecodingOptions(beam=max(beam, nbest), nbest=nbest))
        words = (Word(word["word"], word["start"], word["end"], word["confidence"]) for word in row["words"])
        texts = (hypothesis["text"] for hypothesis in row.get("nbest", ()))
        return Transcription(row[field_of(self.network.labels)], row["confidence"], tuple(words), tuple(texts))


def load_model(folder: str | Path) -> Recogniser:
    """Load a trained model for inference, onto a GPU if there is one: under a launcher, that of this rank.

    Args:
        folder: RUN/best, or an exported model.

    Returns:
        The model, which transcribes; `evaluate` scores it.

    Raises:
        StreamtrainError: If the folder holds no model, or one that is damaged or incomplete.

    Example:
        >>> model = load_model("runs/zero2/best")
        >>> model.transcribe(waveform, sample_rate=44_100).words
    """
    return Recogniser(load_trained(folder).to(own_device()))


def _load(name: str, read: Callable[[], list[AudioChunk]]) -> LoadedRecording:
    loaded = load(Recording(name, name, read))
    if loaded.error is not None:
        raise AudioError(f"{name}: {loaded.error}")
    return loaded


def _encode(samples: npt.NDArray[Any], sample_rate: int | None) -> bytes:
    """Return samples as a WAV file of their own type, so that they are checked, mixed and resampled like any file."""
    if sample_rate is None:
        raise StreamtrainError(
            "samples were given without their sample_rate", "transcribe(samples, sample_rate=16_000)"
        )
    subtype = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT", "float64": "DOUBLE"}.get(samples.dtype.name)
    if subtype is None or samples.ndim not in (1, 2) or not 0 < sample_rate < 2**31:
        wanted = "int16, int32 or floats of shape (samples,) or (samples, channels)"
        raise AudioError(
            f"samples: {samples.dtype} of shape {samples.shape} at {sample_rate} Hz, {wanted} are expected"
        )
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, sample_rate, format="WAV", subtype=subtype)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError(f"samples of shape {samples.shape} at {sample_rate} Hz: {error}") from error
    return file.getvalue()
