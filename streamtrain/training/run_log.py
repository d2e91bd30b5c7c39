"""Log a run: a progress bar with ETA, `log.csv`, TensorBoard events, `curves.png`, `samples.txt`; and how it ended."""

import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from sharding.errors import StreamtrainError, counted
from sharding.files.document import DocumentError, parse, read_document
from sharding.files.writing import append, explaining, write_inside
from streamtrain.config import load_config, name_score
from streamtrain.eval.scorecard import SCORECARD, Evaluation, read_metrics, read_scorecard, render_interval
from streamtrain.run_status import RESULT_NAME, read_result
from streamtrain.training.curves import Curves
from streamtrain.training.step_row import StepRow

LINE_EVERY_SEC = 60.0  # if the output is not a terminal
SAMPLES_SHOWN = 8
SILENT_MODEL = (
    "  all hypotheses are empty (blank), as usual for CTC at first; if this lasts, raise the learning rate, lengthen "
    "train.warmup_steps, lower model.dropout"
)
RANKS_SHOWN = 64  # in TensorBoard
BEFORE = "before.json"  # scores before the first step


_SETTINGS = TypeAdapter(dict[str, dict[str, Any]])


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
    """Write the log of a run, on rank 0. Rows of steps that a resumed run will repeat are dropped.

    `select` is the run's `eval.select`; if it was another before, `reselected`, earlier scores by it are dropped too.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, done_steps: int, select: str = "cer", reselected: bool = False
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder = run_dir
        self._log = run_dir / "log.csv"
        self._select = select
        self.rows = [row for row in read_log(self._log) if row.step <= done_steps]
        if reselected:
            self.rows = [replace(row, eval_score=None) for row in self.rows]
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
        shown = {name: value for name, value in asdict(row).items() if name != "step" and not name.startswith("eval_")}
        self._draw({f"train/{name}": value for name, value in shown.items()}, row.step)
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

    def evaluated(self, step: int, evaluation: Evaluation, epoch: float, seconds: float) -> None:
        """Log an evaluation after `epoch` epochs that took `seconds`."""
        metrics, clips = evaluation.metrics, evaluation.clips
        scores = metrics | {self._select: evaluation.score(self._select)}
        text = ", ".join(f"{name_score(name)} {score:.4f}" for name, score in scores.items() if score is not None)
        self.message(f"step {step}: {text} on {counted(len(clips), 'clip')}")
        self.message(_trainer_line(metrics, len(clips), epoch, seconds))
        if not any(clip.hypothesis for clip in clips):
            self.message(SILENT_MODEL)
        if self.rows and self.rows[-1].step == step:
            values: dict[str, Any] = {f"eval_{name}": value for name, value in metrics.items()}
            score = scores[self._select]
            self.rows[-1] = replace(self.rows[-1], **values, eval_score=score, eval_runtime=seconds)
            self._rewrite()
            self.draw_curves()
        elif step == 0:
            known = {name: score for name, score in scores.items() if score is not None}
            write_inside(self._folder / BEFORE, json.dumps(known))
        self._draw({f"valid/{name}": score for name, score in scores.items() if score is not None}, step)
        self._drop_samples_from(step)  # a run may be resumed at a step that was already scored
        shown = clips[:: max(1, len(clips) // SAMPLES_SHOWN)][:SAMPLES_SHOWN]
        texts = "".join(f"reference   {clip.reference}\nhypothesis  {clip.hypothesis}\n\n" for clip in shown)
        metric = evaluation.labels.metric
        append(self._folder / "samples.txt", f"--- step {step}, {metric.upper()} {metrics[metric]:.4f}\n{texts}")

    def draw_curves(self) -> None:
        write_inside(self._folder / "curves.png", Curves(self.rows, read_before(self._folder), self._select).png())

    def message(self, line: str) -> None:
        self._bar.write(line)
        sys.stdout.flush()  # a pipe holds lines back, and who reads it waits for them

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


def _trainer_line(metrics: Mapping[str, float], clips: int, epoch: float, seconds: float) -> str:
    """Return the scores as Transformers' Trainer prints them, which services such as SageMaker read.

    Their patterns take no number such as 1.5e-05, which Python prints from the fifth decimal on.
    """
    values = {f"eval_{name}": metrics[name] for name in ("loss", "wer", "per", "cer") if name in metrics}
    values |= {"eval_runtime": seconds, "eval_samples_per_second": clips / max(seconds, 1e-9), "epoch": epoch}
    return str({name: round(float(value), 4) for name, value in values.items()})


def read_before(run: Path) -> dict[str, float]:
    """Return the scores of a run before its first step, by name; {} if it has none."""
    return read_metrics(run / BEFORE) if (run / BEFORE).is_file() else {}


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
    before, page = read_before(run_dir), run_dir / "scorecard.html"
    metric = card["metric"]
    scores = [
        f"{metric.upper()} {card[metric]:.4f}, {render_interval(card)}; before training {_rate(before, metric)}",
        *([f"WER {card['wer']:.4f}; before training {_rate(before, 'wer')}"] if card["units"] != "tokens" else []),
    ]
    others = "".join(f"\n  {line}" for line in _other_scores(run_dir))
    result = f"\n  {read_result(run_dir)}" if (run_dir / RESULT_NAME).is_file() else ""
    samples = "\n".join(
        f"    {clip.utterance_id}\n      reference   {clip.reference}\n      hypothesis  {clip.hypothesis}"
        for clip in clips[:: max(1, len(clips) // 4)][:4]
    )
    return f"""
  {f"{chr(10)}  ".join(scores)}
  ({counted(card["clips"], "clip")} of split {card["split"]}){result}{others}

  A few transcriptions
{samples}

  Curves       {run_dir / "curves.png"}
  Every step   {run_dir / "log.csv"}      tensorboard --logdir {run_dir / "tensorboard"}
  Scorecard    {page if page.is_file() else run_dir / "scorecard.json"}
  Model        {run_dir / "best"}      (Transformers: AutoModelForCTC.from_pretrained, or pipeline)
{_after_the_demo(run_dir)}"""


def _rate(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else "?"


def _after_the_demo(run_dir: Path) -> str:
    """Return what to do next if the run is of the demo's model, else nothing."""
    settings = read_settings(run_dir)
    demo = load_config("demo")
    if settings.get("model", {}).get("scratch") != demo.model.scratch or (
        settings.get("data", {}).get("shards") != demo.data.shards
    ):
        return ""
    return f"""
  Next, with a corpus of your own (after `source .venv/bin/activate`)
    streamtrain transcribe {run_dir / "best"} some.flac --out out.jsonl
    streamtrain build data/raw/* --out data/shards
    streamtrain train --config zero2
"""


def read_settings(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's configuration; {} if it cannot be read."""
    try:
        return parse(read_document(run_dir / "config.json"), _SETTINGS)
    except (OSError, DocumentError):
        return {}


def _other_scores(run_dir: Path) -> Iterator[str]:
    """Yield a line for each evaluation in a folder of the run's, such as of its test."""
    for path in sorted(run_dir.glob(f"*/{SCORECARD}")):
        with suppress(StreamtrainError):  # the report names what cannot be read
            card, _ = read_scorecard(path.parent)
            metric = card["metric"]
            score = f"{metric.upper()} {card[metric]:.4f} of split {card['split']}"
            yield f"{score}, {render_interval(card)}: {path.parent}"


def _render_unscored(run_dir: Path) -> str:
    return f"""
  {read_result(run_dir)}

  Curves       {run_dir / "curves.png"}
  Every step   {run_dir / "log.csv"}      tensorboard --logdir {run_dir / "tensorboard"}
  Model        {run_dir / "best"}

  Next, on a shard set of other speakers, built with --valid-fraction 1
    streamtrain evaluate --model {run_dir / "best"} --shards SHARDS --out {run_dir}
"""
