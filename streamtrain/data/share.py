"""Choose the share of the training clips that a run trains on: whole speakers, in an order that never changes.

The speakers are ordered by the hash of their id and taken until their clips last long enough. So a smaller share lies
within a larger one, and a share of a grown shard set has the speakers of before, as far as they fit.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import xxhash

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import counted
from sharding.shardset.index import ShardIndex, read_children
from sharding.shardset.store import Reader

log = logging.getLogger("streamtrain")

READ_AT_ONCE = 16  # shard indexes, as each is a request to a bucket


def take_share(index: ShardIndex, store: Reader, fraction: float = 1.0, hours: float | None = None) -> ShardIndex:
    """Return the index with the training split cut to a share of its duration, or to `hours`, and log what is left.

    At least one speaker is left, and the last one makes it reach the duration. A clip without a speaker's id counts as
    a speaker. Raises ShardError if the index of a shard is damaged.
    """
    rows = index.split("train")
    if (fraction == 1 and hours is None) or len(rows) == 0:
        return index
    numbers: dict[str, int] = {}
    speakers = [numbers.setdefault(name, len(numbers)) for name in _speakers(index, store)]  # (n,) of the clips
    lengths = index.samples["samples"][rows].astype(np.int64)
    durations = np.bincount(speakers, lengths, len(numbers))  # (speakers,) samples
    order = np.argsort([xxhash.xxh3_64_intdigest(name.encode()) for name in numbers], kind="stable")
    before = np.cumsum(durations[order]) - durations[order]
    wanted = round(fraction * lengths.sum() if hours is None else hours * 3600 * SAMPLE_RATE)
    is_taken = np.zeros(len(numbers), bool)
    is_taken[order[before < max(wanted, 1)]] = True
    share = np.zeros(len(index.samples), bool)
    share[rows] = is_taken[speakers]
    log.info(
        "%s: training on %s of %s speakers, %s of %s, %.2f of %.2f h",
        f"data.fraction={fraction:g}" if hours is None else f"data.hours={hours:g}",
        f"{is_taken.sum():,}", f"{len(numbers):,}", f"{share.sum():,}", counted(len(rows), "clip"),
        lengths[share[rows]].sum() / SAMPLE_RATE / 3600, lengths.sum() / SAMPLE_RATE / 3600,
    )  # fmt: skip
    return replace(index, share=share)


def _speakers(index: ShardIndex, store: Reader) -> Iterator[str]:
    """Yield the speaker of each training clip, in the order of the index."""
    shards = [shard for shard in index.shards if shard.split == "train"]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for children in pool.map(partial(read_children, store), shards):
            for key, child_id in children:
                yield child_id or f"clip {key}"
