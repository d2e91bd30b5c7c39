"""Handle Ctrl-C at any moment, also during imports: one line, exit code 130, no traceback."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType

INTERRUPTED = 128 + signal.SIGINT  # exit code


def handle_interrupts() -> None:
    """Make Ctrl-C end this process at once during an import, and raise KeyboardInterrupt otherwise.

    Libraries may turn a KeyboardInterrupt raised in an import into another error, or suppress it. An uncaught one,
    which may occur between any two lines of a command, ends the process in the same way.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in background jobs of scripts
        signal.signal(signal.SIGINT, _handle_sigint)
    sys.excepthook = _handle_uncaught


def _handle_sigint(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _stop()
        frame = frame.f_back
    raise KeyboardInterrupt


def _handle_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        with suppress(Exception, KeyboardInterrupt):  # stdout may be closed, or its disk full
            print(end="", flush=True)
        _stop()
    sys.__excepthook__(kind, error, traceback)


def _stop() -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
