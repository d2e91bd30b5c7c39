"""Ranks that wait while rank 0 works alone, longer than their collectives would wait.

alone_rank.py slow|collective|fails|frozen
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from sharding.errors import StoreError
from streamtrain import distributed as ranks
from streamtrain import startup as rank

COLLECTIVE_SEC, WORK_SEC = 2, 5


def main() -> None:
    mode = sys.argv[-1]
    ranks.BEAT_SEC, ranks.SILENT_SEC, rank.LET_RANK_0_SPEAK_SEC = 0.5, 3.0, 0.1
    with ranks.process_group() as world:
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=COLLECTIVE_SEC))
        if mode == "collective":
            time.sleep(WORK_SEC * world.main)
            world.barrier()
            return
        with world.on_main("fetch the copy") as mine:
            if mine and mode == "fails":
                raise StoreError("s3://bucket/run: no such bucket", "create it")
            if mine and mode == "frozen":
                time.sleep(2)
                os.kill(os.getpid(), signal.SIGSTOP)  # as a machine that is paused: its store answers nobody
            if mine and mode == "slow":
                time.sleep(WORK_SEC)
        print(f"rank {world.rank} goes on", flush=True)


if __name__ == "__main__":
    main()
