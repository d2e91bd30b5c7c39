"""Temporary files that may be large: their folders, and what is told when there is no room."""

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import StoreError
from sharding.files.spool import MARK, NEW_SEC, PREFIX, Spool, large_files_folder, map_table, select_rows

TABLE = np.dtype([("row", "<u4"), ("sum", "<u8")])
HOLD = """
import sys, time
from sharding.files.spool import large_files_folder
with large_files_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_what_was_written_is_mapped_and_leaves_no_file(temporary: Path) -> None:
    spool, empty = Spool(), Spool()
    for part in (b"ab", b"", b"cd" * 2**20):
        spool.write(part)
    text, table = spool.map(), map_table(3, TABLE)
    table["sum"][1] = 2**40
    assert (spool.size, text[:4], text.find(b"b"), len(text)) == (2 + 2**21, b"abcd"[:2] + b"cd", 1, 2 + 2**21)
    assert (empty.map(), table["sum"].tolist(), len(map_table(0, TABLE))) == (b"", [0, 2**40, 0], 0)
    assert not list(temporary.iterdir())


def test_no_room_is_told_with_the_variable_that_names_another_folder(temporary: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        spool = Spool()
        with pytest.raises(StoreError, match=f"{temporary}: File too large") as written:
            spool.write(bytes(2**22))  # more than its buffer
        with pytest.raises(StoreError, match=f"{temporary}: File too large"):
            map_table(2**20, TABLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TMPDIR=FOLDER" in str(written.value.hint)


def test_a_folder_for_temporary_files_that_is_not_there_is_named(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(temporary / "typo"))
    with pytest.raises(StoreError, match="typo: No such file or directory"):
        map_table(2**20, TABLE)
    with pytest.raises(StoreError, match="typo"), large_files_folder():
        pass


@pytest.mark.parametrize("count", [0, 10, 200_000])
def test_chosen_rows_are_those_of_the_mask(count: int) -> None:
    table, random = np.zeros(count, TABLE), np.random.default_rng(count)
    table["sum"] = random.integers(0, 2**60, count)
    chosen = random.random(count) < 0.7
    assert (select_rows(table, chosen) == table[chosen]).all()


def test_many_small_spools_take_no_descriptors(temporary: Path) -> None:
    before, kept = len(os.listdir("/proc/self/fd")), []
    for _ in range(50):
        spool = Spool()
        spool.write(b"x" * 1_000)
        kept.append(spool.map())
    assert len(os.listdir("/proc/self/fd")) == before


def test_folders_of_killed_processes_are_deleted_and_no_others(temporary: Path) -> None:
    holders = [subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (Path(process.stdout.readline().strip()) for process in holders if process.stdout)
        (killed / "data").write_bytes(b"x")
        others = [temporary / name for name in ("streamtrain-shards", f"{PREFIX}-{socket.gethostname()}-mine",
                                                f"{PREFIX}-elsewhere-x")]  # fmt: skip
        for folder in others:
            folder.mkdir()
        (others[-1] / MARK).touch()
        holders[0].kill()
        holders[0].wait()
        old = time.time() - 2 * NEW_SEC
        for folder in (killed, alive, *others):
            os.utime(folder, (old, old))
        with large_files_folder() as folder:
            assert sorted(temporary.iterdir()) == sorted([alive, Path(folder), *others])
        assert sorted(temporary.iterdir()) == sorted([alive, *others])
    finally:
        for process in holders:
            process.kill()
            process.wait()
