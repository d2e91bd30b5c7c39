"""Shard sets of noise for tests of the stream, and what all ranks read of them."""

import fcntl
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import obstore

from sharding.audio.codec import encode
from sharding.labels.pasketti import normalize_ipa
from sharding.labels.policy import policy_of
from sharding.shardset.index import (
    ShardIndex,
    join_samples,
    pack_index,
    read_index,
    read_keys,
    write_index,
    write_shard,
)
from sharding.shardset.object_store import BucketStore
from sharding.shardset.sample import Sample
from sharding.shardset.store import FolderStore, open_store
from streamtrain.data.cache import ShardCache
from streamtrain.data.dataset import ShardStream, StepBatch, open_for_reading
from streamtrain.data.plan import EpochPlan, PlanSettings, plan_epoch
from streamtrain.distributed import World
from streamtrain.model.vocab import vocab_of
from tests.tools.corpus import PHONES

VOCAB = vocab_of(policy_of("pasketti"))
SETTINGS = PlanSettings(batch_seconds=4, micro_batches_per_step=8, shuffle_shards=2)


def write_set(
    folder: Path,
    clips: int = 60,
    per_shard: int = 7,
    seed: int = 0,
    spoilt: dict[int, bytes] | None = None,
    lengths: Sequence[int] | None = None,
    texts: dict[int, str] | None = None,
) -> ShardIndex:
    """Shards of noise in two buckets, 0.3 to 2 s, and two clips of validation.

    `spoilt` replaces a clip's audio, `texts` its label.
    """
    random = np.random.default_rng(seed)
    store = FolderStore(folder)
    samples: dict[tuple[str, int], list[tuple[Sample, int]]] = {}
    for number in range(clips + 2):
        bucket, split = number % 2, "train" if number < clips else "valid"
        length = int(random.integers(4_800, 16_000) * (bucket + 1))
        audio = encode(random.normal(0, 0.1, length).astype(np.float32))
        length = lengths[number] if lengths and number < clips else length
        text = normalize_ipa("".join(random.choice(list("kæt ʃ"), 5))) or "k"
        sample = Sample(
            key=f"clip-{seed}-{number:03d}",
            audio=(spoilt or {}).get(number, audio),
            text=(texts or {}).get(number, text),
            label_status="labelled",
            utterance_id=f"clip-{seed}-{number:03d}",
            child_id=f"child-{number % 5}",
        )
        samples.setdefault((split, bucket), []).append((sample, length))
    shards = [
        write_shard(
            store,
            f"{split}/b{bucket:02d}-{start // per_shard:05d}.tar",
            bucket,
            group[start : start + per_shard],
            PHONES,
        )
        for (split, bucket), group in sorted(samples.items())
        for start in range(0, len(group), per_shard)
    ]
    entries = tuple(shard.entry for shard in shards)
    samples = join_samples([shard.samples for shard in shards])
    valid = sum(entry.count for entry in entries if entry.split == "valid")
    validation = {"disjoint_by_speaker": True, "fallback_speaker": None, "kept_in_training": [], "clips": valid,
                  "rejected": 0}  # fmt: skip
    notes = {"clips": len(samples), "rejected": 0, "validation": validation}
    return write_index(store, pack_index(ShardIndex((1.0, 2.0), {}, "", str(seed), PHONES, notes, entries, samples)))


def stream_of(folder: Path, rank: int = 0, size: int = 1, workers: int = 2, normalize: bool = True) -> ShardStream:
    store = FolderStore(folder)
    return ShardStream(read_index(store), store, VOCAB, normalize, World(rank, size), workers)


def run_epoch(folder: Path, size: int, workers: int, plan: EpochPlan, first_step: int = 0) -> list[StepBatch]:
    """What all ranks get, rank by rank."""
    return [item for rank in range(size) for item in stream_of(folder, rank, size, workers).epoch(plan, first_step)]


def keys_of(items: list[StepBatch]) -> Counter[str]:
    return Counter(key for item in items for key in item.batch.keys if key)


def plan_of(folder: Path, epoch: int = 0) -> EpochPlan:
    return plan_epoch(read_index(FolderStore(folder)), SETTINGS, epoch)


def training_keys(folder: Path) -> Counter[str]:
    store = FolderStore(folder)
    index = read_index(store)
    return Counter(read_keys(store, index)[index.split("train")].tolist())


def upload(folder: Path, url: str) -> BucketStore:
    store = open_store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    assert isinstance(store, BucketStore)
    return store


def cached(store: BucketStore, folder: Path, limit_bytes: int = 2**30) -> ShardCache:
    cache = open_for_reading(read_index(store), store, str(folder), limit_bytes / 2**30)
    assert isinstance(cache, ShardCache)
    return cache


def stream_all(store: BucketStore | ShardCache, folder: Path, size: int = 1) -> Counter[str]:
    """The keys of an epoch over all ranks; `folder` holds the same set, for its plan."""
    keys: Counter[str] = Counter()
    for rank in range(size):
        stream = ShardStream(read_index(store), store, VOCAB, True, World(rank, size), workers=3)
        items = list(stream.epoch(plan_of(folder)))
        keys += keys_of(items)
        assert not any(item.batch.failed for item in items)
    return keys


def delete_shards(store: BucketStore, folder: Path) -> None:
    obstore.delete(store._store, [f"train/{path.name}" for path in (folder / "train").glob("*.tar")])


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


@contextmanager
def opened_by_nobody(*paths: Path) -> Iterator[None]:
    """Hold leases on files: whoever opens one waits, as for a server that is away; the kernel ends them after 45 s."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # by which the kernel asks for a lease back
    with ExitStack() as held:
        for path in paths:
            file = held.enter_context(open(path, "r+b"))
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
