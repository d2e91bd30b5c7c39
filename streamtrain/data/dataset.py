"""Plan and store become batches, in the plan's order, read ahead by a few threads; resumable at any step.

Threads suffice: libsndfile and the object store work outside the interpreter's lock. So there are no worker processes
to start, to hang or to leave shared memory behind.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty
from typing import TypeVar

import numpy as np

from sharding.shardset.object_store import BucketStore
from sharding.shardset.index import ShardIndex
from sharding.shardset.sample import Sample
from sharding.shardset.store import Reader, open_store
from streamtrain.data.cache import ShardCache, read_verified
from streamtrain.data.collate import Batch, collate
from streamtrain.data.patience import Deadline
from streamtrain.data.plan import EpochPlan, Perturbation, ShardSchedule, shard_schedule, group_micro_batches
from streamtrain.model.vocab import Vocab
from streamtrain.distributed import World

BATCHES_AHEAD = 4  # per worker thread
BATCHES_HELD = BATCHES_AHEAD + 2  # of memory for each: while it loads one, its clips as stored, and a copy with noise
LEAVE_SEC = 2.0  # for loads under way that nobody wants any more: by then they end, or they hang


def identity(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class WorkerShard:
    """Every so-manyth batch, from one on."""

    number: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class StepBatch:
    """What a rank computes in one forward: a micro-batch, or several merged, and their place in the plan."""

    step: int
    micro_batch_ids: tuple[int, ...]  # among the micro-batches of the step
    last: bool  # of this rank's in the step
    batch: Batch


@dataclass
class StreamCounts:
    """What a rank's stream has done since it was last asked. Times are of all its threads together."""

    batches: float = 0
    clips: float = 0
    silent: float = 0  # clips that are trained as silence
    ready: float = 0  # batches that were there already when one was taken, summed over those taken
    read_sec: float = 0
    decode_sec: float = 0
    hits: float = 0  # of shards that were to be read from, those in the cache
    misses: float = 0
    bytes: float = 0  # fetched into the cache
    retries: float = 0  # requests that were repeated, and shards that came or stood wrong


class ShardStream:
    """The batches of one rank."""

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
        """What was done since the last call."""
        with self._lock:
            counts, self._counts = self._counts, StreamCounts()
        if isinstance(self.store, ShardCache):
            done = self.store.take_counts()
            counts.hits += done.hits
            counts.misses += done.misses
            counts.bytes += done.bytes
            counts.retries += done.retries
        return counts

    def epoch(
        self,
        plan: EpochPlan,
        first_step: int = 0,
        device_batch_seconds: float | None = None,
        finish: Callable[[Batch], Batch] = identity,
        share: WorkerShard = WorkerShard(),
    ) -> Iterator[StepBatch]:
        """What this rank runs in every step from `first_step` on, each batch finished where it was loaded.

        M ÷ world size micro-batches a step, merged up to `device_batch_seconds`; None: as they are. Of a share, only
        its batches.
        """
        places = (
            (step, tuple(numbers), number_of == len(forwards))
            for step in range(first_step, plan.steps)
            for forwards in [group_micro_batches(plan, step, self.world.size, device_batch_seconds)[self.world.rank]]
            for number_of, numbers in enumerate(forwards, start=1)
        )
        cache = self.store if isinstance(self.store, ShardCache) else None
        if cache:
            cache.set_schedule(self.index, self.schedule(plan))

        def load(place: tuple[int, tuple[int, ...], bool]) -> StepBatch:
            step, numbers, last = place
            if cache:
                cache.prefetch_from(step)
            batch = finish(self.load(plan.micro_batch(step, *numbers), plan.perturbation(step, *numbers)))
            with self._lock:
                self._counts.silent += len(batch.failed) + len(batch.too_dense)
            return StepBatch(step, numbers, last, batch)

        try:
            mine = islice(places, share.number, None, share.num_workers)
            yield from read_ahead(
                load, mine, self.workers, self._count_ready, self.patience, lambda place: self._name(place[0])
            )
        finally:
            if cache:
                cache.stop_prefetching()

    def schedule(self, plan: EpochPlan) -> ShardSchedule:
        """Find when the ranks of this machine need which shard."""
        here = {self.world.rank, *self.world.neighbours}
        return shard_schedule(self.index, plan, [int(rank in here) for rank in range(self.world.size)]).of(1)

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Batch, list[Sample]]]:
        """The given batches of rows, in order, with their samples."""

        def load(rows: np.ndarray) -> tuple[Batch, list[Sample]]:
            samples = self._read(rows)
            return self._collate(samples, self._as_recorded(rows)), samples

        def name(rows: np.ndarray) -> str:
            return f"rank {self.world.rank}'s batch of {len(rows)} clips"

        return read_ahead(load, iter(batches), self.workers, patience=self.patience, name=name)

    def load(self, rows: np.ndarray, perturbation: Perturbation | None = None) -> Batch:
        """Read, verify, decode and pad the clips of these rows, to be heard so, or else as recorded."""
        started = time.perf_counter()
        samples = self._read(rows)
        read = time.perf_counter()
        batch = self._collate(samples, perturbation or self._as_recorded(rows))
        with self._lock:
            self._counts.batches += 1
            self._counts.clips += len(samples)
            self._counts.read_sec += read - started
            self._counts.decode_sec += time.perf_counter() - read
        return batch

    def _name(self, step: int) -> str:
        return f"rank {self.world.rank}'s batch of step {step + 1} of this epoch"

    def _count_ready(self, batches: int) -> None:
        with self._lock:
            self._counts.ready += batches

    def _read(self, rows: np.ndarray) -> list[Sample]:
        """The samples of these rows, shard by shard, and in their order."""
        samples = dict[int, Sample]()
        shards = self.index.samples["shard"][rows]
        for number in np.unique(shards).tolist():
            chosen = rows[shards == number]
            found = read_verified(self.store, self.index, self.index.shards[number], chosen)
            samples.update(zip(chosen.tolist(), found, strict=True))
        return [samples[row] for row in rows.tolist()]

    def _as_recorded(self, rows: np.ndarray) -> Perturbation:
        return Perturbation.as_recorded(self.index.samples["samples"][rows].astype(np.int64))

    def _collate(self, samples: Sequence[Sample], perturbation: Perturbation) -> Batch:
        return collate(samples, perturbation, self.vocab, self.normalize)


Place = TypeVar("Place")
Item = TypeVar("Item")


def read_ahead(
    load: Callable[[Place], Item],
    places: Iterator[Place],
    workers: int,
    tell: Callable[[int], None] = lambda _: None,
    patience: Deadline | None = None,
    name: Callable[[Place], str] = str,
) -> Iterator[Item]:
    """Yield `load` of every place, in order, a bounded number of them under way in `workers` threads; 0: none ahead.

    `tell` is given the number of those that are ready when one is taken. One that does not come is waited for with
    `patience`, and named by its place; by default as long as it takes.
    """
    patience = patience or Deadline(math.inf)
    ahead = workers * BATCHES_AHEAD
    pool = ThreadPoolExecutor(max(workers, 1), "load")  # never in this thread, which signals must reach at once
    pending: deque[tuple[Place, Future[Item]]] = deque()

    def submit(wanted: int) -> None:
        more = islice(places, max(wanted - len(pending), 0))
        pending.extend((place, pool.submit(load, place)) for place in more)

    try:
        submit(max(ahead, 1))
        while pending:
            tell(sum(future.done() for _, future in pending))
            place, future = pending[0]
            item = patience.wait_for(partial(_result, future), name(place), os.getpid())
            pending.popleft()
            submit(ahead)
            yield item
            submit(1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _, hanging = wait([future for _, future in pending if not future.cancelled()], LEAVE_SEC)
        pool.shutdown(wait=not hanging)


def _result(future: Future[Item], seconds: float) -> Item:
    """Return what a future holds. Raises `queue.Empty` if it is not done in so many seconds."""
    if not wait([future], seconds).done:
        raise Empty
    return future.result()


def open_stream(
    index: ShardIndex,
    shards: str,
    cache_dir: str | None,
    cache_gb: float,
    vocab: Vocab,
    normalize: bool,
    world: World,
    workers: int,
) -> ShardStream:
    """The stream of a rank that trains on these shards."""
    return ShardStream(
        index, open_for_reading(index, open_store(shards), cache_dir, cache_gb), vocab, normalize, world, workers
    )


def open_for_reading(index: ShardIndex, store: Reader, cache_dir: str | None, cache_gb: float) -> Reader:
    """The store itself, or, for a bucket with a cache folder, a cache in front of it."""
    if isinstance(store, BucketStore) and cache_dir is not None:
        return ShardCache(store, index, Path(cache_dir), round(cache_gb * 2**30))
    return store
