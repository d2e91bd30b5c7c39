"""Provide rank identity, small collectives, and the set-up and shutdown of a rank's process group."""

import atexit
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
import torch
import torch.distributed

from sharding.errors import StreamtrainError
from sharding.interrupt import INTERRUPTED
from sharding.pool import die_with_parent
from streamtrain.deepspeed_command import deepspeed_command
from streamtrain.startup import env_int, report_error, report_errors

log = logging.getLogger("streamtrain")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PREEMPTED = 128 + signal.SIGTERM  # exit code of a run that was asked to stop; started again, it resumes
RANK_LOST = "see that rank's error above; run the same command again to resume from the newest checkpoint"
LOST_RANK_TEXTS = (  # in the errors of gloo and NCCL
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
BEAT_SEC, SILENT_SEC = 5.0, 60.0  # period of rank 0's heartbeat while the others wait, and the silence they accept
LATE_SEC = 600.0  # by which rank 0 may reach its own work later than another rank
LET_OTHERS_READ_SEC = 1.0


class PreemptedError(StreamtrainError):
    """Report that a rank was asked to stop; raised on all ranks at the same step."""

    exit_code = PREEMPTED


class LostStepError(StreamtrainError):
    """Report that one rank was asked to stop while its data hang: others wait in this step, so nothing is saved."""


class Preemption:
    """Turn SIGTERM, Ctrl-C and the end of the `deepspeed` command into the flag `asked`, from now on.

    A second Ctrl-C acts as before, and so does each signal if this is not the main thread.
    """

    def __init__(self) -> None:
        self._asked = False
        self.exit_code = PREEMPTED
        self._command = deepspeed_command()
        if threading.current_thread() is not threading.main_thread():  # which alone handles signals
            return
        signal.signal(signal.SIGTERM, self._ask)
        self._interrupted = signal.getsignal(signal.SIGINT)
        if self._interrupted is not signal.SIG_IGN:  # as in a script's background job
            signal.signal(signal.SIGINT, self._ask_once)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _ask_once(self, *_: object) -> None:
        self._asked, self.exit_code = True, INTERRUPTED
        signal.signal(signal.SIGINT, self._interrupted)
        if env_int("RANK") == 0:
            with suppress(OSError):
                os.write(2, b"\nstopping once this step is saved; press Ctrl-C again to end at once\n")

    @property
    def asked(self) -> bool:
        self._asked = self._asked or self._command.ended
        return self._asked


@dataclass(frozen=True, slots=True)
class World:
    """Identify a rank: `rank` of `size`, and its number on its own machine. Passed in, never discovered."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    neighbours: frozenset[int] = frozenset()  # all ranks of this machine, once they are found

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if on_gpu() else torch.device("cpu")

    def find_neighbours(self) -> "World":
        """Return this rank with its neighbours; all ranks must call it together.

        No rank can derive them alone: deepspeed's local rank is rank modulo slots, and machines may differ in slots.
        """
        machine = os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK")  # set by deepspeed, by torchrun
        nodes = self.gather(machine or self.rank - self.local_rank)
        return replace(self, neighbours=frozenset(rank for rank, node in enumerate(nodes) if node == nodes[self.rank]))

    def sum(self, counts: Sequence[int]) -> list[int]:
        """Return integer counts summed over the ranks, exactly, by one all-reduce of int64."""
        return [int(total) for total in self._reduce(torch.tensor(counts, dtype=torch.int64)).tolist()]

    def gather_floats(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Return the values of every rank, on every rank, shape (ranks, values)."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row[None].numpy()
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(rows, row.to(self.device))
        return torch.stack(rows).cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def on_main(self, work: str) -> Iterator[bool]:
        """Let rank 0 do some work of any duration while the other ranks wait for its end. Yields True on rank 0.

        In a collective they would time out after ten minutes, so they wait at the store of the process group, where
        rank 0 sends a heartbeat every few seconds. Raises StreamtrainError on the others if the work failed, or if
        rank 0 has been silent for a minute.

            with world.on_main("save step 20") as is_main:
                if is_main:
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
        finished = threading.Event()
        heartbeat = threading.Thread(target=_beat, args=(store, key, finished), daemon=True)
        heartbeat.start()
        try:
            yield True
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            time.sleep(LET_OTHERS_READ_SEC)  # from the store, which ends with this rank
            raise
        else:
            store.set(key, "")
        finally:
            finished.set()
            heartbeat.join()

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor.cpu()


_WORKS = itertools.count()  # numbers the calls of on_main; equal on all ranks


def _beat(store: Any, key: str, finished: threading.Event) -> None:
    while not finished.wait(BEAT_SEC):
        store.add(f"{key}/alive", 1)


def _wait_for_main(store: Any, key: str, work: str) -> None:
    """Wait until rank 0 has set the key. Raises StreamtrainError if the key holds an error, or if rank 0 is silent."""
    events: Queue[str | Exception | None] = Queue()
    threading.Thread(target=_watch_main, args=(store, key, events), daemon=True).start()
    last_beat, limit = time.monotonic(), LATE_SEC
    while True:
        try:
            event = events.get(timeout=BEAT_SEC)
        except Empty:
            if (silent := time.monotonic() - last_beat) > limit:
                message = f"rank 0 has been silent for {silent:.0f} s; its work: {work}"
                raise StreamtrainError(message, RANK_LOST) from None
            continue
        if isinstance(event, Exception):
            raise event
        if event is not None:
            break
        last_beat, limit = time.monotonic(), SILENT_SEC
    if event:
        raise StreamtrainError(f"rank 0 could not {work}: {event.splitlines()[0]}", "see its full error above")


def _watch_main(store: Any, key: str, events: "Queue[str | Exception | None]") -> None:
    """Queue None for each beat of rank 0, and finally the value that it sets, maybe "", or the error of a lost store.

    Runs in a thread: rank 0 hosts the store, so if rank 0 is frozen no call returns, whatever its time-out.
    """
    beats = 0
    try:
        while True:
            try:
                store.wait([key], timedelta(seconds=BEAT_SEC))
                events.put(store.get(key).decode())
                return
            except torch.distributed.DistStoreError:  # not set yet
                count = store.add(f"{key}/alive", 0)
            if count != beats:
                events.put(None)
                beats = count
    except Exception as error:  # re-raised in the waiting thread
        events.put(error)


def world_from_environment() -> World:
    """Return the rank that the launcher (deepspeed or torchrun) has set for this process; rank 0 of 1 without one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, *local_sizes = map(env_int, names)
    size = max(size, 1)
    return World(rank, size, local_rank, max(local_sizes) or size)


def on_gpu() -> bool:
    """Return whether ranks compute on GPUs: if there are any, unless DS_ACCELERATOR=cpu forbids it."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def own_device() -> torch.device:
    """Return the GPU with this process's local rank, the first one without a launcher, or the CPU."""
    visible = torch.cuda.device_count()  # some launchers show each rank its own GPU alone
    return World(local_rank=env_int("LOCAL_RANK") % max(visible, 1)).device


def join_group() -> World:
    """Return this process's rank in the group of its launcher, if there is one; the group ends with the process.

    DeepSpeed keeps the groups that it makes, so a second training in one process uses those of the first.
    """
    world = world_from_environment()
    _name_rank()
    if not torch.distributed.is_initialized():
        _start_process_group(world)
        atexit.register(torch.distributed.destroy_process_group)
    return world


@contextmanager
def process_group() -> Iterator[World]:
    """Set up log, threads and process group around a rank's main function, and end the process afterwards.

    A user's error is reported once, without a traceback.

    Works under the `deepspeed` launcher, under torchrun, and as a plain process of one rank; on GPUs with NCCL, on CPUs
    with gloo and nothing compiled.
    """
    die_with_parent()  # ranks that outlive their launcher would train on beside the next run
    world = world_from_environment()
    _quiet_libraries()
    logging.basicConfig(format="%(message)s", force=True)
    log.setLevel(logging.INFO if world.main else logging.WARNING)
    try:
        command = deepspeed_command()
        if command.ended or os.getppid() != command.launcher_pid:  # while this rank imported
            raise PreemptedError("stopped before the first step: what started this rank has ended")
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
        if not _is_rank_loss(error):
            traceback.print_exc()
            os._exit(1)  # the interpreter would wait for read-ahead threads, which may hang
        reason = str(error).splitlines()[0].partition(". ")[0]
        report_error(StreamtrainError(f"a peer rank exited or hangs: {reason}", RANK_LOST))
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    logging.shutdown()
    print(end="", flush=True)
    print(end="", flush=True, file=sys.stderr)
    os._exit(0)  # at interpreter exit, library threads occasionally abort a rank that has finished


def _is_rank_loss(error: Exception) -> bool:
    """Return whether a collective failed because of another rank, which gloo and NCCL report in text alone."""
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    network_errors = (torch.distributed.DistStoreError, torch.distributed.DistNetworkError)
    return isinstance(error, network_errors) or any(part in text for part in LOST_RANK_TEXTS)


def _start_process_group(world: World) -> None:
    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # oneDNN caches a kernel with its memory for every shape, and each batch has its own shape:
        # 1.9 GB per rank after 600 steps of the demo at the default of 1,024
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
        # On cores with AMX, its bf16 gradient of a convolution's weights occasionally includes memory behind the
        # input: if that is not a number, a step is lost, and at another step in another run
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(world.local_size, 1)))
        log.info("threads per rank: %d (set OMP_NUM_THREADS to change it)", torch.get_num_threads())
    else:
        torch.cuda.set_device(world.local_rank)
    _name_rank()
    import deepspeed
    from deepspeed.constants import default_pg_timeout
    from torch.distributed import distributed_c10d

    # Apply DEEPSPEED_TIMEOUT to the groups that DeepSpeed creates too: torch's own default is half an hour
    distributed_c10d.default_pg_timeout = default_pg_timeout
    distributed_c10d.default_pg_nccl_timeout = default_pg_timeout  # type: ignore[attr-defined]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference only, and needs a compiler
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu() else "gloo", verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise StreamtrainError(
            f"the ranks cannot connect at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            "start all of them; if another run uses that port, choose another: `deepspeed --master_port 29501 …`",
        ) from error


def _name_rank() -> None:
    """Set the variables that DeepSpeed reads, if no launcher has: of a rank alone, at a free port."""
    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1",
                       "LOCAL_RANK": "0"}  # fmt: skip


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory: returned to the kernel and requested again, each page costs a fault and zeroing."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _quiet_libraries() -> None:
    """Keep the libraries' messages about themselves out of the log."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for name in ("DeepSpeed", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
