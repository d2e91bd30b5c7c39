"""What is settled before torch is imported: how threads wait, which rank this is, errors told once and in words."""

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.errors import StreamtrainError
from sharding.interrupt import INTERRUPTED

LET_RANK_0_SPEAK_SEC = 5.0  # an error that all ranks share is told once: the launcher ends the others by then
# Threads of torch's OpenMP, GNU's, look so many times for work before they sleep: half a millisecond, rather than 15.
# A step of the demo takes 2 to 4 s rather than 5 to 17 if a dozen other processes want the two cores, and 0.36 s rather
# than 0.34 if none does; one of wav2vec2-base's size 3.9 s rather than 3.8, less than its runs differ by. Threads that
# never look would take 2 s and 0.40 s.
SPINS = "10000"
# Python looks for garbage after so many new objects. Libraries make millions as they are imported, all of which stay:
# looking less often saves a second of four and a half.
USUALLY, SELDOM = gc.get_threshold(), (100_000, 50, 100)


def env_int(name: str, default: int = 0) -> int:
    """Return what the launcher (deepspeed or torchrun) says of this process in a variable, such as RANK."""
    return int(os.environ.get(name, default))


def configure_threads() -> None:
    """Have idle threads give their cores to others soon, and nothing compiled, unless the user has decided otherwise.

    Torch reads this as it is imported. Nothing here is compiled anyhow, but DeepSpeed's Muon, which is not trained
    with, would have a second or two spent on importing the compiler.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.set_threshold(*SELDOM)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def collect_as_usual() -> None:
    """Look for garbage as often as ever: called when a model is there, and with it all that takes long to import."""
    if gc.get_threshold() == SELDOM:
        gc.set_threshold(*USUALLY)


@contextmanager
def report_errors() -> Iterator[None]:
    """End the process at a user's error, told once and without a traceback."""
    try:
        yield
    except (StreamtrainError, OSError) as error:
        report_error(error)
        os._exit(1)  # other ranks may wait in a collective: no orderly goodbye, the launcher ends them
    except KeyboardInterrupt:
        if env_int("RANK") == 0:
            said = "\nstopped; the same command begins again, or goes on from the newest checkpoint"
            print(said, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def report_error(error: Exception) -> None:
    """Print an error in words, once: rank 0's first, for the launcher ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of the launcher, at rank 0's end: no question any longer
    rank = env_int("RANK")
    if rank:
        time.sleep(LET_RANK_0_SPEAK_SEC)
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    print(end="", flush=True)
