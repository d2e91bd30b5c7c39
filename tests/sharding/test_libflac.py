"""What libFLAC decodes is what libsndfile decodes, to the bit; and where anything is odd, libsndfile is asked."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.audio import libflac
from sharding.audio.codec import MIN_SAMPLES, decode_native, encode
from sharding.audio.flac import samples_of_plain
from sharding.errors import AudioError

pytestmark = pytest.mark.skipif(libflac.library is None, reason="no libFLAC on this machine: Debian's libflac12")


LOADER = ThreadPoolExecutor(1, "libflac")


def by_libflac(clip: bytes) -> np.ndarray | None:
    """In a thread that Ctrl-C does not reach."""
    samples = samples_of_plain(clip)
    return None if samples is None else LOADER.submit(libflac.decode_plain, clip, samples).result()


def by_libsndfile(clip: bytes) -> np.ndarray | None:
    """In the main thread; None where it refuses the clip."""
    try:
        return decode_native(clip)[0]
    except AudioError:
        return None


def speech_like(samples: int, seed: int = 0) -> bytes:
    """Noise whose loudness comes and goes, up to full scale."""
    random = np.random.default_rng(seed)
    loudness = np.sin(np.linspace(0, 9, samples)) ** 2
    return encode((random.normal(0, 0.5, samples) * loudness).astype(np.float32))


LENGTHS = [MIN_SAMPLES, 4_095, 4_096, 4_097, 8_192, 12_289, 100_001]  # libsndfile's frames hold 4,096


@pytest.mark.parametrize("samples", LENGTHS)
def test_it_makes_the_samples_that_libsndfile_makes(samples: int) -> None:
    clip = speech_like(samples)
    sound = by_libflac(clip)
    assert sound is not None
    assert sound.dtype == np.int16
    assert np.array_equal(sound, by_libsndfile(clip))


def test_where_ctrl_c_may_come_libsndfile_decodes() -> None:
    clip = speech_like(9_000)
    assert libflac.decode_plain(clip, 9_000) is None
    assert by_libflac(clip) is not None


@pytest.mark.parametrize("samples", [9_000, 40_000])
def test_digital_silence_is_taken_where_the_header_vouches_for_it(samples: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    noise[4_096:8_192] = 0
    for clip in (encode(np.zeros(samples, np.float32)), encode(noise)):
        assert np.array_equal(by_libflac(clip), by_libsndfile(clip))
        assert by_libflac(clip[:26] + bytes(16) + clip[42:]) is None


def test_what_is_long_or_says_it_is_is_left_to_libsndfile() -> None:
    """Whatever a header promises, nothing is made ready for it."""
    clip = speech_like(9_000)
    for samples in (2**20 + 1, 2**36 - 1):
        packed = (int.from_bytes(clip[18:26], "big") >> 36 << 36 | samples).to_bytes(8, "big")
        assert by_libflac(clip[:18] + packed + clip[26:]) is None
    assert by_libflac(speech_like(2**20 + 1)) is None


def test_many_threads_decode_at_once() -> None:
    clips = [speech_like(length, seed) for seed in range(20) for length in LENGTHS]
    with ThreadPoolExecutor(4) as pool:
        sounds = list(pool.map(lambda clip: libflac.decode_plain(clip, int(samples_of_plain(clip) or 0)), clips))
    for clip, sound in zip(clips, sounds, strict=True):
        assert sound is not None
        assert np.array_equal(sound, by_libsndfile(clip))


def frames_of(clip: bytes) -> list[int]:
    """Where its frames begin, and a few places that look like it."""
    return [at for at in range(42, len(clip) - 1) if clip[at : at + 2] == b"\xff\xf8"]


def without_a_frame(clip: bytes) -> bytes:
    frames = frames_of(clip)
    return clip[: frames[1]] + clip[frames[2] :]


def with_a_frame_twice(clip: bytes) -> bytes:
    frames = frames_of(clip)
    return clip[: frames[1]] + clip[frames[0] :]


def with_a_frame_of_another(clip: bytes) -> bytes:
    frames, other = frames_of(clip), speech_like(20_000, 5)
    return clip[: frames[1]] + other[frames_of(other)[0] : frames_of(other)[1]] + clip[frames[2] :]


def with_a_second_header(clip: bytes) -> bytes:
    return clip[:4] + bytes([0]) + clip[5:42] + bytes([0]) + clip[5:42] + clip[42:]


def with_other_tags(clip: bytes) -> bytes:
    """Its block of tags says that it holds one more."""
    vendor = int.from_bytes(clip[46:50], "little")
    return clip[: 50 + vendor] + b"\x02" + clip[51 + vendor :]


@pytest.mark.parametrize(
    "change",
    [
        without_a_frame,
        with_a_frame_twice,
        with_a_frame_of_another,
        with_a_second_header,
        with_other_tags,
        lambda clip: clip[:-1],
        lambda clip: clip + b"a tag at its end",
        lambda clip: clip[:42],
        lambda clip: b"",
        lambda clip: b"RIFF" + clip[4:],
    ],
)
def test_what_is_not_as_it_should_be_is_left_to_libsndfile(change) -> None:  # type: ignore[no-untyped-def]
    assert by_libflac(change(speech_like(20_000))) is None


@pytest.mark.parametrize("kind", [2, 5, 6, 7, 126])
def test_blocks_that_are_not_padding_seek_points_or_tags_are_left_to_libsndfile(kind: int) -> None:
    clip = speech_like(9_000)
    assert by_libflac(clip[:42] + bytes([kind, 0, 0, 18]) + bytes(18) + clip[42:]) is None
    for usual in (1, 3):
        with_it = clip[:42] + bytes([usual, 0, 0, 18]) + bytes(18) + clip[42:]
        assert np.array_equal(by_libflac(with_it), by_libsndfile(with_it))


@settings(max_examples=400)
@given(st.data())
def test_of_a_damaged_clip_it_takes_only_what_libsndfile_takes_and_as_the_same_sound(data: st.DataObject) -> None:
    clip = bytearray(speech_like(9_000))
    reach = data.draw(st.sampled_from([100, len(clip)]))  # half of the time in the header
    for _ in range(data.draw(st.integers(1, 3))):
        clip[data.draw(st.integers(0, reach - 1))] ^= 1 << data.draw(st.integers(0, 7))
    sound = by_libflac(bytes(clip))
    assert sound is None or np.array_equal(sound, by_libsndfile(bytes(clip)))
