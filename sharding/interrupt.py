"""Ctrl-C at any moment, also while a command is still being imported: one line, exit code 130, no traceback."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType

INTERRUPTED = 128 + signal.SIGINT  # exit code


def handle_interrupts() -> None:
    """Have Ctrl-C end this process at once while a module is imported, and raise KeyboardInterrupt otherwise.

    Raised in an import, it would come out of libraries as another error, or not at all. Where nobody catches it, which
    may be between any two lines of a command, it ends the process in the same way.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as a script's background job is
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _uncaught


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _stop()
        frame = frame.f_back
    raise KeyboardInterrupt


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        with suppress(Exception, KeyboardInterrupt):  # it may be closed, or full
            print(end="", flush=True)
        _stop()
    sys.__excepthook__(kind, error, traceback)


def _stop() -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
