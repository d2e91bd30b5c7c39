"""Open a shard set from Python: its samples by key, and their table."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharding.audio.codec import Waveform, decode
from sharding.shardset.index import ShardIndex, read_index, read_keys, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.store import Store, open_store

if TYPE_CHECKING:
    import pandas as pd


class ShardSet(Mapping[str, Sample]):
    """Read the samples of a shard set by key, with random access, on disk or in a bucket.

    `shards[key]` is a `Sample`, `waveform(key)` its audio, and `table()` a row per sample; `index` is what plans read.

    Raises:
        StreamtrainError: If a shard or its index is missing or damaged.

    Example:
        >>> shards = open_shards("data/shards")
        >>> shards["U_1"].text, len(shards)
    """

    def __init__(self, url: str, store: Store, index: ShardIndex) -> None:
        self.url, self.store, self.index = url, store, index

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, self.index)  # connections to a bucket belong to one process

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(read_keys(self.store, self.index).tolist())}

    def __getitem__(self, key: str) -> Sample:
        """Return a sample with its encoded audio. Raises KeyError, and ShardError if its checksum differs."""
        return read_sample(self.store, self.index, self._rows[key])

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self.index.samples)

    def waveform(self, key: str) -> Waveform:
        """Return the audio of a sample, float32 (samples,) at 16 kHz in [-1, 1]. Raises AudioError if it is damaged."""
        return decode(self[key].audio)[0]

    def table(self) -> "pd.DataFrame":
        """Return a row per sample, by key: its split, bucket, corpus, age_bucket, child_id, bytes, seconds, symbols."""
        from sharding.shardset.table import read_clips

        return read_clips(self.store, self.index).drop(columns="total")


def open_shards(url: str | Path) -> ShardSet:
    """Open a shard set.

    Args:
        url: Its folder, or `s3://`, `gs://`, `az://` or `https://` URL.

    Returns:
        A mapping of keys to samples, in the order of its index.

    Raises:
        StreamtrainError: If there is no shard set, or it is damaged.

    Example:
        >>> shards = open_shards("s3://speech/shards")
        >>> shards.table().groupby("corpus").seconds.sum()
    """
    store = open_store(url)
    return ShardSet(str(url), store, read_index(store))


def as_shard_set(shards: ShardSet | str | Path) -> ShardSet:
    """Return a shard set itself, or open the one at a path or URL."""
    return shards if isinstance(shards, ShardSet) else open_shards(shards)


def _reopen(url: str, index: ShardIndex) -> ShardSet:
    return ShardSet(url, open_store(url), index)
