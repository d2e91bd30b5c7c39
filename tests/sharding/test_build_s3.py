"""`python -m sharding build` into a bucket, while the line and the server fail, builds are killed, and others come."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sharding.shardset.object_store import BucketStore
from tests.tools.commands import ROOT, Command
from tests.tools.corpus import make_corpus
from tests.tools.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.tools.seaweed import BUCKET, Seaweed

SMALL = ("--num-buckets", "3", "--shard-mb", "0.1", "--workers", "2")
LARGE = ("--num-buckets", "1", "--shard-mb", "64", "--workers", "1")  # shards that go up in parts
# The same command with less patience; its workers, who import this file, have no more
IMPATIENT = """
import sys
import sharding.build.lock, sharding.shardset.store
sharding.shardset.store.PATIENCE_SEC = sharding.build.lock.PATIENCE_SEC = 3.0
from sharding.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
A_SHARD = r"PUT .*\.tar"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "heath", clips=60, long_clips=1)


@pytest.fixture(scope="module")
def local(corpus: Path, run_sharding: Command) -> dict[str, bytes]:
    """What the build makes of the corpus in a folder."""
    out = corpus.parent / "shards"
    done = run_sharding("build", corpus, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return files_in(out)


@pytest.fixture
def proxy(url: str, seaweed: Seaweed) -> Iterator[FaultProxy]:
    """Stands between the builds that are started by `building` and the server; this process has its own line."""
    with fault_proxy(seaweed.endpoint) as proxy:
        yield proxy


def files_in(out: Path) -> dict[str, bytes]:
    """All but the report, which has times and places."""
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("report/")}


def objects_in(url: str) -> dict[str, bytes]:
    store = BucketStore(url)
    return {name: store.read(name) for name in store.names() if not name.startswith("report/")}


@contextmanager
def building(
    corpus: Path, url: str, proxy: FaultProxy, *options: str, program: tuple[str, ...] = ("-m", "sharding")
) -> Iterator["subprocess.Popen[str]"]:
    """The real command in the background, with the proxy for a server."""
    command = [sys.executable, *program, "build", str(corpus), "--out", url, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": proxy.endpoint}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for its end; what it wrote to standard error, which is never a traceback."""
    _, told = process.communicate(timeout=150)
    assert "Traceback" not in told, told
    return told


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    give_up = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < give_up
        time.sleep(0.01)


STORMS = {
    "bursts of 503": [
        Fault("503", times=7),
        Fault("503", A_SHARD, times=15),
        Fault("503", r"PUT .*index\.json", times=5),
    ],
    "cuts": [
        Fault("cut request", A_SHARD, times=3, at=9_999),
        Fault("cut request", "PUT", times=3, at=7),
        Fault("lose response", "PUT", times=4),
        Fault("cut response", "GET|POST", times=2, at=3),
        Fault("reset", times=4),
    ],
    "stalls": [
        Fault("stall", times=2, seconds=1),
        Fault("stall", A_SHARD, times=4, at=20_000, seconds=1.5),
        Fault("stall response", "PUT", times=2, seconds=1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("storm", STORMS.values(), ids=STORMS)
def test_a_build_outlives_a_storm_and_makes_the_same_bytes(
    storm: list[Fault], corpus: Path, url: str, proxy: FaultProxy, local: dict[str, bytes]
) -> None:
    proxy.plan(*storm)
    with building(corpus, url, proxy, *SMALL) as process:
        told = finish(process)
    assert process.returncode == 0, told
    assert objects_in(url) == local
    assert proxy.left() <= 1, "the storm passed by"


def test_a_build_outlives_a_server_that_is_away_for_a_while(
    corpus: Path, url: str, proxy: FaultProxy, local: dict[str, bytes]
) -> None:
    proxy.plan(Fault("stall", A_SHARD, times=1000, seconds=0.1))
    with building(corpus, url, proxy, *SMALL) as process:
        wait_for(lambda: proxy.count(A_SHARD, 200) >= 2, process)
        proxy.refuse(seconds=3)
        told = finish(process)
    assert process.returncode == 0, told
    assert objects_in(url) == local


def test_a_server_that_goes_away_for_good_ends_the_build_with_a_word_and_without_an_index(
    corpus: Path, url: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    proxy.plan(Fault("stall", A_SHARD, times=1000, seconds=0.1))
    with building(corpus, url, proxy, *SMALL, program=(str(tmp_path / "impatient.py"),)) as process:
        wait_for(lambda: proxy.count(A_SHARD, 200) >= 2, process)
        proxy.down()
        told = finish(process)
    assert process.returncode == 1
    *_, error, hint = told.strip().splitlines()
    assert error.startswith(f"UnreachableError: {url}/")
    assert "/b0" in error.partition(": Generic")[0]
    assert "; retrying for up to 3 s\n" in told
    assert hint.startswith("hint: ")
    names = set(BucketStore(url).names())
    assert any(name.endswith(".tar") for name in names)
    assert "index.json" not in names


def test_a_killed_build_goes_on_where_it_was(
    corpus: Path, url: str, proxy: FaultProxy, local: dict[str, bytes]
) -> None:
    proxy.plan(Fault("stall", A_SHARD, times=5, seconds=0.1), Fault("stall", A_SHARD, times=1000, at=10_000))
    with building(corpus, url, proxy, *SMALL) as process:
        wait_for(lambda: proxy.count(A_SHARD, 200) >= 5 and proxy.count(A_SHARD) >= 7, process)
        process.kill()
        process.wait()
    before = objects_in(url)
    finished = {name for name in before if name.endswith(".tar") and name.replace(".tar", ".idx.zst") in before}
    assert finished
    assert "index.json" not in before
    proxy.clear()
    proxy.exchanges.clear()
    with building(corpus, url, proxy, *SMALL) as process:
        told = finish(process)
    assert process.returncode == 0, told
    assert objects_in(url) == local  # which has no `.building`
    written = {each.line.partition(f"{url.rpartition('/')[2]}/")[2] for each in proxy.exchanges if "PUT" in each.line}
    tars = {name for name in local if name.endswith(".tar")}
    assert written & tars == tars - finished


def test_what_a_killed_build_had_begun_to_upload_is_cleared_away(
    url: str, proxy: FaultProxy, tmp_path: Path, run_sharding: Command
) -> None:
    boto3 = pytest.importorskip("boto3")
    corpus = make_corpus(tmp_path / "moor", clips=45, seconds=(10, 15), children=3)
    assert run_sharding("build", corpus, "--out", tmp_path / "shards", *LARGE).returncode == 0

    def unfinished() -> int:
        prefix = url.rpartition("/")[2]
        return len(boto3.client("s3").list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", []))

    proxy.plan(Fault("stall", "PUT .*partNumber=2"))
    with building(corpus, url, proxy, *LARGE) as process:
        wait_for(lambda: proxy.count("PUT .*partNumber=2") > 0, process)
        process.kill()
        process.wait()
    assert unfinished() == 1
    with building(corpus, url, proxy, *LARGE) as process:
        told = finish(process)
    assert process.returncode == 0, told
    assert unfinished() == 0
    assert objects_in(url) == files_in(tmp_path / "shards")


def test_a_second_build_is_refused_while_the_first_runs(
    corpus: Path, url: str, proxy: FaultProxy, local: dict[str, bytes], run_sharding: Command
) -> None:
    proxy.plan(Fault("stall", A_SHARD, times=1000))
    with building(corpus, url, proxy, *SMALL) as first:
        wait_for(lambda: proxy.count(A_SHARD) > 0, first)
        second = run_sharding("build", corpus, "--out", url, *SMALL)
        assert second.returncode == 1
        assert f"StoreError: {url}: another build is running (pid {first.pid} on host " in second.stderr
        assert "\nhint: " in second.stderr
        proxy.clear()
        told = finish(first)
    assert first.returncode == 0, told
    assert objects_in(url) == local
