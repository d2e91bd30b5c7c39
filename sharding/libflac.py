"""Plain FLAC decoded by libFLAC itself, where the machine has it: half of the time that libsndfile takes.

It takes what libsndfile takes, and makes the same samples of it: whatever is odd about a clip is left to libsndfile.
One call into Python per frame of a quarter of a second also keeps threads less in each other's way.
"""

import ctypes
import struct
import threading

import numpy as np
import numpy.typing as npt

from sharding.flac import has_usual_blocks

LIBRARIES = ("libFLAC.so.14", "libFLAC.so.12", "libFLAC.14.dylib", "libFLAC.12.dylib")  # FLAC 1.5 and 1.4
FRAME_HEAD = struct.Struct("=IIIIIIQ")  # of FLAC__Frame: samples, rate, channels, assignment, bits, "sample", position
PLAIN_FRAME = (16_000, 1, 16)  # rate, channels, bits
GO_ON, ABORT = 0, 1  # what the callback for a frame answers
END_OF_STREAM = 4  # a state of the decoder

FrameHead = ctypes.c_char * FRAME_HEAD.size
Address = ctypes.c_size_t
Pointer = ctypes.c_void_p
TakeFrame = ctypes.CFUNCTYPE(ctypes.c_int, Pointer, Pointer, Pointer, Pointer)
TakeHeader = ctypes.CFUNCTYPE(None, Pointer, Pointer, Pointer)
TakeError = ctypes.CFUNCTYPE(None, Pointer, ctypes.c_int, Pointer)


def decode_plain(data: bytes, samples: int) -> npt.NDArray[np.int16] | None:
    """The samples of a plain FLAC that says it has so many, shape (samples,); None where libsndfile should judge.

    That is: where there is no libFLAC, and where anything at all is not as it should be.
    """
    if _library is None or not has_usual_blocks(data):
        return None
    if not hasattr(_own, "decoder"):
        _own.decoder = _Decoder(_library)
    decoder: _Decoder = _own.decoder
    return decoder.decode(data, samples)


class _Decoder:
    """A libFLAC decoder, of one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._decoder = library.FLAC__stream_decoder_new()
        # Kept, as libFLAC only borrows them
        self._callbacks = TakeFrame(self._take_frame), TakeHeader(self._take_header), TakeError(self._take_error)
        self._sound = np.empty(0, np.int32)
        self._address = 0
        self._position = 0
        self._headers = 0
        self._failed = False

    def decode(self, data: bytes, samples: int) -> npt.NDArray[np.int16] | None:
        self._sound, self._position = np.empty(samples, np.int32), 0
        self._address = self._sound.ctypes.data
        self._headers, self._failed = 0, False
        library, decoder = self._library, self._decoder
        file = _libc.fmemopen(data, len(data), b"r")  # libFLAC closes it
        if not file or library.FLAC__stream_decoder_init_FILE(decoder, file, *self._callbacks, None):
            return None
        library.FLAC__stream_decoder_process_until_end_of_stream(decoder)
        ended = library.FLAC__stream_decoder_get_state(decoder) == END_OF_STREAM
        library.FLAC__stream_decoder_finish(decoder)
        whole = ended and self._headers == 1 and not self._failed and self._position == samples
        return self._sound.astype(np.int16) if whole else None

    def _take_frame(self, _: int, frame: int, channels: int, __: int) -> int:
        count, rate, channel_count, _, bits, _, position = FRAME_HEAD.unpack_from(FrameHead.from_address(frame))
        start, end, sound = self._position, self._position + count, self._sound
        if position != start or (rate, channel_count, bits) != PLAIN_FRAME or end > len(sound):
            return ABORT
        ctypes.memmove(self._address + 4 * start, Address.from_address(channels).value, 4 * count)
        self._position = end
        # Where a frame is missing libFLAC makes up silence and says nothing, so silence is libsndfile's to judge
        return GO_ON if sound[start] or sound[end - 1] or sound[start:end].any() else ABORT

    def _take_header(self, _: int, __: int, ___: int) -> None:
        self._headers += 1  # a second STREAMINFO would change what libsndfile makes of the rest

    def _take_error(self, _: int, __: int, ___: int) -> None:
        self._failed = True


def _load() -> ctypes.CDLL | None:
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.FLAC__stream_decoder_new.restype = Pointer
        library.FLAC__stream_decoder_init_FILE.argtypes = [
            Pointer, Pointer, TakeFrame, TakeHeader, TakeError, Pointer,
        ]  # fmt: skip
        for verb in ("process_until_end_of_stream", "get_state", "finish"):
            getattr(library, f"FLAC__stream_decoder_{verb}").argtypes = [Pointer]
        return library
    return None


_libc = ctypes.CDLL(None)
_libc.fmemopen.argtypes, _libc.fmemopen.restype = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p], Pointer
_library = _load()
_own = threading.local()
