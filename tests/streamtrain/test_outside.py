"""What others have put into a folder that a person names is no way out of it: nothing beyond is written or removed."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharding.audio.codec import decode, encode
from sharding.build.lock import LOCK_NAME, exclusive_build
from sharding.cli import main as sharding_main
from sharding.errors import StoreError, StreamtrainError
from sharding.files.writing import append, write_inside
from sharding.shardset.index import read_index
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import FolderStore, open_store
from streamtrain.atomic import new_folder
from streamtrain.cli import main
from streamtrain.config import load_config
from streamtrain.distributed import World
from streamtrain.infer.inputs import find_recordings
from streamtrain.infer.transcribe import DecodingOptions, transcribe
from streamtrain.training.run import train
from streamtrain.training.run_log import RunLog
from tests.tools.commands import ROOT
from tests.tools.corpus import sound
from tests.tools.models import save, talkative
from tests.tools.stream_sets import cached

PRECIOUS = b"a thesis\n"


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """To open a pipe that nobody writes to waits for ever."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file and a folder that must be at the end what they are now."""
    folder = tmp_path / "victim"
    folder.mkdir()
    thesis = folder / "thesis.txt"
    thesis.write_bytes(PRECIOUS)
    yield thesis
    assert thesis.read_bytes() == PRECIOUS
    assert os.listdir(folder) == [thesis.name]


PUT = {
    "link": lambda path, victim: path.symlink_to(victim),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "pipe": lambda path, victim: os.mkfifo(path),
    "device": lambda path, victim: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", PUT)
def test_a_lock_is_a_file_of_its_folder_or_refused(kind: str, victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    PUT[kind](out / LOCK_NAME, victim)
    with (
        pytest.raises(StoreError, match=rf"{LOCK_NAME}: is (a|also|not) (?s:.*)hint: remove"),
        exclusive_build(open_store(out)),
    ):
        pass


@pytest.mark.parametrize("kind", PUT)
def test_a_file_that_grows_in_a_folder_is_its_own_or_refused(kind: str, victim: Path, tmp_path: Path) -> None:
    PUT[kind](tmp_path / "log.csv", victim)
    with pytest.raises(StoreError, match=r"log.csv: is (a|also|not) (?s:.*)hint: remove"):
        append(tmp_path / "log.csv", "1,2\n")


@pytest.mark.parametrize("kind", PUT)
def test_a_file_written_into_a_folder_takes_the_place_of_what_had_its_name(
    kind: str, victim: Path, tmp_path: Path
) -> None:
    PUT[kind](tmp_path / "config.json", victim)
    write_inside(tmp_path / "config.json", b"{}")
    assert (tmp_path / "config.json").read_bytes() == b"{}"
    assert not (tmp_path / "config.json").is_symlink()


def test_pieces_are_not_written_where_a_link_leads(
    small_corpus: Path, small_shards: Path, victim: Path, tmp_path: Path, run_sharding: Callable[..., object]
) -> None:
    out = Path(shutil.copytree(small_shards, tmp_path / "set"))
    (out / "index.json").unlink()
    (out / ".pieces").symlink_to(victim.parent)
    done = run_sharding("build", small_corpus, "--out", out, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 0, done.stderr
    assert read_index(FolderStore(out)).digest == read_index(FolderStore(small_shards)).digest
    assert not os.path.lexists(out / ".pieces")


@pytest.mark.parametrize("name", [".model.part", ".model.old"])
def test_a_folder_is_not_made_where_a_link_leads(name: str, victim: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / name).symlink_to(victim.parent)
    with new_folder(tmp_path / "model") as partial:
        (partial / "vocab.json").write_bytes(b"{}")
    assert (tmp_path / "model/vocab.json").read_bytes() == b"{}"


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "of"), [("checkpoints", "folder"), ("tensorboard", "folder"), (".lock", "file")])
def test_a_run_does_not_begin_where_its_files_would_lie_elsewhere(
    name: str, of: str, small_shards: Path, victim: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim if of == "file" else victim.parent)
    chosen = [f"data.shards={small_shards}", f"train.run_dir={run}"]
    with pytest.raises(StreamtrainError, match=rf"{name}: is a link that leads (?s:.*)hint: remove"):
        train(load_config(ROOT / "configs/zero2.json", chosen), World())


@pytest.mark.parametrize("name", ["log.csv", "ranks.csv", "samples.txt"])
def test_a_log_does_not_go_on_in_a_file_elsewhere(name: str, victim: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to("../victim/none")
    RunLog(run, 10, 0).close()
    assert not (run / name).is_symlink()


# --- a cache --------------------------------------------------------------------------------------------------------


def test_a_cache_does_not_lock_or_fetch_where_a_link_leads(bucket: BucketStore, victim: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "evict.lock").symlink_to(victim)
    with pytest.raises(StoreError, match="leads elsewhere"):
        cached(bucket, cache)
    (cache / "evict.lock").unlink()
    (cache / read_index(bucket).digest[:16]).rmdir()
    (cache / read_index(bucket).digest[:16]).symlink_to(victim.parent)
    with pytest.raises(StoreError, match="leads elsewhere"):
        cached(bucket, cache)


def test_a_cache_removes_no_shards_but_those_it_has_fetched(bucket: BucketStore, tmp_path: Path) -> None:
    """Though they lie beside it, or behind a link."""
    index, cache = read_index(bucket), tmp_path / "cache"
    largest = max(shard.bytes for shard in index.shards)
    for place in (cache / "corpus", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "audio.tar").write_bytes(bytes(3 * largest))
        os.utime(place / "audio.tar", (0, 0))
    (cache / ("0" * 16)).symlink_to(tmp_path / "elsewhere")
    cached(bucket, cache, 2 * largest).read_ranges(index.shards[0].name, [(0, 1)])
    assert (cache / "corpus/audio.tar").exists()
    assert (tmp_path / "elsewhere/audio.tar").exists()


# --- transcription --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(talkative("wav2vec2, group norm"), tmp_path_factory.mktemp("run") / "best")


def test_rows_are_not_written_where_a_link_leads(model: Path, victim: Path, tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.flac", tmp_path / "out.jsonl"
    clip.write_bytes(encode(sound(1, 0)))
    (tmp_path / ".out.jsonl.part").symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.out\.jsonl\.part: is a link that leads elsewhere|out.jsonl: is a link"):
        transcribe(model, find_recordings([str(clip)]), out, DecodingOptions(30.0))
    (tmp_path / ".out.jsonl.part").unlink()
    (tmp_path / ".out.jsonl.part.json").symlink_to(victim)
    assert transcribe(model, find_recordings([str(clip)]), out, DecodingOptions(30.0)) == 0
    assert json.loads(out.read_text())["error"] is None


# --- what a command line names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [
    "transcribe M x.jsonl --out x.jsonl", "transcribe M x.flac --out linked.flac", "align M x.jsonl --out ./x.jsonl",
    "package M --check x.jsonl --out x.jsonl", "plan --config x.jsonl --keys x.jsonl", "split x.flac --plot x.flac",
])  # fmt: skip
def test_a_file_that_is_read_is_not_replaced_by_what_is_made_of_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.flac").write_bytes(encode(sound(1, 0)))
    Path("x.jsonl").write_text('{"utterance_id": "x", "audio_path": "x.flac"}\n')
    Path("linked.flac").symlink_to("x.flac")
    before = {name: Path(name).read_bytes() for name in ("x.flac", "x.jsonl")}
    code = (sharding_main if command.startswith("split") else main)(command.split())
    assert code in (1, 2)  # 2: a file of another kind than the command writes
    assert re.search("is read, and would be replaced\nhint: |exists, and is no such file", capsys.readouterr().err)
    assert {name: Path(name).read_bytes() for name in before} == before


@pytest.mark.parametrize("command", [
    "build c --out @", "build @ --out c", "verify @", "verify c --repair @", "inspect c --plots @", "index @",
    "build c --alignments @", "demo-corpus @", "split @", "split c --plot @", "transcribe @ c --out c",
    "transcribe c @ --out c", "transcribe c c --out @", "export c --out @", "package c --out @", "summary @",
    "score @ c", "align c @ --out c", "compare c @", "plan @",
])  # fmt: skip
def test_a_name_that_is_empty_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable is that nobody has set: it would be the current folder."""
    arguments = [word.replace("@", "") for word in command.split()]
    sharding = arguments[0] in ("build", "verify", "inspect", "index", "demo-corpus", "split")
    assert (sharding_main if sharding else main)(arguments) == 2
    assert "a name is expected; is a variable of the shell not set?" in capsys.readouterr().err


@pytest.mark.parametrize("put", [os.mkfifo, lambda name: Path(name).write_bytes(b"")])
def test_no_resource_fork_is_read_from_the_current_folder(
    put: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libsndfile would: a pipe of that name is waited for, and an empty file makes every MP3 unreadable."""
    monkeypatch.chdir(tmp_path)
    put("._")
    with pytest.raises(StreamtrainError, match=r"^\._: (?s:.*)hint: move it"):
        decode(bytes(1_000))
