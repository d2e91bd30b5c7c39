"""`python -m sharding`: build, verify and look at shard sets; make a demo corpus; try the splitter on one file."""

import argparse
import glob
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sharding import report
from sharding.audio import SAMPLE_RATE, decode
from sharding.build import BuildSettings, available_cores, build
from sharding.demo import make_demo_corpus
from sharding.errors import AudioError, ManifestError, ShardError, StreamtrainError
from sharding.format import SPLITS, ShardEntry, check_shard, read_index
from sharding.ipa import normalize_ipa
from sharding.split import MIN_PIECE_SEC, split_recording
from sharding.store import Store, open_store

DEFAULT_SOURCES = "data/raw/*"
DEFAULT_OUT = "data/shards"
MAX_BUCKETS = 100  # a shard's name has two digits for its bucket
LIMITS_SEC = (2 * MIN_PIECE_SEC, 86_400)  # below, there may be no way to cut without tiny pieces


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (StreamtrainError, OSError) as error:  # the latter: a full disk, a folder that must not be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _build(options: argparse.Namespace) -> int:
    settings = BuildSettings(options.limit_sec, options.valid_fraction, options.num_buckets, options.shard_mb)
    built = build(_find_sources(options.sources), options.out, settings, options.workers)
    print(report.render(built.summary))
    print(f"{options.out}: " + ("built" if built.fresh else "was built before from the same sources; nothing to do"))
    share = built.index.notes["rejected"] / max(built.index.notes["clips"], 1)
    if share > options.max_rejected:
        raise ShardError(
            f"{options.out}: {share:.1%} of the clips were rejected, --max-rejected allows {options.max_rejected:.1%}",
            f"{report.LEDGER_NAME} has the reason for each; the shard set is whole and can be used if they are right",
        )
    return 0


def _find_sources(named: Sequence[str]) -> list[Path]:
    if named:
        return [Path(path) for pattern in named for path in (sorted(glob.glob(pattern)) or [pattern])]
    found = sorted(path for path in Path().glob(DEFAULT_SOURCES) if path.is_dir())
    if not found:
        raise ManifestError(
            f"there is no folder in {DEFAULT_SOURCES}",
            "unpack each corpus into a folder there (audio/ or audio.zip beside its transcripts JSONL), "
            "or name the sources",
        )
    return found


def _verify(options: argparse.Namespace) -> int:
    store = open_store(options.shards)
    index = read_index(store)
    damaged = 0
    for shard in tqdm(index.shards, desc="verifying", unit="shard"):
        try:
            _verify_shard(store, shard, options.decode)
        except StreamtrainError as error:
            damaged += 1
            print(error.message, file=sys.stderr)
    if damaged:
        raise ShardError(f"{options.shards}: {damaged} of {len(index.shards)} shards are damaged", "build them again")
    print(f"{options.shards}: {len(index.shards)} shards, {len(index.samples):,} samples, all as the index says")
    return 0


def _verify_shard(store: Store, shard: ShardEntry, with_audio: bool) -> None:
    for sample in check_shard(store, shard):
        try:
            if with_audio:
                decode(sample.audio, prove=True)
        except AudioError as error:
            raise ShardError(f"{store.url}/{shard.name}: {sample.key}: {error.message}") from error


def _inspect(options: argparse.Namespace) -> int:
    store = open_store(options.shards)
    index = read_index(store)
    summary = report.read_summary(store)
    if options.json:
        print(json.dumps(summary, ensure_ascii=False, indent=1))
        return 0
    print(report.render(summary))
    print(f"{'split':>12} {'bucket':>9} {'samples':>9} {'hours':>8} {'shards':>7}")
    for split in SPLITS:
        for bucket, edge in enumerate(index.duration_bins):
            shards = [shard for shard in index.shards if (shard.split, shard.bucket) == (split, bucket)]
            if shards:
                count, hours = sum(s.count for s in shards), sum(s.seconds for s in shards) / 3600
                print(f"{split:>12} {f'≤ {edge:.1f} s':>9} {count:9,} {hours:8.2f} {len(shards):7,}")
    return 0


def _split(options: argparse.Namespace) -> int:
    try:
        waveform, _ = decode(Path(options.audio).read_bytes(), prove=True)
    except AudioError as error:
        raise AudioError(f"{options.audio}: {error.message}") from error
    segments = split_recording(Path(options.audio).stem, waveform, normalize_ipa(options.text), options.limit_sec)
    print(f"{len(waveform) / SAMPLE_RATE:.2f} s in {len(segments)} pieces")
    for segment in segments:
        mark = " (forced cut)" if segment.forced else ""
        print(
            f"{segment.start_sec:9.3f} – {segment.end_sec:9.3f} s  {segment.label_status:>10} "
            f"{segment.confidence:.2f}{mark}  {segment.text}"
        )
    return 0


def _demo_corpus(options: argparse.Namespace) -> int:
    make_demo_corpus(Path(options.out), options.minutes, options.children, options.seed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sharding", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    parser_build = command("build", _build, "Turn audio and labels into tar shards bucketed by duration.")
    add = parser_build.add_argument
    add("sources", nargs="*", metavar="SOURCE",
        help="a folder with a transcripts JSONL beside audio/ or audio.zip, or the JSONL itself "
             f"(default: every folder in {DEFAULT_SOURCES})")  # fmt: skip
    add("--out", default=DEFAULT_OUT, help="folder or s3://bucket/prefix of the shard set (default: %(default)s)")
    add("--workers", type=_between(1, 1024, int), default=available_cores(),
        help="processes; the result is the same for any number (default: the cores, %(default)s)")  # fmt: skip
    add("--limit-sec", type=_between(*LIMITS_SEC), default=25.0,
        help="longer clips are split at pauses, s; lower saves GPU memory (default: %(default)s)")  # fmt: skip
    add("--valid-fraction", type=_between(0, 1), default=0.1,
        help="share of the children whose clips are kept for validation (default: %(default)s)")  # fmt: skip
    add("--num-buckets", type=_between(1, MAX_BUCKETS, int), default=8,
        help="duration buckets; more pad less, fewer mix lengths more (default: %(default)s)")  # fmt: skip
    add("--shard-mb", type=_between(0.01, 65_536), default=64.0,
        help="size of a shard, MiB; larger suits object stores (default: %(default)s)")  # fmt: skip
    add("--max-rejected", type=_between(0, 1), default=0.01,
        help="share of rejected clips above which the finished command fails (default: %(default)s)")  # fmt: skip

    parser_verify = command("verify", _verify, "Check every shard against the index.")
    parser_verify.add_argument("shards", help="folder or URL of the shard set")
    parser_verify.add_argument("--decode", action="store_true", help="decode every clip as well")

    parser_inspect = command("inspect", _inspect, "Show what a shard set holds.")
    parser_inspect.add_argument("shards", help="folder or URL of the shard set")
    parser_inspect.add_argument("--json", action="store_true", help="print the build summary as JSON")

    parser_split = command(
        "split", _split, "Show where one long recording would be cut, and what each piece would hold."
    )
    parser_split.add_argument("audio", help="audio file")
    parser_split.add_argument("--text", default="", help="its label")
    parser_split.add_argument(
        "--limit-sec", type=_between(*LIMITS_SEC), default=25.0, help="longest piece, s (default: %(default)s)"
    )

    parser_demo = command("demo-corpus", _demo_corpus, "Make a small synthetic corpus, spoken by espeak-ng.")
    parser_demo.add_argument("out", help="folder to make the two corpora in")
    parser_demo.add_argument(
        "--minutes", type=_between(0.1, 100_000), default=30.0, help="speech to make, min (default: %(default)s)"
    )
    parser_demo.add_argument(
        "--children", type=_between(2, 10_000, int), default=24, help="voices (default: %(default)s)"
    )
    parser_demo.add_argument(
        "--seed", type=_between(0, 2**32, int), default=0, help="another seed, another corpus (default: %(default)s)"
    )
    return parser


def _between(low: float, high: float, kind: type[float] = float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high` that says so when it is given something else."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {low:,} to {high:,} is expected")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
