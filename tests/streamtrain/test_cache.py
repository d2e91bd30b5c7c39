"""Shards of a bucket stream as from a folder, through a cache that keeps its limit, or without one."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import ShardError, StoreError
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import open_store
from streamtrain.data.dataset import ShardStream, open_for_reading
from streamtrain.data.plan import PlanSettings, ShardSchedule, plan_epoch, shard_schedule
from streamtrain.data.plan_report import live_bytes
from streamtrain.distributed import World
from tests.tools.stream_sets import (
    VOCAB,
    cached,
    delete_shards,
    files,
    keys_of,
    plan_of,
    stream_all,
    training_keys,
    upload,
    write_set,
)


def test_a_shard_set_in_a_bucket_streams_as_from_a_folder(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    assert read_index(bucket).digest == read_index(open_store(meadow)).digest
    assert stream_all(bucket, meadow, size=2) == training_keys(meadow)
    assert stream_all(cached(bucket, tmp_path / "cache"), meadow, size=2) == training_keys(meadow)
    assert len(files(tmp_path / "cache")) == len(list((meadow / "train").glob("*.tar")))
    for path in files(tmp_path / "cache"):
        assert path.read_bytes() == (meadow / path.name.replace("%2F", "/")).read_bytes()


def test_what_is_cached_is_not_fetched_again(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    stream_all(cached(bucket, tmp_path / "cache"), meadow)
    delete_shards(bucket, meadow)
    assert stream_all(cached(bucket, tmp_path / "cache"), meadow) == training_keys(meadow)
    with pytest.raises(StoreError, match=r"/train/b0\d-0000\d\.tar: there is no such object"):
        stream_all(cached(bucket, tmp_path / "another"), meadow)


def test_ranks_of_a_node_share_one_cache_at_the_same_time(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    plan = plan_of(meadow)
    seen: list[Counter[str]] = []
    fetched: list[int] = []

    def run(rank: int) -> None:
        store = cached(bucket, tmp_path / "cache")
        stream = ShardStream(
            read_index(bucket), store, VOCAB, True, World(rank, 4, rank, 4, frozenset(range(4))), workers=2
        )
        seen.append(keys_of(list(stream.epoch(plan))))
        fetched.append(store.counts.bytes)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    assert sum(seen, Counter[str]()) == training_keys(meadow)
    assert sum(fetched) == sum(path.stat().st_size for path in files(tmp_path / "cache"))  # each shard once
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".tar", ".lock"}


def test_without_a_cache_folder_or_for_a_local_set_nothing_is_cached(bucket: BucketStore, meadow: Path) -> None:
    index = read_index(bucket)
    assert open_for_reading(index, bucket, None, 1) is bucket
    local = open_store(meadow)
    assert open_for_reading(index, local, "/nowhere", 1) is local


def largest_of(folder: Path) -> int:
    return max(path.stat().st_size for path in files(folder))


@pytest.mark.parametrize("shards", [2, 4])
def test_the_cache_keeps_within_its_limit_at_every_moment(
    shards: int, bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    limit = shards * largest_of(meadow)
    index, done = read_index(bucket), threading.Event()
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            sizes: dict[str, int] = {}
            with suppress(FileNotFoundError):  # what is just being renamed or removed: look again
                for path in (tmp_path / "cache").glob("*/*"):
                    sizes[path.stem] = max(path.stat().st_size, sizes.get(path.stem, 0))
                most = max(most, sum(sizes.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    keys: Counter[str] = Counter()
    try:
        for rank in range(2):
            cache = cached(bucket, tmp_path / "cache", limit)
            stream = ShardStream(index, cache, VOCAB, True, World(rank, 2), workers=3)
            keys += keys_of(list(stream.epoch(plan_of(meadow))))
    finally:
        done.set()
        watcher.join()
    assert keys == training_keys(meadow)
    assert 0 < most <= limit


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_with_the_room_that_the_forecast_tells_each_shard_is_fetched_once(
    workers: int, url: str, tmp_path: Path
) -> None:
    """Though threads read from steps far apart."""
    write_set(tmp_path / "set", clips=400, per_shard=5)
    bucket = upload(tmp_path / "set", url)
    index = read_index(bucket)
    plan = plan_epoch(index, PlanSettings(batch_seconds=2, micro_batches_per_step=1, shuffle_shards=1), 0)
    uses = shard_schedule(index, plan)
    needed = int(max(live_bytes(index, plan, uses, nodes=1)[0]))
    total = sum(index.shards[shard].bytes for shard in uses.shard)
    assert needed < 0.7 * total
    cache = cached(bucket, tmp_path / "cache", needed)
    seen = keys_of(list(ShardStream(index, cache, VOCAB, True, World(), workers).epoch(plan)))
    assert seen == training_keys(tmp_path / "set")
    assert cache.counts.bytes == total
    assert cache.counts.retries == 0


def test_what_the_plan_needs_last_is_evicted_first(bucket: BucketStore, tmp_path: Path) -> None:
    index = read_index(bucket)
    shards = [shard for shard in index.shards if shard.split == "train" and shard.bucket == 1][:4]
    rows = np.array([index.shards.index(shard) for shard in shards])
    cache = cached(bucket, tmp_path / "cache", sum(shard.bytes for shard in shards[:3]) + 2_000)
    first, last = np.array([0, 50, 60, 70]), np.array([0, 99, 99, 99])
    cache.set_schedule(index, ShardSchedule(np.zeros(4, int), rows, first, last))
    cache.prefetch_from(20)
    for shard in (shards[1], shards[0], shards[3]):  # the first is behind us, the second needed at 50, the last at 70
        cache.read_ranges(shard.name, [(0, 1)])
    cache.read_ranges(shards[2].name, [(0, 1)])
    assert {path.name for path in files(tmp_path / "cache")} == {
        shard.name.replace("/", "%2F") for shard in (shards[1], shards[2], shards[3])
    }
    cache.read_ranges(shards[0].name, [(0, 1)])
    assert shards[3].name.replace("/", "%2F") not in {path.name for path in files(tmp_path / "cache")}


def test_validation_stays_in_a_cache_that_training_has_filled(bucket: BucketStore, tmp_path: Path) -> None:
    index = read_index(bucket)
    valid = [shard for shard in index.shards if shard.split == "valid"]
    train = [shard for shard in index.shards if shard.split == "train"]
    rows = np.array([index.shards.index(shard) for shard in train])
    room = max(sum(shard.bytes for shard in train[:4]), 2 * max(shard.bytes for shard in index.shards))
    cache = cached(bucket, tmp_path / "cache", room + 2_000)
    cache.set_schedule(index, ShardSchedule(np.zeros_like(rows), rows, np.zeros_like(rows), np.full_like(rows, 99)))
    for shard in train:
        cache.read_ranges(shard.name, [(0, 1)])
    cache.take_counts()
    for _ in range(5):
        for shard in valid:
            cache.read_ranges(shard.name, [(0, 1)])
    assert cache.take_counts().bytes == sum(shard.bytes for shard in valid)


def test_what_will_be_needed_is_fetched_ahead_into_whatever_room_there_is(bucket: BucketStore, tmp_path: Path) -> None:
    """Many times over: a shard that is renamed while another looks for room was once counted twice, for one to go."""
    index = read_index(bucket)
    shards = [shard for shard in index.shards if shard.split == "train"][:5]
    rows = np.array([index.shards.index(shard) for shard in shards])
    for folder in (tmp_path / str(round_) for round_ in range(40)):
        cache = cached(bucket, folder, sum(shard.bytes for shard in shards) + 2_000)
        cache.set_schedule(index, ShardSchedule(np.zeros(5, int), rows, np.array([0, 0, 0, 0, 20]), np.full(5, 99)))
        cache.prefetch_from(0)
        deadline = time.monotonic() + 20
        while len(files(folder)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(files(folder)) == 5
        assert cache.take_counts().misses == 0


def test_a_cache_without_room_for_two_shards_is_refused(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"data\.cache_gb is .*\nhint: give the cache room for at least two shards"):
        cached(bucket, tmp_path / "cache", 2 * largest_of(meadow) - 4096)


def test_a_cache_folder_that_cannot_be_is_refused(bucket: BucketStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"data\.cache_dir"):
        cached(bucket, tmp_path / "file")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip, cut_off, empty])
def test_a_shard_that_spoils_in_the_cache_is_noticed_and_fetched_again(
    spoil: Callable[[Path], None], bucket: BucketStore, meadow: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream_all(cached(bucket, tmp_path / "cache"), meadow)
    good = {path: path.read_bytes() for path in files(tmp_path / "cache")}
    for path in good:
        spoil(path)
    assert stream_all(cached(bucket, tmp_path / "cache"), meadow) == training_keys(meadow)
    assert {path: path.read_bytes() for path in files(tmp_path / "cache")} == good
    for path in good:
        assert f"{path}: corrupt in the cache, will be fetched again" in caplog.text


def test_a_folder_in_place_of_a_cached_shard_is_told(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    stream_all(cached(bucket, tmp_path), meadow)
    path = files(tmp_path)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match=rf"{path.name}: is a folder, not a file\nhint: remove it"):
        stream_all(cached(bucket, tmp_path), meadow)


def test_a_link_that_leads_nowhere_in_place_of_a_cached_shard_is_told_and_replaced(
    bucket: BucketStore, meadow: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream_all(cached(bucket, tmp_path), meadow)
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to("nowhere")
    assert stream_all(cached(bucket, tmp_path), meadow) == training_keys(meadow)
    assert f"{path}: is a link that leads nowhere" in caplog.text
    assert not path.is_symlink()
    assert path.read_bytes() == whole


def test_two_shard_sets_share_a_cache_folder_without_mixing(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their shards have the same names."""
    sets = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        write_set(folder, clips=20, seed=seed)
        sets.append((folder, upload(folder, f"{url}/{seed}")))
    limit = 3 * max(largest_of(folder) for folder, _ in sets)
    for _ in range(2):
        for folder, store in sets:
            assert stream_all(cached(store, tmp_path / "cache", limit), folder) == training_keys(folder)
            assert sum(path.stat().st_size for path in files(tmp_path / "cache")) <= limit
    assert "spoilt" not in caplog.text


def test_what_a_killed_fetch_left_behind_is_cleared_away(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    limit = 2 * largest_of(meadow)
    cache = cached(bucket, tmp_path / "cache", limit)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    shard = read_index(bucket).shards[0]
    for name in (shard.name.replace("/", "%2F").replace(".tar", ".part"), "of-another-time.part"):
        (folder / name).write_bytes(bytes(limit))
    assert stream_all(cache, meadow) == training_keys(meadow)
    assert not list(folder.glob("*.part"))


# --- what is wrong with the bucket ----------------------------------------------------------------------------------


def other_bytes(data: bytes) -> bytes:
    return data[:2000] + bytes(len(data) - 2000)


def another_shard(data: bytes) -> bytes:
    return data[: len(data) // 2 // 512 * 512] + bytes(1024)


def longer(data: bytes) -> bytes:
    return bytes(512) + data


@pytest.mark.parametrize("change", [other_bytes, another_shard, longer])
@pytest.mark.parametrize("with_cache", [True, False])
def test_a_shard_replaced_in_the_bucket_is_an_error_that_names_it(
    with_cache: bool, change: Callable[[bytes], bytes], bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    name = "train/b01-00000.tar"
    bucket.write(name, change(bucket.read(name)))
    store = cached(bucket, tmp_path / "cache") if with_cache else bucket
    with pytest.raises(ShardError) as damaged:
        stream_all(store, meadow)
    assert str(damaged.value).startswith(f"{bucket.url}/{name}: checksum ")
    assert "hint: " in str(damaged.value)
    assert not (with_cache and [path for path in files(tmp_path / "cache") if "b01-00000" in path.name])


@pytest.mark.parametrize("name", ["index.json", "samples.bin.zst"])
def test_an_index_damaged_in_the_bucket_is_named(name: str, bucket: BucketStore) -> None:
    data = bytearray(bucket.read(name))
    data[len(data) // 2] ^= 1
    bucket.write(name, bytes(data))
    with pytest.raises(ShardError, match=rf"{bucket.url}/{name}: "):
        read_index(bucket)


def test_an_upload_without_its_index_says_how_to_make_one(url: str) -> None:
    with pytest.raises(
        ShardError, match=r"index\.json: there is no shard set here[^\n]*\nhint: name the folder of a shard set"
    ):
        read_index(open_store(url))


def test_validation_is_read_through_the_cache_too(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    index = read_index(bucket)
    rows = index.split("valid").tolist()
    cache, folder = cached(bucket, tmp_path / "cache"), open_store(meadow)
    assert [read_sample(cache, index, row) for row in rows] == [read_sample(folder, index, row) for row in rows]
