"""Do what must precede the import of torch: configure threads, note the `deepspeed` command, report errors."""

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.errors import StreamtrainError
from sharding.interrupt import INTERRUPTED
from streamtrain.deepspeed_command import deepspeed_command

LET_RANK_0_SPEAK_SEC = 5.0  # an error shared by all ranks is reported once: the launcher ends the others by then
# Spins of idle threads of torch's OpenMP, GNU's, before they sleep: half a millisecond, not 15. A step of the demo
# takes 2 to 4 s instead of 5 to 17 if a dozen other processes compete for the two cores, and 0.36 s instead of 0.34 if
# none does; a step of wav2vec2-base's size 3.9 s instead of 3.8, less than the spread of its runs. Without any spinning
# it would be 2 s and 0.40 s.
SPINS = "10000"
# New objects between garbage collections. Imports of libraries create millions of objects, all of which stay:
# collecting less often saves one second of four and a half.
USUALLY, SELDOM = gc.get_threshold(), (100_000, 50, 100)


def env_int(name: str, default: int = 0) -> int:
    """Return an integer that the launcher (deepspeed or torchrun) sets in the environment, such as RANK."""
    return int(os.environ.get(name, default))


def configure_threads() -> None:
    """Let idle threads release their cores soon, and compile nothing, unless the user has decided otherwise.

    Torch reads these variables at its import. Nothing is compiled here anyway, but importing DeepSpeed's Muon, which is
    never used, would spend a second or two on importing the compiler. A rank also notes the `deepspeed` command, which
    may end during the imports.
    """
    if "RANK" in os.environ:
        deepspeed_command()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.set_threshold(*SELDOM)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def collect_as_usual() -> None:
    """Collect garbage as often as usual again: called once a model exists, and all slow imports are done."""
    if gc.get_threshold() == SELDOM:
        gc.set_threshold(*USUALLY)


@contextmanager
def report_errors() -> Iterator[None]:
    """End the process at a user's error, reported once and without a traceback."""
    try:
        yield
    except (StreamtrainError, OSError) as error:
        report_error(error)
        os._exit(1)  # other ranks may wait in a collective: no orderly shutdown, the launcher ends them
    except KeyboardInterrupt:
        if env_int("RANK") == 0:
            message = "\nstopped; run the same command again to start over, or resume from the newest checkpoint"
            print(message, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def report_error(error: Exception) -> None:
    """Print an error once: rank 0 prints first, because the launcher then ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # sent by the launcher when rank 0 ends: exit at once
    rank = env_int("RANK")
    if rank:
        time.sleep(LET_RANK_0_SPEAK_SEC)
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    print(end="", flush=True)
