"""The fault matrix: an epoch from a real server through a fault proxy has every clip once, or ends and says why.

Small counts run always; those marked `long` are the full ones.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import ShardError, StoreError
from sharding.shardset.index import read_index
from sharding.shardset.object_store import PATIENCE_SEC, BucketStore
from streamtrain.data import cache as cache_module
from streamtrain.data.dataset import ShardStream, StepBatch
from streamtrain.distributed import World
from tests.tools.commands import ROOT, own_mounts
from tests.tools.fault_proxy import Fault, FaultProxy
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

TAR = r"GET .*\.tar"
EPOCH_FAULTS = {
    "a burst of 503": Fault("503", TAR, times=8),
    "resets": Fault("reset", TAR, times=5),
    "bodies cut at once": Fault("cut response", TAR, times=4),
    "bodies cut within": Fault("cut response", TAR, times=4, at=1_003),
    "stalls before the body": Fault("stall response", TAR, times=2, seconds=1.5),
    "stalls within": Fault("stall response", TAR, times=2, at=1_003, seconds=1.5),
    "a body that never ends": Fault("stall response", TAR, at=1_003),
    "wrong bytes": Fault("flip", TAR, at=1_003, times=2),
}
LONG_FAULTS = {  # with the patience that a user's run has
    "a storm of 503": Fault("503", TAR, times=60),
    "many resets": Fault("reset", TAR, times=60),
    "many bodies cut": Fault("cut response", TAR, times=60, at=1_003),
    "stalls of 5 s before the body": Fault("stall response", TAR, times=8, seconds=5),
    "stalls of 5 s within": Fault("stall response", TAR, times=8, at=1_003, seconds=5),
}


@pytest.mark.parametrize(
    ("fault", "patience_sec"),
    [
        *(pytest.param(fault, 5, id=name) for name, fault in EPOCH_FAULTS.items()),
        *(pytest.param(fault, PATIENCE_SEC, id=name, marks=pytest.mark.long) for name, fault in LONG_FAULTS.items()),
    ],
)
@pytest.mark.parametrize("with_cache", [True, False])
def test_an_epoch_under_a_fault_that_passes_has_every_clip_once(
    with_cache: bool,
    fault: Fault,
    patience_sec: float,
    bucket: BucketStore,
    proxy: FaultProxy,
    meadow: Path,
    tmp_path: Path,
) -> None:
    store = BucketStore(bucket.url, patience_sec)
    reader = cached(store, tmp_path / "cache") if with_cache else store
    proxy.plan(replace(fault))
    for _ in range(20):  # a long fault outlasts an epoch; the next one fetches all anew
        assert stream_all(reader, meadow) == training_keys(meadow)
        if with_cache:
            for path in files(tmp_path / "cache"):
                assert path.read_bytes() == (meadow / path.name.replace("%2F", "/")).read_bytes()
                path.unlink()
        if not proxy.left():
            break
    assert not proxy.left()


def places(count: int, size: int) -> list[int]:
    """Bytes of a body: the first, the last, and some between."""
    return [0, size - 1, *np.random.default_rng(count).integers(1, size - 1, count - 2).tolist()]


@pytest.mark.parametrize("count", [6, pytest.param(150, marks=pytest.mark.long)])
@pytest.mark.parametrize("action", ["cut response", "flip"])
@pytest.mark.parametrize("with_cache", [True, False])
def test_a_body_may_break_off_or_be_wrong_at_any_byte(
    with_cache: bool, action: str, count: int, url: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    write_set(tmp_path / "set", clips=8, per_shard=4)
    store = upload(tmp_path / "set", url)
    size = min(shard.bytes for shard in read_index(store).shards if shard.split == "train")
    for number, at in enumerate(places(count, size)):
        reader = cached(store, tmp_path / str(number)) if with_cache else store
        proxy.plan(Fault(action, TAR, at=at))  # type: ignore[arg-type]
        assert stream_all(reader, tmp_path / "set") == training_keys(tmp_path / "set")
        assert proxy.left() == 0


@pytest.mark.parametrize(
    ("away_sec", "patience_sec"), [(4, 20), pytest.param(30, PATIENCE_SEC, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("with_cache", [True, False])
def test_an_epoch_outlives_a_server_that_is_away_for_a_while(
    with_cache: bool,
    away_sec: float,
    patience_sec: float,
    bucket: BucketStore,
    proxy: FaultProxy,
    meadow: Path,
    tmp_path: Path,
) -> None:
    store = BucketStore(bucket.url, patience_sec)
    reader = cached(store, tmp_path / "cache") if with_cache else store
    index, plan = read_index(store), plan_of(meadow)
    items = ShardStream(index, reader, VOCAB, True, World(), workers=2).epoch(plan)
    seen = [next(items)]
    proxy.down()
    back = threading.Timer(away_sec, proxy.up)
    back.start()
    seen += list(items)
    back.join()
    assert keys_of(seen) == training_keys(meadow)


@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_without_its_server_ends_in_time_and_names_a_shard(
    workers: int, with_cache: bool, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    store = BucketStore(bucket.url, patience_sec=1.5)
    index = read_index(store)
    reader = cached(store, tmp_path / "cache") if with_cache else store
    proxy.down()
    with pytest.raises(StoreError) as told:
        list(ShardStream(index, reader, VOCAB, True, World(), workers).epoch(plan_of(meadow)))
    assert any(f"{store.url}/{shard.name}: " in str(told.value) for shard in index.shards)


@pytest.mark.parametrize("how", ["is down", "never answers", "is overloaded"])
def test_a_server_that_dies_holds_a_run_for_its_patience_and_not_once_more_for_each_shard(
    how: str, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Shards that are fetched ahead, of many ranges each, wait for one another, and what is needed now for them."""
    monkeypatch.setattr(cache_module, "RANGE_BYTES", 4096)
    store = BucketStore(bucket.url, patience_sec=3)
    index = read_index(store)
    items = ShardStream(index, cached(store, tmp_path / "cache"), VOCAB, True, World(), 2).epoch(plan_of(meadow))
    proxy.plan(*(Fault("stall response" if how == "never answers" else "503", TAR, 100_000),) * (how != "is down"))
    if how == "is down":
        proxy.down()
    with pytest.raises(StoreError):
        next(items)
    assert store.retries < 200  # 32 to 80 where all wait once, and twelve times as many if once for each shard
    assert [record.getMessage().endswith("; retrying for up to 3 s") for record in caplog.records] == [True]


@pytest.mark.parametrize("how", ["is down", "never answers"])
def test_a_shard_that_another_rank_has_given_up_since_it_was_asked_for_is_given_up_at_once(
    how: str, bucket: BucketStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    """It holds the shard's lock, ahead of when it needs it, while this rank waits for that shard."""
    index = read_index(bucket)
    theirs, ours = (cached(BucketStore(bucket.url, patience_sec=3), tmp_path / "cache") for _ in range(2))
    name = index.shards[0].name
    if how == "is down":
        proxy.down()
    else:
        proxy.plan(Fault("stall response", TAR, times=100))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(theirs._prefetch, name)
        time.sleep(0.5)
        with pytest.raises(StoreError, match=name) as told:
            ours.read_ranges(name, [(0, 1)])
    assert str(told.value) == str(other.exception())
    proxy.clear()
    proxy.down()
    proxy.up()
    assert ours.read_ranges(name, [(0, 1)])  # asked for anew, it is fetched


def test_a_prefetch_that_fails_is_made_up_for_when_its_shard_is_needed(
    bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    """The server is away for longer than a request is repeated, while the shards of later steps are fetched."""
    store = BucketStore(bucket.url, patience_sec=1.5)
    cache = cached(store, tmp_path / "cache")
    index, plan = read_index(store), plan_of(meadow)
    numbers = index.samples["shard"][plan.rows]
    later = [index.shards[number].name for number in set(numbers) - set(numbers[: plan.starts[1]])]
    proxy.plan(Fault("stall response", "|".join(later), times=1_000))
    items = ShardStream(index, cache, VOCAB, True, World(), workers=0).epoch(plan)
    seen = [next(items)]
    assert proxy.count("|".join(later)) > 0
    proxy.down()  # with it end those that stall
    time.sleep(4)
    assert len(files(tmp_path / "cache")) <= len(set(numbers)) - len(later)
    proxy.clear()
    proxy.up()
    seen += list(items)
    assert keys_of(seen) == training_keys(meadow)


# --- shards that change while they are streamed ---------------------------------------------------------------------


def replace_shards(store: BucketStore, folder: Path) -> None:
    """By those of another set, under the same names."""
    write_set(folder / "other", seed=9)
    for path in (folder / "other" / "train").glob("*.tar"):
        store.write(f"train/{path.name}", path.read_bytes())


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_shard_that_vanishes_while_it_is_streamed_is_named(
    with_cache: bool, bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    items = first_batch(with_cache, bucket, meadow, tmp_path)
    delete_shards(bucket, meadow)
    with pytest.raises(StoreError, match=r"/train/b0\d-0000\d\.tar: there is no such object"):
        list(items)


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_shard_that_is_replaced_while_it_is_streamed_is_named(
    with_cache: bool, bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    items = first_batch(with_cache, bucket, meadow, tmp_path)
    replace_shards(bucket, tmp_path)
    with pytest.raises(ShardError, match=rf"{bucket.url}/train/b0\d-0000\d\.tar: checksum (of the sample|is )"):
        list(items)


def first_batch(with_cache: bool, bucket: BucketStore, meadow: Path, tmp_path: Path) -> Iterator[StepBatch]:
    """An epoch of which one micro-batch was taken, with a cache that holds two shards or without one."""
    index = read_index(bucket)
    limit = 2 * max(shard.bytes for shard in index.shards)
    store = cached(bucket, tmp_path / "cache", limit) if with_cache else bucket
    items = ShardStream(index, store, VOCAB, True, World(), workers=0).epoch(plan_of(meadow))
    next(items)
    return items


# --- a cache disk that is full --------------------------------------------------------------------------------------


def rank_command(folder: Path, url: str, cache: Path, rank: int, size: int, patience_sec: float = 20) -> list[str]:
    arguments = [str(part) for part in (folder, url, cache, rank, size, patience_sec)]
    return [sys.executable, str(ROOT / "tests/tools/epoch_rank.py"), *arguments]


def rank_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def keys_in(lines: str) -> Counter[str]:
    return Counter(key for line in lines.splitlines() for key in json.loads(line) if key)


def test_a_full_cache_disk_is_named_and_with_room_the_epoch_is_whole(
    bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    namespace = own_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    size_kb = 3 * max(shard.bytes for shard in read_index(bucket).shards) // 1024
    script = """
        disk="$1"
        mount -t tmpfs -o size="$2"k tmpfs "$disk"
        shift 2
        "$@" >/dev/null && exit 1
        mount -o remount,size=100m "$disk"
        "$@"
    """
    command = rank_command(meadow, bucket.url, disk / "cache", 0, 1)
    done = subprocess.run(
        [*namespace, "sh", "-e", "-c", script, "sh", str(disk), str(size_kb), *command],
        cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"StoreError: {disk / 'cache'}/")
    assert re.search(
        r"\.tar: No space left on device \(.*\)\nhint: is the disk of data.cache_dir full\?\n", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert keys_in(done.stdout) == training_keys(meadow)


# --- ranks that are killed ------------------------------------------------------------------------------------------


def kill_within_a_fetch(process: "subprocess.Popen[str]", proxy: FaultProxy) -> None:
    """While the proxy holds back a body that the rank has begun to write, and holds that shard's lock for."""
    deadline = time.monotonic() + 60
    while proxy.left():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.long)])
def test_a_rank_that_is_killed_within_a_fetch_keeps_no_other_waiting(
    kills: int, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    """Two ranks share a cache; run again, the killed one reads its own clips, each once."""
    random = np.random.default_rng(kills)
    for number in range(kills):
        cache = tmp_path / str(number)
        commands = [rank_command(meadow, bucket.url, cache, rank, 2) for rank in (0, 1)]
        proxy.plan(Fault("stall response", TAR, times=int(random.integers(1, 5)), at=int(random.integers(1, 5_000))))
        doomed = subprocess.Popen(
            commands[0], env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        kill_within_a_fetch(doomed, proxy)
        assert list(cache.rglob("*.part"))
        other, again = (
            subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, text=True)
            for command in reversed(commands)
        )
        proxy.clear()
        said = [process.communicate(timeout=60)[0] for process in (other, again)]
        assert [other.returncode, again.returncode] == [0, 0]
        assert keys_in(said[0]) + keys_in(said[1]) == training_keys(meadow)
        assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_streams_from_the_same_cache_as_if_nothing_had_been(
    kills: int, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(kills)
    command = rank_command(meadow, bucket.url, tmp_path / "cache", 0, 1)
    for _ in range(kills):
        proxy.plan(Fault("slow", TAR, times=10_000, rate=200_000))
        process = subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not proxy.count(TAR) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(float(random.uniform(0, 1.5)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        proxy.clear()
        proxy.exchanges.clear()
        for path in random.permutation(np.array([str(path) for path in files(tmp_path / "cache")]))[:3]:
            Path(path).unlink()  # else a later kill would find nothing left to fetch
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert keys_in(done.stdout) == training_keys(meadow)
    for path in files(tmp_path / "cache"):
        assert path.read_bytes() == (meadow / path.name.replace("%2F", "/")).read_bytes()


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.long)])
def test_a_byte_that_spoils_anywhere_in_the_cache_never_trains(count: int, url: str, tmp_path: Path) -> None:
    """What follows the last sample is nobody's: the end-of-archive mark."""
    write_set(tmp_path / "set", clips=8, per_shard=4)
    store = upload(tmp_path / "set", url)
    cache = cached(store, tmp_path / "cache")
    clips = stream_all(cache, tmp_path / "set")
    for number in range(count):
        path = files(tmp_path / "cache")[number % len(files(tmp_path / "cache"))]
        whole = path.read_bytes()
        at = int(np.random.default_rng(number).integers(len(whole)))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << number % 8
        path.write_bytes(damaged)
        assert stream_all(cache, tmp_path / "set") == clips
        if at < len(whole) - 1024:
            assert path.read_bytes() == whole
        else:
            path.write_bytes(whole)
