"""What libFLAC decodes is what libsndfile decodes, to the bit; and where anything is odd, libsndfile is asked."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.audio import MIN_SAMPLES, decode_native, encode
from sharding.errors import AudioError
from streamtrain import libflac
from streamtrain.libflac import decode_plain

pytestmark = pytest.mark.skipif(libflac._library is None, reason="no libFLAC on this machine: Debian's libflac12")


def speech_like(samples: int, seed: int = 0) -> bytes:
    """Noise whose loudness comes and goes, up to full scale."""
    random = np.random.default_rng(seed)
    loudness = np.sin(np.linspace(0, 9, samples)) ** 2
    return encode((random.normal(0, 0.5, samples) * loudness).astype(np.float32))


LENGTHS = [MIN_SAMPLES, 4_095, 4_096, 4_097, 8_192, 12_289, 100_001]  # libsndfile's frames hold 4,096


@pytest.mark.parametrize("samples", LENGTHS)
def test_it_makes_the_samples_that_libsndfile_makes(samples: int) -> None:
    clip = speech_like(samples)
    sound = decode_plain(clip)
    assert sound is not None
    assert sound.dtype == np.int16
    assert np.array_equal(sound, decode_native(clip)[0])


def test_many_threads_decode_at_once() -> None:
    clips = [speech_like(length, seed) for seed in range(20) for length in LENGTHS]
    with ThreadPoolExecutor(4) as pool:
        sounds = list(pool.map(decode_plain, clips))
    for clip, sound in zip(clips, sounds, strict=True):
        assert sound is not None
        assert np.array_equal(sound, decode_native(clip)[0])


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


@pytest.mark.parametrize(
    "change",
    [
        without_a_frame,
        with_a_frame_twice,
        with_a_frame_of_another,
        with_a_second_header,
        lambda clip: clip[:-1],
        lambda clip: clip + b"a tag at its end",
        lambda clip: clip[:42],
        lambda clip: b"",
        lambda clip: b"RIFF" + clip[4:],
        lambda clip: encode(np.zeros(9_000, np.float32)),
    ],
)
def test_what_is_not_as_it_should_be_is_left_to_libsndfile(change) -> None:  # type: ignore[no-untyped-def]
    assert decode_plain(change(speech_like(20_000))) is None


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_clip_that_libsndfile_takes_is_the_same_or_left_to_it(data: st.DataObject) -> None:
    clip = bytearray(speech_like(9_000))
    for _ in range(data.draw(st.integers(1, 3))):
        clip[data.draw(st.integers(0, len(clip) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    sound = decode_plain(bytes(clip))
    try:
        wanted, _ = decode_native(bytes(clip))
    except AudioError:
        return
    assert sound is None or np.array_equal(sound, wanted)
