"""Tabulate the samples of a shard set, from its indexes alone. Imports pandas, which takes long."""

import numpy as np
import pandas as pd
from tqdm import tqdm

from sharding.audio.codec import SAMPLE_RATE
from sharding.files.names import UNKNOWN, age_order
from sharding.shardset.index import ShardIndex, SpeakerInfo, read_checked
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import Reader


def read_clips(store: Reader, index: ShardIndex) -> pd.DataFrame:
    """Return one row per sample, by key, in the order of `index.samples`. Raises ShardError for a damaged index."""
    keys: list[str] = []
    speakers: list[SpeakerInfo] = []
    for shard in tqdm(index.shards, desc="reading", unit="shard", delay=1):
        record = read_checked(store, shard)
        keys += record.keys
        speakers += record.speakers
    samples, ends = index.samples, {split: np.array(index.bucket_ends(split)) for split in SPLITS}
    buckets = np.array([shard.bucket for shard in index.shards], np.int64)[samples["shard"]]
    splits = np.array([shard.split for shard in index.shards], object)[samples["shard"]]
    ages = [speaker.age_bucket or UNKNOWN for speaker in speakers]
    seconds = samples["samples"] / SAMPLE_RATE
    return pd.DataFrame(
        {
            "total": pd.Categorical(["total"] * len(speakers), ["total"]),  # a category has its row even without a clip
            "split": pd.Categorical(splits, SPLITS),
            "bucket": buckets,
            "from_sec": np.array([0.0, *index.duration_bins])[buckets],
            "to_sec": [ends[split][bucket] for split, bucket in zip(splits, buckets, strict=True)],
            "corpus": [speaker.corpus or UNKNOWN for speaker in speakers],
            "age_bucket": pd.Categorical(ages, sorted(set(ages), key=age_order)),
            "child_id": [speaker.child_id or None for speaker in speakers],
            "shard": samples["shard"],
            "bytes": samples["bytes"].astype(np.int64),
            "seconds": seconds,
            "symbols": samples["label_length"].astype(np.int64),
            "labelled_seconds": np.where(samples["label_length"] > 0, seconds, 0.0),
        },
        index=np.array(keys, object),
    )
