"""What tests ask of a shard set, and an index without its audio."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from sharding.audio.codec import SAMPLE_RATE
from sharding.build.duration_buckets import bucket_of, fit_bins
from sharding.shardset.index import SAMPLE_DTYPE, ShardIndex, read_index, read_keys, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import open_store
from tests.tools.corpus import PHONES


def read_ledger(out: Path) -> list[dict[str, Any]]:
    lines = zstandard.ZstdDecompressor().decompress((out / "report/ledger.jsonl.zst").read_bytes())
    return [json.loads(line) for line in lines.splitlines()]


def read_summary(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "report/summary.json").read_bytes())
    return summary


def read_all(out: Path) -> dict[str, tuple[str, Sample]]:
    """By key: the split that a sample lies in, and the sample."""
    store = open_store(out)
    index = read_index(store)
    samples = [read_sample(store, index, row) for row in range(len(index.samples))]
    splits = [index.shards[row["shard"]].split for row in index.samples]
    assert [sample.key for sample in samples] == read_keys(store, index).tolist()
    return {sample.key: (split, sample) for split, sample in zip(splits, samples, strict=True)}


def digest_of(out: Path) -> dict[str, str]:
    """Every file of a shard set but the report, with a digest of its bytes."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "report" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_balanced(out: Path) -> None:
    """Clips and seconds in = written + split + rejected, and the ledger and the shards hold the same keys."""
    ledger, summary = read_ledger(out), read_summary(out)
    assert summary["clips_in"] == len(ledger) == sum(fate["clips"] for fate in summary["fates"].values())
    assert summary["seconds_in"] == pytest.approx(sum(fate["seconds"] for fate in summary["fates"].values()), abs=0.01)
    assert summary["seconds_in"] == pytest.approx(sum(row["seconds"] for row in ledger), abs=0.01)
    assert all((row["reason"] is not None) for row in ledger if row["fate"] == "rejected")
    in_ledger = Counter(row["key"] for row in ledger if row["fate"] == "written")
    in_ledger += Counter(piece["key"] for row in ledger for piece in row["pieces"])
    store = open_store(out)
    index = read_index(store)
    assert in_ledger == Counter(read_keys(store, index).tolist())
    stored = sum(shard.seconds for shard in index.shards)
    kept = sum(row["seconds"] for row in ledger if row["fate"] != "rejected")
    assert stored == pytest.approx(kept, abs=1e-4 * len(ledger))


SMALL_SHARDS = ("--shard-mb", 0.2, "--max-reject-rate", 1)


BYTES_PER_SECOND = 17_300  # of FLAC, as measured on the challenge's clips


def make_index(
    seconds: Sequence[float],
    shard_sec: float = 60.0,
    num_buckets: int = 3,
    valid: int = 0,
    unlabelled: int = 0,
    test: int = 0,
) -> ShardIndex:
    """An index as a build makes it, without the audio: train clips by bucket, then those of other splits."""
    lengths = np.round(np.asarray(seconds) * SAMPLE_RATE).astype(np.int64)
    bins = fit_bins((lengths / SAMPLE_RATE).tolist(), num_buckets)
    buckets = np.array([bucket_of(length / SAMPLE_RATE, bins) for length in lengths], int)
    groups: list[tuple[str, int, list[int]]] = []
    for bucket in np.unique(buckets).tolist():
        ends = np.cumsum(lengths[buckets == bucket]) / SAMPLE_RATE
        which = ((ends - 1e-6) // shard_sec).astype(int)
        groups += [("train", bucket, lengths[buckets == bucket][which == i].tolist()) for i in np.unique(which)]
    others = {"valid": valid, "test": test, "unlabelled": unlabelled}
    groups += [(split, 0, [SAMPLE_RATE] * count) for split, count in others.items()]
    shards = []
    table = np.zeros(sum(len(group) for _, _, group in groups), SAMPLE_DTYPE)
    row = 0
    for number, (split, bucket, group) in enumerate(groups):
        rows = table[row : row + len(group)]
        rows["shard"], rows["samples"] = number, group
        rows["label_length"] = 1 + np.arange(row, row + len(group)) % 17
        rows["checksum"] = np.random.default_rng(number).integers(2**64, size=len(group), dtype=np.uint64)
        name = f"{split}/b{bucket:02d}-{number:05d}.tar"
        size = round(sum(group) / SAMPLE_RATE * BYTES_PER_SECOND)
        shards.append(ShardEntry(name, split, bucket, len(group), size, sum(group), "0" * 16))
        row += len(group)
    return ShardIndex(bins, {}, "", "", PHONES, {}, tuple(shards), table)


def flip_byte(path: Path, rng: np.random.Generator) -> int:
    data = bytearray(path.read_bytes())
    position = int(rng.integers(len(data)))
    data[position] ^= int(rng.integers(1, 256))
    path.write_bytes(data)
    return position
