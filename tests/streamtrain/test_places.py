"""Nothing of the user's is written over: a command takes a free place, or what it has itself left there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.build.place import check_output
from sharding.cli import main
from sharding.errors import ShardError
from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from streamtrain.config import Config
from streamtrain.distributed import World
from streamtrain.training.run import train
from streamtrain.training.trainer import TrainError
from tests.tools.corpus import make_corpus, read_manifest, write_manifest
from tests.tools.stream_sets import write_set


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("names", [["notes.txt"], ["report/summary.json", "train/b00-00000.tar"], ["index.json"],
                                   ["train/b00-00000.idx.zst"], [".git/config"]])  # fmt: skip
def test_a_build_leaves_a_folder_of_something_else_as_it_is(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fill(tmp_path / "out", *names)
    before = contents(out)
    corpus = make_corpus(tmp_path / "corpus", clips=2)
    assert main(["build", str(corpus), "--out", str(out), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"{out}: holds {len(names)} files that belong to no shard set" in said
    assert "remove" not in said
    assert contents(out) == before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda corpus: corpus, "is the source"),
        (lambda corpus: corpus.parent, "holds the source"),
    ],
)
def test_a_build_stays_apart_from_its_sources(place: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    (tmp_path / "raw/corpus").mkdir(parents=True)
    corpus = tmp_path / "raw/corpus"
    with pytest.raises(ShardError, match=said):
        check_output(open_store(place(corpus)), [corpus])
    check_output(open_store(corpus / "shards"), [corpus])


@pytest.mark.parametrize("names", [[], [".gitkeep"], [".building", "train/b00-00000.tar"],
                                   [f"train/.b00-00000.tar.{32 * 'a'}.part"]])  # fmt: skip
def test_a_build_takes_an_empty_place_and_what_a_killed_one_has_left(names: list[str], tmp_path: Path) -> None:
    check_output(open_store(fill(tmp_path / "out", *names)), [tmp_path / "corpus"])


def test_tars_are_not_indexed_over_files_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hint in (("index.json", "to something else"), ("report/summary.json", "belongs to no index")):
        folder = fill(tmp_path / name.replace("/", "-"), name, "a.tar")
        before = contents(folder)
        assert main(["index", str(folder), "--workers", "1"]) == 1
        assert hint in capsys.readouterr().err
        assert contents(folder) == before


# --- a shard set of which a part is gone ----------------------------------------------------------------------------


@pytest.mark.parametrize("left", [None, 700])
def test_a_build_tells_of_a_shard_that_is_gone_or_cut(
    left: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["build", str(make_corpus(tmp_path / "corpus", clips=4)), "--out", str(out), "--workers", "1"]
    assert main(command) == 0
    shard = out / read_index(open_store(out)).shards[0].name
    whole = shard.read_bytes()
    shard.unlink()
    if left is not None:
        shard.write_bytes(whole[:left])
    for more in ([], ["--append"]):
        capsys.readouterr()
        assert main([*command, *more]) == 1
        said = capsys.readouterr()
        assert "nothing to do" not in said.out
        assert shard.name in said.err
        assert f"`streamtrain verify {out} --repair SOURCE…`" in said.err
    assert main(["verify", str(out), "--repair", command[1], "--workers", "1"]) == 0
    assert main(command) == 0
    assert shard.read_bytes() == whole


def test_training_tells_of_a_run_folder_of_something_else_and_of_a_lost_shard_before_it_loads_the_model(
    tmp_path: Path,
) -> None:
    index = write_set(tmp_path / "shards")
    (tmp_path / "shards" / index.shards[1].name).unlink()
    config = Config.model_validate({
        "data": {"shards": str(tmp_path / "shards")}, "model": {"pretrained": str(tmp_path / "no-model")},
        "train": {"run_dir": str(tmp_path / "run")}, "deepspeed": {"optimizer": {"params": {"lr": 1e-4}}},
    })  # fmt: skip
    model = fill(tmp_path / "run", "config.json")
    with pytest.raises(TrainError, match=rf"{model}: holds config.json, but no run"):
        train(config, World())
    assert contents(model) == {"config.json": b"{}"}
    (model / "config.json").unlink()
    with pytest.raises(ShardError, match=rf"{index.shards[1].name} is missing\nhint: .* --repair"):
        train(config, World())


# --- what a person gave otherwise than meant ------------------------------------------------------------------------


def test_phones_parted_by_blanks_and_a_source_named_twice_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path / "corpus", clips=20, seconds=(2, 3))
    command = ["build", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1", "--dry-run"]
    assert main(command) == 0
    assert "separated by blanks" not in capsys.readouterr().err
    parted = [row | {"phonetic_text": " ".join(row["phonetic_text"].replace(" ", ""))} for row in read_manifest(corpus)]
    write_manifest(corpus, parted)
    main(command)
    assert "are the phones separated by blanks?" in capsys.readouterr().err
    assert main([command[0], str(corpus), *command[1:]]) == 1
    assert "hint: this source is named twice" in capsys.readouterr().err


def test_a_label_may_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "corpus", clips=1)
    (row,) = read_manifest(corpus)
    (tmp_path / "label.txt").write_text(row["phonetic_text"] + "\n")
    said = []
    for label in (row["phonetic_text"], str(tmp_path / "label.txt")):
        assert main(["split", str(corpus / row["audio_path"]), "--text", label]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["split", str(corpus / row["audio_path"]), "--text", str(tmp_path / "none.txt")]) == 1
    assert "there is no such file" in capsys.readouterr().err
