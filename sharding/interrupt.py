"""Ctrl-C at any moment, also while a command is still being imported: one line, exit code 130, no traceback."""

import os
import signal
from contextlib import suppress
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code


def answer_interrupts() -> None:
    """Have Ctrl-C end this process at once while a module is imported, and raise KeyboardInterrupt otherwise.

    Raised in an import, it would come out of libraries as another error, or not at all.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as a script's background job is
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):
                    os.write(2, b"stopped\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
