"""What somebody else made may be meant to harm: a name, a link or a file in a shard set never reaches beyond it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.bucket import BucketStore
from sharding.errors import ShardError, StoreError, StreamtrainError
from sharding.format import check_shard, read_index, read_samples
from sharding.manifest import Reading
from sharding.repair import find_faults, repair
from sharding.store import FolderStore, Store

OUTSIDE = ("../VICTIM.bin", "train/../../VICTIM.bin", "/etc/passwd", "/dev/zero", "..", ".", "", "a\0b")


@pytest.fixture
def copied(small_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_shards, tmp_path / "copy"))


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> FolderStore:
    """Change an index as somebody would who knows how its digest is made."""
    path = folder / "index.json"
    document = json.loads(path.read_bytes())
    change(document)
    undigested = json.dumps(document | {"digest": ""}, ensure_ascii=False, indent=1).encode()
    digest = hashlib.sha256(undigested).hexdigest()
    path.write_bytes(undigested.replace(b'"digest": ""', f'"digest": "{digest}"'.encode()))
    return FolderStore(folder)


def check_first(store: Store) -> None:
    check_shard(store, read_index(store).shards[0])


def read_first(store: Store) -> None:
    index = read_index(store)
    read_samples(store, index, index.shards[0], index.samples[:1])


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("verb", ["read", "read_ranges", "write", "exists", "delete"])
def test_no_verb_of_a_store_takes_a_name_that_leads_outside(verb: str, name: str, tmp_path: Path) -> None:
    victim = tmp_path / "VICTIM.bin"
    victim.write_bytes(b"precious")
    more = {"write": (b"harm",), "read_ranges": ([(0, 1)],)}.get(verb, ())
    stores: list[Store] = [FolderStore(tmp_path / "set"), BucketStore("s3://bucket/prefix")]  # it asks no server
    for store in stores:
        with pytest.raises(StoreError, match="is no name within it"):
            getattr(store, verb)(name, *more)
    assert victim.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["VICTIM.bin"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_repair_writes_nothing_outside_of_the_set(name: str, copied: Path, small_corpus: Path) -> None:
    before = sorted(copied.parent.iterdir())
    forge(copied, lambda document: document["samples"].update(name=name))
    with pytest.raises(StreamtrainError):
        repair(str(copied), [small_corpus], Reading("phonetic"), with_audio=False, workers=1)
    assert sorted(copied.parent.iterdir()) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_shard_is_read_outside_of_the_set(name: str, copied: Path) -> None:
    store = forge(copied, lambda document: document["shards"][0].update(name=name))
    for act in (check_first, read_first):
        with pytest.raises(StreamtrainError):
            act(store)


# --- what is no file, and where links lead -------------------------------------------------------------------------


def test_links_are_read_and_nothing_is_written_or_deleted_where_they_lead_outside(copied: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copied / "train", elsewhere)
    (copied / "train").symlink_to(elsewhere)
    store = FolderStore(copied)
    shards = read_index(store).shards
    assert find_faults(str(copied), shards, with_audio=False, workers=1) == {}
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    for act in (lambda: store.write(shards[0].name, b"harm"), lambda: store.delete(shards[0].name)):
        with pytest.raises(StoreError, match="a link leads to"):
            act()
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_named_and_not_waited_for(kind: str, copied: Path) -> None:
    store = FolderStore(copied)
    path = copied / read_index(store).shards[0].name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    for act in (check_first, read_first):
        with pytest.raises(StoreError, match=rf"{path.name}: is a {kind}, not a file"):
            act(store)


def test_a_file_much_larger_than_its_index_says_is_not_read(copied: Path) -> None:
    store = FolderStore(copied)
    index = read_index(store)
    os.truncate(copied / index.shards[0].name, 2**40)
    with pytest.raises((ShardError, StoreError), match="1,099,511,627,776 bytes"):
        check_shard(store, index.shards[0])
