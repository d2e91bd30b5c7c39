"""Stream the batches of an epoch plan in its order, read ahead by a few threads; resumable at any step.

On a CPU, threads suffice: libsndfile and the object store release the interpreter's lock while they work. A rank that
feeds a GPU runs this in processes of its own, which loader.py starts.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty
from typing import TypeVar

import numpy as np

from sharding.errors import counted
from sharding.shardset.index import ShardIndex
from sharding.shardset.object_store import BucketStore
from sharding.shardset.sample import Sample
from sharding.shardset.store import Reader, open_store
from streamtrain.config import DataConfig
from streamtrain.data.cache import ShardCache, StreamCounts, read_verified
from streamtrain.data.collate import Batch, collate
from streamtrain.data.patience import Deadline
from streamtrain.data.plan import EpochPlan, Perturbation, ShardSchedule, group_micro_batches, shard_schedule
from streamtrain.distributed import World
from streamtrain.model.vocab import Vocab

BATCHES_AHEAD = 4  # per worker thread
BATCHES_HELD = BATCHES_AHEAD + 2  # in memory per thread: while one loads, its clips as stored, and a copy with noise
LEAVE_SEC = 2.0  # for loads that are in progress but not needed: by then they have ended, or they hang


def identity(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class WorkerShard:
    """Select every `num_workers`-th batch, starting at `number`."""

    number: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class StepBatch:
    """Hold the input of one forward on a rank: a micro-batch, or several merged, and their place in the plan."""

    step: int
    micro_batch_ids: tuple[int, ...]  # among the micro-batches of the step
    last: bool  # of this rank's in the step
    batch: Batch


class ShardStream:
    """Read the batches of one rank from a shard set."""

    def __init__(
        self, index: ShardIndex, store: Reader, vocab: Vocab, normalize: bool, world: World, workers: int = 2
    ) -> None:
        self.index = index
        self.store = store
        self.vocab = vocab
        self.normalize = normalize
        self.world = world
        self.workers = workers
        self.patience = Deadline()
        self._counts = StreamCounts()
        self._lock = threading.Lock()

    def take_counts(self) -> StreamCounts:
        """Return the counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, StreamCounts()
        return counts + self.store.take_counts() if isinstance(self.store, ShardCache) else counts

    def _count(self, counts: StreamCounts) -> None:
        with self._lock:
            self._counts += counts

    def epoch(
        self,
        plan: EpochPlan,
        first_step: int = 0,
        device_batch_seconds: float | None = None,
        finish: Callable[[Batch], Batch] = identity,
        worker: WorkerShard = WorkerShard(),
    ) -> Generator[StepBatch]:
        """Yield this rank's forwards of each step from `first_step` on, `finish` applied in the loading thread.

        A step has M ÷ world size micro-batches per rank, merged up to `device_batch_seconds` (None: not merged).
        `worker` selects a part of the batches. Loading begins at once, before the first batch is asked for.
        """
        return started(self._epoch(plan, first_step, device_batch_seconds, finish, worker))

    def _epoch(
        self,
        plan: EpochPlan,
        first_step: int,
        device_batch_seconds: float | None,
        finish: Callable[[Batch], Batch],
        worker: WorkerShard,
    ) -> Generator[StepBatch | None]:
        tasks = (
            (step, tuple(micro_batch_ids), forward == len(forwards))
            for step in range(first_step, plan.steps)
            for forwards in [group_micro_batches(plan, step, self.world.size, device_batch_seconds)[self.world.rank]]
            for forward, micro_batch_ids in enumerate(forwards, start=1)
        )
        cache = self.store if isinstance(self.store, ShardCache) else None
        if cache:
            cache.set_schedule(self.index, self.schedule(plan))

        def load(task: tuple[int, tuple[int, ...], bool]) -> StepBatch:
            step, micro_batch_ids, last = task
            if cache:
                cache.prefetch_from(step)
            rows, perturbation = plan.micro_batch(step, *micro_batch_ids), plan.perturbation(step, *micro_batch_ids)
            batch = finish(self._load(rows, perturbation))
            self._count(StreamCounts(silent=len(batch.failed) + len(batch.too_dense)))
            return StepBatch(step, micro_batch_ids, last, batch)

        selected = islice(tasks, worker.number, None, worker.num_workers)
        loaded = read_ahead(
            load,
            selected,
            self.workers,
            lambda ready: self._count(StreamCounts(ready=ready)),
            self.patience,
            lambda task: self._name(task[0]),
        )
        try:
            yield None
            yield from loaded
        finally:
            loaded.close()
            if cache:
                cache.stop_prefetching()

    def schedule(self, plan: EpochPlan) -> ShardSchedule:
        """Return the steps at which the ranks of this machine need each shard."""
        local_ranks = {self.world.rank, *self.world.neighbours}
        return shard_schedule(self.index, plan, [int(rank in local_ranks) for rank in range(self.world.size)]).of(1)

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Batch, list[Sample]]]:
        """Yield the given batches of rows, in order, each with its samples."""

        def load(rows: np.ndarray) -> tuple[Batch, list[Sample]]:
            samples = self._read(rows)
            recorded = Perturbation.as_recorded(self.index.samples["samples"][rows].astype(np.int64))
            return collate(samples, recorded, self.vocab, self.normalize), samples

        def name(rows: np.ndarray) -> str:
            return f"rank {self.world.rank}'s batch of {counted(len(rows), 'clip')}"

        return read_ahead(load, iter(batches), self.workers, deadline=self.patience, name=name)

    def _load(self, rows: np.ndarray, perturbation: Perturbation) -> Batch:
        """Read, verify, perturb and pad the clips of these rows, and count that work."""
        started = time.perf_counter()
        samples = self._read(rows)
        read = time.perf_counter()
        batch = collate(samples, perturbation, self.vocab, self.normalize)
        decode_sec = time.perf_counter() - read
        self._count(StreamCounts(batches=1, clips=len(samples), read_sec=read - started, decode_sec=decode_sec))
        return batch

    def _name(self, step: int) -> str:
        return f"rank {self.world.rank}'s batch of step {step + 1} of this epoch"

    def _read(self, rows: np.ndarray) -> list[Sample]:
        """Return the samples of these rows in their order, read shard by shard."""
        samples = dict[int, Sample]()
        shards = self.index.samples["shard"][rows]
        for shard in np.unique(shards).tolist():
            shard_rows = rows[shards == shard]
            shard_samples = read_verified(self.store, self.index, self.index.shards[shard], shard_rows)
            samples.update(zip(shard_rows.tolist(), shard_samples, strict=True))
        return [samples[row] for row in rows.tolist()]


Task = TypeVar("Task")
Item = TypeVar("Item")


def started(items: Generator[Item | None]) -> Generator[Item]:
    """Return a generator that has run to its first yield, of None: it has begun its work, and ends it when closed."""
    next(items)
    return items  # type: ignore[return-value]  # it yields no other None


def read_ahead(
    load: Callable[[Task], Item],
    tasks: Iterator[Task],
    workers: int,
    report_ready: Callable[[int], None] = lambda _: None,
    deadline: Deadline | None = None,
    name: Callable[[Task], str] = str,
) -> Generator[Item]:
    """Yield `load(task)` for every task, in order, loading a bounded number ahead in `workers` threads; 0: none ahead.

    Loading begins at once. `report_ready` gets the number of loaded items each time one is taken. A late item raises at
    `deadline`, with the `name` of its task; without a deadline, the wait has no limit.
    """
    return started(_read_ahead(load, tasks, workers, report_ready, deadline or Deadline(math.inf), name))


def _read_ahead(
    load: Callable[[Task], Item],
    tasks: Iterator[Task],
    workers: int,
    report_ready: Callable[[int], None],
    deadline: Deadline,
    name: Callable[[Task], str],
) -> Generator[Item | None]:
    ahead = workers * BATCHES_AHEAD
    pool = ThreadPoolExecutor(max(workers, 1), "load")  # never in this thread, which must handle signals at once
    pending: deque[tuple[Task, Future[Item]]] = deque()

    def submit(wanted: int) -> None:
        more = islice(tasks, max(wanted - len(pending), 0))
        pending.extend((task, pool.submit(load, task)) for task in more)

    try:
        submit(max(ahead, 1))
        yield None
        while pending:
            report_ready(sum(future.done() for _, future in pending))
            task, future = pending[0]
            item = deadline.wait_for(partial(_result, future), name(task), os.getpid())
            pending.popleft()
            submit(ahead)
            yield item
            submit(1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _, hanging = wait([future for _, future in pending if not future.cancelled()], LEAVE_SEC)
        pool.shutdown(wait=not hanging)


def _result(future: Future[Item], seconds: float) -> Item:
    """Return the result of a future. Raises `queue.Empty` if it is not done within `seconds`."""
    if not wait([future], seconds).done:
        raise Empty
    return future.result()


def open_stream(index: ShardIndex, data: DataConfig, vocab: Vocab, normalize: bool, world: World) -> ShardStream:
    """Return the stream of a rank that trains on the shards of a configuration."""
    store = open_for_reading(index, open_store(data.shards), data.cache_dir, data.cache_gb)
    return ShardStream(index, store, vocab, normalize, world, data.workers)


def open_for_reading(index: ShardIndex, store: Reader, cache_dir: str | None, cache_gb: float) -> Reader:
    """Return the store itself, or, for a bucket with a cache folder, a cache in front of it."""
    if isinstance(store, BucketStore) and cache_dir is not None:
        return ShardCache(store, index, Path(cache_dir), round(cache_gb * 2**30))
    return store
