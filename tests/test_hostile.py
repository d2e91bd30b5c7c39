"""What somebody else made may be meant to harm: a name, a link or a file in a shard set never reaches beyond it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from fuzz import Document, make_documents, try_all

from sharding.bucket import BucketStore
from sharding.errors import ShardError, StoreError, StreamtrainError
from sharding.format import (
    join_samples,
    pack_index,
    read_index,
    read_listed,
    read_samples,
    read_shard_index,
    write_index,
    write_listed,
)
from sharding.manifest import Reading
from sharding.repair import repair
from sharding.report import check_report
from sharding.store import FolderStore, Store
from sharding.verify import check_shard, find_faults

KINDS = (
    "index.json", "samples.bin.zst", ".idx.zst", "sample", "summary.json", "ledger", "alignments", "predicted",
    "scorecard.json", "hypotheses.jsonl", "--config", "--set", "state.json", "vocab.json", "newest.json", "lock",
)  # fmt: skip
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
    check_shard(store, read_listed(store, read_index(store).shards[0]))


def read_first(store: Store) -> None:
    index = read_index(store)
    read_samples(store, index, index.shards[0], index.samples[:1])


# --- documents -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Document]:
    return make_documents(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_nearly_right_is_read_or_refused_in_words(kind: str, documents: dict[str, Document]) -> None:
    """As a command, `python tests/fuzz.py 2000` tries more."""
    outcomes = try_all(documents[kind], 20, derandomize=True)
    assert outcomes["read"] + outcomes["refused"] >= 20


def test_every_kind_of_document_is_tried(documents: dict[str, Document]) -> None:
    assert documents.keys() == set(KINDS)


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
    index = read_index(store)
    assert find_faults(str(copied), index, with_audio=False, workers=1) == {}
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    for act in (lambda: store.write(index.shards[0].name, b"harm"), lambda: store.delete(index.shards[0].name)):
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
        check_shard(store, read_listed(store, index.shards[0]))


# --- indexes -----------------------------------------------------------------------------------------------------


def change_row(column: str, value: int) -> Callable[[FolderStore], None]:
    """Change a cell of the sample columns, as somebody would who makes the index anew over them."""

    def change(store: FolderStore) -> None:
        index = read_index(store)
        index.samples[column][1] = value
        write_index(store, pack_index(index))

    return change


@pytest.mark.parametrize(("column", "value", "words"), [
    ("offset", 2**63 - 1, "lies outside of it"), ("offset", 2**64 - 1, "lies outside of it"),
    ("bytes", 2**32 - 1, "lies outside of it"), ("samples", 0, "is a clip of no length"),
    ("samples", 2**32 - 1, "the shard has"), ("shard", 10**6, "not those of the shards"),
])  # fmt: skip
def test_a_row_that_does_not_lie_in_its_shard_is_told(column: str, value: int, words: str, copied: Path) -> None:
    store = FolderStore(copied)
    change_row(column, value)(store)
    with pytest.raises(ShardError, match=rf"samples.bin.zst: .*{words}"):
        read_index(store)


@pytest.mark.parametrize(("column", "value"), [("offset", 512), ("label_length", 7), ("samples", 4_801)])
def test_columns_that_differ_from_the_indexes_of_the_shards_are_told(column: str, value: int, copied: Path) -> None:
    store = FolderStore(copied)
    index = read_index(store)
    index.samples[column][0] += value
    index.samples[column][1] -= 0 if column == "offset" else value
    write_index(store, pack_index(index))
    (fault,) = find_faults(str(copied), read_index(store), with_audio=False, workers=1).values()
    assert f"{index.shards[0].name}: the sample columns say that '{column}' of sample 0 is" in fault.message
    assert not fault.mendable


@pytest.mark.parametrize("column", ["offset", "bytes", "label_length", "samples"])
def test_an_index_of_a_shard_that_differs_from_its_tar_is_told(column: str, copied: Path) -> None:
    """Though all that lists it says the same."""
    store = FolderStore(copied)
    index = read_index(store)
    shards = [read_listed(store, shard) for shard in index.shards]
    for shard in shards[:1]:
        shard.samples[column][0] -= 1 if column == "bytes" else 0
        shard.samples[column][0] += 0 if column == "bytes" else 1
        entry = replace(shard.entry, samples=int(shard.samples["samples"].sum()))
        shards[0] = write_listed(store, replace(shard, entry=entry))
    tables = join_samples([shard.samples for shard in shards])
    entries = tuple(shard.entry for shard in shards)
    write_index(store, pack_index(replace(index, shards=entries, samples=tables)))
    (fault,) = find_faults(str(copied), read_index(store), with_audio=True, workers=1).values()
    assert f"{copied / shards[0].entry.name}: " in fault.message
    assert fault.mendable


@pytest.mark.parametrize("name", ["ledger.jsonl.zst", "summary.json", "orphans.txt", "durations.png", "SHA256SUMS"])
def test_a_report_that_has_changed_is_told(name: str, copied: Path) -> None:
    store, path = FolderStore(copied), copied / "report" / name
    index, whole = read_index(store), path.read_bytes()
    assert check_report(store, index) == []
    for damaged in (whole + b"\n", bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        (fault,) = check_report(store, index)
        assert str(path) in fault


def set_in(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(("path", "value", "words"), [
    (("shards", 0, "count"), -1, "greater than or equal to 0"), (("shards", 0, "bytes"), 10**30, "less than or equal"),
    (("shards", 0, "bucket"), 99, "there are 2"), (("shards", 0, "count"), 10**6, "the shards' own make another"),
    (("shards", 0, "split"), "test", "should match"), (("shards", 0, "mode"), 1, "'shards.0.mode' is unknown"),
    (("shards", 1), None, "'shards.1' is None"), (("shards",), {}, "'shards' is {}"),
    (("samples", "count"), 2**40, "make another"), (("samples",), [], "'samples' is"),
    (("duration_bins",), [2.0, 1.0], "do not rise"), (("duration_bins",), [-1.0], "greater than 0"),
    (("settings", "track"), "none", "not one of phonetic, word"), (("notes",), [], "'notes' is"),
    (("base",), "../x", "should match"), (("sounds",), 1, "'sounds' is 1"), (("more",), 1, "'more' is unknown"),
])  # fmt: skip
def test_an_index_that_is_made_otherwise_is_told_by_its_field(
    path: tuple[str | int, ...], value: Any, words: str, copied: Path
) -> None:
    store = forge(copied, set_in(*path, value=value))
    with pytest.raises(ShardError, match=rf"index.json: damaged \(.*{words}(?s:.*)hint: "):
        read_index(store)


def pack(document: Any) -> bytes:
    return zstandard.compress(json.dumps(document).encode())


BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(2**29))  # half a gigabyte in a few kilobytes


@pytest.mark.parametrize(("data", "words"), [
    (pack([]), "a dictionary or an instance"), (pack({"shard": []}), "'shard'"), (BOMB, "unpacks to 536,870,912 bytes"),
    (pack({}) + b"\0", "is missing"), (zstandard.compress(b"[" * 10**5), "brackets|recursion"), (b"", "error|frame"),
    (zstandard.compress(b'{"shard": NaN}'), "not JSON"), (zstandard.ZstdCompressor(write_content_size=False).compress(
        b"{}"), "does not say how long"),
])  # fmt: skip
def test_an_index_of_a_shard_that_is_made_otherwise_is_told(data: bytes, words: str, copied: Path) -> None:
    store = FolderStore(copied)
    name = read_index(store).shards[0].name
    (copied / name.replace(".tar", ".idx.zst")).write_bytes(data)
    with pytest.raises(ShardError, match=rf"idx.zst: damaged \(.*({words})"):
        read_shard_index(store, name)


def test_columns_that_unpack_to_far_more_are_not_unpacked(copied: Path) -> None:
    (copied / "samples.bin.zst").write_bytes(BOMB)
    checksum = xxhash.xxh3_64_hexdigest(BOMB)
    store = forge(copied, set_in("samples", "checksum", value=checksum))
    with pytest.raises(ShardError, match="unpacks to 536,870,912 bytes"):
        read_index(store)
