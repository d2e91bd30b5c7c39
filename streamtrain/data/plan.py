"""Decide which clips form which batch, for every step of an epoch. Arithmetic only: no files, no torch.

The plan is a pure function of the index and a few numbers, so every rank computes the same plan, has the total number
of steps before the first step, and resumes at any step by looking it up.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ConfigDict, PositiveFloat, PositiveInt

from sharding.audio.codec import FRAME_SAMPLES, MIN_SAMPLES, SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.files.document import Count
from sharding.files.spool import share_array
from sharding.shardset.index import SampleTable, ShardIndex
from streamtrain.config import Config
from streamtrain.data.augment import Floats, keyed_uniform, length_at
from streamtrain.model.batches import Rows

PLANNER_VERSION = 3  # part of a checkpoint: another version may order clips differently
SCHEDULED_BATCHES = 2**12  # at a time: quicker than larger parts
KEY_STEPS = 1024  # of a sample, in the keys by which clips are sorted
BLOCK_STEPS = 48  # batches are grouped by size into steps within blocks of this many steps


class PlanError(StreamtrainError):
    """Report a plan that cannot be made, and why."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Hold all settings that determine an epoch's plan, beside the index and the epoch's number."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    batch_seconds: PositiveFloat  # cap on clips × longest of a micro-batch
    micro_batches_per_step: PositiveInt
    shuffle_shards: PositiveInt = 4
    length_jitter: float = 0.004  # spread of the sort key, s
    seed: int = 0
    speed_factors: tuple[float, ...] = ()  # each clip is played at one of these speeds
    gain_db: float = 0.0  # limit of the random gain, in either direction

    @classmethod
    def of(cls, config: Config) -> "PlanSettings":
        """Return the settings of a configuration that determine an epoch's plan."""
        return cls(
            batch_seconds=config.data.batch_seconds,
            micro_batches_per_step=config.train.micro_batches_per_step,
            shuffle_shards=config.data.shuffle_shards,
            length_jitter=config.data.length_jitter,
            seed=config.train.seed,
            speed_factors=tuple(config.data.speed_factors),
            gain_db=config.data.gain_db,
        )


@dataclass(frozen=True, eq=False)
class Perturbation:
    """Hold the speed and gain to apply to each clip of a micro-batch."""

    lengths: Rows  # (clips,) samples at 16 kHz, after the change of speed
    speeds: Floats  # (clips,) 1: as recorded
    gains: Floats  # (clips,) factors

    @classmethod
    def as_recorded(cls, lengths: Rows) -> "Perturbation":
        ones = np.ones(len(lengths))
        return cls(lengths, ones, ones)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Hold an epoch: step s has micro-batches s·M … s·M + M − 1, micro-batch b has `rows[starts[b]:starts[b + 1]]`."""

    rows: Rows  # (clips,)
    starts: Rows  # (steps · M + 1,)
    micro_batches_per_step: int
    label_characters: Rows  # (steps,) of the whole step
    lengths: Rows  # (clips,) samples at 16 kHz, after perturbation, in the order of `rows`
    speeds: Floats | None = None  # (clips,) in the order of `rows`; None: as recorded
    gains: Floats | None = None

    @property
    def steps(self) -> int:
        return len(self.label_characters)

    @property
    def hash(self) -> str:
        """Return a digest of the plan. Ranks compare it, or they might train on different epochs."""
        state = xxhash.xxh3_128(self.rows.tobytes())
        state.update(self.starts.tobytes())
        state.update(self.micro_batches_per_step.to_bytes(8, "little"))
        for factors in (self.speeds, self.gains):
            state.update(b"" if factors is None else factors.tobytes())
        return state.hexdigest()

    def micro_batch(self, step: int, *ids: int) -> Rows:
        """Return the rows, maybe none, of the micro-batches `ids` (each 0 ≤ id < M) of a step, concatenated."""
        return self.rows[self._positions(step, ids)]

    def _positions(self, step: int, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        first = step * self.micro_batches_per_step
        bounds = [(self.starts[first + number], self.starts[first + number + 1]) for number in ids]
        return np.concatenate([np.arange(start, end) for start, end in bounds])

    def perturbation(self, step: int, *ids: int) -> Perturbation:
        """Return the perturbation of the clips of one or several micro-batches, in the order of their rows."""
        positions = self._positions(step, ids)
        speeds, gains = (np.ones(len(positions)) if factors is None else factors[positions]
                         for factors in (self.speeds, self.gains))  # fmt: skip
        return Perturbation(self.lengths[positions], speeds, gains)

    @cached_property
    def clips(self) -> npt.NDArray[np.int64]:
        """Return the number of clips of each micro-batch, shape (steps, M)."""
        return np.diff(self.starts).reshape(self.steps, self.micro_batches_per_step)

    @cached_property
    def longest(self) -> npt.NDArray[np.int64]:
        """Return the samples of the longest clip of each micro-batch, shape (steps, M)."""
        longest = np.zeros_like(self.clips)
        filled = self.clips > 0
        if filled.any():
            longest[filled] = np.maximum.reduceat(self.lengths, self.starts[:-1][filled.ravel()])
        return longest

    @cached_property
    def padded(self) -> npt.NDArray[np.int64]:
        """Return the samples of each micro-batch, including padding, shape (steps, M)."""
        padded: npt.NDArray[np.int64] = self.clips * self.longest
        return padded

    @cached_property
    def true(self) -> npt.NDArray[np.int64]:
        """Return the samples of each micro-batch, without padding, shape (steps, M)."""
        true = np.zeros_like(self.clips)
        filled = self.clips > 0
        if filled.any():
            true[filled] = np.add.reduceat(self.lengths, self.starts[:-1][filled.ravel()])
        return true

    @property
    def padding(self) -> float:
        """Return the share of padding: 1 − true ÷ padded seconds."""
        total = self.padded.sum()
        return 1 - float(self.true.sum() / total) if total else 0.0

    def shared(self) -> "EpochPlan":
        """Return the plan with its arrays in temporary files: other processes of this machine get it without a copy."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: share_array(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        return EpochPlan(**values)

    def rank_idle(self, world_size: int) -> float:
        """Return the share of rank-time spent waiting for each step's slowest rank, if time is ∝ padded seconds."""
        check_world_size(world_size, self.micro_batches_per_step)
        per_rank = self.padded.reshape(self.steps, -1, world_size).sum(axis=1)  # (steps, ranks)
        total = (per_rank.max(axis=1) * world_size).sum() if self.steps else 0
        return 1 - float(per_rank.sum() / total) if total else 0.0


def valid_world_sizes(micro_batches_per_step: int) -> list[int]:
    return [size for size in range(1, micro_batches_per_step + 1) if micro_batches_per_step % size == 0]


def check_world_size(world_size: int, micro_batches_per_step: int) -> None:
    """Raise PlanError if the number of ranks does not divide the number of micro-batches of a step."""
    if world_size < 1 or micro_batches_per_step % world_size:
        *smaller, largest = map(str, valid_world_sizes(micro_batches_per_step))
        valid = f"{', '.join(smaller)} or {largest} ranks" if smaller else "1 rank"
        raise PlanError(
            f"{world_size} ranks cannot share {micro_batches_per_step} micro-batches per step evenly",
            f"run {valid}, or set train.micro_batches_per_step to a multiple of their number",
        )


def micro_batches_of_rank(rank: int, world_size: int, micro_batches_per_step: int) -> range:
    """Return the micro-batches of a step that a rank computes: every `world_size`-th, the same number for all ranks."""
    check_world_size(world_size, micro_batches_per_step)
    return range(rank, micro_batches_per_step, world_size)


def group_micro_batches(
    plan: EpochPlan, step: int, world_size: int, device_batch_seconds: float | None
) -> list[list[list[int]]]:
    """Return the micro-batches that each rank merges into each forward, as ids[rank][forward].

    All ranks run equally many: the fewest with clips × longest ≤ `device_batch_seconds`; None: one per micro-batch.
    """
    per_step = plan.micro_batches_per_step
    ids = [list(micro_batches_of_rank(rank, world_size, per_step)) for rank in range(world_size)]
    if device_batch_seconds is None:
        return [[[number] for number in rank_ids] for rank_ids in ids]
    cap = round(device_batch_seconds * SAMPLE_RATE)
    clips, longest = np.maximum(plan.clips[step], 1).tolist(), plan.longest[step].tolist()  # an empty one is a row too
    merged = [_merge(sorted(rank_ids, key=lambda number: -longest[number]), clips, longest, cap) for rank_ids in ids]
    forwards = max(map(len, merged))
    for groups in merged:
        while len(groups) < forwards:
            group = max(groups, key=len)
            groups.append(group[len(group) // 2 :])
            del group[len(group) // 2 :]
    return merged


def _merge(ordered: list[int], clips: list[int], longest: list[int], cap: int) -> list[list[int]]:
    """Group consecutive micro-batches, given longest first, into the fewest groups within the cap."""
    groups: list[list[int]] = []
    rows = 0  # of the last group
    for number in ordered:
        rows += clips[number]
        if groups and longest[groups[-1][0]] * rows <= cap:
            groups[-1].append(number)
        else:
            groups.append([number])
            rows = clips[number]
    return groups


def plan_epoch(index: ShardIndex, settings: PlanSettings, epoch: int, seen_rows: Rows | None = None) -> EpochPlan:
    """Plan each training clip of the index but the `seen_rows` exactly once, in steps of M micro-batches under the cap.

    Raises PlanError if a clip alone exceeds the cap, or if there is no clip to train on.
    """
    clips = _choose_clips(index, settings, epoch, seen_rows)
    random = np.random.default_rng([settings.seed, epoch])
    batches = _Batches.join([_cut_bucket(index, clips, bucket, settings, epoch) for bucket in _buckets(index)])
    rows, starts = _into_steps(
        batches, batches.interleave(random), clips.lengths, settings.micro_batches_per_step, random
    )
    labels = np.concatenate([[0], np.cumsum(index.samples["label_length"][rows], dtype=np.int64)])[starts]
    return EpochPlan(
        rows=rows,
        starts=starts,
        micro_batches_per_step=settings.micro_batches_per_step,
        label_characters=np.diff(labels[:: settings.micro_batches_per_step]),
        lengths=clips.lengths[rows].astype(np.int64),
        speeds=None if clips.speeds is None else clips.speeds[rows],
        gains=_draw_gains(index.samples["checksum"][rows], settings, epoch),
    )


def count_steps(index: ShardIndex, settings: PlanSettings, epoch: int) -> int:
    """Return the steps of `plan_epoch`, from the cuts alone: M batches make a step, and a last one is filled up."""
    clips = _choose_clips(index, settings, epoch, None)
    batches = sum(len(_cut_bucket(index, clips, bucket, settings, epoch).sizes) for bucket in _buckets(index))
    return max(-(-batches // settings.micro_batches_per_step), 1)


@dataclass(frozen=True, slots=True)
class PlanPrefix:
    """Hold the settings that an epoch was planned with, and the number of steps completed before it was re-planned."""

    settings: PlanSettings
    steps: Count


def plan_remaining(index: ShardIndex, settings: PlanSettings, epoch: int, completed: Sequence[PlanPrefix]) -> EpochPlan:
    """Plan the rest of an epoch after first steps that were planned with other settings, maybe more than once.

    Over the whole epoch, each clip still occurs once.
    """
    seen_rows = None
    for prefix in completed:
        plan = plan_epoch(index, prefix.settings, epoch, seen_rows)
        prefix_rows = plan.rows[: plan.starts[prefix.steps * plan.micro_batches_per_step]]
        seen_rows = prefix_rows if seen_rows is None else np.concatenate([seen_rows, prefix_rows])
    return plan_epoch(index, settings, epoch, seen_rows)


@dataclass(frozen=True, eq=False)
class ShardSchedule:
    """Hold the first and last step at which a node needs a shard: one row per (node, shard) pair, in that order."""

    node: Rows
    shard: Rows  # row of ShardIndex.shards
    first: Rows  # step
    last: Rows

    def of(self, node: int) -> "ShardSchedule":
        rows = self.node == node
        return ShardSchedule(self.node[rows], self.shard[rows], self.first[rows], self.last[rows])


def shard_schedule(index: ShardIndex, plan: EpochPlan, node_of: Sequence[int] = (0,)) -> ShardSchedule:
    """Return the steps at which each node needs each shard, given the node of every rank; by default, one node."""
    per_step, sizes = plan.micro_batches_per_step, np.diff(plan.starts)
    shards, nodes = len(index.shards), np.asarray(node_of)
    first, last = (np.full((nodes.max() + 1) * shards, -1, np.int64) for _ in range(2))
    for start in range(0, len(sizes), SCHEDULED_BATCHES):  # a part at a time takes little memory
        part = slice(start, start + SCHEDULED_BATCHES)
        batch = np.repeat(start + np.arange(len(sizes[part])), sizes[part])  # of each clip
        rows = plan.rows[plan.starts[start] : plan.starts[start] + len(batch)]
        pair = nodes[batch % per_step % len(nodes)] * shards + index.samples["shard"][rows]
        last[pair] = batch // per_step  # of equal pairs, the last one stays
        earlier = pair[::-1][first[pair[::-1]] < 0]
        first[earlier] = (batch[::-1] // per_step)[first[pair[::-1]] < 0]
    pairs = np.flatnonzero(last >= 0)
    node, shard = np.divmod(pairs, shards)
    return ShardSchedule(node, shard, first[pairs], last[pairs])


def batch_overlap(plan: EpochPlan, following: EpochPlan) -> float:
    """Return the share of the pairs of clips in one micro-batch that share one in the `following` epoch too."""
    before, after = (
        np.repeat(np.arange(len(epoch.starts) - 1), np.diff(epoch.starts))[np.argsort(epoch.rows)]  # batch of each clip
        for epoch in (plan, following)
    )
    _, common = np.unique(before * len(following.starts) + after, return_counts=True)  # clips per pair of batches
    sizes = np.diff(plan.starts)
    pairs = int((sizes * (sizes - 1)).sum())
    return float((common * (common - 1)).sum() / pairs) if pairs else 0.0


def _draw_speeds(samples: SampleTable, cap: int, settings: PlanSettings, epoch: int) -> Floats | None:
    """Return the speed of each clip of the index in this epoch, shape (N,); None if all stay as recorded.

    A clip stays as recorded if it would exceed the cap, or become too short for CTC to be sure to emit its label.
    """
    if not settings.speed_factors:
        return None
    uniform = keyed_uniform(samples["checksum"], "speed", settings.seed, epoch)
    factors = np.array(settings.speed_factors)
    speeds = factors[(uniform * len(factors)).astype(np.intp)]
    lengths = length_at(samples["samples"], speeds)
    return np.where((lengths <= cap) & ((speeds < 1) | _can_spell(lengths, samples)), speeds, 1.0)


def _can_spell(lengths: Rows, samples: SampleTable) -> npt.NDArray[np.bool_]:
    """Return whether each clip has, at these lengths, frames for any label of its length, in the usual geometry."""
    frames = (lengths - MIN_SAMPLES) // FRAME_SAMPLES + 1
    needed: Rows = np.maximum(2 * samples["label_length"].astype(np.int64) - 1, 1)  # a blank between any two symbols
    return frames >= needed


def shortest_lengths(samples: SampleTable, speed_factors: Sequence[float]) -> Rows:
    """Return the samples of each clip, shape (N,), at the fastest speed that an epoch may draw for it."""
    shortest: Rows = samples["samples"].astype(np.int64)
    for factor in speed_factors:
        lengths = length_at(samples["samples"], factor)
        shortest = np.where(_can_spell(lengths, samples), np.minimum(shortest, lengths), shortest)
    return shortest


def _draw_gains(checksums: npt.NDArray[np.uint64], settings: PlanSettings, epoch: int) -> Floats | None:
    """Return the gain factor of each clip in this epoch, uniform in decibels; None if no gain is applied."""
    if settings.gain_db == 0:
        return None
    decibels = settings.gain_db * (2 * keyed_uniform(checksums, "gain", settings.seed, epoch) - 1)
    gains: Floats = 10 ** (decibels / 20)
    return gains


@dataclass(frozen=True, eq=False)
class _Clips:
    """Hold what an epoch trains on."""

    lengths: npt.NDArray[np.integer]  # (N,) samples of every clip of the index, after its change of speed
    speeds: Floats | None  # (N,)
    unseen: npt.NDArray[np.bool_] | None  # (N,) which clips are planned; None: all of the training split
    cap: int  # samples of a micro-batch


def _choose_clips(index: ShardIndex, settings: PlanSettings, epoch: int, seen_rows: Rows | None) -> _Clips:
    """Return the clips to plan. Raises PlanError if there is none, or one that exceeds the cap."""
    lengths, train = index.samples["samples"], index.split("train")
    cap = round(settings.batch_seconds * SAMPLE_RATE)
    if len(train) == 0:
        raise PlanError("the shard set has no labelled training clips", "look at its report/summary.json")
    longest = int(train[lengths[train].argmax()])
    if lengths[longest] > cap:
        raise PlanError(
            f"a clip of {index.shards[index.samples['shard'][longest]].name} (row {longest} of the index) lasts "
            f"{lengths[longest] / SAMPLE_RATE:.2f} s, data.batch_seconds is {settings.batch_seconds:g}",
            "raise data.batch_seconds, or build the shards with a lower --max-duration",
        )
    speeds = _draw_speeds(index.samples, cap, settings, epoch)
    unseen = None
    if seen_rows is not None or index.share is not None:
        unseen = np.zeros(len(lengths), bool)
        unseen[train] = True
        unseen[[] if seen_rows is None else seen_rows] = False
    return _Clips(lengths if speeds is None else length_at(lengths, speeds), speeds, unseen, cap)


@dataclass(frozen=True, eq=False)
class _Batches:
    """Hold batches one after the other."""

    rows: Rows  # (clips,) of all batches
    sizes: Rows  # (batches,) clips of each
    buckets: tuple[int, ...]  # how many batches are of each bucket

    @classmethod
    def join(cls, parts: Sequence["_Batches"]) -> "_Batches":
        rows, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "sizes"))
        return cls(rows, sizes, tuple(count for part in parts for count in part.buckets))

    @cached_property
    def starts(self) -> Rows:
        """Return where each batch begins in `rows`, shape (batches,)."""
        starts: Rows = np.cumsum(self.sizes) - self.sizes
        return starts

    def interleave(self, random: np.random.Generator) -> Rows:
        """Return an order of the batches in which the buckets advance evenly, and so end together."""
        counts = [count for count in self.buckets if count]
        positions = np.concatenate([(np.arange(count) + random.random()) / count for count in counts])
        return np.argsort(positions, kind="stable")

    def take(self, order: Rows) -> Rows:
        """Return the rows of batches in another order."""
        sizes = self.sizes[order]
        shifts = self.starts[order] - (np.cumsum(sizes) - sizes)
        rows: Rows = self.rows[np.repeat(shifts, sizes) + np.arange(sizes.sum())]
        return rows


def _buckets(index: ShardIndex) -> list[int]:
    return sorted({shard.bucket for shard in index.shards if shard.split == "train"})


def _cut_bucket(index: ShardIndex, clips: _Clips, bucket: int, settings: PlanSettings, epoch: int) -> _Batches:
    """Cut the unseen clips of one bucket into batches, window by window: only a few shards are in use at a time."""
    random = np.random.default_rng([settings.seed, epoch, bucket])
    shards = [i for i, shard in enumerate(index.shards) if (shard.split, shard.bucket) == ("train", bucket)]
    ends = np.cumsum([shard.count for shard in index.shards])  # the samples of a shard are contiguous in the index
    windows, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    leftover, ascending = windows[0], True
    for window in _windows(random.permutation(shards), index, ends, clips, settings):
        last, rows = window[0], np.concatenate([leftover, *window[1]])
        if len(rows) == 0:
            continue
        lengths = clips.lengths[rows].astype(np.int64)
        order = _sort_with_jitter(lengths, settings.length_jitter, random)[:: 1 if ascending else -1]
        rows, lengths = rows[order], lengths[order]
        first_cap = max(int(clips.cap * random.uniform(0.2, 1.0)), int(lengths[0]))
        cut = _cut_sorted(lengths, clips.cap, first_cap, ascending)
        ascending = not ascending  # the leftover of a window is cut first in the next one, and is not delayed further
        kept = len(rows) if last else len(rows) - cut.pop()  # not full: goes to the next window
        leftover = rows[kept:]
        batches = _Batches(rows[:kept], np.array(cut, np.int64), ())
        shuffled = random.permutation(len(cut))
        windows.append(batches.take(shuffled))
        sizes.append(batches.sizes[shuffled])
    joined = np.concatenate(sizes)
    return _Batches(np.concatenate(windows), joined, (len(joined),))


def _windows(
    shards: Rows, index: ShardIndex, ends: Rows, clips: _Clips, settings: PlanSettings
) -> Iterator[tuple[bool, list[Rows]]]:
    """Yield the unseen rows of a few shards at a time, and whether they are the last.

    A window has at least two steps' worth, so that tiny shards still make full batches.
    """
    wanted = 2 * settings.micro_batches_per_step * clips.cap
    window, samples = list[Rows](), 0
    for number, shard in enumerate(shards.tolist(), 1):
        rows = np.arange(ends[shard] - index.shards[shard].count, ends[shard])
        window.append(rows if clips.unseen is None else rows[clips.unseen[rows]])
        samples += int(clips.lengths[window[-1]].sum(dtype=np.int64))
        if number == len(shards) or (len(window) >= settings.shuffle_shards and samples >= wanted):
            yield number == len(shards), window
            window, samples = [], 0


def _sort_with_jitter(lengths: Rows, jitter_sec: float, random: np.random.Generator) -> Rows:
    """Return an order of clips by length, in which those of about equal length have other neighbours each time.

    Milliseconds change the neighbours of short clips, which form the largest batches, and hardly pad long clips. The
    keys differ, so that every way of sorting gives the same order.
    """
    noise = random.normal(0, jitter_sec * SAMPLE_RATE, len(lengths)) if jitter_sec else random.random(len(lengths))
    bits = len(lengths).bit_length()
    keys = np.rint(np.maximum(lengths + noise, 0) * KEY_STEPS).astype(np.uint64) << np.uint64(bits)
    keys |= np.arange(len(lengths), dtype=np.uint64)
    keys.sort()
    order: Rows = (keys & np.uint64(2**bits - 1)).astype(np.int64)
    return order


def _cut_sorted(lengths: Rows, cap: int, first_cap: int, ascending: bool) -> list[int]:
    """Cut clips, nearly sorted by length, into batches with clips × longest ≤ `cap`. Return the size of each.

    `first_cap` bounds the first batch instead, so that the cuts fall elsewhere in each epoch.
    """
    if ascending:  # no clip up to a place is longer than the bound there
        bounds = np.maximum.accumulate(lengths).data
    else:  # no clip from a place on is
        bounds = np.maximum.accumulate(lengths[::-1])[::-1].copy().data
    sizes, start, limit, count = list[int](), 0, first_cap, len(lengths)
    while start < count:
        most = size = min(limit // bounds[start], count - start)
        if ascending and most > 1:  # as many as if all were as long as the last one, and more while they fit
            size = min(limit // bounds[start + most - 1], most)
            while size < most and bounds[start + size] * (size + 1) <= limit:
                size += 1
        sizes.append(max(size, 1))
        start, limit = start + sizes[-1], cap
    return sizes


def _into_steps(
    batches: _Batches, order: Rows, lengths: npt.NDArray[np.integer], per_step: int, random: np.random.Generator
) -> tuple[Rows, Rows]:
    """Group batches of about equal size into steps, so that no rank waits long for another.

    Returns the rows of all batches, shape (clips,), and where each begins and the last ends, shape (steps · M + 1,).
    """
    block = BLOCK_STEPS * per_step
    whole = max(len(order) // block - 1, 0) * block  # but a last block and the remainder: enough to split
    steps = order[:whole].reshape(-1, block)
    padded = batches.sizes * np.maximum.reduceat(lengths[batches.rows], batches.starts)
    steps = np.take_along_axis(steps, np.argsort(padded[steps], axis=1, kind="stable"), axis=1)
    steps = _shuffle(_shuffle(steps.reshape(-1, BLOCK_STEPS, per_step), 1, random), 2, random)
    first = steps.ravel()
    split = _pad_batches([batches.rows[start : start + size] for start, size in
                          np.stack([batches.starts, batches.sizes], 1)[order[whole:]].tolist()], per_step)  # fmt: skip
    rest: list[Rows] = []
    for start in range(0, len(split), block):
        part = split[start : start + block]
        by_size = np.argsort([len(rows) * int(lengths[rows].max(initial=0)) for rows in part], kind="stable")
        by_step = _shuffle(_shuffle(by_size.reshape(1, -1, per_step), 1, random), 2, random)
        rest += [part[number] for number in by_step.ravel().tolist()]
    rows = np.concatenate([batches.take(first), *rest])
    return rows, np.cumsum([0, *batches.sizes[first].tolist(), *map(len, rest)])


def _shuffle(blocks: Rows, axis: int, random: np.random.Generator) -> Rows:
    """Return blocks, shape (blocks, steps, M), with the steps of each, or the batches of each step, in any order."""
    drawn = random.random(blocks.shape[: axis + 1])
    order = np.argsort(drawn, axis=axis, kind="stable")
    return np.take_along_axis(blocks, order if axis == 2 else order[:, :, None], axis=axis)


def _pad_batches(batches: list[Rows], per_step: int) -> list[Rows]:
    """Split the batches with most clips until M divides their number; add empty batches if there are too few clips."""
    order = itertools.count()
    heap = [(-len(batch), next(order), batch) for batch in batches]
    heapq.heapify(heap)
    while len(heap) % per_step and -heap[0][0] > 1:
        _, _, batch = heapq.heappop(heap)
        for half in (batch[::2], batch[1::2]):
            heapq.heappush(heap, (-len(half), next(order), half))
    ordered = [batch for _, _, batch in sorted(heap, key=lambda item: item[1])]  # in their order, halves last
    return ordered + [np.zeros(0, np.int64)] * (-len(ordered) % per_step)
