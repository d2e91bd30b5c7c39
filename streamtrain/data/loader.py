"""Batches from processes of their own, for a rank that feeds a GPU.

There a step launches thousands of small kernels, and each launch asks for the interpreter's lock: beside threads that
decode, launching took many times as long. Batches come through pipes rather than shared memory, of which containers
have little and killed processes leave some behind.
"""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from queue import Empty, Queue
from socket import MSG_WAITALL, SHUT_RDWR, socket
from typing import Any

import torch

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.shardset.index import ShardIndex
from sharding.pool import die_with_parent
from streamtrain.data.collate import Batch
from streamtrain.data.patience import Deadline
from streamtrain.data.plan import EpochPlan
from streamtrain.data.dataset import BATCHES_HELD, ShardStream, WorkerShard, StepBatch, StreamCounts, identity

RECEIVED = 2  # batches of each process that wait in this one
HELD_FOR_PROCESS = BATCHES_HELD + 1 + RECEIVED + 1  # in the process, one being sent, those here, one being received
PROCESS_BYTES = 150 * 2**20  # that a process takes beside them, as measured: libraries above all
FOR_THE_DEVICE = ("inputs", "targets", "time_mask", "feature_mask")  # tensors of a batch that go to the GPU
TENSORS = (*FOR_THE_DEVICE, "input_lengths", "target_lengths", "weights")
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # which are the rank's to answer

SECOND_BYTES = 4 * SAMPLE_RATE  # of a padded second in a batch


class LoaderError(StreamtrainError):
    """A process that loads batches is gone."""


@dataclass(frozen=True)
class BatchHeader:
    """What precedes the tensors of a batch, which are sent as they lie in memory: pickled, they would be shared."""

    step: int
    micro_batch_ids: tuple[int, ...]
    last: bool
    keys: tuple[str, ...]
    failed: tuple[str, ...]
    too_dense: tuple[str, ...]
    layout: dict[str, tuple[torch.Size, torch.dtype]]
    counts: StreamCounts  # since the batch before


@dataclass(frozen=True)
class LoaderMemory:
    """Describe what a rank loads ahead: in the host's memory, so many of the largest batches, and bytes beside."""

    batches: float = 0.0
    beside: int = 0

    def at(self, seconds: float) -> float:
        """Return bytes, for a largest batch of so many padded seconds."""
        return self.batches * SECOND_BYTES * seconds + self.beside


NOTHING_AHEAD = LoaderMemory()


def loader_memory(index: ShardIndex, workers: int, in_processes: bool) -> LoaderMemory:
    """Count what waits in the host's memory; if processes load, an evaluation's threads do too, beside."""
    if not in_processes:
        return LoaderMemory(workers * BATCHES_HELD)
    copies = 2 * index.samples.nbytes  # the index and the plan, about, which each process has
    return LoaderMemory(workers * (HELD_FOR_PROCESS + BATCHES_HELD), workers * (PROCESS_BYTES + copies))


class LoaderProcesses(ShardStream):
    """A `ShardStream` whose epochs are loaded by as many processes as it has workers; evaluation still reads here."""

    def __init__(self, make: Callable[[], ShardStream]) -> None:
        here = make()
        super().__init__(here.index, here.store, here.vocab, here.normalize, here.world, here.workers)
        self._make = make
        self._processes: list[LoaderProcess] = []

    def epoch(
        self,
        plan: EpochPlan,
        first_step: int = 0,
        device_batch_seconds: float | None = None,
        finish: Callable[[Batch], Batch] = identity,
        share: WorkerShard = WorkerShard(),  # noqa: B008
    ) -> Iterator[StepBatch]:
        """As a `ShardStream`'s; all of it must survive pickling. Batches lie in pinned memory where there is a GPU."""
        count = max(self.workers, 1)
        pinned = self.world.device.type == "cuda"
        finished = False
        try:
            if not self._processes:
                self._processes = [LoaderProcess(self._make, pinned) for _ in range(count)]
            for number, process in enumerate(self._processes):
                process.begin(plan, first_step, device_batch_seconds, finish, WorkerShard(number, count))
            step = first_step
            for number, process in cycle(enumerate(self._processes, start=1)):
                what = f"{self._name(step)} (loading process {number} of {count})"
                arrived = process.next(self.patience, what)
                if arrived is None:  # whoever would have had the next batch is the first to end
                    others = (other for other in self._processes if other is not process)
                    finished = all(other.next(self.patience, what) is None for other in others)
                    return
                item, counts = arrived
                with self._lock:
                    summed = zip(astuple(self._counts), astuple(counts), strict=True)
                    self._counts = StreamCounts(*(before + more for before, more in summed))
                step = item.step + item.last
                yield item
        finally:
            if not finished:  # what they have under way nobody wants
                for process in self._processes:
                    process.kill()
                self._processes = []


class LoaderProcess:
    """One process, and the thread here that takes what it sends."""

    def __init__(self, make: Callable[[], ShardStream], pinned: bool) -> None:
        self._make: Callable[[], ShardStream] | None = make  # what the process is not yet told
        self._pinned = pinned
        self._arrived: Queue[tuple[StepBatch, StreamCounts] | Exception | None] = Queue(RECEIVED)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, until the process ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        weakref.finalize(self, self._process.kill)  # at exit, too, where multiprocessing would wait for it
        theirs.close()  # so that its end is seen here
        self._receiver: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def begin(self, *request: object) -> None:
        self._receiver = threading.Thread(target=self._receive_all, args=request, daemon=True)
        self._receiver.start()

    def next(self, patience: Deadline, what: str) -> tuple[StepBatch, StreamCounts] | None:
        """Return the next batch and what it took, or None at the epoch's end."""
        item = patience.wait_for(lambda seconds: self._arrived.get(timeout=seconds), what, self.pid or 0)
        if isinstance(item, Exception):
            raise item
        return item

    def kill(self) -> None:
        """End the process and the thread, whatever they wait for."""
        self._process.kill()
        with suppress(OSError), socket(fileno=os.dup(self._connection.fileno())) as stream:
            stream.shutdown(SHUT_RDWR)  # a process that hangs in the kernel keeps its end open
        while self._receiver is not None and self._receiver.is_alive():
            with suppress(Empty):
                self._arrived.get(timeout=0.05)

    def _receive_all(self, *request: object) -> None:
        """Send the request and receive its batches: in this thread, as a process that hangs may never read it whole."""
        try:
            with suppress(OSError):  # it is gone: why, it has said, or its end says so
                if self._make is not None:
                    self._connection.send(self._make)
                    self._make = None
                self._connection.send(request)
            while (item := self._receive()) is not None:
                self._arrived.put(item)
        except Exception as error:  # raised again where the batches are wanted
            self._arrived.put(error)
        else:
            self._arrived.put(None)

    def _receive(self) -> tuple[StepBatch, StreamCounts] | None:
        try:
            head: BatchHeader | Exception | None = self._connection.recv()
            if isinstance(head, BatchHeader):
                batch = self._receive_batch(head)
        except (EOFError, OSError) as error:
            raise LoaderError(
                "a process that loads this rank's batches is gone", "killed for want of memory? lower data.workers"
            ) from error
        if isinstance(head, Exception):
            raise head
        return None if head is None else (StepBatch(head.step, head.micro_batch_ids, head.last, batch), head.counts)

    def _receive_batch(self, head: BatchHeader) -> Batch:
        tensors: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in head.layout.items():
            tensors[name] = torch.empty(shape, dtype=dtype, pin_memory=self._pinned and name in FOR_THE_DEVICE)
            _read_into(self._connection, tensors[name])
        return Batch(keys=head.keys, failed=head.failed, too_dense=head.too_dense, **tensors)


def _serve(connection: Connection) -> None:
    """What another process runs: its share of one epoch after another, until nobody is there any more."""
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        stream: ShardStream = _next_from(connection)()
        stream.workers = 1
        while True:
            for item in stream.epoch(*_next_from(connection)):
                _send(connection, item, stream.take_counts())
            connection.send(None)
    except Exception as error:  # raised again where the batches are wanted
        with suppress(OSError):
            connection.send(error)


def _next_from(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise SystemExit(0) from None  # nobody wants anything any more


def _send(connection: Connection, item: StepBatch, counts: StreamCounts) -> None:
    batch = item.batch
    tensors = {name: tensor.contiguous() for name in TENSORS if (tensor := getattr(batch, name)) is not None}
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    try:
        head = BatchHeader(item.step, item.micro_batch_ids, item.last, batch.keys, batch.failed, batch.too_dense, layout, counts)
        connection.send(head)
        for tensor in tensors.values():
            left = _bytes_of(tensor)
            while left:
                left = left[os.write(connection.fileno(), left) :]
    except OSError:
        raise SystemExit(0) from None


def _read_into(connection: Connection, tensor: torch.Tensor) -> None:
    left = _bytes_of(tensor)
    with socket(fileno=os.dup(connection.fileno())) as stream:
        while left:  # one call for all, each would ask for the lock anew; a signal that stops us cuts it short
            read = stream.recv_into(left, len(left), MSG_WAITALL)
            if not read:
                raise EOFError
            left = left[read:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().reshape(-1).view("uint8"))  # type: ignore[arg-type]
