"""Probe, decode, resample, encode. What comes out is always 16 kHz mono, and proved to decode."""

import io
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from sharding.errors import AudioError

SAMPLE_RATE = 16_000
CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # wav2vec2's (kernel, stride), in samples
MIN_SAMPLES = 400  # the receptive field of those layers: a shorter clip has no frame
UNKNOWN_FRAMES = 2**40
CONSTANT_PEAK = 1e-5  # below this swing a signal says nothing, about a third of a 16-bit step

Waveform = npt.NDArray[np.float32]  # (samples,), 16 kHz, in [-1, 1]


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What the header says."""

    samples: int  # at 16 kHz, after resampling
    passthrough: bool  # 16 kHz mono 16-bit FLAC: its bytes can be stored as they are


def frame_count(samples: int) -> int:
    """Frames that wav2vec2 makes of so many samples (one per 20 ms, less the edges)."""
    for kernel, stride in CONV_LAYERS:
        samples = (samples - kernel) // stride + 1
    return max(samples, 0)


def probe(file: IO[bytes]) -> AudioInfo:
    """Read the header alone. Raises AudioError, with the reason for the ledger, where it is no audio."""
    try:
        info = soundfile.info(file)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(_reason(error)) from error
    if not 0 < info.frames < UNKNOWN_FRAMES:  # a streamed file says nothing of its length
        file.seek(0)
        waveform, final = decode(file.read())
        return AudioInfo(len(waveform), final)
    return AudioInfo(
        samples=round(info.frames * SAMPLE_RATE / info.samplerate),
        passthrough=_is_final(info.format, info.subtype, info.samplerate, info.channels),
    )


def decode(data: bytes) -> tuple[Waveform, bool]:
    """Decode a whole clip to 16 kHz mono; also says whether the bytes already are that, as 16-bit FLAC.

    Raises AudioError where the file is cut off, holds NaN or infinity, or has no samples.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate, channels = file.frames, file.samplerate, file.channels
            final = _is_final(file.format, file.subtype, rate, channels)
            waveform: Waveform = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(_reason(error)) from error
    if len(waveform) < promised:
        raise AudioError(f"cut off: {len(waveform)} of {promised} samples decode")
    if len(waveform) == 0:
        raise AudioError("no samples")
    if not np.isfinite(waveform).all():
        raise AudioError("NaN or infinite samples")
    mono = waveform[:, 0] if channels == 1 else waveform.mean(axis=1, dtype=np.float32)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) < MIN_SAMPLES:
        raise AudioError(f"shorter than one frame: {len(mono)} samples at 16 kHz, {MIN_SAMPLES} needed")
    return np.ascontiguousarray(mono, np.float32), final


def encode(waveform: Waveform) -> bytes:
    """16-bit FLAC of a 16 kHz mono waveform; samples beyond full scale are clipped, not wrapped."""
    pcm = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def is_constant(waveform: Waveform) -> bool:
    """Whether the signal never moves: digital silence, or a microphone that was not there."""
    return float(waveform.max() - waveform.min()) < CONSTANT_PEAK


def _is_final(container: str, subtype: str, rate: int, channels: int) -> bool:
    return (container, subtype, rate, channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)


def _reason(error: BaseException) -> str:
    text = str(error).rstrip(".")
    return f"not readable as audio: {text.split(': ')[-1]}"
