"""Write the scorecard as one HTML page that opens without a network: images and audio are embedded."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sharding.files.writing import write_inside
from sharding.labels.policy import LabelPolicy
from streamtrain.eval.compare import Comparison
from streamtrain.eval.metrics import Floats
from streamtrain.eval.scorecard import ClipScore, count_confusions, render_interval, warnings

SHOWN_SYMBOLS = 45  # the most frequent, in the confusion matrix
SHOWN_SPEAKERS = 60
NOTHING, OTHERS = "∅", "others"
TITLES = {"corpus": "Corpus", "age_bucket": "Age", "duration": "Duration", "label_length": "Label length in symbols"}


def _range(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else ""


def _name_symbol(symbol: str) -> str:
    return {" ": "␣", "": NOTHING}.get(symbol, symbol)


def render_duration(seconds: float) -> str:
    """Return a time as people read it: "1 h 05 min", "3 min 20 s", "1.5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


FILTERS: dict[str, Callable[..., str]] = {  # of the template
    "base64": lambda data: base64.b64encode(data).decode(),
    "duration": render_duration,
    "interval": lambda bounds: f"95 %: {_range(bounds)}" if bounds else "no interval: too few speakers",
    "number": "{:,}".format,
    "range": _range,
    "rate": "{:.4f}".format,
    "symbol": _name_symbol,
}


def render_template(name: str, **values: Any) -> str:
    """Return a page: a template with its values, which are escaped."""
    environment = Environment(
        loader=PackageLoader("streamtrain.eval"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= FILTERS
    return environment.get_template(name).render(**values)


def write_page(
    card: dict[str, Any],
    clips: Sequence[ClipScore],
    clip_audio: Mapping[str, Sequence[bytes]],
    path: Path,
    comparison: Comparison | None = None,
) -> None:
    """Write the page. `clip_audio` has the FLAC pieces of the worst clips by id, if they could be read."""
    labels = LabelPolicy(card["profile"], card["units"])
    rows, columns, counts = confusion_matrix(count_confusions(clips, labels))
    page = render_template(
        "scorecard.html",
        card=card,
        speakers=sorted(card["by_speaker"], key=lambda row: -row["rate"])[:SHOWN_SPEAKERS],
        clip_audio=clip_audio,
        comparison=comparison,
        confusions=_draw(rows, columns, counts),
        full_bars={name: _full_bar(groups) for name, groups in card["groups"].items()},
        interval=render_interval(card),
        metric=card["metric"].upper(),
        shown_symbols=_shown_symbols_note([*rows, *columns]),
        titles=TITLES,
        warnings=warnings(card),
    )
    write_inside(path, page)


def _full_bar(groups: Sequence[Mapping[str, Any]]) -> float:
    """Return the rate that a bar of full width stands for: the highest rate or end of an interval."""
    return float(max(1e-9, *(rate for row in groups for rate in (row["rate"], *(row["interval_95"] or ())))))


def confusion_matrix(confusions: Counter[tuple[str, str]]) -> tuple[list[str], list[str], Floats]:
    """Return the reference symbols, the hypothesis symbols and the counts, shape (references, hypotheses).

    The most frequent symbols, and all `OTHERS` together, have a row and a column each, unless it would be empty.
    """
    frequencies: Counter[str] = Counter()
    for pair, count in confusions.items():
        frequencies.update(dict.fromkeys(filter(None, pair), count))
    names = [symbol for symbol, _ in frequencies.most_common(SHOWN_SYMBOLS)] + [OTHERS, ""]
    place = {symbol: number for number, symbol in enumerate(names)}
    matrix = np.zeros((len(names), len(names)))
    for (reference, hypothesis), count in confusions.items():
        matrix[place.get(reference, place[OTHERS]), place.get(hypothesis, place[OTHERS])] += count
    rows, columns = np.flatnonzero(matrix.any(axis=1)), np.flatnonzero(matrix.any(axis=0))
    return [names[row] for row in rows], [names[column] for column in columns], matrix[np.ix_(rows, columns)]


def _draw(rows: Sequence[str], columns: Sequence[str], counts: Floats) -> bytes:
    """Return a PNG of each row as shares of its symbol's reference count; insertions of all reference symbols."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    row_totals = counts.sum(axis=1)
    total = sum(row_totals[row] for row, symbol in enumerate(rows) if symbol)
    denominators = np.array([row_totals[row] if symbol else total for row, symbol in enumerate(rows)])
    shares = counts / np.maximum(denominators, 1)[:, None]
    figure = Figure(figsize=(9.6, 9.0), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.where(shares > 0, shares, np.nan), norm=LogNorm(1e-3, 1), cmap="Blues")
    axes.set_xticks(range(len(columns)), map(_name_symbol, columns))
    axes.set_yticks(range(len(rows)), map(_name_symbol, rows))
    axes.tick_params(length=0, labelsize=8, labeltop=True)
    axes.set(xlabel="hypothesis", ylabel="reference")
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d9dee3", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the reference symbol's occurrences")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _shown_symbols_note(symbols: Iterable[str]) -> str:
    """Return a sentence on how many symbols the matrix shows, and whether these are all."""
    names = set(symbols) - {"", OTHERS}
    frequent = f"The {len(names)} most frequent symbols, and all others together."
    return frequent if OTHERS in symbols else f"All {len(names)} symbols."
