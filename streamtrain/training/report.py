"""Write the report of a run as one HTML page: its settings, data, curves, epochs, samples and machines."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from sharding.errors import StreamtrainError, counted
from sharding.files.document import DocumentError, parse, read_document
from sharding.files.writing import write_inside
from streamtrain.config import METRICS, SECTIONS, name_score
from streamtrain.eval.html import render_duration, render_template
from streamtrain.eval.scorecard import SCORECARD, read_scorecard, render_interval
from streamtrain.run_status import RESULT_NAME, read_result
from streamtrain.training.curves import Curves
from streamtrain.training.environment import Start, read_starts
from streamtrain.training.run_log import read_before, read_log, read_settings
from streamtrain.training.step_row import StepRow

REPORT = "report.html"
SAMPLES_SHOWN = 12
PANELS = ("loss", "scores", "learning rate", "throughput")
_DATA = TypeAdapter(dict[str, str | int | float | None])

Facts = list[tuple[str, str]]  # a name and a value each


class EpochRow(NamedTuple):
    """Hold the sums and means of the steps of an epoch, and its last scores, as in log.csv."""

    epoch: int
    steps: int  # done when it ended
    loss: float  # mean of its steps, without those that were skipped
    scores: dict[str, float]  # of its last evaluation, by name
    lr: float  # of its last step
    hours: float  # of speech
    seconds: float  # with its evaluations
    best: bool  # whether the best model is of one of its steps


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Raises StreamtrainError if there is no log."""
    rows = read_log(run / "log.csv")
    if not rows:
        raise StreamtrainError(f"{run}: has no steps in log.csv", "name the folder of a run, such as runs/zero2")
    settings, before, starts = read_settings(run), read_before(run), read_starts(run)
    select = str(settings.get("eval", {}).get("select", "cer"))
    result = read_result(run) if (run / RESULT_NAME).is_file() else None
    card, clips = read_scorecard(run) if (run / SCORECARD).is_file() else ({}, [])
    epochs = list(_epochs(rows, result.best_step if result else None))
    titles = {"loss": "evaluation loss"} | {name: name_score(name) for name in METRICS}
    titles |= {"score": name_score(select)} if "/" in select else {}
    page = render_template(
        "report.html",
        run=run.resolve().name,
        verdict=str(result or "has not finished"),
        tiles=_tiles(rows, epochs, card),
        changed=list(_changed(settings)),
        data=_data(run, card),
        curves=list(zip(PANELS, Curves(rows, before, select).svgs(), strict=True)),
        before=before | ({"score": before[select]} if select in before else {}),
        score_names={name: title for name, title in titles.items() if any(name in row.scores for row in epochs)},
        epochs=epochs,
        step=card.get("step"),
        samples=clips[:: max(1, len(clips) // SAMPLES_SHOWN)][:SAMPLES_SHOWN],
        model=_model(settings, starts),
        evaluations=[_evaluation(path.parent) for path in sorted(run.glob(f"*/{SCORECARD}"))],
        starts=[_describe(start) for start in starts],
    )
    write_inside(run / REPORT, page)
    return run / REPORT


def _epochs(rows: Sequence[StepRow], best_step: int | None) -> Iterator[EpochRow]:
    for epoch, steps in groupby(rows, lambda row: row.epoch):
        of_epoch = list(steps)
        scored = [row for row in of_epoch if row.scored][-1:]
        scores = {name: getattr(row, f"eval_{name}") for row in scored for name in (*METRICS, "loss", "score")}
        yield EpochRow(
            epoch=epoch + 1,
            steps=of_epoch[-1].step,
            loss=fmean(losses) if (losses := [row.loss for row in of_epoch if math.isfinite(row.loss)]) else math.nan,
            scores={name: score for name, score in scores.items() if score is not None},
            lr=of_epoch[-1].lr,
            hours=sum(row.audio_sec_per_sec * row.seconds for row in of_epoch) / 3600,
            seconds=sum(row.seconds + (row.eval_runtime or 0) for row in of_epoch),
            best=best_step in {row.step for row in of_epoch},
        )


def _tiles(rows: Sequence[StepRow], epochs: Sequence[EpochRow], card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures on top of the page: a title, a value and a note each."""
    steps, evaluations = sum(row.seconds for row in rows), sum(row.eval_runtime or 0 for row in rows)
    hours = sum(row.hours for row in epochs)
    wait = sum(row.data_wait * row.seconds for row in rows) / max(steps, 1e-9)
    tiles = []
    if card:
        metric = card["metric"]
        tiles.append((metric.upper(), f"{card[metric]:.4f}", render_interval(dict(card))))
        if card["units"] != "tokens":
            tiles.append(("WER", f"{card['wer']:.4f}", f"of best/, on split {card['split']}"))
    tiles += [
        ("training loss", f"{rows[-1].loss:.4f}", "nats per symbol, last step"),
        (
            "steps",
            f"{rows[-1].step:,}",
            f"{counted(len(epochs), 'epoch')}, {sum(row.skipped for row in rows):,} skipped",
        ),
        (
            "wall time",
            render_duration(steps + evaluations),
            f"{render_duration(evaluations)} in evaluations, the rest in steps",
        ),
        (
            "throughput",
            f"{3600 * hours / max(steps, 1e-9):,.0f} ×",
            f"real time: {hours:,.2f} h of speech; {wait:.1%} waiting",
        ),
    ]
    return tiles


def _changed(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, value and default of each setting that differs from its default; all of DeepSpeed's."""
    defaults = {name: section.model_fields for name, section in SECTIONS.items()}
    for section, values in settings.items():
        for key, value in values.items():
            known = key in defaults.get(section, {})
            default = defaults[section][key].get_default() if known else None
            if value != default:
                yield f"{section}.{key}", json.dumps(value, ensure_ascii=False), json.dumps(default) if known else ""


def _data(run: Path, card: Mapping[str, Any]) -> Facts:
    """Return what is known of the data that a run trained on and was scored on."""
    try:
        known = parse(read_document(run / "trained_on.json"), _DATA)
    except (OSError, DocumentError):
        known = {}
    titles = {"shards": "shard set", "index": "its index", "labels": "labels", "clips": "clips",
              "hours": "hours of speech", "of_hours": "hours in its training split"}  # fmt: skip
    facts = [
        (title, value if isinstance(value, str) else f"{value:,}")
        for name, title in titles.items()
        if (value := known.get(name)) is not None
    ]
    if card:
        clips = f"{counted(card['clips'], 'clip')} of split {card['split']}, {counted(card['speakers'], 'speaker')}"
        facts.append(("scored on", clips))
    return facts


def _model(settings: Mapping[str, Mapping[str, Any]], starts: Sequence[Start]) -> Facts:
    """Return what is known of the model that was trained."""
    model = settings.get("model", {})
    facts = [("pretrained", str(model.get("pretrained") or "nothing: trained from scratch"))]
    for start in starts[-1:]:
        if start.parameters:
            facts.append(("parameters", f"{start.parameters:,}, {start.trained:,} of them trained"))
        if start.vocabulary:
            facts.append(("vocabulary", start.vocabulary))
    return facts


def _evaluation(folder: Path) -> tuple[str, str, str, str, str]:
    """Return the folder, the split, the score, its interval and the clips of an evaluation below the run's folder."""
    try:
        card, _ = read_scorecard(folder)
    except StreamtrainError:
        return folder.name, "", "", "cannot be read", ""
    score = f"{card['metric'].upper()} {card[card['metric']]:.4f}"
    return folder.name, card["split"], score, render_interval(card), f"{card['clips']:,}"


def _describe(start: Start) -> Facts:
    def count(names: Mapping[str, int]) -> str:
        return ", ".join(f"{number} × {name}" if number > 1 else name for name, number in names.items())

    versions = ", ".join(f"{name} {number}" for name, number in start.versions.items())
    facts = [("started", f"{start.time}, at step {start.step:,}"), ("ranks", f"{start.ranks:,}"),
             ("GPUs", count(start.gpus) or "none: on CPU"), ("machines", count(start.machines))]  # fmt: skip
    return [*facts, ("versions", versions)]
