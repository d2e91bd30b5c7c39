"""Plan and store become batches, in the plan's order, read ahead by a few threads; resumable at any step.

Threads suffice: libsndfile and the object store work outside the interpreter's lock. So there are no worker processes
to start, to hang or to leave shared memory behind.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from sharding.errors import ShardError
from sharding.format import Sample, ShardIndex, read_sample
from sharding.store import Reader
from streamtrain.cache import ShardCache
from streamtrain.collate import Batch, collate
from streamtrain.plan import EpochPlan, numbers_of_rank
from streamtrain.vocab import Vocab
from streamtrain.world import World

BATCHES_AHEAD = 4  # per worker thread
STEPS_AHEAD = 32  # shards of these steps are fetched from a bucket before they are needed


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch and its place in the plan."""

    step: int
    number: int  # among the micro-batches of the step
    batch: Batch


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

    def epoch(self, plan: EpochPlan, first_step: int = 0) -> Iterator[StepBatch]:
        """This rank's micro-batches of every step from `first_step` on: M ÷ world size for each."""
        numbers = numbers_of_rank(self.world.rank, self.world.size, plan.micro_batches_per_step)
        places = ((step, number) for step in range(first_step, plan.steps) for number in numbers)

        def load(place: tuple[int, int]) -> StepBatch:
            step, number = place
            self._announce(plan, step)
            return StepBatch(step, number, self.load(plan.micro_batch(step, number)))

        try:
            yield from read_ahead(load, places, self.workers)
        finally:
            if isinstance(self.store, ShardCache):
                self.store.stop_prefetching()

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Batch, list[Sample]]]:
        """The given batches of rows, in order, with their samples."""

        def load(rows: np.ndarray) -> tuple[Batch, list[Sample]]:
            samples = self._read(rows)
            return self._collate(rows, samples), samples

        return read_ahead(load, iter(batches), self.workers)

    def load(self, rows: np.ndarray) -> Batch:
        """Read, verify, decode and pad the clips of these rows."""
        return self._collate(rows, self._read(rows))

    def _read(self, rows: np.ndarray) -> list[Sample]:
        return [self._read_one(int(row)) for row in rows]

    def _read_one(self, row: int) -> Sample:
        """A verified sample. What spoilt in the cache or on the way is fetched once more before it is an error."""
        try:
            return read_sample(self.store, self.index, row)
        except ShardError:
            if isinstance(self.store, ShardCache):
                self.store.drop(self.index.shards[self.index.samples["shard"][row]].name)
            elif not self.store.remote:
                raise
            return read_sample(self.store, self.index, row)

    def _collate(self, rows: np.ndarray, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.index.samples["samples"][rows].tolist(), self.vocab, self.normalize)

    def _announce(self, plan: EpochPlan, step: int) -> None:
        if isinstance(self.store, ShardCache):
            per_step = plan.micro_batches_per_step
            rows = plan.rows[plan.starts[step * per_step] : plan.starts[min(step + STEPS_AHEAD, plan.steps) * per_step]]
            shards = self.index.samples["shard"][rows]
            _, first = np.unique(shards, return_index=True)
            self.store.prefetch([self.index.shards[shards[i]].name for i in np.sort(first)])


Place = TypeVar("Place")
Item = TypeVar("Item")


def read_ahead(load: Callable[[Place], Item], places: Iterator[Place], workers: int) -> Iterator[Item]:
    """`load` of every place, in order, with a bounded number of them under way in `workers` threads."""
    with ThreadPoolExecutor(workers, "load") as pool:
        pending: deque[Future[Item]] = deque(
            pool.submit(load, place) for place in islice(places, workers * BATCHES_AHEAD)
        )
        try:
            while pending:
                item = pending.popleft().result()
                pending.extend(pool.submit(load, place) for place in islice(places, 1))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def open_for_reading(index: ShardIndex, store: Reader, cache_dir: str | None, cache_gb: float) -> Reader:
    """The store itself, or, for a bucket with a cache folder, a cache in front of it."""
    if store.remote and cache_dir is not None:
        return ShardCache(store, index, Path(cache_dir), round(cache_gb * 2**30))
    return store
