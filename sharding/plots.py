"""Pictures of a shard set, as the bytes of a PNG. Imports matplotlib: import this only where a picture is wanted."""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from sharding.audio import SAMPLE_RATE
from sharding.format import SPLITS, ShardIndex
from sharding.ipa import alphabet_of

COLOURS = {"train": "#33658a", "valid": "#f6ae2d", "unlabelled": "#909090"}
DPI = 120
Numbers = npt.NDArray[np.float64]  # (N,), one for each row of ShardIndex.samples


def plot_durations(index: ShardIndex) -> bytes:
    """How long the clips are, and where the buckets end."""
    seconds = index.samples["samples"] / SAMPLE_RATE
    shortest, longest = seconds.min(initial=1.0), seconds.max(initial=max(2.0, index.duration_bins[-1]))
    figure, axes = _figure("Durations", index)
    _histogram(axes, index, seconds, np.geomspace(shortest, longest, 60))
    for edge in index.duration_bins:
        axes.axvline(edge, color="black", alpha=0.25, linewidth=0.8)
    axes.set(xscale="log", xlabel="duration of a clip, s (vertical lines: bucket edges)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _png(figure)


def plot_loudness(index: ShardIndex, loudness: Numbers) -> bytes:
    """How loud the clips are: the RMS of each, in dB below a square wave at full scale."""
    figure, axes = _figure("Loudness", index)
    _histogram(axes, index, loudness, np.arange(np.floor(loudness.min(initial=-40)), 1))
    axes.set(xlabel="RMS of a clip, dBFS (steps of 1 dB)")
    return _png(figure)


def plot_symbol_rates(index: ShardIndex) -> bytes:
    """How many symbols of its label a clip says in a second; clips without a label of their own have no say."""
    rates = index.samples["label_length"] / (index.samples["samples"] / SAMPLE_RATE)
    rates[index.samples["label_length"] == 0] = np.nan
    figure, axes = _figure("Symbols per second", index)
    _histogram(axes, index, rates, np.linspace(0, np.nanmax(rates, initial=1.0), 50))
    axes.set(xlabel="symbols per second of a clip with a label of its own")
    return _png(figure)


def plot_symbols(index: ShardIndex, counts: Mapping[str, int]) -> bytes:
    """How often each symbol of the alphabet stands in a label, most frequent first; what never does is shown as 0.

    A validation label may hold symbols beyond the alphabet, which are drawn last and paler.
    """
    symbols_of_track = sorted(alphabet_of(index.settings.get("track", "phonetic")))
    alphabet = sorted(symbols_of_track, key=lambda symbol: -counts.get(symbol, 0))
    foreign = sorted(set(counts) - set(alphabet))
    symbols = alphabet + foreign
    heights = [counts.get(symbol, 0) for symbol in symbols]
    figure, axes = _figure("Label symbols", index, width=13)
    colours = [COLOURS["train"]] * len(alphabet) + [COLOURS["unlabelled"]] * len(foreign)
    bars = axes.bar(range(len(symbols)), heights, color=colours)
    axes.bar_label(bars, [f"{height:,}" for height in heights], rotation=90, padding=3, fontsize=8)
    axes.set_xticks(range(len(symbols)), ["␣" if symbol == " " else symbol for symbol in symbols], fontsize=12)
    axes.set_xlim(-0.7, len(symbols) - 0.3)
    axes.set_ylim(0, 1.25 * max(1, *heights))  # leaves room for the count above the tallest bar
    axes.set(xlabel="symbol (␣: the space between words)", ylabel=f"times in the labels, of {sum(heights):,}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return _png(figure)


def _histogram(axes: Axes, index: ShardIndex, values: Numbers, bins: Numbers) -> None:
    """One line for each split that has clips; a log axis, for one split may be a thousandth of another."""
    for split in SPLITS:
        rows = index.split(split)
        chosen = values[rows][np.isfinite(values[rows])]
        if len(chosen):
            axes.hist(chosen, bins=bins.tolist(), histtype="step", linewidth=1.5, color=COLOURS[split],
                      label=f"{split} ({len(chosen):,})")  # fmt: skip
    if axes.has_data():
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set(yscale="log", ylabel="clips")
    axes.set_ylim(bottom=0.7)  # a lone clip stands above the axis
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(what: str, index: ShardIndex, width: float = 8) -> tuple[Figure, Axes]:
    hours = index.samples["samples"].sum() / SAMPLE_RATE / 3600
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"{what}: {len(index.samples):,} clips, {hours:,.2f} h", x=0.01, horizontalalignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
