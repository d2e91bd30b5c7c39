"""`make bench`: the sharder's speed and memory beside a bare loop over the same clips, and beside lhotse.

It drives the command line alone, so whatever the build does inside is measured as its user meets it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.corpora import flac_corpus, tiny_corpus, wav_corpus
from tests.benchmarks.report import Line, Quoted, machine, say
from tests.benchmarks.timing import (
    ROOT,
    WORK,
    Loop,
    bare_copy,
    bare_resample,
    run_build,
    run_lhotse,
    run_loops,
    speak_demo,
    warm,
)

RESULT = WORK / "sharding.json"
CORPUS = ROOT.parent / "shared/corpora/kids_a"  # where there is none, a demo corpus is spoken
HANDFUL = 16  # clips of the run whose wall is called start-up
LOOP_GOAL, LHOTSE_GOAL, MEMORY_GOAL_GB = 1.25, 4.0, 2.0


class Sizes(NamedTuple):
    clips: int  # of pass-through and lhotse
    wav_clips: int  # to resample
    rows: int  # of the memory measurement
    repetitions: int  # of every timed pair


FULL, QUICK = Sizes(10_080, 2_100, 1_000_000, 3), Sizes(420, 84, 5_000, 1)


@dataclass
class Bench:
    """What was asked for, and what has been found so far."""

    corpus: Path
    sizes: Sizes
    workers: int
    runs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # wall, s
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, seconds: float) -> None:
        print(f"  {name}: {seconds:.2f} s", file=sys.stderr)
        self.runs[name].append(seconds)

    def quote(self, name: str, less: str | None = None, shared_by: int = 1) -> Quoted:
        """Median and minimum of the runs of `name`, less the quickest start-up, divided among the workers."""
        start = min(self.runs[less]) if less else 0.0
        median, minimum = (max(of(self.runs[name]) - start, 1e-3) for of in (statistics.median, min))
        return Quoted(median / shared_by, minimum / shared_by, clear=median >= start)


# --- the measurements -------------------------------------------------------------------------------------------


def measure_pass_through(bench: Bench) -> None:
    corpus, handful = (flac_corpus(WORK, bench.corpus, count) for count in (bench.sizes.clips, HANDFUL))
    clips = warm(corpus)
    few = clips[:500]
    seconds = {dtype: min(bare_copy(few, dtype) for _ in range(3)) for dtype in ("int16", "float32")}
    dtype = min(seconds, key=lambda name: seconds[name])
    bench.notes.append(
        f"pass-through, bare loop: read, md5, decode to {dtype} (the quicker), write; nothing is flushed"
    )
    beside_loop(bench, "pass-through", corpus, handful, partial(bare_copy, dtype=dtype))


def measure_resample(bench: Bench) -> None:
    corpus, handful = (wav_corpus(WORK, bench.corpus, count) for count in (bench.sizes.wav_clips, HANDFUL))
    bench.notes.append(
        "resample, bare loop: read, mix down, soxr HQ, encode, write; neither md5 nor flush, ours does both"
    )
    beside_loop(bench, "resample + encode", corpus, handful, bare_resample)


def beside_loop(bench: Bench, what: str, corpus: Path, handful: Path, loop: Loop) -> None:
    """Our build with one worker and with all of them, beside a loop that does the least there is to do."""
    clips = warm(corpus)
    counts = sorted({1, bench.workers})
    for _ in range(bench.sizes.repetitions):
        for count in counts:
            bench.take(f"{what}: bare loop ×{count}", run_loops(loop, clips, count))
            bench.take(f"{what}: start-up ×{count}", run_build(handful, count))
            bench.take(f"{what}: build ×{count}", run_build(corpus, count))
    if len(counts) > 1:
        bench.notes.append(f"{what}: what several bare loops at once lose is the machine's own loss")
    for count in counts:
        startup, ideal = f"{what}: start-up ×{count}", bench.quote(f"{what}: bare loop ×1", shared_by=count)
        ours = bench.quote(f"{what}: build ×{count}", less=startup)
        bench.lines.append(Line(f"{what}, {len(clips):,} clips, workers: {count}", ours, ideal, LOOP_GOAL))
        bench.lines.append(Line("  the start-up that was excluded", bench.quote(startup)))
        if count > 1:
            bench.lines.append(Line(f"  {count} bare loops at once", bench.quote(f"{what}: bare loop ×{count}"), ideal))


def measure_lhotse(bench: Bench) -> None:
    if importlib.util.find_spec("lhotse") is None:
        bench.notes.append("lhotse is not installed and was left out: pip install -r requirements-bench.txt")
        return
    corpus, handful = (flac_corpus(WORK, bench.corpus, count) for count in (bench.sizes.clips, HANDFUL))
    warm(corpus)
    for _ in range(bench.sizes.repetitions):
        for name, folder in (("start-up", handful), ("whole", corpus)):
            bench.take(f"lhotse: {name}", run_lhotse(folder, bench.workers))
            bench.take(f"beside lhotse: {name}", run_build(folder, bench.workers))
    for said, ours, theirs in (
        ("whole command", bench.quote("beside lhotse: whole"), bench.quote("lhotse: whole")),
        (
            "start-up excluded",
            bench.quote("beside lhotse: whole", less="beside lhotse: start-up"),
            bench.quote("lhotse: whole", less="lhotse: start-up"),
        ),
    ):
        what = f"beside lhotse, {bench.sizes.clips:,} clips, workers: {bench.workers}, {said}"
        bench.lines.append(Line(what, ours, theirs, LHOTSE_GOAL, at_least=True))
    start = Line("  start-up", bench.quote("beside lhotse: start-up"), bench.quote("lhotse: start-up"), at_least=True)
    bench.lines.append(start)
    bench.notes += [
        "lhotse: RecordingSet.from_dir (one job is quicker than several), SupervisionSet, CutSet.to_shar to FLAC with",
        "  forked jobs and the libsndfile backend; it always decodes and encodes again, even as 'original'",
        "lhotse's start-up imports torch, ours does not: the whole command favours us, start-up excluded does not",
        "verified: ours the md5 in the manifest and every sample by decoding, and it writes checksums of clips and of",
        "  shards and flushes them to disk; lhotse nothing, although a clip that does not decode would stop it",
    ]


def measure_memory(bench: Bench) -> None:
    corpus = tiny_corpus(WORK, bench.sizes.rows)
    peaks: dict[int, int] = {}
    bench.take("memory: build", run_build(corpus, bench.workers, peaks))
    parent, *workers = (size / 1e9 for size in peaks.values())  # the parent was seen first
    wall = bench.runs["memory: build"][-1]
    for what, value, goal, unit in (
        (
            f"memory, {bench.sizes.rows:,} rows, workers: {bench.workers}, peak of the parent",
            parent,
            MEMORY_GOAL_GB,
            "GB",
        ),
        ("  peak of the largest worker", max(workers, default=0.0), None, "GB"),
        ("  wall of the whole command", wall, None, "s"),
        ("  clips a second", bench.sizes.rows / wall, None, "/s"),
    ):
        bench.lines.append(Line(what, Quoted(value, value), goal=goal, unit=unit))
    bench.notes.append("memory: one run; resident peaks (VmHWM, in which mapped files count) as Linux keeps them")


MEASUREMENTS = {
    "pass-through": measure_pass_through,
    "lhotse": measure_lhotse,
    "resample": measure_resample,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, once: shows that it runs, its ratios say little")
    add("--only", choices=MEASUREMENTS, action="append", help="one of the measurements; may be repeated")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores, %(default)s)")
    add("--corpus", type=Path, help="folder of speech with its transcripts (default: ../shared's, else a demo corpus)")
    add("--clips", type=int, help=f"clips of pass-through and lhotse (default: {FULL.clips:,})")
    add("--wav-clips", type=int, help=f"clips to resample (default: {FULL.wav_clips:,})")
    add("--rows", type=int, help=f"rows of the memory measurement (default: {FULL.rows:,})")
    add("--repetitions", type=int, help=f"of every timed pair (default: {FULL.repetitions})")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    asked = Sizes(options.clips, options.wav_clips, options.rows, options.repetitions)
    sizes = Sizes(*(given or size for given, size in zip(asked, QUICK if options.quick else FULL, strict=True)))
    source = options.corpus or (CORPUS if CORPUS.is_dir() else speak_demo())
    if not source.is_dir():
        parser.error(f"--corpus {source}: there is no such folder")
    bench = Bench(source, sizes, options.workers)
    facts = machine()
    bench.notes.append(f"start-up: the same command on {HANDFUL} clips; what is excluded is the quickest such run")
    for name in options.only or MEASUREMENTS:
        print(name, file=sys.stderr)
        MEASUREMENTS[name](bench)
    say(facts, bench.lines, bench.notes, RESULT, quick=options.quick, sizes=sizes._asdict(), runs=bench.runs)


if __name__ == "__main__":
    main()
