"""Where the kernel refuses file locks, for real: nobody works unguarded, and what a killed process held goes on."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.files.exclusive import SUFFIX, this_process
from tests.tools.commands import ROOT
from tests.tools.corpus import recite
from tests.tools.models import save, talkative
from tests.tools.training_runs import environment, read_rows, run, start, training, wait_until

ADVICE = "if that process or its machine is gone, delete"
ERRORS = ["ENOSYS", "EOPNOTSUPP", "ENOLCK"]
HOST = socket.gethostname()
DEAD = json.dumps(this_process() | {"started": 1})  # an earlier process of this number
HOLD = """
import sys
from sharding.files.exclusive import exclusive
with open(sys.argv[1], "a") as file, exclusive(file):
    print("held", flush=True)
    sys.stdin.read()
"""
COME_AND_GO = """
import os, sys, threading, time
from contextlib import suppress
from pathlib import Path
from sharding.errors import StoreError
from sharding.build.lock import exclusive_build
from sharding.shardset.store import open_store
out, left = Path(sys.argv[1]), sys.argv[2]
entered, failed = [], []
sys.setswitchinterval(1e-6)
threading.excepthook = failed.append
start, end = threading.Barrier(6, lambda: (out / ".building.held").write_text(left)), threading.Barrier(6)

def run():
    for _ in range(30):
        start.wait(20)  # all find what a dead process left
        with suppress(StoreError), exclusive_build(open_store(out)) as lease:
            os.close(os.open(out / "inside", os.O_CREAT | os.O_EXCL))  # fails if another is in
            lease.check()
            entered.append(1)
            time.sleep(0.005)
            os.unlink(out / "inside")
        end.wait(20)

threads = [threading.Thread(target=run) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert entered and not failed, failed
"""
TRANSCRIBE = """
import sys
from pathlib import Path
from streamtrain.cli import main
lock_file, left, *arguments = sys.argv[1:]
assert main(arguments) == 1
Path(lock_file).write_text(left)
assert main(arguments) == 0
"""
CACHE = """
import sys
from pathlib import Path
from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from streamtrain.data.cache import ShardCache
store = open_store(sys.argv[1])
ShardCache(store, read_index(store), Path(sys.argv[2]), 2**30)
"""


def without_locks(error: str, *command: object) -> list[object]:
    return [sys.executable, ROOT / "tests/tools/without_flock.py", error, *command]


@pytest.fixture(scope="module", autouse=True)
def _is_permitted() -> None:
    if subprocess.run(list(map(str, without_locks("ENOSYS", "true"))), capture_output=True, check=False).returncode:
        pytest.skip("seccomp filters are not permitted here")


@contextmanager
def holder(error: str, path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds a file until it is killed."""
    command = list(map(str, without_locks(error, sys.executable, "-c", HOLD, path)))
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment()) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def check(error: str, command: Sequence[object], expect: int = 0) -> str:
    """Run a command without locks; returns what it writes to stderr, which is no traceback."""
    done = run(without_locks(error, *command), expect)
    assert "Traceback" not in done.stderr
    return done.stderr


def lock_file_elsewhere(path: Path) -> Path:
    """Write the lock file of a process on another machine."""
    lock_file = path.with_name(path.name + SUFFIX)
    lock_file.write_text(json.dumps(this_process() | {"place": "far", "host": "far", "pid": 7}))
    return lock_file


@pytest.mark.parametrize("error", ERRORS)
def test_one_build_at_a_time_writes_and_leaves_no_lock(error: str, small_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    build = [sys.executable, "-m", "sharding", "build", small_corpus, "--out", out]
    with holder(error, out / ".building") as first:
        said = check(error, build, expect=1)
        assert f"{out}: another build is running (pid {first.pid} on host {HOST} since 20" in said
        assert {path.name for path in out.iterdir()} == {".building", ".building.held"}
    said = check(error, build)
    assert said.count("this file system has no file locks; .building.held beside it is used instead") == 1
    assert (out / "index.json").is_file()
    assert not list(out.rglob(".*"))


def test_the_build_of_another_machine_is_named_and_how_to_go_on(small_corpus: Path, tmp_path: Path) -> None:
    lock_file = lock_file_elsewhere(tmp_path / ".building")
    said = check("ENOSYS", [sys.executable, "-m", "sharding", "build", small_corpus, "--out", tmp_path], expect=1)
    assert "another build is running (pid 7 on host far since 20" in said
    assert f"{ADVICE} {lock_file}" in said


def test_of_many_that_find_what_a_dead_build_left_never_two_are_in(tmp_path: Path) -> None:
    check("ENOSYS", [sys.executable, "-c", COME_AND_GO, tmp_path, DEAD])
    assert not list(tmp_path.iterdir())


def test_a_run_is_alone_in_its_folder_and_goes_on_after_a_kill(work: Path) -> None:
    folder, log, refused = work / "lockless", work / "lockless.out", work / "refused.out"
    command = training(work, "lockless", "train.checkpoint_every=1", "train.max_steps=3", "train.probe=false", ranks=1)
    first = start(without_locks("ENOSYS", *command), log)
    try:
        wait_until((folder / f".lock{SUFFIX}").is_file, first, log)
        second = start(without_locks("EOPNOTSUPP", *command), refused)
        wait_until((folder / "checkpoints" / "step-0000001" / "state.json").is_file, first, log)
        first.send_signal(signal.SIGSTOP)
        assert second.wait(120) == 1
    finally:
        first.kill()
        first.wait()
    said = refused.read_text()
    assert f"another run is writing here (pid {first.pid} on host {HOST} since 20" in said
    assert "Traceback" not in said
    said = check("ENOLCK", command)
    assert "resumed at step" in said
    assert [row["step"] for row in read_rows(folder)] == ["1", "2", "3"]
    assert not (folder / f".lock{SUFFIX}").exists()


def test_one_run_at_a_time_transcribes_to_a_file(tmp_path: Path) -> None:
    model = save(talkative("wav2vec2, group norm"), tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", recite(["tata"], 0, np.random.default_rng(0)), 16_000)
    out, lock_file = tmp_path / "out.jsonl", lock_file_elsewhere(tmp_path / ".out.jsonl.part")
    arguments = ["transcribe", model, tmp_path / "a.wav", "--out", out]
    said = check("EOPNOTSUPP", [sys.executable, "-c", TRANSCRIBE, lock_file, DEAD, *arguments])
    assert f"{out}: another run is writing it (pid 7 on host far since 20" in said
    assert f"{ADVICE} {lock_file}" in said
    assert json.loads(out.read_text())["error"] is None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", ERRORS)
def test_a_cache_wants_a_local_disk(error: str, meadow: Path, tmp_path: Path) -> None:
    said = run(without_locks(error, sys.executable, "-c", CACHE, meadow, tmp_path / "cache"), expect=1).stderr
    assert f"data.cache_dir: {tmp_path / 'cache'}: this file system has no file locks" in said
    assert "hint: choose a cache_dir on a local disk" in said
