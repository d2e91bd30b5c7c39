"""What a run will cost, told from the index before anyone pays for it: steps, padding, fill, rank idle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharding.audio import SAMPLE_RATE
from sharding.format import read_index, read_keys
from sharding.store import open_store
from streamtrain.config import load_config
from streamtrain.plan import EpochPlan, PlanError, check_world_size, numbers_of_rank, plan_epoch, valid_world_sizes


@dataclass(frozen=True, eq=False)
class Forecast:
    shards: str
    plan: EpochPlan
    summary: dict[str, Any]


def forecast(shards: str | None, config: str, overrides: Sequence[str], world_size: int, epoch: int = 0) -> Forecast:
    """Plan one epoch of the configured run. Raises StreamtrainError where it cannot be run so."""
    if epoch < 0:
        raise PlanError(f"epoch {epoch}: epochs are counted from 0")
    settings = load_config(config, overrides)
    shards = shards or settings.data.shards
    index = read_index(open_store(shards))
    per_step = settings.train.micro_batches_per_step
    check_world_size(world_size, per_step)
    plan = plan_epoch(index, settings.plan, epoch)
    cap = round(settings.data.batch_seconds * SAMPLE_RATE)
    used = np.unique(index.samples["shard"][plan.rows])
    summary = {
        "epoch": epoch,
        "world_size": world_size,
        "steps_per_epoch": plan.steps,
        "clips": len(plan.rows),
        "hours": float(plan.lengths.sum() / SAMPLE_RATE / 3600),
        "seconds_per_step": float(plan.lengths.sum() / SAMPLE_RATE / plan.steps),
        "padding": plan.padding,
        "fill": float(plan.padded.sum() / (plan.padded.size * cap)),
        "rank_idle": plan.rank_idle(world_size),
        "over_cap": int((plan.padded > cap).sum()),
        "bytes_per_epoch": int(sum(index.shards[shard].bytes for shard in used)),
        "world_sizes": valid_world_sizes(per_step),
    }
    return Forecast(shards, plan, summary)


def render(summary: dict[str, Any]) -> str:
    """The forecast as a person reads it in a terminal."""
    sizes = ", ".join(map(str, summary["world_sizes"]))
    return "\n".join(
        [
            f"epoch {summary['epoch']}: {summary['steps_per_epoch']:,} steps over {summary['clips']:,} clips "
            f"({summary['hours']:.2f} h, {summary['bytes_per_epoch'] / 2**20:,.0f} MiB of shards)",
            f"{summary['seconds_per_step']:.0f} s of speech per step, in micro-batches {summary['fill']:.1%} full; "
            f"padding {summary['padding']:.2%}; {summary['over_cap']} over the cap",
            f"{summary['world_size']} ranks: idle {summary['rank_idle']:.2%}; possible numbers of ranks: {sizes}",
        ]
    )


def write_keys(prediction: Forecast, world_size: int, out: Path) -> None:
    """JSONL, a row per micro-batch: its step, its number, the rank that computes it, its keys."""
    store = open_store(prediction.shards)
    keys = read_keys(store, read_index(store))
    plan = prediction.plan
    with open(out, "w", encoding="utf-8") as lines:
        for step in range(plan.steps):
            for rank in range(world_size):
                for number in numbers_of_rank(rank, world_size, plan.micro_batches_per_step):
                    chosen = keys[plan.micro_batch(step, number)].tolist()
                    row = {"step": step, "micro_batch": number, "rank": rank, "keys": chosen}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
