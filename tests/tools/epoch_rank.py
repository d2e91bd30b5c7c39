"""One rank of an epoch as a process of its own, for tests that kill it: `epoch_rank.py SET URL CACHE RANK SIZE SEC`.

Prints a JSON list of keys for each micro-batch as it comes. SET is the same shard set in a folder, for its plan.
"""

import json
import sys
from pathlib import Path

from sharding.errors import StreamtrainError
from sharding.shardset.index import read_index
from sharding.shardset.object_store import BucketStore
from streamtrain.data.dataset import ShardStream
from streamtrain.distributed import World
from tests.tools.stream_sets import VOCAB, cached, plan_of


def main(folder: str, url: str, cache: str, rank: str, size: str, patience_sec: str) -> None:
    store = BucketStore(url, float(patience_sec))
    world = World(int(rank), int(size), int(rank), int(size), frozenset(range(int(size))))
    stream = ShardStream(read_index(store), cached(store, Path(cache)), VOCAB, True, world, workers=2)
    for item in stream.epoch(plan_of(Path(folder))):
        print(json.dumps(item.batch.keys), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except StreamtrainError as error:
        sys.exit(f"{type(error).__name__}: {error}")
