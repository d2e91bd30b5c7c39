"""`python -m sharding`: build, index, verify and look at shard sets; make a demo corpus; try the splitter on a file."""

import argparse
import glob
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sharding.audio.codec import SAMPLE_RATE, decode
from sharding.audio.vad import detect_speech, find_pauses
from sharding.build.external import VALID_TARS, index_tars
from sharding.build.pipeline import BuildConfig, RunOptions, build
from sharding.build.repair import repair
from sharding.command import PNG, Commands, number, out_file, out_folder, place
from sharding.errors import AudioError, ManifestError, ShardError, StreamtrainError, counted
from sharding.files.writing import write
from sharding.labels.ipa import TRACKS, read_label
from sharding.pool import available_cores
from sharding.report import files as report
from sharding.report.ledger import LEDGER_NAME
from sharding.report.summary import render
from sharding.segment.acoustic_model import example_of, fit
from sharding.segment.cuts import MAX_DURATION_SEC, MIN_PIECE_SEC
from sharding.segment.evidence import MAX_FALSE_ACCEPT, NO_ALIGNMENTS, Alignments, read_alignments
from sharding.segment.split import LabelThresholds, split_recording
from sharding.shardset.index import REBUILT_HINT, read_index
from sharding.shardset.store import open_store
from sharding.shardset.verify import check_older_indexes, find_faults
from sharding.sources.manifest import OPTIONAL_FIELDS, REQUIRED_FIELDS, ManifestOptions, parse_columns
from sharding.sources.synthetic import make_demo_corpus

DEFAULT_SOURCES = "data/raw/*"
DEFAULT_OUT = "data/shards"
MAX_BUCKETS = 100  # a shard's name has two digits for its bucket
REJECTED_HINT = f"{LEDGER_NAME} has the reason for each; the set is whole and can be used if they are right"
REPORT_HINT = "copy it again, with all that is in report/; a set older than its sums gets them with the next --append"
APPENDING = (
    "an --append has begun and not ended, and report/ may tell of it; if it was killed, give the same command again, "
    "or --append clips that are there already, to be rid of it"
)
LIMITS_SEC = (2 * MIN_PIECE_SEC, 86_400)  # below, there may be no way to cut without tiny pieces


def main(arguments: Sequence[str] | None = None) -> int:
    return _commands().run(arguments)


def _build(options: argparse.Namespace) -> int:
    _check_executor(options)
    alignments = _read_alignments(options.alignments)
    chosen = {name: getattr(options, name) for name in BuildConfig.__dataclass_fields__}
    settings = BuildConfig(**chosen | {"alignments": alignments.digest})
    how = RunOptions(
        options.workers, _reading_of(options), options.dry_run, options.append, options.scheduler, alignments
    )
    built = build(_find_sources(options.sources), options.out, settings, how)
    if built.summary:
        print(render(built.summary, options.out, options.dry_run))
    if built.known:
        print(f"{built.known:,} of the clips to append were there already, and stay as they are")
    done = "would be built so; nothing was written" if options.dry_run else "built"
    same = "was built before from the same rows, and audio of the same sizes; nothing to do"
    print(f"{options.out}: {done if built.built else same}")
    hint = "look at the files named above" if options.dry_run else REJECTED_HINT
    _check_rejected(options.out, built.rejected, options.max_reject_rate, hint)
    return 0


def _reading_of(options: argparse.Namespace) -> ManifestOptions:
    columns = parse_columns(options.columns)
    return ManifestOptions(columns=columns, follow_links=options.follow_links, audio_root=options.audio_root)


def _read_alignments(path: str | None) -> Alignments:
    return read_alignments(Path(path)) if path else NO_ALIGNMENTS


def _check_rejected(where: str, rejected: float, allowed: float, hint: str) -> None:
    if rejected > allowed:
        raise ShardError(
            f"{where}: {rejected:.1%} of the clips were rejected, --max-reject-rate allows {allowed:.1%}", hint
        )


def _check_executor(options: argparse.Namespace) -> None:
    if options.executor == "dask" and not options.scheduler:
        raise StreamtrainError("--executor dask needs the address of the scheduler: --scheduler tcp://host:8786")
    if options.scheduler and not re.fullmatch(r"(tcp|tls)://\S+:\d+", options.scheduler):
        raise StreamtrainError(f"--scheduler {options.scheduler}: an address such as tcp://host:8786 is expected")
    if options.executor != "dask" and options.scheduler:
        raise StreamtrainError("--scheduler is for --executor dask, which is not asked for")
    if options.executor == "dask" and options.dry_run:  # pieces of long recordings pass from worker to worker in OUT
        raise StreamtrainError("--dry-run writes nothing, not even what Dask's workers need: leave --executor out")


def _find_sources(named: Sequence[str]) -> list[Path]:
    if named != [DEFAULT_SOURCES]:
        return [path for pattern in named for path in _expand(pattern)]
    found = sorted(path for path in Path().glob(DEFAULT_SOURCES) if path.is_dir())
    if not found:
        raise ManifestError(
            f"there is no folder in {DEFAULT_SOURCES}",
            "unpack each corpus into a folder there (audio/ or audio.zip beside its transcripts JSONL), "
            "or name the sources",
        )
    return found


def _expand(pattern: str) -> list[Path]:
    """The paths that a pattern names, or itself where it names none. What is there by that name is no pattern."""
    path = Path(pattern)
    there = next(above for above in (path, *path.parents) if os.path.lexists(above))
    names = glob.glob(str(path.relative_to(there)), root_dir=there)
    return sorted(there / name for name in names) or [path]


def _verify(options: argparse.Namespace) -> int:
    if options.repair:
        return _repair(options)
    store = open_store(options.shards)
    index = read_index(store)
    faults = find_faults(options.shards, index, options.decode, options.workers)
    for fault in faults.values():
        print(fault.message, file=sys.stderr)
    if faults:
        again = f"make them again from their sources: python -m sharding verify {options.shards} --repair SOURCE…"
        mendable = any(fault.mendable for fault in faults.values())
        raise ShardError(
            f"{options.shards}: {len(faults)} of {len(index.shards)} shards are damaged, or not as the index says",
            again if mendable else REBUILT_HINT,
        )
    check_older_indexes(store, index)
    for said in (report_faults := report.check_report(store, index)):
        print(said, file=sys.stderr)
    if report_faults:
        raise ShardError(f"{options.shards}: the shards are sound, the report is not", REPORT_HINT)
    if report.is_archived(store, index):
        print(f"{options.shards}: {APPENDING}", file=sys.stderr)
    holds = f"{counted(len(index.shards), 'shard')}, {counted(len(index.samples), 'sample')}"
    print(f"{options.shards}: {holds}, all as the index says")
    return 0


def _repair(options: argparse.Namespace) -> int:
    faults, indexes = repair(options.shards, _find_sources(options.repair), _reading_of(options), options.decode,
                             options.workers, _read_alignments(options.alignments))  # fmt: skip
    for name, fault in faults.items():
        print(f"{name}: made again ({fault.message})")
    for name in indexes:
        print(f"the sample columns of {name}: made again")
    if not faults and not indexes:
        print(f"{options.shards}: nothing is damaged")
    return 0


def _index(options: argparse.Namespace) -> int:
    index, summary, rejected = index_tars(
        options.shards, options.track, options.valid, options.max_duration, options.workers
    )
    print(render(summary, options.shards))
    print(f"{options.shards}: indexed, {counted(len(index.samples), 'sample')} in {counted(len(index.shards), 'tar')}")
    _check_rejected(options.shards, rejected, options.max_reject_rate, REJECTED_HINT)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from sharding.report import inspect  # imports pandas, which no other command needs
    from sharding.shardset.table import read_clips

    store = open_store(options.shards)
    index = read_index(store)
    tables = inspect.tabulate_clips(read_clips(store, index))
    print(inspect.to_json(tables) if options.json else inspect.render(tables))
    if options.plots:
        inspect.write_plots(store, index, open_store(options.plots), options.workers)
        print(f"wrote {', '.join(inspect.PLOTS)} to {options.plots}", file=sys.stderr if options.json else sys.stdout)
    return 0


def _text_of(label: str) -> str:
    """Return a label, or what the file of that name holds. Raises ManifestError for a name of no file."""
    with suppress(OSError, ValueError):  # a label may be too long for a name
        if Path(label).is_file():
            return Path(label).read_text("utf-8").strip()
    if label.endswith(".txt"):
        raise ManifestError(f"--text {label}: there is no such file", "give the label itself, or a file that holds it")
    return label


def _split(options: argparse.Namespace) -> int:
    try:
        waveform, _ = decode(Path(options.audio).read_bytes(), prove=True)
    except FileNotFoundError as error:
        raise AudioError(f"{options.audio}: there is no such file", "name one recording") from error
    except AudioError as error:
        raise AudioError(f"{options.audio}: {error.message}") from error
    name, heard = Path(options.audio).stem, detect_speech(waveform)
    alignments = _read_alignments(options.alignments)
    gates = LabelThresholds(options.min_confidence, alignments.bound(options.max_false_accept), options.min_word_llr)
    text, evidence = read_label(_text_of(options.text), "phonetic"), alignments.of(name)
    sounds = fit([example_of(name, text, waveform)], "phonetic", options.max_false_accept)
    segments = split_recording(name, waveform, text, options.max_duration, heard, evidence, sounds, gates)
    print(f"{len(waveform) / SAMPLE_RATE:.2f} s in {counted(len(segments), 'piece')}")
    for segment in segments:
        mark = " (forced cut)" if segment.forced else ""
        print(
            f"{segment.start_sec:9.3f} – {segment.end_sec:9.3f} s  {segment.label_status:>10} "
            f"{segment.confidence:.2f}{mark}  {segment.text or segment.reason or ''}"
        )
    if options.plot:
        from sharding.report.plots import plot_split  # matplotlib takes a second to import

        write(options.plot, plot_split(name, waveform, heard, find_pauses(heard), segments))
        print(f"wrote {options.plot}")
    return 0


def _demo_corpus(options: argparse.Namespace) -> int:
    make_demo_corpus(Path(options.out), options.minutes, options.children, options.seed)
    return 0


def _commands() -> Commands:
    commands = Commands("python -m sharding", __doc__)
    parser_build = commands.add(
        "build", _build, "Turn audio and labels into tar shards bucketed by duration.", "building {out} of {sources}"
    )
    add = parser_build.add_argument
    add("sources", type=place, nargs="*", metavar="SOURCE", default=[DEFAULT_SOURCES],
        help="a folder with its transcripts (JSONL, CSV or TSV, also .gz and .zst) beside audio/ or audio.zip, "
             "a Common Voice folder, or the transcripts file itself "
             f"(default: every folder in {DEFAULT_SOURCES})")  # fmt: skip
    add(
        "--out",
        type=out_folder,
        default=DEFAULT_OUT,
        help="folder or s3://bucket/prefix of the shard set (default: %(default)s)",
    )
    add("--workers", type=number(1, 1024, int), default=available_cores(),
        help="processes; the result is the same for any number (default: the cores, %(default)s)")  # fmt: skip
    add("--executor", choices=("processes", "dask"), default="processes",
        help="run on this machine, or on a Dask cluster: its scheduler and workers must have this package and its "
             "libraries, workers must have one thread each (dask worker … --nthreads 1) and see the sources and OUT "
             "under the same paths as this machine, or OUT is a bucket (default: %(default)s)")  # fmt: skip
    add("--scheduler", default="", metavar="ADDRESS",
        help="with --executor dask: where its scheduler listens, such as tcp://host:8786")  # fmt: skip
    add("--max-duration", type=number(*LIMITS_SEC), default=MAX_DURATION_SEC,
        help="longer clips are split at pauses, s; lower saves GPU memory (default: %(default)s)")  # fmt: skip
    add("--valid-fraction", type=number(0, 1), default=0.1,
        help="share of the children whose clips are kept for validation (default: %(default)s)")  # fmt: skip
    add("--num-buckets", type=number(1, MAX_BUCKETS, int), default=8,
        help="duration buckets; more pad less, fewer mix lengths more (default: %(default)s)")  # fmt: skip
    add("--shard-mb", type=number(0.01, 65_536), default=64.0,
        help="size of a shard, MiB; larger suits object stores (default: %(default)s)")  # fmt: skip
    add("--min-shards-per-bucket", type=number(1, 100_000, int), default=1,
        help="shards in each bucket at least, as far as it has clips: ranks × workers feeds them all "
             "(default: %(default)s)")  # fmt: skip
    add("--track", choices=TRACKS, default="phonetic",
        help="labels to train on: IPA phones (phonetic_text) or written words (orthographic_text) "
             "(default: %(default)s)")  # fmt: skip
    add("--columns", default="", metavar="FIELD=COLUMN,…",
        help="the columns of a transcripts file that has other names, such as audio_path=path,text=sentence; "
             "fields: " + ", ".join(REQUIRED_FIELDS + OPTIONAL_FIELDS))  # fmt: skip
    add("--follow-links", action="store_true",
        help="also read audio that links lead to outside its source's folder, as git-annex and the Hugging Face cache "
             "lay it out: whoever made the links decides which files are read")  # fmt: skip
    add("--audio-root", default="", metavar="DIR",
        help="take absolute audio paths, as NeMo's manifests have them, that lie below this folder, and look up "
             "relative ones in it instead of in the folder of their transcripts")  # fmt: skip
    add("--group-by", default="", metavar="COLUMN",
        help="keep all clips of one value of this column on one side, training or validation "
             "(default: child_id, else session_id, else each clip by itself)")  # fmt: skip
    _add_gates(parser_build, "what `python -m streamtrain align` has written of shards built of the same sources with "
                             "the same --max-duration: pieces of long recordings then get the words that a model heard "
                             "in them")  # fmt: skip
    add("--append", action="store_true",
        help="add the sources' clips that are not in OUT yet; what is there stays as it is, bins, shards and "
             "validation speakers; a run that began before goes on with the clips it began with")  # fmt: skip
    add("--dry-run", action="store_true", help="examine, decode and plan everything, and write nothing")
    add("--max-reject-rate", type=number(0, 1), default=0.01,
        help="share of rejected clips above which the finished command fails (default: %(default)s)")  # fmt: skip

    parser_verify = commands.add("verify", _verify, "Check every shard against the index.", "checking {shards}")
    parser_verify.add_argument("shards", type=place, help="folder or URL of the shard set")
    parser_verify.add_argument("--decode", action="store_true", help="decode every clip as well")
    parser_verify.add_argument(
        "--repair", type=place, nargs="+", metavar="SOURCE",
        help="all the sources that it was built of, appended ones too: make what is damaged again, to the same bytes",
    )  # fmt: skip
    parser_verify.add_argument("--columns", default="", metavar="FIELD=COLUMN,…", help="as it was built with")
    parser_verify.add_argument("--alignments", type=place, metavar="FILE", help="as it was built with")
    parser_verify.add_argument("--follow-links", action="store_true", help="as it was built with")
    parser_verify.add_argument("--audio-root", default="", metavar="DIR", help="as it was built with")
    parser_verify.add_argument(
        "--workers", type=number(1, 1024, int), default=available_cores(),
        help="processes (default: the cores, %(default)s)",
    )  # fmt: skip

    parser_inspect = commands.add(
        "inspect", _inspect, "Show what a shard set holds, by split, bucket, corpus and age.", "reading {shards}"
    )
    add = parser_inspect.add_argument
    add("shards", type=place, help="folder or URL of the shard set")
    add("--json", action="store_true", help="print the tables as one JSON object, for programs")
    add("--plots", type=out_folder, metavar="DIR",
        help="write plots of durations, loudness, symbols per second and label symbols there, as PNG; "
             "this reads all the audio")  # fmt: skip
    add("--workers", type=number(1, 1024, int), default=available_cores(),
        help="processes that read the audio for --plots (default: the cores, %(default)s)")  # fmt: skip

    parser_index = commands.add(
        "index", _index, "Make an index for WebDataset tars that others wrote.", "indexing the tars of {shards}"
    )
    add = parser_index.add_argument
    add("shards", type=place,
        help="folder or URL with the tars: flac, wav, mp3 or ogg of each sample, and its label as txt, or in "
             "a json as text, phonetic_text or orthographic_text")  # fmt: skip
    add("--valid", nargs="+", metavar="PATTERN",
        help="tars to validate on, by their names below that folder; each must fit one "
             f"(default: {' '.join(VALID_TARS)}, if there are such)")  # fmt: skip
    add("--track", choices=TRACKS, default="phonetic", help="what the labels are (default: %(default)s)")
    add("--max-duration", type=number(*LIMITS_SEC), default=MAX_DURATION_SEC,
        help="longer samples are rejected, s (default: %(default)s)")  # fmt: skip
    add("--workers", type=number(1, 1024, int), default=available_cores(),
        help="processes (default: the cores, %(default)s)")  # fmt: skip
    add("--max-reject-rate", type=number(0, 1), default=0.01,
        help="share of rejected samples above which the finished command fails (default: %(default)s)")  # fmt: skip

    parser_split = commands.add(
        "split",
        _split,
        "Show where one long recording would be cut, and what each piece would hold, by the sounds of its own label "
        "alone: a build knows those of the whole corpus.",
        "cutting {audio}",
    )
    parser_split.add_argument("audio", type=place, help="audio file")
    parser_split.add_argument("--text", default="", help="its label, or a text file that holds it")
    _add_gates(parser_split, "what `python -m streamtrain align` has written of it, and of others like it")
    parser_split.add_argument(
        "--plot",
        type=out_file(PNG),
        metavar="PNG",
        help="a picture of the sound, where speech is heard, the pauses, the cuts and the words",
    )
    parser_split.add_argument(
        "--max-duration",
        type=number(*LIMITS_SEC),
        default=MAX_DURATION_SEC,
        help="longest segment, s (default: %(default)s)",
    )

    parser_demo = commands.add(
        "demo-corpus", _demo_corpus, "Make a small synthetic corpus, spoken by espeak-ng.",
        "making {minutes:g} minutes of speech by {children} children in {out}",
    )  # fmt: skip
    parser_demo.add_argument("out", type=out_folder, help="folder to make the two corpora in")
    parser_demo.add_argument(
        "--minutes", type=number(0.1, 100_000), default=30.0, help="speech to make, min (default: %(default)s)"
    )
    parser_demo.add_argument(
        "--children", type=number(2, 10_000, int), default=24, help="voices (default: %(default)s)"
    )
    parser_demo.add_argument(
        "--seed", type=number(0, 2**32, int), default=0, help="another seed, another corpus (default: %(default)s)"
    )
    return commands


def _add_gates(parser: argparse.ArgumentParser, alignments: str) -> None:
    """What decides whether a piece of a long recording keeps its words."""
    add = parser.add_argument
    add("--alignments", type=place, metavar="FILE", help=alignments)
    add("--min-confidence", metavar="P", type=number(0, 1), default=LabelThresholds.min_confidence,
        help="a piece keeps its words if each of its cuts falls where it should with this probability "
             "(default: %(default)s)")  # fmt: skip
    add("--max-false-accept", metavar="SHARE", type=number(0, 1), default=MAX_FALSE_ACCEPT,
        help="and if what is heard in it is hardly likelier than its words: by so little that only this share of "
             "labels with a word left out would pass, as trials show. Where hardly any would, those that are "
             "heard best do, unless this is 0; all do if it is 1 (default: %(default)s)")  # fmt: skip
    add("--min-word-llr", metavar="NATS", type=number(-1_000, 1_000), default=LabelThresholds.min_word_llr,
        help="and if each of its words is heard: its label is likelier with the word than without it, by at least so "
             "many nats (default: %(default)s). Whatever these say, it loses them if two words are likelier the other "
             "way round, if one goes on after a pause, or if somebody speaks where no word is heard")  # fmt: skip
