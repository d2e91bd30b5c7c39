"""Build, index, verify and inspect shard sets; make a demo corpus; try the splitter on a file."""

import glob
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from sharding.command import (
    CORES,
    PNG,
    WHOLE,
    OutFolder,
    Place,
    Workers,
    announce,
    new_app,
    out_file,
    run,
    several,
    shortened,
)
from sharding.errors import AudioError, ManifestError, ShardError, StreamtrainError, counted
from sharding.files.document import Fraction, Number
from sharding.labels.profiles import TRACKS, allow_profile
from sharding.labels.units import Units
from sharding.shardset.build_config import BuildConfig, MaxDuration, WordLLR, checked

if TYPE_CHECKING:
    from sharding.audio.codec import Waveform
    from sharding.audio.vad import SpeechActivity
    from sharding.build.pipeline import BuildResult
    from sharding.segment.evidence import Alignments
    from sharding.segment.split import Segment
    from sharding.sources.options import ManifestOptions

# Imports stay inside the commands, so that each tells at once what it begins.

DEFAULTS = BuildConfig()
Track = Literal["phonetic", "word"]
DEFAULT_SOURCES = "data/raw/*"
REJECTED_HINT = "report/ledger.jsonl.zst has the reason for each; the set is whole and can be used if they are right"
REPORT_HINT = "copy it again, with all that is in report/; a set older than its sums gets them with the next --append"
APPENDING = (
    "an --append has begun and not ended, and report/ may tell of it; if it was killed, give the same command again, "
    "or --append clips that are there already, to be rid of it"
)

SHARDS = Group("Shards", sort_key=1)

app = new_app("python -m sharding", __doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(app, arguments)


@Parameter(name="*")
@dataclass(frozen=True)
class ReadingOptions:
    """Hold how the rows and the audio of sources are read."""

    columns: Annotated[str, Parameter(metavar="FIELD=COLUMN,…")] = ""
    """The columns of a transcripts file that has other names, such as audio_path=path,text=sentence. Fields:
    utterance_id, audio_path, text, child_id, session_id, audio_duration_sec, age_bucket, md5_hash, filesize_bytes,
    split; offset_sec and duration_sec, if a row is a range of a longer recording."""
    follow_links: bool = False
    """Also read audio that links lead to outside its source's folder, as git-annex and the Hugging Face cache lay it
    out: whoever made the links decides which files are read."""
    audio_root: Annotated[str, Parameter(metavar="FOLDER")] = ""
    """Take absolute audio paths, as NeMo's manifests have them, that lie below this folder, and look up relative ones
    in it instead of in the folder of their transcripts."""
    labels: Literal["text", "phones"] = "text"
    """Of a corpus with both, such as TIMIT: learn its sentences, or its phones."""
    include_sa: bool = False
    """Also read TIMIT's SA sentences: all speakers read the same two, those of the test as well."""
    alignments: Place | None = None
    """What `align` has written of shards of the same sources with the same --max-duration: segments of long recordings
    then get the words that a model heard in them."""

    def manifest_options(self) -> "ManifestOptions":
        from sharding.sources.manifest import parse_columns
        from sharding.sources.options import ManifestOptions

        columns = parse_columns(self.columns)
        return ManifestOptions(
            columns=columns,
            follow_links=self.follow_links,
            audio_root=self.audio_root,
            labels=self.labels,
            include_sa=self.include_sa,
        )


@app.command(group=SHARDS, help_epilogue="Example: streamtrain build data/raw/* --out data/shards --max-duration 25")
def build(
    sources: Annotated[list[str], several("SOURCE")] = [DEFAULT_SOURCES],  # noqa: B006 (cyclopts copies it)
    /,
    *,
    out: OutFolder = "data/shards",
    config: BuildConfig = DEFAULTS,
    track: Track | None = None,
    reading: ReadingOptions = ReadingOptions(),
    workers: Workers = CORES,
    append: bool = False,
    dry_run: bool = False,
    max_reject_rate: Fraction = 0.01,
    scheduler: Annotated[str, Parameter(metavar="ADDRESS")] = "",
) -> None:
    """Turn audio and labels into tar shards bucketed by duration.

    Args:
        sources: Folders with their transcripts (JSONL, CSV or TSV, also .gz and .zst) beside audio/ or audio.zip, or
            transcripts files; corpora as they are published: Common Voice, LibriSpeech, Kaldi data folders, manifests
            of NeMo, cuts of lhotse, TIMIT, datasets in parquet files.
        out: Folder or s3://bucket/prefix of the shard set.
        track: The challenge's name of a profile: phonetic is pasketti, word is english.
        workers: Processes (default: the cores); the result is the same for any number.
        append: Add the sources' clips that are not in OUT yet; what is there stays as it is, bins, shards and
            validation speakers. A run that began before goes on with the clips it began with.
        dry_run: Examine, decode and plan everything, and write nothing.
        max_reject_rate: Share of rejected clips above which the finished command fails.
        scheduler: Run on the Dask cluster whose scheduler listens there, such as tcp://host:8786. Its scheduler and
            workers must have this package and its libraries. Workers must have one thread each (dask worker …
            --nthreads 1), and see the sources and OUT under the same paths as this machine, or OUT is a bucket.
    """
    announce(f"building {out} of {shortened(sources)}")
    _check_scheduler(scheduler, dry_run)
    from sharding.build.pipeline import RunOptions
    from sharding.build.pipeline import build as build_shards
    from sharding.report.summary import render

    alignments = _read_alignments(reading.alignments)
    config = checked(asdict(config) | {"alignments": alignments.digest, "profile": _profile_of(config.profile, track)})
    how = RunOptions(workers, reading.manifest_options(), dry_run, append, scheduler, alignments)
    built = build_shards(_find_sources(sources), out, config, how)
    if built.summary:
        print(render(built.summary, out, dry_run))
    if built.known:
        print(f"{built.known:,} of the clips to append were there already, and stay as they are")
    done = "would be built so; nothing was written" if dry_run else "built"
    same = "was built before from the same rows, and audio of the same sizes; nothing to do"
    print(f"{out}: {done if built.built else same}")
    _check_rejected(out, built.rejected, max_reject_rate, _hint_of(built, dry_run))


def _hint_of(built: "BuildResult", dry_run: bool) -> str:
    """Return what to do if many clips were rejected."""
    from sharding.build.alphabet import RARE

    hint = "look at the files named above" if dry_run else REJECTED_HINT
    if built.summary and any(reason.startswith(RARE) for reason in built.summary["reasons"]):
        hint += "; --min-symbol-count 1 keeps clips with rare symbols, if these are no typing errors"
    return hint


def _profile_of(profile: str, track: Track | None) -> str:
    """Return the profile that --profile or --track names. Raises StreamtrainError if they name different ones."""
    if track and profile not in ("", TRACKS[track]):
        raise StreamtrainError(f"--track {track} is profile {TRACKS[track]!r}, --profile is {profile!r}", "give one")
    return TRACKS[track] if track else profile


def _read_alignments(path: str | None) -> "Alignments":
    from sharding.segment.evidence import NO_ALIGNMENTS, read_alignments

    return read_alignments(Path(path)) if path else NO_ALIGNMENTS


def _check_rejected(where: str, rejected: float, allowed: float, hint: str) -> None:
    if rejected > allowed:
        raise ShardError(
            f"{where}: {rejected:.1%} of the clips were rejected, --max-reject-rate allows {allowed:.1%}", hint
        )


def _check_scheduler(scheduler: str, dry_run: bool) -> None:
    if scheduler and not re.fullmatch(r"(tcp|tls)://\S+:\d+", scheduler):
        raise StreamtrainError(f"--scheduler {scheduler}: an address such as tcp://host:8786 is expected")
    if scheduler and dry_run:  # segments of long recordings pass from worker to worker in OUT
        raise StreamtrainError("--dry-run writes nothing, not even what Dask's workers need: leave --scheduler out")


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
    """Return the paths that match a pattern; the pattern itself if none does, or if something has that very name."""
    path = Path(pattern)
    there = next(above for above in (path, *path.parents) if os.path.lexists(above))
    names = glob.glob(str(path.relative_to(there)), root_dir=there)
    return sorted(there / name for name in names) or [path]


@app.command(group=SHARDS, help_epilogue="Example: streamtrain verify data/shards --decode")
def verify(
    shards: Place,
    /,
    *,
    decode: bool = False,
    repair: Annotated[list[str], several("SOURCE")] = [],  # noqa: B006
    reading: ReadingOptions = ReadingOptions(),
    workers: Workers = CORES,
) -> None:
    """Check every shard against the index, or make damaged ones again.

    Args:
        shards: Folder or URL of the shard set.
        decode: Decode every clip as well.
        repair: All the sources that the set was built of, appended ones too: make what is damaged again, to the same
            bytes. Give --columns, --alignments and the like as the set was built with.
        workers: Processes (default: the cores).
    """
    announce(f"checking {shards}")
    if repair:
        _repair(shards, repair, reading, decode, workers)
        return
    from sharding.report import files as report
    from sharding.shardset.index import REBUILT_HINT, read_index
    from sharding.shardset.store import open_store
    from sharding.shardset.verify import check_older_indexes, find_faults

    store = open_store(shards)
    index = read_index(store)
    faults = find_faults(shards, index, decode, workers)
    for fault in faults.values():
        print(fault.message, file=sys.stderr)
    if faults:
        again = f"make them again from their sources: streamtrain verify {shards} --repair SOURCE…"
        mendable = any(fault.mendable for fault in faults.values())
        raise ShardError(
            f"{shards}: {len(faults)} of {len(index.shards)} shards are damaged, or not as the index says",
            again if mendable else REBUILT_HINT,
        )
    check_older_indexes(store, index)
    for message in (report_faults := report.check_report(store, index)):
        print(message, file=sys.stderr)
    if report_faults:
        raise ShardError(f"{shards}: the shards are sound, the report is not", REPORT_HINT)
    if report.is_archived(store, index):
        print(f"{shards}: {APPENDING}", file=sys.stderr)
    holds = f"{counted(len(index.shards), 'shard')}, {counted(len(index.samples), 'sample')}"
    print(f"{shards}: {holds}, all as the index says")


def _repair(shards: str, sources: Sequence[str], reading: ReadingOptions, decode: bool, workers: int) -> None:
    from sharding.build.repair import repair

    alignments = _read_alignments(reading.alignments)
    options = reading.manifest_options()
    faults, indexes = repair(shards, _find_sources(sources), options, decode, workers, alignments)
    for name, fault in faults.items():
        print(f"{name}: made again ({fault.message})")
    for name in indexes:
        print(f"the sample columns of {name}: made again")
    if not faults and not indexes:
        print(f"{shards}: nothing is damaged")


@app.command(group=SHARDS, help_epilogue="Example: streamtrain index s3://speech/tars --valid 'dev-*' --profile text")
def index(
    shards: Place,
    /,
    *,
    valid: Annotated[list[str], several("PATTERN")] = [],  # noqa: B006
    test: Annotated[list[str], several("PATTERN")] = [],  # noqa: B006
    profile: Annotated[str, Parameter(metavar="NAME")] = "text",
    units: Units | None = None,
    alphabet: Annotated[str, Parameter(metavar="profile|data|FILE")] = "",
    min_symbol_count: Annotated[int, Field(ge=1), WHOLE] = DEFAULTS.min_symbol_count,
    max_duration: MaxDuration = DEFAULTS.max_duration,
    workers: Workers = CORES,
    max_reject_rate: Fraction = 0.01,
) -> None:
    """Make an index for WebDataset tars that others wrote.

    Args:
        shards: Folder or URL with the tars: flac, wav, mp3 or ogg of each sample, and its label as txt, or in a json
            as text, or in the profile's field: phonetic_text, orthographic_text; there also child_id, session_id,
            corpus, age_bucket.
        valid: Tars to validate on, by their names below that folder; each pattern must fit one (default: `*val*` and
            `*dev*`, if there are such).
        test: Likewise tars that are neither trained nor validated on (default: those with a part `test` in their
            names, such as test-0.tar, en-test.tar and test/0.tar, if there are such).
        profile: Normal form of the labels, as in `build`.
        units: Symbols of a label, as in `build`.
        alphabet: Symbols that may be trained on, as in `build`.
        min_symbol_count: As in `build`, for the alphabet of the data.
        max_duration: Longer samples are rejected, s.
        workers: Processes (default: the cores).
        max_reject_rate: Share of rejected samples above which the finished command fails.
    """
    announce(f"indexing the tars of {shards}")
    from sharding.build.alphabet import WantedSymbols, choose_alphabet
    from sharding.build.external import index_tars
    from sharding.labels.policy import policy_of
    from sharding.report.summary import render

    allow_profile(profile)
    labels, _ = choose_alphabet(policy_of(profile, units), alphabet)
    held_out, wanted = {"valid": valid, "test": test}, WantedSymbols(min_symbol_count, alphabet)
    made, summary, rejected = index_tars(shards, labels, held_out, max_duration, workers, wanted)
    print(render(summary, shards))
    print(f"{shards}: indexed, {counted(len(made.samples), 'sample')} in {counted(len(made.shards), 'tar')}")
    _check_rejected(shards, rejected, max_reject_rate, REJECTED_HINT)


@app.command(group=SHARDS, help_epilogue="Example: streamtrain inspect data/shards --plots plots")
def inspect(shards: Place, /, *, json: bool = False, plots: OutFolder | None = None, workers: Workers = CORES) -> None:
    """Show what a shard set holds, by split, bucket, corpus and age.

    Args:
        shards: Folder or URL of the shard set.
        json: Print the tables as one JSON object, for programs.
        plots: Write plots of durations, loudness, symbols per second and label symbols there, as PNG; this reads all
            the audio.
        workers: Processes that read the audio for --plots (default: the cores).
    """
    announce(f"reading {shards}")
    from sharding.report import inspect as tables
    from sharding.shardset.index import read_index
    from sharding.shardset.store import open_store
    from sharding.shardset.table import read_clips

    store = open_store(shards)
    header = read_index(store)
    clips = tables.tabulate_clips(read_clips(store, header))
    print(tables.to_json(clips) if json else tables.render(clips))
    if plots:
        tables.write_plots(store, header, open_store(plots), workers)
        print(f"wrote {', '.join(tables.PLOTS)} to {plots}", file=sys.stderr if json else sys.stdout)


@app.command(group=SHARDS, help_epilogue="Example: streamtrain split long.flac --text long.txt --plot cuts.png")
def split(
    audio: Place,
    /,
    *,
    text: str = "",
    profile: Annotated[str, Parameter(metavar="NAME")] = "pasketti",
    units: Units | None = None,
    alignments: Place | None = None,
    max_duration: MaxDuration = DEFAULTS.max_duration,
    min_confidence: Fraction = DEFAULTS.min_confidence,
    max_false_accept: Fraction = DEFAULTS.max_false_accept,
    min_word_llr: WordLLR = DEFAULTS.min_word_llr,
    plot: Annotated[Path | None, out_file(PNG)] = None,
) -> None:
    """Show where one long recording would be cut, and what each segment would hold.

    It knows the sounds of this recording's label alone; a build knows those of the whole corpus.

    Args:
        audio: Audio file.
        text: Its label, or a text file that holds it.
        profile: Normal form of the label, as in `build`.
        units: Symbols of the label, as in `build`.
        alignments: What `align` has written of it, and of others like it.
        max_duration: Longest segment, s.
        min_confidence: As in `build`, whose help explains when a segment keeps its words.
        max_false_accept: As in `build`.
        min_word_llr: As in `build`.
        plot: Draw the sound, where speech is heard, the pauses, the cuts and the words, as PNG.
    """
    announce(f"cutting {audio}")
    from sharding.audio.codec import SAMPLE_RATE
    from sharding.audio.vad import detect_speech
    from sharding.labels.policy import policy_of
    from sharding.segment.acoustic_model import example_of, fit
    from sharding.segment.split import LabelThresholds, split_recording

    waveform = _decode(audio)
    name, activity, aligned = Path(audio).stem, detect_speech(waveform), _read_alignments(alignments)
    gates = LabelThresholds(min_confidence, aligned.bound(max_false_accept), min_word_llr)
    allow_profile(profile)
    labels = policy_of(profile, units)
    label, evidence = labels.normalize(_text_of(text)), aligned.of(name)
    labels = labels.with_symbols_of(label)
    model = fit([example_of(name, label, waveform)], labels, max_false_accept)
    segments = split_recording(name, waveform, label, max_duration, activity, evidence, model, gates, labels)
    print(f"{len(waveform) / SAMPLE_RATE:.2f} s in {counted(len(segments), 'segment')}")
    print("\n".join(map(_render_segment, segments)))
    if plot:
        _draw_split(plot, name, waveform, activity, segments)


def _draw_split(
    plot: Path, name: str, waveform: "Waveform", activity: "SpeechActivity", segments: Sequence["Segment"]
) -> None:
    from sharding.audio.vad import find_pauses
    from sharding.files.writing import write
    from sharding.report.plots import plot_split  # matplotlib takes a second to import

    write(plot, plot_split(name, waveform, activity, find_pauses(activity), segments))
    print(f"wrote {plot}")


def _decode(audio: str) -> "Waveform":
    from sharding.audio.codec import decode

    try:
        return decode(Path(audio).read_bytes(), prove=True)[0]
    except FileNotFoundError as error:
        raise AudioError(f"{audio}: there is no such file", "name one recording") from error
    except AudioError as error:
        raise AudioError(f"{audio}: {error.message}") from error


def _render_segment(segment: "Segment") -> str:
    span = f"{segment.start_sec:9.3f} – {segment.end_sec:9.3f} s  {segment.label_status:>10}"
    mark = " (forced cut)" if segment.forced else ""
    return f"{span} {segment.confidence:.2f}{mark}  {segment.text or segment.reason or ''}"


def _text_of(label: str) -> str:
    """Return a label, or what the file of that name holds. Raises ManifestError for a name of no file."""
    with suppress(OSError, ValueError):  # a label may be too long for a name
        if Path(label).is_file():
            return Path(label).read_text("utf-8").strip()
    if label.endswith(".txt"):
        raise ManifestError(f"--text {label}: there is no such file", "give the label itself, or a file that holds it")
    return label


@app.command(group=SHARDS, help_epilogue="Example: streamtrain demo-corpus data/demo/raw --minutes 24")
def demo_corpus(
    out: OutFolder,
    /,
    *,
    minutes: Annotated[Number, Field(ge=0.1, le=100_000)] = 30.0,
    children: Annotated[int, Field(ge=2, le=10_000), WHOLE] = 24,
    seed: Annotated[int, Field(ge=0, le=2**32), WHOLE] = 0,
) -> None:
    """Make a small synthetic corpus, spoken by espeak-ng.

    Args:
        out: Folder to make the two corpora in.
        minutes: Speech to make, min.
        children: Voices.
        seed: Another seed, another corpus.
    """
    announce(f"making {minutes:g} minutes of speech by {children} children in {out}")
    from sharding.sources.synthetic import make_demo_corpus

    make_demo_corpus(Path(out), minutes, children, seed)
