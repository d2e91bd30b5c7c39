"""Whatever the number of ranks and threads, every clip arrives once, whole, and in the plan's order."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor

from sharding.audio.codec import SAMPLE_RATE, decode, encode
from sharding.errors import ShardError, StoreError
from sharding.labels.units import ctc_frames_needed
from sharding.shardset.index import read_index, read_keys
from sharding.shardset.sample import Sample
from sharding.shardset.store import FolderStore
from streamtrain.data.collate import collate, silence_too_dense
from streamtrain.data.dataset import BATCHES_AHEAD, ShardStream, read_ahead
from streamtrain.data.patience import Deadline, StallError
from streamtrain.data.plan import Perturbation, PlanError, PlanSettings, micro_batches_of_rank, plan_epoch
from streamtrain.distributed import LostStepError, World
from streamtrain.model.ctc import ctc_sum
from tests.tools.ports import free_port
from tests.tools.shard_sets import make_index
from tests.tools.stream_sets import (
    SETTINGS,
    VOCAB,
    keys_of,
    opened_by_nobody,
    plan_of,
    run_epoch,
    stream_of,
    training_keys,
    write_set,
)
from tests.tools.training_runs import start


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_clip_is_seen_once_by_all_ranks_together(world_size: int, workers: int, meadow: Path) -> None:
    plan = plan_of(meadow)
    items = run_epoch(meadow, world_size, workers, plan)
    assert keys_of(items) == training_keys(meadow)
    assert set(keys_of(items).values()) == {1}
    places = Counter((item.step, *item.micro_batch_ids) for item in items)
    assert places == {(step, number): 1 for step in range(plan.steps) for number in range(8)}


@pytest.mark.parametrize("clips", [1, 2, 9])
@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_a_corpus_smaller_than_the_world_gives_each_rank_a_silent_row(
    world_size: int, clips: int, tmp_path: Path
) -> None:
    """With one clip there are fewer shards than ranks, too."""
    write_set(tmp_path, clips, per_shard=2)
    plan = plan_of(tmp_path)
    items = run_epoch(tmp_path, world_size, 2, plan)
    assert keys_of(items) == training_keys(tmp_path)
    assert len(items) == plan.steps * 8
    silent = [item.batch for item in items if item.batch.keys == ("",)]
    assert len(silent) == max(0, 8 - clips)
    for batch in silent:
        assert batch.weights.tolist() == [0.0]
        assert batch.target_lengths.tolist() == [0]
        assert not batch.inputs.any()


@pytest.mark.parametrize("world_size", [2, 8])
def test_a_micro_batch_is_the_same_whoever_computes_it(world_size: int, meadow: Path) -> None:
    plan = plan_of(meadow)
    alone = {(item.step, *item.micro_batch_ids): item.batch for item in run_epoch(meadow, 1, 3, plan)}
    for item in run_epoch(meadow, world_size, 1, plan):
        other = alone[item.step, *item.micro_batch_ids]
        assert item.batch.keys == other.keys
        assert torch.equal(item.batch.inputs, other.inputs)
        assert torch.equal(item.batch.targets, other.targets)


def test_batches_come_in_the_plans_order(meadow: Path) -> None:
    plan = plan_of(meadow)
    stream = stream_of(meadow, rank=1, size=4, workers=3)
    items = list(stream.epoch(plan))
    expected = [(step, n) for step in range(plan.steps) for n in (1, 5)]
    assert [(item.step, *item.micro_batch_ids) for item in items] == expected
    store = FolderStore(meadow)
    keys = read_keys(store, read_index(store))
    for item in items:
        assert list(item.batch.keys) == keys[plan.micro_batch(item.step, *item.micro_batch_ids)].tolist()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1), (8, 2, 4)])
@pytest.mark.parametrize("workers", [(2, 2, 2), (0, 3, 1)])
def test_stopped_twice_at_any_step_it_goes_on_as_if_uninterrupted(
    sizes: tuple[int, int, int], workers: tuple[int, int, int], meadow: Path
) -> None:
    """With other ranks and other threads each time."""
    plan = plan_of(meadow)
    assert plan.steps >= 3
    whole = {(item.step, *item.micro_batch_ids): item.batch.keys for item in run_epoch(meadow, 1, 2, plan)}
    for stops in combinations(range(plan.steps + 1), 2):
        seen = []
        for size, threads, first, last in zip(sizes, workers, (0, *stops), (*stops, plan.steps), strict=True):
            seen += [item for item in run_epoch(meadow, size, threads, plan, first) if item.step < last]
        assert len(seen) == len(whole)
        assert {(item.step, *item.micro_batch_ids): item.batch.keys for item in seen} == whole


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.lists(st.floats(0.1, 3), min_size=1))
def test_a_machine_knows_when_its_own_ranks_read_which_shard_however_many_the_others_have(
    slots: list[int], forwards: int, seconds: list[float]
) -> None:
    index, size = make_index(seconds, shard_sec=2.0), sum(slots)
    plan = plan_epoch(index, replace(SETTINGS, micro_batches_per_step=size * forwards), 0)
    for node, count in enumerate(slots):
        ranks = range(sum(slots[:node]), sum(slots[: node + 1]))
        read = defaultdict(set)
        for step, rank in product(range(plan.steps), ranks):
            for number in micro_batches_of_rank(rank, size, plan.micro_batches_per_step):
                for shard in index.samples["shard"][plan.micro_batch(step, number)].tolist():
                    read[shard].add(step)
        for rank in ranks:
            world = World(rank, size, rank % count, count, frozenset(ranks))
            uses = ShardStream(index, FolderStore(Path()), VOCAB, True, world).schedule(plan)
            found = zip(uses.shard.tolist(), uses.first.tolist(), uses.last.tolist(), strict=True)
            assert {shard: (first, last) for shard, first, last in found} == {
                shard: (min(steps), max(steps)) for shard, steps in read.items()
            }


@pytest.mark.long
def test_ranks_find_their_neighbours_under_either_launcher_on_machines_of_unequal_slots(tmp_path: Path) -> None:
    script, hosts = tmp_path / "meet.py", tmp_path / "hosts"
    script.write_text(
        "from streamtrain.distributed import process_group\n"
        "with process_group() as world:\n"
        "    print(f'rank {world.rank} with {sorted(world.find_neighbours().neighbours)}.')\n"
    )
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=3\n")
    port = str(free_port())
    deepspeed = ["deepspeed", "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    torchrun = ["torchrun", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    for commands in (
        [[*deepspeed, "--node_rank", "0"], [*deepspeed, "--node_rank", "1"]],
        [[*torchrun, "--node_rank", "0"], [*torchrun, "--node_rank", "1", "--nproc_per_node", "3"]],
    ):
        machines = [start([*command, script], tmp_path / f"{node}.out") for node, command in enumerate(commands)]
        assert [machine.wait(120) for machine in machines] == [0, 0]
        said = "".join((tmp_path / f"{node}.out").read_text() for node in (0, 1))
        assert "rank 0 with [0]." in said
        assert all(f"rank {rank} with [1, 2, 3]." in said for rank in (1, 2, 3))
        for node in (0, 1):
            (tmp_path / f"{node}.out").unlink()


def test_a_world_that_does_not_divide_a_step_is_refused(meadow: Path) -> None:
    with pytest.raises(PlanError, match="3 ranks cannot share 8 micro-batches"):
        next(stream_of(meadow, size=3).epoch(plan_of(meadow)))


def test_a_batch_holds_each_clip_normalised_padded_and_labelled(meadow: Path) -> None:
    stream = stream_of(meadow)
    plan = plan_of(meadow)
    rows = plan.micro_batch(0, 0)
    batch, samples = next(stream.batches([rows]))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    assert batch.input_lengths.tolist() == stream.index.samples["samples"][rows].tolist()
    assert batch.inputs.shape == (len(rows), batch.input_lengths.max())
    raw = collate(samples, Perturbation.as_recorded(batch.input_lengths.numpy()), VOCAB, normalize=False)
    for row, (sample, length) in enumerate(zip(samples, batch.input_lengths.tolist(), strict=True)):
        expected = extractor(raw.inputs[row, :length].numpy(), sampling_rate=SAMPLE_RATE)["input_values"][0]
        assert torch.allclose(batch.inputs[row, :length], torch.from_numpy(expected), atol=1e-6)
        assert not batch.inputs[row, length:].any()
        assert VOCAB.decode(batch.targets[row, : batch.target_lengths[row]].tolist()) == sample.text
    assert batch.weights.tolist() == [1.0] * len(rows)


@given(st.lists(st.text("kaæ", max_size=8), min_size=1, max_size=4), st.integers(1, 16))
def test_a_clip_without_frames_for_its_label_weighs_nothing_and_is_named(texts: list[str], frames: int) -> None:
    """Then the loss is what the others' is, and finite; else infinite."""
    audio = encode(np.zeros(400, np.float32))
    samples = [Sample(f"clip-{row}", audio, text, "labelled", f"clip-{row}") for row, text in enumerate(texts)]
    lengths = torch.full((len(texts),), frames)
    whole = collate(samples, Perturbation.as_recorded(np.full(len(texts), 400)), VOCAB, normalize=False)
    batch = silence_too_dense(whole, lengths)
    crowded = [ctc_frames_needed(text) > frames for text in texts]
    assert batch.weights.tolist() == [float(not one) for one in crowded]
    assert batch.too_dense == tuple(sample.key for sample, one in zip(samples, crowded, strict=True) if one)
    scores = torch.zeros(len(texts), frames, len(VOCAB)).log_softmax(-1)
    before, after = (
        ctc_sum(scores, lengths, one.targets, one.target_lengths, one.weights, VOCAB.blank) for one in (whole, batch)
    )
    assert torch.isfinite(after)
    assert bool(torch.isfinite(before)) == (not any(crowded))


# --- augmentation ---------------------------------------------------------------------------------------------------

LOUD_AND_FAST = replace(SETTINGS, speed_factors=(0.8, 1.0, 1.25), gain_db=6)


def heard(folder: Path, settings: PlanSettings, normalize: bool = False, epoch: int = 0) -> dict[str, torch.Tensor]:
    """What a model is given of each clip, (samples,)."""
    plan = plan_epoch(read_index(FolderStore(folder)), settings, epoch)
    batches = [item.batch for item in stream_of(folder, normalize=normalize).epoch(plan)]
    return {
        key: row[:length]
        for batch in batches
        for key, row, length in zip(batch.keys, batch.inputs, batch.input_lengths.tolist(), strict=True)
        if key
    }


def test_a_faster_clip_is_shorter_and_higher(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(32_000) / SAMPLE_RATE).astype(np.float32) / 2
    write_set(tmp_path, clips=60, lengths=[32_000] * 60, spoilt=dict.fromkeys(range(60), encode(tone)))
    clips = heard(tmp_path, replace(SETTINGS, speed_factors=(0.8, 1.0, 1.25)))
    seen = set()
    for clip in clips.values():
        speed = 32_000 / len(clip)
        seen.add(speed)
        loudest = np.abs(np.fft.rfft(clip.numpy())).argmax() * SAMPLE_RATE / len(clip)  # Hz
        assert loudest == pytest.approx(440 * speed, abs=1)
        assert float(clip.abs()[400:-400].max()) == pytest.approx(0.5, abs=0.01)
    assert seen == {0.8, 1.0, 1.25}


def test_gain_changes_loudness_alone_and_nothing_where_the_model_normalises(meadow: Path) -> None:
    plain, louder = heard(meadow, SETTINGS), heard(meadow, replace(SETTINGS, gain_db=6))
    gains = set()
    for key, clip in plain.items():
        gain = float(louder[key].square().sum().sqrt() / clip.square().sum().sqrt())
        assert torch.allclose(louder[key], gain * clip, atol=1e-6)
        gains.add(round(20 * np.log10(gain), 3))
    assert len(gains) == len(plain)
    assert -6 <= min(gains) < -3
    assert 3 < max(gains) <= 6
    plain, louder = heard(meadow, SETTINGS, normalize=True), heard(meadow, replace(SETTINGS, gain_db=6), normalize=True)
    assert all(torch.allclose(louder[key], clip, atol=1e-3) for key, clip in plain.items())


def test_a_resume_hears_the_same_whoever_computes_it_and_the_next_epoch_something_else(meadow: Path) -> None:
    plan = plan_epoch(read_index(FolderStore(meadow)), LOUD_AND_FAST, 0)
    whole = {(item.step, *item.micro_batch_ids): item.batch for item in run_epoch(meadow, 1, 2, plan)}
    for item in run_epoch(meadow, 4, 1, plan, first_step=1):
        assert torch.equal(item.batch.inputs, whole[item.step, *item.micro_batch_ids].inputs)
        assert not item.batch.failed
    now, then = heard(meadow, LOUD_AND_FAST), heard(meadow, LOUD_AND_FAST, epoch=1)
    assert now.keys() == then.keys()
    same = [key for key in now if now[key].shape == then[key].shape and torch.equal(now[key], then[key])]
    assert not same


def test_augmentation_leaves_validation_as_it_was_recorded(meadow: Path) -> None:
    stream = stream_of(meadow, normalize=False)
    rows = stream.index.split("valid")
    ((batch, samples),) = stream.batches([rows])
    for row, sample in zip(batch.inputs, samples, strict=True):
        sound, _ = decode(sample.audio)
        assert np.array_equal(row[: len(sound)].numpy(), sound)


# --- what is wrong with the bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "audio",
    [b"", b"not audio at all", encode(np.full(4_000, 0.1, np.float32)), encode(np.zeros(30_000, np.float32))[:-40]],
    ids=["empty", "text", "another length", "cut off"],
)
def test_a_clip_that_does_not_decode_is_a_silent_row_of_its_planned_length(audio: bytes, tmp_path: Path) -> None:
    write_set(tmp_path, clips=12, spoilt={5: audio})
    stream = stream_of(tmp_path)
    plan = plan_of(tmp_path)
    items = list(stream.epoch(plan))
    assert keys_of(items) == training_keys(tmp_path)
    (batch,) = [item.batch for item in items if "clip-0-005" in item.batch.keys]
    row = batch.keys.index("clip-0-005")
    assert batch.failed == ("clip-0-005",)
    assert batch.weights[row] == 0
    assert not batch.inputs[row].any()
    assert batch.input_lengths[row] == plan.lengths[np.flatnonzero(plan.rows == 12 // 2 + 2)[0]]
    weights = sum(float(item.batch.weights.sum()) for item in items)
    assert weights == 11


def test_a_flipped_byte_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    """In a header, in sound, in padding, in a label: wherever it is."""
    write_set(tmp_path, clips=6)
    shard = tmp_path / "train" / "b01-00000.tar"
    whole = shard.read_bytes()
    plan = plan_of(tmp_path)
    end = len(whole) - 1024  # what follows is no sample's: the end-of-archive mark
    for position in [0, 99, 511, 512, 600, end - 1, *np.random.default_rng(0).integers(0, end, 14).tolist()]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"train/b01-00000\.tar: checksum of the sample at byte \d+ is"):
            run_epoch(tmp_path, 1, 2, plan)


def test_a_shard_cut_off_or_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_set(tmp_path, clips=6)
    shard = tmp_path / "train" / "b00-00000.tar"
    plan = plan_of(tmp_path)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ShardError, match=r"b00-00000\.tar: checksum"):
        run_epoch(tmp_path, 1, 2, plan)
    shard.unlink()
    with pytest.raises(StoreError, match=r"b00-00000\.tar: No such file"):
        run_epoch(tmp_path, 1, 2, plan)


# --- reading ahead --------------------------------------------------------------------------------------------------


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_what_is_read_ahead_comes_in_order_though_threads_finish_out_of_order(workers: int) -> None:
    def load(place: int) -> int:
        time.sleep(0.003 * (place % 3 == 0))
        return place * place

    assert list(read_ahead(load, iter(range(50)), workers)) == [place * place for place in range(50)]
    assert list(read_ahead(load, iter([]), workers)) == []
    assert not loaders()


@pytest.mark.parametrize("workers", [1, 3])
def test_only_a_bounded_number_of_places_is_read_ahead(workers: int) -> None:
    taken = 0

    def places() -> Iterator[int]:
        nonlocal taken
        for place in range(1000):
            taken += 1
            yield place

    items = read_ahead(lambda place: place, places(), workers)
    for seen in range(5):
        assert next(items) == seen
        assert taken <= workers * BATCHES_AHEAD + seen + 1


def test_an_error_comes_where_its_batch_would_have_and_the_threads_stop() -> None:
    def load(place: int) -> int:
        if place == 7:
            raise ShardError("train/b00-00001.tar: damaged")
        return place

    items = read_ahead(load, iter(range(100)), 3)
    assert [next(items) for _ in range(7)] == list(range(7))
    with pytest.raises(ShardError, match="b00-00001"):
        next(items)
    assert not loaders()


@pytest.mark.parametrize(("workers", "patience", "error", "words"), [
    (2, Deadline(1), StallError, r"rank 0's batch of step \d+ of this epoch has not arrived within [12] s(?s:.*)--pid"),
    (0, Deadline(60, lambda: True, 1), LostStepError, r"of this epoch has not arrived within [12] s; the current"),
])  # fmt: skip
def test_a_read_that_hangs_is_told_in_time_and_keeps_nobody(
    workers: int, patience: Deadline, error: type[Exception], words: str, tmp_path: Path
) -> None:
    index = write_set(tmp_path)
    stream, plan = stream_of(tmp_path, workers=workers), plan_of(tmp_path)
    stream.patience = patience
    with opened_by_nobody(tmp_path / index.shards[0].name), pytest.raises(error, match=words):
        list(stream.epoch(plan))
    stream.patience = Deadline()
    assert keys_of(list(stream.epoch(plan))) == training_keys(tmp_path)


def test_a_batch_of_validation_that_hangs_is_told_too(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    stream = stream_of(tmp_path)
    stream.patience = Deadline(1)
    with opened_by_nobody(tmp_path / index.shards[-1].name), pytest.raises(StallError, match="rank 0's batch of 2"):
        list(stream.batches([index.split("valid")]))


def test_the_threads_stop_when_the_consumer_does(meadow: Path) -> None:
    for item in stream_of(meadow, workers=3).epoch(plan_of(meadow)):
        assert item.step == 0
        break
    assert not loaders()
    items = read_ahead(lambda place: place, iter(range(100)), 4)
    assert next(items) == 0
    assert loaders()
    items.close()  # type: ignore[attr-defined]
    assert not loaders()
