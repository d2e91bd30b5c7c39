"""A share of the training clips: whole speakers, nested, and each of its clips once per epoch."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamtrain
from sharding.audio.codec import SAMPLE_RATE
from sharding.shardset.index import (
    SAMPLE_DTYPE,
    ShardIndex,
    ShardRecord,
    SpeakerInfo,
    join_samples,
    read_children,
    read_index,
    read_keys,
    write_shard_index,
)
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import FolderStore, open_store
from streamtrain.config import ConfigError, load_config
from streamtrain.data.plan import PlanPrefix, PlanSettings, plan_epoch, plan_remaining
from streamtrain.data.share import take_share
from tests.tools.commands import ROOT, run_module
from tests.tools.corpus import PHONES
from tests.tools.training_runs import losses, read_rows, run, training

PER_SHARD = 20
SETTINGS = PlanSettings(batch_seconds=30, micro_batches_per_step=2)


def write_indexes(folder: Path, speakers: list[str], split: str = "train") -> ShardIndex:
    """The indexes of shards without their audio: a clip of one to nine seconds for each name, which may be empty."""
    store, records = FolderStore(folder), []
    for start in range(0, len(speakers), PER_SHARD):
        names = speakers[start : start + PER_SHARD]
        table = np.zeros(len(names), SAMPLE_DTYPE)
        table["samples"] = SAMPLE_RATE * (1 + np.arange(start, start + len(names)) % 9)
        table["label_length"], table["checksum"] = 5, np.arange(start, start + len(names))
        entry = ShardEntry(
            f"{split}/b00-{start:05d}.tar", split, 0, len(names), 1, int(table["samples"].sum()), "0" * 16
        )
        infos = tuple(SpeakerInfo("meadow", "5-7", name) for name in names)
        keys = tuple(f"clip-{number}" for number in range(start, start + len(names)))
        records.append(write_shard_index(store, ShardRecord(entry, keys, infos, table)))
    samples = join_samples([record.samples for record in records])
    return ShardIndex((9.0,), {}, "", "", PHONES, {}, tuple(record.entry for record in records), samples)


def seconds_of(index: ShardIndex) -> float:
    return float(index.samples["samples"][index.split("train")].sum() / SAMPLE_RATE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, FolderStore, np.ndarray]:
    """500 clips of 40 children, who speak unequally often; some clips are of nobody known."""
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(1)
    speakers = [f"child-{number}" if number < 40 else "" for number in (random.beta(1, 3, 500) * 44).astype(int)]
    index = write_indexes(folder, speakers)
    return index, FolderStore(folder), np.array(speakers)


@given(smaller=st.floats(0.001, 1), larger=st.floats(0.001, 1), by_hours=st.booleans())
def test_a_smaller_share_lies_within_a_larger_one_and_each_speaker_is_whole(
    smaller: float, larger: float, by_hours: bool, many: tuple[ShardIndex, FolderStore, np.ndarray]
) -> None:
    index, store, speakers = many
    shares = []
    for wanted in sorted((smaller, larger)):
        taken = take_share(index, store, hours=wanted) if by_hours else take_share(index, store, wanted)
        rows = set(taken.split("train").tolist())
        chosen = {speakers[row] for row in rows} - {""}
        assert rows >= {row for row, name in enumerate(speakers) if name in chosen}
        assert rows
        seconds = wanted * 3600 if by_hours else wanted * seconds_of(index)
        assert seconds_of(taken) >= min(round(seconds), seconds_of(index)) - 1
        shares.append(rows)
    assert shares[0] <= shares[1]


def test_a_share_is_exceeded_by_less_than_its_last_speaker(many: tuple[ShardIndex, FolderStore, np.ndarray]) -> None:
    index, store, speakers = many
    longest = max(float(index.samples["samples"][speakers == name].sum()) for name in set(speakers)) / SAMPLE_RATE
    for fraction in (0.01, 0.1, 0.5, 0.9):
        assert seconds_of(take_share(index, store, fraction)) < fraction * seconds_of(index) + longest
    assert take_share(index, store).share is None
    assert take_share(index, store, hours=1e9).split("train").tolist() == index.split("train").tolist()


def test_a_share_of_clips_of_nobody_is_of_clips(tmp_path: Path) -> None:
    index = write_indexes(tmp_path, [""] * 400)
    taken = take_share(index, FolderStore(tmp_path), 0.25)
    assert seconds_of(taken) == pytest.approx(seconds_of(index) / 4, abs=9)


def test_speakers_of_before_stay_in_a_share_when_others_are_added(tmp_path: Path) -> None:
    """A larger set may move its end, never its order."""
    old = [f"child-{number % 30}" for number in range(300)]
    index = write_indexes(tmp_path / "old", old)
    grown = write_indexes(tmp_path / "grown", old + [f"new-{number % 30}" for number in range(300)])
    names = np.array(old)
    for fraction in (0.1, 0.5):
        before = set(names[take_share(index, FolderStore(tmp_path / "old"), fraction).split("train")])
        rows = take_share(grown, FolderStore(tmp_path / "grown"), fraction).split("train")
        after = set(names[rows[rows < 300]])
        assert before <= after or after <= before


@given(fraction=st.floats(0.01, 0.99), epoch=st.integers(0, 3), share_done=st.floats(0, 0.9))
def test_each_clip_of_a_share_comes_once_per_epoch_also_if_it_is_planned_anew(
    fraction: float, epoch: int, share_done: float, many: tuple[ShardIndex, FolderStore, np.ndarray]
) -> None:
    index, store, _ = many
    taken = take_share(index, store, fraction)
    plan = plan_epoch(taken, SETTINGS, epoch)
    assert sorted(plan.rows.tolist()) == taken.split("train").tolist()
    assert plan.label_characters.sum() == 5 * len(plan.rows)
    steps = int(share_done * (plan.steps - 1))
    done = plan.rows[: plan.starts[steps * plan.micro_batches_per_step]]
    other = PlanSettings(batch_seconds=50, micro_batches_per_step=3)
    rest = plan_remaining(taken, other, epoch, [PlanPrefix(SETTINGS, steps)])
    assert sorted([*done, *rest.rows]) == taken.split("train").tolist()
    whole = plan_epoch(index, SETTINGS, epoch)
    assert (plan.hash == whole.hash) == (len(plan.rows) == len(whole.rows))


def test_whose_a_clip_is_is_read_as_the_whole_index_of_its_shard_has_it(tmp_path: Path) -> None:
    index = write_indexes(tmp_path, ["a", "", "ø\n"])
    assert read_children(FolderStore(tmp_path), index.shards[0]) == [("clip-0", "a"), ("clip-1", ""), ("clip-2", "ø\n")]


def test_the_command_the_api_and_a_loop_of_ones_own_plan_the_same_share(work: Path, tmp_path: Path) -> None:
    shards = streamtrain.open_shards(work / "shards")
    config = load_config(ROOT / "configs" / "zero2.json", ["data.fraction=0.4", "data.batch_seconds=8"])
    planned = shards.index.samples["checksum"][streamtrain.plan(shards, config).rows].tolist()
    assert 0 < len(planned) < len(shards.index.split("train"))
    out = tmp_path / "keys.jsonl"
    run_module(
        "streamtrain", "plan", work / "shards", "--set", "data.fraction=0.4", "data.batch_seconds=8", "--keys", out
    )
    keys = [key for line in out.read_text().splitlines() for key in json.loads(line)["keys"]]
    rows = {key: row for row, key in enumerate(read_keys(shards.store, shards.index).tolist())}
    assert sorted(shards.index.samples["checksum"][rows[key]] for key in keys) == sorted(planned)
    loop = streamtrain.ShardDataset(shards, batch_seconds=8, fraction=0.4)
    assert sorted(key for batch in loop for key in batch.keys) == sorted(keys)
    train = set(read_keys(shards.store, shards.index)[shards.index.split("train")])
    assert not {shards[key].child_id for key in keys} & {shards[key].child_id for key in train - set(keys)}


def test_a_run_trains_on_its_share_and_keeps_it(work: Path) -> None:
    """At any number of ranks; another share is another run."""
    settings = ["train.epochs=1", "data.fraction=0.4", "model.dropout=0", "deepspeed.torch_autocast.enabled=false"]
    index = read_index(open_store(work / "shards"))
    taken = take_share(index, open_store(work / "shards"), 0.4)
    for ranks in (1, 2):
        done = run(training(work, f"share-{ranks}", *settings, ranks=ranks))
        clips = f"{len(taken.split('train'))} of {len(index.split('train'))} clips"
        said = f"data.fraction=0.4: training on 2 of 5 speakers, {clips}"
        assert done.stderr.count(said) == 1
        told = json.loads((work / f"share-{ranks}" / "trained_on.json").read_text())
        assert told["clips"] == len(taken.split("train"))
        assert told["hours"] < told["of_hours"]
    assert losses(work / "share-1") == pytest.approx(losses(work / "share-2"), rel=1e-5)
    plan = plan_epoch(taken, PlanSettings(4, 4), 0)
    assert len(read_rows(work / "share-1")) == plan.steps
    refused = run(training(work, "share-1", *settings, "data.fraction=0.5", ranks=1), expect=1).stderr
    assert "belongs to another run: data.fraction was 0.4, is 0.5" in refused


def test_a_share_is_given_in_one_way() -> None:
    with pytest.raises(ConfigError, match=r"give either data\.fraction or data\.hours"):
        load_config("zero2", ["data.fraction=0.1", "data.hours=10"])
    for wrong in ("data.fraction=0", "data.fraction=1.5", "data.hours=-1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            load_config("zero2", [wrong])
