"""A build that was killed, or ran out of room, at any moment: run again at once, it ends as if nothing had happened."""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sharding.audio.codec import encode
from sharding.errors import StreamtrainError
from sharding.shardset.index import read_shard_index
from sharding.shardset.store import open_store
from tests.tools.commands import ROOT, Command, own_mounts
from tests.tools.corpus import SAMPLE_RATE, describe, make_corpus, read_manifest, say, write_manifest
from tests.tools.shard_sets import assert_balanced, read_ledger, read_summary

TEXT = "kæt sæt"
UNCHECKED: dict[str, object] = {"md5_hash": None, "filesize_bytes": None}
SETTINGS = ("--shard-mb", 0.1, "--max-reject-rate", 1)
MOMENTS = 20
ORDINARY_MOMENTS = 4  # of those, when time is short
GONE_SEC = 5.0  # in which nobody of a killed build may be left

Process = subprocess.Popen[str]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted build, and how long it took."""

    sources: list[Path]
    files: Files
    seconds: float


def start(*arguments: object, **options: Any) -> Process:
    """The real command, still running."""
    command = [sys.executable, "-m", "sharding", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | options.pop("env", {})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment, **options)


def finish(process: Process) -> tuple[int, str]:
    """Its exit code, and what it said beside what it begins and its progress. A user never sees a traceback."""
    _, said = process.communicate(timeout=100)
    assert "Traceback" not in said, said
    return process.returncode, without_bars(said)


def without_bars(said: str) -> str:
    return "\n".join(line for line in said.splitlines() if line and "%|" not in line and line[:9] != "building ")


def build(out: Path, *sources: Path, workers: int = 2, **options: Any) -> Process:
    return start("build", *sources, "--out", out, *SETTINGS, "--workers", workers, **options)


def files_of(out: Path) -> Files:
    """Every file, hidden ones and the report included."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def whole_shards(out: Path) -> dict[str, int]:
    """When each shard that is whole was written."""
    marks = [mark for split in ("train", "valid", "unlabelled") for mark in (out / split).glob("*.idx.zst")]
    tars = [mark.with_name(mark.name.replace(".idx.zst", ".tar")) for mark in marks]
    return {tar.relative_to(out).as_posix(): tar.stat().st_mtime_ns for tar in tars}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def find_processes(mark: str) -> dict[int, str]:
    """Living processes that have MARK in their environment, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and is_alive(int(folder.name)):
                found[int(folder.name)] = (folder / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
    return found


def find_workers(mark: str) -> list[int]:
    return [pid for pid, command in find_processes(mark).items() if "spawn_main" in command]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Two corpora with short, long, converted, refused and missing clips, and an orphan, built without a pause."""
    folder = tmp_path_factory.mktemp("whole")
    sources = [make_corpus(folder / "east", clips=70, long_clips=2), make_corpus(folder / "west", clips=20, seed=1)]
    west = sources[1]
    rows = read_manifest(west)
    soundfile.write(west / "audio/high.wav", np.random.default_rng(0).normal(0, 0.1, 20_000), 22_050)
    (west / "audio/broken.flac").write_bytes((west / rows[0]["audio_path"]).read_bytes()[:5000])
    (west / "audio/orphan.flac").write_bytes(encode(say(TEXT)))
    rows += [describe(west, f"audio/{name}", TEXT, **UNCHECKED) for name in ("high.wav", "broken.flac")]
    rows.append(rows[0] | {"utterance_id": "missing", "audio_path": "audio/missing.flac"})
    write_manifest(west, rows)
    begun = time.monotonic()
    assert finish(build(folder / "shards", *sources)) == (0, "")
    seconds = time.monotonic() - begun
    assert_balanced(folder / "shards")
    files = files_of(folder / "shards")
    assert sum(name.endswith(".tar") for name in files) > 20
    assert read_summary(folder / "shards")["fates"]["split"]["clips"] == 2
    return Whole(sources, files, seconds)


# --- killed -----------------------------------------------------------------------------------------------------


def moments() -> Iterator[Any]:
    """A fraction of the whole time, and how many shards are to be whole first; every other one kills a worker."""
    random = np.random.default_rng(0)
    order = random.permutation(MOMENTS)
    for number, place in enumerate(order):
        marks = [pytest.mark.long] if number >= ORDINARY_MOMENTS else []
        fraction = (place + random.random()) / MOMENTS
        yield pytest.param(number, fraction, marks=marks, id=f"{number}-{fraction:.2f}")


def wait_for(number: int, fraction: float, process: Process, out: Path, whole: Whole) -> None:
    """Until that share of the time has passed or, every third moment, that share of the shards is whole."""
    if number % 3 != 2:
        time.sleep(fraction * whole.seconds)
        return
    count = sum(name.endswith(".tar") for name in whole.files)
    while process.poll() is None and len(whole_shards(out)) < fraction * count:
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "fraction"), moments())
def test_killed_at_any_moment_it_ends_in_the_same_bytes_when_run_again(
    number: int, fraction: float, whole: Whole, tmp_path: Path
) -> None:
    out, mark = tmp_path / "out", f"KILLED={tmp_path}"
    process = build(out, *whole.sources, env={"KILLED": str(tmp_path)})
    wait_for(number, fraction, process, out, whole)
    kill = kill_a_worker if number % 2 else kill_the_parent
    kill(process, mark)
    code, said = finish(process)
    if code == 1:
        assert kill is kill_a_worker
        sentence, hint = said.split("\n")
        assert sentence.startswith("StreamtrainError: a worker process died while ")
        assert hint.startswith("hint: out of memory? try fewer: --workers 1")
    else:
        assert code == -signal.SIGKILL or (out / "index.json").exists()  # the last moment: it was not needed any more
    wait_until_nobody_is_left(mark)
    shards = whole_shards(out)
    assert finish(build(out, *whole.sources)) == (0, "")
    assert files_of(out) == whole.files
    assert not list(out.rglob(".*"))
    assert shards.items() <= whole_shards(out).items()  # kept, not written again


def kill_the_parent(process: Process, _: str) -> None:
    process.kill()


def kill_a_worker(process: Process, mark: str) -> None:
    """As soon as there is one."""
    while not (workers := find_workers(mark)) and process.poll() is None:
        time.sleep(0.001)
    for worker in workers[:1]:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def wait_until_nobody_is_left(mark: str) -> None:
    give_up = time.monotonic() + GONE_SEC
    while left := find_processes(mark):
        assert time.monotonic() < give_up, left
        time.sleep(0.05)


# --- no room ----------------------------------------------------------------------------------------------------


def in_own_mounts(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a shell script that may mount what nobody else sees; `build OUT LOG` in it runs the real command."""
    namespace = own_mounts()
    settings = " ".join(map(str, SETTINGS))
    function = f'build() {{ {sys.executable} -m sharding build $SOURCES --out "$1" {settings} --workers 2 2>"$2"; }}\n'
    command = [*namespace, "sh", "-e", "-c", function + script, "sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def sentence_in(log: Path) -> str:
    said = log.read_text()
    assert "Traceback" not in said
    return without_bars(said)


@pytest.mark.parametrize("size_kb", [pytest.param(300, marks=pytest.mark.long), 2000])
def test_a_full_disk_is_named_and_after_room_is_made_the_build_goes_on(
    size_kb: int, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full while the pieces of long recordings wait, and while shards are written."""
    monkeypatch.setenv("SOURCES", " ".join(map(str, whole.sources)))
    (tmp_path / "disk").mkdir()
    script = """
        mount -t tmpfs -o size="$2"k tmpfs "$1"/disk
        build "$1"/disk/out "$1"/first && exit 1
        test ! -e "$1"/disk/out/index.json
        mount -o remount,size=100m "$1"/disk
        build "$1"/disk/out "$1"/second
        cp -a "$1"/disk/out "$1"/out
    """
    done = in_own_mounts(script, tmp_path, size_kb)
    assert done.returncode == 0, done.stderr
    said = sentence_in(tmp_path / "first")
    assert said.startswith(f"StoreError: {tmp_path / 'disk/out'}/")
    assert re.search(r": No space left on device \(.*[\d,]+ are free\)\nhint: make room", said)
    assert files_of(tmp_path / "out") == whole.files


def test_a_limit_on_the_size_of_files_is_named_and_without_it_the_build_goes_on(whole: Whole, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", 60_000
    code, said = finish(
        build(out, *whole.sources, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    )
    assert code == 1
    assert said.startswith(f"StoreError: {out}/")
    assert ": File too large\nhint: the size of files is limited: check" in said
    assert not (out / "index.json").exists()
    assert finish(build(out, *whole.sources)) == (0, "")
    assert files_of(out) == whole.files


def test_a_read_only_out_is_named_and_left_as_it_is(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent, empty, and half built; where it is whole, there is nothing to do."""
    monkeypatch.setenv("SOURCES", " ".join(map(str, whole.sources)))
    for name in ("empty", "half", "whole"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    for name, data in whole.files.items():
        for place in ("whole",) if name == "index.json" else ("half", "whole"):
            (tmp_path / "disk" / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "disk" / place / name).write_bytes(data)
    before = files_of(tmp_path / "disk")
    script = """
        mount --bind "$1"/disk "$1"/disk
        mount -o remount,ro,bind "$1"/disk
        for name in absent empty half; do
            build "$1"/disk/$name "$1"/$name && exit 1
        done
        build "$1"/disk/whole "$1"/whole
    """
    done = in_own_mounts(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    for name in ("absent", "empty", "half"):
        said = sentence_in(tmp_path / name)
        told = rf"StoreError: {tmp_path / 'disk' / name}(/\.building)?: Read-only file system"
        assert re.fullmatch(rf"{told}\nhint: it is mounted read-only: name another path", said)
    assert files_of(tmp_path / "disk") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_without_permission_is_named(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    code, said = finish(build(out, *whole.sources))
    assert (code, said) == (1, f"StoreError: {out}: Permission denied\nhint: name a path that you may write to")
    assert not list(out.iterdir())


# --- the same bytes ---------------------------------------------------------------------------------------------


OTHER_DAYS: dict[str, tuple[int, dict[str, str], int]] = {  # workers, environment, umask
    "alone": (1, {"TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1", "LC_ALL": "C"}, 0o077),
    "many": (5, {"TZ": "America/New_York", "PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "COLUMNS": "40"}, 0o000),
}


@pytest.mark.parametrize("day", OTHER_DAYS)
def test_neither_workers_nor_order_nor_the_day_change_a_byte(day: str, whole: Whole, tmp_path: Path) -> None:
    """Elsewhere, later, by another user, from sources that were copied and given the other way round."""
    workers, environment, umask = OTHER_DAYS[day]
    sources = [shutil.copytree(source, tmp_path / source.name) for source in reversed(whole.sources)]
    for number, path in enumerate(sorted(tmp_path.rglob("*"), reverse=True)):
        os.utime(path, (number, 86_400 * number))
    assert finish(build(tmp_path / "out", *sources, workers=workers, env=environment, umask=umask)) == (0, "")
    assert files_of(tmp_path / "out") == whole.files


# --- what changes under the build -------------------------------------------------------------------------------


def noise(seconds: float, **how: str) -> bytes:
    """Of a kind that is converted, which takes time."""
    buffer = io.BytesIO()
    sound = np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE))
    soundfile.write(buffer, sound, SAMPLE_RATE, **how)
    return buffer.getvalue()


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1000]], ids=["flipped", "cut short"])
def test_a_clip_that_was_refused_and_then_mended_is_in_the_build_that_goes_on(
    damage: Callable[[bytes], bytes], run_sharding: Command, tmp_path: Path
) -> None:
    """Of the same size or of another; its shard was whole without it. The longest clips are written first."""
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    data = noise(60.0, format="FLAC", subtype="PCM_24")
    (folder / "audio/mended.flac").write_bytes(data)
    (folder / "audio/beside.flac").write_bytes(data)
    names = ["mended.flac", "beside.flac"]
    for number in range(40):
        names.append(f"{number}.wav")
        (folder / "audio" / names[-1]).write_bytes(noise(1 + number / 2, format="WAV", subtype="PCM_16"))
    write_manifest(folder, [describe(folder, f"audio/{name}", TEXT, **UNCHECKED) for name in names])
    arguments = ["--max-duration", 100, "--shard-mb", 2, "--valid-fraction", 0, "--workers", 1]
    assert run_sharding("build", folder, "--out", tmp_path / "whole", *arguments).returncode == 0
    (folder / "audio/mended.flac").write_bytes(damage(data))
    process = start("build", folder, "--out", tmp_path / "out", *arguments)
    while not refused_in(tmp_path / "out"):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.wait()
    assert not (tmp_path / "out/index.json").exists()
    (folder / "audio/mended.flac").write_bytes(data)
    assert run_sharding("build", folder, "--out", tmp_path / "out", *arguments).returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def refused_in(out: Path) -> list[str]:
    """Keys of clips that shards were written without."""
    refused = []
    for mark in out.glob("train/*.idx.zst"):
        try:
            shard = read_shard_index(open_store(out), f"train/{mark.name.removesuffix('.idx.zst')}.tar")
        except StreamtrainError:
            continue
        refused += list(shard.refused)
    return refused


def test_a_clip_that_vanishes_or_changes_between_its_examination_and_its_shard_is_refused(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=8, seconds=(0.3, 0.6), long_clips=2)
    rows = read_manifest(folder)
    write_manifest(folder, [row | UNCHECKED for row in rows])
    process = build(tmp_path / "out", folder)
    assert process.stderr
    said = ""
    while "splitting" not in said:  # all are examined, none is written
        said += process.stderr.read(1)
    (folder / rows[0]["audio_path"]).unlink()
    (folder / rows[1]["audio_path"]).write_bytes(encode(say(TEXT * 5)))
    (folder / rows[2]["audio_path"]).write_bytes(b"")
    assert finish(process) == (0, "")
    reasons = {row["utterance_id"]: row["reason"] for row in read_ledger(tmp_path / "out") if row["fate"] == "rejected"}
    assert reasons.pop(rows[0]["utterance_id"]) == "audio file is missing"
    assert reasons.pop(rows[1]["utterance_id"]).startswith("changed during the build, from ")
    assert reasons.pop(rows[2]["utterance_id"]).endswith(" bytes to 0")
    assert not reasons
    assert_balanced(tmp_path / "out")
    code, said = finish(build(tmp_path / "out", folder))
    assert code == 1
    assert "sources have changed" in said
