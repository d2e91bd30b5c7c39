"""Run one rank of a training or an evaluation; mistakes are reported before torch is imported."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from sharding.command import WHOLE, Folder, OutFolder, Place, announce, new_app, run, several
from streamtrain.launcher import ANNOUNCED
from streamtrain.startup import configure_threads, env_int, report_errors

if TYPE_CHECKING:
    from streamtrain.config import Config


@Parameter(name="*")
@dataclass(frozen=True)
class TrainOptions:
    """Hold the options of a training."""

    config: Place
    """JSON file with data, model, train, eval and deepspeed, or the name of a packaged one, such as zero2."""
    set: Annotated[list[str], several("SECTION.KEY=VALUE")] = field(default_factory=list)
    """Override settings, at any depth, such as deepspeed.optimizer.params.lr=3e-5; takes several."""
    resume: Annotated[Place, Parameter(metavar="auto|none|FOLDER")] = "auto"
    """auto: resume from the newest checkpoint of train.run_dir, if there is one; none: start over; or the folder of a
    checkpoint."""
    replan: bool = False
    """Resume although the settings of the plan have changed, such as data.batch_seconds: the clips that the epoch has
    left are planned anew, each once."""
    find_batch_seconds: bool = False
    """Only search for the largest data.batch_seconds that this model and these machines hold, and print it."""

    def check(self, ranks: int | None) -> "Config":
        """Return the configuration. Raises StreamtrainError if it, the number of ranks or the shard set has a fault."""
        from sharding.shardset.index import read_index_header
        from sharding.shardset.store import open_store
        from streamtrain.config import load_config
        from streamtrain.data.plan import check_world_size

        config = load_config(self.config, self.set)
        if ranks is not None:
            check_world_size(ranks, config.train.micro_batches_per_step)
        read_index_header(open_store(config.data.shards))
        return config


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateOptions:
    """Hold the options of an evaluation."""

    model: Folder
    """Folder of a trained model, such as RUN/best."""
    out: OutFolder
    """Folder for scorecard.json, scorecard.html and hypotheses.jsonl."""
    shards: Place = "data/shards"
    """Folder or URL of a shard set."""
    split: Literal["valid", "test", "train"] = "valid"
    """Clips to score."""
    batch_seconds: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 40.0
    """Padded seconds per forward: larger is faster and takes more memory."""
    beam: Annotated[int, Field(ge=0), WHOLE, Parameter(metavar="WIDTH")] = 0
    """Sum the paths that spell the same, among so many prefixes; 0: the best path."""
    compare_to: Place | None = None
    """Folder with another model's scorecard on the same clips, to compare this one with."""

    def check(self) -> None:
        """Raise StreamtrainError if there is no such model or no such shard set."""
        from sharding.shardset.index import read_index_header
        from sharding.shardset.store import open_store
        from streamtrain.model.tokenizer import load_vocab

        load_vocab(self.model)
        read_index_header(open_store(self.shards))


def train(options: TrainOptions) -> None:
    """Train as one rank: rank 0 of 1, or the rank of the launcher that started this process."""
    configure_threads()
    _announce(f"training as {options.config} says")
    with report_errors():
        config = options.check(env_int("WORLD_SIZE", 1))

        from streamtrain.distributed import process_group

    with process_group() as world:
        from streamtrain.training.run import find_batch_seconds
        from streamtrain.training.run import train as train_rank

        if options.find_batch_seconds:
            find_batch_seconds(config, world)
        else:
            train_rank(config, world, options.resume, options.replan)


def evaluate(options: EvaluateOptions) -> None:
    """Score as one rank: rank 0 of 1, or the rank of the launcher that started this process."""
    configure_threads()
    _announce(f"scoring {options.model} on split {options.split} of {options.shards}")
    with report_errors():
        options.check()

        from streamtrain.distributed import process_group

    with process_group() as world:
        from streamtrain.eval.evaluate import evaluate_model

        baseline = Path(options.compare_to) if options.compare_to else None
        place = (options.shards, options.split, options.batch_seconds, Path(options.out))
        evaluate_model(str(options.model), *place, world, options.beam, baseline)


def _announce(opening: str) -> None:
    """Announce a command on rank 0, unless the process that started the ranks has done so."""
    if env_int("RANK") == 0 and os.environ.pop(ANNOUNCED, None) is None:
        announce(opening)


def main(command: Callable[..., None], script: str, summary: str | None) -> int:
    """Run a command as `launch/SCRIPT` does and return the exit code."""
    app = new_app(script, summary)
    app.default(command)
    return run(app, [word for word in sys.argv[1:] if not word.startswith("--local_rank=")])  # DeepSpeed adds it
