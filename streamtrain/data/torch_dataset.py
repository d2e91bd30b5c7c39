"""Serve an epoch plan as a torch IterableDataset, for training loops that are not ours."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from sharding.errors import StreamtrainError
from streamtrain.data.collate import Batch
from streamtrain.data.dataset import ShardStream, WorkerShard
from streamtrain.data.plan import EpochPlan, PlanError, PlanSettings, plan_epoch
from streamtrain.data.shard_set import ShardSet, as_shard_set
from streamtrain.data.share import take_share
from streamtrain.distributed import World
from streamtrain.model.vocab import Vocab, vocab_of


class ShardDataset(IterableDataset[Batch]):
    """Iterate over the training batches of an epoch: each labelled clip once, under 1 % padding.

    Args:
        shards: As `open_shards` returns it, or its folder or URL.
        batch_seconds: Maximum of a batch, s: clips × longest.
        seed: Determines the order of every epoch.
        rank: This process among `world_size` that share an epoch; each gets equally many batches.
        world_size: Number of such processes.
        speed_factors: Each clip is played at a random one of them.
        fraction: Share of the training split to iterate over, as `data.fraction`: whole speakers.
        hours: Or its hours, as `data.hours`.
        vocab: Ids of the symbols (default: those of the shard set's labels).
        normalize: Give each clip zero mean and unit variance, as models with `do_normalize` need it.

    Raises:
        StreamtrainError: If a clip is longer than `batch_seconds`, or a forked worker process reads from a bucket.

    Each `Batch` has inputs (B, samples) float32 at 16 kHz, input_lengths (B,), targets (B, symbols), target_lengths
    (B,) and weights (B,). A row of weight 0 is silence, without a loss: a clip that failed to decode, or the only
    row of a batch if there are fewer clips than `world_size`. Threads read ahead; `DataLoader(dataset, batch_size=None,
    num_workers=N)` adds forked processes for shards on disk, and with `multiprocessing_context="spawn"` processes for
    shards anywhere; also with `persistent_workers`.

    Example:
        >>> dataset = ShardDataset(open_shards("data/shards"), batch_seconds=160)
        >>> for epoch in range(3):
        ...     dataset.set_epoch(epoch)
        ...     for batch in DataLoader(dataset, batch_size=None, num_workers=4): ...
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        batch_seconds: float,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        speed_factors: Sequence[float] = (),
        fraction: float = 1.0,
        hours: float | None = None,
        vocab: Vocab | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise PlanError(f"rank is {rank}: from 0 to {world_size - 1} is expected")
        self._settings = PlanSettings(batch_seconds, world_size, seed=seed, speed_factors=tuple(speed_factors))
        shards = as_shard_set(shards)
        index = take_share(shards.index, shards.store, fraction, hours)
        self._shards = ShardSet(shards.url, shards.store, index)
        self._world, self._normalize = World(rank, world_size), normalize
        self._vocab = vocab or vocab_of(self._shards.index.labels)
        self._pid = os.getpid()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # seen by workers
        self._planned: tuple[int, EpochPlan] | None = None
        self._plan()

    def set_epoch(self, epoch: int) -> None:
        """Choose another epoch, with another order of the clips."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._plan().steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        if self._shards.store.remote and os.getpid() != self._pid:  # its connections do not survive a fork
            hint = 'num_workers=0: threads read ahead anyway; or multiprocessing_context="spawn"'
            raise StreamtrainError("a forked worker process cannot read from a bucket", hint)
        worker = WorkerShard(info.id, info.num_workers) if info else WorkerShard()
        shards = self._shards
        stream = ShardStream(shards.index, shards.store, self._vocab, self._normalize, self._world)
        return (step.batch for step in stream.epoch(self._plan(), worker=worker))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_pid": os.getpid()}  # a process that was spawned has connections of its own

    def _plan(self) -> EpochPlan:
        epoch = int(self._epoch)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, plan_epoch(self._shards.index, self._settings, epoch)
        return self._planned[1]
