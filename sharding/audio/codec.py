"""Probe, decode, resample and encode audio. The output is always 16 kHz mono, and proved to decode."""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    check_compression,
    check_mp3_length,
    check_sizes,
    check_whole,
    cut_tail,
    skip_tags,
)
from sharding.audio.libflac import decode_plain
from sharding.errors import AudioError, StreamtrainError

SAMPLE_RATE = 16_000
PASSED_THROUGH = ("FLAC", "PCM_16", SAMPLE_RATE, 1)  # container, samples, rate and channels of files that stay
CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # wav2vec2's (kernel, stride), in samples
FRAME_SAMPLES = math.prod(stride for _, stride in CONV_LAYERS)  # 320: a frame every 20 ms
MIN_SAMPLES = 400  # the receptive field of those layers: a shorter clip has no frame
UNKNOWN_FRAMES = 2**40  # a streamed file has no length, for which libsndfile returns far more than this
MIN_RATE = 1_000  # Hz; below it speech is unintelligible, and resampling would inflate the clip
MAX_VALUES = 2**29  # samples × channels of one file, 2 GiB once decoded: a header that declares more is a bomb
MIN_KEPT_ENERGY = 0.1  # share of the energy that uncorrelated channels keep when mixed
UNRECOGNISED = 1  # libsndfile's error for formats it has no reader for, such as MPEG-4, AAC, WMA, AMR and WebM
CONVERT = "ffmpeg -i x.m4a -ar 16000 -ac 1 x.flac"
MIXED_SEC = 0.2  # checked at a time: of two channels in opposition, at most about twice that is lost
MIN_ENERGY = 1e-4  # share of the energy of the loudest part: 40 dB below it is a pause, whose noise may cancel out
FULL_SCALES = (1, 2**15, 2**23, 2**31)  # of floats, and of integers that were written as floats
MAX_CLIPPED = 0.001  # share of the samples: single peaks, which are inaudible
MAX_BEYOND_SEC = 0.05  # of a range's end behind that of its recording: times are rounded, and MP3 is padded
MP3_LEAD_SEC = 1  # decoded before a range: frames that lean on earlier ones come out wrong, for 0.3 s at 8 kbit/s
CONSTANT_PEAK = 1e-5  # a smaller swing carries no signal; about a third of a 16-bit step

Waveform = npt.NDArray[np.float32]  # (samples,), 16 kHz, in [-1, 1]


class Decoded(NamedTuple):
    """Hold a whole clip, 16 kHz and mono."""

    sound: npt.NDArray[Any]  # (samples,) int16 if final, else float32
    passthrough: bool  # whether the bytes already are 16-bit FLAC at 16 kHz, mono
    remarks: tuple[str, ...] = ()  # on changes to the sound that its owner may want to know

    @property
    def waveform(self) -> Waveform:
        return self.sound * np.float32(2**-15) if self.passthrough else self.sound

    @property
    def pcm(self) -> npt.NDArray[np.int16]:
        return self.sound if self.passthrough else quantize(self.sound)


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """Hold what the header of a file declares."""

    samples: int  # at 16 kHz, after resampling
    passthrough: bool  # 16 kHz mono 16-bit FLAC: its bytes can be stored as they are


def frame_count(samples: int) -> int:
    """Return the number of frames that wav2vec2 makes of `samples` (one per 20 ms, less the edges)."""
    for kernel, stride in CONV_LAYERS:
        samples = (samples - kernel) // stride + 1
    return max(samples, 0)


def probe(file: IO[bytes]) -> AudioInfo:
    """Read the header alone. Raises AudioError, with the reason for the ledger, if the file is no audio."""
    head = file.read(flac.HEADER_BYTES)
    samples = _samples_of_plain(head)
    if samples is not None:
        return AudioInfo(samples, True)
    _check_no_resource_fork()
    if head.startswith(READ_TO_THE_END):
        whole = head + file.read()
        check_compression(whole)
        file = io.BytesIO(cut_tail(whole))
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
        passthrough=(info.format, info.subtype, info.samplerate, info.channels) == PASSED_THROUGH,
    )


def probe_range(file: IO[bytes], offset_sec: float, duration_sec: float | None) -> AudioInfo:
    """Return what the header of a recording declares of a range. Raises AudioError if there is no such range."""
    with _open_seekable(file) as sound:
        start, stop = _frames_of_range(sound, offset_sec, duration_sec)
        return AudioInfo(round((stop - start) * SAMPLE_RATE / sound.samplerate), False)


def decode_range(file: IO[bytes], offset_sec: float, duration_sec: float | None) -> Decoded:
    """Decode a range of a recording alone, to its end if there is no duration. Raises AudioError.

    The file is opened for each range, so that MP3 and Ogg decode to the same samples whatever was read before.
    """
    with _open_seekable(file) as sound:
        start, stop = _frames_of_range(sound, offset_sec, duration_sec)
        lead = min(start, MP3_LEAD_SEC * sound.samplerate) if sound.format == "MP3" else 0
        samples = np.empty((lead + stop - start, sound.channels), np.float32)
        try:
            with _muted() if lead else nullcontext():
                sound.seek(start - lead)
                read = sound.buffer_read_into(samples, "float32")  # at once: soundfile seeks after each
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(f"damaged: the range from {offset_sec:g} s does not decode") from error
        if read < len(samples):
            raise AudioError(f"cut off: {read} of {len(samples)} samples from {offset_sec:g} s on decode")
        return _finish(samples[lead:], sound.samplerate, False, [])


@contextmanager
def _muted() -> Iterator[None]:
    """Drop what mpg123 prints on stderr, behind Python's back, of a lead's frames that lean on earlier ones."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _open_seekable(file: IO[bytes]) -> soundfile.SoundFile:
    """Open a recording to decode parts of it; read it whole if libsndfile would misread its tags or its tail."""
    _check_no_resource_fork()
    head = file.read(flac.HEADER_BYTES)
    if head.startswith((*READ_TO_THE_END, b"ID3")):
        data = head + file.read()
        file = io.BytesIO(cut_tail(data[skip_tags(data) :]))
    file.seek(0)
    try:
        return soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(_not_audio(error)) from error


def _frames_of_range(sound: soundfile.SoundFile, offset_sec: float, duration_sec: float | None) -> tuple[int, int]:
    """Return the first frame of a range and the one behind its last, at the recording's rate. Raises AudioError."""
    rate, frames = sound.samplerate, sound.frames
    if not 0 < frames < UNKNOWN_FRAMES:
        raise AudioError("declares no length, so that no range of it can be found: convert it to FLAC or WAV")
    start = round(offset_sec * rate)
    stop = frames if duration_sec is None else round((offset_sec + duration_sec) * rate)
    if stop > frames + MAX_BEYOND_SEC * rate or start >= frames:
        beyond = f"the range from {offset_sec:g} s to {stop / rate:g} s leads beyond the recording's end"
        raise AudioError(f"{beyond} at {frames / rate:.3f} s")
    if stop <= start:
        raise AudioError(f"the range from {offset_sec:g} s to {stop / rate:g} s is empty")
    stop = min(stop, frames)
    _check_header(stop - start, sound.channels, rate)
    return start, stop


def _check_no_resource_fork() -> None:
    """Raise StreamtrainError if the current folder has `._`, to libsndfile the resource fork of an unnamed file.

    libsndfile would block on a pipe of that name, and read every MP3 as an empty file because of an empty one.
    """
    if os.path.lexists("._"):
        raise StreamtrainError("._: libsndfile reads this file as a part of every MP3", "move it out of this folder")


def decode(data: bytes, prove: bool = False) -> tuple[Waveform, bool]:
    """Decode a whole clip to 16 kHz mono; also return whether the bytes already are that, as 16-bit FLAC.

    Raises AudioError if the file is cut off, holds NaN or infinity, or has no samples; with `prove` also if the samples
    differ from the file's own checksum: worth its time for bytes that no other checksum covers.
    """
    decoded = decode_native(data, prove)
    return decoded.waveform, decoded.passthrough


def decode_native(data: bytes, prove: bool = False) -> Decoded:
    """Decode a clip as `decode` does, but keep 16-bit FLAC at 16 kHz mono as int16."""
    plain = _samples_of_plain(data)
    pcm = decode_plain(data, plain) if plain is not None else None
    if pcm is not None:
        if prove:
            flac.check_md5(data, pcm.tobytes())
        return Decoded(pcm, True)
    _check_no_resource_fork()
    check_compression(data)
    data = data[skip_tags(data) :]  # else libsndfile cuts as much off the end of a WAV or an AIFF
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
    return _finish(sound, rate, final, remarks)


def _finish(sound: npt.NDArray[Any], rate: int, final: bool, remarks: Sequence[str]) -> Decoded:
    """Mix, scale and resample decoded samples (samples, channels). Raises AudioError if they cannot be used."""
    mono, *mix_remarks = _mix(sound, rate)
    if not final:
        mono, *scale_remarks = _scale(mono)
        mix_remarks += scale_remarks
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) < MIN_SAMPLES:
        raise AudioError(f"shorter than one frame: {len(mono)} samples at 16 kHz, {MIN_SAMPLES} needed")
    return Decoded(np.ascontiguousarray(mono), final, (*remarks, *mix_remarks))


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
    """Return whether the signal never moves: digital silence, or a microphone that was not connected."""
    if abs(float(sound[0]) - float(sound[len(sound) // 2])) >= CONSTANT_PEAK:
        return False  # two samples are mostly enough
    return float(sound.max()) - float(sound.min()) < CONSTANT_PEAK


def _samples_of_plain(data: bytes) -> int | None:
    """Return the number of samples that a plain FLAC declares, None for any other file or an extreme length."""
    samples = flac.samples_of_plain(data)
    return samples if samples is not None and MIN_SAMPLES <= samples <= MAX_VALUES else None


def _read_whole(file: soundfile.SoundFile, dtype: str) -> npt.NDArray[Any]:
    """Read all samples, shape (samples, channels). Raises AudioError if not all of them decode."""
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
    """Read a file that does not declare its length, block by block until it ends."""
    file.seekable = lambda: False  # else soundfile seeks after every read, which fails for such a FLAC
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

    In their mean, uncorrelated channels keep the sum of their energies over the square of their number.
    """
    channels = sound.shape[1]
    if channels == 1:
        return (sound[:, 0],)
    with np.errstate(over="ignore", invalid="ignore"):  # by samples that _scale rejects
        mono = reduce(np.add, sound.T) / np.float32(channels)  # in a tenth of the time of mean()
        energies = np.array([_energies(channel, rate) for channel in sound.T])  # (channels, parts)
        total = energies.sum(axis=0)
        lost = _energies(mono, rate) < MIN_KEPT_ENERGY * total / channels**2
        if np.any(lost & (total > MIN_ENERGY * total.max())):
            loudest = int(energies.sum(axis=1).argmax())
            return sound[:, loudest], "channels that cancel out: only the loudest is used"
    return (mono,)


def _energies(channel: Waveform, rate: int) -> npt.NDArray[Any]:
    """Return the variance, so without an offset, of each MIXED_SEC; the last part overlaps the one before."""
    width = min(math.ceil(MIXED_SEC * rate), len(channel))
    whole = np.ascontiguousarray(channel)[: len(channel) // width * width]
    energies: npt.NDArray[Any] = np.append(whole.reshape(-1, width).var(axis=1), channel[-width:].var())
    return energies


def _scale(waveform: Waveform) -> tuple[Any, ...]:
    """Return a waveform within full scale but for single peaks, and a remark if it was not. Raises AudioError.

    Floats may exceed full scale, or be integers that were never divided by theirs. The sound's own scale is the
    smallest that at most MAX_CLIPPED of the samples exceed, unless its peak is nearer, in decibels, to the scale below:
    then it is too loud for that one, rather than very quiet in this one. It is then divided by its peak, which loses
    its level; the scale below would clip it, and its own would leave it a few steps of 16 bit.
    """
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak <= 1:
        return (waveform,)
    if not math.isfinite(peak):
        raise AudioError("NaN or infinite samples")
    if peak > FULL_SCALES[-1]:
        raise AudioError(f"float samples of up to {peak:.3g}, where 1 is full scale")
    loudness, clipped = np.abs(waveform), MAX_CLIPPED * len(waveform)
    fitting = next(index for index, scale in enumerate(FULL_SCALES) if np.count_nonzero(loudness > scale) <= clipped)
    if fitting == 0:
        return (waveform,)
    if peak < math.sqrt(FULL_SCALES[fitting - 1] * FULL_SCALES[fitting]):
        return waveform / np.float32(peak), "samples beyond full scale: divided by their peak"
    scale = FULL_SCALES[fitting]
    return waveform / np.float32(scale), f"float samples in the range of integers: divided by {scale}"


def _check_header(frames: int, channels: int, rate: int) -> None:
    if rate < MIN_RATE:
        raise AudioError(f"sample rate is {rate} Hz, at least {MIN_RATE} are needed")
    if max(frames * channels, frames * SAMPLE_RATE // rate) > MAX_VALUES:
        raise AudioError(f"too long: {frames} samples × {channels} channels at {rate} Hz")


def _packed(sound: npt.NDArray[Any], subtype: str) -> bytes:
    """Return samples as little-endian integers of their own width: float32 holds them exactly."""
    width = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}[subtype]  # bytes per sample
    pcm = sound
    if sound.dtype != np.int16:
        pcm = (sound * np.float32(2 ** (8 * width - 1))).astype("<i2" if width == 2 else "<i4")
    return pcm.view(np.uint8).reshape(-1, pcm.itemsize)[:, :width].tobytes()


def _not_audio(error: BaseException) -> str:
    advice = f"; if ffmpeg reads it, convert it: {CONVERT}" if getattr(error, "code", 0) == UNRECOGNISED else ""
    return f"not readable as audio: {_last_line(error)}{advice}"


def _last_line(error: BaseException) -> str:
    return str(error).rstrip(". ").split(": ")[-1] or "unknown error"
