"""Who I am among the ranks, the few things ranks tell one another, and how a rank comes up and goes down."""

import ctypes
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from queue import Empty, Queue
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed

from sharding.errors import StreamtrainError
from sharding.interrupt import INTERRUPTED
from sharding.pool import die_with_parent
from streamtrain.startup import env_int, report_error, report_errors

log = logging.getLogger("streamtrain")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PREEMPTED = 128 + signal.SIGTERM  # exit code of a run that was asked to stop, and goes on when started again
RANK_LOST = "look above for what that rank said; the same command goes on from the newest checkpoint"
LOST_HINT = (  # what gloo and NCCL say then
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "timed out waiting",
    "wait timeout after",
    "collective operation timeout",
    "communicator was aborted",
    "ncclremoteerror",
    "remote process exited",
)
BEAT_SEC, SILENT_SEC = 5.0, 60.0  # of rank 0, while the others wait for it
LATE_SEC = 600.0  # that rank 0 may come later than another to work of its own
LET_OTHERS_READ_SEC = 1.0


class PreemptedError(StreamtrainError):
    """Raised on all ranks at the same step, where one of them was asked to stop."""

    exit_code = PREEMPTED


class LostStepError(StreamtrainError):
    """Raised on one rank that was asked to stop while its data hang: others wait in this step, so nothing is saved."""


class Preemption:
    """From now on SIGTERM, once or often, only sets `asked`, and so do Ctrl-C and the end of the `deepspeed` command.

    That command dies of a SIGTERM without a word to the launcher that it has started, which would train on. A second
    Ctrl-C is answered as before.
    """

    def __init__(self) -> None:
        self._asked = False
        self.exit_code = PREEMPTED
        self._launcher = psutil.Process(os.getppid())
        self._command = _command_of(self._launcher)
        signal.signal(signal.SIGTERM, self._ask)
        self._interrupted = signal.getsignal(signal.SIGINT)
        if self._interrupted is not signal.SIG_IGN:  # as a script's background job has it
            signal.signal(signal.SIGINT, self._ask_once)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _ask_once(self, *_: object) -> None:
        self._asked, self.exit_code = True, INTERRUPTED
        signal.signal(signal.SIGINT, self._interrupted)
        if env_int("RANK") == 0:
            with suppress(OSError):
                os.write(2, b"\nstopping: this step is saved first; Ctrl-C again ends at once\n")

    @property
    def asked(self) -> bool:
        if self._command is not None and _command_of(self._launcher) != self._command:
            self._asked = True
        return self._asked


def _command_of(launcher: psutil.Process) -> int | None:
    """The process of the `deepspeed` command that waits for this launcher; None where there is none."""
    try:
        if "deepspeed.launcher.launch" not in launcher.cmdline():
            return None
        parent = launcher.parent()
        return parent.pid if parent and any("deepspeed" in part for part in parent.cmdline()) else None
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class World:
    """Passed in, never discovered: `rank` of `size`, and the rank's number on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    neighbours: frozenset[int] = frozenset()  # all ranks of this machine, where they have met

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if on_gpu() else torch.device("cpu")

    def find_neighbours(self) -> "World":
        """Return this rank with its neighbours; all ranks call it together.

        No rank knows them by itself: deepspeed's local rank is rank modulo slots, and machines may differ in slots.
        """
        machine = os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK")  # of deepspeed, of torchrun
        nodes = self.gather(machine or self.rank - self.local_rank)
        return replace(self, neighbours=frozenset(rank for rank, node in enumerate(nodes) if node == nodes[self.rank]))

    def sum(self, counts: Sequence[int]) -> list[int]:
        """Return integer counts summed over the ranks, exactly: one reduction of int64."""
        return [int(total) for total in self._reduce(torch.tensor(counts, dtype=torch.int64)).tolist()]

    def gather_floats(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """The values of every rank, on every rank, shape (ranks, values)."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row[None].numpy()
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(rows, row.to(self.device))
        return torch.stack(rows).cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def on_main(self, work: str) -> Iterator[bool]:
        """Let rank 0 do some work, for as long as it takes; the other ranks wait for its end. True on rank 0.

        In a collective they would give up after ten minutes, so they wait at the store of the process group, where
        rank 0 shows every few seconds that it lives. Raise StreamtrainError on the others if its work failed, or if it
        has been silent for a minute.

            with world.main_alone("save step 20") as mine:
                if mine:
                    …
        """
        if self.size == 1:
            yield True
            return
        store, key = torch.distributed.distributed_c10d._get_default_store(), f"streamtrain/{next(_WORKS)}"
        if not self.main:
            yield False
            _wait_for_main(store, key, work)
            return
        store.add(f"{key}/alive", 1)
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(store, key, done), daemon=True)
        beating.start()
        try:
            yield True
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            time.sleep(LET_OTHERS_READ_SEC)  # at the store that ends with this rank
            raise
        else:
            store.set(key, "")
        finally:
            done.set()
            beating.join()

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()


_WORKS = itertools.count()  # of rank 0 alone: every rank counts them alike


def _beat(store: Any, key: str, done: threading.Event) -> None:
    while not done.wait(BEAT_SEC):
        store.add(f"{key}/alive", 1)


def _wait_for_main(store: Any, key: str, work: str) -> None:
    """Wait until rank 0 has set the key. Raise StreamtrainError if it holds an error, or if rank 0 is silent."""
    seen: Queue[str | Exception | None] = Queue()
    threading.Thread(target=_watch_main, args=(store, key, seen), daemon=True).start()
    heard, limit = time.monotonic(), LATE_SEC
    while True:
        try:
            news = seen.get(timeout=BEAT_SEC)
        except Empty:
            if (silent := time.monotonic() - heard) > limit:
                told = f"rank 0 has been silent for {silent:.0f} s, it was to {work}"
                raise StreamtrainError(told, RANK_LOST) from None
            continue
        if isinstance(news, Exception):
            raise news
        if news is not None:
            break
        heard, limit = time.monotonic(), SILENT_SEC
    if news:
        raise StreamtrainError(f"rank 0 could not {work}: {news.splitlines()[0]}", "look above for all it said")


def _watch_main(store: Any, key: str, seen: "Queue[str | Exception | None]") -> None:
    """Report each beat of rank 0 (None), and what it sets in the end, maybe ""; or the error of a store that is gone.

    In a thread: rank 0 keeps the store, so where rank 0 is frozen no call returns, whatever its time-out.
    """
    beats = 0
    try:
        while True:
            try:
                store.wait([key], timedelta(seconds=BEAT_SEC))
                seen.put(store.get(key).decode())
                return
            except torch.distributed.DistStoreError:  # not yet
                now = store.add(f"{key}/alive", 0)
            if now != beats:
                seen.put(None)
                beats = now
    except Exception as error:  # raised again in the thread that waits
        seen.put(error)


def world_from_environment() -> World:
    """What the launcher (deepspeed or torchrun) says of this process; one rank where there is none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, *local_sizes = map(env_int, names)
    size = max(size, 1)
    return World(rank, size, local_rank, max(local_sizes) or size)


def on_gpu() -> bool:
    """Whether ranks compute on GPUs: where there are some, unless DS_ACCELERATOR=cpu says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


@contextmanager
def process_group() -> Iterator[World]:
    """All around a rank's one function: log, threads, process group; a user's error told once, without a traceback.

    Ends the process.

    Works under the `deepspeed` launcher, under torchrun, and as a plain process of one rank; on GPUs with NCCL, on CPUs
    with gloo and nothing compiled.
    """
    die_with_parent()  # the launcher: ranks that outlive it would train on beside the next run
    world = world_from_environment()
    _quiet_libraries()
    logging.basicConfig(format="%(message)s", level=logging.INFO if world.main else logging.WARNING, force=True)
    try:
        _start_process_group(world)
        yield world
        world.barrier()
    except PreemptedError as stopped:
        if world.main:
            print(stopped, file=sys.stderr, flush=True)
        print(end="", flush=True)
        os._exit(stopped.exit_code)
    except LostStepError as lost:
        print(lost, file=sys.stderr, flush=True)
        os._exit(PREEMPTED)
    except (StreamtrainError, OSError, KeyboardInterrupt):
        with report_errors():
            raise
    except Exception as error:
        if not _lost_a_rank(error):
            traceback.print_exc()
            os._exit(1)  # the interpreter would wait for threads that read ahead, and they may hang
        said = str(error).splitlines()[0].partition(". ")[0]
        report_error(StreamtrainError(f"another rank is gone, or hangs: {said}", RANK_LOST))
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    logging.shutdown()
    print(end="", flush=True)
    print(end="", flush=True, file=sys.stderr)
    os._exit(0)  # as the interpreter ends, threads of its libraries now and then abort a rank that has done all


def _lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because of another rank: gloo and NCCL each say it in words alone."""
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    of_the_line = (torch.distributed.DistStoreError, torch.distributed.DistNetworkError)
    return isinstance(error, of_the_line) or any(word in said for word in LOST_HINT)


def _start_process_group(world: World) -> None:
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # oneDNN keeps a kernel with its memory for every shape it meets, and each batch has a shape of its own:
        # 1.9 GB a rank after 600 steps of the demo at the default of 1,024
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
        # On cores with AMX, its bf16 gradient of a convolution's weights now and then has in it what lies behind the
        # input: where that is no number, a step is lost, and another run loses another one
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(world.local_size, 1)))
        log.info("threads of each rank: %d (OMP_NUM_THREADS sets another number)", torch.get_num_threads())
    else:
        torch.cuda.set_device(world.local_rank)
    if "MASTER_ADDR" not in os.environ:  # started without a launcher
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1",
                       "LOCAL_RANK": "0"}  # fmt: skip
    import deepspeed
    from deepspeed.constants import default_pg_timeout
    from torch.distributed import distributed_c10d

    # DEEPSPEED_TIMEOUT for the groups that DeepSpeed makes too: they would wait as long as torch does, half an hour
    distributed_c10d.default_pg_timeout = default_pg_timeout
    distributed_c10d.default_pg_nccl_timeout = default_pg_timeout  # type: ignore[attr-defined]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # serves inference only, and needs a compiler
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu() else "gloo", verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise StreamtrainError(
            f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            "have all of them started? does another run use that port? this one's own: deepspeed --master_port 29501 …",
        ) from error


def _keep_freed_memory() -> None:
    """Have glibc reuse what a step has freed: given back and asked for anew, each page costs a fault and is zeroed."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _quiet_libraries() -> None:
    """Keep what the libraries say about themselves out of a log that people read."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for name in ("DeepSpeed", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
