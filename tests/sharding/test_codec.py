"""Whatever sound comes in, 16 kHz mono comes out, of the right length; what is damaged is refused with a reason."""

import io
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sharding.audio.codec import (
    SAMPLE_RATE,
    decode,
    decode_native,
    decode_range,
    encode,
    frame_count,
    probe,
    probe_range,
)
from sharding.errors import AudioError
from tests.tools.corpus import say

SOUND = say("kæt sæt ɪt")


def make_audio(kind: str, subtype: str | None = None, rate: int = SAMPLE_RATE, channels: int = 1) -> bytes:
    """One second of the same tone in any format."""
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(tone[:, None], channels, axis=1), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def flac_without_length() -> bytes:
    """As an encoder writes it that sends to a pipe: no number of samples in the header, and no MD5."""
    flac = bytearray(encode(SOUND))
    flac[21] &= 0xF0
    flac[22:42] = bytes(20)
    return bytes(flac)


def wav(sound: np.ndarray, subtype: str, rate: int = SAMPLE_RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format="WAV", subtype=subtype)
    return file.getvalue()


FORMATS = {
    "16 kHz FLAC": make_audio("FLAC", "PCM_16"),
    "44.1 kHz stereo FLAC": make_audio("FLAC", "PCM_16", 44_100, 2),
    "48 kHz 24-bit FLAC": make_audio("FLAC", "PCM_24", 48_000),
    "8 kHz 8-bit FLAC": make_audio("FLAC", "PCM_S8", 8_000),
    "8 kHz WAV": make_audio("WAV", "PCM_16", 8_000),
    "six-channel WAV": make_audio("WAV", "PCM_16", 48_000, 6),
    "16 kHz float WAV": make_audio("WAV", "FLOAT"),
    "OGG": make_audio("OGG", "VORBIS", 44_100),
    "MP3": make_audio("MP3", "MPEG_LAYER_III", 44_100),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_one_second_of_the_same_tone(name: str) -> None:
    waveform, final = decode(FORMATS[name], prove=True)
    assert final == (name == "16 kHz FLAC")
    assert waveform.dtype == np.float32
    assert len(waveform) == pytest.approx(SAMPLE_RATE, abs=16)  # 1 ms
    spectrum = np.abs(np.fft.rfft(waveform))
    assert spectrum.argmax() == pytest.approx(440, abs=2)
    assert waveform[1000:-1000].std() == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_the_header_promises_what_the_samples_keep(name: str) -> None:
    info = probe(io.BytesIO(FORMATS[name]))
    waveform, final = decode(FORMATS[name])
    assert info.samples == pytest.approx(len(waveform), abs=1)
    assert info.passthrough == final


def test_sixteen_bit_samples_survive_to_the_bit() -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    waveform, _ = decode(buffer.getvalue())
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(encode(waveform)), dtype="int16")[0], pcm)


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    loud = np.array([2.0, -2.0] * 400, np.float32)
    pcm = soundfile.read(io.BytesIO(encode(loud)), dtype="int16")[0]
    assert set(pcm.tolist()) == {32767, -32768}


def test_a_flac_without_a_length_is_read_to_its_end_and_stored_anew() -> None:
    flac = flac_without_length()
    waveform, final = decode(flac, prove=True)
    np.testing.assert_array_equal(waveform, decode(encode(SOUND))[0])
    assert not final
    assert probe(io.BytesIO(flac)).samples == len(waveform)


def test_a_flac_behind_an_mp3_tag_is_read_and_stored_without_it() -> None:
    waveform, final = decode(b"ID3\x04" + bytes(5) + b"\x0a" + bytes(10) + encode(SOUND))
    assert len(waveform) == len(SOUND)
    assert not final


@pytest.mark.parametrize("name", [name for name in FORMATS if "FLAC" in name])
def test_any_flipped_byte_of_a_flac_frame_is_noticed(name: str) -> None:
    rng = np.random.default_rng(0)
    for position in rng.integers(100, len(FORMATS[name]), 20):
        damaged = bytearray(FORMATS[name])
        damaged[position] ^= int(rng.integers(1, 256))
        with pytest.raises(AudioError):
            decode(bytes(damaged), prove=True)


def test_a_damaged_flac_is_passed_through_only_as_libsndfile_reads_it() -> None:
    """What training, or anyone, could then not read is refused, also where a single byte was put in or taken out."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        file.title, file.artist = "kæt", "a child"
        file.write(SOUND)
    flac = buffer.getvalue()
    first_frame = flac.index(b"\xff\xf8")
    rng = np.random.default_rng(0)
    flips = [(position, bit) for position in range(first_frame + 16) for bit in range(8)]
    flips += [(int(position), int(position) % 8) for position in rng.integers(first_frame, len(flac), 200)]
    taken = 0
    for position, bit in flips:
        damaged = bytearray(flac)
        if bit == 0:
            damaged.insert(position, 74)
        elif bit == 1:
            del damaged[position]
        else:
            damaged[position] ^= 1 << bit
        with suppress(AudioError):
            waveform, final = decode(bytes(damaged))
            taken += final
            if final:
                np.testing.assert_array_equal(waveform, soundfile.read(io.BytesIO(damaged), dtype="float32")[0])
    assert 200 < taken < len(flips) - 200  # of what says nothing of the samples, such as a title


@pytest.mark.parametrize("position", [21, 24, 25, 26, 41])  # depth and length, length, its MD5
def test_a_flac_header_that_belies_its_samples_is_noticed(position: int) -> None:
    flac = encode(SOUND)
    for bit in range(8):
        damaged = bytearray(flac)
        damaged[position] ^= 1 << bit
        with pytest.raises(AudioError):
            decode(bytes(damaged), prove=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_audio_that_is_cut_off_is_refused(name: str, share: float) -> None:
    audio = FORMATS[name]
    with pytest.raises(AudioError):
        decode(audio[: int(share * len(audio))], prove=True)


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_that_did_not_know_its_length_is_read(size: int) -> None:
    wav = bytearray(FORMATS["8 kHz WAV"])
    wav[40:44] = struct.pack("<I", size)
    assert len(decode(bytes(wav), prove=True)[0]) == SAMPLE_RATE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.filterwarnings("error")
def test_one_sample_that_is_no_number_is_refused(value: float, rate: int, channels: int) -> None:
    samples = np.zeros((rate, channels), np.float32)
    samples[rate // 2] = value
    with pytest.raises(AudioError, match="NaN or infinite"):
        decode(wav(samples, "FLOAT", rate))


def test_a_header_that_promises_days_is_refused_before_memory_is_taken() -> None:
    flac = bytearray(encode(SOUND))
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4  # 2^36 samples, 256 GiB once decoded
    wav = bytearray(FORMATS["16 kHz float WAV"])
    rate = wav.index(b"fmt ") + 12
    wav[rate : rate + 4] = struct.pack("<I", 1)  # 1 Hz: resampling would make 16,000 times as much
    for audio, reason in ((bytes(flac), "too long: 68719476735 samples"), (bytes(wav), "sample rate is 1 Hz")):
        with pytest.raises(AudioError, match=reason):
            decode(audio)
        with pytest.raises(AudioError, match=reason):
            probe(io.BytesIO(audio))


def test_a_clip_without_a_single_frame_is_refused() -> None:
    with pytest.raises(AudioError, match="shorter than one frame: 399 samples at 16 kHz, 400 needed"):
        decode(encode(SOUND[:399]))
    assert len(decode(encode(SOUND[:400]))[0]) == 400


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x1cftypM4A ", b"\xff\xf1`@@_\xfc", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR\n", b"\x1aE\xdf\xa3"]
)
def test_a_format_that_has_no_reader_here_is_refused_with_the_command_that_converts_it(head: bytes) -> None:
    """MPEG-4, AAC, WMA, AMR and WebM, as ffmpeg writes their first bytes."""
    for read in (lambda data: decode(data, prove=True), lambda data: probe(io.BytesIO(data))):
        with pytest.raises(AudioError, match=r"Format not recognised; .*: ffmpeg -i x\.m4a -ar 16000 -ac 1 x\.flac"):
            read(head + bytes(500))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_audio_are_refused_not_crashed_on(data: bytes) -> None:
    for head in (b"", b"fLaC", b"RIFF\x00\x01\x00\x00WAVE", b"OggS", b"ID3"):
        with pytest.raises(AudioError):
            decode(head + data, prove=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WAV", {"subtype": "PCM_24"}),
        ("FLAC", {"subtype": "PCM_16"}),
        ("OGG", {"subtype": "VORBIS"}),
        ("NIST", {"subtype": "PCM_16"}),
        ("W64", {"subtype": "PCM_16"}),
        ("MP3", {"bitrate_mode": "CONSTANT", "compression_level": 0.99}),  # 8 kbit/s: a frame leans on many
        ("MP3", {"bitrate_mode": "VARIABLE", "compression_level": 0.5}),
    ],
)
def test_a_range_has_the_samples_that_the_whole_has_there(kind: str, options: dict[str, Any]) -> None:
    time = np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE
    rng = np.random.default_rng(0)
    sound = 0.3 * np.sin(440 * time) * (np.sin(3 * time) > 0) + 0.02 * rng.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, sound, SAMPLE_RATE, format=kind, **options)
    whole = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]
    for start, stop in ((0, 16_000), (7_001, 27_003), (47_999, 95_999), (100_001, len(whole))):
        span = (start / SAMPLE_RATE, (stop - start) / SAMPLE_RATE if stop < len(whole) else None)
        assert probe_range(io.BytesIO(file.getvalue()), *span).samples == stop - start
        again = decode_range(io.BytesIO(file.getvalue()), *span)
        assert np.abs(again.sound - whole[start:stop]).max() < 1e-6, (start, stop)
        assert not again.passthrough


def test_frames_are_those_of_the_convolutions() -> None:
    assert [frame_count(samples) for samples in (0, 399, 400, 719, 720, 16_000)] == [0, 0, 1, 1, 2, 49]


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_is_decoded_whole_or_refused(rate: int, channels: int) -> None:
    """Without its first frame, which says its length, a file of variable bit rate looks shorter than it is."""
    seconds = 14
    fading = np.linspace(1, 0.001, rate * seconds)[:, None]
    sound = np.random.default_rng(0).normal(0, 0.1, (rate * seconds, channels)) * fading
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format="MP3")
    data = buffer.getvalue()
    waveform, _ = decode(data)
    assert len(waveform) / SAMPLE_RATE == pytest.approx(seconds, abs=0.05)
    second_frame = data.index(data[:2], 2)
    for other, wanted in ((data[second_frame:], seconds), (data + data, 2 * seconds)):
        with suppress(AudioError):
            waveform, _ = decode(other)
            assert len(waveform) / SAMPLE_RATE == pytest.approx(wanted, abs=0.5)


ALONE = np.random.default_rng(1).normal(0, 0.1, len(SOUND)).astype(np.float32)  # nothing in common with SOUND
MIDDLE = len(SOUND) // 2
PARTLY = np.where(abs(np.arange(len(SOUND)) - MIDDLE) < 4_000, -1, 1).astype(np.float32)  # half a second turned round
HUM = 0.001 * float(abs(SOUND).max()) * np.sin(np.arange(len(SOUND)) / 50).astype(np.float32)
CANCELLED = "channels that cancel out: only the loudest is used"


@pytest.mark.parametrize(
    ("channels", "loudest"),
    [
        ([SOUND, -SOUND], 0),
        ([0.98 * SOUND, -SOUND], 1),
        ([SOUND + 0.05, 0.05 - SOUND], 0),  # each with the offset of its sound card
        ([SOUND + 0.1 * ALONE, 0.1 * ALONE[::-1] - 0.9 * SOUND], 0),  # and with its own noise
        ([SOUND, SOUND], None),
        ([SOUND, ALONE], None),
        ([SOUND, 0 * SOUND], None),
        ([0 * SOUND] * 5 + [SOUND], None),
        ([SOUND, PARTLY * SOUND], 0),
        ([SOUND, np.concatenate([SOUND[:MIDDLE], -0.9 * SOUND[MIDDLE:]])], 0),
        ([np.append(SOUND, HUM), np.append(SOUND, -HUM)], None),  # in the pause alone, 60 dB below
    ],
)
def test_of_channels_that_cancel_out_the_loudest_is_used(channels: list[np.ndarray], loudest: int | None) -> None:
    sound, _, remarks = decode_native(wav(np.stack(channels, 1), "FLOAT"))
    wanted = np.mean(channels, 0) if loudest is None else channels[loudest]
    np.testing.assert_allclose(sound, wanted, atol=1e-6)
    assert remarks == (() if loudest is None else (CANCELLED,))


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("full_scale", [2**15, 2**23, 2**31])
def test_float_samples_in_the_range_of_integers_keep_their_sound(subtype: str, full_scale: int) -> None:
    sound, _, remarks = decode_native(wav(SOUND.astype(np.float64) * full_scale, subtype))
    np.testing.assert_allclose(sound, SOUND, atol=1e-6)
    assert remarks == (f"float samples in the range of integers: divided by {full_scale}",)


@pytest.mark.parametrize("peak", [1.2, 2, 7.9, 8.1, 100, 40_000, 3e5, 1e7])
def test_float_samples_beyond_full_scale_are_neither_clipped_nor_a_few_steps(peak: float) -> None:
    """Be that scale of floats or of integers."""
    sound = SOUND / abs(SOUND).max()
    decoded = decode_native(wav(sound * peak, "FLOAT"))
    np.testing.assert_allclose(decoded.sound, sound, atol=1e-6)
    assert decoded.remarks == ("samples beyond full scale: divided by their peak",)


def test_so_is_what_a_codec_makes_of_it() -> None:
    file = io.BytesIO()
    soundfile.write(file, 2 * SOUND / abs(SOUND).max(), SAMPLE_RATE, format="OGG")
    decoded = decode_native(file.getvalue())
    assert abs(decoded.sound).max() == 1
    assert decoded.remarks == ("samples beyond full scale: divided by their peak",)


@pytest.mark.parametrize(("full_scale", "level"), [(2**15, 0.01), (2**23, 0.1), (2**31, 0.1)])
def test_integers_of_a_quiet_recording_keep_its_level(full_scale: int, level: float) -> None:
    sound = level * SOUND / abs(SOUND).max()
    decoded = decode_native(wav(np.rint(sound * full_scale), "FLOAT"))
    np.testing.assert_allclose(decoded.sound, sound, atol=2e-5)
    assert decoded.remarks == (f"float samples in the range of integers: divided by {full_scale}",)


@pytest.mark.parametrize("full_scale", [1, 2**15])
def test_single_peaks_over_full_scale_are_left_to_be_clipped(full_scale: int) -> None:
    sound = 0.9 * SOUND / abs(SOUND).max()
    sound[100] = 1.5
    decoded = decode_native(wav(sound * full_scale, "FLOAT"))
    np.testing.assert_allclose(decoded.sound, sound, atol=1e-6)
    assert len(decoded.remarks) == (full_scale > 1)


def test_samples_far_over_any_integer_are_refused() -> None:
    for audio in (SOUND * 1e30, np.stack([SOUND * 1e30, SOUND], 1)):
        with pytest.raises(AudioError, match=r"float samples of up to .*e\+29, where 1 is full scale"):
            decode(wav(audio, "DOUBLE"))


def test_a_header_without_a_length_is_remarked_on() -> None:
    data = bytearray(wav(SOUND, "PCM_16"))
    data[40:44] = b"\xff" * 4
    for audio in (bytes(data), flac_without_length()):
        assert decode_native(audio).remarks == ("header without a length: assumed to be whole",)
