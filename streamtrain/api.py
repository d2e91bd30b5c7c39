"""Build, plan, train and evaluate from Python. Each function is what the command of its name runs."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sharding.errors import StreamtrainError
from sharding.pool import available_cores
from sharding.shardset.index import check_presence
from streamtrain.config import Config
from streamtrain.data.plan import EpochPlan, PlanSettings, plan_epoch
from streamtrain.data.shard_set import ShardSet, as_shard_set
from streamtrain.data.share import take_share

if TYPE_CHECKING:
    from sharding.build.pipeline import BuildResult
    from streamtrain.eval.scorecard import Evaluation
    from streamtrain.infer.recogniser import Recogniser
    from streamtrain.run_status import RunResult

SET_BY_TRAINING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE")


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    append: bool = False,
    dry_run: bool = False,
    alignments: str | Path | None = None,
    columns: str = "",
    audio_root: str = "",
    follow_links: bool = False,
    labels: Literal["text", "phones"] = "text",
    include_sa: bool = False,
    **settings: Any,
) -> "BuildResult":
    """Build a shard set from corpora. In a script, call it under `if __name__ == "__main__":`, as it starts processes.

    Args:
        sources: Folders, or transcripts files.
        out: Folder or URL of the shard set.
        workers: Processes (default: the cores).
        append: Add clips that `out` lacks.
        dry_run: Check and plan everything, write nothing.
        alignments: Output of `align` on shards of the same sources.
        columns: Columns of a transcripts file with other names: "audio_path=path,text=sentence".
        audio_root: Folder of absolute audio paths.
        follow_links: Also read audio that links lead to outside its source's folder.
        labels, include_sa: Sentences or phones of a corpus with both; also TIMIT's SA sentences.
        **settings: Settings of the bytes, such as `max_duration=25` (s), `profile="text"`, `num_buckets=8`.

    Returns:
        The index, the summary, and the share of rejected clips.

    Raises:
        StreamtrainError: If a setting or a source has a fault, or another build is writing there.

    Example:
        >>> build(["data/raw/a"], "data/shards", max_duration=25).rejected
    """
    from sharding.build import pipeline
    from sharding.segment.evidence import NO_ALIGNMENTS, read_alignments
    from sharding.shardset.build_config import checked
    from sharding.sources.manifest import parse_columns
    from sharding.sources.options import ManifestOptions

    aligned = read_alignments(Path(alignments)) if alignments else NO_ALIGNMENTS
    reading = ManifestOptions(columns=parse_columns(columns), follow_links=follow_links, audio_root=audio_root,
                              labels=labels, include_sa=include_sa)  # fmt: skip
    how = pipeline.RunOptions(_count_workers(sources, workers), reading, dry_run, append, alignments=aligned)
    return pipeline.build([*map(Path, sources)], str(out), checked(settings | {"alignments": aligned.digest}), how)


def _count_workers(sources: Sequence[str | Path], workers: int | None) -> int:
    """Return how many processes build these sources. Raises StreamtrainError if either is not as expected."""
    if isinstance(sources, str | Path) or not sources:
        raise StreamtrainError(f"sources are {sources!r}: a list of folders or files is expected")
    if workers is not None and workers < 1:
        raise StreamtrainError(f"workers is {workers}: at least 1 is expected")
    return workers or available_cores()


def plan(shards: ShardSet | str | Path, config: Config, epoch: int = 0) -> EpochPlan:
    """Plan an epoch: which clips form which micro-batch of which step.

    Args:
        shards: As `open_shards` returns it, or its folder or URL.
        config: As `load_config` returns it; its `data.shards` is not read.
        epoch: Number of the epoch, from 0: each has another order.

    Returns:
        The plan: its `steps`, and of each micro-batch the rows of `shards.index` and the padded samples.

    Raises:
        StreamtrainError: If a clip is longer than `data.batch_seconds`, or there are no labelled clips.

    Example:
        >>> plan(shards, load_config("zero2")).steps
    """
    shards = as_shard_set(shards)
    index = take_share(shards.index, shards.store, config.data.fraction, config.data.hours)
    return plan_epoch(index, PlanSettings.of(config), epoch)


def train(config: Config, resume: str = "auto", replan: bool = False) -> "RunResult":
    """Train in this process, as one rank or as a rank of the launcher that started it.

    In the main thread, SIGTERM and Ctrl-C stop the run once a step is saved; in another thread they act as before.

    Args:
        config: As `load_config` returns it.
        resume: "auto", "none", or the folder of a checkpoint.
        replan: Accept changed batching settings at a resume.

    Returns:
        How the run ended: `step`, `limit` (the setting that ended it), `best_score` (of `eval.select`) and `best_step`.

    Raises:
        StreamtrainError: If the configuration, the data or a resume has a fault, or SIGTERM or Ctrl-C stopped the run.
            The same call then resumes it.

    Example:
        >>> train(load_config("demo", ["train.max_steps=10"])).best_score
    """
    from streamtrain.distributed import join_group
    from streamtrain.run_status import read_result
    from streamtrain.training.run import train as train_rank

    with _signals_and_variables_kept():
        train_rank(config, join_group(), resume, replan)
    return read_result(Path(config.train.run_dir))


@contextmanager
def _signals_and_variables_kept() -> Iterator[None]:
    """Restore the handlers of signals, and the variables that tell a process its rank, after a training."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if in_main_thread}
    variables = {name: os.environ.get(name) for name in SET_BY_TRAINING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def evaluate(
    model: "Recogniser", shards: ShardSet | str | Path, split: str = "valid", batch_seconds: float = 40.0, beam: int = 0
) -> "Evaluation":
    """Score a model on each clip of a split, once, on the model's device.

    Args:
        model: As `load_model` returns it.
        shards: As `open_shards` returns it, or its folder or URL.
        split: "valid", "test" or "train".
        batch_seconds: Padded seconds per forward.
        beam: Width of the prefix beam search; 0: the best path.

    Returns:
        Integer counts of all clips (`total`), `cer`, `wer`, `per`, `loss` and `clips` with their hypotheses.

    Raises:
        StreamtrainError: If the split has no clips, the model writes other labels, or shards are missing.

    Example:
        >>> evaluate(load_model("runs/zero2/best"), open_shards("data/shards")).cer
    """
    from streamtrain.data.dataset import ShardStream
    from streamtrain.distributed import World
    from streamtrain.eval.evaluate import evaluate as evaluate_stream
    from streamtrain.model.labels import take_labels

    shards = as_shard_set(shards)
    check_presence(shards.store, shards.index)
    world = World()
    take_labels(model.network, shards.index.labels)  # before the stream, as it may change the vocabulary
    stream = ShardStream(shards.index, shards.store, model.network.vocab, model.network.normalize, world)
    return evaluate_stream(model.network, stream, split, batch_seconds, world, beam=beam)
