"""One readable loop: plan, stream, step, evaluate, save. Every number that decides a step is known before it."""

import fcntl
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharding.audio import SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.format import ShardIndex, old_index_name, read_index
from sharding.store import Store, open_store
from streamtrain.augment import keyed_random, span_mask
from streamtrain.checkpoint import RunState, find_checkpoint, index_digest_of, load_checkpoint, save_checkpoint
from streamtrain.collate import Batch
from streamtrain.config import Config, ConfigError
from streamtrain.evaluate import Evaluation, evaluate, scorecard, write_scorecard
from streamtrain.export import save_best
from streamtrain.model import CTCModel, ctc_sum, load_model
from streamtrain.monitor import Monitor, RankRow, StepRow
from streamtrain.plan import PLANNER_VERSION, EpochPlan, check_world_size, plan_epoch
from streamtrain.stream import ShardStream, StepBatch, StreamCounts, open_for_reading
from streamtrain.world import World

log = logging.getLogger("streamtrain")

LOCK_TRIES = 5  # a second apart
TELL_RANKS_EVERY = 20  # steps
SILENT = [field.name for field in fields(StreamCounts)].index("silent")
MAX_FAILED = 0.001  # share of clips that may fail to decode though their bytes are right: above it, something is wrong


class TrainError(StreamtrainError):
    """Training that cannot go on."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the exact number of steps: a linear warm-up, then down to zero or level."""

    peak: float
    warmup_steps: int
    total_steps: int
    kind: str

    def at(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        return self.peak * (self.total_steps - step) / max(self.total_steps - self.warmup_steps, 1)


def train(config: Config, world: World, resume: str = "auto") -> None:
    """Train as configured; leaves everything in `train.run_dir`. All ranks call it together."""
    check_world_size(world.size, config.train.micro_batches_per_step)
    store = open_store(config.data.shards)
    run = Path(config.train.run_dir)
    checkpoint = find_checkpoint(resume, run / "checkpoints")
    index = _read_index_of(checkpoint, store)
    plans = Plans(index, config)
    _agree(world, json.dumps(config.decisive), index.digest, plans.epoch(0).hash, checkpoint.name if checkpoint else "")
    with _only_run_in(run, world):
        _check_run(run, index, config, checkpoint, resume)
        log.info("model: %s", config.model.pretrained or "from scratch")  # half a minute where no hub can be reached
        torch.manual_seed(config.train.seed)  # the weights of a new head, or of a model from scratch
        model = load_model(config.model).to(world.device)
        if config.data.gain_db and model.normalize:
            log.info("data.gain_db has no effect on this model, which brings each clip to the same loudness")
        log.info("LayerDrop is off: under ZeRO, ranks that skip different layers would fall out of step")
        engine = _start_engine(model, config, world)
        source = open_for_reading(index, store, config.data.cache_dir, config.data.cache_gb)
        stream = ShardStream(index, source, model.vocab, model.normalize, world, config.data.workers)
        state = RunState(0, 0, 0, world.size, config.decisive, index.digest, PLANNER_VERSION, None)
        if checkpoint is not None:
            state = load_checkpoint(engine, checkpoint, state)
            log.info("resumed at step %d from %s", state.step, checkpoint)
        if not world.gather((run / "best").is_dir())[0]:
            state = replace(state, best_cer=None)  # resumed into a new run folder: its first score is its best
        if state.step == plans.total_steps:
            log.info("%s: all %d steps are done; to train anew, --resume none", run, state.step)
        if world.main:
            if resume == "none":
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
            (run / "config.json").write_text(json.dumps(config.model_dump(), indent=1))
        Trainer(config, world, engine, model, stream, plans, state).run()


def _read_index_of(checkpoint: Path | None, store: Store) -> ShardIndex:
    """The index that the run began with: of a shard set that has grown since, the old one, which was kept."""
    index = read_index(store)
    began_with = index_digest_of(checkpoint) if checkpoint else None
    if began_with in (None, index.digest) or not store.exists(old_index_name(str(began_with))):
        return index
    old = read_index(store, old_index_name(str(began_with)))
    more = len(index.samples) - len(old.samples)
    log.info(
        "%s has grown by %d samples; this run goes on with the %d it began with", store.url, more, len(old.samples)
    )
    return old


class Plans:
    """The plan of each epoch, and how many steps the run has. Holds one epoch's plan at a time."""

    def __init__(self, index: ShardIndex, config: Config) -> None:
        self._index = index
        self._settings = config.plan
        self._kept: tuple[int, EpochPlan] | None = None
        limit = config.train.max_steps or math.inf
        total = 0
        for epoch in range(config.train.epochs):
            total += self.epoch(epoch).steps
            if total >= limit:
                break
        self.total_steps = int(min(total, limit))

    def epoch(self, number: int) -> EpochPlan:
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, plan_epoch(self._index, self._settings, number))
        return self._kept[1]


class Trainer:
    """The loop and the little it must remember."""

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Any,
        model: CTCModel,
        stream: ShardStream,
        plans: Plans,
        state: RunState,
    ) -> None:
        self.config, self.world, self.engine, self.model = config, world, engine, model
        self.stream, self.plans, self.state = stream, plans, state
        self.run_dir = Path(config.train.run_dir)
        self.schedule = Schedule(
            _peak_rate(config), config.train.warmup_steps, plans.total_steps, config.train.schedule
        )
        self._failed: set[str] = set()  # clips of this rank that did not decode
        self._told = np.zeros((world.size, 3 + len(fields(StreamCounts))))  # of each rank, since it was last written
        self.monitor = Monitor(self.run_dir, plans.total_steps, state.step) if world.main else None

    def run(self) -> None:
        """Train to the last step; evaluate and save on the way and at the end."""
        if self.state.step == 0:
            self._save()  # before any result: from now on the same command always has a place to go on from
            self._evaluate()
        while self.state.step < self.plans.total_steps:
            plan = self.plans.epoch(self.state.epoch)
            for micro_batches, waited in self._steps(plan):
                row = self._step(plan, micro_batches, waited)
                last = self.state.step == self.plans.total_steps
                if last or self.state.step % self.config.eval.every_steps == 0:
                    row = replace(row, cer=self._evaluate())
                if self.monitor is not None:
                    self.monitor.step(row)
                if last or self.state.step % TELL_RANKS_EVERY == 0:
                    self._tell_ranks()
                if last or self.state.step % self.config.train.checkpoint_every == 0:
                    self._save()
                if last:
                    break
        if self.monitor is not None:
            self.monitor.close()

    def _steps(self, plan: EpochPlan) -> Iterator[tuple[list[StepBatch], float]]:
        """The rest of the epoch: this rank's micro-batches of each step, and the seconds it waited for them."""
        batches = self.stream.epoch(plan, self.state.step_in_epoch)
        per_rank = plan.micro_batches_per_step // self.world.size
        started = time.perf_counter()
        while micro_batches := list(islice(batches, per_rank)):
            yield micro_batches, time.perf_counter() - started
            started = time.perf_counter()

    def _step(self, plan: EpochPlan, micro_batches: list[StepBatch], waited: float) -> StepRow:
        """One optimizer step. The loss is CTC summed over the clips of all ranks ÷ the label symbols of the step."""
        started = time.perf_counter()
        state, here = self.state, self.state.step_in_epoch
        symbols = max(int(plan.label_characters[here]), 1)
        rate = self.schedule.at(state.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        nats = 0.0
        for item in micro_batches:
            summed = self._forward(item.batch.to(self.world.device), item.number)
            # The engine averages over ranks and over micro-batches: times M, divided by the step's symbols
            self.engine.backward(summed * (plan.micro_batches_per_step / symbols))
            self.engine.step()
            nats += float(summed.detach())
        counts, here_sec = self.stream.take_counts(), time.perf_counter() - started
        everyone = self.world.gather_floats([nats, waited, waited + here_sec, *astuple(counts)])
        loss = float(everyone[:, 0].sum()) / symbols
        self._check(loss, micro_batches)
        self._told += everyone
        seconds = waited + time.perf_counter() - started
        true, padded = int(plan.true[here].sum()), int(plan.padded[here].sum())
        self.state = _advance(state, plan)
        return StepRow(
            step=self.state.step,
            epoch=state.epoch,
            loss=loss,
            lr=rate,
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            audio_sec_per_sec=true / SAMPLE_RATE / seconds,
            padding=1 - true / max(padded, 1),
            data_wait=float((everyone[:, 1] / everyone[:, 2]).max()),
            silent=int(everyone[:, 3 + SILENT].sum()),
            cer=None,
        )

    def _tell_ranks(self) -> None:
        """What each rank's data took since this was last told."""
        rows = []
        for rank, (_, waited, seconds, *values) in enumerate(self._told.tolist()):
            counts = StreamCounts(*values)
            rows.append(
                RankRow(
                    step=self.state.step,
                    rank=rank,
                    data_wait=waited / max(seconds, 1e-9),
                    look_ahead=counts.ready / max(counts.batches, 1),
                    read_ms=1000 * counts.read_sec / max(counts.clips, 1),
                    decode_ms=1000 * counts.decode_sec / max(counts.clips, 1),
                    cache_hits=counts.hits / (counts.hits + counts.misses) if counts.hits + counts.misses else 1.0,
                    mb_fetched=counts.bytes / 2**20,
                    retries=int(counts.retries),
                    silent=int(counts.silent),
                )
            )
        if self.monitor is not None:
            self.monitor.ranks(rows)
        self._told[:] = 0

    def _forward(self, batch: Batch, number: int) -> torch.Tensor:
        """Summed CTC loss of a micro-batch. Dropout and masks depend on its place in the plan, not on the rank."""
        seed, state = self.config.train.seed, self.state
        torch.manual_seed(int(keyed_random("dropout", seed, state.epoch, state.step, number).integers(2**62)))
        frames = self.model.frame_counts(batch.input_lengths)
        log_probs = self.engine(batch.inputs, batch.input_lengths, *self._masks(batch.keys, frames))  # (B, T, V)
        return ctc_sum(log_probs, frames, batch.targets, batch.target_lengths, batch.weights, self.model.vocab.blank)

    def _masks(self, keys: Sequence[str], frames: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What is hidden of each clip in this epoch: frames (B, T) and features (B, H); None where nothing ever is."""
        settings, key_of_epoch = self.config.model, (self.config.train.seed, self.state.epoch)

        def draw(kind: str, lengths: Sequence[int], share: float, span: int) -> torch.Tensor | None:
            if share == 0:
                return None
            hidden = np.zeros((len(keys), max(lengths)), bool)
            for row, key, length in zip(hidden, keys, lengths, strict=True):
                row[:length] = span_mask(length, share, span, keyed_random(kind, *key_of_epoch, key))
            return torch.from_numpy(hidden).to(self.world.device)

        features = [self.model.features] * len(keys)
        return (
            draw("mask", frames.tolist(), settings.mask_time_prob, settings.mask_time_length),
            draw("features", features, settings.mask_feature_prob, settings.mask_feature_length),
        )

    def _check(self, loss: float, micro_batches: list[StepBatch]) -> None:
        if not math.isfinite(loss):  # the sum is the same on all ranks, so all stop here together
            keys = ", ".join(key for item in micro_batches for key in item.batch.keys[:3])
            raise TrainError(
                f"step {self.state.step + 1}: the loss is {loss} (rank {self.world.rank} had {keys}, …)",
                "lower the learning rate or lengthen train.warmup_steps, then resume from the last checkpoint",
            )
        for key in (key for item in micro_batches for key in item.batch.failed if key not in self._failed):
            log.warning("%s does not decode as planned: trained as silence, without its label", key)
            self._failed.add(key)
        if len(self._failed) > MAX_FAILED * len(self.stream.index.samples) + 1:
            raise TrainError(
                f"{len(self._failed)} clips do not decode though their checksums hold, such as {min(self._failed)}",
                "bad memory, or a broken libsndfile? run `python -m sharding verify SHARDS --decode`",
            )

    def _evaluate(self) -> float:
        """Score the model as it is; keep it as `best/` where no score was better."""
        settings = self.config
        batch_seconds = settings.data.batch_seconds
        evaluation = evaluate(self.model, self.stream, settings.eval.split, batch_seconds, self.world)
        cer = evaluation.total.cer
        if self.monitor is not None:
            self.monitor.evaluated(self.state.step, evaluation.total, evaluation.clips)
        if self.state.step == 0:
            self._first_cer(cer)
        if self.state.best_cer is None or cer < self.state.best_cer:
            self.state = replace(self.state, best_cer=cer)
            save_best(self.model, self.run_dir / "best", self.world)
            if self.world.main:
                self._write_scorecard(evaluation)
        return cer

    def _first_cer(self, cer: float) -> None:
        if self.world.main:
            (self.run_dir / "before.json").write_text(json.dumps({"cer": cer}))

    def _write_scorecard(self, evaluation: Evaluation) -> None:
        card = scorecard(
            evaluation, self.stream.index.notes, model=str(self.run_dir / "best"), shards=self.config.data.shards,
            split=self.config.eval.split, step=self.state.step,
        )  # fmt: skip
        write_scorecard(card, evaluation.clips, self.run_dir)

    def _save(self) -> None:
        folder = self.run_dir / "checkpoints"
        save_checkpoint(self.engine, self.state, folder, self.world, self.config.train.keep_checkpoints)


def _advance(state: RunState, plan: EpochPlan) -> RunState:
    step_in_epoch = state.step_in_epoch + 1
    if step_in_epoch == plan.steps:
        return replace(state, step=state.step + 1, epoch=state.epoch + 1, step_in_epoch=0)
    return replace(state, step=state.step + 1, step_in_epoch=step_in_epoch)


def _start_engine(model: CTCModel, config: Config, world: World) -> Any:
    import deepspeed

    settings = json.loads(json.dumps(config.deepspeed))  # the engine writes into what it is given
    settings["train_micro_batch_size_per_gpu"] = 1  # a micro-batch of the plan is one of the engine's
    settings["gradient_accumulation_steps"] = config.train.micro_batches_per_step // world.size
    settings.setdefault("steps_per_print", 2**31)
    optimizer = settings.get("optimizer", {}).setdefault("params", {})
    if world.device.type == "cpu" and not optimizer.get("torch_adam", False):
        optimizer["torch_adam"] = True
        log.info("on CPU the plain Adam of torch replaces the fused one, which would need a compiler")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=settings)
    except (ValueError, TypeError, AssertionError) as error:  # what it raises for a setting it does not take
        raise ConfigError(
            f"DeepSpeed does not take the section 'deepspeed': {error}", "see configs/zero2.json"
        ) from error
    return engine


def _peak_rate(config: Config) -> float:
    try:
        return float(config.deepspeed["optimizer"]["params"]["lr"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("deepspeed.optimizer.params.lr is missing", "see configs/zero2.json") from error


def _check_run(run: Path, index: ShardIndex, config: Config, checkpoint: Path | None, resume: str) -> None:
    """What would fail only after minutes, or cost an earlier result, is refused before the model is loaded."""
    if len(index.split(config.eval.split)) == 0:
        raise TrainError(
            f"the shard set has no clips in split {config.eval.split!r} to evaluate on",
            "build it from at least two children, with --valid-fraction above 0",
        )
    if checkpoint is None and resume == "auto" and (run / "best").exists():
        raise TrainError(
            f"{run}: holds a model in best/, but no checkpoint to go on from",
            "name another train.run_dir, or start over with --resume none",
        )


@contextmanager
def _only_run_in(run: Path, world: World) -> Iterator[None]:
    """Hold the run folder, so that no second run writes into it. The kernel lets go when the process ends."""
    if not world.main:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as file:
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == LOCK_TRIES - 1:
                    raise TrainError(
                        f"{run}: another run is writing here", "wait for it, stop it, or name another train.run_dir"
                    ) from error
                time.sleep(1)  # ranks that were just killed need a moment to go
        yield


def _agree(world: World, *hashes: str) -> None:
    """Raises TrainError on every rank where ranks have other configurations or plans than rank 0."""
    everyone = world.gather(hashes)
    odd = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise TrainError(
            f"ranks {odd} have another configuration, shard set, epoch plan or checkpoint than rank 0",
            "do all machines see the same configuration, shards and run folder, and the same version of streamtrain?",
        )
