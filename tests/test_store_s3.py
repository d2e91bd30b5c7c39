"""A bucket is as good as a folder: against a real S3 server, with a cache and without one."""

import logging
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import obstore
import pytest
from conftest import ROOT
from fault_proxy import Fault, FaultProxy, fault_proxy
from seaweed import BUCKET, SECRET_KEY, Seaweed
from test_stream import VOCAB, keys_of, plan_of, training_keys, write_set

from sharding.bucket import BucketStore
from sharding.errors import ShardError, StoreError
from sharding.format import read_index, read_sample
from sharding.store import open_store
from streamtrain.cache import ShardCache
from streamtrain.forecast import live_bytes
from streamtrain.plan import Uses, find_uses
from streamtrain.stream import ShardStream, open_for_reading
from streamtrain.world import World


@pytest.fixture(scope="module")
def meadow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set on disk, of some ten shards, that nobody changes."""
    folder = tmp_path_factory.mktemp("meadow")
    write_set(folder)
    return folder


def upload(folder: Path, url: str) -> BucketStore:
    store = open_store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    assert isinstance(store, BucketStore)
    return store


@pytest.fixture
def bucket(url: str, meadow: Path) -> BucketStore:
    """The shard set, copied to the bucket."""
    return upload(meadow, url)


def cached(store: BucketStore, folder: Path, limit_bytes: int = 2**30) -> ShardCache:
    cache = open_for_reading(read_index(store), store, str(folder), limit_bytes / 2**30)
    assert isinstance(cache, ShardCache)
    return cache


def stream_all(store: BucketStore | ShardCache, folder: Path, size: int = 1) -> Counter[str]:
    """The keys of an epoch over all ranks; `folder` holds the same set, for its plan."""
    keys: Counter[str] = Counter()
    for rank in range(size):
        stream = ShardStream(read_index(store), store, VOCAB, True, World(rank, size), workers=3)
        items = list(stream.epoch(plan_of(folder)))
        keys += keys_of(items)
        assert not any(item.batch.failed for item in items)
    return keys


def delete_shards(store: BucketStore, folder: Path) -> None:
    obstore.delete(store._store, [f"train/{path.name}" for path in (folder / "train").glob("*.tar")])


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


# --- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_is_written_is_read_whole_and_in_ranges(slash: str, url: str) -> None:
    store = open_store(url + slash)
    assert store.remote
    assert store.url == url
    data = np.random.default_rng(0).bytes(12 * 2**20)  # more than one part of a multipart upload
    assert not store.exists("train/b00.tar")
    store.write("train/b00.tar", data)
    store.write("empty", b"")
    assert store.exists("train/b00.tar")
    assert store.read("train/b00.tar") == data
    assert store.read("empty") == b""
    for start, length in ((0, 1), (5, 512), (8 * 2**20 - 7, 14), (len(data) - 3, 3)):
        assert store.read_ranges("train/b00.tar", [(start, length)]) == [data[start : start + length]]
    ranges = [(0, 700), (800, 5), (2**22, 9), (805, 3), (11 * 2**20, 2**20)]  # some of them side by side
    assert store.read_ranges("train/b00.tar", ranges) == [data[start : start + size] for start, size in ranges]
    store.write("train/b00.tar", b"anew")
    assert store.read("train/b00.tar") == b"anew"


def verbs(name: str) -> list[Callable[[BucketStore], object]]:
    return [lambda store: store.read(name), lambda store: store.read_ranges(name, [(0, 3)])]


def test_a_missing_object_is_named(url: str) -> None:
    store = open_store(url)
    store.write("train/b00.tar", b"x")
    for read in verbs("train/b01.tar"):
        with pytest.raises(StoreError) as missing:
            read(store)  # type: ignore[arg-type]
        assert str(missing.value) == f"{url}/train/b01.tar: there is no such object"
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/a/index\.json: there is no such object"):
        open_store("s3://no-such-bucket/a").read("index.json")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_a_wrong_key_is_refused_without_telling_any_secret(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_store(url).write("x", b"x")
    monkeypatch.setenv(name, f"wrong-{SECRET_KEY}")
    store = open_store(url)
    writing: list[Callable[[BucketStore], object]] = [lambda s: s.write("x", b"y"), lambda s: s.exists("x")]
    with caplog.at_level(logging.DEBUG):
        for act in verbs("x") + writing:
            with pytest.raises(StoreError) as refused:
                act(store)  # type: ignore[arg-type]
            assert str(refused.value).startswith(f"{url}/x: access denied\nhint: are AWS_ACCESS_KEY_ID")
            assert SECRET_KEY not in "".join(traceback.format_exception(refused.value))
    assert SECRET_KEY not in caplog.text
    assert SECRET_KEY not in repr(vars(store))


@pytest.mark.parametrize("bad", ["s3://", "ftp://host/folder", "s3:///prefix"])
def test_a_url_that_is_none_is_refused_in_a_line(bad: str) -> None:
    with pytest.raises(StoreError) as refused:
        open_store(bad)
    assert str(refused.value).startswith(f"{bad}: ")
    assert str(refused.value).count("\n") == 1


def test_an_endpoint_where_nobody_listens_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = BucketStore(url)
    store._store = store._store.__class__(BUCKET, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    with pytest.raises(StoreError, match=r"/index\.json: .*Error performing GET http://127\.0\.0\.1:9"):
        store.read("index.json")


# --- when the line or the server fails ------------------------------------------------------------------------------


@pytest.fixture
def proxy(url: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands from now on between this process and the server."""
    with fault_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


PART = 5 * 2**20
LARGE = np.random.default_rng(1).bytes(2 * PART + 12_345)  # three parts
FAULTS = {
    "a burst of 503": Fault("503", times=8),
    "resets": Fault("reset", times=5),
    "requests cut before their body": Fault("cut request", "PUT", times=4),
    "requests cut within": Fault("cut request", "PUT", times=4, at=100_001),
    "a request cut at its last byte": Fault("cut request", "PUT", at=PART - 1),
    "answers lost": Fault("lose response", times=4),
    "the answer to the beginning of an upload cut": Fault("cut response", r"POST .*uploads", at=9),
    "the answer to the end of an upload cut": Fault("cut response", r"POST .*uploadId", at=9),
    "bodies cut at once": Fault("cut response", "GET", times=4),
    "bodies cut within": Fault("cut response", "GET", times=4, at=1_000_003),
    "a body cut at its last byte": Fault("cut response", "GET", at=len(LARGE) - 1),
    "a list cut": Fault("cut response", "GET .*list-type", at=77),
    "a removal cut": Fault("cut response", "POST .*delete", at=5),
    "stalls before the body": Fault("stall", times=4, seconds=0.5),
    "stalls within requests": Fault("stall", "PUT", times=3, at=70_000, seconds=0.5),
    "stalls within answers": Fault("stall response", "GET", times=2, at=70_000, seconds=0.5),
    "one stall for good": Fault("stall", at=1_000),
    "one answer that never ends": Fault("stall response", "GET .*train", at=1_000),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_verb_outlives_a_fault_that_passes(fault: Fault, url: str, proxy: FaultProxy) -> None:
    store = BucketStore(url, patience_sec=5)
    proxy.plan(replace(fault))
    store.write("train/b00.tar", LARGE)
    store.write("small", b"small")
    assert store.read("train/b00.tar") == LARGE
    assert store.read_ranges("train/b00.tar", [(2_000_000, 3_000_000)]) == [LARGE[2_000_000:5_000_000]]
    assert store.exists("small")
    assert sorted(store.names()) == ["small", "train/b00.tar"]
    store.delete("small")
    assert list(store.names()) == ["train/b00.tar"]
    assert proxy.left() == 0


def test_every_verb_outlives_faults_of_all_kinds_at_once(url: str, proxy: FaultProxy) -> None:
    rng = np.random.default_rng(2)
    store = BucketStore(url, patience_sec=8)
    for name in ("a", "b", "c"):
        for fault in rng.permutation(np.array(list(FAULTS.values())[:-2]))[:6]:
            proxy.plan(replace(fault, times=2))
        store.write(name, LARGE)
        assert store.read(name) == LARGE
    assert sorted(store.names()) == ["a", "b", "c"]


AWAY: dict[str, Callable[[FaultProxy], None]] = {
    "refuses": lambda proxy: proxy.down(),
    "resets": lambda proxy: proxy.plan(Fault("reset", times=10_000)),
    "is overloaded": lambda proxy: proxy.plan(Fault("503", times=10_000)),
    "hears nothing": lambda proxy: proxy.plan(Fault("stall", times=10_000)),
    "never answers": lambda proxy: proxy.plan(Fault("stall response", times=10_000)),
}


@pytest.mark.parametrize("away", AWAY.values(), ids=AWAY)
def test_a_server_that_stays_away_is_told_in_time_by_the_object_it_failed_for(
    away: Callable[[FaultProxy], None], url: str, proxy: FaultProxy
) -> None:
    patience_sec = 1.5
    store = BucketStore(url, patience_sec)
    store.write("train/b00.tar", LARGE)
    away(proxy)
    doomed = [
        lambda: store.write("train/b00.tar", LARGE[::-1]),
        *(partial(verb, store) for verb in verbs("train/b00.tar")),
    ]
    for act in doomed:
        begun = time.monotonic()
        with pytest.raises(StoreError) as told:
            act()
        assert time.monotonic() - begun < 2 * patience_sec + 3
        assert told.value.message.startswith(f"{url}/train/b00.tar: ")
        assert told.value.hint is not None
        assert "\n" not in told.value.message
    proxy.clear()
    proxy.down()
    proxy.up()
    assert BucketStore(url).read("train/b00.tar") == LARGE  # what was there is there, whole


def test_a_slow_line_is_no_dead_one(url: str, proxy: FaultProxy) -> None:
    """Each part has its time for itself, and a body that keeps coming has more."""
    patience_sec = 4.5
    store = BucketStore(url, patience_sec)
    proxy.plan(Fault("slow", times=100, rate=2 * 2**20))
    begun = time.monotonic()
    store.write("train/b00.tar", LARGE)
    written = time.monotonic()
    assert store.read("train/b00.tar") == LARGE
    assert min(written - begun, time.monotonic() - written) > patience_sec
    assert proxy.count("PUT") == proxy.count("PUT", 200) == 3


def test_readers_see_the_old_or_the_new_object_and_nothing_between(url: str, proxy: FaultProxy) -> None:
    versions = [bytes([number]) * len(LARGE) for number in range(6)]
    reader, done, seen = BucketStore(url), threading.Event(), []
    writer = BucketStore(url, patience_sec=5)
    writer.write("x", versions[0])

    def watch() -> None:
        while not done.is_set():
            seen.append(versions.index(reader.read("x")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for version in versions[1:]:
            proxy.plan(Fault("cut request", "PUT", at=1_000_000), Fault("lose response", "POST .*uploadId"))
            writer.write("x", version)
    finally:
        done.set()
        watcher.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_a_flipped_bit_is_seen_by_who_compares(url: str, proxy: FaultProxy) -> None:
    store = BucketStore(url)
    store.write("x", LARGE)
    proxy.plan(Fault("flip", "GET", at=123_456))
    seen = store.read("x")
    assert [i for i in range(123_400, 123_500) if seen[i] != LARGE[i]] == [123_456]
    assert store.read("x") == LARGE


# --- uploads that were never finished -------------------------------------------------------------------------------


def test_only_unfinished_uploads_under_the_prefix_are_aborted(url: str, seaweed: Seaweed) -> None:
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("s3", endpoint_url=seaweed.endpoint)
    store, prefix = BucketStore(url), url.rpartition("/")[2]
    ours = [f"{prefix}/train/b{number:02d}.tar" for number in range(3)]
    others = [f"{prefix}-other/x.tar", f"{prefix}.tar", "x.tar"]
    for key in ours + others:
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
    store.write("train/b00.tar", b"finished")
    assert store.abort_stale_uploads() == 3
    left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]  # also those of tests that broke uploads off
    left = [upload for upload in left if upload["Key"] in ours + others]
    assert sorted(upload["Key"] for upload in left) == sorted(others)
    assert store.abort_stale_uploads() == 0
    assert BucketStore(f"s3://{BUCKET}").abort_stale_uploads() == 0  # others may use the bucket
    assert store.read("train/b00.tar") == b"finished"
    for upload in left:
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])


def test_what_a_killed_upload_left_is_aborted(url: str, proxy: FaultProxy) -> None:
    boto3 = pytest.importorskip("boto3")
    proxy.plan(Fault("stall", "PUT .*partNumber=2"))
    code = "import sys; from sharding.bucket import *; BucketStore(sys.argv[1]).write('x.tar', bytes(12 * 2**20))"
    with subprocess.Popen([sys.executable, "-c", code, url], cwd=ROOT) as process:
        while not proxy.count("PUT .*partNumber=2"):
            time.sleep(0.01)
        process.kill()
    assert BucketStore(url).abort_stale_uploads() == 1
    prefix = url.rpartition("/")[2]
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)


def test_uploads_that_cannot_be_listed_are_left_with_a_word(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"wrong-{SECRET_KEY}")
    assert BucketStore(url).abort_stale_uploads() == 0
    told = capsys.readouterr().err
    assert told.startswith(f"{url}: ")
    assert told.endswith("; unfinished uploads are left to the bucket's lifecycle rule\n")
    assert told.count("\n") == 1
    assert SECRET_KEY not in told


def test_without_boto3_unfinished_uploads_are_left_with_a_word(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert BucketStore(url).abort_stale_uploads() == 0
    word = "without boto3 unfinished uploads are left to the bucket's lifecycle rule"
    assert capsys.readouterr().err == f"{url}: {word}\n"


# --- a shard set in a bucket ----------------------------------------------------------------------------------------


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

    def run(rank: int) -> None:
        store = cached(bucket, tmp_path / "cache")
        stream = ShardStream(read_index(bucket), store, VOCAB, True, World(rank, 4), workers=2)
        seen.append(keys_of(list(stream.epoch(plan))))

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    assert sum(seen, Counter[str]()) == training_keys(meadow)
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


def test_with_the_room_that_the_forecast_tells_each_shard_is_fetched_once(
    bucket: BucketStore, meadow: Path, tmp_path: Path
) -> None:
    index, plan = read_index(bucket), plan_of(meadow)
    uses = find_uses(index, plan)
    needed = int(max(live_bytes(index, plan, uses, nodes=1)[0]))
    cache = cached(bucket, tmp_path / "cache", max(needed, 2 * max(shard.bytes for shard in index.shards)))
    assert stream_all(cache, meadow) == training_keys(meadow)
    assert cache.counts.bytes == sum(index.shards[shard].bytes for shard in uses.shard)
    assert cache.counts.retries == 0


def test_what_the_plan_needs_last_is_evicted_first(bucket: BucketStore, tmp_path: Path) -> None:
    index = read_index(bucket)
    shards = [shard for shard in index.shards if shard.split == "train" and shard.bucket == 1][:4]
    rows = np.array([index.shards.index(shard) for shard in shards])
    cache = cached(bucket, tmp_path / "cache", sum(shard.bytes for shard in shards[:3]) + 2_000)
    cache.follow(index, Uses(np.zeros(4, int), rows, np.array([0, 50, 60, 70]), np.array([0, 99, 99, 99])))
    cache.reach(10)
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
    cache.follow(index, Uses(np.zeros_like(rows), rows, np.zeros_like(rows), np.full_like(rows, 99)))
    for shard in train:
        cache.read_ranges(shard.name, [(0, 1)])
    cache.take_counts()
    for _ in range(5):
        for shard in valid:
            cache.read_ranges(shard.name, [(0, 1)])
    assert cache.take_counts().bytes == sum(shard.bytes for shard in valid)


def test_what_will_be_needed_is_fetched_ahead_into_whatever_room_there_is(bucket: BucketStore, tmp_path: Path) -> None:
    index = read_index(bucket)
    shards = [shard for shard in index.shards if shard.split == "train"][:5]
    rows = np.array([index.shards.index(shard) for shard in shards])
    cache = cached(bucket, tmp_path / "cache", sum(shard.bytes for shard in shards) + 2_000)
    cache.follow(index, Uses(np.zeros(5, int), rows, np.array([0, 0, 0, 0, 20]), np.full(5, 99)))
    cache.reach(0)
    deadline = time.monotonic() + 20
    while len(files(tmp_path / "cache")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(files(tmp_path / "cache")) == 5
    assert cache.take_counts().misses == 0


def test_a_cache_without_room_for_two_shards_is_refused(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"data\.cache_gb is .*\nhint: give the cache room for two shards"):
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
        assert f"{path}: spoilt in the cache, fetched again" in caplog.text


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


# --- an epoch under faults --------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("fault", EPOCH_FAULTS.values(), ids=EPOCH_FAULTS)
@pytest.mark.parametrize("with_cache", [True, False])
def test_an_epoch_under_a_fault_that_passes_has_every_clip_once(
    with_cache: bool, fault: Fault, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    store = BucketStore(bucket.url, patience_sec=5)
    reader = cached(store, tmp_path / "cache") if with_cache else store
    proxy.plan(replace(fault))
    assert stream_all(reader, meadow) == training_keys(meadow)
    assert proxy.left() == 0
    if with_cache:
        for path in files(tmp_path / "cache"):
            assert path.read_bytes() == (meadow / path.name.replace("%2F", "/")).read_bytes()


@pytest.mark.parametrize("with_cache", [True, False])
def test_an_epoch_outlives_a_server_that_is_away_for_a_while(
    with_cache: bool, bucket: BucketStore, proxy: FaultProxy, meadow: Path, tmp_path: Path
) -> None:
    store = BucketStore(bucket.url, patience_sec=20)
    reader = cached(store, tmp_path / "cache") if with_cache else store
    index, plan = read_index(store), plan_of(meadow)
    items = ShardStream(index, reader, VOCAB, True, World(), workers=2).epoch(plan)
    seen = [next(items)]
    proxy.down()
    back = threading.Timer(4, proxy.up)
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
    begun = time.monotonic()
    with pytest.raises(StoreError) as told:
        list(ShardStream(index, reader, VOCAB, True, World(), workers).epoch(plan_of(meadow)))
    assert time.monotonic() - begun < 15
    assert any(f"{store.url}/{shard.name}: " in str(told.value) for shard in index.shards)


def test_a_shard_that_vanishes_while_it_is_streamed_is_named(bucket: BucketStore, meadow: Path) -> None:
    stream = ShardStream(read_index(bucket), bucket, VOCAB, True, World(), workers=0)
    items = stream.epoch(plan_of(meadow))
    next(items)
    delete_shards(bucket, meadow)
    with pytest.raises(StoreError, match=r"/train/b0\d-0000\d\.tar: there is no such object"):
        list(items)


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
    with pytest.raises(ShardError, match=r"index\.json: there is no shard set here[^\n]*\nhint: build one with"):
        read_index(open_store(url))


def test_validation_is_read_through_the_cache_too(bucket: BucketStore, meadow: Path, tmp_path: Path) -> None:
    index = read_index(bucket)
    rows = index.split("valid").tolist()
    cache, folder = cached(bucket, tmp_path / "cache"), open_store(meadow)
    assert [read_sample(cache, index, row) for row in rows] == [read_sample(folder, index, row) for row in rows]
