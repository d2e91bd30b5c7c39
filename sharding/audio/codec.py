"""Probe, decode, resample, encode. What comes out is always 16 kHz mono, and proved to decode."""

import io
import math
import os
from dataclasses import dataclass
from functools import reduce
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from sharding.audio import flac
from sharding.audio.containers import (
    READ_TO_THE_END,
    SIZED,
    UNKNOWN_LENGTH,
    check_mp3_length,
    check_sizes,
    check_whole,
    cut_tail,
    skip_tags,
)
from sharding.audio.libflac import decode_plain
from sharding.errors import AudioError, StreamtrainError

SAMPLE_RATE = 16_000
CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # wav2vec2's (kernel, stride), in samples
FRAME_SAMPLES = math.prod(stride for _, stride in CONV_LAYERS)  # 320: a frame every 20 ms
MIN_SAMPLES = 400  # the receptive field of those layers: a shorter clip has no frame
UNKNOWN_FRAMES = 2**40  # a streamed file says nothing of its length, and libsndfile something far above this
MIN_RATE = 1_000  # Hz; below it nobody can be understood, and resampling would blow the clip up
MAX_VALUES = 2**29  # samples × channels of one file, 2 GiB once decoded: a header that promises more is a bomb
MIN_KEPT_ENERGY = 0.1  # of the energy that channels keep when mixed, if they have nothing in common
UNRECOGNISED = 1  # libsndfile's error for formats it has no reader for, such as MPEG-4, AAC, WMA, AMR and WebM
CONVERT = "ffmpeg -i x.m4a -ar 16000 -ac 1 x.flac"
MIXED_SEC = 0.2  # judged at a time: of two channels in opposition at most about twice that is lost
MIN_ENERGY = 1e-4  # of the energy of the loudest part: 40 dB below it is a pause, whose noise may cancel out
FULL_SCALES = (1, 2**15, 2**23, 2**31)  # of floats, and of integers that were written as such
MAX_CLIPPED = 0.001  # of the samples: single peaks, which nobody hears
CONSTANT_PEAK = 1e-5  # below this swing a signal says nothing, about a third of a 16-bit step

Waveform = npt.NDArray[np.float32]  # (samples,), 16 kHz, in [-1, 1]


class Decoded(NamedTuple):
    """A whole clip, 16 kHz and mono."""

    sound: npt.NDArray[Any]  # (samples,) int16 if final, else float32
    passthrough: bool  # whether the bytes already are that, as 16-bit FLAC
    remarks: tuple[str, ...] = ()  # what was done to it that its owner may want to know

    @property
    def waveform(self) -> Waveform:
        return self.sound * np.float32(2**-15) if self.passthrough else self.sound

    @property
    def pcm(self) -> npt.NDArray[np.int16]:
        return self.sound if self.passthrough else quantize(self.sound)


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
    head = file.read(flac.HEADER_BYTES)
    samples = _samples_of_plain(head)
    if samples is not None:
        return AudioInfo(samples, True)
    _check_no_resource_fork()
    if head.startswith(READ_TO_THE_END):
        file = io.BytesIO(cut_tail(head + file.read()))
    file.seek(0)
    try:
        info = soundfile.info(file)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        if head.startswith(SIZED):
            file.seek(0)
            check_sizes(file.read())
        raise AudioError(_not_audio(error)) from error
    if not 0 < info.frames < UNKNOWN_FRAMES:
        file.seek(0)
        waveform, final = decode(file.read())
        return AudioInfo(len(waveform), final)
    _check_header(info.frames, info.channels, info.samplerate)
    return AudioInfo(
        samples=round(info.frames * SAMPLE_RATE / info.samplerate),
        passthrough=_is_final(info.format, info.subtype, info.samplerate, info.channels),
    )


def _check_no_resource_fork() -> None:
    """Raise StreamtrainError if `._` is in the current folder, where libsndfile seeks what belongs to no name.

    It would wait for a pipe, and take every MP3 for what an empty file is.
    """
    if os.path.lexists("._"):
        raise StreamtrainError("._: libsndfile takes this file for a part of every MP3", "move it out of this folder")


def decode(data: bytes, prove: bool = False) -> tuple[Waveform, bool]:
    """Decode a whole clip to 16 kHz mono; also says whether the bytes already are that, as 16-bit FLAC.

    Raises AudioError where the file is cut off, holds NaN or infinity, or has no samples; with `prove` also where the
    samples differ from what the file itself says of them: worth its time for bytes that no checksum vouches for.
    """
    decoded = decode_native(data, prove)
    return decoded.waveform, decoded.passthrough


def decode_native(data: bytes, prove: bool = False) -> Decoded:
    """`decode`, but what is 16-bit FLAC at 16 kHz and mono stays the int16 that it is."""
    plain = _samples_of_plain(data)
    pcm = decode_plain(data, plain) if plain is not None else None
    if pcm is not None:
        if prove:
            flac.check_md5(data, pcm.tobytes())
        return Decoded(pcm, True)
    _check_no_resource_fork()
    data = data[skip_tags(data) :]  # libsndfile takes as much from the end of a WAV or an AIFF
    try:
        file = soundfile.SoundFile(io.BytesIO(cut_tail(data)))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        check_sizes(data)
        raise AudioError(_not_audio(error)) from error
    with file:
        remarks = list(check_whole(data, file.format))
        rate, streamed = file.samplerate, file.frames >= UNKNOWN_FRAMES
        final = plain is not None
        sound = _read_streamed(file) if streamed else _read_whole(file, "int16" if final else "float32")
        if file.format == "MP3":
            check_mp3_length(data, len(sound), file.frames, rate)
        if prove and file.format == "FLAC":
            flac.check_md5(data, _packed(sound, file.subtype))
    if len(sound) == 0:
        raise AudioError("no samples")
    if streamed and UNKNOWN_LENGTH not in remarks:
        remarks.append(UNKNOWN_LENGTH)
    mono, *mixed = _mix(sound, rate)
    if not final:
        mono, *scaled = _scale(mono)
        mixed += scaled
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) < MIN_SAMPLES:
        raise AudioError(f"shorter than one frame: {len(mono)} samples at 16 kHz, {MIN_SAMPLES} needed")
    return Decoded(np.ascontiguousarray(mono), final, (*remarks, *mixed))


def quantize(waveform: Waveform) -> npt.NDArray[np.int16]:
    """Return the 16-bit samples of a waveform; those beyond full scale are clipped, not wrapped."""
    pcm: npt.NDArray[np.int16] = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)
    return pcm


def encode(sound: npt.NDArray[Any]) -> bytes:
    """Return a 16 kHz mono sound, int16 or a waveform, as 16-bit FLAC."""
    pcm = sound if sound.dtype == np.int16 else quantize(sound)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def is_constant(sound: npt.NDArray[Any]) -> bool:
    """Whether the signal never moves: digital silence, or a microphone that was not there."""
    if abs(float(sound[0]) - float(sound[len(sound) // 2])) >= CONSTANT_PEAK:
        return False  # two samples mostly tell
    return float(sound.max()) - float(sound.min()) < CONSTANT_PEAK


def _samples_of_plain(data: bytes) -> int | None:
    """Of a plain FLAC of sensible length."""
    samples = flac.samples_of_plain(data)
    return samples if samples is not None and MIN_SAMPLES <= samples <= MAX_VALUES else None


def _is_final(container: str, subtype: str, rate: int, channels: int) -> bool:
    return (container, subtype, rate, channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)


def _read_whole(file: soundfile.SoundFile, dtype: str) -> npt.NDArray[Any]:
    """All of it, shape (samples, channels)."""
    _check_header(file.frames, file.channels, file.samplerate)
    sound = np.empty((file.frames, file.channels), dtype)
    try:
        samples = file.buffer_read_into(sound, dtype)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"cut off or damaged: none or not all of {file.frames} samples decode") from error
    if samples < file.frames and file.format != "MP3":
        raise AudioError(f"cut off: {samples} of {file.frames} samples decode")
    return sound[:samples]


def _read_streamed(file: soundfile.SoundFile) -> Waveform:
    """Read a file that does not know its own length, block by block until it ends."""
    file.seekable = lambda: False  # else soundfile seeks after every read, and such a FLAC cannot
    blocks: list[Waveform] = []
    try:
        while not blocks or len(blocks[-1]):
            blocks.append(file.read(2**20, dtype="float32", always_2d=True))
            _check_header(sum(map(len, blocks)), file.channels, file.samplerate)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"cut off or damaged: {_last_line(error)}") from error
    return np.concatenate(blocks)


def _mix(sound: npt.NDArray[Any], rate: int) -> tuple[Any, ...]:
    """Return the mean of the channels (samples, channels), or the loudest one and a remark if they cancel out anywhere.

    Channels that have nothing in common keep in their mean the sum of their energies over the number's square.
    """
    channels = sound.shape[1]
    if channels == 1:
        return (sound[:, 0],)
    with np.errstate(over="ignore", invalid="ignore"):  # of samples that are then refused
        mono = reduce(np.add, sound.T) / np.float32(channels)  # in a tenth of the time of mean()
        energies = np.array([_energies(channel, rate) for channel in sound.T])  # (channels, parts)
        total = energies.sum(axis=0)
        lost = _energies(mono, rate) < MIN_KEPT_ENERGY * total / channels**2
        if np.any(lost & (total > MIN_ENERGY * total.max())):
            loudest = int(energies.sum(axis=1).argmax())
            return sound[:, loudest], "channels that cancel out: the loudest alone is used"
    return (mono,)


def _energies(channel: Waveform, rate: int) -> npt.NDArray[Any]:
    """Return the variance of each MIXED_SEC, so without an offset; the last part overlaps the one before."""
    width = min(math.ceil(MIXED_SEC * rate), len(channel))
    whole = np.ascontiguousarray(channel)[: len(channel) // width * width]
    energies: npt.NDArray[Any] = np.append(whole.reshape(-1, width).var(axis=1), channel[-width:].var())
    return energies


def _scale(waveform: Waveform) -> tuple[Any, ...]:
    """Return a waveform within full scale but for single peaks, and a remark if it was not. Raises AudioError.

    Floats may exceed full scale, or be integers that nobody divided by theirs. The smallest scale that at most
    MOST_CLIPPED of the samples exceed is the sound's own, unless its peak is nearer, in decibels, to the scale below:
    then it is too loud for that one, rather than very quiet in this one. Divided by its peak it loses its level, where
    the scale below would clip it, and its own would leave it a few steps of 16 bit.
    """
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak <= 1:
        return (waveform,)
    if not math.isfinite(peak):
        raise AudioError("NaN or infinite samples")
    if peak > FULL_SCALES[-1]:
        raise AudioError(f"float samples of up to {peak:.3g}, where 1 is full scale")
    loudness, clipped = np.abs(waveform), MAX_CLIPPED * len(waveform)
    fits = next(place for place, scale in enumerate(FULL_SCALES) if np.count_nonzero(loudness > scale) <= clipped)
    if fits == 0:
        return (waveform,)
    if peak < math.sqrt(FULL_SCALES[fits - 1] * FULL_SCALES[fits]):
        return waveform / np.float32(peak), "samples beyond full scale: divided by their peak"
    scale = FULL_SCALES[fits]
    return waveform / np.float32(scale), f"float samples in the range of integers: divided by {scale}"


def _check_header(frames: int, channels: int, rate: int) -> None:
    if rate < MIN_RATE:
        raise AudioError(f"sample rate is {rate} Hz")
    if max(frames * channels, frames * SAMPLE_RATE // rate) > MAX_VALUES:
        raise AudioError(f"too long: {frames} samples × {channels} channels at {rate} Hz")


def _packed(sound: npt.NDArray[Any], subtype: str) -> bytes:
    """Samples as integers of their own width, little-endian: float32 holds them exactly."""
    width = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}[subtype]  # bytes per sample
    pcm = sound
    if sound.dtype != np.int16:
        pcm = (sound * np.float32(2 ** (8 * width - 1))).astype("<i2" if width == 2 else "<i4")
    return pcm.view(np.uint8).reshape(-1, pcm.itemsize)[:, :width].tobytes()


def _not_audio(error: BaseException) -> str:
    converted = f"; what ffmpeg reads it converts: {CONVERT}" if getattr(error, "code", 0) == UNRECOGNISED else ""
    return f"not readable as audio: {_last_line(error)}{converted}"


def _last_line(error: BaseException) -> str:
    return str(error).rstrip(". ").split(": ")[-1] or "unknown error"
