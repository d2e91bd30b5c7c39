"""Describe a shard set in tables, made of its indexes alone, and in plots, which need the audio too."""

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sharding.audio.codec import decode
from sharding.errors import AudioError, ShardError
from sharding.labels.policy import LabelPolicy
from sharding.pool import Workers, count_done
from sharding.shardset.index import ShardIndex, read_checked
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Reader, Store, open_store
from sharding.shardset.verify import check_shard

GROUPINGS = {  # table → the columns of `read_clips` to group by
    "by_split": ["split"],
    "by_bucket": ["split", "bucket", "from_sec", "to_sec"],
    "by_corpus": ["corpus"],
    "by_age": ["age_bucket"],
    "totals": ["total"],
}
COLUMNS = {  # column → its heading and number format in a terminal
    "samples": ("samples", ",.0f"),
    "speakers": ("speakers", ",.0f"),
    "hours": ("hours", ",.2f"),
    "mean_seconds": ("mean s", ".2f"),
    "symbols": ("symbols", ",.0f"),
    "symbols_per_second": ("symbols/s", ".2f"),
    "shards": ("shards", ",.0f"),
    "mb": ("MB", ",.1f"),
    "padding": ("padding", ".1%"),
}
PLOTS = ("durations.png", "symbols_per_second.png", "loudness.png", "symbols.png")
SILENCE_DB = -100.0  # replaces the -∞ of digital silence; one step of 16 bits is at -90 dB
Tables = dict[str, pd.DataFrame]


def tabulate_clips(clips: pd.DataFrame) -> Tables:
    """Return one table of totals for each of GROUPINGS.

    Samples, hours, symbols and MB of the groups sum to the total. Children and shards count in each group that has
    one of their clips, so they may sum to more. Symbols per second cover the clips that have a label of their own.
    """
    return {name: _aggregate(clips, columns) for name, columns in GROUPINGS.items()}


def _aggregate(clips: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    groups = clips.groupby(columns, observed=len(columns) > 1)  # an empty split is shown, an empty bucket is not
    sums = groups[["seconds", "labelled_seconds", "to_sec", "symbols", "bytes"]].sum()
    samples = groups.size()
    return pd.DataFrame(
        {
            "samples": samples,
            "speakers": groups["child_id"].nunique(),
            "hours": sums["seconds"] / 3600,
            "mean_seconds": sums["seconds"] / samples,
            "symbols": sums["symbols"],
            "symbols_per_second": sums["symbols"] / sums["labelled_seconds"],
            "shards": groups["shard"].nunique(),
            "mb": sums["bytes"] / 2**20,
            "padding": (1 - sums["seconds"] / sums["to_sec"]).clip(lower=0),  # rounding makes -1e-16 of an exact fit
        }
    )


def to_json(tables: Tables) -> str:
    """Return the tables as one JSON object: a list of rows per table, and the totals; null for an unknown value."""
    document: dict[str, Any] = {
        name: json.loads(table.reset_index().to_json(orient="records", double_precision=6))
        for name, table in tables.items()
    }
    totals = {name: value for name, value in document.pop("totals")[0].items() if name in COLUMNS}
    return json.dumps({"totals": totals} | document, ensure_ascii=False, indent=1)


def render(tables: Tables) -> str:
    """Return the tables as aligned text for a terminal."""
    headings = [heading for heading, _ in COLUMNS.values()]
    blocks = [
        [["split", *headings], *_cells(tables["by_split"]), *_cells(tables["totals"])],
        [["split, bucket", *headings], *_cells(tables["by_bucket"])],
        [["corpus", *headings], *_cells(tables["by_corpus"])],
        [["age", *headings], *_cells(tables["by_age"])],
    ]
    columns = zip(*(row for block in blocks for row in block), strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for block in blocks:
        for name, *cells in block:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *aligned]))
        lines.append("")
    return "\n".join(lines[:-1])


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """Return each row's name and its numbers as text."""
    formats = [spec for _, spec in COLUMNS.values()]
    rows = []
    for key, values in zip(table.index, table[list(COLUMNS)].to_numpy(float), strict=True):
        name = f"{key[0]:<10} {key[2]:.1f}–{key[3]:.1f} s" if isinstance(key, tuple) else str(key)
        cells = ["–" if math.isnan(value) else f"{value:{spec}}" for value, spec in zip(values, formats, strict=True)]
        rows.append([name, *cells])
    return rows


# --- plots; some need the audio -----------------------------------------------------------------------------------


def write_plots(store: Reader, index: ShardIndex, out: Store, workers: int) -> None:
    """Write PLOTS to `out`, decoding every clip once; each worker takes one shard at a time."""
    from sharding.report import plots  # imports matplotlib, which is slow

    durations, rates, loudness, symbols = PLOTS
    out.write(durations, plots.plot_durations(index))  # without audio, so first: fails early if `out` is not writable
    out.write(rates, plots.plot_symbol_rates(index))
    jobs = [(store.url, shard, index.labels) for shard in index.shards]
    with Workers(workers) as pool:
        measured = pool.map(measure_shard, jobs, [shard.count for shard in index.shards], "measuring")
    levels = np.concatenate([np.zeros(0), *(levels for levels, _ in measured)])  # (N,), in the order of index.samples
    out.write(loudness, plots.plot_loudness(index, levels))
    out.write(symbols, plots.plot_symbols(index, sum((counts for _, counts in measured), Counter())))


def measure_shard(job: tuple[str, ShardEntry, LabelPolicy]) -> tuple[npt.NDArray[np.float64], Counter[str]]:
    """Return the level of each clip of a shard, dBFS, and the count of each symbol in its labels."""
    store, shard, labels = open_store(job[0]), *job[1:]
    levels, counts = [], Counter[str]()
    for sample in check_shard(store, read_checked(store, shard), labels):
        count_done()
        try:
            waveform, _ = decode(sample.audio)
        except AudioError as error:
            raise ShardError(f"{store.url}/{shard.name}: {sample.key}: {error.message}") from error
        levels.append(10 * math.log10(max(float(np.mean(waveform**2)), 10 ** (SILENCE_DB / 10))))
        counts.update(labels.symbols_of(sample.text))
    return np.array(levels), counts
