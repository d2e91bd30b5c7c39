"""Start and resume training on a set of millions of clips, beside a set of a thousand.

`python -m tests.benchmarks.scale` builds a small set of short noises, repeats its shards by hard links under an index
of their own, and measures on two ranks: the seconds from the command to the first optimizer step, those of a step at
the border of two epochs ÷ the median, and the memory of a rank. Ten minutes and 4 GB for ten million clips.
"""

import argparse
import csv
import io
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import soundfile

from sharding.shardset.index import ShardIndex, pack_index, read_index, write_index
from sharding.shardset.store import FolderStore
from streamtrain.data.plan import PlanSettings, count_steps, plan_epoch
from tests.benchmarks.timing import WORK

SMALL_CLIPS, RATE = 1_000, 16_000
TINY = ('model.scratch={"hidden_size":32,"num_hidden_layers":1,"num_attention_heads":2,"intermediate_size":64,'
        '"conv_dim":[8,16],"conv_kernel":[64,8],"conv_stride":[40,8],"num_conv_pos_embeddings":8,'
        '"num_conv_pos_embedding_groups":2}')  # fmt: skip
SETTINGS = (TINY, "model.mask_time_prob=0", "data.batch_seconds=40", "train.micro_batches_per_step=2",
            "train.checkpoint_every=1000000", "eval.every_steps=1000000", "train.probe=false")  # fmt: skip
FIRST_STEP = re.compile(r"step \d[\d,]* of [\d,]+, ")


@dataclass(frozen=True)
class Start:
    """Hold what a start of training took."""

    seconds: float  # to the first optimizer step
    rank_bytes: int  # of its own, the largest of any rank after some steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=float, default=1e7)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    folder = WORK / "scale"
    shutil.rmtree(folder, ignore_errors=True)
    make_small(folder)
    rows = []
    starts: dict[int, list[Start]] = {}
    for clips in (SMALL_CLIPS, int(options.clips)):
        index = repeat(folder / "small", folder / str(clips), clips)
        epochs = options.epochs if clips > SMALL_CLIPS else 500  # else it might end before it is stopped
        starts[clips] = [start(folder, clips, epochs) for _ in range(2)]
        rows.append([f"{clips:,} clips", *_plan_times(index), *(f"{one.seconds:.1f} s" for one in starts[clips])])
    print(table(["", "plan", "count steps", "first start", "resume"], rows))
    (few, again), (many, resumed) = starts.values()
    print(f"beyond {SMALL_CLIPS:,} clips: {many.seconds - few.seconds:.1f} s to the first step, "
          f"{resumed.seconds - again.seconds:.1f} s when resumed; "
          f"{(resumed.rank_bytes - again.rank_bytes) / options.clips:.1f} bytes a clip in a rank")  # fmt: skip
    print(f"a step at the border of two epochs ÷ the median: {border(folder):.2f}")


def make_small(folder: Path) -> None:
    """Build a set of short noises in shards of some thousand clips, with a few to validate on."""
    random, raw = np.random.default_rng(0), folder / "raw"
    (raw / "audio").mkdir(parents=True)
    text = io.StringIO("audio_path,text,child_id\n")
    text.seek(0, os.SEEK_END)
    for number in range(20 * SMALL_CLIPS):
        sound = 500 * random.standard_normal(int(random.integers(RATE // 4, RATE)))
        soundfile.write(raw / f"audio/{number}.flac", sound.astype(np.int16), RATE, subtype="PCM_16")
        text.write(f"audio/{number}.flac,ab,{number % 100}\n")
    (raw / "clips.csv").write_text(text.getvalue())
    run(["build", raw, "--out", folder / "small", "--valid-fraction", "0.02", "--shard-mb", "20"])


def repeat(source: Path, out: Path, clips: int) -> ShardIndex:
    """Write a set of about so many training clips, whose shards are those of another, under other names."""
    index = read_index(FolderStore(source))
    starts = np.cumsum([0, *(shard.count for shard in index.shards)])
    per_round, random = len(index.split("train")), np.random.default_rng(0)
    shards, tables = [], []
    for number, shard in enumerate(index.shards):
        times = max(round(clips / per_round), 1) if shard.split == "train" else 1
        for _ in range(times):
            name = f"{shard.name.rpartition('-')[0]}-{len(shards):05d}"
            for ending in (".tar", ".idx.zst"):
                path = out / f"{name}{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(source / f"{shard.name.removesuffix('.tar')}{ending}", path)
            kept = slice(starts[number], starts[number + 1])
            if clips < per_round and shard.split == "train":  # a part of the shard: the first of its clips
                kept = slice(starts[number], starts[number] + max(round(shard.count * clips / per_round), 1))
            rows = random.permutation(index.samples[kept])  # in one order, they would pack like a bomb
            rows["shard"] = len(shards)
            tables.append(rows)
            length = int(rows["samples"].sum(dtype=np.int64))
            shards.append(replace(shard, name=f"{name}.tar", count=len(rows), samples=length))
    repeated = replace(index, shards=tuple(shards), samples=np.concatenate(tables), digest="")
    return write_index(FolderStore(out), pack_index(repeated))


def _plan_times(index: ShardIndex) -> list[str]:
    settings, times = PlanSettings(40.0, 2), []
    for function in (plan_epoch, count_steps):
        begun = time.perf_counter()
        function(index, settings, 0)
        times.append(f"{time.perf_counter() - begun:.2f} s")
    return times


def start(folder: Path, clips: int, epochs: int) -> Start:
    """Train until some steps are done, then stop: the first time from the beginning, the second time resumed."""
    settings = [*SETTINGS, f"data.shards={folder / str(clips)}", f"train.epochs={epochs}", "train.max_steps=null",
                f"train.run_dir={folder / f'run-{clips}'}"]  # fmt: skip
    with training(settings) as process:
        begun = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if FIRST_STEP.search(line):
                break
        else:
            raise SystemExit("training has ended before its first step; what it wrote is above")
        seconds = time.monotonic() - begun
        time.sleep(1.0)  # into the steps: what the start took for a moment is given back
        ranks = [child for child in psutil.Process(process.pid).children() if child.is_running()]
        largest = max(map(_own_bytes, ranks))
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    return Start(seconds, largest)


def _own_bytes(rank: psutil.Process) -> int:
    """Return the memory of a process that is no file's: pages of mapped files are shared, and can be dropped."""
    status = Path(f"/proc/{rank.pid}/status").read_text("utf-8")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


def border(folder: Path) -> float:
    """Return the seconds of the first steps of epochs ÷ the median step, of a set of 1,000 clips."""
    run_dir = folder / "run-border"
    settings = [*SETTINGS, f"data.shards={folder / str(SMALL_CLIPS)}", "train.epochs=12", "train.max_steps=null",
                f"train.run_dir={run_dir}"]  # fmt: skip
    with training(settings) as process:
        assert process.stdout is not None
        process.stdout.read()
    rows = list(csv.DictReader((run_dir / "log.csv").open(encoding="utf-8")))[5:]
    seconds = [float(row["seconds"]) for row in rows]
    first = [
        float(row["seconds"]) for row, before in zip(rows[1:], rows, strict=False) if row["epoch"] != before["epoch"]
    ]
    return statistics.median(first) / statistics.median(seconds)


@contextmanager
def training(settings: list[str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "streamtrain", "train", "--config", "demo", "--ranks", "2", "--set", *settings]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
        process.wait(60)
    finally:
        process.kill()


def run(arguments: list[object]) -> None:
    subprocess.run([sys.executable, "-m", "streamtrain", *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    main()
