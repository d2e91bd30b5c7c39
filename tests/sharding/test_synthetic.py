"""The demo corpus is a corpus like any other, with one file that is only a header if it is not small."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.commands import ROOT, Command, own_mounts, run_module
from tests.tools.corpus import read_manifest
from tests.tools.shard_sets import assert_balanced, read_all, read_ledger

pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory, run_sharding: Command) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    done = run_sharding("demo-corpus", folder, "--minutes", 1, "--children", 4)
    assert done.returncode == 0, done.stderr
    return folder


def test_all_of_a_small_one_is_taken_and_validation_has_a_child(
    demo_corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    sources = [demo_corpus / "hillside", demo_corpus / "riverside"]
    done = run_sharding("build", *sources, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert_balanced(tmp_path / "out")
    assert not [row for row in read_ledger(tmp_path / "out") if row["fate"] == "rejected"]
    samples = read_all(tmp_path / "out").values()
    children = {split: {sample.child_id for part, sample in samples if part == split} for split in ("train", "valid")}
    assert len(children["train"]) == 3
    assert len(children["valid"]) == 1
    assert any(sample.label_status == "reference" for split, sample in samples if split == "valid")


def test_its_rows_are_true_and_the_same_seed_speaks_the_same(
    demo_corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    old = tmp_path / "hillside/audio" / f"U_{16 * '0'}.flac"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of a larger one")
    own = tmp_path / "hillside/notes.txt"
    own.write_text("of the user")
    done = run_sharding("demo-corpus", tmp_path, "--minutes", 1, "--children", 4)
    assert (done.returncode, own.read_text()) == (1, "of the user")
    own.unlink()
    assert run_sharding("demo-corpus", tmp_path, "--minutes", 1, "--children", 4).returncode == 0
    assert not old.exists()
    for corpus in ("hillside", "riverside"):
        rows = read_manifest(demo_corpus / corpus)
        assert rows == read_manifest(tmp_path / corpus)
        for row in rows:
            data = (demo_corpus / corpus / row["audio_path"]).read_bytes()
            assert row["md5_hash"] == hashlib.md5(data, usedforsecurity=False).hexdigest()
            assert row["filesize_bytes"] == len(data)


def test_what_make_demo_builds_fits_its_configuration(tmp_path: Path) -> None:
    """Its shards as the Makefile builds them, planned as it trains on them."""
    commands = re.findall(r"^\t(streamtrain (?:demo-corpus|build) .*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["demo-corpus", "build"]
    for command in commands:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(
            command.replace("streamtrain", f"{sys.executable} -m streamtrain", 1),
            shell=True,
            check=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
        )
    shards = f"data.shards={tmp_path}/data/demo/shards"
    done = run_module("streamtrain", "plan", "--config", ROOT / "configs/demo.json", "--world-size", 2, "--set", shards)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--children", "1"], ["--seed", "-1"], ["--minutes", "nan"]])
def test_a_size_that_makes_no_sense_is_refused(arguments: list[str], run_sharding: Command, tmp_path: Path) -> None:
    done = run_sharding("demo-corpus", tmp_path / "raw", *arguments)
    assert done.returncode == 2
    assert "Invalid value" in done.stderr
    assert not (tmp_path / "raw").exists()


def test_a_folder_that_cannot_be_written_is_named(run_sharding: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run_sharding("demo-corpus", tmp_path / "file")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr


def test_a_full_temporary_folder_is_told_with_what_to_do(tmp_path: Path) -> None:
    """espeak-ng is copied there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    script = 'mount -t tmpfs -o size=4k tmpfs "$1" && exec "$2" -m sharding demo-corpus "$3"'
    done = subprocess.run(
        [*own_mounts(), "sh", "-c", script, "sh", folder, sys.executable, tmp_path / "out"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"StoreError: {folder}: No space left on device (0 are free)\nhint: make room there, or" in done.stderr
