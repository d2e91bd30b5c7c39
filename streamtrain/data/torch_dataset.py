"""Serve an epoch plan as a torch IterableDataset, for training loops that are not ours."""

from collections.abc import Iterator, Sequence

from torch.utils.data import IterableDataset, get_worker_info

from streamtrain.data.collate import Batch
from streamtrain.data.dataset import ShardStream, WorkerShard
from streamtrain.data.plan import EpochPlan, PlanSettings, check_world_size, plan_epoch
from streamtrain.data.shard_set import ShardSet
from streamtrain.distributed import World
from streamtrain.model.vocab import Vocab, vocab_of


class ShardDataset(IterableDataset[Batch]):
    """Iterate over the training batches of an epoch: each labelled clip once, under 1 % padding.

    Args:
        shards: As `open_shards` returns it.
        batch_seconds: Maximum of a batch, s: clips × longest.
        seed: Determines the order of every epoch.
        rank: This process among `world_size` that share an epoch; each gets equally many batches.
        world_size: Number of such processes.
        speed_factors: Each clip is played at a random one of them.
        vocab: Ids of the symbols (default: those of the shard set's track).
        normalize: Give each clip zero mean and unit variance, as models with `do_normalize` need it.

    Raises:
        PlanError: If a clip is longer than `batch_seconds`.

    Each `Batch` has inputs (B, samples) float32 at 16 kHz, input_lengths (B,), targets (B, symbols) and target_lengths
    (B,); a short epoch has empty batches. Any `DataLoader(dataset, batch_size=None, num_workers=N)` can share the work.

    Example:
        >>> dataset = ShardDataset(open_shards("data/shards"), batch_seconds=160)
        >>> for epoch in range(3):
        ...     dataset.set_epoch(epoch)
        ...     for batch in DataLoader(dataset, batch_size=None, num_workers=4): ...
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_seconds: float,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        speed_factors: Sequence[float] = (),
        vocab: Vocab | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self._settings = PlanSettings(batch_seconds, world_size, seed=seed, speed_factors=tuple(speed_factors))
        check_world_size(world_size, self._settings.micro_batches_per_step)
        world, vocab = World(rank, world_size), vocab or vocab_of(shards.index.track)
        self._stream = ShardStream(shards.index, shards.store, vocab, normalize, world)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, with another order of the clips."""
        self._plan: EpochPlan = plan_epoch(self._stream.index, self._settings, epoch)

    def __len__(self) -> int:
        return self._plan.steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = WorkerShard(info.id, info.num_workers) if info else WorkerShard()
        return (step.batch for step in self._stream.epoch(self._plan, worker=worker))
