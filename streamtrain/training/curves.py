"""Draw a run's log: loss, scores, learning rate and throughput over the steps."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from streamtrain.config import METRICS, name_score
from streamtrain.training.step_row import StepRow

TRAINED, SCORED = "#33658a", "#c8553d"
COLOURS = {"cer": SCORED, "wer": "#86bbd8", "per": "#5b8c5a", "score": "#22303c"}
MAX_POINTS = 2_000  # of a curve in the report: more cannot be told apart


class Curves:
    """Draw the four panels, together as a PNG or each as an SVG. `before` has the metrics before training, by name."""

    def __init__(self, rows: Sequence[StepRow], before: Mapping[str, float], select: str) -> None:
        self._rows, self._before, self._select = rows, before, select

    def png(self) -> bytes:
        """Return one picture of all panels."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 6), layout="constrained")
        for panel, axes in zip(self._panels(self._rows), figure.subplots(2, 2).flat, strict=True):
            panel(axes)
        return _save(figure, format="png", dpi=120)

    def svgs(self) -> list[bytes]:
        """Return a picture of each panel, its text drawn as shapes, so that it needs no font."""
        from matplotlib.figure import Figure

        pictures = []
        rows = [row for i, row in enumerate(self._rows) if i % (len(self._rows) // MAX_POINTS + 1) == 0 or row.scored]
        for panel in self._panels(rows):
            figure = Figure(figsize=(5.2, 2.9), layout="constrained")
            panel(figure.subplots())
            pictures.append(_save(figure, format="svg", metadata={"Date": None}))
        return pictures

    def _panels(self, rows: Sequence[StepRow]) -> list[Any]:
        scored = any(row.eval_cer is not None or row.eval_per is not None for row in rows)
        draws = [_draw_losses, _draw_scores if scored else _draw_norms, _draw_rates, _draw_speed]
        return [partial(draw, rows, self._before, self._select) for draw in draws]


def _draw_losses(rows: Sequence[StepRow], before: Mapping[str, float], select: str, axes: Any) -> None:
    axes.plot(*_series(rows, "loss"), color=TRAINED, linewidth=0.8, label="training")
    steps, losses = _series(rows, "eval_loss", before.get("loss"))
    if losses:
        axes.plot(steps, losses, marker="o", markersize=4, color=SCORED, label="evaluation")
        axes.legend(frameon=False)
    _finish(axes, title="loss, nats per symbol", yscale="log")


def _draw_scores(rows: Sequence[StepRow], before: Mapping[str, float], select: str, axes: Any) -> None:
    chosen = {"score": select} if "/" in select else {}
    highest = 0.0
    for name, key in ({metric: metric for metric in METRICS} | chosen).items():
        steps, rates = _series(rows, f"eval_{name}", before.get(key))
        if rates:
            label = f"{name_score(key)}, last {rates[-1]:.3f}"
            axes.plot(steps, rates, marker="o", markersize=4, color=COLOURS[name], label=label)
            highest = max(highest, *rates)
    axes.legend(frameon=False)
    _finish(axes, title="scores", ylim=(0, 1.05 * highest or 1))


def _draw_norms(rows: Sequence[StepRow], before: Mapping[str, float], select: str, axes: Any) -> None:
    axes.plot(*_series(rows, "grad_norm"), color=SCORED, linewidth=0.8)
    _finish(axes, title="gradient norm", yscale="log")


def _draw_rates(rows: Sequence[StepRow], before: Mapping[str, float], select: str, axes: Any) -> None:
    axes.plot(*_series(rows, "lr"), color="#5b8c5a")
    _finish(axes, title="learning rate", xlabel="step")


def _draw_speed(rows: Sequence[StepRow], before: Mapping[str, float], select: str, axes: Any) -> None:
    axes.plot(*_series(rows, "audio_sec_per_sec"), color="#86608e", linewidth=0.8)
    _finish(axes, title="audio-seconds per second", xlabel="step", ylim=(0, None))


def _series(rows: Sequence[StepRow], name: str, before: float | None = None) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a column, where it has some, after that of step 0, if given."""
    points = [] if before is None else [(0, before)]
    points += [(row.step, value) for row in rows if (value := getattr(row, name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _finish(axes: Any, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(alpha=0.25)


def _save(figure: Any, **settings: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, **settings)
    return picture.getvalue()
