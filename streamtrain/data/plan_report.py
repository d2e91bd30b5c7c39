"""Estimate the cost of a run from the index, before it starts: steps, padding, idle ranks, reads, cache."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import counted
from sharding.files.writing import write, written
from sharding.shardset.index import ShardIndex, read_index, read_keys
from sharding.shardset.store import open_store
from streamtrain.config import load_config
from streamtrain.data.augment import Floats
from streamtrain.data.cache import RANGE_BYTES, STEPS_AHEAD, STEPS_BEHIND
from streamtrain.data.plan import (
    EpochPlan,
    PlanError,
    PlanSettings,
    ShardSchedule,
    batch_overlap,
    check_world_size,
    micro_batches_of_rank,
    plan_epoch,
    shard_schedule,
    valid_world_sizes,
)
from streamtrain.data.share import take_share

COLOURS = ("#33658a", "#86bbd8", "#5b8c5a", "#c8553d")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Describe the machines that a run is planned for."""

    world_size: int = 1
    ranks_per_node: int = 8
    speed: float = 200.0  # seconds of speech that a rank trains on in a second


@dataclass(frozen=True, eq=False)
class PlanReport:
    """Hold the plan of an epoch, its inputs, and a summary of its cost."""

    index: ShardIndex
    shards: str
    plan: EpochPlan
    cluster: Cluster
    schedule: ShardSchedule
    summary: dict[str, Any]


def report_plan(shards: str | None, config: str, overrides: list[str], cluster: Cluster, epoch: int = 0) -> PlanReport:
    """Plan one epoch of the configured run. Raises StreamtrainError if the run is not possible."""
    if epoch < 0:
        raise PlanError(f"epoch {epoch}: epochs are counted from 0")
    settings = load_config(config, overrides)
    shards = shards or settings.data.shards
    store = open_store(shards)
    index = take_share(read_index(store), store, settings.data.fraction, settings.data.hours)
    per_step = settings.train.micro_batches_per_step
    check_world_size(cluster.world_size, per_step)
    plan, following = (plan_epoch(index, PlanSettings.of(settings), number) for number in (epoch, epoch + 1))
    schedule = shard_schedule(index, plan, [rank // cluster.ranks_per_node for rank in range(cluster.world_size)])
    cap = round(settings.data.batch_seconds * SAMPLE_RATE)
    seconds = float(plan.lengths.sum() / SAMPLE_RATE)
    duration = seconds / (cluster.world_size * cluster.speed * (1 - plan.rank_idle(cluster.world_size)))
    sizes = _sizes(index)
    nodes = math.ceil(cluster.world_size / cluster.ranks_per_node)
    by_node = np.bincount(schedule.node, sizes[schedule.shard], nodes)
    requests = np.bincount(schedule.node, np.ceil(sizes[schedule.shard] / RANGE_BYTES), nodes)
    summary = {
        "epoch": epoch,
        "world_size": cluster.world_size,
        "nodes": nodes,
        "steps_per_epoch": plan.steps,
        "clips": len(plan.rows),
        "hours": seconds / 3600,
        "seconds_per_step": seconds / plan.steps,
        "epoch_hours": duration / 3600,
        "padding": plan.padding,
        "fill": float(plan.padded.sum() / (plan.padded.size * cap)),
        "rank_idle": plan.rank_idle(cluster.world_size),
        "over_cap": int((plan.padded > cap).sum()),
        "meet_again": batch_overlap(plan, following),
        "other_speed": 0.0 if plan.speeds is None else float((plan.speeds != 1).mean()),
        "bytes_per_node": int(by_node.max()),
        "requests_per_second": float(requests.sum() / duration),
        "requests_per_second_uncached": len(plan.rows) / duration,
        "cache_gb_needed": max(curve.max() for curve in live_bytes(index, plan, schedule, nodes)) / 2**30,
        "world_sizes": valid_world_sizes(per_step),
    }
    return PlanReport(index, shards, plan, cluster, schedule, summary)


def live_bytes(index: ShardIndex, plan: EpochPlan, schedule: ShardSchedule, nodes: int) -> list[Floats]:
    """Return, per node, the bytes its cache must hold at each step to fetch no shard twice, shape (steps,)."""
    sizes, curves = _sizes(index)[schedule.shard], []
    for node in range(nodes):
        rows = schedule.node == node
        change = np.zeros(plan.steps + 1)
        np.add.at(change, np.maximum(schedule.first[rows] - STEPS_AHEAD, 0), sizes[rows])
        np.add.at(change, np.minimum(schedule.last[rows] + STEPS_BEHIND + 1, plan.steps), -sizes[rows])
        curves.append(np.cumsum(change)[:-1])
    return curves


def render(summary: dict[str, Any], cluster: Cluster) -> str:
    """Format the summary as text for a terminal."""
    sizes = ", ".join(map(str, summary["world_sizes"]))
    nodes, clips = counted(summary["nodes"], "node"), counted(summary["clips"], "clip")
    cache = _format_bytes(summary["cache_gb_needed"] * 2**30)
    rows = [
        ("steps", f"{summary['steps_per_epoch']:,} over {clips}, {_format_duration(summary['hours'])};"
                  f" {summary['seconds_per_step']:,.0f} s of speech in each"),
        ("micro-batches", f"{summary['fill']:.1%} full, {summary['over_cap']} over the cap;"
                          f" {summary['padding']:.2%} padding"),
        ("shuffle", f"{summary['meet_again']:.1%} of the pairs of clips in a micro-batch meet again in the next epoch"),
        ("ranks", f"{summary['world_size']:,} on {nodes}, idle {summary['rank_idle']:.2%}; valid world sizes: {sizes}"),
        ("time", f"{_format_duration(summary['epoch_hours'])} an epoch, if a rank trains on {cluster.speed:g} s of"
                 " speech a second (--speed)"),
        ("reads", f"{_format_bytes(summary['bytes_per_node'])} a node and epoch;"
                  f" {summary['requests_per_second']:,.1f} requests/s in total,"
                  f" without a cache at most {summary['requests_per_second_uncached']:,.0f}"),
        ("cache", f"{cache} a node (data.cache_gb), to fetch each shard once"),
    ]  # fmt: skip
    if summary["other_speed"]:
        text = f"{summary['other_speed']:.1%} of the clips change speed; hours and seconds are those after the change"
        rows.insert(1, ("speed", text))
    return f"epoch {summary['epoch']}\n" + "\n".join(f"  {name:<13}  {text}" for name, text in rows)


def _format_duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def write_schedule(report: PlanReport, out: Path) -> None:
    """Write JSONL, one row per node and shard: the first and the last step that needs it."""
    schedule, shards = report.schedule, report.index.shards
    columns = [rows.tolist() for rows in (schedule.node, schedule.shard, schedule.first, schedule.last)]
    with written(out) as lines:
        for node, shard, first, last in zip(*columns, strict=True):
            row = {"node": node, "shard": shards[shard].name, "first_step": first, "last_step": last}
            lines.write(f"{json.dumps(row)}\n".encode())


def write_keys(report: PlanReport, out: Path) -> None:
    """Write JSONL, one row per micro-batch: its step, its number, the rank that computes it, its keys."""
    keys = read_keys(open_store(report.shards), report.index)
    plan, world_size = report.plan, report.cluster.world_size
    with written(out) as lines:
        for step in range(plan.steps):
            for rank in range(world_size):
                for number in micro_batches_of_rank(rank, world_size, plan.micro_batches_per_step):
                    row_keys = keys[plan.micro_batch(step, number)].tolist()
                    row = {"step": step, "micro_batch": number, "rank": rank, "keys": row_keys}
                    lines.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())


def plot(report: PlanReport, out: Path) -> None:
    """Plot the spread of micro-batch sizes, the cache size that the first node needs, and when it needs each shard."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    plan, schedule, index = report.plan, report.schedule, report.index
    padded = plan.padded / SAMPLE_RATE
    edges = np.arange(plan.steps + 1) - 0.5  # each step is centred on its number
    figure = Figure(figsize=(10, 9), layout="constrained")
    sizes, cache, shards = figure.subplots(3, 1, sharex=True)
    sizes.stairs(padded.max(axis=1), edges, baseline=padded.min(axis=1), fill=True, color=COLOURS[1],
                label="shortest to longest micro-batch")  # fmt: skip
    sizes.stairs(padded.mean(axis=1), edges, baseline=None, color=COLOURS[0], linewidth=0.8, label="mean")
    sizes.set(title="padded seconds of the micro-batches of a step", ylim=(0, None))
    sizes.legend(frameon=False, loc="lower right")
    needed = live_bytes(index, plan, schedule, 1)[0]
    unit, name = (2**30, "GiB") if needed.max() >= 2**30 else (2**20, "MiB")
    cache.stairs(needed / unit, edges, baseline=None, color=COLOURS[2])
    cache.set(title=f"cache size that the first node needs, {name}", ylim=(0, None))
    rows = np.flatnonzero(schedule.node == 0)
    rows = rows[np.lexsort((schedule.last[rows], schedule.first[rows]))]
    spans = zip(schedule.first[rows].tolist(), schedule.last[rows].tolist(), strict=True)
    lines = [((first - 0.5, y), (last + 0.5, y)) for y, (first, last) in enumerate(spans)]
    buckets = np.array([shard.bucket for shard in index.shards])[schedule.shard[rows]]
    bars = LineCollection(lines, linewidths=max(0.3, min(6.0, 180 / max(len(lines), 1))), cmap="viridis")
    bars.set_array(buckets)
    shards.add_collection(bars)
    shards.set(title="shards of the first node, from first to last use", xlabel="step", xlim=(edges[0], edges[-1]))
    shards.set_ylim(len(lines) - 0.5, -0.5)
    for axis in (shards.xaxis, shards.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(bars, ax=shards, label="bucket", location="right")
    for axes in (sizes, cache, shards):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write(out, picture.getvalue())


def _sizes(index: ShardIndex) -> Floats:
    return np.array([shard.bytes for shard in index.shards], float)
