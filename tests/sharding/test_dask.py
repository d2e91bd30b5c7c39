"""A build on a Dask cluster makes the bytes of a local one: real scheduler, real workers, some of which die."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.build import dask as cluster
from sharding.build.dask import ClusterWorkers
from sharding.build.lock import exclusive_build
from sharding.build.write import ENCODER_VERSIONS, BuildContext, ShardJob, make_shard
from sharding.errors import ManifestError, ShardError, StoreError, StreamtrainError
from sharding.pool import die_with_parent
from sharding.shardset.store import FolderStore, open_store
from sharding.sources.archive import AudioRoot, list_audio, open_audio
from tests.tools.commands import ROOT, Command
from tests.tools.corpus import PHONES, describe, make_corpus, read_manifest, write_manifest
from tests.tools.seaweed import BUCKET, Seaweed, find_weed
from tests.tools.shard_sets import digest_of, read_ledger

pytest.importorskip("distributed")

READY_SEC = 60.0
SETTINGS = ("--shard-mb", 0.02, "--max-reject-rate", 1)  # a shard for every clip or two, so that a build takes a while


@dataclass
class Cluster:
    """A scheduler and its workers, which run in a folder of their own."""

    folder: Path
    environment: dict[str, str]
    ends: ExitStack
    address: str = ""
    workers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self, role: str, *arguments: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"distributed.cli.dask_{role}", *map(str, arguments), "--host", "127.0.0.1"]
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        self.ends.callback(process.wait)
        self.ends.callback(process.kill)
        return process

    def start_worker(self, threads: int = 1) -> None:
        arguments = (self.address, "--nthreads", threads, "--no-nanny", "--no-dashboard", "--local-directory", ".")
        self.workers.append(self.start("worker", *arguments))


@contextmanager
def running_cluster(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A scheduler without workers."""
    folder.mkdir()
    with ExitStack() as ends:
        environment = os.environ | (environment or {}) | {"PYTHONPATH": str(ROOT)}
        started = Cluster(folder, environment, ends)
        told = folder / "scheduler.json"
        started.start("scheduler", "--port", 0, "--dashboard-address", "127.0.0.1:0", "--scheduler-file", told)
        give_up = time.monotonic() + READY_SEC
        while not started.address:
            assert time.monotonic() < give_up, (folder / "log").read_text()
            time.sleep(0.05)
            started.address = json.loads(told.read_text() or "{}").get("address", "") if told.exists() else ""
        yield started


@pytest.fixture(scope="module")
def dask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two workers, which reach the bucket where there is one."""
    weed: Seaweed | None = request.getfixturevalue("seaweed") if find_weed() else None
    with running_cluster(tmp_path_factory.mktemp("dask") / "cluster", weed.environment if weed else None) as started:
        for _ in range(2):
            started.start_worker()
        yield started


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two corpora: short, long, resampled and refused clips."""
    folder = tmp_path_factory.mktemp("corpora")
    make_corpus(folder / "east", clips=110, long_clips=2, seconds=(0.5, 1.5))
    west = make_corpus(folder / "west", clips=4, seed=1)
    soundfile.write(west / "audio/high.wav", np.random.default_rng(0).normal(0, 0.1, 20_000), 22_050)
    (west / "audio/broken.flac").write_bytes(b"fLaC and no more")
    rows = [describe(west, f"audio/{name}", "kæt") for name in ("high.wav", "broken.flac")]
    write_manifest(west, read_manifest(west) + rows)
    return folder


@pytest.fixture(scope="module")
def local(corpora: Path, run_sharding: Command) -> Path:
    """What processes of this machine make of them."""
    out = corpora / "local"
    done = run_sharding("build", corpora / "east", corpora / "west", "--out", out, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return out


def start_build(corpora: Path, out: str, address: str, **environment: str) -> "subprocess.Popen[str]":
    """Named by relative paths, which mean nothing in the workers' folder."""
    arguments = ["east", "west", "--out", out, *SETTINGS, "--scheduler", address]
    return subprocess.Popen(
        [sys.executable, "-m", "sharding", "build", *map(str, arguments)],
        cwd=corpora,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )


def end_of(build: "subprocess.Popen[str]") -> tuple[int, str]:
    stdout, stderr = build.communicate(timeout=150)
    assert "Traceback" not in stderr, stderr
    return build.returncode, stdout + stderr


def wait_for_a_tar(out: Path, build: "subprocess.Popen[str]") -> int:
    """How many tars there are then."""
    give_up = time.monotonic() + READY_SEC
    while not (tars := len(list(out.glob("*/*.tar")))):
        assert time.monotonic() < give_up
        assert build.poll() is None, end_of(build)
        time.sleep(0.002)
    return tars


def test_a_cluster_makes_the_same_bytes_as_this_machine(dask: Cluster, corpora: Path, local: Path) -> None:
    code, said = end_of(start_build(corpora, "clustered", dask.address))
    assert code == 0, said
    assert digest_of(corpora / "clustered") == digest_of(local)
    assert read_ledger(corpora / "clustered") == read_ledger(local)
    assert "clustered: built" in said


def test_a_build_outlives_a_worker(dask: Cluster, corpora: Path, local: Path) -> None:
    build = start_build(corpora, "orphaned", dask.address)
    before = wait_for_a_tar(corpora / "orphaned", build)
    dask.workers.pop(0).send_signal(signal.SIGKILL)
    code, said = end_of(build)
    dask.start_worker()
    assert code == 0, said
    assert before < len(list(local.glob("*/*.tar"))) / 2
    assert digest_of(corpora / "orphaned") == digest_of(local)
    assert read_ledger(corpora / "orphaned") == read_ledger(local)


def test_an_interrupted_build_stops_without_a_traceback_and_can_be_resumed(
    dask: Cluster, corpora: Path, local: Path
) -> None:
    build = start_build(corpora, "resumed", dask.address)
    wait_for_a_tar(corpora / "resumed", build)
    build.send_signal(signal.SIGINT)
    code, said = end_of(build)
    assert (code, said.splitlines()[-1]) == (130, "stopped")
    assert not (corpora / "resumed/.pieces").exists()
    code, said = end_of(start_build(corpora, "resumed", dask.address))
    assert code == 0, said
    assert digest_of(corpora / "resumed") == digest_of(local)


def test_a_bucket_gets_the_same_bytes_and_keeps_no_pieces(
    dask: Cluster, corpora: Path, local: Path, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    store.write(".pieces/of-a-killed-build.flac", b"")
    code, said = end_of(start_build(corpora, store.url, dask.address))
    assert code == 0, said
    wanted = {path.relative_to(local).as_posix(): path for path in local.rglob("*") if path.is_file()}
    assert set(store.names()) == set(wanted)
    assert all(store.read(name) == path.read_bytes() for name, path in wanted.items() if not name.startswith("report"))


def test_what_a_worker_finds_wrong_is_told_with_the_place_as_the_user_gave_it(dask: Cluster, tmp_path: Path) -> None:
    for name in ("east", "west"):
        row = read_manifest(make_corpus(tmp_path / name, clips=1))[0]
        rows = [row | {"utterance_id": f"{name}-{number}"} for number in range(1000)]  # too many to look at beforehand
        del rows[1]["phonetic_text"]
        write_manifest(tmp_path / name, rows)
    code, said = end_of(start_build(tmp_path, "out", dask.address))
    assert code == 1
    assert "ManifestError: east/train_phon_transcripts.jsonl:2: field 'phonetic_text' is missing" in said


def test_a_worker_that_cannot_write_ends_the_build(dask: Cluster, corpora: Path, tmp_path: Path) -> None:
    (tmp_path / ".building").touch()  # of a build that was killed
    (tmp_path / "train").write_text("in the way")
    code, said = end_of(start_build(corpora, str(tmp_path), dask.address))
    assert code == 1
    assert f"{tmp_path}/train/b" in said


# --- clusters that are no help --------------------------------------------------------------------------------------


def test_no_scheduler_is_told_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("east", "west"):
            make_corpus(tmp_path / name, clips=1)
        code, said = end_of(start_build(tmp_path, "out", address))
    assert code == 1
    assert f"\nStreamtrainError: --scheduler {address}: " in said
    assert "\nhint: start one with `dask scheduler`" in said


def test_a_scheduler_that_goes_ends_the_build(corpora: Path, tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as short:
        short.start_worker()
        build = start_build(corpora, str(tmp_path / "out"), short.address)
        wait_for_a_tar(tmp_path / "out", build)
        short.ends.close()
        code, said = end_of(build)
    assert code == 1
    assert f"StreamtrainError: --scheduler {short.address}: no longer responds" in said
    assert not (tmp_path / "out/index.json").exists()


def test_a_cluster_without_workers_is_given_up_and_one_with_threads_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "NO_WORKER_SEC", 1.0)
    monkeypatch.setattr(cluster, "POLL_SEC", 0.1)
    with running_cluster(tmp_path / "cluster") as empty:
        with pytest.raises(StreamtrainError, match="no worker for 1 s") as caught:
            ClusterWorkers(empty.address)
        assert f"dask worker {empty.address} --nthreads 1" in str(caught.value.hint)
        monkeypatch.setattr(cluster, "NO_WORKER_SEC", READY_SEC)
        empty.start_worker(threads=2)
        with pytest.raises(StreamtrainError, match="runs 2 threads, must run one"):
            ClusterWorkers(empty.address)


def test_without_distributed_it_is_said_what_to_install(corpora: Path, tmp_path: Path) -> None:
    hidden = f"import sys; sys.modules['distributed'] = None; sys.path.insert(0, '{ROOT}')"
    arguments = [str(corpora / "west"), "--out", str(tmp_path), "--scheduler", "tcp://host:8786"]
    call = f"from sharding.cli import main; sys.exit(main({['build', *arguments]}))"
    done = subprocess.run([sys.executable, "-c", f"{hidden}; {call}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("distributed is not installed\nhint: pip install distributed\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scheduler", "host:8786"], "an address such as tcp://host:8786 is expected"),
        (["--scheduler", "tcp://127.0.0.1:1", "--dry-run"], "leave --scheduler out"),
    ],
)
def test_half_a_wish_for_a_cluster_is_refused_in_a_line(
    arguments: list[str], told: str, run_sharding: Command, tmp_path: Path
) -> None:
    done = run_sharding("build", tmp_path, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 2  # what is begun, and this


# --- machines that are no help --------------------------------------------------------------------------------------


def a_job(out: Path, token: str, made_by: tuple[int, str, str] = ENCODER_VERSIONS) -> ShardJob:
    context = BuildContext(str(out), "", (), PHONES, False, token, made_by)
    return ShardJob(context, "train/b00-00000.tar", 0, "train", ())


def test_a_worker_without_out_or_of_a_build_that_ended_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot see the lock of its build"):
        make_shard(a_job(tmp_path / "elsewhere", "token"))
    with exclusive_build(FolderStore(tmp_path)) as lease:
        make_shard(a_job(tmp_path, lease.token))
        with pytest.raises(StoreError, match=f"now held by another build .pid {os.getpid()} on host"):
            make_shard(a_job(tmp_path, "of-a-build-that-ended"))
        with pytest.raises(ShardError, match=r"writes shards with format .*; this build needs format 1, libsndfile 0"):
            make_shard(a_job(tmp_path, lease.token, (1, "0", "0")))


def test_a_source_that_a_machine_does_not_see_is_no_fault_of_its_clips(tmp_path: Path) -> None:
    away = AudioRoot(str(tmp_path / "away"))
    with pytest.raises(ManifestError, match=f"does not exist on {socket.gethostname()}"), open_audio(away, "clip.flac"):
        pass
    with pytest.raises(ManifestError, match=f"does not exist on {socket.gethostname()}"):
        list_audio(away)
