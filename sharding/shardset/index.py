"""Read and write the index of a shard set. No other file depends on the byte format of an index.

A shard is a WebDataset tar, one sample after another, with its own index `<shard>.idx.zst` beside it. `index.json` and
`samples.bin.zst` cover all shards.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import MissingError, ShardError, StoreError, UnreachableError
from sharding.files.document import LARGE_BYTES, DocumentError, parse, parse_json, unpack, validate
from sharding.files.spool import map_table
from sharding.labels.policy import LabelPolicy, policy_from
from sharding.shardset.sample import BLOCK, Sample, sample_from_bytes, sample_to_bytes
from sharding.shardset.schema import CHILDREN, EXTERNAL, HEADER, INDEX, SHARD, IndexDocument, ShardEntry, check_document
from sharding.shardset.store import Reader, Store

FORMAT_VERSION = 4
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.bin.zst"
END_OF_ARCHIVE = bytes(2 * BLOCK)
COPIED_FIELDS = ("duration_bins", "settings", "settings_hash", "sources_hash", "notes", "base", "acoustic_model")

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row in ShardIndex.shards
        ("offset", "<u8"),  # bytes, of the sample's first header in its tar
        ("bytes", "<u4"),  # from there to the end of the padding of its last member
        ("samples", "<u4"),  # length at 16 kHz
        ("label_length", "<u4"),  # symbols
        ("checksum", "<u8"),  # xxh3-64 of those bytes
    ]
)
SampleTable = npt.NDArray[np.void]  # (N,) of SAMPLE_DTYPE


class SpeakerInfo(NamedTuple):
    """Describe the speaker of a clip: the fields that reports group clips by, so that no report needs the audio."""

    corpus: str
    age_bucket: str
    child_id: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Hold everything that the planner needs, readable without any audio."""

    duration_bins: tuple[float, ...]  # upper edge of each bucket, seconds
    settings: dict[str, Any]  # of the build, without paths and worker count
    settings_hash: str
    sources_hash: str
    labels: LabelPolicy
    notes: dict[str, Any]  # copied to scorecards: how validation was split, how many clips were rejected
    shards: tuple[ShardEntry, ...]
    samples: SampleTable
    base: str = ""  # digest of the index that this one extends
    acoustic_model: dict[str, Any] | None = None  # that the build labelled segments of long recordings with
    digest: str = ""  # identity of the set for runs and caches: see `pack_index`
    share: npt.NDArray[np.bool_] | None = None  # (N,) which training clips a run uses; None: all. Never written

    @property
    def external(self) -> bool:
        """Return whether another program wrote the tars."""
        return EXTERNAL in self.settings

    def split(self, name: str) -> npt.NDArray[np.int64]:
        """Return the rows of `samples` that belong to the shards of a split, in shard order, shape (n,).

        Of the training split these are the rows of `share` alone, if there is one.
        """
        in_split = np.array([shard.split == name for shard in self.shards], bool)
        rows = np.flatnonzero(in_split[self.samples["shard"]]) if len(self.samples) else np.zeros(0, np.int64)
        return rows if self.share is None or name != "train" else rows[self.share[rows]]

    def bucket_ends(self, split: str) -> tuple[float, ...]:
        """Return each bucket's upper edge in a split, in seconds: appended clips may be longer than the last edge."""
        longest = float(self.samples["samples"][self.split(split)].max(initial=0)) / SAMPLE_RATE
        return (*self.duration_bins[:-1], max(self.duration_bins[-1], longest))


@dataclass(frozen=True, eq=False)
class ShardRecord:
    """Describe a shard that was just written, or the contents of its `.idx.zst`."""

    entry: ShardEntry
    keys: tuple[str, ...]
    speakers: tuple[SpeakerInfo, ...]
    samples: SampleTable  # column `shard` is 0 until the index numbers the shards
    inputs_digest: str = ""  # digest of all inputs, by which a resumed build recognises its own shards
    refused: Mapping[str, str] = field(default_factory=dict)  # key → reason, of clips left out of the shard
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)  # key → remarks on its audio


def write_shard(
    store: Store,
    name: str,
    bucket: int,
    contents: Iterable[tuple[Sample, int]],
    labels: LabelPolicy,
    inputs_digest: str = "",
    refused: Mapping[str, str] | None = None,
    remarks: Mapping[str, Sequence[str]] | None = None,
) -> ShardRecord:
    """Write `(sample, length at 16 kHz)` pairs as one tar, then its `.idx.zst`, which marks the tar as complete.

    `contents` is consumed lazily; it may add entries to `remarks` and `refused` while the tar is written.
    """
    rows, keys, speakers, checksum = [], [], [], xxhash.xxh3_64()

    def pack() -> Iterator[bytes]:
        position = 0
        for sample, length in contents:
            raw = sample_to_bytes(sample)
            symbols = len(labels.symbols_of(sample.text))
            rows.append((0, position, len(raw), length, symbols, xxhash.xxh3_64_intdigest(raw)))
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
    try:
        return write_shard_index(store, record)
    except StoreError:  # such as a full disk: a tar without its index would be taken for a file of something else
        store.delete(name)
        raise


def write_shard_index(store: Store, shard: ShardRecord) -> ShardRecord:
    """Write the `.idx.zst` of an existing tar."""
    idx = _compress(_idx_document(shard))
    store.write(_idx_name(shard.entry.name), idx)
    return replace(shard, entry=replace(shard.entry, idx_checksum=xxhash.xxh3_64_hexdigest(idx)))


def remove_shard(store: Store, name: str) -> None:
    """Delete a tar and its index, if they exist: the index first, because it marks the tar as complete."""
    store.delete(_idx_name(name))
    store.delete(name)


def read_shard_index(store: Reader, name: str) -> ShardRecord:
    """Read `<shard>.idx.zst`. Raises ShardError if it is damaged, StoreError if it is missing."""
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
        infos = tuple(map(SpeakerInfo._make, zip(*(speakers[name] for name in SpeakerInfo._fields), strict=True)))
        return ShardRecord(entry, tuple(keys), infos, table, document.inputs_digest, document.refused, document.remarks)
    except DocumentError as error:
        raise ShardError(f"{store.url}/{_idx_name(name)}: damaged ({error})", VERIFY_HINT) from error


def check_presence(store: Store, index: ShardIndex) -> None:
    """Raise ShardError if a shard is missing or has the wrong size according to a listing; no shard is read.

    The check is skipped if the server cannot list or the set is too large: a missing shard then fails when it is read.
    """
    if store.remote and (len(index.shards) > REMOTE_INDEX_HINT or store.url.startswith("http")):
        return
    try:
        sizes = store.sizes(shard.name for shard in index.shards)
    except UnreachableError:  # the credentials may lack only the permission to list
        return
    missing = [shard for shard in index.shards if sizes.get(shard.name) != shard.bytes]
    if missing:
        first, size = missing[0], sizes.get(missing[0].name)
        problem = "is missing" if size is None else f"has {size:,} bytes, the index has {first.bytes:,}"
        raise ShardError(
            f"{store.url}: {len(missing):,} of {len(index.shards):,} shards are missing or incomplete: "
            f"{first.name} {problem}",
            VERIFY_HINT.replace("OUT", store.url),
        )


def read_keys(store: Reader, index: ShardIndex) -> npt.NDArray[np.object_]:
    """Return the key of every row of `index.samples`, shape (N,)."""
    keys = [key for shard in index.shards for key in read_checked(store, shard).keys]
    return np.array(keys, object)


def read_checked(store: Reader, shard: ShardEntry) -> ShardRecord:
    """Return a shard's `.idx.zst`. Raises ShardError if it is missing, damaged or unlike its row in index.json."""
    try:
        record = read_shard_index(store, shard.name)
    except MissingError as error:
        raise ShardError(f"{error.message}, and {INDEX_NAME} lists it", VERIFY_HINT) from error
    if record.entry != shard:
        raise ShardError(f"{store.url}/{_idx_name(shard.name)}: differs from its row in {INDEX_NAME}", VERIFY_HINT)
    return record


def read_children(store: Reader, shard: ShardEntry) -> list[tuple[str, str]]:
    """Return the key and the `child_id` of each sample of a shard: what `read_checked` has of them, in a third of its
    time. Raises ShardError as that does."""
    children: list[tuple[str, str]] = []
    with suppress(MissingError, ValueError):
        data = store.read(_idx_name(shard.name), LARGE_BYTES)
        if xxhash.xxh3_64_hexdigest(data) == shard.idx_checksum:
            document = parse(unpack(data), CHILDREN)
            children = list(zip(document["keys"], document["speakers"]["child_id"], strict=True))
    if len(children) != shard.count:
        record = read_checked(store, shard)
        raise ShardError(
            f"{store.url}/{_idx_name(shard.name)}: {len(record.keys)} keys, not {shard.count}", VERIFY_HINT
        )
    return children


def read_samples(store: Reader, index: ShardIndex, shard: ShardEntry, rows: SampleTable) -> list[Sample]:
    """Read samples of one shard by their byte ranges. Raises ShardError if a checksum differs from the index."""
    offsets = rows["offset"].tolist()
    parts = store.read_ranges(shard.name, list(zip(offsets, rows["bytes"].tolist(), strict=True)))
    for raw, offset, expected in zip(parts, offsets, rows["checksum"].tolist(), strict=True):
        checksum = xxhash.xxh3_64_intdigest(raw)
        if checksum != expected:
            raise ShardError(
                f"{store.url}/{shard.name}: checksum of the sample at byte {offset} is {checksum:016x}, "
                f"the index has {expected:016x}",
                VERIFY_HINT,
            )
    return [sample_from_bytes(raw, index.labels) for raw in parts]


def read_sample(store: Reader, index: ShardIndex, row: int) -> Sample:
    """Read one sample by its byte range. Raises ShardError if its checksum differs from the index."""
    return read_samples(store, index, index.shards[index.samples["shard"][row]], index.samples[row : row + 1])[0]


def join_samples(tables: Sequence[SampleTable]) -> SampleTable:
    """Concatenate the sample columns of all shards, and set each row's shard number."""
    table, first = map_table(sum(map(len, tables)), SAMPLE_DTYPE), 0
    for number, rows in enumerate(tables):
        part = table[first : first + len(rows)]
        part[:], part["shard"] = rows, number
        first += len(rows)
    return table


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """Hold an index as the bytes of its two files, so that its digest is known before either is written."""

    index: ShardIndex
    columns_name: str
    columns: bytes
    text: bytes


def pack_index(index: ShardIndex) -> PackedIndex:
    """Pack the index of finished shards, and set its digest, which is the identity of the set.

    The digest covers every byte of index.json and, through the checksums in it, the sample columns, the tars and
    their own indexes. It does not cover the report, whose bytes depend on the version of matplotlib and on other
    files beside the clips; the report has its own checksums.
    """
    columns = _pack_columns(index.samples)
    checksum = xxhash.xxh3_64_hexdigest(columns)
    # an extended index gets a new file: readers of the index that it extends may still need the old columns
    name = f"samples-{checksum}.bin.zst" if index.base else SAMPLES_NAME
    document: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "sample_rate": SAMPLE_RATE,
        **{name: getattr(index, name) for name in COPIED_FIELDS},
        "labels": index.labels.document(),
        "samples": {"name": name, "count": len(index.samples), "checksum": checksum},
        "shards": [asdict(shard) for shard in index.shards],
        "digest": "",
    }
    digest = _digest(_index_text(document))
    return PackedIndex(replace(index, digest=digest), name, columns, _index_text(document | {"digest": digest}))


def write_index(store: Store, packed: PackedIndex) -> ShardIndex:
    """Publish an index: the sample columns first, index.json last, because it marks the set as complete."""
    store.write(packed.columns_name, packed.columns)
    store.write(INDEX_NAME, packed.text)
    return packed.index


def archived_index_name(digest: str) -> str:
    return f"index-{digest}.json"


def read_index_headers(store: Reader) -> Iterator[tuple[str, ShardIndex]]:
    """Yield each index of a shard set with its name, without samples: the current one, then those that it extends.

    Raises ShardError if an index is damaged or missing.
    """
    name, header = INDEX_NAME, read_index_header(store)
    yield name, header
    while header.base:
        name = archived_index_name(header.base)
        header = read_index_header(store, name)
        yield name, header


def read_index(store: Reader, name: str = INDEX_NAME) -> ShardIndex:
    """Read `index.json` and the sample columns. Raises ShardError, which names the file, if either is damaged."""
    document = _read_document(store, name)
    expected = document.samples
    where = f"{store.url}/{expected['name']}"
    columns = store.read(expected["name"], LARGE_BYTES)
    checksum = xxhash.xxh3_64_hexdigest(columns)
    if checksum != expected["checksum"]:
        raise ShardError(f"{where}: checksum is {checksum}, {name} has {expected['checksum']}", VERIFY_HINT)
    try:
        table = _unpack_columns(unpack(columns), expected["count"])
        _check_table(document.shards, table)
    except DocumentError as error:
        raise ShardError(f"{where}: {error}", "the build wrote it like this: rebuild the shard set") from error
    return _index_from(document, table)


def read_index_header(store: Reader, name: str = INDEX_NAME) -> ShardIndex:
    """Read an index without its sample columns, so that it can be read even if they are damaged."""
    return _index_from(_read_document(store, name), np.zeros(0, SAMPLE_DTYPE))


def repair_columns(store: Store) -> list[str]:
    """Write damaged sample columns again, from the indexes of the shards. Return the names of the indexes they are of.

    Raises ShardError if a shard is damaged, or their checksum differs from the index.
    """
    headers, repaired = list(read_index_headers(store)), []
    table = join_samples([read_checked(store, shard).samples for shard in headers[0][1].shards])
    for name, header in headers:
        expected = _read_document(store, name).samples
        with suppress(MissingError):
            if xxhash.xxh3_64_hexdigest(store.read(expected["name"], LARGE_BYTES)) == expected["checksum"]:
                continue
        columns = _pack_columns(table[: sum(shard.count for shard in header.shards)])  # a set grows at its end
        if xxhash.xxh3_64_hexdigest(columns) != expected["checksum"]:
            raise ShardError(f"{store.url}/{name}: rebuilt sample columns differ from its checksum", REBUILT_HINT)
        store.write(expected["name"], columns)
        repaired.append(name)
    return repaired


def _read_document(store: Reader, name: str) -> IndexDocument:
    """Read and check an index. Raises ShardError if it is missing, damaged, misnamed or of another version."""
    where, hint = f"{store.url}/{name}", INDEX_HINT if name == INDEX_NAME else OLD_INDEX_HINT
    try:
        text = store.read(name, LARGE_BYTES)
    except MissingError as error:
        if name != INDEX_NAME:
            raise ShardError(f"{where}: is missing", OLD_INDEX_HINT) from error
        raise ShardError(
            f"{where}: there is no shard set here ({error.message})",
            "name the folder of a shard set, or build one elsewhere: `streamtrain build SOURCE… --out OUT`",
        ) from error
    try:
        value = parse_json(text)
        header = validate(value, HEADER)
        if header["version"] != FORMAT_VERSION:
            problem = f"format version is {header['version']}, this program reads {FORMAT_VERSION}"
            raise ShardError(f"{where}: {problem}", "rebuild the shard set")
        expected, digest = header["digest"], _digest(text.replace(header["digest"].encode(), b""))
        if digest != expected:
            raise ShardError(f"{where}: digest is {digest[:16]}…, its field 'digest' is {expected[:16]}…", hint)
        if name not in (INDEX_NAME, archived_index_name(expected)):
            raise ShardError(f"{where}: is the index {expected[:16]}… under the name of another index", hint)
        document = validate(value, INDEX)
        check_document(document)
    except DocumentError as error:
        raise ShardError(f"{where}: damaged ({error})", hint) from error
    return document


def _check_table(shards: Sequence[ShardEntry], table: SampleTable) -> None:
    """Raise DocumentError if the rows contradict the sizes, counts or order of the shards."""
    numbers = np.repeat(np.arange(len(shards)), [shard.count for shard in shards])
    if not np.array_equal(table["shard"], numbers):
        raise DocumentError("the rows do not match the shards in order")
    sizes = np.array([shard.bytes for shard in shards], np.uint64)[numbers]
    outside = (table["bytes"] > sizes) | (table["offset"] > sizes - np.minimum(table["bytes"], sizes))
    for fault, faulty in (("lies outside of it", outside), ("is a clip of no length", table["samples"] == 0)):
        if faulty.any():
            row = int(faulty.argmax())
            offset, length = int(table["offset"][row]), int(table["bytes"][row])
            raise DocumentError(f"row {row}, of {length:,} bytes at {offset:,} of {shards[numbers[row]].name}, {fault}")
    lengths = np.bincount(numbers, table["samples"], len(shards))
    for shard, length in zip(shards, lengths.tolist(), strict=True):
        if length != shard.samples:
            raise DocumentError(f"the clips of {shard.name} have {length:.0f} samples, the shard has {shard.samples}")


INDEX_HINT = (
    "if this is a copy, copy it again; otherwise, unless the set was appended to, remove it and build again: complete "
    "shards are kept"
)
OLD_INDEX_HINT = "training runs that started with it, and repairs, require it; if this is a copy, copy it again"

REBUILT_HINT = "the build wrote them like this: copy the set again, or rebuild it"
REMOTE_INDEX_HINT = 50_000  # shards: a request lists a thousand files, two per shard
VERIFY_HINT = "the copy may be incomplete; `streamtrain verify OUT --repair SOURCE…` repairs it"


def _index_from(document: IndexDocument, table: SampleTable) -> ShardIndex:
    copied = {name: getattr(document, name) for name in (*COPIED_FIELDS, "shards", "digest")}
    return ShardIndex(**copied, labels=policy_from(document.labels), samples=table)


def _pack_columns(table: SampleTable) -> bytes:
    return _compress(b"".join(np.ascontiguousarray(table[name]).tobytes() for name in SAMPLE_DTYPE.names or ()))


def _unpack_columns(raw: bytes, count: int) -> SampleTable:
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
    if shard.remarks:  # else the bytes are those of versions before remarks existed
        document["remarks"] = shard.remarks
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _index_text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def _digest(undigested: bytes) -> str:
    """Return the SHA-256 of every byte of index.json with its own digest left empty."""
    return hashlib.sha256(undigested).hexdigest()


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=9, write_checksum=True).compress(data)
