"""The epoch plan keeps its promises for every corpus, cap and world size."""

import itertools
import json
import re
import subprocess
from dataclasses import replace
from functools import cache
from itertools import combinations
from math import ceil
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.audio.codec import SAMPLE_RATE, frame_count
from sharding.shardset.index import ShardIndex, read_index, read_keys
from sharding.shardset.store import open_store
from streamtrain.data.plan import (
    BLOCK_STEPS,
    EpochPlan,
    PlanError,
    PlanPrefix,
    PlanSettings,
    batch_overlap,
    group_micro_batches,
    micro_batches_of_rank,
    plan_epoch,
    plan_remaining,
    shard_schedule,
    shortest_lengths,
    valid_world_sizes,
)
from streamtrain.model.batches import batch_by_length, cut_batches
from tests.tools.commands import ROOT, run_module
from tests.tools.shard_sets import BYTES_PER_SECOND, make_index

TENTH = SAMPLE_RATE // 10


def batches_of(plan: EpochPlan, step: int) -> list[tuple[int, ...]]:
    return [tuple(plan.micro_batch(step, number).tolist()) for number in range(plan.micro_batches_per_step)]


lengths = st.one_of(st.integers(3, 80).map(lambda tenths: tenths * TENTH), st.integers(400, 8 * SAMPLE_RATE))
durations = st.lists(lengths.map(lambda samples: samples / SAMPLE_RATE), min_size=1, max_size=200)
plan_settings = st.builds(
    PlanSettings,
    batch_seconds=st.sampled_from([8.0, 12.3, 30.0, 160.0]),
    micro_batches_per_step=st.integers(1, 9),
    shuffle_shards=st.integers(1, 5),
    length_jitter=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**31),
    speed_factors=st.sampled_from([(), (0.9, 1.0, 1.1), (0.5, 2.0)]),
    gain_db=st.sampled_from([0.0, 6.0]),
)
indices = st.builds(
    make_index,
    durations,
    shard_sec=st.sampled_from([1.0, 10.0, 1000.0]),
    num_buckets=st.integers(1, 6),
    valid=st.integers(0, 3),
    unlabelled=st.integers(0, 3),
    test=st.integers(0, 3),
)
epochs = st.integers(0, 5)


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_each_labelled_training_clip_comes_exactly_once(index: ShardIndex, wanted: PlanSettings, epoch: int) -> None:
    plan = plan_epoch(index, wanted, epoch)
    assert sorted(plan.rows.tolist()) == index.split("train").tolist()
    seen = [row for step in range(plan.steps) for batch in batches_of(plan, step) for row in batch]
    assert seen == plan.rows.tolist()


@settings(max_examples=200)
@given(indices, st.lists(st.tuples(plan_settings, st.floats(0, 1)), max_size=3), plan_settings, epochs)
def test_an_epoch_that_is_planned_anew_on_its_way_still_has_each_clip_once(
    index: ShardIndex, stops: list[tuple[PlanSettings, float]], wanted: PlanSettings, epoch: int
) -> None:
    begun: list[PlanPrefix] = []
    done: list[int] = []
    for other, share in stops:
        plan = plan_remaining(index, other, epoch, begun)
        steps = int(share * (plan.steps - 1))  # at least one step is left
        done += [row for step in range(steps) for batch in batches_of(plan, step) for row in batch]
        begun.append(PlanPrefix(other, steps))
    rest = plan_remaining(index, wanted, epoch, begun)
    assert sorted([*done, *rest.rows.tolist()]) == index.split("train").tolist()
    assert rest.padded.max() <= wanted.batch_seconds * SAMPLE_RATE
    assert rest.label_characters.sum() == index.samples["label_length"][rest.rows].sum()
    assert rest.steps == ceil(rest.clips.size / wanted.micro_batches_per_step)


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_each_step_has_m_micro_batches_and_each_rank_equally_many(
    index: ShardIndex, wanted: PlanSettings, epoch: int
) -> None:
    plan = plan_epoch(index, wanted, epoch)
    per_step = wanted.micro_batches_per_step
    assert len(plan.starts) == plan.steps * per_step + 1
    assert plan.padded.shape == (plan.steps, per_step)
    for size in valid_world_sizes(per_step):
        assert {len(micro_batches_of_rank(rank, size, per_step)) for rank in range(size)} == {per_step // size}


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_a_micro_batch_is_empty_only_where_none_could_be_split(
    index: ShardIndex, wanted: PlanSettings, epoch: int
) -> None:
    plan = plan_epoch(index, wanted, epoch)
    sizes = np.diff(plan.starts)
    assert (sizes == 0).sum() < wanted.micro_batches_per_step
    assert sizes.min() > 0 or sizes.max() == 1


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_padded_seconds_never_exceed_the_cap(index: ShardIndex, wanted: PlanSettings, epoch: int) -> None:
    plan = plan_epoch(index, wanted, epoch)
    lengths = dict(zip(plan.rows.tolist(), plan.lengths.tolist(), strict=True))  # as heard
    for step in range(plan.steps):
        for number, batch in enumerate(batches_of(plan, step)):
            assert plan.perturbation(step, number).lengths.tolist() == [lengths[row] for row in batch]
            padded = len(batch) * max((int(lengths[row]) for row in batch), default=0)
            assert padded == plan.padded[step, number]
            assert plan.true[step, number] == sum(int(lengths[row]) for row in batch)
            assert padded <= wanted.batch_seconds * SAMPLE_RATE


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_label_characters_are_those_of_all_clips_of_the_step(
    index: ShardIndex, wanted: PlanSettings, epoch: int
) -> None:
    plan = plan_epoch(index, wanted, epoch)
    characters = index.samples["label_length"].tolist()
    for step in range(plan.steps):
        assert plan.label_characters[step] == sum(characters[row] for batch in batches_of(plan, step) for row in batch)


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_the_same_arguments_make_the_same_plan(index: ShardIndex, wanted: PlanSettings, epoch: int) -> None:
    first, again = plan_epoch(index, wanted, epoch), plan_epoch(index, wanted, epoch)
    assert first.hash == again.hash
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.starts, again.starts)


@settings(max_examples=100)
@given(indices, plan_settings, st.integers(1, 3), st.integers(1, 20))
def test_a_node_uses_a_shard_from_the_first_to_the_last_step_at_which_one_of_its_ranks_does(
    index: ShardIndex, wanted: PlanSettings, ranks_per_node: int, at_once: int
) -> None:
    plan = plan_epoch(index, wanted, 0)
    world_size = max(valid_world_sizes(wanted.micro_batches_per_step))
    steps: dict[tuple[int, int], list[int]] = {}
    for step in range(plan.steps):
        for rank in range(world_size):
            for number in micro_batches_of_rank(rank, world_size, wanted.micro_batches_per_step):
                for row in plan.micro_batch(step, number).tolist():
                    key = rank // ranks_per_node, int(index.samples["shard"][row])
                    steps.setdefault(key, []).append(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamtrain.data.plan.SCHEDULED_BATCHES", at_once)
        uses = shard_schedule(index, plan, [rank // ranks_per_node for rank in range(world_size)])
    found = zip(uses.node.tolist(), uses.shard.tolist(), uses.first.tolist(), uses.last.tolist(), strict=True)
    assert {(node, shard): (first, last) for node, shard, first, last in found} == {
        key: (min(seen), max(seen)) for key, seen in steps.items()
    }


@settings(max_examples=300)
@given(indices, plan_settings, epochs, st.one_of(st.none(), st.floats(1.0, 8.0)))
def test_merged_forwards_hold_each_micro_batch_once_within_the_cap_and_are_equally_many(
    index: ShardIndex, wanted: PlanSettings, epoch: int, times: float | None
) -> None:
    plan = plan_epoch(index, wanted, epoch)
    cap = None if times is None else times * wanted.batch_seconds
    for step, size in itertools.product(range(plan.steps), valid_world_sizes(wanted.micro_batches_per_step)):
        ranks = group_micro_batches(plan, step, size, cap)
        assert len({len(forwards) for forwards in ranks}) == 1
        for rank, forwards in enumerate(ranks):
            mine = micro_batches_of_rank(rank, size, wanted.micro_batches_per_step)
            assert sorted(number for forward in forwards for number in forward) == list(mine)
            assert all(forwards)
            assert cap is not None or all(len(forward) == 1 for forward in forwards)
            for forward in forwards:
                rows = np.maximum(plan.clips[step, forward], 1).sum()
                assert len(forward) == 1 or rows * plan.longest[step, forward].max() <= round((cap or 0) * SAMPLE_RATE)
        rows = [np.maximum(plan.clips[step, rank::size], 1).sum() for rank in range(size)]
        whole = [rows[rank] * plan.longest[step, rank::size].max() / SAMPLE_RATE for rank in range(size)]
        assert cap is None or max(whole) > cap or len(ranks[0]) == 1


@given(indices, plan_settings)
def test_padding_and_idle_are_shares_and_one_rank_never_waits(index: ShardIndex, wanted: PlanSettings) -> None:
    plan = plan_epoch(index, wanted, 0)
    assert 0 <= plan.padding < 1
    assert plan.rank_idle(1) == 0
    assert all(0 <= plan.rank_idle(size) < 1 for size in valid_world_sizes(wanted.micro_batches_per_step))
    assert plan.padding == pytest.approx(1 - plan.lengths.sum() / plan.padded.sum())


@pytest.mark.parametrize("per_step", range(1, 25))
def test_the_ranks_of_every_valid_world_size_share_a_step_between_them(per_step: int) -> None:
    for size in range(-1, per_step + 3):
        if size > 0 and per_step % size == 0:
            shares = [micro_batches_of_rank(rank, size, per_step) for rank in range(size)]
            assert sorted(number for share in shares for number in share) == list(range(per_step))
        else:
            with pytest.raises(PlanError) as refused:
                micro_batches_of_rank(0, size, per_step)
            named = str(refused.value).split("hint: run ")[1].split(" rank")[0]
            assert [int(number) for number in re.findall(r"\d+", named)] == valid_world_sizes(per_step)
            assert f"{size} ranks cannot share {per_step} micro-batches" in str(refused.value)


@settings(max_examples=300)
@given(indices, plan_settings, epochs)
def test_a_clip_is_played_at_one_of_the_speeds_where_its_label_and_the_cap_allow_it(
    index: ShardIndex, wanted: PlanSettings, epoch: int
) -> None:
    plan = plan_epoch(index, wanted, epoch)
    clips = index.samples[plan.rows]
    if plan.speeds is None:
        assert not wanted.speed_factors
        assert np.array_equal(plan.lengths, clips["samples"])
        return
    for clip, speed, length in zip(clips, plan.speeds.tolist(), plan.lengths.tolist(), strict=True):
        assert speed in (*wanted.speed_factors, 1.0)
        assert length == round(int(clip["samples"]) / speed)
        if speed > 1:
            assert frame_count(length) >= max(2 * int(clip["label_length"]) - 1, 1)


@given(indices, plan_settings, epochs)
def test_no_epoch_plays_a_clip_faster_than_was_foretold(index: ShardIndex, wanted: PlanSettings, epoch: int) -> None:
    plan = plan_epoch(index, wanted, epoch)
    assert (plan.lengths >= shortest_lengths(index.samples, wanted.speed_factors)[plan.rows]).all()


def test_speeds_and_gains_depend_on_seed_epoch_and_clip_alone(meadow: ShardIndex) -> None:
    """Not on what shapes the batches, unless the cap leaves no room, nor on where in the index a clip stands."""

    def drawn(settings: PlanSettings, epoch: int = 0, index: ShardIndex = meadow) -> list[tuple[float, float]]:
        plan = plan_epoch(index, settings, epoch)
        assert plan.speeds is not None
        assert plan.gains is not None
        by_clip = dict(zip(index.samples["checksum"][plan.rows].tolist(),
                           zip(plan.speeds.tolist(), plan.gains.tolist(), strict=True), strict=True))  # fmt: skip
        return [by_clip[checksum] for checksum in sorted(by_clip)]

    wanted = PlanSettings(batch_seconds=20, micro_batches_per_step=4, speed_factors=(0.9, 1.0, 1.1), gain_db=6)
    first = drawn(wanted)
    assert drawn(replace(wanted, batch_seconds=40, micro_batches_per_step=2, length_jitter=0.1)) == first
    table = meadow.samples.copy()
    last = meadow.shards[-1]
    table[-last.count :] = table[-last.count :][::-1]
    assert drawn(wanted, index=replace(meadow, samples=table)) == first
    others = [drawn(wanted, epoch=1), drawn(replace(wanted, seed=1))]
    for other in others:
        assert 0.5 < np.mean([a[0] != b[0] for a, b in zip(first, other, strict=True)]) < 0.8  # two thirds by chance
        assert all(a[1] != b[1] for a, b in zip(first, other, strict=True))


def test_speeds_and_gains_are_drawn_evenly() -> None:
    settings = replace(REAL, speed_factors=(0.9, 1.0, 1.1), gain_db=6)
    plan = plan_epoch(pasketti_index(), settings, 0)
    assert plan.speeds is not None
    assert plan.gains is not None
    for factor in settings.speed_factors:
        # of the short ones many are too dense for another speed
        free = pasketti_index().samples["samples"][plan.rows] > 3 * SAMPLE_RATE
        assert np.mean(plan.speeds[free] == factor) == pytest.approx(1 / 3, abs=0.02)
    decibels = 20 * np.log10(plan.gains)
    assert abs(decibels).max() <= 6
    assert np.histogram(decibels, 6, (-6, 6))[0] / len(decibels) == pytest.approx(1 / 6, abs=0.01)


@pytest.mark.parametrize(("factor", "symbols", "cap", "length"), [
    (0.8, 40, 30, 20_000), (1.25, 20, 30, 12_800), (1.25, 21, 30, 16_000), (0.8, 10, 1.2, 16_000),
])  # fmt: skip
def test_a_clip_stays_as_it_is_only_where_it_must(factor: float, symbols: int, cap: float, length: int) -> None:
    """A second of speech: 39 frames when it is played a quarter faster, enough for 20 symbols whatever they are."""
    index = make_index([1.0] * 9)
    index.samples["label_length"] = symbols
    plan = plan_epoch(index, PlanSettings(cap, 2, speed_factors=(factor,)), 0)
    assert set(plan.lengths.tolist()) == {length}


def test_played_at_other_speeds_the_real_shape_is_packed_as_tightly() -> None:
    settings = replace(REAL, speed_factors=(0.9, 1.0, 1.1))
    plans = [plan_epoch(pasketti_index(), settings, epoch) for epoch in range(8)]
    assert max(plan.padding for plan in plans) <= 0.01
    assert fmean(plan.rank_idle(8) for plan in plans) <= 0.01
    assert max(plan.padded.max() for plan in plans) <= 160 * SAMPLE_RATE


@pytest.fixture(scope="module")
def meadow() -> ShardIndex:
    random = np.random.default_rng(5)
    return make_index(random.uniform(0.5, 6.0, 400).tolist(), shard_sec=40)


def test_another_epoch_seed_or_micro_batch_count_makes_another_plan(meadow: ShardIndex) -> None:
    wanted = PlanSettings(batch_seconds=20, micro_batches_per_step=4)
    plans = [
        plan_epoch(meadow, wanted, 0),
        plan_epoch(meadow, wanted, 1),
        plan_epoch(meadow, replace(wanted, seed=1), 0),
        plan_epoch(meadow, replace(wanted, micro_batches_per_step=2), 0),
        plan_epoch(meadow, replace(wanted, batch_seconds=21), 0),
        plan_epoch(meadow, replace(wanted, length_jitter=0.02), 0),
        plan_epoch(meadow, replace(wanted, speed_factors=(0.9, 1.0)), 0),
        plan_epoch(meadow, replace(wanted, gain_db=3), 0),
        plan_epoch(meadow, replace(wanted, gain_db=6), 0),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)


def test_the_hash_tells_how_batches_are_grouped_into_steps(meadow: ShardIndex) -> None:
    plan = plan_epoch(meadow, PlanSettings(batch_seconds=20, micro_batches_per_step=4), 0)
    assert plan.hash != replace(plan, micro_batches_per_step=2).hash


def test_a_clip_over_the_cap_is_named_with_its_shard(meadow: ShardIndex) -> None:
    index = make_index([1.0, 2.0, 9.5], num_buckets=2)
    with pytest.raises(PlanError) as refused:
        plan_epoch(index, PlanSettings(batch_seconds=9, micro_batches_per_step=2), 0)
    assert "train/b01-00001.tar (row 2 of the index) lasts 9.50 s, data.batch_seconds is 9" in str(refused.value)
    assert plan_epoch(index, PlanSettings(batch_seconds=9.5, micro_batches_per_step=2), 0).steps == 2


def test_a_shard_set_without_training_clips_is_refused() -> None:
    with pytest.raises(PlanError, match="no labelled training clips"):
        plan_epoch(make_index([], valid=3), PlanSettings(batch_seconds=9, micro_batches_per_step=2), 0)


@pytest.mark.parametrize("clips", [1, 2, 7, 8, 9])
def test_a_corpus_smaller_than_a_step_fills_it_with_single_clips(clips: int) -> None:
    plan = plan_epoch(make_index([1.0] * clips), PlanSettings(batch_seconds=30, micro_batches_per_step=8), 0)
    assert plan.steps == 1
    assert sorted(np.diff(plan.starts).tolist(), reverse=True) == ([2] + [1] * 7 if clips == 9 else
                                                                  [1] * clips + [0] * (8 - clips))  # fmt: skip


@pytest.mark.parametrize("clips", range(762, 774, 3))
def test_a_few_long_clips_left_over_at_the_end_leave_no_micro_batch_empty(clips: int) -> None:
    """About 129 batches of six: what is over a block of 128 cannot fill a step of eight by itself."""
    index = make_index([25.0] * clips, shard_sec=3700)
    plan = plan_epoch(index, PlanSettings(batch_seconds=160, micro_batches_per_step=8), 0)
    assert np.diff(plan.starts).min() > 0


# --- on the shape of the challenge ----------------------------------------------------------------------------------


def pasketti_seconds(clips: int) -> list[float]:
    """Log-normal, median 1.15 s, sigma 1.03, clipped to 0.3 to 25 s: as the challenge's clips are distributed."""
    seconds = np.random.default_rng(0).lognormal(np.log(1.15), 1.03, clips)
    return np.clip(seconds, 0.3, 25.0).tolist()  # type: ignore[no-any-return]


@cache
def pasketti_index(shard_mb: float = 64) -> ShardIndex:
    return make_index(pasketti_seconds(50_000), shard_mb * 2**20 / BYTES_PER_SECOND, num_buckets=8)


REAL = PlanSettings(batch_seconds=160, micro_batches_per_step=8)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_on_the_real_shape_padding_is_under_one_percent_and_ranks_hardly_wait(epoch: int) -> None:
    plan = plan_epoch(pasketti_index(), REAL, epoch)
    assert sorted(plan.rows.tolist()) == list(range(50_000))
    assert plan.padded.max() <= 160 * SAMPLE_RATE
    assert plan.padding <= 0.01
    assert plan.rank_idle(8) <= 0.01
    assert plan.padded.mean() >= 0.95 * 160 * SAMPLE_RATE


def count_pairs_that_meet_again(first: EpochPlan, second: EpochPlan) -> float:
    """As `batch_overlap` tells, pair by pair."""
    pairs = [
        {pair for step in range(plan.steps) for batch in batches_of(plan, step)
         for pair in combinations(sorted(batch), 2)}
        for plan in (first, second)
    ]  # fmt: skip
    return len(pairs[0] & pairs[1]) / max(len(pairs[0]), 1)


@settings(max_examples=100)
@given(indices, plan_settings)
def test_the_share_of_pairs_that_meet_again_is_what_counting_them_gives(
    index: ShardIndex, wanted: PlanSettings
) -> None:
    plans = [plan_epoch(index, wanted, epoch) for epoch in (0, 1)]
    assert batch_overlap(plans[0], plans[1]) == pytest.approx(count_pairs_that_meet_again(plans[0], plans[1]))


def test_most_clips_meet_other_companions_in_the_next_epoch() -> None:
    """The more so the more padding is paid for it."""
    padding, again = [], []
    for jitter in (0.0, REAL.length_jitter, 0.02):
        plans = [plan_epoch(pasketti_index(), replace(REAL, length_jitter=jitter), epoch) for epoch in (0, 1)]
        assert batch_overlap(plans[0], plans[0]) == 1
        padding.append(plans[0].padding)
        again.append(batch_overlap(*plans))
    assert padding == sorted(padding)
    assert again == sorted(again, reverse=True)
    assert again[1] <= 0.4
    assert again[2] <= 0.15


def shards_in_use(index: ShardIndex, plan: EpochPlan, cap: float) -> dict[int, int]:
    """Per bucket, the most shards that are begun and not finished at once, leftovers apart.

    A window leaves over less than one micro-batch of its longest clips, which may wait for several windows; shards
    that stay open for no more than that do not count.
    """
    bucket = np.array([shard.bucket for shard in index.shards])
    step = np.repeat(np.arange(plan.steps), np.diff(plan.starts[:: plan.micro_batches_per_step]))
    clips = np.zeros((len(index.shards), plan.steps), np.int64)
    np.add.at(clips, (index.samples["shard"][plan.rows], step), 1)
    read = clips.cumsum(axis=1)
    unread = np.where(read > 0, read[:, -1:] - read, 0)  # (shards, steps) of the shards that are begun
    most = {}
    for b in np.unique(bucket).tolist():
        counts = np.sort(unread[bucket == b], axis=0)
        shortest = index.samples["samples"][np.isin(index.samples["shard"], np.flatnonzero(bucket == b))].min()
        leftover = counts.cumsum(axis=0) <= cap * SAMPLE_RATE // shortest
        most[b] = int(((counts > 0) & ~leftover).sum(axis=0).max())
    return most


@pytest.mark.parametrize("shuffle_shards", [1, 2, 4])
@pytest.mark.parametrize("shard_mb", [1, 16])
def test_only_a_window_of_each_bucket_and_the_next_are_in_use_at_a_time(shard_mb: float, shuffle_shards: int) -> None:
    """Beyond that only what a block of steps spans, in which batches change places."""
    index = pasketti_index(shard_mb)
    settings = PlanSettings(batch_seconds=40, micro_batches_per_step=2, shuffle_shards=shuffle_shards)
    used = shards_in_use(index, plan_epoch(index, settings, 0), settings.batch_seconds)
    step_sec, shard_sec = 2 * settings.batch_seconds, shard_mb * 2**20 / BYTES_PER_SECOND
    window = max(shuffle_shards, ceil(2 * step_sec / shard_sec))  # never less than two steps' worth
    seconds = {b: sum(shard.seconds for shard in index.shards if shard.bucket == b) for b in used}
    for b, most in used.items():
        block = ceil(BLOCK_STEPS * step_sec * seconds[b] / sum(seconds.values()) / shard_sec)
        assert most <= 2 * window + block


def test_the_buckets_run_out_together() -> None:
    index = pasketti_index()
    plan = plan_epoch(index, replace(REAL, batch_seconds=40), 0)  # some 300 steps, of which 48 change places
    bucket = np.array([shard.bucket for shard in index.shards])[index.samples["shard"][plan.rows]]
    half = plan.starts[plan.steps // 2 * REAL.micro_batches_per_step]
    for b in np.unique(bucket).tolist():
        seconds = np.where(bucket == b, plan.lengths, 0)
        assert seconds[:half].sum() / seconds.sum() == pytest.approx(0.5, abs=0.06)


@pytest.mark.long
def test_a_million_clips_are_planned_with_the_same_promises() -> None:
    index = make_index(pasketti_seconds(1_000_000), 64 * 2**20 / BYTES_PER_SECOND, num_buckets=8)
    plan = plan_epoch(index, REAL, 0)
    assert np.array_equal(np.sort(plan.rows), np.arange(1_000_000))
    assert plan.padded.max() <= 160 * SAMPLE_RATE
    assert plan.padding <= 0.01
    assert plan.rank_idle(8) <= 0.01


# --- the forecast ---------------------------------------------------------------------------------------------------


def forecast(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run_module("streamtrain", "plan", *arguments, "--config", ROOT / "configs" / "demo.json")


def test_the_forecast_tells_what_the_plan_does_and_lists_every_clip_once(small_shards: Path, tmp_path: Path) -> None:
    settings = ["--set", f"data.shards={small_shards}", "data.batch_seconds=5"]  # no shard set named beside them
    done = forecast("--json", "--world-size", 2, "--keys", tmp_path / "keys.jsonl", *settings)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    store = open_store(small_shards)
    index = read_index(store)
    plan = plan_epoch(index, PlanSettings(batch_seconds=5, micro_batches_per_step=2), 0)
    assert (told["steps_per_epoch"], told["clips"]) == (plan.steps, len(plan.rows))
    assert told["padding"] == pytest.approx(plan.padding)
    assert told["rank_idle"] == pytest.approx(plan.rank_idle(2))
    assert told["over_cap"] == 0
    assert told["world_sizes"] == [1, 2]
    rows = [json.loads(line) for line in (tmp_path / "keys.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["micro_batch"], row["rank"]) for row in rows] == [
        (step, number, number) for step in range(plan.steps) for number in range(2)
    ]
    assert [key for row in rows for key in row["keys"]] == read_keys(store, index)[plan.rows].tolist()


def test_the_forecast_draws_and_lists_when_which_shard_is_needed(small_shards: Path, tmp_path: Path) -> None:
    out = ["--plot", tmp_path / "plan.png", "--shard-schedule", tmp_path / "fetches.jsonl"]
    done = forecast(small_shards, "--world-size", 2, "--ranks-per-node", 1, "--set", "data.batch_seconds=5", *out)
    assert done.returncode == 0, done.stderr
    for said in ("2 on 2 nodes", "MiB a node and epoch", "meet again in the next epoch", "to fetch each shard once"):
        assert said in done.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "fetches.jsonl").read_text("utf-8").splitlines()]
    train = {shard.name for shard in read_index(open_store(small_shards)).shards if shard.split == "train"}
    assert {row["shard"] for row in rows} == train
    assert {row["node"] for row in rows} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", 3], "PlanError: 3 ranks cannot share 2 micro-batches per step evenly"),
        (["--world-size", 0], "hint: run 1 or 2 ranks"),
        (["--epoch", -1], "PlanError: epoch -1: epochs are counted from 0"),
        (["--ranks-per-node", 0], "--ranks-per-node. Input should be greater than or equal to 1"),
        (["--keys", "/dev/null/keys.jsonl"], "/dev/null/keys.jsonl: Not a directory"),
    ],
)
def test_a_run_that_cannot_be_is_told_without_a_traceback(
    arguments: list[object], said: str, small_shards: Path
) -> None:
    done = forecast(small_shards, *arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr


# --- evaluation, and the cut ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(400, 400_000), max_size=80), st.sampled_from([0.01, 5.0, 30.0, 1000.0]))
def test_evaluation_takes_each_clip_once_and_pads_beyond_the_cap_only_a_clip_alone(
    lengths: list[int], batch_seconds: float
) -> None:
    batches = batch_by_length(lengths, batch_seconds)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, length in zip(batches, longest, strict=True):
        assert len(batch) == 1 or len(batch) * length <= batch_seconds * SAMPLE_RATE


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 300), st.integers(50, 300))
def test_a_cut_is_made_only_where_one_clip_more_would_not_fit(lengths: list[int], cap: int, first_cap: int) -> None:
    rows, values = np.arange(len(lengths)), np.array(lengths)
    batches = list(cut_batches(rows, values, cap, first_cap))
    assert [row for batch in batches for row in batch] == rows.tolist()
    for number, batch in enumerate(batches):
        limit = cap if number else first_cap
        assert len(batch) * values[batch].max() <= limit
        one_more = values[batch[0] : batch[-1] + 2]
        assert len(one_more) == len(batch) or len(one_more) * one_more.max() > limit
