"""Check a shard set: each tar against its own index, that against the index of the set, and that against older ones.

Every file is read once.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from sharding.audio.codec import decode
from sharding.errors import AudioError, ShardError, StreamtrainError, UnreachableError
from sharding.pool import Workers, count_done
from sharding.shardset.index import (
    END_OF_ARCHIVE,
    INDEX_NAME,
    SAMPLE_DTYPE,
    VERIFY_HINT,
    SampleTable,
    ShardIndex,
    ShardRecord,
    archived_index_name,
    read_checked,
    read_index,
)
from sharding.shardset.sample import Sample, sample_from_bytes
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Reader, open_store


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a shard."""

    message: str
    mendable: bool = True  # by making the shard again: not if the set's own columns say otherwise


Faults = dict[str, Fault]  # by the shard's name


@dataclass(frozen=True, slots=True)
class _Job:
    url: str
    shard: ShardEntry
    rows: SampleTable | None  # of the shard, in the sample columns of the index; None: these are not compared
    track: str
    with_audio: bool


def find_faults(url: str, index: ShardIndex, with_audio: bool, workers: int) -> Faults:
    """Read every shard whole and check all that the index promises of it; `with_audio` decodes each clip as well.

    The sample columns are compared too, unless the index is an outline, which has none.
    """
    ends = np.cumsum([shard.count for shard in index.shards])
    rows = np.split(index.samples, ends[:-1]) if len(index.samples) else [None] * len(index.shards)
    jobs = [_Job(url, shard, part, index.track, with_audio) for shard, part in zip(index.shards, rows, strict=True)]
    with Workers(min(workers, max(len(jobs), 1))) as pool:
        faults = pool.map(_fault_of, jobs, [shard.count for shard in index.shards], "verifying")
    return {shard.name: fault for shard, fault in zip(index.shards, faults, strict=True) if fault}


def _fault_of(job: _Job) -> Fault | None:
    store, where = open_store(job.url), f"{job.url}/{job.shard.name}"
    try:
        listed = read_checked(store, job.shard)
        samples = check_shard(store, listed, job.track)
    except UnreachableError:
        raise
    except StreamtrainError as error:
        return Fault(error.message)
    for sample, length in zip(samples, listed.samples["samples"].tolist(), strict=True):
        count_done()
        try:
            seen = len(decode(sample.audio, prove=True)[0]) if job.with_audio else length
        except AudioError as error:
            return Fault(f"{where}: {sample.key}: {error.message}")
        if seen != length:
            return Fault(f"{where}: {sample.key} has {seen:,} samples at 16 kHz, its index says {length:,}")
    return None if job.rows is None else _compare_columns(where, listed.samples, job.rows)


def _compare_columns(where: str, listed: SampleTable, rows: SampleTable) -> Fault | None:
    for column in [name for name in SAMPLE_DTYPE.names or () if name != "shard"]:
        if not np.array_equal(listed[column], rows[column]):
            row = int((listed[column] != rows[column]).argmax())
            said = f"the sample columns say that {column!r} of sample {row} is {rows[column][row]}, its own index says"
            return Fault(f"{where}: {said} {listed[column][row]}", mendable=False)
    return None


def check_shard(store: Reader, listed: ShardRecord, track: str = "phonetic") -> list[Sample]:
    """Read the tar of a shard, check every promise that its own index makes, and return its samples."""
    shard = listed.entry
    data = store.read(shard.name, limit=shard.bytes + 2**20)  # a little more is told by its checksum
    where = f"{store.url}/{shard.name}"
    checksum = xxhash.xxh3_64_hexdigest(data)
    if checksum != shard.checksum:
        raise ShardError(f"{where}: checksum is {checksum}, the index says {shard.checksum}", VERIFY_HINT)
    if not data.endswith(END_OF_ARCHIVE):
        raise ShardError(f"{where}: the end-of-archive block is missing", VERIFY_HINT)
    parts = [data[start : start + length] for start, length in listed.samples[["offset", "bytes"]].tolist()]
    checksums = [xxhash.xxh3_64_intdigest(part) for part in parts]
    if checksums != listed.samples["checksum"].tolist():
        raise ShardError(f"{where}: its samples do not lie where its index says", VERIFY_HINT)
    samples = [sample_from_bytes(part, track) for part in parts]
    if [len(sample.text) for sample in samples] != listed.samples["label_length"].tolist():
        raise ShardError(f"{where}: its labels are not as long as its index says", VERIFY_HINT)
    if tuple(sample.key for sample in samples) != listed.keys or len(samples) != shard.count:
        raise ShardError(f"{where}: holds other keys than its index", VERIFY_HINT)
    return samples


def check_older_indexes(store: Reader, index: ShardIndex) -> None:
    """Raise ShardError if an index that a set grew from is damaged, missing, or not what the newest begins with."""
    older = index
    while older.base:
        name = archived_index_name(older.base)
        older = read_index(store, name)
        same = older.shards == index.shards[: len(older.shards)]
        if not same or not np.array_equal(older.samples, index.samples[: len(older.samples)]):
            raise ShardError(f"{store.url}/{name}: {INDEX_NAME} does not begin as it does", VERIFY_HINT)
