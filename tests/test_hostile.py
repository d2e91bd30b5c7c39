"""What somebody else made may be meant to harm: a name, a link or a file in a shard set never reaches beyond it."""

import gzip
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from pydantic import TypeAdapter

from sharding.build.external import TarJob, index_tar
from sharding.build.repair import repair
from sharding.errors import AudioError, ManifestError, ShardError, StoreError, StreamtrainError
from sharding.report.files import CHECKSUMS_NAME, LEDGER_NAME, archive_report, check_report
from sharding.segment.evidence import read_alignments
from sharding.shardset.index import (
    join_samples,
    pack_index,
    read_checked,
    read_index,
    read_samples,
    read_shard_index,
    write_index,
    write_shard_index,
)
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import FolderStore, Store
from sharding.shardset.verify import check_shard, find_faults
from sharding.sources.archive import AudioRoot, open_audio
from sharding.sources.options import ManifestOptions
from sharding.sources.tables import read_row
from streamtrain.config import ModelConfig
from streamtrain.infer.inputs import find_recordings
from streamtrain.infer.transcribe import load
from streamtrain.model.pretrained import ModelError, load_model
from tests.tools.corpus import PHONES
from tests.tools.fuzz import LONGEST_SEC, MOST_BYTES, Document, make_documents, try_all
from tests.tools.modules import MODULES, ROOT
from tests.tools.tiny_model import make_tiny_model

KINDS = (
    "index.json", "samples.bin.zst", ".idx.zst", "sample", "ledger", "alignments", "predicted",
    "scorecard.json", "hypotheses.jsonl", "--config", "--set", "state.json", "vocab.json", "newest.json", "lock",
    "transcripts.jsonl", "transcripts.csv", "transcripts.tsv", "transcripts.jsonl.gz", "transcripts.csv.zst", "tar",
    "zip", "flac", "wav", "aiff", "ogg", "mp3", "au", "w64", "caf", "SHA256SUMS", "config.json", "model.safetensors",
    "preprocessor_config.json", "tokenizer_config.json", "labels.json", "vocab.json of others", "card's scorecard.json",
    "card's training.json", "card's trained_on.json", "finished.json", "log.csv", "submission.json",
    "submission_format.jsonl", "submission.jsonl", "transcribe's state",
    "cuts/cuts_dev.jsonl", "nemo/train.json", "kaldi/train/wav.scp", "kaldi/train/segments", "kaldi/train/text",
    "libri/dev-clean/1/2/1-2.trans.txt", "cv/train.tsv", "cv/test.tsv",
    "timit/TEST/DR1/FELC0/SX1.TXT", "parquet",
)  # fmt: skip
READ_IN_PART = {  # whatever else is in them
    "IndexHeader": "an index of any version", "_Holder": "a lock file, which may be another program's",
    "sharding.report.ledger": "its rows are kept as they are",
    "sharding.segment.evidence": "rows of `align`, which say more to people",
    "_ChildrenDocument": "whose each clip of a shard is", "_ChildColumn": "likewise", "_Card": "some of a scorecard",
    "_Group": "likewise", "_Validation": "likewise", "_Data": "for a model card", "_Training": "likewise",
    "_Settings": "one setting of main.py's",
}  # fmt: skip
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
    check_shard(store, read_checked(store, read_index(store).shards[0]), PHONES)


def read_first(store: Store) -> None:
    index = read_index(store)
    read_samples(store, index, index.shards[0], index.samples[:1])


# --- documents -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Document]:
    return make_documents(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_nearly_right_is_read_or_refused_in_words(kind: str, documents: dict[str, Document]) -> None:
    """As a command, `python -m tests.tools.fuzz 2000` tries more."""
    outcomes = try_all(documents[kind], 20, derandomize=True)
    assert outcomes["read"] + outcomes["refused"] >= 20


def test_every_kind_of_document_is_tried(documents: dict[str, Document]) -> None:
    assert documents.keys() == set(KINDS)


def schemas_in(node: Any) -> Iterator[dict[str, Any]]:
    """The parts of a pydantic schema that have fields by name."""
    if isinstance(node, dict):
        if node.get("type") in ("typed-dict", "dataclass"):
            yield node
        node = [value for key, value in node.items() if key not in ("metadata", "config", "cls")]
    if isinstance(node, list | tuple):
        for one in node:
            yield from schemas_in(one)


def test_a_file_of_ours_with_an_unknown_field_is_refused() -> None:
    """The field may mean anything; what is read in part says so."""
    found = set()
    for name in MODULES:
        if not name.startswith("launch") and "TypeAdapter(" in MODULES[name].read_text("utf-8"):
            for adapter in vars(importlib.import_module(name)).values():
                for schema in schemas_in(adapter.core_schema) if isinstance(adapter, TypeAdapter) else ():
                    found.add(schema["cls"].__name__)
                    behaviour = schema.get("extra_behavior") or schema.get("config", {}).get("extra_fields_behavior")
                    own = {schema["cls"].__name__, name}
                    assert behaviour == "forbid" or own & READ_IN_PART.keys(), f"{name}: {schema['cls'].__name__}"
    assert {"_Document", "_Numbers", "_File", "_Pointer", "_State", "RunResult", "ClipScore"} <= found


BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(2**29))  # half a gigabyte in a few kilobytes


# --- bombs ------------------------------------------------------------------------------------------------------


def write_zeros(path: Path) -> None:
    """A hole of a terabyte, which takes no room on the disk."""
    path.touch()
    os.truncate(path, 2**40)


BOMBS: dict[str, Callable[[Path], object]] = {
    "zeros.jsonl.zst": lambda path: path.write_bytes(BOMB),
    "lines.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(b"\n" * 2**28)),
    "frames.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(b"{}\n" * 2**22) * 50),
    "zeros.jsonl.gz": lambda path: path.write_bytes(gzip.compress(bytes(2**28), 1)),
    "line.jsonl": write_zeros,
    "table.csv": write_zeros,
    "quote.csv": lambda path: path.write_text('a\n"' + "b\n" * 2**22),
    "long.jsonl": lambda path: path.write_bytes(b'{"a": 1}\n{"a": "' + b"b" * 2**23 + b'"}\n'),
    "deep.jsonl": lambda path: path.write_bytes(b"[" * 10**6 + b"\n"),
    "columns.csv": lambda path: path.write_bytes(
        b"".join([*(b"%02000d," % column for column in range(1_000)), b"z\n", (b"," * 1_000 + b"\n") * 1_000])
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_transcripts_that_fill_a_machine_are_refused_in_words(name: str, tmp_path: Path) -> None:
    BOMBS[name](tmp_path / name)
    script = (
        "import re, sys, time\nfrom pathlib import Path\nfrom sharding.errors import ManifestError\n"
        "from sharding.sources.manifest import read_source\n"
        "from sharding.sources.options import ManifestOptions\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "start, before = time.process_time(), peak()\n"
        "try:\n    read_source(Path(sys.argv[1]), ManifestOptions())\n"
        "except ManifestError as error:\n    print(error)\n"
        "print(peak() - before, time.process_time() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *words, figures = done.stdout.splitlines()
    kilobytes, seconds = map(float, figures.split())
    assert str(tmp_path / name) in words[0]
    assert kilobytes * 1024 < MOST_BYTES
    assert seconds < LONGEST_SEC


@pytest.mark.parametrize("line", [
    b'{"utterance_id": "a", "audio_path": "a.wav", "phonetic_text": "k", "phonetic_text": "t"}',
    b'{"utterance_id": "a", "audio_path": "a.wav", "phonetic_text": "k", "more": {"a": 1, "a": 2}}',
])  # fmt: skip
def test_a_row_that_says_a_thing_twice_is_refused(line: bytes) -> None:
    with pytest.raises(ManifestError, match=r"'(phonetic_text|a)' occurs twice"):
        read_row(line, "rows.jsonl:1")


def test_a_row_of_another_program_may_hold_what_is_no_number() -> None:
    """As pandas writes what is missing; a column that is read says so."""
    assert list(read_row(b'{"text": "a:b", "snr": NaN, "gain": -Infinity}', "rows.jsonl:1")) == ["text", "snr", "gain"]


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda config: config.update(num_hidden_layers=10**9, hidden_size=1),
    "width": lambda config: config.update(hidden_size=2**20),
    "positions": lambda config: config.update(num_conv_pos_embeddings=2**30),
    "channels": lambda config: config.update(conv_dim=[2**20] * 7),
}


@pytest.mark.parametrize("kind", [*CONFIGS, "deep", "large", "brackets"])
def test_a_configuration_that_fills_a_machine_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_bytes())
    if kind in CONFIGS:
        CONFIGS[kind](config)
        path.write_text(json.dumps(config))
    else:
        {"deep": lambda: path.write_text('{"a":' * 10**5), "large": lambda: write_zeros(path),
         "brackets": lambda: path.write_text("[" + "[]," * 10**5 + "[]]")}[kind]()  # fmt: skip
    with pytest.raises(ModelError, match=r"cannot be loaded: .*config.json"):
        load_model(ModelConfig(pretrained=str(tmp_path)))


def test_what_is_no_sound_gets_a_row_and_is_not_waited_for(tmp_path: Path) -> None:
    write_zeros(tmp_path / "hole.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.wav")
    errors = {one.utterance_id: load(one).error or "" for one in find_recordings([str(tmp_path)])}
    assert "bytes" in errors.pop("hole")
    assert errors == {"device": "is a device, not a file", "pipe": "is a pipe, not a file"}
    with pytest.raises(AudioError, match="1099511627776 bytes"), open_audio(AudioRoot(str(tmp_path)), "hole.wav"):
        pass


def header_of(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, more
    return info.tobuf(tarfile.PAX_FORMAT if more else tarfile.GNU_FORMAT)


TARS = {
    "a huge member": header_of("a.flac", 2**43),
    "a member with a hole": header_of("a.flac", **{"GNU.sparse.size": str(2**43), "GNU.sparse.map": f"{2**43},0"}),
    "a size below zero": header_of("a.flac", size="-512"),
    "names of names": header_of("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 10_000,
    "a hole": b"",
}


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_that_says_more_than_it_holds_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TARS[kind] + bytes(1024))
    if kind == "a hole":
        write_zeros(path)
    with pytest.raises(StreamtrainError, match=r"a\.tar: (not a whole tar|has 1,099,511,627,776 bytes)"):
        index_tar(TarJob(str(tmp_path), "a.tar", "train", "phonetic", 25.0))


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("verb", ["read", "read_ranges", "write", "exists", "delete"])
def test_no_verb_of_a_store_takes_a_name_that_leads_outside(verb: str, name: str, tmp_path: Path) -> None:
    victim = tmp_path / "VICTIM.bin"
    victim.write_bytes(b"precious")
    more = {"write": (b"harm",), "read_ranges": ([(0, 1)],)}.get(verb, ())
    stores: list[Store] = [FolderStore(tmp_path / "set"), BucketStore("s3://bucket/prefix")]  # it asks no server
    for store in stores:
        with pytest.raises(StoreError, match="is not a name within it"):
            getattr(store, verb)(name, *more)
    assert victim.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["VICTIM.bin"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_repair_writes_nothing_outside_of_the_set(name: str, copied: Path, small_corpus: Path) -> None:
    before = sorted(copied.parent.iterdir())
    forge(copied, lambda document: document["samples"].update(name=name))
    with pytest.raises(StreamtrainError):
        repair(str(copied), [small_corpus], ManifestOptions("phonetic"), with_audio=False, workers=1)
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
        check_shard(store, read_checked(store, index.shards[0]), PHONES)


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
    ("samples", 2**32 - 1, "the shard has"), ("shard", 10**6, "do not match the shards"),
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
    assert f"{index.shards[0].name}: '{column}' of sample 0 is" in fault.message
    assert not fault.mendable


@pytest.mark.parametrize("column", ["offset", "bytes", "label_length", "samples"])
def test_an_index_of_a_shard_that_differs_from_its_tar_is_told(column: str, copied: Path) -> None:
    """Though all that lists it says the same."""
    store = FolderStore(copied)
    index = read_index(store)
    shards = [read_checked(store, shard) for shard in index.shards]
    for shard in shards[:1]:
        shard.samples[column][0] -= 1 if column == "bytes" else 0
        shard.samples[column][0] += 0 if column == "bytes" else 1
        entry = replace(shard.entry, samples=int(shard.samples["samples"].sum()))
        shards[0] = write_shard_index(store, replace(shard, entry=entry))
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
    (("shards", 0, "bucket"), 99, "there are 2"), (("shards", 0, "count"), 10**6, "the shards have"),
    (("shards", 0, "split"), "dev", "should match"), (("shards", 0, "mode"), 1, "'shards.0.mode' is unknown"),
    (("shards", 1), None, "'shards.1' is None"), (("shards",), {}, "'shards' is {}"),
    (("samples", "count"), 2**40, "the shards have"), (("samples",), [], "'samples' is"),
    (("duration_bins",), [2.0, 1.0], "must increase"), (("duration_bins",), [-1.0], "greater than 0"),
    (("settings", "units"), "none", "'settings.units' is 'none'"), (("settings", "units"), ["a"], "'settings.units'"),
    (("labels", "units"), "words", "'labels.units' is 'words'"), (("labels", "symbols"), [""], "'labels.symbols.0'"),
    (("labels",), None, "'labels' is None"), (("labels", "digest"), "../x", "should match"),
    *((("settings", "max_duration"), value, "'settings.max_duration' is") for value in (None, "x", 0, -1, True)),
    *((("settings", "shard_mb"), value, "'settings.shard_mb' is") for value in (None, "x", 0, -1, 10**9)),
    (("settings", "num_buckets"), 0, "greater than"),
    (("settings", "min_shards_per_bucket"), 1.5, "'settings.min_shards_per_bucket' is"),
    (("settings", "valid_fraction"), 2, "less than"), (("settings", "more"), 1, "'settings.more' is unknown"),
    (("settings",), [], "'settings' is"), (("notes",), [], "'notes' is"), (("notes",), {}, "'notes.clips' is missing"),
    (("notes", "validation"), {}, "'notes.validation.disjoint_by_speaker' is missing"),
    (("notes", "validation"), {"disjoint_by_speaker": True, "fallback_speaker": None, "clips": 0, "rejected": 0},
     "'notes.validation.kept_in_training' is missing"), (("settings", "valid"), ["x"], "'settings.valid' is unknown"),
    (("notes", "validation", "fallback_speaker"), "x", "should match"),
    (("notes", "validation", "kept_in_training"), [0], "kept_in_training"),
    (("notes", "rejected"), "none", "'notes.rejected' is"), (("duration_bins",), [], "'duration_bins' is"),
    (("base",), "../x", "should match"), (("acoustic_model",), 1, "'acoustic_model' is 1"),
    (("more",), 1, "'more' is unknown"), (("labels", "counts"), [1], "'labels' has .* 1 counts"),
    (("labels", "symbols"), ["a", "a"], "'labels' has 1 different symbols of 2"),
])  # fmt: skip
def test_an_index_that_is_made_otherwise_is_told_by_its_field(
    path: tuple[str | int, ...], value: Any, words: str, copied: Path
) -> None:
    store = forge(copied, set_in(*path, value=value))
    with pytest.raises(ShardError, match=rf"index.json: damaged \(.*{words}(?s:.*)hint: "):
        read_index(store)


def pack(document: Any) -> bytes:
    return zstandard.compress(json.dumps(document).encode())


@pytest.mark.parametrize(("data", "words"), [
    (pack([]), "a dictionary or an instance"), (pack({"shard": []}), "'shard'"), (BOMB, "unpacks to 536,870,912 bytes"),
    (pack({}) + b"\0", "is missing"), (zstandard.compress(b"[" * 10**5), "brackets|recursion"), (b"", "error|frame"),
    (zstandard.compress(b'{"shard": NaN}'), "not JSON"), (zstandard.ZstdCompressor(write_content_size=False).compress(
        b"{}"), "does not state its unpacked size"),
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


# --- what is read is used far from where it was read ----------------------------------------------------------------


def change_line(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    first, *rest = zstandard.decompress(path.read_bytes()).splitlines()
    row = json.loads(first)
    change(row)
    path.write_bytes(zstandard.compress(b"\n".join([json.dumps(row).encode(), *rest, b""])))


@pytest.mark.parametrize(("change", "words"), [
    (lambda row: row["words"].pop(), "1 'words' and 2 in its 'text'"),
    (lambda row: row.update(text="a b c"), "2 'words' and 3 in its 'text'"),
    (lambda row: row["words"][0].update(end=0.9), "'words' do not follow one another"),
    (lambda row: row["pieces"].pop(), "1 'cuts' and 1 'pieces'"),
    (lambda row: row["cuts"][0].update(words_before=3), "'words_before' of a cut exceed its 2 'words'"),
])  # fmt: skip
def test_alignments_that_do_not_say_each_word_once_are_refused(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    word = {"evidence": 3.0, "order": 1.0}
    cut = {"at": 0.5, "words_before": 1, "probability": 0.9, "inside": 0.1}
    row = {"utterance_id": "a", "text": "a b", "words": [word | {"start": 0.1, "end": 0.2},
           word | {"start": 0.6, "end": 0.8}], "cuts": [cut], "pieces": [{"gap": 1.5}] * 2, "without": [2.0],
           "error": None}  # fmt: skip
    path = tmp_path / "aligned.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps(row).encode() + b"\n"))
    assert read_alignments(path).by_id["a"].words == (3.0, 3.0)
    change_line(path, change)
    with pytest.raises(StreamtrainError, match=words):
        read_alignments(path)


@pytest.mark.parametrize(("change", "words"), [
    (lambda row: row.update(fate="rejected", reason=None), "a rejected clip has no 'reason'"),
    (lambda row: row.update(reason=["x"]), "'reason' is"),
    (lambda row: row.update(remarks="x"), "'remarks' is"),
    (lambda row: row.update(remarks=[{}]), "'remarks.0' is"),
    (lambda row: row.update(pieces=[{"label_status": "unlabelled"}]), "'pieces.0.reason' is missing"),
    (lambda row: row.update(pieces=[{"label_status": "none", "reason": None}]), "'pieces.0.label_status' is"),
])  # fmt: skip
def test_a_ledger_that_cannot_be_counted_is_refused_before_an_append(
    change: Callable[[dict[str, Any]], object], words: str, copied: Path
) -> None:
    store = FolderStore(copied)
    (copied / CHECKSUMS_NAME).unlink()  # which refuse a changed ledger before it is looked at
    change_line(copied / LEDGER_NAME, change)
    with pytest.raises(ShardError, match=words):
        archive_report(store, read_index(store))
