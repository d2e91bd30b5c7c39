"""Plot a shard set as the bytes of a PNG. Imports matplotlib, which is slow: import this only to draw."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from sharding.audio.codec import SAMPLE_RATE, Waveform
from sharding.audio.vad import HOP, Pause, SpeechActivity
from sharding.errors import counted
from sharding.segment.split import Segment
from sharding.shardset.index import ShardIndex
from sharding.shardset.schema import SPLITS

COLOURS = {"train": "#33658a", "valid": "#f6ae2d", "test": "#9e2a2b", "unlabelled": "#909090"}
DPI = 120
STRIP_SEC = 30.0
Numbers = npt.NDArray[np.float64]  # (N,), one for each row of ShardIndex.samples


def plot_durations(index: ShardIndex) -> bytes:
    """Plot the durations of the clips and the edges of the buckets."""
    seconds = index.samples["samples"] / SAMPLE_RATE
    shortest, longest = seconds.min(initial=1.0), seconds.max(initial=max(2.0, index.duration_bins[-1]))
    figure, axes = _figure("Durations", index)
    _histogram(axes, index, seconds, np.geomspace(shortest, longest, 60))
    for edge in {edge for split in SPLITS for edge in index.bucket_ends(split)}:
        axes.axvline(edge, color="black", alpha=0.25, linewidth=0.8)
    axes.set(xscale="log", xlabel="duration of a clip, s (vertical lines: bucket edges)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _png(figure)


def plot_loudness(index: ShardIndex, loudness: Numbers) -> bytes:
    """Plot the loudness of the clips: the RMS of each, in dB relative to a square wave at full scale."""
    figure, axes = _figure("Loudness", index)
    _histogram(axes, index, loudness, np.arange(np.floor(loudness.min(initial=-40)), 1))
    axes.set(xlabel="RMS of a clip, dBFS (steps of 1 dB)")
    return _png(figure)


def plot_symbol_rates(index: ShardIndex) -> bytes:
    """Plot the label symbols per second of each clip, leaving out clips without a label of their own."""
    rates = index.samples["label_length"] / (index.samples["samples"] / SAMPLE_RATE)
    rates[index.samples["label_length"] == 0] = np.nan
    figure, axes = _figure("Symbols per second", index)
    _histogram(axes, index, rates, np.linspace(0, np.nanmax(rates, initial=1.0), 50))
    axes.set(xlabel="symbols per second of a clip with a label of its own")
    return _png(figure)


def plot_symbols(index: ShardIndex, counts: Mapping[str, int]) -> bytes:
    """Plot the count of each symbol of the alphabet in the labels, most frequent first, unused symbols as 0.

    A validation label may have symbols outside the alphabet, which are drawn last and paler.
    """
    alphabet = sorted(index.labels.alphabet, key=lambda symbol: (-counts.get(symbol, 0), symbol))
    outside = sorted(set(counts) - set(alphabet))
    symbols = alphabet + outside
    heights = [counts.get(symbol, 0) for symbol in symbols]
    figure, axes = _figure("Label symbols", index, width=13)
    colours = [COLOURS["train"]] * len(alphabet) + [COLOURS["unlabelled"]] * len(outside)
    bars = axes.bar(range(len(symbols)), heights, color=colours)
    axes.bar_label(bars, [f"{height:,}" for height in heights], rotation=90, padding=3, fontsize=8)
    axes.set_xticks(range(len(symbols)), ["␣" if symbol == " " else symbol for symbol in symbols], fontsize=12)
    axes.set_xlim(-0.7, len(symbols) - 0.3)
    axes.set_ylim(0, 1.25 * max(1, *heights))  # room for the count above the tallest bar
    axes.set(xlabel="symbol (␣: the space between words)", ylabel=f"times in the labels, of {sum(heights):,}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return _png(figure)


def plot_split(
    name: str, waveform: Waveform, activity: SpeechActivity, pauses: Sequence[Pause], segments: Sequence[Segment]
) -> bytes:
    """Plot the segmentation of a recording: waveform, speech probability, pauses, cuts, the words of each segment.

    The plot has strips of 30 s, or ten longer strips if the recording is longer than 300 s.
    """
    total = len(waveform) / SAMPLE_RATE
    strip = max(STRIP_SEC, total / 10)
    count = max(int(np.ceil(total / strip)), 1)
    figure = Figure(figsize=(14, 0.6 + 1.7 * count), layout="constrained")
    figure.suptitle(
        f"{name}: {total:.2f} s in {counted(len(segments), 'segment')} (line: probability of speech; grey: pauses; "
        "black: cuts, red: forced ones; blue: segments with a label)", x=0.01, horizontalalignment="left", fontsize=10,
    )  # fmt: skip
    peak = max(float(np.abs(waveform).max(initial=0)), 1e-3)
    for row, axes in enumerate(figure.subplots(count, 1, squeeze=False)[:, 0]):
        first, last = row * strip, (row + 1) * strip
        samples = waveform[round(first * SAMPLE_RATE) : round(last * SAMPLE_RATE)] / peak
        blocks = np.array_split(samples, min(2_000, max(len(samples), 1)))
        times = first + np.arange(len(blocks)) * len(samples) / len(blocks) / SAMPLE_RATE
        lows, highs = ([float(edge(block, initial=0)) for block in blocks] for edge in (np.min, np.max))
        axes.fill_between(times, lows, highs, color="#b0b8c0", linewidth=0)
        frames = slice(round(first * SAMPLE_RATE / HOP), round(last * SAMPLE_RATE / HOP))
        speech = activity.speech[frames]
        axes.plot(first + np.arange(len(speech)) * HOP / SAMPLE_RATE, speech, color=COLOURS["valid"], linewidth=1)
        for pause in pauses:
            axes.axvspan(pause.start / SAMPLE_RATE, pause.end / SAMPLE_RATE, color="black", alpha=0.06, linewidth=0)
        for segment in segments:
            _draw_segment(axes, segment, first, last, segment is segments[-1])
        axes.set(xlim=(first, last), ylim=(-1.05, 1.6), yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:g} s")
    return _png(figure)


def _draw_segment(axes: Axes, segment: Segment, first: float, last: float, final: bool) -> None:
    labelled = segment.label_status == "labelled"
    start, end = max(segment.start_sec, first), min(segment.end_sec, last)
    if start >= end:
        return
    axes.axvspan(start, end, ymin=0.86, color=COLOURS["train" if labelled else "unlabelled"], alpha=0.25, linewidth=0)
    caption = segment.text if labelled else f"unlabelled: {segment.reason}"
    room = max(int((end - start) / (last - first) * 185), 3)  # characters
    axes.text(start + (last - first) * 0.002, 1.4, caption if len(caption) <= room else f"{caption[: room - 1]}…",
              fontsize=8, verticalalignment="center", clip_on=True)  # fmt: skip
    if first < segment.end_sec < last and not final:
        axes.axvline(segment.end_sec, color="#c0392b" if segment.forced else "black", linewidth=1.2)


def _histogram(axes: Axes, index: ShardIndex, values: Numbers, bins: Numbers) -> None:
    """Draw one line per split with clips, on a log axis because one split may be a thousandth of another."""
    for split in SPLITS:
        rows = index.split(split)
        finite = values[rows][np.isfinite(values[rows])]
        if len(finite):
            axes.hist(finite, bins=bins.tolist(), histtype="step", linewidth=1.5, color=COLOURS[split],
                      label=f"{split} ({len(finite):,})")  # fmt: skip
    if axes.has_data():
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set(yscale="log", ylabel="clips")
    axes.set_ylim(bottom=0.7)  # a single clip is drawn above the axis
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(title: str, index: ShardIndex, width: float = 8) -> tuple[Figure, Axes]:
    hours = index.samples["samples"].sum() / SAMPLE_RATE / 3600
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"{title}: {len(index.samples):,} clips, {hours:,.2f} h", x=0.01, horizontalalignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
