"""Decode plain FLAC with libFLAC itself, if the machine has it, in half of the time that libsndfile takes.

It accepts what libsndfile accepts, and returns the same samples: any clip that is odd is left to libsndfile.
One call into Python per frame of a quarter of a second also keeps threads from blocking each other.
"""

import ctypes
import hashlib
import signal
import struct
import threading
import weakref

import numpy as np
import numpy.typing as npt

from sharding.audio.flac import has_usual_blocks

LIBRARIES = ("libFLAC.so.14", "libFLAC.so.12")  # FLAC 1.5 and 1.4
MAX_SAMPLES = 2**20  # 65 s; longer clips, also if only declared so, are left to libsndfile, which needs half the memory
FRAME_HEAD = struct.Struct("=IIIIIIQ")  # of FLAC__Frame: samples, rate, channels, assignment, bits, "sample", position
PLAIN_FRAME = (16_000, 1, 16)  # rate, channels, bits
CONTINUE, ABORT = 0, 1  # results of the callback for a frame
END_OF_STREAM = 4  # a state of the decoder

FrameHead = ctypes.c_char * FRAME_HEAD.size
Address = ctypes.c_size_t
Pointer = ctypes.c_void_p
TakeFrame = ctypes.CFUNCTYPE(ctypes.c_int, Pointer, Pointer, Pointer, Pointer)
TakeHeader = ctypes.CFUNCTYPE(None, Pointer, Pointer, Pointer)
TakeError = ctypes.CFUNCTYPE(None, Pointer, ctypes.c_int, Pointer)


def decode_plain(data: bytes, samples: int) -> npt.NDArray[np.int16] | None:
    """Return the samples of a plain FLAC that declares `samples`, shape (samples,); None if libsndfile should decide.

    It should if there is no libFLAC, in a thread that Ctrl-C may reach, and if anything is not as it should be.
    """
    if library is None or not 0 < samples <= MAX_SAMPLES or not has_usual_blocks(data):
        return None
    if not hasattr(_thread_state, "decoder"):
        _thread_state.decoder = None if _receives_interrupts() else _Decoder(library)
    decoder: _Decoder | None = _thread_state.decoder
    return decoder.decode(data, samples) if decoder else None


def _receives_interrupts() -> bool:
    """Return whether Ctrl-C is raised in this thread: in a callback it would be lost, with a message on the terminal.

    It is raised in the main thread alone, and not in that of a build's worker, which blocks the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class _Decoder:
    """Hold a libFLAC decoder for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._decoder = library.FLAC__stream_decoder_new()
        if not self._decoder:
            raise MemoryError("libFLAC")
        weakref.finalize(self, library.FLAC__stream_decoder_delete, self._decoder)
        # An attribute, because libFLAC holds no reference to them
        self._callbacks = TakeFrame(self._take_frame), TakeHeader(self._take_header), TakeError(self._take_error)
        self._sound = np.empty(0, np.int32)
        self._begin(0)

    def decode(self, data: bytes, samples: int) -> npt.NDArray[np.int16] | None:
        library, decoder = self._library, self._decoder
        self._begin(samples)
        file = _libc.fmemopen(data, len(data), b"r")
        if not file:
            return None
        if library.FLAC__stream_decoder_init_FILE(decoder, file, *self._callbacks, None):
            _libc.fclose(file)
            return None
        try:  # libFLAC owns the file now, and closes it at the end
            library.FLAC__stream_decoder_process_until_end_of_stream(decoder)
            ended = library.FLAC__stream_decoder_get_state(decoder) == END_OF_STREAM
        finally:
            library.FLAC__stream_decoder_finish(decoder)
        if not ended or self._failed or self._headers != 1 or self._position != samples:
            return None
        sound = self._sound[:samples].astype(np.int16)
        # libFLAC silently puts zeros in place of a missing frame; only the header's MD5, if there is one, shows it
        if self._silent and hashlib.md5(sound.tobytes(), usedforsecurity=False).digest() != data[26:42]:
            return None
        return sound

    def _begin(self, samples: int) -> None:
        if samples > len(self._sound):  # else reused: fresh memory costs a tenth of the decoding
            self._sound = np.empty(samples, np.int32)
            self._address = self._sound.ctypes.data
        self._samples = samples
        self._position = self._headers = 0
        self._silent = self._failed = False

    def _take_frame(self, _: int, frame: int, channels: int, __: int) -> int:
        count, *form, _assignment, bits, _kind, position = FRAME_HEAD.unpack_from(FrameHead.from_address(frame))
        start, end, sound = self._position, self._position + count, self._sound
        if position != start or (*form, bits) != PLAIN_FRAME or end > self._samples:
            return ABORT
        ctypes.memmove(self._address + 4 * start, Address.from_address(channels).value, 4 * count)  # channel 0, int32
        self._position = end
        self._silent |= not (sound[start] or sound[end - 1] or sound[start:end].any())
        return CONTINUE

    def _take_header(self, _: int, __: int, ___: int) -> None:
        self._headers += 1  # a second STREAMINFO would change how libsndfile decodes the rest

    def _take_error(self, _: int, __: int, ___: int) -> None:
        self._failed = True


def _load() -> ctypes.CDLL | None:
    if not hasattr(_libc, "fmemopen"):
        return None
    for name in LIBRARIES:
        try:
            opened = ctypes.CDLL(name)
        except OSError:
            continue
        _libc.fmemopen.argtypes, _libc.fmemopen.restype = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p], Pointer
        _libc.fclose.argtypes = [Pointer]
        opened.FLAC__stream_decoder_new.restype = Pointer
        opened.FLAC__stream_decoder_init_FILE.argtypes = [Pointer, Pointer, TakeFrame, TakeHeader, TakeError, Pointer]
        for verb in ("process_until_end_of_stream", "get_state", "finish", "delete"):
            getattr(opened, f"FLAC__stream_decoder_{verb}").argtypes = [Pointer]
        return opened
    return None


_libc = ctypes.CDLL(None)
_thread_state = threading.local()
library = _load()
