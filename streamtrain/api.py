"""Build, plan, train and evaluate from Python. Each function is what the command of its name runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharding.shardset.index import check_presence
from streamtrain.config import Config
from streamtrain.data.plan import EpochPlan, PlanSettings, plan_epoch
from streamtrain.data.shard_set import ShardSet

if TYPE_CHECKING:
    from sharding.build.pipeline import BuildResult
    from streamtrain.eval.scorecard import Evaluation
    from streamtrain.infer.recogniser import Recogniser
    from streamtrain.run_status import RunResult


def build(sources: Sequence[str | Path], out: str | Path, **settings: Any) -> "BuildResult":
    """Build a shard set from corpora.

    Args:
        sources: Folders, or transcripts files.
        out: Folder or URL of the shard set.
        **settings: Options of the command, such as `max_duration=25` (s), `track="word"`, `workers=8`, `append=True`.

    Returns:
        The index, the summary, and the share of rejected clips.

    Raises:
        StreamtrainError: If the sources cannot be read, or another build is writing there.

    Example:
        >>> build(["data/raw/a"], "data/shards", max_duration=25).rejected
    """
    from sharding.build.pipeline import BuildConfig, RunOptions
    from sharding.build.pipeline import build as build_shards

    run = {name: settings.pop(name) for name in ("workers", "append", "scheduler") if name in settings}
    return build_shards([Path(source) for source in sources], str(out), BuildConfig(**settings), RunOptions(**run))


def plan(shards: ShardSet, config: Config, epoch: int = 0) -> EpochPlan:
    """Plan an epoch: which clips form which micro-batch of which step.

    Example:
        >>> plan(shards, load_config("configs/zero2.json")).steps
    """
    return plan_epoch(shards.index, PlanSettings.of(config), epoch)


def train(config: Config, resume: str = "auto", replan: bool = False) -> "RunResult":
    """Train in this process, as one rank or as a rank of the launcher that started it, and return how the run ended.

    Args:
        config: As `load_config` returns it.
        resume: "auto", "none", or the folder of a checkpoint.
        replan: Accept changed batching settings at a resume.

    Raises:
        StreamtrainError: If the configuration, the data or a resume has a fault.

    Example:
        >>> train(load_config("configs/demo.json", ["train.max_steps=10"])).best_cer
    """
    from streamtrain.distributed import join_group
    from streamtrain.run_status import read_result
    from streamtrain.training.run import train as train_rank

    train_rank(config, join_group(), resume, replan)
    return read_result(Path(config.train.run_dir))


def evaluate(
    model: "Recogniser", shards: ShardSet, split: str = "valid", batch_seconds: float = 40.0, beam: int = 0
) -> "Evaluation":
    """Score a model on each clip of a split, once.

    Args:
        model: As `load_model` returns it.
        shards: As `open_shards` returns it.
        split: "valid" or "train".
        batch_seconds: Padded seconds per forward.
        beam: Width of the prefix beam search; 0: the best path.

    Returns:
        Integer counts of all clips (`total`), `cer`, `wer` (word track) and `clips` with their hypotheses.

    Raises:
        StreamtrainError: If the model is of another track, or shards are missing.

    Example:
        >>> evaluate(load_model("runs/zero2/best"), open_shards("data/shards")).cer
    """
    from streamtrain.data.dataset import ShardStream
    from streamtrain.distributed import World
    from streamtrain.eval.evaluate import evaluate as evaluate_stream

    check_presence(shards.store, shards.index)
    world = World()
    stream = ShardStream(shards.index, shards.store, model.network.vocab, model.network.normalize, world)
    return evaluate_stream(model.network, stream, split, batch_seconds, world, beam=beam)
