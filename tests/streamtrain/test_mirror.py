"""The copy in the bucket is always a whole checkpoint, and what is fetched of it is fetched once; real servers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.errors import StoreError
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import Store, open_store
from streamtrain.config import load_config
from streamtrain.training import mirror as mirror_module
from streamtrain.training.checkpoint import RunState, open_checkpoint, read_checkpoint, save_checkpoint
from streamtrain.training.mirror import FETCHED_AT_ONCE, PART, POINTER, PREVIOUS, STAGING, Mirror
from streamtrain.training.run import _open_mirror
from streamtrain.training.zero_engine import FullState
from tests.tools.commands import ROOT
from tests.tools.fault_proxy import Fault, FaultProxy

PIECE = 4096  # bytes: many pieces of little files
PIECE_PUT, PIECE_GET = "PUT .*/pieces/", "GET .*/pieces/"
PATIENCE_SEC = 1.0
FETCH = """
import sys
from pathlib import Path
import streamtrain.training.mirror
from sharding.shardset.object_store import BucketStore
streamtrain.training.mirror.PIECE_BYTES = int(sys.argv[3])
streamtrain.training.mirror.Mirror(BucketStore(sys.argv[1]), Path(sys.argv[2])).fetch()
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "PIECE_BYTES", PIECE)


def save(run: Path, step: int, seed: int) -> Path:
    """Save a checkpoint of some thirty pieces; a seed is a state."""
    random = torch.Generator().manual_seed(seed)
    weights, moments = ({"weight": torch.rand(16_000, generator=random)} for _ in range(2))
    state = RunState({"train": {"seed": seed}}, "digest", 1, step=step)
    (run / "best").mkdir(parents=True, exist_ok=True)
    (run / "best" / "model.safetensors").unlink(missing_ok=True)  # a new file, as each best model is
    (run / "best" / "model.safetensors").write_bytes(weights["weight"].numpy().tobytes())
    (run / "log.csv").write_text(f"step,loss\n{step},{seed}\n")
    numbers = {"optimizer_steps": step, "loss_scaler": {}}
    return save_checkpoint(FullState(weights, moments, {}, numbers), state, run / "checkpoints", keep=9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(run: Path, checkpoint: Path) -> dict[str, bytes]:
    """What a copy holds if this checkpoint is offered now."""
    files = contents(run)
    inside = (f"checkpoints/{checkpoint.name}/", "best/", "log.csv")
    return {name: data for name, data in files.items() if name.startswith(inside)}


def fetched(store: Store, folder: Path) -> dict[str, bytes]:
    """What an empty machine gets, nothing else beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    Mirror(store, folder).fetch()
    return contents(folder)


def pointer_of(store: Store) -> dict[str, Any]:
    return json.loads(store.read(POINTER))  # type: ignore[no-any-return]


def pieces_of(store: Store) -> set[str]:
    return {piece for pieces in pointer_of(store)["files"].values() for piece in pieces}


def offer(store: Store, run: Path, checkpoint: Path) -> None:
    mirror = Mirror(store, run)
    mirror.enqueue(checkpoint)
    mirror.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "bucket")


# --- copying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [PIECE_PUT, PIECE_GET, f"PUT .*/{POINTER}"])
def test_a_step_that_is_offered_again_while_its_first_copy_is_under_way_ends_as_the_second(
    where: str, run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    """As a run with --replan offers it: the checkpoint it goes on from, then the same step with another state."""
    store = BucketStore(f"{url}/run")
    first = save(run, 1, seed=1)
    was = copied(run, first)
    proxy.plan(Fault("stall response" if where == PIECE_GET else "stall", where))
    mirror = Mirror(store, run)
    mirror.enqueue(first)
    wait_for(lambda: proxy.count(where) > 0)
    second = save(run, 1, seed=2)
    mirror.enqueue(second)
    proxy.clear()
    mirror.close()
    here = copied(run, second)
    assert here.keys() == was.keys()
    assert here != was
    assert fetched(store, tmp_path / "empty") == here
    assert open_checkpoint(tmp_path / "empty" / "checkpoints" / "step-0000001").state.config == {"train": {"seed": 2}}
    assert not (run / STAGING).exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut_off, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_never_pointed_to(
    name: str, damage: Callable[[Path], None], run: Path, tmp_path: Path, folder_store: Store
) -> None:
    before = save(run, 1, seed=1)
    whole = copied(run, before)
    offer(folder_store, run, before)
    pointer = folder_store.read(POINTER)
    damaged = save(run, 2, seed=2)
    damage(damaged / name)
    with pytest.raises(StoreError, match=rf"step-0000002 {name}"):
        offer(folder_store, run, damaged)
    assert folder_store.read(POINTER) == pointer
    assert fetched(folder_store, tmp_path / "empty") == whole


@pytest.mark.parametrize("left", [b"", b"half of it", None])
def test_what_an_earlier_attempt_left_in_the_bucket_is_not_trusted(
    left: bytes | None, run: Path, tmp_path: Path, folder_store: Store
) -> None:
    """Neither pieces that spoilt on their way, nor (`None`) those that the pointer names and that are gone."""
    checkpoint = save(run, 1, seed=1)
    offer(folder_store, run, checkpoint)
    for piece in [name for name in folder_store.names() if name != POINTER]:
        if left is None:
            folder_store.delete(piece)
        else:
            folder_store.write(piece, left)
    if left is not None:
        folder_store.delete(POINTER)
    offer(folder_store, run, checkpoint)
    assert fetched(folder_store, tmp_path / "empty") == copied(run, checkpoint)


def test_a_copy_that_fails_half_way_leaves_the_one_before_it_whole(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    store = BucketStore(f"{url}/run", PATIENCE_SEC)
    before = save(run, 1, seed=1)
    whole = copied(run, before)
    offer(store, run, before)
    second = save(run, 2, seed=2)
    proxy.plan(Fault("slow", PIECE_PUT, times=10), Fault("503", "PUT", times=1000))
    with pytest.raises(StoreError, match="503"):
        offer(store, run, second)
    assert pointer_of(store)["checkpoint"] == "step-0000001"
    assert fetched(store, tmp_path / "empty") == whole
    proxy.clear()
    older = pieces_of(store)
    offer(store, run, second)
    assert older <= set(store.names())  # a machine may be fetching them
    assert fetched(store, tmp_path / "second") == copied(run, second)
    assert fetched(store, tmp_path / "second") == copied(run, second)  # again, over what is there


def test_a_copy_of_which_a_piece_is_deleted_meanwhile_is_not_pointed_to_and_made_anew_at_the_end(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = BucketStore(f"{url}/run")
    checkpoint = save(run, 1, seed=1)
    proxy.plan(Fault("slow", PIECE_PUT), Fault("stall", PIECE_PUT))
    mirror = Mirror(store, run)
    mirror.enqueue(checkpoint)
    wait_for(lambda: proxy.count(PIECE_PUT) == 2)
    (piece,) = (name for name in store.names() if name != POINTER)
    store.delete(piece)
    proxy.clear()
    wait_for(lambda: bool(caplog.records))
    assert f"pieces are missing, such as {piece}" in caplog.text
    assert not store.exists(POINTER)
    mirror.close()
    assert fetched(store, tmp_path / "empty") == copied(run, checkpoint)


def test_a_copy_that_failed_is_told_with_the_age_of_the_newest_and_tried_once_more_at_the_end(
    run: Path, tmp_path: Path, folder_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bucket" / PREVIOUS).mkdir(parents=True)  # in the way of the second pointer
    mirror = Mirror(folder_store, run)
    mirror.enqueue(save(run, 1, seed=1))
    wait_for(lambda: folder_store.exists(POINTER))
    newest = save(run, 2, seed=2)
    mirror.enqueue(newest)
    wait_for(lambda: bool(caplog.records))
    assert "step-0000002 has not reached the mirror (the newest copy is step-0000001, of 0 min ago)" in caplog.text
    (tmp_path / "bucket" / PREVIOUS).rmdir()
    mirror.close()
    assert fetched(folder_store, tmp_path / "empty") == copied(run, newest)
    assert not (run / STAGING).exists()


@pytest.mark.parametrize("where", [PIECE_PUT, f"PUT .*/{POINTER}"])
def test_nothing_is_pointed_to_after_it_was_to_be_forgotten(where: str, run: Path, url: str, proxy: FaultProxy) -> None:
    store = BucketStore(f"{url}/run")
    mirror = Mirror(store, run)
    proxy.plan(Fault("stall", where, seconds=0.5))
    mirror.enqueue(save(run, 1, seed=1))
    wait_for(lambda: proxy.count(where) > 0)
    mirror.enqueue(save(run, 2, seed=2))  # waits for its turn
    mirror.clear()
    assert not store.exists(POINTER)
    mirror.close()
    assert not store.exists(POINTER)


def test_a_copy_that_outlasts_its_mirror_points_to_a_whole_checkpoint_or_to_none(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    store = BucketStore(f"{url}/run")
    checkpoint = save(run, 1, seed=1)
    mirror = Mirror(store, run)
    proxy.plan(Fault("stall", PIECE_PUT))
    mirror.enqueue(checkpoint)
    wait_for(lambda: proxy.count(PIECE_PUT) > 0)
    with pytest.raises(StoreError, match=r"has not reached the mirror in 0\.1 s"):
        mirror.close(0.1)
    with pytest.raises(RuntimeError, match="shutdown"):
        mirror.enqueue(checkpoint)
    assert not store.exists(POINTER)
    proxy.clear()
    mirror.close()
    assert fetched(store, tmp_path / "empty") == copied(run, checkpoint)


# --- fetching -------------------------------------------------------------------------------------------------------


def test_a_fetch_that_is_killed_goes_on_with_the_files_it_has(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    """And fetches four pieces at a time, no more."""
    store, empty, done = BucketStore(f"{url}/run"), tmp_path / "empty", 20
    checkpoint = save(run, 1, seed=1)
    offer(store, run, checkpoint)
    first, *others = (len(pieces) for pieces in pointer_of(store)["files"].values())
    assert first + FETCHED_AT_ONCE <= done < first + others[0]
    empty.mkdir()
    came = proxy.count(PIECE_GET)
    proxy.plan(Fault("slow", PIECE_GET, times=done), Fault("stall response", PIECE_GET, times=1000))
    with subprocess.Popen([sys.executable, "-c", FETCH, f"{url}/run", empty, str(PIECE)], cwd=ROOT) as process:
        wait_for(lambda: proxy.count(PIECE_GET) == came + done + FETCHED_AT_ONCE)
        process.kill()
    proxy.clear()
    assert os.listdir(empty) == [PART]  # nothing is to be seen before all is there
    came = proxy.count(PIECE_GET)
    assert fetched(store, empty) == copied(run, checkpoint)
    assert proxy.count(PIECE_GET) - came == sum(others)


def test_a_fetch_that_failed_goes_on_and_trusts_no_file_that_spoilt_meanwhile(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    store, empty, done = BucketStore(f"{url}/run", PATIENCE_SEC), tmp_path / "empty", 40
    checkpoint = save(run, 1, seed=1)
    offer(store, run, checkpoint)
    first, second, *others = (len(pieces) for pieces in pointer_of(store)["files"].values())
    assert first + second <= done < first + second + others[0]
    proxy.plan(Fault("slow", PIECE_GET, times=done), Fault("503", PIECE_GET, times=1000))
    with pytest.raises(StoreError, match="503"):
        fetched(store, empty)
    proxy.clear()
    assert os.listdir(empty) == [PART]
    best = empty / PART / "best" / "model.safetensors"  # the first file of two that are there
    flip(best)
    best.write_bytes(best.read_bytes() + bytes(3 * PIECE))
    came = proxy.count(PIECE_GET, status=200)
    assert fetched(store, empty) == copied(run, checkpoint)
    assert proxy.count(PIECE_GET, status=200) - came == first + sum(others)


def test_a_fetch_that_failed_leaves_nothing_of_an_older_copy_in_a_newer_one(
    run: Path, tmp_path: Path, url: str, proxy: FaultProxy
) -> None:
    store, empty = BucketStore(f"{url}/run", PATIENCE_SEC), tmp_path / "empty"
    older = save(run, 1, seed=1)
    (run / "best" / "gone.json").write_text("of the older copy only")
    offer(store, run, older)
    proxy.plan(Fault("slow", PIECE_GET, times=50), Fault("503", PIECE_GET, times=1000))
    with pytest.raises(StoreError, match="503"):
        fetched(store, empty)
    proxy.clear()
    assert (empty / PART / "best" / "gone.json").is_file()
    (run / "best" / "gone.json").unlink()
    newer = save(run, 2, seed=2)
    offer(store, run, newer)
    assert fetched(store, empty) == copied(run, newer)


def test_a_piece_that_spoilt_in_the_bucket_is_refused_and_nothing_is_to_be_seen(
    run: Path, tmp_path: Path, folder_store: Store
) -> None:
    offer(folder_store, run, save(run, 1, seed=1))
    piece = pointer_of(folder_store)["files"]["checkpoints/step-0000001/model.safetensors"][3]
    folder_store.write(piece, folder_store.read(piece)[:-1])
    with pytest.raises(StoreError, match=f"{piece}: read back as"):
        fetched(folder_store, tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == [PART]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("step-0000001", "../outside"),
        ("step-0000001", "{folder}/outside"),
        ("step-0000001", "best/../../../outside"),
        ("step-0000001", "a\0b"),
        ("step-0000001", "."),
        ("..", "checkpoints/../state.json"),
        ("../checkpoints/step-0000001", "log.csv"),
    ],
)
def test_a_pointer_names_nothing_outside_of_the_run(
    checkpoint: str, name: str, run: Path, tmp_path: Path, folder_store: Store
) -> None:
    offer(folder_store, run, save(run, 1, seed=1))
    pointer = pointer_of(folder_store)
    pointer["files"][name.format(folder=tmp_path)] = pointer["files"]["log.csv"]
    folder_store.write(POINTER, json.dumps(pointer | {"checkpoint": checkpoint}).encode())
    before = contents(tmp_path)
    with pytest.raises(StoreError):
        fetched(folder_store, run)
    after = {path: data for path, data in contents(tmp_path).items() if not path.startswith(f"run/{PART}/")}
    assert after == before


def test_a_run_that_a_kill_caught_between_the_files_of_its_copy_fetches_the_rest(
    run: Path, tmp_path: Path, folder_store: Store
) -> None:
    """Its best/ is there then, and no checkpoint, which is refused otherwise."""
    empty, checkpoint = tmp_path / "empty", save(run, 1, seed=1)
    offer(folder_store, run, checkpoint)
    fetched(folder_store, empty)
    (empty / PART).mkdir()
    (empty / "checkpoints").rename(empty / PART / "checkpoints")
    config = load_config("configs/zero2.json", [f"train.mirror={tmp_path / 'bucket'}"])
    _open_mirror(config, empty, "auto", read_checkpoint)
    assert contents(empty) == copied(run, checkpoint)


def test_a_mirror_that_cannot_be_written_is_told_before_the_first_step(
    run: Path, url: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = load_config("configs/zero2.json", [f"train.mirror={tmp_path / 'file' / 'mirror'}"])
    with pytest.raises(StoreError, match=r"^train\.mirror cannot be used: .*Not a directory\nhint: name a path"):
        _open_mirror(config, run, "none", read_checkpoint)
    proxy.plan(Fault("503", "PUT", times=1_000))
    with pytest.raises(StoreError, match=f"^train.mirror cannot be used: {url}/pieces/.* 503 .*\nhint: is the server"):
        Mirror(BucketStore(url, PATIENCE_SEC), run).check_writable()
    proxy.clear()
    store = BucketStore(url)
    Mirror(store, run).check_writable()
    assert not list(store.names())
