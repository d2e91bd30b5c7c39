"""All before the first step: one run in its folder, one opinion among the ranks, the model as it begins or goes on."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sharding.audio.codec import SAMPLE_RATE
from sharding.files.exclusive import LockedError, exclusive
from sharding.files.writing import explaining, open_lock_file, remove, write_inside
from sharding.shardset.index import ShardIndex, archived_index_name, check_presence, read_index
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import Store, open_store
from streamtrain.atomic import recover_replaced
from streamtrain.config import Config
from streamtrain.data.collate import SILENT_SAMPLES, Batch
from streamtrain.data.dataset import open_stream
from streamtrain.data.loader import LoaderProcesses, loader_memory
from streamtrain.data.plan import PLANNER_VERSION, EpochPlan, PlanSettings, plan_epoch, shortest_lengths
from streamtrain.distributed import World
from streamtrain.model.checksums import ChecksumError, check_sums
from streamtrain.model.ctc import CTCModel, ctc_sum
from streamtrain.model.hub import needs_hub, why_unreachable
from streamtrain.model.inference import scoring_mode
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
from streamtrain.training.memory import Memory, evaluation_shapes, largest_shapes, probe, render
from streamtrain.training.mirror import PART, Mirror
from streamtrain.training.schedule import make_schedule
from streamtrain.training.trainer import Plans, Trainer, TrainError, check_order, is_stopped_early
from streamtrain.training.zero_engine import Engine

log = logging.getLogger("streamtrain")

TRIED_LENGTHS = {  # of the clips, in samples, of the batches on which the order of gradients is tried
    "a silent row": [SILENT_SAMPLES],
    "an unpadded batch": [SAMPLE_RATE, SAMPLE_RATE],
    "a padded batch": [SAMPLE_RATE, SAMPLE_RATE // 2],
}
LOCK_NAME = ".lock"
LEFT_BY_RUNS = (LOCK_NAME, "checkpoints", "best", "log.csv", "finished.json")  # one at least, in a run's folder
LOCK_WAIT_SEC = 10.0  # a run that is being stopped still saves, and ranks that were killed need a moment to go


def train(config: Config, world: World, resume: str = "auto", replan: bool = False) -> None:
    """Train as configured; leaves everything in `train.run_dir`. All ranks call it together.

    With `replan`, what a resumed epoch has left may be planned by other settings than those it began with.
    """
    run = Path(config.train.run_dir)
    with _lock_run(run, world):
        store = open_store(config.data.shards)
        index = read_index(store)
        mirror = None
        with world.on_main("bring the run folder up to its mirror") as mine:
            if mine:
                check_presence(store, index)
                recover_replaced(run / "checkpoints", NAMES)
                recover_replaced(run, "best")
                mirror = _open_mirror(config, run, resume, partial(_check_mirrored, config, index, store, replan))
        found = find_checkpoint(resume, run / "checkpoints")
        checkpoint = open_checkpoint(found) if found else None
        if checkpoint is not None:
            index = _log_growth(_index_of_run(checkpoint, index, store), index, store)
        _check_ranks_agree(
            world,
            json.dumps([config.resume_key, config.eval.split]),
            index.digest,
            checkpoint.name if checkpoint else "",
        )
        _check_run(run, index, config, checkpoint, resume)
        state = RunState(config.resume_key, index.digest, PLANNER_VERSION)
        if checkpoint is not None:
            state = resume_state(checkpoint, config, index.digest, replan)
        plans = Plans(index, config, state)
        _check_ranks_agree(world, plans.epoch(state.epoch).hash)
        engine = _start_engine(config, index, checkpoint, plans.total_steps, world)
        if checkpoint is not None:
            log.info("resumed at step %d from %s", state.step, found)
            if state.config != checkpoint.state.config:
                log.info("planned anew: %d steps are left, of %d", plans.total_steps - state.step, plans.total_steps)
        scored = state.split in ("", config.eval.split)
        if not scored and state.best_cer is not None:
            log.info("eval.split was %r, is %r: the best score is sought anew", state.split, config.eval.split)
        if not world.gather((run / "best").is_dir())[0] or not scored:  # resumed into a new run folder, maybe
            state = replace(state, best_cer=None, best_step=None, evaluated=-1, evaluations_since_best=0)
        state = replace(state, split=config.eval.split)
        if state.step == plans.total_steps:
            log.info("%s: all %d steps are done; --replan with more train.epochs goes on, --resume none starts over",
                     run, state.step)  # fmt: skip
        elif is_stopped_early(state, config.train.patience):
            log.info("%s: no better score in %d evaluations; a higher train.patience goes on",
                     run, state.evaluations_since_best)  # fmt: skip
        elif config.train.probe:
            fresh = plan_epoch(index, PlanSettings.of(config), state.epoch) if state.completed else None
            whole = fresh or plans.epoch(state.epoch)
            log.info("%s", _probe(engine, whole, index, config)[0])
        with world.on_main("prepare the run folder") as mine:
            if mine:
                _prepare(run, config, index, found, resume, mirror)
        data, model = config.data, engine.model
        make = partial(
            open_stream, index, data.shards, data.cache_dir, data.cache_gb, model.vocab, model.normalize,
            world.find_neighbours(), data.workers,
        )  # fmt: skip
        stream = LoaderProcesses(make) if _loads_in_processes(config, world) else make()
        Trainer(config, world, engine, stream, plans, state, mirror, checkpoint.state if checkpoint else None).run()


def _prepare(
    run: Path, config: Config, index: ShardIndex, found: Path | None, resume: str, mirror: Mirror | None
) -> None:
    """Leave in the run folder, and in its mirror, what the run goes on from, and what it was asked for."""
    discard_result(run)
    if resume == "none":
        remove(run / "checkpoints")
        if mirror is not None:
            mirror.clear()
    elif found is not None and found.resolve().parent == (run / "checkpoints").resolve():
        chosen = run / "checkpoints" / found.resolve().name
        delete_later_checkpoints(chosen)
        if mirror is not None:
            mirror.enqueue(chosen)  # else a later one would come back
    write_inside(run / "config.json", json.dumps(config.model_dump(), indent=1))
    write_inside(run / "trained_on.json", json.dumps(_describe(index, config.data.shards), indent=1))


def _check_frames(model: CTCModel, index: ShardIndex, speed_factors: Sequence[float]) -> None:
    """Raise TrainError if the model makes fewer frames of a training clip than its label has symbols.

    The build has seen to that for wav2vec2's strides alone. Such a clip's loss is infinite, and its step lost.
    """
    if int(model.frame_counts(torch.tensor(SILENT_SAMPLES))) < 1:
        raise TrainError(
            f"the model makes no frame of {SILENT_SAMPLES / SAMPLE_RATE:g} s: its kernels and strides are too large",
            "take a model of smaller ones (model.scratch: conv_kernel, conv_stride)",
        )
    rows = index.split("train")
    clips = index.samples[rows]
    frames = model.frame_counts(torch.from_numpy(shortest_lengths(clips, speed_factors))).numpy()
    missing = clips["label_length"].astype(np.int64) - frames
    if (missing > 0).any():
        worst = int(missing.argmax())
        raise TrainError(
            f"{(missing > 0).sum():,} of {len(rows):,} training clips have more symbols than frames, of which this "
            f"model makes {SAMPLE_RATE / model.frame_samples:g} a second: a clip of "
            f"{index.shards[clips['shard'][worst]].name} (row {rows[worst]} of the index) has "
            f"{clips['label_length'][worst]} symbols and {max(frames[worst], 0)} frames",
            "take a model of smaller strides (model.scratch: conv_stride)"
            + (", or data.speed_factors of at most 1" if max(speed_factors, default=1) > 1 else ""),
        )


def _describe(index: ShardIndex, shards: str) -> dict[str, object]:
    """What a model card tells of the data."""
    rows = index.split("train")
    hours = float(index.samples["samples"][rows].sum(dtype=np.int64)) / SAMPLE_RATE / 3600
    rejected = index.notes.get("validation", {}).get("rejected", 0)
    return {"shards": shards, "index": index.digest, "clips": len(rows), "hours": round(hours, 3), "rejected": rejected}


def find_batch_seconds(config: Config, world: World) -> None:
    """Print the largest `data.batch_seconds` whose forward and backward the memory of every rank holds."""
    index = read_index(open_store(config.data.shards))
    plan = plan_epoch(index, PlanSettings.of(config), 0)
    engine = _start_engine(config, index, None, plan.steps, world)
    said, memory = _probe(engine, plan, index, config)
    fits = int(min(memory.largest for memory in world.gather(memory)))
    if world.main:
        print(said)
        print(f"data.batch_seconds={fits} fits")
        if fits * config.train.micro_batches_per_step > plan.padded.sum() / SAMPLE_RATE:
            print("(more than the whole epoch holds: what a step learns from is then the limit, not the memory)")


def _probe(engine: Engine, plan: EpochPlan, index: ShardIndex, config: Config) -> tuple[str, Memory]:
    """Run the largest forwards and backwards of a plan, beside all that training keeps.

    Raises ProbeError where the memory does not hold them.
    """
    engine.make_moments()
    shapes = largest_shapes(plan, int(index.samples["label_length"].max()), config.data.device_batch_seconds)
    loader = loader_memory(index, config.data.workers, _loads_in_processes(config, engine.world))
    a_step = plan.padded.max() / SAMPLE_RATE * plan.micro_batches_per_step / engine.world.size  # s, held together
    loader = replace(loader, batches=loader.batches + a_step / max(shape.seconds for shape in shapes))
    memory = probe(lambda batch: _run_unweighted(engine, batch), shapes, engine.world, loader)
    lengths = index.samples["samples"][index.split(config.eval.split)]
    if len(lengths):
        scored = evaluation_shapes(lengths, config.data.batch_seconds)
        probe(partial(_score_unweighted, engine.scored_copy()), scored, engine.world)
    return render(memory, shapes, loader), memory


def _loads_in_processes(config: Config, world: World) -> bool:
    return world.device.type == "cuda" and config.data.workers > 0


def _check_mirrored(config: Config, index: ShardIndex, store: Store, replan: bool, path: Path) -> None:
    """Raises CheckpointError where a checkpoint, of which the state alone is looked at, is not of this run."""
    checkpoint = read_checkpoint(path)
    resume_state(checkpoint, config, _index_of_run(checkpoint, index, store).digest, replan)


def _open_mirror(config: Config, run: Path, resume: str, check: Callable[[Path], None]) -> Mirror | None:
    """Return the mirror, if there is to be one; if it is ahead of this machine, bring the run folder up to it."""
    if config.train.mirror is None:
        return None
    mirror = Mirror(open_store(config.train.mirror), run)
    mirror.check_writable()
    if resume != "none":
        fetched = (run / PART).is_dir()  # a kill among the moves of `fetch` leaves best/ and no checkpoint
        _check_best(run, fetched or bool(list_checkpoints(run / "checkpoints")), resume)
        if mirror.check(check) and resume == "auto":
            discard_result(run)
            mirror.fetch()
    return mirror


def _run_unweighted(engine: Engine, batch: Batch) -> None:
    """Forward and backward of clips that weigh nothing: all gradients are 0, and no step follows."""
    batch = batch.to(engine.world.device)
    frames = engine.model.frame_counts(batch.input_lengths)
    log_probs = engine.forward(batch.inputs, batch.input_lengths)
    loss = ctc_sum(log_probs, frames, batch.targets, batch.target_lengths, batch.weights, engine.model.vocab.blank)
    engine.backward(loss, last=False)


def _score_unweighted(model: CTCModel, batch: Batch) -> None:
    """Run a forward as an evaluation does."""
    with scoring_mode():
        model(batch.inputs.to(model.device), batch.input_lengths)


def _index_of_run(checkpoint: Checkpoint, index: ShardIndex, store: Store) -> ShardIndex:
    """The index that the run began with: of a shard set that has grown since, the old one, which was kept."""
    began_with = checkpoint.state.index_digest
    if began_with == index.digest or not store.exists(archived_index_name(began_with)):
        return index
    return read_index(store, archived_index_name(began_with))


def _log_growth(used: ShardIndex, newest: ShardIndex, store: Store) -> ShardIndex:
    more, count = len(newest.samples) - len(used.samples), len(used.samples)
    if more:
        log.info("%s has grown by %d samples; this run goes on with the %d it began with", store.url, more, count)
    return used


def _start_engine(
    config: Config, index: ShardIndex, checkpoint: Checkpoint | None, total_steps: int, world: World
) -> Engine:
    """The model as it begins, or as the checkpoint has it."""
    log.info("model: %s", config.model.pretrained or "from scratch")
    _look_for_hub(config.model.pretrained, world)
    torch.manual_seed(config.train.seed)  # the weights of a new head, or of a model from scratch
    model = load_model(config.model, index.track)
    _check_frames(model, index, config.data.speed_factors)
    if config.data.gain_db and model.normalize:
        log.info("data.gain_db has no effect on this model, which brings each clip to the same loudness")
    log.info("LayerDrop is off: under ZeRO, ranks that skip different layers would fall out of step")
    parts = load_state(checkpoint) if checkpoint else None
    if parts is not None:
        model.network.load_state_dict(parts.params)
    recipe = make_schedule(model, config.train, config.peak_rate, total_steps)
    engine = Engine(model.to(world.device), recipe, config.deepspeed, config.train.ema_decay, world)
    if parts is not None:
        engine.restore(parts)
    torch.manual_seed(world.rank)  # what draws at random must not decide which layers run
    orders: dict[str, list[str]] = {}
    for name, lengths in TRIED_LENGTHS.items():
        tried = world.gather(engine.check_gradient_order(lengths))
        orders |= {f"rank {rank}, {name}": order for rank, order in enumerate(tried)}
        check_order(orders)  # at once: after another forward the ranks of ZeRO-3 may wait for one another
    return engine


def _look_for_hub(name: str | None, world: World) -> None:
    """Have all ranks take the model from the cache if rank 0 cannot reach the hub that it would come from."""
    reason = why_unreachable() if world.main and name is not None and needs_hub(name) else None
    reason = world.gather(reason)[0]
    if reason is not None:
        log.info("the model hub cannot be reached (%s): %s is looked for in the cache alone", reason, name)
        os.environ["HF_HUB_OFFLINE"] = "1"  # read as Transformers is imported


def _check_run(run: Path, index: ShardIndex, config: Config, checkpoint: Checkpoint | None, resume: str) -> None:
    """What would fail only after minutes, or cost an earlier result, is refused before the model is loaded."""
    if config.eval.split == "unlabelled":
        raise TrainError("eval.split is 'unlabelled', whose clips have no labels to score", "valid is the usual one")
    if config.eval.split not in SPLITS:
        raise TrainError(f"eval.split is {config.eval.split!r}", f"the splits are {', '.join(SPLITS)}")
    if not len(index.split(config.eval.split)):
        log.warning("the shard set has no clips in split %r: nothing is scored on the way, and the weights of the last "
                    "step are kept, whatever they are worth", config.eval.split)  # fmt: skip
    _check_best(run, checkpoint is not None, resume)


def _check_best(run: Path, has_checkpoint: bool, resume: str) -> None:
    """Raise TrainError if a model in best/ would be overwritten by a run that begins anew unasked, or is damaged."""
    if resume != "none":
        try:
            check_sums(run / "best")
        except ChecksumError as error:
            hint = f"remove {run / 'best'}: the same command then goes on, and seeks the best score anew"
            raise TrainError(error.message, hint) from error
    if not has_checkpoint and resume == "auto" and (run / "best").exists():
        raise TrainError(
            f"{run}: holds a model in best/, but no checkpoint to go on from",
            "name another train.run_dir, or start over with --resume none",
        )


@contextmanager
def _lock_run(run: Path, world: World) -> Iterator[None]:
    """Hold the run folder, so that no second run writes into it. A start that failed leaves no new one behind."""
    if not world.main:
        yield
        return
    new = not run.exists()
    if not any((run / name).exists() for name in LEFT_BY_RUNS):
        for path in run.rglob("*"):
            if path.is_file():
                raise TrainError(f"{run}: holds {path.relative_to(run)}, and no run", "name another train.run_dir")
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
            f"{run}: another run is writing here{error.holder}",
            f"wait for it, stop it, or name another train.run_dir{error.remedy}",
        ) from error


def _check_ranks_agree(world: World, *hashes: str) -> None:
    """Raises TrainError on every rank where ranks have other configurations or plans than rank 0."""
    everyone = world.gather(hashes)
    odd = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise TrainError(
            f"ranks {odd} have another configuration, shard set, epoch plan or checkpoint than rank 0",
            "do all machines see the same configuration, shards and run folder, and the same version of streamtrain?",
        )
