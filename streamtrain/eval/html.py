"""Write the scorecard as one HTML page that opens without a network: images and audio are embedded."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sharding.files.writing import write_inside
from streamtrain.eval.compare import Comparison
from streamtrain.eval.metrics import Floats
from streamtrain.eval.scorecard import ClipScore, count_confusions, render_interval, warnings

INK, BLUE, RED, GRID = "#22303c", "#33658a", "#c8553d", "#d9dee3"
SHOWN_SYMBOLS = 45  # the most frequent, in the confusion matrix
SHOWN_CHILDREN = 60
NOTHING, OTHERS = "∅", "others"
TITLES = {"corpus": "Corpus", "age_bucket": "Age", "duration": "Duration", "label_length": "Label length in symbols"}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; max-width: 68rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .6rem; }
.sub, .note { color: #66757f; } .note { font-size: .88rem; margin: .2rem 0 .8rem; }
.tiles { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.4rem 0; }
.tile { border: 1px solid #d9dee3; border-radius: 8px; padding: .7rem 1.1rem; min-width: 9rem; }
.tile b { display: block; font-size: 1.6rem; font-weight: 600; } .tile span { color: #66757f; font-size: .85rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(29rem, 1fr)); gap: 0 2.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: #66757f; font-size: .85rem; border-bottom: 1px solid #d9dee3; }
td, th { padding: .22rem .5rem .22rem 0; vertical-align: top; } .r { text-align: right; white-space: nowrap; }
.bar { width: 9rem; } .bar div { position: relative; height: .7rem; background: #eef1f4; margin-top: .45rem; }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; background: #33658a; }
.bar u { position: absolute; top: .3rem; height: .12rem; background: #c8553d; }
.warn { border-left: 4px solid #c8553d; background: #fdf3f0; padding: .5rem .9rem; margin: .4rem 0; }
.clip { border-top: 1px solid #d9dee3; padding: .6rem 0; } .clip code { font-size: .85rem; color: #66757f; }
.text { font-size: 1.05rem; } .text span { display: inline-block; width: 5.4rem; color: #66757f; font-size: .85rem; }
audio { height: 2rem; margin-top: .3rem; } img { max-width: 100%; }
"""


def write_page(
    card: Mapping[str, Any],
    clips: Sequence[ClipScore],
    clip_audio: Mapping[str, Sequence[bytes]],
    path: Path,
    comparison: Comparison | None = None,
) -> None:
    """Write the page. `clip_audio` has the FLAC pieces of the worst clips by id, if they could be read."""
    rows, columns, counts = confusion_matrix(count_confusions(clips, card["track"]))
    compared = _comparison(comparison) if comparison else ""
    write_inside(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scorecard of {escape(str(card["model"]))}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Scorecard</h1>
<div class="sub">{_context(card)}</div>
{"".join(f'<div class="warn">{escape(line)}</div>' for line in warnings(dict(card)))}
<div class="tiles">{_tiles(card)}</div>
{compared}
<div class="columns">{"".join(_group(TITLES[name], card, name) for name in TITLES)}</div>
{_children(card)}
<h2>Symbol confusions</h2>
<div class="note">How often each reference symbol (row) became each hypothesis symbol (column), on a logarithmic scale;
{NOTHING}: a deletion (column) or an insertion (row). {_shown_symbols_note([*rows, *columns])}</div>
<img alt="confusion matrix" src="{_png(lambda figure: draw_confusions(figure, rows, columns, counts), (9.6, 9.0))}">
<div class="columns"><div>{_most_confused(card)}</div><div>{_calibration(card)}</div></div>
<h2>The {len(card["worst"])} worst clips</h2>
<div class="note">Those with the most edits: listen before you blame the model.</div>
{"".join(_clip(clip, clip_audio.get(clip["utterance_id"], ())) for clip in card["worst"])}
</body></html>
""",
    )


def _context(card: Mapping[str, Any]) -> str:
    step = f", step {card['step']:,}" if "step" in card else ""
    track = {"phonetic": "phones", "word": "letters"}[card["track"]]
    return escape(f"{card['model']}{step} on split “{card['split']}” of {card['shards']}; {track}")


def _tiles(card: Mapping[str, Any]) -> str:
    tiles = [("CER, pooled", f"{card['cer']:.4f}", render_interval(dict(card)))]
    if "wer" in card:
        tiles.append(("WER", f"{card['wer']:.4f}", f"{card['word_edits']:,} edits ÷ {card['reference_words']:,} words"))
    for name, note in (("child", "mean over children"), ("corpus", "mean over corpora")):
        macro = card["macro"][name]
        tiles.append((f"CER, {note}", f"{macro['cer']:.4f}", _interval(macro["interval_95"])))
    kinds = f"{card['substitutions']:,} substituted, {card['deletions']:,} deleted, {card['insertions']:,} inserted"
    tiles.append(("edits", f"{card['edits']:,}", f"÷ {card['reference_length']:,} symbols; {kinds}"))
    lost = card["validation"].get("rejected", 0)
    tiles.append(("clips", f"{card['clips']:,}", f"{lost:,} rejected by the build; {len(card['undecodable'])} unread"))
    return "".join(
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for title, value, note in tiles
    )


def _interval(interval: Sequence[float] | None) -> str:
    return f"95 %: {_range(interval)}" if interval else "no interval: too few children"


def _range(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table of HTML cells; all but the first `left` columns are right-aligned."""
    side = [""] * left + [' class="r"'] * (len(head) - left)
    titles = "".join(f"<th{place}>{escape(title)}</th>" for place, title in zip(side, head, strict=True))
    body = ("".join(f"<td{place}>{cell}</td>" for place, cell in zip(side, row, strict=True)) for row in rows)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _group(title: str, card: Mapping[str, Any], name: str) -> str:
    rows = card["groups"][name]
    most = max([row["cer"] for row in rows] + [(row["interval_95"] or [0, 0])[1] for row in rows] + [1e-9])
    macro = card["macro"][name]
    cells = [
        (escape(row["name"] or "unknown"), _bar(row, most), f"{row['cer']:.4f}", _range(row["interval_95"]),
         f"{row['clips']:,}", f"{row['children']:,}")
        for row in rows
    ]  # fmt: skip
    return (
        f"<div><h2>{escape(title)}</h2>"
        + _table(("", "", "CER", "95 %", "clips", "children"), cells, 2)
        + f'<div class="note">mean of the groups {macro["cer"]:.4f}, {_interval(macro["interval_95"])}</div></div>'
    )


def _bar(row: Mapping[str, Any], most: float) -> str:
    low, high = row["interval_95"] or (0, 0)
    span = f'<u style="left:{100 * low / most:.1f}%;width:{100 * (high - low) / most:.1f}%"></u>' if high else ""
    return f'<div class="bar"><div><i style="width:{100 * row["cer"] / most:.1f}%"></i>{span}</div></div>'


def _children(card: Mapping[str, Any]) -> str:
    rows = sorted(card["by_child"], key=lambda row: -row["cer"])
    cells = [
        (f"<code>{escape(row['name'])}</code>", f"{row['cer']:.4f}", f"{row['edits']:,}",
         f"{row['reference_length']:,}", f"{row['clips']:,}")
        for row in rows[:SHOWN_CHILDREN]
    ]  # fmt: skip
    more = f", the {SHOWN_CHILDREN} with the highest CER" if len(rows) > SHOWN_CHILDREN else ""
    table = _table(("child", "CER", "edits", "symbols", "clips"), cells)
    return f"<h2>Children</h2><details><summary>{len(rows):,} children{more}</summary>{table}</details>"


def _most_confused(card: Mapping[str, Any]) -> str:
    cells = [
        (_symbol(row["reference"]), _symbol(row["hypothesis"]), f"{row['count']:,}") for row in card["confusions"][:15]
    ]
    return "<h2>Most frequent edits</h2>" + _table(("reference", "hypothesis", "count"), cells, 2)


def _symbol(symbol: str) -> str:
    return {"": NOTHING, " ": "␣"}.get(symbol, escape(symbol))


def _calibration(card: Mapping[str, Any]) -> str:
    cells = [
        (escape(row["name"]), f"{row['confidence']:.3f}", f"{row['accuracy']:.3f}", f"{row['clips']:,}")
        for row in card["calibration"]
    ]
    return (
        "<h2>Confidence calibration</h2>"
        + _table(("confidence", "mean", "1 − CER", "clips"), cells)
        + '<div class="note">If mean confidence and 1 − CER agree, the confidence is well calibrated.</div>'
    )


def _clip(clip: Mapping[str, Any], pieces: Sequence[bytes]) -> str:
    encoded = (base64.b64encode(piece).decode() for piece in pieces)
    players = "".join(f'<div><audio controls src="data:audio/flac;base64,{data}"></audio></div>' for data in encoded)
    counts = clip["counts"]
    edits = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    players = players or '<div class="note">The audio is too long for this page or could not be read.</div>'
    return f"""<div class="clip"><code>{escape(clip["utterance_id"])}</code>
<span class="sub">{edits:,} edits ÷ {counts["reference_length"]:,} symbols, {clip["seconds"]:.2f} s,
confidence {clip["confidence"]:.2f}, {escape(clip["corpus"])}, {escape(clip["age_bucket"] or "age unknown")}</span>
<div class="text"><span>reference</span>{escape(clip["reference"]) or NOTHING}</div>
<div class="text"><span>hypothesis</span>{escape(clip["hypothesis"]) or NOTHING}</div>{players}</div>"""


def _comparison(comparison: Comparison) -> str:
    rows = [
        (TITLES.get(row.group, row.group), escape(row.name), f"{row.before:.4f}", f"{row.after:.4f}",
         f"{row.difference:+.4f}", _range(row.interval_95))
        for row in comparison.rows
    ]  # fmt: skip
    clips = [
        (f"<code>{escape(change.utterance_id)}</code>", escape(change.reference), escape(change.before),
         escape(change.after), f"{change.edits:+,}")
        for change in comparison.changed
    ]  # fmt: skip
    changed = _table(("clip", "reference", "other", "this", "edits"), clips, 4)
    return (
        f"<h2>Compared with {escape(comparison.other)}</h2><div class='note'>CER difference, this model minus the "
        "other, on the same clips; the interval resamples the same children for both.</div>"
        + _table(("by", "", "other", "this", "difference", "95 %"), rows, 2)
        + (f"<h2>Clips that changed most</h2>{changed}" if clips else "")
    )


# --- pictures -----------------------------------------------------------------------------------------------------


def _png(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


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


def draw_confusions(figure: Any, rows: Sequence[str], columns: Sequence[str], counts: Floats) -> None:
    """Draw each row as shares of its symbol's reference count; insertions as shares of all reference symbols."""
    from matplotlib.colors import LogNorm

    row_totals = counts.sum(axis=1)
    total = sum(row_totals[row] for row, symbol in enumerate(rows) if symbol)
    denominators = np.array([row_totals[row] if symbol else total for row, symbol in enumerate(rows)])
    shares = counts / np.maximum(denominators, 1)[:, None]
    axes = figure.subplots()
    image = axes.imshow(np.where(shares > 0, shares, np.nan), norm=LogNorm(1e-3, 1), cmap="Blues")
    axes.set_xticks(range(len(columns)), map(_name_symbol, columns))
    axes.set_yticks(range(len(rows)), map(_name_symbol, rows))
    axes.tick_params(length=0, labelsize=8, labeltop=True)
    axes.set(xlabel="hypothesis", ylabel="reference")
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the reference symbol's occurrences")


def _name_symbol(symbol: str) -> str:
    return {" ": "␣", "": NOTHING}.get(symbol, symbol)


def _shown_symbols_note(symbols: Iterable[str]) -> str:
    """Return a sentence on how many symbols the matrix shows, and whether these are all."""
    names = set(symbols) - {"", OTHERS}
    frequent = f"The {len(names)} most frequent symbols, and all others together."
    return frequent if OTHERS in symbols else f"All {len(names)} symbols."
