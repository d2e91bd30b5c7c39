"""A bucket is as good as a folder: against a real S3 server, with a cache and without one."""

import logging
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sharding.cli import main
from sharding.errors import StoreError, UnreachableError
from sharding.shardset import store as store_module
from sharding.shardset.index import read_index
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import open_store
from sharding.shardset.verify import _fault_of, _Job
from tests.tools.commands import ROOT
from tests.tools.fault_proxy import Fault, FaultProxy
from tests.tools.seaweed import BUCKET, SECRET_KEY, Seaweed

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
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/a/index\.json: there is no such bucket"):
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


DOOMED: list[Callable[[BucketStore], object]] = [
    *verbs("train/b00.tar"),
    lambda store: store.write("train/b00.tar", LARGE[::-1]),
    lambda store: store.write("small", b"small"),  # a request that stalls may arrive in the end
    lambda store: store.put_if_match("lock", b"mine", None),
    lambda store: store.exists("train/b00.tar"),
    lambda store: store.delete("small"),
    lambda store: store.names(),
]


@pytest.mark.parametrize("away", AWAY.values(), ids=AWAY)
def test_a_server_that_stays_away_is_told_at_the_first_retry_and_in_time_whatever_is_asked_of_it(
    away: Callable[[FaultProxy], None], url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    patience_sec = 1.5
    BucketStore(url).write("train/b00.tar", LARGE)
    away(proxy)

    def is_told(act: Callable[[BucketStore], object]) -> None:
        store, begun = BucketStore(url, patience_sec), time.monotonic()
        with pytest.raises(StoreError) as told:
            act(store)
        assert time.monotonic() - begun < 2 * patience_sec + 3
        assert store.retries > 0
        assert told.value.message.startswith(f"{url}/")
        assert told.value.hint is not None
        assert "\n" not in told.value.message

    with ThreadPoolExecutor(len(DOOMED)) as pool:
        list(pool.map(is_told, DOOMED))
    assert [record.getMessage().endswith("; retrying for up to 1.5 s") for record in caplog.records] == [
        True for _ in DOOMED
    ]
    proxy.clear()
    proxy.down()
    proxy.up()
    assert BucketStore(url).read("train/b00.tar") == LARGE  # what was there is there, whole


def test_a_slow_line_is_no_dead_one(url: str, proxy: FaultProxy) -> None:
    """Each part has its time for itself, and a body that keeps coming has more."""
    patience_sec = 3.5
    store = BucketStore(url, patience_sec)
    proxy.plan(Fault("slow", times=100, rate=4 * 2**20))
    begun = time.monotonic()
    store.write("train/b00.tar", LARGE + LARGE)
    written = time.monotonic()
    assert store.read("train/b00.tar") == LARGE + LARGE
    assert min(written - begun, time.monotonic() - written) > patience_sec
    assert proxy.count("PUT") == proxy.count("PUT", 200) == 5


def test_an_upload_that_breaks_off_has_all_its_patience_from_the_last_part_that_went_through(
    url: str, proxy: FaultProxy
) -> None:
    store = BucketStore(url, patience_sec=3)
    slow, broken = Fault("slow", "PUT .*Number=[123]&", times=3, rate=4 * 2**20), Fault("503", "Number=4&", times=8)
    proxy.plan(slow, broken)
    store.write("train/b00.tar", LARGE + LARGE)
    assert proxy.left() == 0
    assert BucketStore(url).read("train/b00.tar") == LARGE + LARGE


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


def test_verify_tells_a_server_that_is_away_from_shards_that_are_damaged(
    bucket: BucketStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PATIENCE_SEC", 1.0)
    shard = read_index(bucket).shards[0]
    job = _Job(bucket.url, shard, None, "phonetic", with_audio=False)
    fault = _fault_of(replace(job, shard=replace(shard, name="train/b99-00000.tar")))
    assert fault is not None
    assert "/train/b99-00000.idx.zst: there is no such object, and index.json lists it" in fault.message
    proxy.plan(Fault("503", r"GET .*\.tar", times=1_000))
    with pytest.raises(UnreachableError, match=f"{bucket.url}/{shard.name}: .* 503 "):
        _fault_of(job)


def test_verify_asks_for_each_object_once(bucket: BucketStore, proxy: FaultProxy) -> None:
    names = list(bucket.names())
    proxy.exchanges.clear()
    assert main(["verify", bucket.url, "--workers", "1"]) == 0
    asked = Counter(each.line.split("/", 3)[3] for each in proxy.exchanges if each.line.startswith("GET "))
    assert set(asked.values()) == {1}
    assert asked.keys() >= set(names)


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
    writes = "BucketStore(sys.argv[1]).write('x.tar', bytes(12 * 2**20))"
    code = f"import sys; from sharding.shardset.object_store import *; {writes}"
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
