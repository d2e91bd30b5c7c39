"""Verify a shard set: each tar against its own index, these against the index of the set, and that against older ones.

Every file is read once.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from sharding.audio.codec import decode
from sharding.errors import AudioError, ShardError, StreamtrainError, UnreachableError
from sharding.labels.policy import LabelPolicy
from sharding.pool import Workers, count_done
from sharding.shardset.index import (
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
    """Describe what is wrong with a shard."""

    message: str
    mendable: bool = True  # by rebuilding the shard: not if the sample columns of the set contradict it


Faults = dict[str, Fault]  # by the shard's name


@dataclass(frozen=True, slots=True)
class _Job:
    url: str
    shard: ShardEntry
    rows: SampleTable | None  # of the shard in the sample columns of the index; None: not compared
    labels: LabelPolicy
    with_audio: bool


def find_faults(url: str, index: ShardIndex, with_audio: bool, workers: int) -> Faults:
    """Read every shard completely and return the faults found; `with_audio` also decodes each clip.

    The sample columns are compared, too, unless the index was read by `read_index_header`, which omits them.
    """
    ends = np.cumsum([shard.count for shard in index.shards])
    rows = np.split(index.samples, ends[:-1]) if len(index.samples) else [None] * len(index.shards)
    jobs = [_Job(url, shard, part, index.labels, with_audio) for shard, part in zip(index.shards, rows, strict=True)]
    with Workers(min(workers, max(len(jobs), 1))) as pool:
        faults = pool.map(_fault_of, jobs, [shard.count for shard in index.shards], "verifying")
    return {shard.name: fault for shard, fault in zip(index.shards, faults, strict=True) if fault}


def _fault_of(job: _Job) -> Fault | None:
    store, where = open_store(job.url), f"{job.url}/{job.shard.name}"
    try:
        record = read_checked(store, job.shard)
        samples = check_shard(store, record, job.labels)
    except UnreachableError:
        raise
    except StreamtrainError as error:
        return Fault(error.message)
    for sample, length in zip(samples, record.samples["samples"].tolist(), strict=True):
        count_done()
        try:
            decoded = len(decode(sample.audio, prove=True)[0]) if job.with_audio else length
        except AudioError as error:
            return Fault(f"{where}: {sample.key}: {error.message}")
        if decoded != length:
            return Fault(f"{where}: {sample.key} has {decoded:,} samples at 16 kHz, its index has {length:,}")
    return None if job.rows is None else _compare_columns(where, record.samples, job.rows)


def _compare_columns(where: str, shard_rows: SampleTable, set_rows: SampleTable) -> Fault | None:
    for column in [name for name in SAMPLE_DTYPE.names or () if name != "shard"]:
        if not np.array_equal(shard_rows[column], set_rows[column]):
            row = int((shard_rows[column] != set_rows[column]).argmax())
            problem = f"{column!r} of sample {row} is {set_rows[column][row]} in the sample columns"
            return Fault(f"{where}: {problem}, but {shard_rows[column][row]} in its own index", mendable=False)
    return None


def check_shard(store: Reader, record: ShardRecord, labels: LabelPolicy) -> list[Sample]:
    """Read the tar of a shard and return its samples. Raises ShardError if it differs from its own index."""
    shard = record.entry
    data = store.read(shard.name, limit=shard.bytes + 2**20)  # a small excess is reported as a wrong checksum
    where = f"{store.url}/{shard.name}"
    checksum = xxhash.xxh3_64_hexdigest(data)
    if checksum != shard.checksum:
        raise ShardError(f"{where}: checksum is {checksum}, the index has {shard.checksum}", VERIFY_HINT)
    parts = [data[start : start + length] for start, length in record.samples[["offset", "bytes"]].tolist()]
    checksums = [xxhash.xxh3_64_intdigest(part) for part in parts]
    if checksums != record.samples["checksum"].tolist():
        raise ShardError(f"{where}: its samples differ in position or bytes from its index", VERIFY_HINT)
    samples = [sample_from_bytes(part, labels) for part in parts]
    if [len(labels.symbols_of(sample.text)) for sample in samples] != record.samples["label_length"].tolist():
        raise ShardError(f"{where}: the lengths of its labels differ from its index", VERIFY_HINT)
    if tuple(sample.key for sample in samples) != record.keys or len(samples) != shard.count:
        raise ShardError(f"{where}: its keys differ from its index", VERIFY_HINT)
    return samples


def check_older_indexes(store: Reader, index: ShardIndex) -> None:
    """Raise ShardError if an index that the set extends is damaged, missing, or not a prefix of the newest index."""
    older = index
    while older.base:
        name = archived_index_name(older.base)
        older = read_index(store, name)
        is_prefix = older.shards == index.shards[: len(older.shards)]
        if not is_prefix or not np.array_equal(older.samples, index.samples[: len(older.samples)]):
            raise ShardError(f"{store.url}/{name}: {INDEX_NAME} does not begin with its samples", VERIFY_HINT)
