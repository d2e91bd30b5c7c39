"""Whatever the container, half a recording is not taken for a whole one, nor the first of several for all."""

import io
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sharding.audio.codec import SAMPLE_RATE, decode, decode_native, probe
from sharding.errors import AudioError

TAKEN = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "OGG", "FLAC", "MP3", "HTK"}
LEFT_OUT = {"RAW", "SD2"}  # have no header, or need a second file
UNREADABLE = {("AIFF", "DWVW_16"), ("AIFF", "DWVW_24")}  # libsndfile itself does not read what it has written
ID3V2 = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 0]) + bytes(128)
ID3V1 = b"TAG" + bytes(125)
APE_TAG = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0x8000_0000) + bytes(8)
TAIL_LEFT_OUT, UNTOLD = (
    "data after the end that the header declares: left out",
    "header without a length: assumed to be whole",
)


def make_audio(container: str, subtype: str | None = None, seconds: float = 1.0) -> bytes:
    """A swelling tone over noise, at the first rate and number of channels that the container takes; else empty."""
    for rate, channels in ((SAMPLE_RATE, 1), (8_000, 1), (44_100, 2)):
        time = np.arange(round(seconds * rate)) / rate
        sound = 0.4 * np.sin(2764 * time) * np.sin(3 * time) + np.random.default_rng(0).normal(0, 0.02, len(time))
        file = io.BytesIO()
        try:
            soundfile.write(file, np.repeat(sound[:, None], channels, 1), rate, format=container, subtype=subtype)
            soundfile.info(io.BytesIO(file.getvalue()))
        except soundfile.LibsndfileError:
            continue
        return file.getvalue()
    return b""


WHOLE = {container: make_audio(container, seconds=0.1) for container in TAKEN}


def seconds_of(data: bytes) -> float:
    return len(decode(data)[0]) / SAMPLE_RATE


@pytest.mark.parametrize("container", sorted(set(soundfile.available_formats()) - LEFT_OUT))
def test_a_part_of_a_file_is_never_kept_as_the_whole(container: str) -> None:
    """In every codec of it; whole files are decoded whole where their container can be proved, else refused by name."""
    for subtype in soundfile.available_subtypes(container):
        data = make_audio(container, subtype)
        for share in (0.1, 0.5, 0.97):
            with pytest.raises(AudioError):
                decode(data[: int(share * len(data))])
        if container not in TAKEN:
            with pytest.raises(
                AudioError, match=f"{container} file: nothing in it shows .*; convert it" if data else ""
            ):
                decode(data)
        elif data and (container, subtype) not in UNREADABLE:
            assert seconds_of(data) == pytest.approx(1, abs=0.1), (container, subtype)


@pytest.mark.parametrize(
    ("container", "name", "offset", "value"),
    [
        ("WAV", b"data", 4, struct.pack("<I", 0xFFFF_FFFF)),  # ffmpeg
        ("WAV", b"data", 4, struct.pack("<I", 0x7FFF_F000)),  # SoX
        ("AIFF", b"SSND", 4, struct.pack(">I", 0x7F00_0008)),  # SoX
        ("AU", b".snd", 8, struct.pack(">I", 0xFFFF_FFFF)),
        ("W64", b"data", 16, struct.pack("<q", -1)),
    ],
)
def test_a_file_from_a_pipe_that_did_not_know_its_length_is_read(
    container: str, name: bytes, offset: int, value: bytes
) -> None:
    data = bytearray(make_audio(container))
    place = data.index(name) + offset
    data[place : place + len(value)] = value
    assert seconds_of(bytes(data)) == 1


def outcome(data: bytes) -> tuple[float, tuple[str, ...]] | None:
    """Its seconds, as decoded and as its header is read, and the remarks; None if it is refused.

    In a thread that Ctrl-C does not reach plain FLAC is decoded by libFLAC, else by libsndfile: both must agree.
    """
    found = []
    for attempt in (decode_native, lambda data: LOADER.submit(decode_native, data).result()):
        try:
            decoded = attempt(data)
        except AudioError:
            found.append(None)
        else:
            assert probe(io.BytesIO(data)).samples == pytest.approx(len(decoded.sound), abs=1)
            found.append((len(decoded.sound) / SAMPLE_RATE, decoded.remarks))
    assert found[0] == found[1]
    return found[0]


LOADER = ThreadPoolExecutor(1, "libflac")


def as_a_build_does(data: bytes) -> None:
    probe(io.BytesIO(data))
    decode(data)


@pytest.mark.parametrize("container", sorted(TAKEN))
def test_no_length_of_a_file_is_wrong_without_a_word(container: str) -> None:
    """Joined files are refused, whatever stands between them; what else stands behind the sound is no sound."""
    data, other = make_audio(container), make_audio("WAV" if container == "FLAC" else "FLAC")
    whole = outcome(data)
    assert whole is not None
    assert whole[0] == pytest.approx(1, abs=0.01)
    assert not whole[1]
    assert outcome(data[: len(data) // 2]) is None
    assert outcome(data[:-10]) is None
    for between in (b"", ID3V1, ID3V2, ID3V1 + ID3V2, bytes(5_000)):
        assert outcome(data + between + data) is None
        assert outcome(data + between + other) is None
    for tail in (bytes(5_000), ID3V1, APE_TAG):
        assert outcome(data + tail) == (None if container == "HTK" else whole)  # which libsndfile refuses


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST"])
def test_sound_behind_the_end_that_a_header_tells_is_remarked_on_and_chunks_are_not(container: str) -> None:
    """A recorder without power leaves its file with the length that it wrote last."""
    data = make_audio(container)
    assert outcome(data + data[-10_000:]) == (1, (TAIL_LEFT_OUT,))
    if (place := max(data.find(b"data"), data.find(b"SSND"))) > 0:  # of two such chunks libsndfile mostly will not hear
        assert outcome(data + data[place:]) in (None, (1, (TAIL_LEFT_OUT,)))
    chunk = {
        "W64": b"levl" + bytes(12) + struct.pack("<q", 64) + bytes(range(200, 240)),
        "AIFF": b"ANNO" + struct.pack(">I", 40) + bytes(range(200, 240)),
        "CAF": b"info" + struct.pack(">q", 40) + bytes(range(200, 240)),
    }.get(container, b"LIST" + struct.pack("<I", 40) + bytes(range(200, 240)))
    assert outcome(data + chunk) == (1, (TAIL_LEFT_OUT,) if container in ("AU", "NIST") else ())


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST"])
def test_what_is_wrong_with_a_length_is_said_also_if_libsndfile_refuses_the_file(container: str) -> None:
    """It calls half of a CAF malformed, and joined WAVs files without a marker."""
    data = make_audio(container)
    for wrong, said in ((data[:-100], "cut off: 100 bytes are missing"), (data * 2, "several recordings in one file")):
        with pytest.raises(AudioError, match=said):
            decode(wrong)
        with pytest.raises(AudioError, match=said):
            as_a_build_does(wrong)


@pytest.mark.parametrize(("container", "offset", "size"), [("WAV", 40, 4), ("AU", 8, 4)])
def test_joined_files_from_a_pipe_are_refused(container: str, offset: int, size: int) -> None:
    data = make_audio(container)
    piped = data[:offset] + b"\xff" * size + data[offset + size :]
    assert outcome(piped) == (1, (UNTOLD,))
    assert outcome(piped + piped) is None


def test_a_flac_may_keep_the_header_of_the_wav_that_it_was() -> None:
    """As `flac --keep-foreign-metadata` does, and a picture may hold anything."""
    data = make_audio("FLAC")
    picture = struct.pack(">II9s20xI", 3, 9, b"image/png", 42) + data[:42]
    for kind, kept in ((2, b"riffRIFF\x24\0\0\0WAVEfmt "), (6, picture)):
        with_it = data[:42] + bytes([kind]) + len(kept).to_bytes(3, "big") + kept + data[42:]
        assert outcome(with_it) == (1, ())


@pytest.mark.parametrize("container", ["WAV", "AIFF", "FLAC", "MP3"])
@pytest.mark.parametrize("tags", [1, 2])
def test_tags_before_the_sound_cost_none_of_it(container: str, tags: int) -> None:
    data = make_audio(container)
    assert np.array_equal(decode(ID3V2 * tags + data)[0], decode(data)[0])


@given(st.data())
def test_a_damaged_header_is_refused_or_read_and_never_anything_else(data: st.DataObject) -> None:
    audio = bytearray(WHOLE[data.draw(st.sampled_from(sorted(TAKEN)))])
    for _ in range(data.draw(st.integers(1, 4))):
        audio[data.draw(st.integers(0, 120))] = data.draw(st.sampled_from([0, 1, 127, 255, 32, 48]))
    with suppress(AudioError):
        decode(bytes(audio))


# --- Ogg ----------------------------------------------------------------------------------------------------------


def pages_of(ogg: bytes) -> list[bytes]:
    return [b"OggS" + page for page in ogg.split(b"OggS")[1:]]


@pytest.fixture(scope="module", params=["VORBIS", "OPUS"])
def pages(request: pytest.FixtureRequest) -> list[bytes]:
    found = pages_of(make_audio("OGG", request.param, seconds=12))
    assert len(found) > 5
    return found


def test_an_ogg_that_ends_with_a_page_that_is_not_the_last_is_cut_off(pages: list[bytes]) -> None:
    assert seconds_of(b"".join(pages)) == pytest.approx(12, abs=0.01)
    for count in range(3, len(pages)):
        with pytest.raises(AudioError, match="cut off: the last Ogg page has no end-of-stream mark"):
            decode(b"".join(pages[:count]))


def test_an_ogg_without_a_page_or_with_a_flipped_byte_is_damaged(pages: list[bytes]) -> None:
    """libsndfile passes over such a page: what comes after moves to an earlier time."""
    for lost in range(3, len(pages) - 1):
        with pytest.raises(AudioError, match=f"damaged: Ogg page {lost} is missing"):
            decode(b"".join(pages[:lost] + pages[lost + 1 :]))
        flipped = bytearray(pages[lost])
        flipped[len(flipped) // 2] ^= 1
        with pytest.raises(AudioError, match="damaged: the checksum of the Ogg page at byte"):
            decode(b"".join([*pages[:lost], flipped, *pages[lost + 1 :]]))
    with pytest.raises(AudioError, match="damaged: there is no Ogg page at byte"):
        decode(b"".join([*pages[:3], bytes(7), *pages[3:]]))


def test_oggs_that_are_joined_are_refused_and_a_tag_at_the_end_is_not(pages: list[bytes]) -> None:
    data = b"".join(pages)
    with pytest.raises(AudioError, match="several recordings joined in one Ogg file"):
        decode(data + data)
    assert np.array_equal(decode(data + ID3V1)[0], decode(data)[0])


# --- MP3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [b"", ID3V1, ID3V2, ID3V1 + ID3V2, bytes(417)])
@pytest.mark.parametrize("before", [b"", ID3V2, ID3V2 * 2])
def test_of_joined_mp3s_the_first_is_not_taken_for_all(before: bytes, between: bytes) -> None:
    part = make_audio("MP3")
    with pytest.raises(AudioError, match=r"MP3 without declared length: 1\.00 s of 2\.\d\d s decode"):
        decode(before + part + between + part)
    assert seconds_of(before + part + ID3V1) == pytest.approx(1, abs=0.01)


def test_what_a_recorder_leaves_behind_an_mp3_is_passed_over_quickly() -> None:
    """Erased flash memory is all ones."""
    part, began = make_audio("MP3"), time.monotonic()
    assert seconds_of(part + b"\xff" * 2**25) == pytest.approx(1, abs=0.01)
    assert time.monotonic() - began < 20  # 70 if each byte is looked at in Python, at 2 µs


def test_an_mp3_of_other_rates_behind_the_first_is_seen_too() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 44_100), 44_100, format="MP3")
    with pytest.raises(AudioError, match="without declared length"):
        decode(make_audio("MP3") + ID3V1 + file.getvalue())


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_an_mp3_without_a_tag_is_taken_whole_and_refused_if_it_is_cut(rate: int) -> None:
    """libsndfile guesses its length, a little too long at some rates."""
    file = io.BytesIO()
    sound = np.random.default_rng(0).normal(0, 0.1, 2 * rate)
    soundfile.write(file, sound, rate, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    tag, *frames = re.split(b"(?=\xff[\xfb\xf3])", file.getvalue()[1:])  # the coder's tag is a frame of its own
    assert b"Info" in tag
    data = b"".join(frames)
    assert seconds_of(data) == pytest.approx(2, abs=0.15)
    with pytest.raises(AudioError, match=r"cut off|without declared length"):
        decode(data[:-20])
