"""Run the training loop: plan, stream, step, evaluate, save. Every number that decides a step is known before it."""

import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import xxhash
from tqdm.contrib.logging import logging_redirect_tqdm

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StoreError, StreamtrainError
from streamtrain.config import Config
from streamtrain.data.augment import keyed_random
from streamtrain.data.cache import StreamCounts
from streamtrain.data.collate import Batch
from streamtrain.data.dataset import ShardStream, StepBatch
from streamtrain.data.patience import Deadline
from streamtrain.data.plan import EpochPlan
from streamtrain.data.planner import Planner
from streamtrain.distributed import PreemptedError, Preemption, World
from streamtrain.eval.evaluate import evaluate
from streamtrain.eval.scorecard import Evaluation, scorecard, write_scorecard
from streamtrain.infer.export import save_best
from streamtrain.model.checksums import check_sums
from streamtrain.model.ctc import CTCModel, ctc_sum
from streamtrain.run_status import RunResult, check_mirrored, write_result
from streamtrain.training.checkpoint import RunState, save_checkpoint
from streamtrain.training.mirror import Mirror
from streamtrain.training.noise import RoomNoise, augment_batch
from streamtrain.training.run_log import RankRow, RunLog
from streamtrain.training.spec_augment import Spans, SpecAugment
from streamtrain.training.step_row import StepRow
from streamtrain.training.zero_engine import Engine

log = logging.getLogger("streamtrain")

RANK_LOG_EVERY = 20  # steps
MIRROR_GRACE_SEC = 10.0  # after SIGTERM; the launcher kills after 30 s
SILENT = [field.name for field in fields(StreamCounts)].index("silent")
MAX_SKIPPED = 20  # consecutive steps; fp16 skips some at its start, until its loss scale fits
MAX_TOO_DENSE = 0.001  # share of the clips that may be trained as silence although their bytes are right


class TrainError(StreamtrainError):
    """Report that training cannot start or continue."""


def check_order(orders: Mapping[str, Sequence[str]]) -> None:
    """Raise TrainError unless gradients arrived in the same order everywhere. `orders` maps places to weight names.

    ZeRO-2 and -3 flatten gradients into buckets as they arrive and all-reduce the buckets. In a different order, the
    gradient of one weight would be added to that of another.
    """
    (first, expected), *others = orders.items()
    differ = set(expected).union(*orders.values()) - set(expected).intersection(*orders.values())
    if differ:
        named = ", ".join(sorted(differ)[:3])
        raise TrainError(
            f"{len(differ)} weights get gradients on some ranks but not on others: {named}, …",
            "all ranks must run the same layers: turn off random layer choices, such as LayerDrop",
        )
    for place, order in others:
        for number, (wanted, arrived) in enumerate(zip_longest(expected, order, fillvalue="no weight"), start=1):
            if wanted != arrived:
                raise TrainError(
                    f"gradients arrive in a different order on {place} than on {first}: number {number} is of "
                    f"{arrived} instead of {wanted}",
                    "the all-reduce would mix up weights, so no step is taken; please report the model's configuration",
                )


class Plans:
    """Hold the plan of the current epoch, and count the steps of the run. All ranks must use it together."""

    def __init__(self, planner: Planner, config: Config, state: RunState) -> None:
        self._planner, self._epochs = planner, config.train.epochs
        self._first_epoch, self._completed = state.epoch, state.completed
        self._current: tuple[int, EpochPlan] | None = None
        limit = config.train.max_steps or math.inf
        total, later = state.step - state.step_in_epoch, list(range(state.epoch, config.train.epochs))
        if later:
            total += self.epoch(later.pop(0)).steps
        while later and total < limit:
            first = self.epoch(state.epoch).steps
            wanted = min(limit - total, len(later) * first) / max(first, 1)  # all epochs have about as many
            counts = planner.count([later.pop(0) for _ in range(min(max(math.ceil(wanted), 1), len(later)))])
            total += sum(counts)
        self.total_steps = max(int(min(total, limit)), state.step)
        self.limit = f"train.max_steps={limit}" if total >= limit else f"train.epochs={config.train.epochs}"

    def epoch(self, number: int) -> EpochPlan:
        """Return the plan of an epoch."""
        if self._current is None or self._current[0] != number:
            completed = self._completed if number == self._first_epoch else ()
            self._current = (number, self._planner.plan(number, completed))
        return self._current[1]

    def prepare(self, number: int) -> None:
        """Begin to plan an epoch, if the run may reach it."""
        if number < self._epochs:
            self._planner.begin(number)

    def close(self) -> None:
        self._planner.close()


class _Ahead:
    """Hold the batches of the next epoch while they are loaded."""

    def __init__(self) -> None:
        self._held: tuple[int, Generator[StepBatch]] | None = None

    def keep(self, epoch: int, batches: Generator[StepBatch]) -> None:
        self._held = epoch, batches

    def take(self, epoch: int) -> Generator[StepBatch] | None:
        held, self._held = self._held, None
        return held[1] if held and held[0] == epoch else None

    def close(self) -> None:
        if self._held is not None:
            self._held[1].close()


class Trainer:
    """Run the training loop and hold its state."""

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        stream: ShardStream,
        plans: Plans,
        state: RunState,
        mirror: Mirror | None,
        saved: RunState | None,
    ) -> None:
        self.config, self.world, self.engine, self.model = config, world, engine, engine.model
        self.stream, self.plans, self.state, self.mirror = stream, plans, state, mirror
        self.run_dir = Path(config.train.run_dir)
        self._masking = SpecAugment(
            config.train.seed,
            Spans(config.model.mask_time_prob, config.model.mask_time_length),
            Spans(config.model.mask_feature_prob, config.model.mask_feature_length),
            self.model.features,
            self.model.geometry,
        )
        snr_db = config.data.noise_snr_db
        self._noise = RoomNoise(config.train.seed, (snr_db[0], snr_db[1]), self.model.normalize) if snr_db else None
        self._preemption = Preemption()
        self.stream.patience = Deadline(stopped=lambda: self._preemption.asked)
        self._ahead = _Ahead()
        self._saved = saved  # the state in the newest checkpoint
        self._silenced = 0  # clips of this epoch, on all ranks, that were trained as silence
        self._skipped_in_a_row = 0
        self._update_sec = 0.0  # duration of the previous optimizer update
        self._rank_stats = np.zeros((world.size, 3 + len(fields(StreamCounts))))  # since they were last written
        select, reselected = config.eval.select, saved is not None and saved.select != config.eval.select
        log_place = self.run_dir, plans.total_steps, state.step
        self.monitor = RunLog(*log_place, select, reselected) if world.main else None

    def run(self) -> None:
        """Train to the last step. Evaluate and save on the way, at the end, and if asked to stop."""
        try:
            with logging_redirect_tqdm(), closing(self.plans), closing(self._ahead):  # a line would be in the bar's
                self._run()
        except PreemptedError as error:
            self._save()
            self._close(MIRROR_GRACE_SEC)
            self.world.barrier()  # rank 0 hosts the store at which the other ranks wait
            message = f"stopped at step {self.state.step}; the same command resumes from there"
            stopped = PreemptedError(message)
            stopped.exit_code = self._preemption.exit_code
            raise stopped from error
        unmirrored = self._close(None)
        with self.world.on_main("check best/ and write the result") as is_main:
            if is_main:
                check_sums(self.run_dir / "best", must_have=True)  # it was verified when it was saved
                self._write_result(unmirrored)

    def _write_result(self, unmirrored: str | None) -> None:
        """Write and log why the run ended, as its last act. Raise StreamtrainError if the mirror is incomplete."""
        state, patience = self.state, self.config.train.patience
        limit = self.plans.limit if state.step == self.plans.total_steps else f"train.patience={patience}"
        result = RunResult(state.step, limit, state.best_score, state.best_step, unmirrored, self.config.eval.select)
        log.info("%s", result)
        write_result(self.run_dir, result)
        check_mirrored(self.run_dir, result)

    def _close(self, wait_sec: float | None) -> str | None:
        """Close the mirror, within `wait_sec`, and the log. Return on rank 0 why the mirror is incomplete, if it is."""
        unmirrored = None
        with self.world.on_main("copy the last checkpoint to the mirror"):
            if self.mirror is not None:
                try:
                    self.mirror.close(wait_sec)
                except StoreError as error:
                    unmirrored = error.message
                    log.warning("%s", error)
            if self.monitor is not None:
                self.monitor.close()
        return unmirrored

    def _run(self) -> None:
        self._save()  # before any result, so that the same command can always resume
        self._evaluate_if_due()
        while not self._finished:
            epoch = self.state.epoch
            plan = self.plans.epoch(epoch)
            self.plans.prepare(epoch + 1)
            for batches, waited in self._steps(plan):
                row, asked = self._step(plan, batches, waited)
                if self.monitor is not None:
                    self.monitor.step(row)
                if self._finished or self.state.step % RANK_LOG_EVERY == 0:
                    self._log_rank_stats()
                if asked:
                    raise PreemptedError("stopped after a step")
                self._evaluate_if_due()
                every = self.config.train.checkpoint_every
                if self._finished or self.state.step % every == 0 or self.state.best_step == self.state.step:
                    self._save()
                if self._finished:
                    break
            if self.state.epoch == epoch and not self._finished:
                raise TrainError(
                    f"the data of epoch {epoch} ended after {self.state.step_in_epoch} of its {plan.steps} steps",
                    "the same command resumes from the newest checkpoint; if this happens again, please report it",
                )
        self._save()  # if only the last evaluation was missing

    @property
    def _finished(self) -> bool:
        stopped = is_stopped_early(self.state, self.config.train.patience)
        return stopped or self.state.step == self.plans.total_steps

    def _steps(self, plan: EpochPlan) -> Iterator[tuple[list[StepBatch], float]]:
        """Yield for each remaining step of the epoch this rank's batches and the seconds it waited for them.

        During the last step, the first batches of the next epoch are loaded.
        """
        batches: list[StepBatch] = []
        started = time.perf_counter()
        for item in self._ahead.take(self.state.epoch) or self._load(plan, self.state.epoch, self.state.step_in_epoch):
            batches.append(item)
            if item.last:
                waited = time.perf_counter() - started
                is_last = self.state.step_in_epoch + 1 == plan.steps
                if is_last and self.state.step + 1 < self.plans.total_steps:
                    following = self.state.epoch + 1
                    self._ahead.keep(following, self._load(self.plans.epoch(following), following, 0))
                yield batches, waited
                batches.clear()  # not a new list: the caller still holds this one while the next step is loaded
                started = time.perf_counter()

    def _load(self, plan: EpochPlan, epoch: int, first_step: int) -> Generator[StepBatch]:
        transform = partial(augment_batch, self._masking, self._noise, epoch)
        return self.stream.epoch(plan, first_step, self.config.data.device_batch_seconds, transform)

    def _step(self, plan: EpochPlan, batches: list[StepBatch], waited: float) -> tuple[StepRow, bool]:
        """Run one optimizer step on the CTC sum of all ranks ÷ label symbols. Return its row, and whether to stop."""
        started = time.perf_counter()
        state, step = self.state, self.state.step_in_epoch
        symbols = max(int(plan.label_characters[step]), 1)
        self.model.encoder_frozen = state.step < self.config.train.freeze_encoder_steps
        nats = torch.zeros((), dtype=torch.float64, device=self.world.device)  # read once: each read waits for the GPU
        for item in batches:
            loss_sum = self._forward(item.batch.to(self.world.device), item.micro_batch_ids[0])
            self.engine.backward(loss_sum / symbols, last=item.last)
            nats += loss_sum.detach()
        rank_nats = float(nats)  # waits for the GPU, so that its time is this rank's own
        arrivals = self.engine.take_arrivals()
        counts, compute_sec = self.stream.take_counts(), time.perf_counter() - started
        failed = [key for item in batches for key in item.batch.failed]
        too_dense = [key for item in batches for key in item.batch.too_dense]
        silenced = len(failed) + len(too_dense)
        stats = [rank_nats, waited, waited + compute_sec + self._update_sec, *astuple(counts)]
        all_ranks = self.world.gather_floats([silenced, _fingerprint(arrivals), self._preemption.asked, *stats])
        all_silenced, fingerprints, asked = all_ranks[:, 0].sum(), all_ranks[:, 1], bool(all_ranks[:, 2].any())
        all_ranks = all_ranks[:, 3:]
        if (fingerprints != fingerprints[0]).any():  # before the all-reduced gradients are used
            orders = self.world.gather(self.engine.names_of(arrivals))
            check_order({f"rank {rank}": order for rank, order in enumerate(orders)})
        update_started = time.perf_counter()
        norm = self.engine.step(state.step)
        self._update_sec = time.perf_counter() - update_started
        loss = float(all_ranks[:, 0].sum()) / symbols
        self._check(loss, norm, batches)
        self._check_silenced(failed, too_dense, int(all_silenced), first_step=step == 0)
        self._rank_stats += all_ranks
        seconds = waited + time.perf_counter() - started
        true, padded = int(plan.true[step].sum()), int(plan.padded[step].sum())
        self.state = _advance(state, plan, skipped=norm is None)
        row = StepRow(
            step=self.state.step,
            epoch=state.epoch,
            loss=loss,
            lr=self.engine.rate(state.step),
            grad_norm=math.nan if norm is None else norm,
            seconds=seconds,
            audio_sec_per_sec=true / SAMPLE_RATE / seconds,
            padding=1 - true / max(padded, 1),
            data_wait=float((all_ranks[:, 1] / all_ranks[:, 2]).max()),
            silent=int(all_ranks[:, 3 + SILENT].sum()),
            skipped=int(norm is None),
        )
        return row, asked

    def _log_rank_stats(self) -> None:
        """Write each rank's data-loading statistics since the last call."""
        rows = []
        for rank, (_, waited, seconds, *values) in enumerate(self._rank_stats.tolist()):
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
        self._rank_stats[:] = 0

    def _forward(self, batch: Batch, micro_batch_id: int) -> torch.Tensor:
        """Return the summed CTC loss of a batch. Dropout is seeded by the first micro-batch's id, not by the rank."""
        seed, state = self.config.train.seed, self.state
        torch.manual_seed(int(keyed_random("dropout", seed, state.epoch, state.step, micro_batch_id).integers(2**62)))
        frames = self.model.frame_counts(batch.input_lengths)
        log_probs = self.engine.forward(
            batch.inputs, batch.input_lengths, batch.time_mask, batch.feature_mask
        )  # (B, T, V)
        return ctc_sum(log_probs, frames, batch.targets, batch.target_lengths, batch.weights, self.model.vocab.blank)

    def _check(self, loss: float, norm: float | None, batches: list[StepBatch]) -> None:
        """Raise TrainError after too many non-finite steps. `loss` and `norm` are equal on all ranks, so all raise."""
        finite = norm is not None and math.isfinite(loss)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if not finite:
            keys = ", ".join(key for item in batches for key in item.batch.keys[:3])
            message = f"step {self.state.step + 1}: the loss is {loss:g}, its gradient is not finite"
            log.warning("%s: the step is skipped (rank %d: clips %s, …)", message, self.world.rank, keys)
            if self._skipped_in_a_row >= MAX_SKIPPED:
                raise TrainError(
                    f"{message}, as in the {MAX_SKIPPED - 1} steps before it (rank {self.world.rank}: clips {keys}, …)",
                    "lower the learning rate or lengthen train.warmup_steps, then resume from an earlier checkpoint",
                )

    def _check_silenced(self, failed: list[str], too_dense: list[str], count: int, first_step: bool) -> None:
        """Log this rank's clips that train as silence. Raise TrainError if all ranks together have too many."""
        for key in failed:
            log.warning("%s does not decode as planned: trained as silence, without its label", key)
        for key in too_dense:
            log.warning("%s has a label of more symbols and blanks than frames: trained as silence, unlabelled", key)
        self._silenced = count if first_step else self._silenced + count
        if self._silenced > MAX_TOO_DENSE * len(self.stream.index.samples) + 1:
            raise TrainError(
                f"{self._silenced} clips of this epoch do not decode although their checksums match, or have labels "
                "too long for their frames; they are named above",
                "is the memory or libsndfile faulty? run `streamtrain verify SHARDS --decode`; for long labels, "
                "use a model with more frames per second",
            )

    def _evaluate_if_due(self) -> None:
        """Score the model every `eval.every_steps` steps and at the end. Save it as `best/` if it is the best yet.

        If the split has no clips, save the weights of the last step.
        """
        settings, state = self.config.eval, self.state
        if state.evaluated == state.step or not (state.step % settings.every_steps == 0 or self._finished):
            return
        if not len(self.stream.index.split(settings.split)):
            if self._finished:
                self._save_unscored()
            return
        model, started = self.engine.scored_copy(), time.perf_counter()
        evaluation = evaluate(
            model, self.stream, settings.split, self.config.data.batch_seconds, self.world, self._preemption
        )
        if self.monitor is not None:
            self.monitor.evaluated(state.step, evaluation, self._epochs_done, time.perf_counter() - started)
        score = evaluation.score(settings.select)
        if score is None and state.best_score is None:
            raise TrainError(
                f"eval.select is {settings.select!r}, but no clip of split {settings.split!r} has such a score",
                "a loss needs clips that were not split, and as many frames as symbols; or use eval.select=auto",
            )
        if state.best_score is not None and (score is None or score >= state.best_score):
            since = state.evaluations_since_best + 1
            self.state = replace(state, evaluated=state.step, evaluations_since_best=since)
            if since == self.config.train.patience:
                log.info("no better score in %d evaluations: training ends here, at step %d", since, state.step)
            return
        best = replace(state, evaluated=state.step, best_score=score, best_step=state.step)
        self.state = replace(best, evaluations_since_best=0)
        self._save_best(model, evaluation)

    @property
    def _epochs_done(self) -> float:
        """Return how many epochs were trained, such as 1.5. The last one may have no plan: its number is not needed."""
        state = self.state
        return state.epoch + (state.step_in_epoch and state.step_in_epoch / self.plans.epoch(state.epoch).steps)

    def _save_unscored(self) -> None:
        """Save the weights of the last step as `best/`."""
        model = self.engine.scored_copy()
        self.state = replace(self.state, evaluated=self.state.step)
        if self.monitor is not None:
            self.monitor.draw_curves()
        self._save_best(model, None)

    def _save_best(self, model: CTCModel, evaluation: Evaluation | None) -> None:
        best = self.run_dir / "best"
        with self.world.on_main("save best/") as is_main:
            if is_main:
                save_best(model.cpu(), best)
            if is_main and evaluation is not None:
                context = {"model": str(best), "shards": self.config.data.shards, "split": self.config.eval.split}
                card = scorecard(evaluation, self.stream.index, **context, step=self.state.step)
                write_scorecard(card, evaluation.clips, self.run_dir)

    def _save(self) -> None:
        if self.state == self._saved:
            return
        full_state = self.engine.gather()
        with self.world.on_main(f"save step {self.state.step}") as is_main:
            if is_main:
                folder, keep = self.run_dir / "checkpoints", self.config.train.keep_checkpoints
                saved = save_checkpoint(full_state, self.state, folder, keep)
                if self.mirror is not None:
                    self.mirror.enqueue(saved)
        self._saved = self.state


def _fingerprint(arrivals: Sequence[int]) -> float:
    """Return a number that is equal for equal sequences; a float holds 53 bits."""
    return float(xxhash.xxh3_64_intdigest(np.array(arrivals, np.int32).tobytes()) >> 11)


def is_stopped_early(state: RunState, patience: int | None) -> bool:
    """Return whether there were `patience` evaluations without a better score."""
    return patience is not None and state.evaluations_since_best >= patience


def _advance(state: RunState, plan: EpochPlan, skipped: bool) -> RunState:
    state = replace(state, step=state.step + 1, skipped=state.skipped + skipped)
    if state.step_in_epoch + 1 == plan.steps:
        return replace(state, epoch=state.epoch + 1, step_in_epoch=0, completed=())
    return replace(state, step_in_epoch=state.step_in_epoch + 1)
