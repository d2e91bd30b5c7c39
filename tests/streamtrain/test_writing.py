"""Whatever a person names as an output stays what it is, holds the whole of what was written, or all that it held."""

import errno
import io
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import zstandard

from sharding.audio.codec import encode
from sharding.cli import main as sharding_main
from sharding.errors import StoreError, StreamtrainError
from sharding.files.writing import append, is_stdout, replacing, sibling, write, written
from streamtrain.cli import main
from streamtrain.distributed import World
from streamtrain.eval.evaluate import evaluate_model
from streamtrain.training.checkpoint import RunState, save_checkpoint
from streamtrain.training.zero_engine import FullState
from tests.tools.commands import ROOT, own_mounts
from tests.tools.corpus import sound
from tests.tools.models import save, talkative

CONFIG = str(ROOT / "configs" / "zero2.json")
OLD, NEW = b"what was there before", b"what is there now" * 10_000


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- what a path leads to -------------------------------------------------------------------------------------------


def make(kind: str, folder: Path) -> Path:
    """Make what a person may name, with a target of its own if it is a link."""
    path, target = folder / "out", folder / "elsewhere" / "target"
    target.parent.mkdir()
    if kind == "file":
        path.write_bytes(OLD)
    if "link" in kind:
        path.symlink_to(Path("elsewhere") / "target")
    if kind == "link to a file":
        target.write_bytes(OLD)
    if kind == "link to a link":
        target.symlink_to(folder / "elsewhere" / "further")
    if "pipe" in kind:
        os.mkfifo(target if "link" in kind else path)
    return path


@pytest.mark.parametrize("kind", ["nothing", "file", "link to a file", "link to nothing", "link to a link"])
def test_a_file_is_replaced_and_a_link_to_it_stays(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    before = path.open("rb") if kind.endswith("file") else io.BytesIO(OLD)
    was_link = path.is_symlink()
    write(path, NEW)
    assert path.read_bytes() == NEW
    assert path.is_symlink() == was_link
    assert before.read() == OLD  # whoever reads it meanwhile has the old one, whole
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe"])
def test_a_pipe_is_written_to_as_it_is(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    with reading(path) as read:
        write(path, NEW)
    assert read == [NEW]
    assert stat.S_ISFIFO(path.stat().st_mode)


@contextmanager
def reading(pipe: Path) -> Iterator[list[bytes]]:
    """Read all that is written to a pipe; it is in the list at the end."""
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    yield read
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_the_standard_output_is_written_on_whatever_it_is(mode: str, tmp_path: Path) -> None:
    """Also a file, which is neither cut nor replaced; by its name, by a link to it, and for a zip, which seeks."""
    script = """
import sys, zipfile
from pathlib import Path
from sharding.files.writing import write, written
print("said before")
write(Path("/dev/stdout"), "as a device\\n")
write(Path(sys.argv[1]), "through a link\\n")
with written(Path("/dev/fd/1")) as file, zipfile.ZipFile(file, "w") as archive:
    with archive.open("member", "w", force_zip64=True) as member:
        member.write(b"content")
"""
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "out").write_bytes(OLD)
    before = os.lstat("/dev/stdout")
    with open(tmp_path / "out", mode) as out:
        subprocess.run([sys.executable, "-c", script, tmp_path / "link"], cwd=ROOT, stdout=out, check=True)
    written_so = (tmp_path / "out").read_bytes()
    head = (OLD if mode == "ab" else b"") + b"said before\nas a device\nthrough a link\n"
    assert written_so.startswith(head)
    with zipfile.ZipFile(io.BytesIO(written_so[len(head) :])) as archive:
        assert archive.read("member") == b"content"
    assert os.lstat("/dev/stdout").st_ino == before.st_ino
    assert names(tmp_path) == ["link", "out"]


def test_only_what_leads_to_the_standard_output_shares_it_with_messages(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "loop").symlink_to("loop")
    assert all(map(is_stdout, (tmp_path / "link", Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1"))))
    others = (tmp_path / "none", tmp_path / "loop", Path("/dev/stderr"), Path("/dev/null"), Path("-"))
    assert not any(map(is_stdout, others))


# --- what cannot be written -----------------------------------------------------------------------------------------


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Have no file of this process grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("name", "told"), [("-", "a folder is written, not a stream"), ("", "a name is expected")])
def test_a_folder_to_write_is_no_stream(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    here = set(Path().iterdir())
    for run, command in (
        (main, ["export", "model", "--out", name]),
        (main, ["transcribe", "model", "a.flac", "--out", "b", "--log-probs", name]),
        (sharding_main, ["build", "--out", name]),
        (sharding_main, ["inspect", "shards", "--plots", name]),
        (sharding_main, ["demo-corpus", name]),
    ):
        assert run(command) == 2
        assert told in capsys.readouterr().err
    assert set(Path().iterdir()) == here


@pytest.mark.parametrize("name", ["x" * 255, "ɑ" * 127])
def test_any_name_that_the_system_takes_is_written_and_a_longer_one_is_told(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, b"new")
    write(tmp_path / name, b"newer")
    assert (tmp_path / name).read_bytes() == b"newer"
    assert sibling(tmp_path / name, ".part").name.encode()
    with pytest.raises(StoreError, match="File name too long\nhint: name a path"):
        write(tmp_path / f"{name}ɑ", b"new")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("size", [50, 5_000, 500_000])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(size: int, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(OLD)
    with small_files(10), pytest.raises(StoreError, match=f"^{tmp_path / 'out'}: File too large\nhint: .*ulimit"):
        write(tmp_path / "out", b"x" * size)
    assert (tmp_path / "out").read_bytes() == OLD
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("/dev/full", "No space left on device\nhint: make room"),
        (".", "Is a directory\nhint: name a path"),
        ("file/out", "Not a directory\nhint: name a path"),
        ("loop", "Too many levels of symbolic links\nhint: name a path"),
        ("/proc/out", "No such file or directory\nhint: name a path"),
        ("x" * 300, "File name too long\nhint: name a path"),
    ],
)
def test_what_cannot_be_written_is_told_with_its_path_and_a_hint(where: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match=f"{tmp_path / where}: {said}"):
        write(tmp_path / where, NEW)
    assert names(tmp_path) == ["file", "loop"]
    with pytest.raises(StoreError, match=f"{tmp_path / where}: "):
        append(tmp_path / where, "more")


def test_a_writer_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_WRONLY | os.O_TMPFILE))
    except OSError:
        pytest.skip("this file system has no files without a name")
    (tmp_path / "out").write_bytes(b"before")
    code = (
        "import os, sys; from pathlib import Path; from sharding.files.writing import replacing\n"
        "with replacing(Path(sys.argv[1])) as file: file.write(bytes(10**6)); file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"before"


def test_a_fault_of_what_fills_a_file_is_not_the_files(tmp_path: Path) -> None:
    for open_so in (written, replacing):
        with pytest.raises(FileNotFoundError, match="none"), open_so(tmp_path / "out") as file:
            file.write((tmp_path / "none").read_bytes())
    assert not names(tmp_path)


def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of FUSE's, which say that this is no valid argument."""
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    write(tmp_path / "out", NEW)
    assert (tmp_path / "out").read_bytes() == NEW


@pytest.mark.parametrize("arguments", ["inspect {}", "verify {}", "build {}/nothing --out {}/out"])
def test_a_command_whose_standard_output_is_closed_ends_as_ever(arguments: str, small_shards: Path) -> None:
    """As some schedulers start one: `>&-` of a shell."""
    command = f"{sys.executable} -m sharding {arguments.format(*2 * [small_shards])} >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == int("nothing" in arguments)
    assert "Traceback" not in done.stderr


def test_what_is_printed_to_a_full_disk_is_told_in_a_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"utterance_id": "a", "phonetic_text": "a"}\n')
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "streamtrain", "score", rows, rows],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["standard output: No space left on device"]


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_shards: Path, small_corpus: Path) -> Path:
    """A folder with a run's model, a shard set and three clips."""
    folder = tmp_path_factory.mktemp("made")
    save(talkative("wav2vec2, group norm"), folder / "run" / "best")
    (folder / "shards").symlink_to(small_shards)
    (folder / "raw").symlink_to(small_corpus)
    (folder / "clips").mkdir()
    for number in range(3):
        (folder / "clips" / f"{number}.flac").write_bytes(encode(sound(1, number)))
    return folder


def transcribe(made: Path, out: Path | str) -> int:
    return main(["transcribe", str(made / "run" / "best"), str(made / "clips"), "--out", str(out)])


def align(made: Path, out: Path | str) -> int:
    return main(["align", str(made / "run" / "best"), str(made / "shards"), "--out", str(out)])


def package(made: Path, out: Path | str) -> int:
    return main(["package", str(made / "run" / "best"), "--out", str(out)])


def plan(option: str) -> Callable[[Path, Path | str], int]:
    return lambda made, out: main(["plan", str(made / "shards"), "--config", CONFIG, option, str(out)])


def plot(made: Path, out: Path | str) -> int:
    return sharding_main(["split", str(made / "clips" / "0.flac"), "--plot", str(out)])


def is_jsonl(data: bytes) -> bool:
    return all(isinstance(json.loads(line), dict) for line in data.decode().splitlines()) and data.endswith(b"}\n")


def is_compressed_jsonl(data: bytes) -> bool:
    return is_jsonl(zstandard.ZstdDecompressor().stream_reader(data).read())


def is_zip(data: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.testzip() is None and "main.py" in archive.namelist()


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


FILES = {
    "transcribe": (transcribe, is_jsonl),
    "align": (align, is_compressed_jsonl),
    "package": (package, is_zip),
    "plan --keys": (plan("--keys"), is_jsonl),
    "plan --shard-schedule": (plan("--shard-schedule"), is_jsonl),
    "plan --plot": (plan("--plot"), is_png),
    "split --plot": (plot, is_png),
}


@pytest.mark.parametrize("command", FILES)
def test_a_command_writes_through_links_to_pipes_and_to_the_standard_output(
    command: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    act, is_whole = FILES[command]
    link = make("link to a file", tmp_path)
    assert act(made, link) == 2  # of something else
    assert link.read_bytes() == OLD
    link.write_bytes(b"")
    assert act(made, link) == 0
    assert link.is_symlink()
    assert is_whole(link.read_bytes())
    os.mkfifo(tmp_path / "pipe")
    with reading(tmp_path / "pipe") as read:
        assert act(made, tmp_path / "pipe") == 0
    assert is_whole(read[0])
    assert names(tmp_path) == ["elsewhere", "elsewhere/target", "out", "pipe"]
    capfd.readouterr()


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_messages_make_way_for_what_a_command_writes_to_the_standard_output(
    out: str, command: str, made: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    act, is_whole = FILES[command]
    before = os.lstat("/dev/stdout")[:7]  # not when it was last read, which others do
    monkeypatch.chdir(tmp_path)  # in which a file named - would be made
    assert act(made, out) == 0
    said = capfdbinary.readouterr()
    assert is_whole(said.out)
    assert said.err
    assert os.lstat("/dev/stdout")[:7] == before
    assert not names(tmp_path)


def export(made: Path, out: Path) -> int:
    return main(["export", str(made / "run" / "best"), "--out", str(out)])


def build(made: Path, out: Path) -> int:
    return sharding_main(["build", str(made / "raw"), "--out", str(out), "--workers", "1"])


def evaluate(made: Path, out: Path) -> int:
    return told(lambda: evaluate_model(str(made / "run" / "best"), str(made / "shards"), "valid", 40, out, World()))


def checkpoint(made: Path, out: Path) -> int:
    parts = FullState({"weight": torch.zeros(300_000)}, {}, {}, {})
    return told(lambda: save_checkpoint(parts, RunState({}, "", 1), out, keep=2))


def told(act: Callable[[], object]) -> int:
    """Tell errors as the launched commands do."""
    try:
        act()
        return 0
    except StreamtrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


ALL: dict[str, Callable[[Path, Path], int]] = {name: act for name, (act, _) in FILES.items()} | {
    "export": export, "evaluate": evaluate, "checkpoint": checkpoint, "build": build,
}  # fmt: skip


def test_on_a_full_disk_every_command_says_what_to_do_and_leaves_no_half_of_anything(
    made: Path, tmp_path: Path
) -> None:
    """A disk of 24 kB, in one process that runs them all; each begins on what the others have left."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=24k,nr_inodes=40 tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    run_all = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.streamtrain.test_writing import ALL, names
disk, made = map(Path, sys.argv[1:])
(disk / "filler").write_bytes(b"x" * 24 * 1024)
for number, (command, act) in enumerate(ALL.items()):
    print(f"=== {command}", file=sys.stderr, flush=True)
    code = act(made, disk / f"out-{number}")
    print(f"\\nleft {code}", *[name for name in names(disk) if ".part" in name or (disk / name).is_file()],
          file=sys.stderr, flush=True)
"""
    done = subprocess.run(
        [*own_mounts(), "sh", "-c", script, "sh", str(tmp_path / "disk"), sys.executable, run_all, str(made)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for part in done.stderr.split("=== ")[1:]:
        command, *lines = part.splitlines()
        assert "StoreError: " in part, part
        told = next(number for number, line in enumerate(lines) if "StoreError: " in line)
        assert re.search(rf"StoreError: {tmp_path / 'disk'}/\.?out-", lines[told])
        assert "No space left on device (" in lines[told]
        assert lines[told].endswith(" are free)")
        assert "make room" in lines[told + 1]
        assert lines[-1] == "left 1 filler", command
