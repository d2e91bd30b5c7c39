"""Load batches in separate processes, for a rank that feeds a GPU.

There a step launches thousands of small kernels, and each launch acquires the interpreter's lock: beside threads that
decode, launching took many times as long. Batches are sent through pipes rather than shared memory: containers have
little of it, and killed processes leave some behind.
"""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from queue import Empty, Queue
from socket import MSG_WAITALL, SHUT_RDWR, socket
from typing import Any

import torch

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.pool import die_with_parent
from sharding.shardset.index import ShardIndex
from streamtrain.data.cache import StreamCounts
from streamtrain.data.collate import DEVICE_TENSORS, Batch
from streamtrain.data.dataset import BATCHES_HELD, ShardStream, StepBatch, WorkerShard, identity, started
from streamtrain.data.patience import Deadline
from streamtrain.data.plan import EpochPlan
from streamtrain.data.planner import many_clips

RECEIVE_AHEAD = 2  # batches of each process that wait in the rank's own process
HELD_PER_PROCESS = BATCHES_HELD + 1 + RECEIVE_AHEAD + 1  # loaded, one being sent, those received, one being received
PROCESS_BYTES = 150 * 2**20  # that a process takes beside its batches, as measured: mostly libraries
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the rank handles these, its processes ignore them
SECOND_BYTES = 4 * SAMPLE_RATE  # of a padded second in a batch


class LoaderError(StreamtrainError):
    """Report a data-loading process that exited."""


@dataclass(frozen=True)
class LoaderMemory:
    """Describe the host memory of a rank's read-ahead: a number of largest batches, and bytes beside them."""

    batches: float = 0.0
    beside: int = 0

    def at(self, seconds: float) -> float:
        """Return the bytes, if the largest batch has this many padded seconds."""
        return self.batches * SECOND_BYTES * seconds + self.beside


NOTHING_AHEAD = LoaderMemory()


def loader_memory(index: ShardIndex, workers: int, in_processes: bool) -> LoaderMemory:
    """Return the host memory of the read-ahead; with processes, including that of the threads of an evaluation."""
    if not in_processes:
        return LoaderMemory(workers * BATCHES_HELD)
    shared = len(index.samples) >= many_clips()
    copies = 0 if shared else 2 * index.samples.nbytes  # approximately: of a small index and its plan
    return LoaderMemory(workers * (HELD_PER_PROCESS + BATCHES_HELD), workers * (PROCESS_BYTES + copies))


class LoaderProcesses(ShardStream):
    """Read epochs as a `ShardStream` in one process per worker; evaluation still reads in this process."""

    def __init__(self, make: Callable[[], ShardStream]) -> None:
        local = make()
        super().__init__(local.index, local.store, local.vocab, local.normalize, local.world, local.workers)
        self._make = make
        self._processes: list[LoaderProcess] = []

    def epoch(
        self,
        plan: EpochPlan,
        first_step: int = 0,
        device_batch_seconds: float | None = None,
        finish: Callable[[Batch], Batch] = identity,
        worker: WorkerShard = WorkerShard(),  # noqa: B008
    ) -> Generator[StepBatch]:
        """Yield what `ShardStream.epoch` does, in pinned memory if there is a GPU. All arguments must be picklable."""
        return started(self._epoch(plan, first_step, device_batch_seconds, finish, worker))

    def _epoch(
        self,
        plan: EpochPlan,
        first_step: int,
        device_batch_seconds: float | None,
        finish: Callable[[Batch], Batch],
        worker: WorkerShard,
    ) -> Generator[StepBatch | None]:
        count = max(self.workers, 1)
        pinned = self.world.device.type == "cuda"
        finished = False
        try:
            if not self._processes:
                self._processes = [LoaderProcess(self._make, pinned) for _ in range(count)]
            for number, process in enumerate(self._processes):
                process.begin(plan, first_step, device_batch_seconds, finish, WorkerShard(number, count))
            yield None
            step = first_step
            for number, process in cycle(enumerate(self._processes, start=1)):
                what = f"{self._name(step)} (loading process {number} of {count})"
                received = process.next(self.patience, what)
                if received is None:  # batches come in turn, so the process that is next in turn ends first
                    others = (other for other in self._processes if other is not process)
                    finished = all(other.next(self.patience, what) is None for other in others)
                    return
                item, counts = received
                self._count(counts)
                step = item.step + item.last
                yield item
        finally:
            if not finished:  # the batches in progress are not needed
                for process in self._processes:
                    process.kill()
                self._processes = []


class LoaderProcess:
    """Run one loading process, and a thread of this process that receives its batches."""

    def __init__(self, make: Callable[[], ShardStream], pinned: bool) -> None:
        self._make: Callable[[], ShardStream] | None = make  # None once it is sent to the process
        self._pinned = pinned
        self._received: Queue[tuple[StepBatch, StreamCounts] | Exception | None] = Queue(RECEIVE_AHEAD)
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end,), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, until the process ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        weakref.finalize(self, self._process.kill)  # also at exit, when multiprocessing would wait for the process
        child_end.close()  # so that this process gets EOF if the other exits
        self._receiver: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def begin(self, *request: object) -> None:
        self._receiver = threading.Thread(target=self._receive_all, args=(self._receiver, *request), daemon=True)
        self._receiver.start()

    def next(self, deadline: Deadline, what: str) -> tuple[StepBatch, StreamCounts] | None:
        """Return the next batch and the counts of its loading, or None at the epoch's end."""
        item = deadline.wait_for(lambda seconds: self._received.get(timeout=seconds), what, self.pid or 0)
        if isinstance(item, Exception):
            raise item
        return item

    def kill(self) -> None:
        """End the process and the thread, even if they are blocked."""
        self._process.kill()
        with suppress(OSError), socket(fileno=os.dup(self._connection.fileno())) as stream:
            stream.shutdown(SHUT_RDWR)  # a process that hangs in the kernel keeps its end open
        while self._receiver is not None and self._receiver.is_alive():
            with suppress(Empty):
                self._received.get(timeout=0.05)

    def _receive_all(self, before: threading.Thread | None, *request: object) -> None:
        """Send the request and receive its batches; in a thread, as a hanging process may never read all of it.

        The thread of the request `before` may still receive the end of its epoch.
        """
        if before is not None:
            before.join()
        try:
            with suppress(OSError):  # the process exited: its error was sent before, or _receive raises for the EOF
                if self._make is not None:
                    self._connection.send(self._make)
                    self._make = None
                self._connection.send(request)
            while (item := self._receive()) is not None:
                self._received.put(item)
        except Exception as error:  # raised again by `next`
            self._received.put(error)
        else:
            self._received.put(None)

    def _receive(self) -> tuple[StepBatch, StreamCounts] | None:
        try:
            received: tuple[StepBatch, StreamCounts] | Exception | None = self._connection.recv()
            if isinstance(received, tuple):
                item, counts = received
                received = replace(item, batch=self._receive_tensors(item.batch)), counts
        except (EOFError, OSError) as error:
            raise LoaderError(
                "a data-loading process of this rank exited", "if it was killed for lack of memory, lower data.workers"
            ) from error
        if isinstance(received, Exception):
            raise received
        return received

    def _receive_tensors(self, batch: Batch) -> Batch:
        tensors: dict[str, Any] = {}
        for name, meta in _tensors_of(batch).items():
            pinned = self._pinned and name in DEVICE_TENSORS
            tensors[name] = torch.empty(meta.shape, dtype=meta.dtype, pin_memory=pinned)
            _read_into(self._connection, tensors[name])
        return replace(batch, **tensors)


def _serve(connection: Connection) -> None:
    """Load this process's part of one epoch after another, until the rank closes the connection."""
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        stream: ShardStream = connection.recv()()
        stream.workers = 1
        while True:
            for item in stream.epoch(*connection.recv()):
                _send(connection, item, stream.take_counts())
            connection.send(None)
    except Exception as error:  # raised again by `LoaderProcess.next`
        with suppress(OSError):  # the rank has ended, or needs no more batches
            connection.send(error)


def _send(connection: Connection, item: StepBatch, counts: StreamCounts) -> None:
    """Send a batch with empty tensors, then their bytes: pickling would send them through shared memory."""
    tensors = _tensors_of(item.batch)
    described = replace(item.batch, **{name: tensor.to("meta") for name, tensor in tensors.items()})
    connection.send((replace(item, batch=described), counts))
    for tensor in tensors.values():
        left = _bytes_of(tensor.contiguous())
        while left:
            left = left[os.write(connection.fileno(), left) :]


def _tensors_of(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def _read_into(connection: Connection, tensor: torch.Tensor) -> None:
    left = _bytes_of(tensor)
    with socket(fileno=os.dup(connection.fileno())) as stream:
        while left:  # one call for all bytes, as each call takes the lock again; a signal that stops us cuts it short
            read = stream.recv_into(left, len(left), MSG_WAITALL)
            if not read:
                raise EOFError
            left = left[read:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().reshape(-1).view("uint8"))  # type: ignore[arg-type]
