"""The only file that knows the bytes of an index.

A shard is a WebDataset tar, sample after sample. Beside it stands `<shard>.idx.zst`; over all of them `index.json` and
`samples.bin.zst`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import MissingError, ShardError, UnreachableError
from sharding.files.document import LARGE_BYTES, DocumentError, parse, parse_json, unpack, validate
from sharding.shardset.sample import BLOCK, Sample, sample_from_bytes, sample_to_bytes
from sharding.shardset.schema import EXTERNAL, INDEX, OUTLINE, SHARD, IndexDocument, ShardEntry, check_document
from sharding.shardset.store import Reader, Store

FORMAT_VERSION = 3
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.bin.zst"
END_OF_ARCHIVE = bytes(2 * BLOCK)

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row in ShardIndex.shards
        ("offset", "<u8"),  # of the sample's first header in its tar, bytes
        ("bytes", "<u4"),  # from there to the end of its last member's padding
        ("samples", "<u4"),  # length at 16 kHz
        ("label_length", "<u4"),  # symbols
        ("checksum", "<u8"),  # xxh3-64 of those bytes
    ]
)
SampleTable = npt.NDArray[np.void]  # (N,) of SAMPLE_DTYPE


class SpeakerInfo(NamedTuple):
    """Whose clip a sample is: what the tables of a shard set are grouped by, so that none of them needs the audio."""

    corpus: str
    age_bucket: str
    child_id: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Everything the planner needs, readable without any audio."""

    duration_bins: tuple[float, ...]  # upper edge of each bucket, seconds
    settings: dict[str, Any]  # of the build; no paths, no worker count
    settings_hash: str
    sources_hash: str
    notes: dict[str, Any]  # what a scorecard must repeat: how validation was split, how many clips it lost
    shards: tuple[ShardEntry, ...]
    samples: SampleTable
    base: str = ""  # digest of the index that this one was appended to
    acoustic_model: dict[str, Any] | None = None  # by which the build gave words to pieces of long recordings
    digest: str = ""  # by which runs and caches know the set: see `pack_index`

    @property
    def track(self) -> str:
        return str(self.settings.get("track", "phonetic"))

    @property
    def external(self) -> bool:
        """Whether others wrote the tars."""
        return EXTERNAL in self.settings

    def split(self, name: str) -> npt.NDArray[np.int64]:
        """Rows of `samples` that belong to the shards of a split, in shard order, shape (n,)."""
        wanted = np.array([shard.split == name for shard in self.shards], bool)
        return np.flatnonzero(wanted[self.samples["shard"]]) if len(self.samples) else np.zeros(0, np.int64)

    def bucket_ends(self, split: str) -> tuple[float, ...]:
        """Return the seconds at which each bucket of a split ends: appended clips may be longer than the last edge."""
        longest = float(self.samples["samples"][self.split(split)].max(initial=0)) / SAMPLE_RATE
        return (*self.duration_bins[:-1], max(self.duration_bins[-1], longest))


@dataclass(frozen=True, eq=False)
class ShardRecord:
    """A shard that was just written, or its `.idx.zst` read back."""

    entry: ShardEntry
    keys: tuple[str, ...]
    speakers: tuple[SpeakerInfo, ...]
    samples: SampleTable  # its column `shard` is 0 until the index numbers the shards
    inputs_digest: str = ""  # digest of all it was made of, by which an interrupted build knows its own
    refused: Mapping[str, str] = field(default_factory=dict)  # key → reason, of clips that were to be in it
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)  # key → what is said of its sound


def write_shard(
    store: Store,
    name: str,
    bucket: int,
    contents: Iterable[tuple[Sample, int]],
    inputs_digest: str = "",
    refused: Mapping[str, str] | None = None,
    remarks: Mapping[str, Sequence[str]] | None = None,
) -> ShardRecord:
    """Write `(sample, length at 16 kHz)` pairs as one tar, then its `.idx.zst`, which marks the tar as whole.

    The pairs are drawn as the tar grows, and so may be the `remarks` and what there is to say of those `refused`.
    """
    rows, keys, speakers, checksum = [], [], [], xxhash.xxh3_64()

    def pack() -> Iterator[bytes]:
        position = 0
        for sample, length in contents:
            raw = sample_to_bytes(sample)
            rows.append((0, position, len(raw), length, len(sample.text), xxhash.xxh3_64_intdigest(raw)))
            keys.append(sample.key)
            speakers.append(SpeakerInfo(sample.corpus, sample.age_bucket, sample.child_id))
            position += len(raw)
            checksum.update(raw)
            yield raw
        checksum.update(END_OF_ARCHIVE)
        yield END_OF_ARCHIVE

    store.write(name, pack())
    table = np.array(rows, SAMPLE_DTYPE)
    entry = ShardEntry(
        name=name,
        split=name.split("/")[0],
        bucket=bucket,
        count=len(rows),
        bytes=int(table["bytes"].sum()) + len(END_OF_ARCHIVE),
        samples=int(table["samples"].sum()),
        checksum=checksum.hexdigest(),
    )
    record = ShardRecord(entry, tuple(keys), tuple(speakers), table, inputs_digest, refused or {}, remarks or {})
    return write_shard_index(store, record)


def write_shard_index(store: Store, shard: ShardRecord) -> ShardRecord:
    """Write the `.idx.zst` of a tar that is there."""
    idx = _compress(_idx_document(shard))
    store.write(_idx_name(shard.entry.name), idx)
    return replace(shard, entry=replace(shard.entry, idx_checksum=xxhash.xxh3_64_hexdigest(idx)))


def remove_shard(store: Store, name: str) -> None:
    """Remove a tar and its index, if they are there: the index first, as it says that the tar is whole."""
    store.delete(_idx_name(name))
    store.delete(name)


def read_shard_index(store: Reader, name: str) -> ShardRecord:
    """Read `<shard>.idx.zst`. Raises ShardError where it is damaged, StoreError where it is missing."""
    data = store.read(_idx_name(name), LARGE_BYTES)
    try:
        document = parse(unpack(data), SHARD)
        keys, columns, speakers = document.keys, dict[str, Any](document.columns), dict[str, Any](document.speakers)
        for column, values in (columns | speakers).items():
            if len(values) != len(keys):
                raise DocumentError(f"{column!r} has {len(values)} values for {len(keys)} keys")
        table = np.zeros(len(keys), SAMPLE_DTYPE)
        for column, values in columns.items():
            table[column] = np.array(values, SAMPLE_DTYPE[column])
        entry = replace(document.shard, idx_checksum=xxhash.xxh3_64_hexdigest(data))
        whose = tuple(map(SpeakerInfo._make, zip(*(speakers[name] for name in SpeakerInfo._fields), strict=True)))
        return ShardRecord(entry, tuple(keys), whose, table, document.inputs_digest, document.refused, document.remarks)
    except DocumentError as error:
        raise ShardError(f"{store.url}/{_idx_name(name)}: damaged ({error})", VERIFY_HINT) from error


def check_presence(store: Store, index: ShardIndex) -> None:
    """Raise ShardError if a shard is missing or of another size, as a listing tells; none is read.

    A server that lists nothing, or a listing of too many, is passed over: what is missing is told when it is read.
    """
    if store.remote and (len(index.shards) > REMOTE_INDEX_HINT or store.url.startswith("http")):
        return
    try:
        sizes = store.sizes(shard.name for shard in index.shards)
    except UnreachableError:  # the keys may lack just this permission
        return
    missing = [shard for shard in index.shards if sizes.get(shard.name) != shard.bytes]
    if missing:
        first, seen = missing[0], sizes.get(missing[0].name)
        said = "is missing" if seen is None else f"has {seen:,} bytes, the index says {first.bytes:,}"
        raise ShardError(
            f"{store.url}: {len(missing):,} of {len(index.shards):,} shards are not there, or not whole: "
            f"{first.name} {said}",
            VERIFY_HINT.replace("OUT", store.url),
        )


def read_keys(store: Reader, index: ShardIndex) -> npt.NDArray[np.object_]:
    """The key of every row of `index.samples`, shape (N,)."""
    keys = [key for shard in index.shards for key in read_checked(store, shard).keys]
    return np.array(keys, object)


def read_checked(store: Reader, shard: ShardEntry) -> ShardRecord:
    """A shard's `.idx.zst`, held against its row in index.json."""
    try:
        listed = read_shard_index(store, shard.name)
    except MissingError as error:
        raise ShardError(f"{error.message}, and {INDEX_NAME} lists it", VERIFY_HINT) from error
    if listed.entry != shard:
        raise ShardError(f"{store.url}/{_idx_name(shard.name)}: differs from its row in {INDEX_NAME}", VERIFY_HINT)
    return listed


def read_samples(store: Reader, index: ShardIndex, shard: ShardEntry, rows: SampleTable) -> list[Sample]:
    """Read samples of one shard by their byte ranges, and check each against its row of the index."""
    offsets = rows["offset"].tolist()
    parts = store.read_ranges(shard.name, list(zip(offsets, rows["bytes"].tolist(), strict=True)))
    for raw, offset, wanted in zip(parts, offsets, rows["checksum"].tolist(), strict=True):
        seen = xxhash.xxh3_64_intdigest(raw)
        if seen != wanted:
            raise ShardError(
                f"{store.url}/{shard.name}: checksum of the sample at byte {offset} is {seen:016x}, "
                f"the index says {wanted:016x}",
                VERIFY_HINT,
            )
    return [sample_from_bytes(raw, index.track) for raw in parts]


def read_sample(store: Reader, index: ShardIndex, row: int) -> Sample:
    """Read one sample by its byte range, and check it against the index."""
    return read_samples(store, index, index.shards[index.samples["shard"][row]], index.samples[row : row + 1])[0]


def join_samples(tables: Sequence[SampleTable]) -> SampleTable:
    """The sample columns of all shards, each row with its shard's number."""
    table = np.concatenate(tables) if tables else np.zeros(0, SAMPLE_DTYPE)
    table["shard"] = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(rows) for rows in tables])
    return table


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """An index as the bytes of its two files; its digest is known before either is written."""

    index: ShardIndex
    columns_name: str
    columns: bytes
    text: bytes


def pack_index(index: ShardIndex) -> PackedIndex:
    """Pack the index over finished shards, and give it its digest, which is the identity of the set.

    It covers every byte of index.json, and by the checksums in there those of the sample columns, of the tars and of
    their own indexes. It covers nothing of the report, whose bytes depend on the version of matplotlib and on what
    lies beside the clips: that has checksums of its own.
    """
    columns = _pack_columns(index.samples)
    checksum = xxhash.xxh3_64_hexdigest(columns)
    # of an index that was appended to, beside the columns it began with, which its readers may still need
    name = f"samples-{checksum}.bin.zst" if index.base else SAMPLES_NAME
    document: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "sample_rate": SAMPLE_RATE,
        "duration_bins": list(index.duration_bins),
        "settings": index.settings,
        "settings_hash": index.settings_hash,
        "sources_hash": index.sources_hash,
        "notes": index.notes,
        "base": index.base,
        "acoustic_model": index.acoustic_model,
        "samples": {"name": name, "count": len(index.samples), "checksum": checksum},
        "shards": [asdict(shard) for shard in index.shards],
        "digest": "",
    }
    digest = _digest(_index_text(document))
    return PackedIndex(replace(index, digest=digest), name, columns, _index_text(document | {"digest": digest}))


def write_index(store: Store, packed: PackedIndex) -> ShardIndex:
    """Publish an index: the sample columns first, index.json last, which says that all the rest is there."""
    store.write(packed.columns_name, packed.columns)
    store.write(INDEX_NAME, packed.text)
    return packed.index


def archive_index(store: Store, index: ShardIndex) -> None:
    """Leave the index that is about to be replaced where a run that began with it finds it."""
    store.write(archived_index_name(index.digest), store.read(INDEX_NAME))


def archived_index_name(digest: str) -> str:
    return f"index-{digest}.json"


def read_index_headers(store: Reader) -> Iterator[tuple[str, ShardIndex]]:
    """Every index of a shard set with its name, without samples: the one that counts, and those it grew from.

    Raises ShardError where one is damaged or missing.
    """
    name, outline = INDEX_NAME, read_index_header(store)
    yield name, outline
    while outline.base:
        name = archived_index_name(outline.base)
        outline = read_index_header(store, name)
        yield name, outline


def read_index(store: Reader, name: str = INDEX_NAME) -> ShardIndex:
    """Read `index.json` and the sample columns. Raises ShardError that names the file where either is damaged."""
    document = _read_document(store, name)
    wanted = document.samples
    where = f"{store.url}/{wanted['name']}"
    columns = store.read(wanted["name"], LARGE_BYTES)
    checksum = xxhash.xxh3_64_hexdigest(columns)
    if checksum != wanted["checksum"]:
        raise ShardError(f"{where}: checksum is {checksum}, {name} says {wanted['checksum']}", VERIFY_HINT)
    try:
        table = _table_from(unpack(columns), wanted["count"])
        _check_table(document.shards, table)
    except DocumentError as error:
        raise ShardError(f"{where}: {error}", "it was so made: build the shard set anew") from error
    return _index_from(document, table)


def read_index_header(store: Reader, name: str = INDEX_NAME) -> ShardIndex:
    """The index without its samples, for those who find these damaged."""
    return _index_from(_read_document(store, name), np.zeros(0, SAMPLE_DTYPE))


def repair_samples(store: Store, name: str, samples: SampleTable) -> None:
    """Write the columns of an index anew. Raises ShardError if they come out otherwise than it says."""
    document, columns = _read_document(store, name), _pack_columns(samples)
    if xxhash.xxh3_64_hexdigest(columns) != document.samples["checksum"]:
        raise ShardError(f"{store.url}/{name}: its sample columns cannot be made again as they were", REBUILT_HINT)
    store.write(document.samples["name"], columns)


def _read_document(store: Reader, name: str) -> IndexDocument:
    where, hint = f"{store.url}/{name}", INDEX_HINT if name == INDEX_NAME else OLD_INDEX_HINT
    try:
        text = store.read(name, LARGE_BYTES)
    except MissingError as error:
        if name != INDEX_NAME:
            raise ShardError(f"{where}: is missing", OLD_INDEX_HINT) from error
        raise ShardError(
            f"{where}: there is no shard set here ({error.message})",
            "name the folder of one, or build it in a new place: `python -m sharding build SOURCE… --out OUT`",
        ) from error
    try:
        said = parse_json(text)
        outline = validate(said, OUTLINE)
        if outline["version"] != FORMAT_VERSION:
            seen = f"format version is {outline['version']}, this program reads {FORMAT_VERSION}"
            raise ShardError(f"{where}: {seen}", "build the shard set anew")
        wanted, seen = outline["digest"], _digest(text.replace(outline["digest"].encode(), b""))
        if seen != wanted:
            raise ShardError(f"{where}: its digest is {seen[:16]}…, it says {wanted[:16]}…", hint)
        if name not in (INDEX_NAME, archived_index_name(wanted)):
            raise ShardError(f"{where}: is the index {wanted[:16]}… under another's name", hint)
        document = validate(said, INDEX)
        check_document(document)
    except DocumentError as error:
        raise ShardError(f"{where}: damaged ({error})", hint) from error
    return document


def _check_table(shards: Sequence[ShardEntry], table: SampleTable) -> None:
    """Raise DocumentError if rows do not lie in the shards as these say."""
    numbers = np.repeat(np.arange(len(shards)), [shard.count for shard in shards])
    if not np.array_equal(table["shard"], numbers):
        raise DocumentError("the rows are not those of the shards, in their order")
    sizes = np.array([shard.bytes for shard in shards], np.uint64)[numbers]
    outside = (table["bytes"] > sizes) | (table["offset"] > sizes - np.minimum(table["bytes"], sizes))
    for fault, rows in (("lies outside of it", outside), ("is a clip of no length", table["samples"] == 0)):
        if rows.any():
            row = int(rows.argmax())
            offset, length = int(table["offset"][row]), int(table["bytes"][row])
            raise DocumentError(f"row {row}, of {length:,} bytes at {offset:,} of {shards[numbers[row]].name}, {fault}")
    lengths = np.bincount(numbers, table["samples"], len(shards))
    for shard, length in zip(shards, lengths.tolist(), strict=True):
        if length != shard.samples:
            raise DocumentError(f"the clips of {shard.name} have {length:.0f} samples, the shard has {shard.samples}")


INDEX_HINT = (
    "copy it again, if this is a copy; or, unless the set was appended to, remove it and build again: shards that are "
    "whole are kept"
)
OLD_INDEX_HINT = "a training run that began with it needs it, and so does a repair; copy it again, if this is a copy"

REBUILT_HINT = "they were so made: copy the set again, or build it anew"
REMOTE_INDEX_HINT = 50_000  # shards: a request lists a thousand files, two of each shard
VERIFY_HINT = "the copy may be incomplete; `python -m sharding verify OUT --repair SOURCE…` makes it whole again"


def _index_from(document: IndexDocument, table: SampleTable) -> ShardIndex:
    same = {name: getattr(document, name) for name in COPIED_FIELDS}
    return ShardIndex(**same, samples=table)


COPIED_FIELDS = (
    "duration_bins",
    "settings",
    "settings_hash",
    "sources_hash",
    "notes",
    "shards",
    "base",
    "acoustic_model",
    "digest",
)


def _pack_columns(table: SampleTable) -> bytes:
    return _compress(b"".join(np.ascontiguousarray(table[name]).tobytes() for name in SAMPLE_DTYPE.names or ()))


def _table_from(raw: bytes, count: int) -> SampleTable:
    if len(raw) != count * SAMPLE_DTYPE.itemsize:
        raise DocumentError(f"{len(raw):,} bytes are not {count:,} rows")
    table = np.zeros(count, SAMPLE_DTYPE)
    position = 0
    for name in SAMPLE_DTYPE.names or ():
        width = count * SAMPLE_DTYPE[name].itemsize
        table[name] = np.frombuffer(raw[position : position + width], SAMPLE_DTYPE[name])
        position += width
    return table


def _idx_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx.zst"


def _idx_document(shard: ShardRecord) -> bytes:
    document = {
        "shard": asdict(shard.entry),
        "inputs_digest": shard.inputs_digest,
        "refused": shard.refused,
        "keys": shard.keys,
        "speakers": {name: [getattr(row, name) for row in shard.speakers] for name in SpeakerInfo._fields},
        "columns": {name: shard.samples[name].tolist() for name in SAMPLE_DTYPE.names or () if name != "shard"},
    }
    if shard.remarks:  # else the bytes are as they were before there were any
        document["remarks"] = shard.remarks
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _index_text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def _digest(undigested: bytes) -> str:
    """Of every byte of index.json, as it is while its own digest is still empty."""
    return hashlib.sha256(undigested).hexdigest()


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=9, write_checksum=True).compress(data)
