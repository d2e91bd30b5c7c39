"""The scorecard as one page that opens without a network: pictures and sounds are inside it."""

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
SHOWN_SYMBOLS = 45  # of the confusion matrix, the most frequent
SHOWN_CHILDREN = 60
NOTHING, OTHERS = "∅", "others"
TITLES = {"corpus": "Corpus", "age_bucket": "Age", "duration": "Duration", "label_length": "Symbols of the label"}

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
.text { font-size: 1.05rem; } .text span { display: inline-block; width: 4.2rem; color: #66757f; font-size: .85rem; }
audio { height: 2rem; margin-top: .3rem; } img { max-width: 100%; }
"""


def write_page(
    card: Mapping[str, Any],
    clips: Sequence[ClipScore],
    sounds: Mapping[str, Sequence[bytes]],
    path: Path,
    comparison: Comparison | None = None,
) -> None:
    """Write the page. `sounds` are the FLAC pieces of the worst clips, by their id, as far as they could be read."""
    said, heard, counts = confusion_matrix(count_confusions(clips, card["track"]))
    changed = _comparison(comparison) if comparison else ""
    write_inside(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scorecard of {escape(str(card["model"]))}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Scorecard</h1>
<div class="sub">{_context(card)}</div>
{"".join(f'<div class="warn">{escape(line)}</div>' for line in warnings(dict(card)))}
<div class="tiles">{_tiles(card)}</div>
{changed}
<div class="columns">{"".join(_group(TITLES[name], card, name) for name in TITLES)}</div>
{_children(card)}
<h2>Which symbols are taken for which</h2>
<div class="note">Of each symbol that was said (a row), how often each was heard (a column), on a logarithmic scale;
{NOTHING}: not heard, or heard where nothing was said. {_tell_shown([*said, *heard])}</div>
<img alt="confusion matrix" src="{_png(lambda figure: draw_confusions(figure, said, heard, counts), (9.6, 9.0))}">
<div class="columns"><div>{_most_confused(card)}</div><div>{_calibration(card)}</div></div>
<h2>The {len(card["worst"])} worst clips</h2>
<div class="note">Those with most edits: listen before you blame the model.</div>
{"".join(_clip(clip, sounds.get(clip["utterance_id"], ())) for clip in card["worst"])}
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
    for name, said in (("child", "mean of the children"), ("corpus", "mean of the corpora")):
        macro = card["macro"][name]
        tiles.append((f"CER, {said}", f"{macro['cer']:.4f}", _interval(macro["interval_95"])))
    kinds = f"{card['substitutions']:,} taken for others, {card['deletions']:,} missed, {card['insertions']:,} made up"
    tiles.append(("edits", f"{card['edits']:,}", f"÷ {card['reference_length']:,} symbols; {kinds}"))
    lost = card["validation"].get("rejected", 0)
    tiles.append(("clips", f"{card['clips']:,}", f"{lost:,} rejected at the build; {len(card['undecodable'])} unread"))
    return "".join(
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b><span>{escape(said)}</span></div>'
        for title, value, said in tiles
    )


def _interval(interval: Sequence[float] | None) -> str:
    return f"95 %: {_range(interval)}" if interval else "no interval: too few children"


def _range(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """Cells are HTML; all but the first `right` columns stand to the right."""
    side = [""] * right + [' class="r"'] * (len(head) - right)
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
    return f"<h2>Children</h2><details><summary>{len(rows):,} of them{more}</summary>{table}</details>"


def _most_confused(card: Mapping[str, Any]) -> str:
    cells = [
        (_symbol(row["reference"]), _symbol(row["hypothesis"]), f"{row['count']:,}") for row in card["confusions"][:15]
    ]
    return "<h2>Most frequent edits</h2>" + _table(("said", "heard", "times"), cells, 2)


def _symbol(symbol: str) -> str:
    return {"": NOTHING, " ": "␣"}.get(symbol, escape(symbol))


def _calibration(card: Mapping[str, Any]) -> str:
    cells = [
        (escape(row["name"]), f"{row['confidence']:.3f}", f"{row['accuracy']:.3f}", f"{row['clips']:,}")
        for row in card["calibration"]
    ]
    return (
        "<h2>Does it know when it is right?</h2>"
        + _table(("confidence", "its mean", "1 − CER", "clips"), cells)
        + '<div class="note">Where the two agree, its confidence can be believed.</div>'
    )


def _clip(clip: Mapping[str, Any], pieces: Sequence[bytes]) -> str:
    inside = (base64.b64encode(piece).decode() for piece in pieces)
    sounds = "".join(f'<div><audio controls src="data:audio/flac;base64,{data}"></audio></div>' for data in inside)
    counts = clip["counts"]
    edits = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    sounds = sounds or '<div class="note">Its audio is too long for this page, or could not be read.</div>'
    return f"""<div class="clip"><code>{escape(clip["utterance_id"])}</code>
<span class="sub">{edits:,} edits ÷ {counts["reference_length"]:,} symbols, {clip["seconds"]:.2f} s,
confidence {clip["confidence"]:.2f}, {escape(clip["corpus"])}, {escape(clip["age_bucket"] or "age unknown")}</span>
<div class="text"><span>label</span>{escape(clip["reference"]) or NOTHING}</div>
<div class="text"><span>heard</span>{escape(clip["hypothesis"]) or NOTHING}</div>{sounds}</div>"""


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
    return (
        f"<h2>Beside {escape(comparison.other)}</h2><div class='note'>Difference of the CER, this model's minus the "
        "other's, on the same clips, with an interval over the children of both at once.</div>"
        + _table(("by", "", "other", "this", "difference", "95 %"), rows, 2)
        + "<h2>Clips that changed most</h2>"
        + _table(("clip", "label", "other", "this", "edits"), clips, 4)
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
    """Return the symbols that were said, those that were heard, and how often each was for each, (said, heard).

    The most frequent have a row and a column, if they have anything in it, and so have all `OTHERS` together.
    """
    seen: Counter[str] = Counter()
    for pair, count in confusions.items():
        seen.update(dict.fromkeys(filter(None, pair), count))
    names = [symbol for symbol, _ in seen.most_common(SHOWN_SYMBOLS)] + [OTHERS, ""]
    place = {symbol: number for number, symbol in enumerate(names)}
    matrix = np.zeros((len(names), len(names)))
    for (reference, heard), count in confusions.items():
        matrix[place.get(reference, place[OTHERS]), place.get(heard, place[OTHERS])] += count
    rows, columns = np.flatnonzero(matrix.any(axis=1)), np.flatnonzero(matrix.any(axis=0))
    return [names[row] for row in rows], [names[column] for column in columns], matrix[np.ix_(rows, columns)]


def draw_confusions(figure: Any, said: Sequence[str], heard: Sequence[str], counts: Floats) -> None:
    """The matrix, each row a share of how often its symbol was said; of what was made up, a share of all."""
    from matplotlib.colors import LogNorm

    of_each = counts.sum(axis=1)
    every = sum(of_each[row] for row, symbol in enumerate(said) if symbol)
    times = np.array([of_each[row] if symbol else every for row, symbol in enumerate(said)])
    shares = counts / np.maximum(times, 1)[:, None]
    axes = figure.subplots()
    picture = axes.imshow(np.where(shares > 0, shares, np.nan), norm=LogNorm(1e-3, 1), cmap="Blues")
    axes.set_xticks(range(len(heard)), map(_name_symbol, heard))
    axes.set_yticks(range(len(said)), map(_name_symbol, said))
    axes.tick_params(length=0, labelsize=8, labeltop=True)
    axes.set(xlabel="heard", ylabel="said")
    axes.set_xticks(np.arange(len(heard) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(said) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(picture, ax=axes, shrink=0.6, label="share of the times it was said")


def _name_symbol(symbol: str) -> str:
    return {" ": "␣", "": NOTHING}.get(symbol, symbol)


def _tell_shown(symbols: Iterable[str]) -> str:
    """Say how many symbols the matrix has, and whether these are all."""
    own = set(symbols) - {"", OTHERS}
    frequent = f"The {len(own)} most frequent symbols, and all others together."
    return frequent if OTHERS in symbols else f"All {len(own)} symbols."
