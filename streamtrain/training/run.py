"""Set up a run: lock its folder, check that the ranks agree, build or restore the model, probe the memory."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.files.document import STRICT, Count, DocumentError, parse, read_document
from sharding.files.exclusive import LockedError, exclusive
from sharding.files.writing import explaining, open_lock_file, remove, write_inside
from sharding.shardset.index import ShardIndex, archived_index_name, check_presence, read_index, read_sample
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import Store, open_store
from streamtrain.atomic import recover_replaced
from streamtrain.config import Config
from streamtrain.data.collate import SILENT_SAMPLES, Batch
from streamtrain.data.dataset import open_stream
from streamtrain.data.loader import LoaderProcesses, loader_memory
from streamtrain.data.plan import PLANNER_VERSION, EpochPlan, PlanSettings, plan_epoch, shortest_lengths
from streamtrain.data.planner import Planner, read_shared_index
from streamtrain.data.share import take_share
from streamtrain.distributed import World
from streamtrain.eval.scorecard import metrics_of
from streamtrain.model.checksums import ChecksumError, check_sums
from streamtrain.model.ctc import CTCModel, ctc_sum
from streamtrain.model.hub import needs_hub, why_unreachable
from streamtrain.model.inference import scoring_mode
from streamtrain.model.labels import check_symbols, describe, fit_vocab
from streamtrain.model.pretrained import load_model
from streamtrain.run_status import discard_result, reopened
from streamtrain.training.checkpoint import (
    NAMES,
    Checkpoint,
    RunState,
    delete_later_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_state,
    open_checkpoint,
    read_checkpoint,
    resume_state,
)
from streamtrain.training.environment import add_start, describe_start
from streamtrain.training.memory import Memory, evaluation_shapes, largest_shapes, probe, render
from streamtrain.training.mirror import PART, Mirror
from streamtrain.training.schedule import make_schedule
from streamtrain.training.trainer import Plans, Trainer, TrainError, check_order, is_stopped_early
from streamtrain.training.zero_engine import Engine

log = logging.getLogger("streamtrain")

ORDER_CHECK_LENGTHS = {  # samples of each clip in the batches on which the order of gradients is checked
    "a silent row": [SILENT_SAMPLES],
    "an unpadded batch": [SAMPLE_RATE, SAMPLE_RATE],
    "a padded batch": [SAMPLE_RATE, SAMPLE_RATE // 2],
}
CHECKED_ROWS = 2**16  # of the index, at a time
CHECKED_LABELS = 200  # whose symbols are looked up in a vocabulary that lacks some of the alphabet
STEPS_NAME = "steps.json"  # of each epoch, counted once
LOCK_NAME = ".lock"
LEFT_BY_RUNS = (LOCK_NAME, "checkpoints", "best", "log.csv", "finished.json")  # a run's folder has at least one of them
LOCK_WAIT_SEC = 10.0  # a run that is being stopped still saves, and ranks that were killed need a moment to exit


class _Steps(TypedDict):
    """Describe steps.json."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    key: str  # of the plans
    steps: list[tuple[Count, Count]]  # of each epoch
    checksum: str


_STEPS = TypeAdapter(_Steps)


def train(config: Config, world: World, resume: str = "auto", replan: bool = False) -> None:
    """Train into `train.run_dir`, on all ranks. With `replan`, a resumed epoch may be re-planned by other settings."""
    run, world = Path(config.train.run_dir), world.find_neighbours()
    with _lock_run(run, world):
        store = open_store(config.data.shards)
        index = read_shared_index(store, world)
        config = _with_score(config, index)
        mirror = None
        with world.on_main("restore the run folder from its mirror") as is_main:
            if is_main:
                check_presence(store, index)
                recover_replaced(run / "checkpoints", NAMES)
                recover_replaced(run, "best")
                mirror = _open_mirror(config, run, resume, partial(_check_mirrored, config, index, store, replan))
        found = find_checkpoint(resume, run / "checkpoints")
        checkpoint = open_checkpoint(found) if found else None
        if checkpoint is not None:
            index = _log_growth(_index_of_run(checkpoint, index, store, world), index, store)
        data_identity = index.digest, checkpoint.path.name if checkpoint else ""
        _check_ranks_agree(
            world, json.dumps([config.resume_key, config.eval.split, config.eval.select]), *data_identity
        )
        index = _take_share(index, store, config, world)
        _check_run(run, index, config, checkpoint, resume)
        state = RunState(config.resume_key, index.digest, PLANNER_VERSION)
        if checkpoint is not None:
            state = resume_state(checkpoint, config, index.digest, replan)
        planner = Planner(index, PlanSettings.of(config), world)
        planner.counted = _read_steps(run, planner.key)
        plans = Plans(planner, config, state)
        _check_ranks_agree(world, plans.epoch(state.epoch).hash)
        engine = _start_engine(config, index, checkpoint, plans.total_steps, world)
        with world.on_main("look up the labels' symbols") as is_main:
            if is_main:
                _check_symbols(engine.model, index, store)
        if checkpoint is not None:
            log.info("resumed at step %d from %s", state.step, found)
            if state.config != checkpoint.state.config:
                log.info("re-planned: %d of %d steps are left", plans.total_steps - state.step, plans.total_steps)
        state = _keep_scores(state, config, run, world)
        _probe_unless_done(config, index, plans, state, engine)
        start = describe_start(world, state.step, engine.model)
        with world.on_main("prepare the run folder") as is_main:
            if is_main:
                _prepare(run, config, index, found, resume, mirror)
                if planner.counted:
                    write_inside(run / STEPS_NAME, json.dumps(_steps_document(planner.key, planner.counted)))
                add_start(run, start)
        model = engine.model
        make = partial(open_stream, index, config.data, model.vocab, model.normalize, world)
        stream = LoaderProcesses(make) if _loads_in_processes(config, world) else make()
        Trainer(config, world, engine, stream, plans, state, mirror, checkpoint.state if checkpoint else None).run()


def _with_score(config: Config, index: ShardIndex) -> Config:
    """Return the configuration with the score that `eval.select=auto` stands for."""
    if config.eval.select != "auto":
        return config
    return config.model_copy(update={"eval": config.eval.model_copy(update={"select": index.labels.metric})})


def _read_steps(run: Path, key: str) -> dict[int, int]:
    """Return the steps of epochs that an earlier start has counted; {} if they were of another plan."""
    try:
        document = parse(read_document(run / STEPS_NAME), _STEPS)
    except (OSError, DocumentError):
        return {}
    steps = dict(document["steps"])
    return steps if document == _steps_document(key, steps) else {}


def _steps_document(key: str, steps: Mapping[int, int]) -> dict[str, Any]:
    pairs = sorted(steps.items())
    return {"key": key, "steps": pairs, "checksum": xxhash.xxh3_64_hexdigest(repr((key, pairs)).encode())}


def _keep_scores(state: RunState, config: Config, run: Path, world: World) -> RunState:
    """Return the state for `eval.split` and `eval.select`, without its best score if that is of others.

    The score is dropped too if best/ is missing.
    """
    pairs = [
        ("split", state.split or config.eval.split, config.eval.split),
        ("select", state.select, config.eval.select),
    ]
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    for name, was, now in differ if state.best_score is not None else ():
        log.info("eval.%s was %r, is %r: the best score is reset", name, was, now)
    if not world.gather((run / "best").is_dir())[0] or differ:  # resumed into a new run folder, maybe
        state = replace(state, best_score=None, best_step=None, evaluated=-1, evaluations_since_best=0)
    return replace(state, split=config.eval.split, select=config.eval.select)


def _probe_unless_done(config: Config, index: ShardIndex, plans: Plans, state: RunState, engine: Engine) -> None:
    """Log why no step is left, if so; otherwise probe the memory, if `train.probe`."""
    run = Path(config.train.run_dir)
    if state.step == plans.total_steps:
        done = f"all {state.step} steps are done, by {plans.limit}"
        log.info("%s: %s; raise that with --replan, or use --resume none", run, done)
    elif is_stopped_early(state, config.train.patience):
        count = state.evaluations_since_best
        log.info("%s: no better score in %d evaluations; raise train.patience to continue", run, count)
    elif config.train.probe:
        whole = plan_epoch(index, PlanSettings.of(config), state.epoch) if state.completed else plans.epoch(state.epoch)
        log.info("%s", _probe(engine, whole, index, config)[0])


def _prepare(
    run: Path, config: Config, index: ShardIndex, found: Path | None, resume: str, mirror: Mirror | None
) -> None:
    """Delete checkpoints that the run does not continue from, here and in the mirror, and write the configuration."""
    discard_result(run)
    if resume == "none":
        remove(run / "checkpoints")
        if mirror is not None:
            mirror.clear()
    elif found is not None and found.resolve().parent == (run / "checkpoints").resolve():
        chosen = run / "checkpoints" / found.resolve().name
        delete_later_checkpoints(chosen)
        if mirror is not None:
            mirror.enqueue(chosen)  # otherwise a later checkpoint would be restored from the mirror
    write_inside(run / "config.json", json.dumps(config.model_dump(), indent=1))
    write_inside(run / "trained_on.json", json.dumps(_describe(index, config.data.shards), indent=1))


def _check_frames(model: CTCModel, index: ShardIndex, speed_factors: Sequence[float]) -> None:
    """Raise TrainError if the model makes fewer frames of a training clip than its label has symbols.

    The build checks this for wav2vec2's strides only. The loss of such a clip is infinite, and its step is lost.
    """
    if int(model.frame_counts(torch.tensor(SILENT_SAMPLES))) < 1:
        raise TrainError(
            f"the model makes no frame of {SILENT_SAMPLES / SAMPLE_RATE:g} s: its kernels and strides are too large",
            "use a model with smaller ones (model.scratch: conv_kernel, conv_stride)",
        )
    rows, lacking = index.split("train"), 0
    most, worst, worst_frames = 0, -1, 0  # symbols beyond the frames of the clip that lacks most, and that clip
    for start in range(0, len(rows), CHECKED_ROWS):  # a part at a time: ten million take 0.6 GB
        clips = index.samples[rows[start : start + CHECKED_ROWS]]
        frames = model.frame_counts(torch.from_numpy(shortest_lengths(clips, speed_factors))).numpy()
        missing = clips["label_length"].astype(np.int64) - frames
        lacking += int((missing > 0).sum())
        place = int(missing.argmax())
        if missing[place] > most:
            most, worst, worst_frames = int(missing[place]), int(rows[start + place]), max(int(frames[place]), 0)
    if lacking:
        clip = index.samples[worst]
        raise TrainError(
            f"{lacking:,} of {len(rows):,} training clips have more symbols than frames (this model makes "
            f"{SAMPLE_RATE / model.frame_samples:g} a second): a clip of {index.shards[clip['shard']].name} (row "
            f"{worst} of the index) has {clip['label_length']} symbols and {worst_frames} frames",
            "use a model with smaller strides (model.scratch: conv_stride)"
            + (", or data.speed_factors of at most 1" if max(speed_factors, default=1) > 1 else ""),
        )


def _check_symbols(model: CTCModel, index: ShardIndex, store: Store) -> None:
    """Raise TrainError if more than 5 % of the symbols of the labels have no token in the model's vocabulary.

    The model was chosen by the alphabet alone if the index does not count its symbols: then labels are read.
    """
    rows = index.split("train")
    if index.labels.counts or not fit_vocab(model.vocab, index.labels).lacking:
        return
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), CHECKED_LABELS)).astype(int))]
    told = check_symbols(model.vocab, [read_sample(store, index, row).text for row in chosen.tolist()])
    if told is not None:
        raise TrainError(f"{store.url}: {told}", "--set model.vocab=new trains a new head for the labels' symbols")


def _describe(index: ShardIndex, shards: str) -> dict[str, object]:
    """Return what a model card reports about the data."""
    rows = index.split("train")
    hours = float(index.samples["samples"][rows].sum(dtype=np.int64)) / SAMPLE_RATE / 3600
    rejected = index.notes.get("validation", {}).get("rejected", 0)
    whole = sum(shard.seconds for shard in index.shards if shard.split == "train") / 3600
    return {"shards": shards, "index": index.digest, "clips": len(rows), "hours": round(hours, 3),
            "of_hours": round(whole, 3), "labels": describe(index.labels), "rejected": rejected}  # fmt: skip


def find_batch_seconds(config: Config, world: World) -> None:
    """Print the largest `data.batch_seconds` that fits the memory of every rank, forward and backward."""
    store = open_store(config.data.shards)
    index = _take_share(read_index(store), store, config, world)
    plan = plan_epoch(index, PlanSettings.of(config), 0)
    engine = _start_engine(config, index, None, plan.steps, world)
    summary, memory = _probe(engine, plan, index, config)
    largest = int(min(memory.largest for memory in world.gather(memory)))
    if world.main:
        print(summary)
        print(f"data.batch_seconds={largest} fits")
        if largest * config.train.micro_batches_per_step > plan.padded.sum() / SAMPLE_RATE:
            print("(more than the whole epoch: a step is then limited by the data, not by the memory)")


def _probe(engine: Engine, plan: EpochPlan, index: ShardIndex, config: Config) -> tuple[str, Memory]:
    """Run a plan's largest forwards and backwards beside the optimizer state. Raise ProbeError if they do not fit."""
    engine.make_moments()
    shapes = largest_shapes(plan, int(index.samples["label_length"].max()), config.data.device_batch_seconds)
    loader = loader_memory(index, config.data.workers, _loads_in_processes(config, engine.world))
    step_seconds = plan.padded.max() / SAMPLE_RATE * plan.micro_batches_per_step / engine.world.size  # held together
    loader = replace(loader, batches=loader.batches + step_seconds / max(shape.seconds for shape in shapes))
    memory = probe(lambda batch: _run_unweighted(engine, batch), shapes, engine.world, loader)
    lengths = index.samples["samples"][index.split(config.eval.split)]
    if len(lengths):
        eval_shapes = evaluation_shapes(lengths, config.data.batch_seconds)
        probe(partial(_score_unweighted, engine.scored_copy()), eval_shapes, engine.world)
    return render(memory, shapes, loader), memory


def _loads_in_processes(config: Config, world: World) -> bool:
    return world.device.type == "cuda" and config.data.workers > 0


def _take_share(index: ShardIndex, store: Store, config: Config, world: World) -> ShardIndex:
    """Return the index with the clips that `data.fraction` or `data.hours` leaves, as rank 0 finds them."""
    share = None
    with world.on_main("choose the clips to train on") as is_main:
        if is_main:
            share = take_share(index, store, config.data.fraction, config.data.hours).share
    return replace(index, share=world.gather(share)[0])


def _check_mirrored(config: Config, index: ShardIndex, store: Store, replan: bool, path: Path) -> None:
    """Raise CheckpointError if a checkpoint is not of this run. Only its state is read."""
    checkpoint = read_checkpoint(path)
    resume_state(checkpoint, config, _index_of_run(checkpoint, index, store, World()).digest, replan)


def _open_mirror(config: Config, run: Path, resume: str, check: Callable[[Path], None]) -> Mirror | None:
    """Return the mirror, if one is configured. If it is ahead of this machine, restore the run folder from it."""
    if config.train.mirror is None:
        return None
    mirror = Mirror(open_store(config.train.mirror), run)
    mirror.check_writable()
    if resume != "none":
        fetched = (run / PART).is_dir()  # a kill between the moves of `fetch` leaves best/ and no checkpoint
        _check_best(run, fetched or bool(list_checkpoints(run / "checkpoints")), resume)
        if mirror.check(check) and resume == "auto":
            discard_result(run)
            mirror.fetch()
    return mirror


def _run_unweighted(engine: Engine, batch: Batch) -> None:
    """Run forward and backward on clips of weight 0: all gradients are 0, and no step follows."""
    batch = batch.to(engine.world.device)
    frames = engine.model.frame_counts(batch.input_lengths)
    log_probs = engine.forward(batch.inputs, batch.input_lengths)
    loss = ctc_sum(log_probs, frames, batch.targets, batch.target_lengths, batch.weights, engine.model.vocab.blank)
    engine.backward(loss, last=False)


def _score_unweighted(model: CTCModel, batch: Batch) -> None:
    """Run a forward pass as an evaluation does."""
    with scoring_mode():
        model(batch.inputs.to(model.device), batch.input_lengths)


def _index_of_run(checkpoint: Checkpoint, index: ShardIndex, store: Store, world: World) -> ShardIndex:
    """Return the index that the run began with: the archived one if the shard set has grown since."""
    digest = checkpoint.state.index_digest
    if digest == index.digest or not store.exists(archived_index_name(digest)):
        return index
    return read_shared_index(store, world, archived_index_name(digest))


def _log_growth(used: ShardIndex, newest: ShardIndex, store: Store) -> ShardIndex:
    more, count = len(newest.samples) - len(used.samples), len(used.samples)
    if more:
        log.info("%s has grown by %d samples; this run continues with the %d it began with", store.url, more, count)
    return used


def _start_engine(
    config: Config, index: ShardIndex, checkpoint: Checkpoint | None, total_steps: int, world: World
) -> Engine:
    """Build the model, new or from the checkpoint, under DeepSpeed, and check that gradients arrive in one order."""
    log.info("model: %s", config.model.pretrained or "from scratch")
    _check_hub(config.model.pretrained, world)
    torch.manual_seed(config.train.seed)  # the weights of a new head, or of a model from scratch
    model = load_model(config.model, index.labels)
    _check_frames(model, index, config.data.speed_factors)
    if config.data.gain_db and model.normalize:
        log.info("data.gain_db has no effect on this model, which brings each clip to the same loudness")
    log.info("LayerDrop is off: under ZeRO, all ranks must run the same layers")
    full_state = load_state(checkpoint) if checkpoint else None
    if full_state is not None:
        model.network.load_state_dict(full_state.params)
    schedule = make_schedule(model, config.train, config.peak_rate, total_steps)
    engine = Engine(model.to(world.device), schedule, config.deepspeed, config.train.ema_decay, world)
    if full_state is not None:
        engine.restore(full_state)
    torch.manual_seed(world.rank)  # random draws must not decide which layers run
    orders: dict[str, list[str]] = {}
    for name, lengths in ORDER_CHECK_LENGTHS.items():
        gathered = world.gather(engine.check_gradient_order(lengths))
        orders |= {f"rank {rank}, {name}": order for rank, order in enumerate(gathered)}
        check_order(orders)  # at once: after another forward the ranks of ZeRO-3 may deadlock
    return engine


def _check_hub(name: str | None, world: World) -> None:
    """Make all ranks load the model from the cache only, if rank 0 cannot reach the hub that it would come from."""
    reason = why_unreachable() if world.main and name is not None and needs_hub(name) else None
    reason = world.gather(reason)[0]
    if reason is not None:
        log.info("the model hub cannot be reached (%s): %s is looked up in the cache only", reason, name)
        os.environ["HF_HUB_OFFLINE"] = "1"  # Transformers reads it when it is imported


def _check_run(run: Path, index: ShardIndex, config: Config, checkpoint: Checkpoint | None, resume: str) -> None:
    """Raise TrainError, before the model is loaded, for what would fail minutes later or lose an earlier result."""
    if config.eval.split == "unlabelled":
        raise TrainError("eval.split is 'unlabelled': its clips have no labels to score", "use eval.split=valid")
    if config.eval.split not in SPLITS:
        raise TrainError(f"eval.split is {config.eval.split!r}", f"the splits are {', '.join(SPLITS)}")
    if config.eval.split == "test":
        log.warning("eval.split is 'test': the best model is chosen by the test's own scores, which are then too good")
    index.labels.check_digest(config.data.shards)
    metric, measured = config.eval.select.partition("/")[0], metrics_of(index)
    if metric not in measured:
        message = (
            f"eval.select is {config.eval.select!r}, but the labels of {config.data.shards} have no {metric.upper()}"
        )
        raise TrainError(message, f"choose another score: {', '.join(measured)}, or a mean over groups")
    if not len(index.split(config.eval.split)):
        log.warning("the shard set has no clips in split %r: nothing is scored during training, and the weights of "
                    "the last step are saved, however good they are", config.eval.split)  # fmt: skip
    _check_best(run, checkpoint is not None, resume)


def _check_best(run: Path, has_checkpoint: bool, resume: str) -> None:
    """Raise TrainError if best/ is damaged, or would be overwritten by a run that starts over unasked."""
    if resume != "none":
        try:
            check_sums(run / "best")
        except ChecksumError as error:
            hint = f"remove {run / 'best'}: the same command then resumes, and looks for a new best score"
            raise TrainError(error.message, hint) from error
    if not has_checkpoint and resume == "auto" and (run / "best").exists():
        raise TrainError(
            f"{run}: holds a model in best/, but no checkpoint to resume from",
            "name another train.run_dir, or start over with --resume none",
        )


@contextmanager
def _lock_run(run: Path, world: World) -> Iterator[None]:
    """Lock the run folder, so that no second run writes into it. If the start fails, remove the folder if it is new."""
    if not world.main:
        yield
        return
    new = not run.exists()
    if not any((run / name).exists() for name in LEFT_BY_RUNS):
        for path in run.rglob("*"):
            if path.is_file():
                raise TrainError(f"{run}: holds {path.relative_to(run)}, but no run", "name another train.run_dir")
    with explaining(run):
        run.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints", "tensorboard"):
        if not (run / name).resolve().is_relative_to(run.resolve()):
            raise TrainError(
                f"{run / name}: is a link that leads outside of the run folder: nothing is written there",
                "remove the link; for more room, name another train.run_dir",
            )
    with explaining(run / LOCK_NAME):
        file = open(run / LOCK_NAME, "a", opener=open_lock_file)  # noqa: SIM115 (closed below)
    try:
        with file, exclusive(file, LOCK_WAIT_SEC), reopened(run):
            try:
                yield
            except BaseException:
                if new and all(path.name.startswith(LOCK_NAME) for path in run.iterdir()):
                    shutil.rmtree(run)
                raise
    except LockedError as error:
        raise TrainError(
            f"{run}: another run is writing here{error.holder_note}",
            f"wait for it, stop it, or name another train.run_dir{error.remedy}",
        ) from error


def _check_ranks_agree(world: World, *hashes: str) -> None:
    """Raise TrainError on every rank if a rank's configuration, data or plan differs from rank 0's."""
    all_hashes = world.gather(hashes)
    odd = [rank for rank, rank_hashes in enumerate(all_hashes) if rank_hashes != all_hashes[0]]
    if odd:
        raise TrainError(
            f"ranks {odd} have another configuration, shard set, epoch plan or checkpoint than rank 0",
            "give all machines the same configuration, shards, run folder and version of streamtrain",
        )
