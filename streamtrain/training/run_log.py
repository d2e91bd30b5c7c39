"""Log a run: a progress bar with ETA, `log.csv`, TensorBoard events, `curves.png`, `samples.txt`."""

import csv
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sharding.errors import StreamtrainError, counted
from sharding.files.writing import append, explaining, write_inside
from streamtrain.eval.scorecard import SCORECARD, Evaluation, read_rate, read_scorecard, render_interval
from streamtrain.run_status import RESULT_NAME, read_result

LINE_EVERY_SEC = 60.0  # if the output is not a terminal
SAMPLES_SHOWN = 8
SILENT_MODEL = (
    "  all hypotheses are empty (blank), as usual for CTC at first; if this lasts, raise the learning rate, lengthen "
    "train.warmup_steps, lower model.dropout"
)
RANKS_SHOWN = 64  # in TensorBoard


@dataclass(frozen=True)
class StepRow:
    """Describe one optimizer step, a row of log.csv."""

    step: int
    epoch: int
    loss: float  # nats per label symbol, over the whole step
    lr: float
    grad_norm: float
    seconds: float  # duration of the step, waiting included
    audio_sec_per_sec: float  # true seconds of speech trained on, per second
    padding: float  # 1 − true ÷ padded seconds
    data_wait: float  # share of the step spent waiting for data, by the rank that waited longest
    silent: int  # clips that did not decode, on all ranks
    skipped: int  # 1 if the gradient was not finite, so that the step changed nothing
    cer: float | None  # if an evaluation followed the step


@dataclass(frozen=True)
class RankRow:
    """Describe one rank's data loading since its last row, as a row of ranks.csv."""

    step: int
    rank: int
    data_wait: float  # share of the steps spent waiting for data
    look_ahead: float  # batches that were ready when a step took one, on average
    read_ms: float  # of a loader thread, per clip
    decode_ms: float
    cache_hits: float  # share of the requested shards that were in the cache; 1 without a cache
    mb_fetched: float  # into the cache
    retries: int  # repeated requests, and shards that were damaged on arrival or in the cache
    silent: int  # clips that did not decode


class RunLog:
    """Write the log of a run, on rank 0. Rows of steps that a resumed run will repeat are dropped."""

    def __init__(self, run_dir: Path, total_steps: int, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder = run_dir
        self._log = run_dir / "log.csv"
        self.rows = [row for row in read_log(self._log) if row.step <= done_steps]
        self._rewrite()
        self._drop_samples_from(done_steps + 1)
        self._ranks = run_dir / "ranks.csv"
        lines = _read_lines(self._ranks).splitlines(keepends=True)[1:]
        lines = [line for line in lines if _step_of(line, self._ranks) <= done_steps]
        write_inside(self._ranks, ",".join(field.name for field in fields(RankRow)) + "\n" + "".join(lines))
        self._events = run_dir / "tensorboard"
        with explaining(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=done_steps + 1)
        # Without a terminal a bar would fill the log: a line a minute shows the same
        self._bar = tqdm(
            total=total_steps, initial=done_steps, desc="training", unit="step", smoothing=0.05, disable=None
        )
        self._total, self._start_time, self._start_step = total_steps, time.monotonic(), done_steps
        self._last_line_time = self._start_time

    def step(self, row: StepRow) -> None:
        self.rows.append(row)
        append(self._log, _csv([_cells(row)]))
        self._draw(
            {f"train/{name}": value for name, value in asdict(row).items() if name not in ("step", "cer")}, row.step
        )
        self._show(row)

    def _show(self, row: StepRow) -> None:
        metrics = (
            f"loss {row.loss:.3f}, lr {row.lr:.2g}, grad norm {row.grad_norm:.2g}, "
            f"{row.audio_sec_per_sec:,.0f} audio-s/s, padding {row.padding:.1%}, waiting {row.data_wait:.1%}"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(metrics, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        is_first = row.step == self._start_step + 1
        if is_first or now - self._last_line_time >= LINE_EVERY_SEC or row.step == self._total:
            self._last_line_time = now
            left = (now - self._start_time) / (row.step - self._start_step) * (self._total - row.step)
            self.message(f"step {row.step:,} of {self._total:,}, {tqdm.format_interval(left)} left: {metrics}")

    def ranks(self, rows: Sequence[RankRow]) -> None:
        append(self._ranks, _csv(list(asdict(row).values()) for row in rows))
        for row in rows[:RANKS_SHOWN]:
            shown = {name: value for name, value in asdict(row).items() if name not in ("step", "rank")}
            self._draw({f"rank{row.rank}/{name}": value for name, value in shown.items()}, row.step)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        total, clips = evaluation.total, evaluation.clips
        rates = {evaluation.labels.metric: total.rate, "wer": evaluation.wer}
        named = ", ".join(f"{name.upper()} {rate:.4f}" for name, rate in rates.items())
        self.message(f"step {step}: {named} on {counted(len(clips), 'clip')}")
        if not any(clip.hypothesis for clip in clips):
            self.message(SILENT_MODEL)
        if self.rows and self.rows[-1].step == step:
            self.rows[-1] = replace(self.rows[-1], cer=total.rate)
            self._rewrite()
            self.draw_curves()
        self._draw({"valid/cer": total.rate}, step)
        self._drop_samples_from(step)  # a run may be resumed at a step that was already scored
        shown = clips[:: max(1, len(clips) // SAMPLES_SHOWN)][:SAMPLES_SHOWN]
        texts = "".join(f"reference   {clip.reference}\nhypothesis  {clip.hypothesis}\n\n" for clip in shown)
        append(
            self._folder / "samples.txt",
            f"--- step {step}, {evaluation.labels.metric.upper()} {total.rate:.4f}\n{texts}",
        )

    def draw_curves(self) -> None:
        before = self._folder / "before.json"
        plot_curves(self.rows, self._folder / "curves.png", read_rate(before) if before.is_file() else None)

    def message(self, line: str) -> None:
        self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
        with explaining(self._events):
            self._board.close()

    def _draw(self, scalars: dict[str, float], step: int) -> None:
        with explaining(self._events):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def _drop_samples_from(self, step: int) -> None:
        path = self._folder / "samples.txt"
        samples = _read_lines(path).split("--- step ")[1:]
        samples = [sample for sample in samples if _step_of(sample, path) < step]
        write_inside(path, "".join(f"--- step {sample}" for sample in samples))

    def _rewrite(self) -> None:
        names: list[object] = [field.name for field in fields(StepRow)]
        write_inside(self._log, _csv([names, *map(_cells, self.rows)]))


def read_log(path: Path) -> list[StepRow]:
    """Return the rows of a log.csv, none if there is no such file. An incomplete last line is skipped.

    Raise StreamtrainError if the file is not a log.
    """
    rows = []
    try:
        for cells in csv.DictReader(io.StringIO(_read_lines(path), newline="")):
            values: dict[str, Any] = {name: float(cell) if cell else None for name, cell in cells.items()}
            values |= {name: int(cells[name]) for name in ("step", "epoch", "silent", "skipped")}
            rows.append(StepRow(**values))
    except (csv.Error, ValueError, TypeError, KeyError) as error:
        raise _not_a_log(path, error) from error
    return rows


def _read_lines(path: Path) -> str:
    """Return the complete lines of a log, none if there is no such file.

    A kill or a full disk may have cut the last line off, even within a symbol; it is skipped.
    """
    data = path.read_bytes() if path.is_file() else b""
    try:
        return data[: data.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise _not_a_log(path, error) from error


def _step_of(text: str, path: Path) -> int:
    """Return the step of a row: the number before its first comma."""
    try:
        return int(text.partition(",")[0])
    except ValueError as error:
        raise _not_a_log(path, error) from error


def _not_a_log(path: Path, error: Exception) -> StreamtrainError:
    return StreamtrainError(
        f"{path}: is not the log of a run ({error})", "it is damaged or of another version: move it away"
    )


def plot_curves(rows: Sequence[StepRow], path: Path, cer_before: float | None = None) -> None:
    """Draw loss, CER (the gradient's norm if nothing was scored), learning rate and throughput over the steps."""
    from matplotlib.figure import Figure

    steps = [row.step for row in rows]
    figure = Figure(figsize=(10, 6), layout="constrained")
    (loss, score), (rate, speed) = figure.subplots(2, 2)
    loss.plot(steps, [row.loss for row in rows], color="#33658a", linewidth=0.8)
    loss.set(title="loss, nats per symbol", yscale="log")
    evaluated = [(row.step, row.cer) for row in rows if row.cer is not None]
    if evaluated:
        evaluated = [*([] if cer_before is None else [(0, cer_before)]), *evaluated]
        score.plot(*zip(*evaluated, strict=True), marker="o", color="#c8553d")
        score.annotate(f"{evaluated[-1][1]:.3f}", evaluated[-1], textcoords="offset points", xytext=(-4, 6), ha="right")
        score.set(title="validation CER", ylim=(0, 1.15 * max(cer for _, cer in evaluated) or 1))  # room for the number
    else:
        score.plot(steps, [row.grad_norm for row in rows], color="#c8553d", linewidth=0.8)
        score.set(title="gradient norm", yscale="log")
    rate.plot(steps, [row.lr for row in rows], color="#5b8c5a")
    rate.set(title="learning rate", xlabel="step")
    speed.plot(steps, [row.audio_sec_per_sec for row in rows], color="#86608e", linewidth=0.8)
    speed.set(title="audio-seconds per second", xlabel="step", ylim=(0, None))
    for axes in (loss, score, rate, speed):
        axes.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_inside(path, picture.getvalue())


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _cells(row: StepRow) -> list[object]:
    """Return the cells of a row in full precision: the `repr` of a float reads back as the same float."""
    return ["" if value is None else repr(value) for value in asdict(row).values()]


def render_run(run_dir: Path) -> str:
    """Return the closing screen of a run: its score before and after, some hypotheses, and the paths of its files."""
    if (run_dir / RESULT_NAME).is_file() and not (run_dir / SCORECARD).exists():
        return _render_unscored(run_dir)
    card, clips = read_scorecard(run_dir)
    before, page = run_dir / "before.json", run_dir / "scorecard.html"
    cer_before = f"{read_rate(before):.3f}" if before.is_file() else "?"
    result = f"\n  {read_result(run_dir)}" if (run_dir / RESULT_NAME).is_file() else ""
    samples = "\n".join(
        f"    {clip.utterance_id}\n      reference   {clip.reference}\n      hypothesis  {clip.hypothesis}"
        for clip in clips[:: max(1, len(clips) // 4)][:4]
    )
    return f"""
  CER {card["cer"]:.4f}, {render_interval(card)}; before training {cer_before}
  ({counted(card["clips"], "clip")} of split {card["split"]}){result}

  A few transcriptions
{samples}

  Curves       {run_dir / "curves.png"}
  Every step   {run_dir / "log.csv"}      tensorboard --logdir {run_dir / "tensorboard"}
  Scorecard    {page if page.is_file() else run_dir / "scorecard.json"}
  Model        {run_dir / "best"}      (Transformers: AutoModelForCTC.from_pretrained, or pipeline)

  Next, with a corpus of your own (after `source .venv/bin/activate`)
    streamtrain transcribe {run_dir / "best"} some.flac --out out.jsonl
    streamtrain build data/raw/* --out data/shards
    streamtrain train --config zero2
"""


def _render_unscored(run_dir: Path) -> str:
    return f"""
  {read_result(run_dir)}

  Curves       {run_dir / "curves.png"}
  Every step   {run_dir / "log.csv"}      tensorboard --logdir {run_dir / "tensorboard"}
  Model        {run_dir / "best"}

  Next, on a shard set of other speakers, built with --valid-fraction 1
    streamtrain evaluate --model {run_dir / "best"} --shards SHARDS --out {run_dir}
"""
