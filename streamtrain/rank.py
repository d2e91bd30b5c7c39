"""What a rank settles before torch is imported, which takes seconds: its number, and errors told once, in words."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.errors import StreamtrainError

LET_RANK_0_SPEAK_SEC = 5.0  # an error that all ranks share is told once: the launcher ends the others by then
INTERRUPTED = 128 + signal.SIGINT  # exit code


def number_of(name: str, default: int = 0) -> int:
    """Return what the launcher (deepspeed or torchrun) says of this process in a variable, such as RANK."""
    return int(os.environ.get(name, default))


@contextmanager
def errors_told() -> Iterator[None]:
    """End the process at a user's error, told once and without a traceback."""
    try:
        yield
    except (StreamtrainError, OSError) as error:
        tell(error)
        os._exit(1)  # other ranks may wait in a collective: no orderly goodbye, the launcher ends them
    except KeyboardInterrupt:
        if number_of("RANK") == 0:
            said = "\nstopped; the same command begins again, or goes on from the newest checkpoint"
            print(said, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def tell(error: Exception) -> None:
    """Print an error in words, once: rank 0's first, for the launcher ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of the launcher, at rank 0's end: no question any longer
    rank = number_of("RANK")
    if rank:
        time.sleep(LET_RANK_0_SPEAK_SEC)
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
