"""From sources to a shard set: examine every clip, split the long ones, plan the shards, write them, publish the index.

What goes where is planned from headers alone, so the same input and settings make the same bytes whatever the number
of workers; each clip is then decoded once, by the worker that writes it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sharding.report import files as report
from sharding.segment.evidence import NO_ALIGNMENTS, MAX_FALSE_ACCEPT, Alignments, Evidence
from sharding.build.assign import (
    SplitExceptions,
    Mask,
    PlannedTable,
    PlannedShard,
    Segments,
    assign_shards,
    choose_exceptions,
    is_validation,
    list_samples,
)
from sharding.audio.codec import SAMPLE_RATE
from sharding.shardset.object_store import BucketStore
from sharding.build.duration_buckets import fit_bins
from sharding.build.dask import ClusterWorkers
from sharding.segment.cuts import MAX_DURATION_SEC
from sharding.errors import ManifestError, ShardError
from sharding.build.scan import ScanResult, scan, find_orphans, hash_128, hash_sources
from sharding.build.write import (
    CutJob,
    ExampleJob,
    PlannedSample,
    SegmentRef,
    ManifestLine,
    ShardJob,
    ShardResult,
    BuildContext,
    cut_recording,
    read_example,
    make_shard,
)
from sharding.shardset.index import (
    INDEX_NAME,
    ShardIndex,
    check_presence,
    join_samples,
    archive_index,
    pack_index,
    read_index,
    read_checked,
    write_index,
)
from sharding.labels.ipa import SymbolCounts, check_alphabet, read_label
from sharding.report.ledger import LedgerPart, LedgerRow, Tally, sum_tallies, rejected_row, same_rows, write_ledger
from sharding.build.lock import BuildLock, exclusive_build
from sharding.sources.manifest import ManifestOptions, Source, read_sources
from sharding.build.place import PIECES, check_output
from sharding.shardset.sample import escape_key, whole_key
from sharding.shardset.schema import SPLITS
from sharding.segment.acoustic_model import PhoneGMM, fit, unpack_model
from sharding.segment.split import LabelThresholds
from sharding.shardset.store import FolderStore, Store, open_store
from sharding.report.summary import Summary
from sharding.pool import Workers, available_cores
from sharding.files.writing import remove

LABELS_SAMPLED, MIN_WORDS, ONE_SYMBOL_SHARE = 100, 50, 0.9  # of labels whose phones blanks part
FIT_SEC = 2_400.0  # of labelled speech, from which the sounds of the symbols are learned …
FIT_MIN_SEC = 120.0  # … and so many at least: less would know its own mistakes by heart
FIT_MAX_CLIP_SEC = 600.0  # no longer recording is learned from


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """All that decides the bytes of a shard set, beside its sources."""

    max_duration: float = MAX_DURATION_SEC
    valid_fraction: float = 0.1
    num_buckets: int = 8
    shard_mb: float = 64.0
    min_shards_per_bucket: int = 1
    track: str = "phonetic"
    group_by: str = ""
    min_confidence: float = LabelThresholds.min_confidence
    max_false_accept: float = MAX_FALSE_ACCEPT
    min_word_llr: float = LabelThresholds.min_word_llr
    alignments: str = ""  # digest of what a model has aligned

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What does not change a byte of the shards."""

    workers: int = field(default_factory=available_cores)
    manifest_options: ManifestOptions = field(default_factory=ManifestOptions)
    dry_run: bool = False
    append: bool = False
    scheduler: str = ""  # of a Dask cluster whose workers to use instead
    alignments: Alignments = NO_ALIGNMENTS


@dataclass(frozen=True, eq=False)
class BuildTask:
    """What is to be built: of which clips, how, and beside which shards that are there already."""

    scan: ScanResult
    settings: BuildConfig
    base: ShardIndex | None = None
    alignments: Alignments = NO_ALIGNMENTS

    @cached_property
    def exceptions(self) -> SplitExceptions:
        """Choose among the speakers of clips with labels; those of a `base` stay on the side where they are."""
        clips, fraction = self.scan.clips, self.settings.valid_fraction
        kept = SplitExceptions() if self.base is None else _exceptions_of(self.base)
        if self.base is not None and self.base.notes["validation"]["clips"]:
            return kept
        return choose_exceptions(clips["speaker"][clips["fits"]], fraction, kept.kept_in_training)

    @cached_property
    def valid(self) -> Mask:
        """Which clips validate."""
        return is_validation(self.scan.clips["speaker"], self.settings.valid_fraction, self.exceptions)


@dataclass(frozen=True)
class BuildResult:
    """What a build has made, for its caller to print."""

    index: ShardIndex
    summary: Summary | None  # None where its report was left behind
    rejected: float  # share of the clips of the sources
    built: bool = True  # False where there was nothing to do
    known: int = 0  # clips that were there already, of those to append


def build(locations: Sequence[Path], out: str, settings: BuildConfig, run: RunOptions) -> BuildResult:
    """Build the shard set OUT from the sources. Raises StreamtrainError for what the user can mend."""
    sources = read_sources(locations, replace(run.manifest_options, track=settings.track, group_by=settings.group_by))
    sources = [_with_absolute_path(source) for source in sources]  # workers may be elsewhere
    store = open_store(out, dry_run=run.dry_run)
    check_output(open_store(out), locations)
    with ClusterWorkers(run.scheduler) if run.scheduler else Workers(run.workers) as pool:
        examined = scan(sources, settings.track, pool)
        _warn_of_spaced_phones(examined, settings.track)
        orphans = find_orphans(examined, pool)
        base = _read_base(store, settings)
        if base:
            check_presence(store, base)
        if base and not run.append:
            return _result_of_existing(store, base, examined)  # in a place, maybe, where nothing can be written
        with nullcontext(BuildLock()) if run.dry_run else exclusive_build(store) as lease:
            base = _read_base(store, settings)  # another build may have ended a moment ago
            if base and not run.append:
                return _result_of_existing(store, base, examined)
            known = _find_known(store, base, examined) if base else np.zeros(len(examined.clips), bool)
            examined = examined.select(~known)
            if base and not len(examined.clips):
                report.restore_archived(store, base)
                return BuildResult(base, report.read_summary(store, base), 0.0, built=False, known=len(known))
            task = BuildTask(examined, settings, base, run.alignments)
            _check_labels(task)
            old_rows, old_orphans = report.archive_report(store, base) if base else ([], [])
            plan, results, ledger = _make_shards(store, lease, pool, task, run)
            tally = sum_tallies(ledger)
            rejected = tally.clips["rejected"] / max(len(known), 1)
            if base:
                ledger.insert(0, _keep_ledger_rows(old_rows, examined))
                tally = sum_tallies(ledger)
            index = _index(plan, results, tally)
            orphans = sorted({*old_orphans, *orphans})
            told = orphans == old_orphans and same_rows(ledger, old_rows)
            if base and told and len(index.samples) == len(base.samples):
                report.restore_archived(store, base)  # nothing new to train on, nor to tell: no run need see another
                return BuildResult(base, report.read_summary(store, base), rejected, known=int(known.sum()))
            packed = pack_index(index)
            summary = report.publish(store, ledger, tally, packed.index, orphans, examined.ignored_fields)
            lease.check()
            if base:
                archive_index(store, base)
            write_index(store, packed)  # last: it says that all the rest is there
            if base:
                report.drop_archived(store, base)
            return BuildResult(packed.index, summary, rejected, known=int(known.sum()))


def _check_labels(task: BuildTask) -> None:
    """Raise ManifestError if the labels of either side are of another alphabet."""
    clips, track = task.scan.clips, task.settings.track
    for side, mine in (("training", ~task.valid), ("validation", task.valid)):
        symbols, foreign = (int(clips[name][mine].sum()) for name in ("symbols", "foreign"))
        if foreign:
            place, utterance = task.scan.find(int(np.argmax(np.where(mine, clips["foreign"], 0))))
            worst = (foreign, place, read_label(utterance.text, track))
            check_alphabet(SymbolCounts(symbols, foreign, worst), side, track)


def _warn_of_spaced_phones(examined: ScanResult, track: str) -> None:
    """Say so if a blank follows each phone in the labels, some of which are looked at: each is a word then."""
    chosen = np.unique(np.linspace(0, len(examined.clips) - 1, LABELS_SAMPLED).astype(int))
    labels = (read_label(examined.find(row)[1].text, track) for row in chosen.tolist())
    lengths = [len(word) for label in labels for word in label.split()]
    if track == "phonetic" and len(lengths) >= MIN_WORDS and lengths.count(1) > ONE_SYMBOL_SHARE * len(lengths):
        print(f"{lengths.count(1):,} of {len(lengths):,} words of the labels are one symbol: are these phones parted "
              "by blanks? Each is learned as a word of its own, with the blank", file=sys.stderr)  # fmt: skip


def _make_shards(
    store: Store, lease: BuildLock, pool: Workers, task: BuildTask, run: RunOptions
) -> tuple["ShardPlan", list[ShardResult], list[LedgerPart]]:
    """Plan the shards, and write them."""
    with _scratch(store, shared=bool(run.scheduler)) as scratch:
        layouts = tuple(source.layout for source in task.scan.sources)
        out, scratch = _absolute(store.url), f"{scratch}/{lease.token}"
        token = lease.token if run.scheduler else ""  # workers of this machine die with the build
        context = BuildContext(out, scratch, layouts, task.settings.track, run.dry_run, token)
        plan, ledger = plan_build(task, context, pool)
        _delete_unfinished(store, plan, lease)
        results = write_shards(plan, plan.shards, pool)
        _delete_unfinished(store, plan, lease)  # a worker may have died, and another done its work
    return plan, results, ledger + [result.ledger for result in results]


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """What every shard is to hold."""

    task: BuildTask
    context: BuildContext
    segments: Segments
    samples_planned: PlannedTable
    bins: tuple[float, ...]
    shards: list[PlannedShard]
    acoustic_model: PhoneGMM | None

    def job(self, shard: PlannedShard) -> ShardJob:
        name, bucket, rows = shard
        members = self.samples_planned[rows]
        lines = _read_rows(self.task.scan, members["clip"])
        clips = self.task.scan.clips[members["clip"]]
        pieces = [None if whole else self._piece(clip, piece)
                  for whole, clip, piece in members[["whole", "clip", "piece"]].tolist()]  # fmt: skip
        chosen = tuple(map(PlannedSample, lines, clips["bytes"].tolist(), clips["samples"].tolist(), pieces))
        return ShardJob(self.context, name, bucket, name.split("/")[0], chosen)

    def _piece(self, clip: int, number: int) -> SegmentRef:
        segments = self.segments[clip]
        return SegmentRef(number, len(segments), segments[number])


def plan_build(task: BuildTask, context: BuildContext, pool: Workers, acoustic_model: PhoneGMM | None = None) -> tuple[ShardPlan, list[LedgerPart]]:
    """Split what is long, and say what every shard is to hold; with the ledger's rows of all that is decided so far.

    What is added to a `base` goes into shards of its own, in the bins that are there. The `sounds` of the symbols are
    its own too, or learned, where they are not given and somebody needs them.
    """
    clips, settings, base = task.scan.clips, task.settings, task.base
    usable, refused = _drop_refused(task)
    long = usable & (clips["samples"] > round(settings.max_duration * SAMPLE_RATE))
    labelled = usable & clips["fits"] & ~task.valid
    if acoustic_model is None and base and base.acoustic_model:
        acoustic_model = unpack_model(base.acoustic_model)
    if acoustic_model is None and (labelled & long).any():
        acoustic_model = _fit_acoustic_model(task, context, pool, labelled, long)
    segments, cuts = _cut_long(task, context, pool, long, acoustic_model)
    members = list_samples(clips, usable & ~long, segments, task.valid)
    bins = base.duration_bins if base else fit_bins(members["samples"] / SAMPLE_RATE, settings.num_buckets)
    taken = _next_numbers(base) if base else None
    shards = assign_shards(members, bins, round(settings.shard_mb * 2**20), settings.min_shards_per_bucket, taken)
    return ShardPlan(task, context, segments, members, bins, shards, acoustic_model), [refused, *cuts]


def write_shards(plan: ShardPlan, shards: Sequence[PlannedShard], pool: Workers) -> list[ShardResult]:
    """Write shards, the most work first so that no worker is left alone at the end; results in the order given."""
    order = sorted(range(len(shards)), key=lambda i: -int(plan.samples_planned["work"][shards[i][2]].sum()))
    jobs = (plan.job(shards[i]) for i in order)
    results = pool.map(make_shard, jobs, [len(shards[i][2]) for i in order], "writing")
    in_order = dict(zip(order, results, strict=True))
    return [in_order[i] for i in range(len(shards))]


def _drop_refused(task: BuildTask) -> tuple[Mask, LedgerPart]:
    """Which clips are left, and the ledger's rows of those that the examination refused."""
    valid = task.valid
    usable, rows = np.ones(len(valid), bool), []
    for row, refusal in task.scan.refusals.items():
        if not (refusal.in_training and valid[row]):
            usable[row] = False
            seconds = int(task.scan.clips["samples"][row]) / SAMPLE_RATE
            rows.append(rejected_row(refusal.utterance, "valid" if valid[row] else "train", refusal.reason, seconds))
    return usable, write_ledger(sorted(rows, key=lambda row: str(row["utterance_id"])))


def _fit_acoustic_model(task: BuildTask, context: BuildContext, pool: Workers, labelled: Mask, long: Mask) -> PhoneGMM | None:
    """The sounds of some of the labels, half of them of long recordings where there are both; None of too few."""
    clips, settings = task.scan.clips, task.settings
    order = np.lexsort(clips["key"].T[::-1])
    order = order[labelled[order] & (clips["samples"][order] <= FIT_MAX_CLIP_SEC * SAMPLE_RATE)]
    rows, seconds = dict[int, None](), 0.0  # in the order in which they are learned from
    for some, enough in ((long, FIT_SEC / 2), (~long, FIT_SEC), (long, FIT_SEC)):
        for row in order[some[order]].tolist():
            lasting = clips["samples"][row] / SAMPLE_RATE
            if row not in rows and seconds + lasting <= enough:
                rows[row], seconds = None, seconds + lasting
    if seconds < FIT_MIN_SEC:
        return None
    chosen = np.array(list(rows))
    jobs = map(ExampleJob, repeat(context), _read_rows(task.scan, chosen), clips["bytes"][chosen].tolist())
    examples = pool.map(read_example, jobs, [1] * len(chosen), "learning")
    return fit([example for example in examples if example], settings.track, settings.max_false_accept)


def _cut_long(
    task: BuildTask, context: BuildContext, pool: Workers, long: Mask, acoustic_model: PhoneGMM | None
) -> tuple[Segments, list[LedgerPart]]:
    """Split the long recordings, longest first."""
    clips, settings, alignments, rows = task.scan.clips, task.settings, task.alignments, np.flatnonzero(long)
    rows = rows[np.lexsort((*clips["id"][rows].T, -clips["samples"][rows].astype(np.int64)))]
    lines, sizes, lengths = (
        _read_rows(task.scan, rows),
        clips["bytes"][rows].tolist(),
        clips["samples"][rows].tolist(),
    )
    splits = np.where(task.valid[rows], "valid", "train").tolist()
    gates = LabelThresholds(settings.min_confidence, alignments.bound(settings.max_false_accept), settings.min_word_llr)
    jobs = (
        CutJob(
            context,
            line,
            size,
            samples,
            split,
            settings.max_duration,
            _evidence_of(line, context, alignments),
            None if split == "valid" else acoustic_model,
            gates,
        )  # validation keeps the label of the whole
        for line, size, samples, split in zip(lines, sizes, lengths, splits, strict=True)
    )
    results = pool.map(cut_recording, jobs, [1] * len(rows), "splitting")
    segments = {int(row): result.segments for row, result in zip(rows, results, strict=True) if result.segments}
    return segments, [result.ledger for result in results]


def _evidence_of(row: ManifestLine, context: BuildContext, alignments: Alignments) -> Evidence | None:
    return alignments.of(row.parse(context.layouts).utterance_id) if alignments.by_id else None


def _read_rows(examined: ScanResult, clips: npt.NDArray[np.integer]) -> list[ManifestLine]:
    sources = examined.sources
    places = examined.clips[["source", "row"]][clips].tolist()
    return [ManifestLine(source, int(sources[source].numbers[row]), sources[source].line(row)) for source, row in places]


def _index(plan: ShardPlan, results: Sequence[ShardResult], tally: Tally) -> ShardIndex:
    task = plan.task
    clips, exceptions, base = task.scan.clips, task.exceptions, task.base
    made = [result.made for result in results if result.made]
    disjoint = bool(clips["named"][~clips["refused"]].all())
    index = ShardIndex(
        duration_bins=plan.bins,
        settings=asdict(task.settings),
        settings_hash=task.settings.hash,
        sources_hash=hash_sources(clips, base.sources_hash if base else ""),
        notes={
            "clips": sum(tally.clips.values()),
            "rejected": tally.clips["rejected"],
            "validation": {
                "disjoint_by_speaker": disjoint,
                "fallback_speaker": None if exceptions.fallback_speaker is None else f"{exceptions.fallback_speaker:016x}",
                "kept_in_training": [f"{speaker:016x}" for speaker in exceptions.kept_in_training],
                "clips": tally.validation["clips"],
                "rejected": tally.validation["rejected"],
            },
        },
        shards=tuple(entry for entry, _ in made),
        samples=join_samples([table for _, table in made]),
        acoustic_model=plan.acoustic_model.pack() if plan.acoustic_model else None,
    )
    return index if base is None else _merge_indexes(base, index)


# --- what was there before --------------------------------------------------------------------------------------


def _read_base(store: Store, settings: BuildConfig) -> ShardIndex | None:
    """The index of the shard set that is there already, if one is. Raises ShardError where it was built otherwise."""
    if not store.exists(INDEX_NAME):
        return None
    index, wanted = read_index(store), asdict(settings)
    unsaid = asdict(BuildConfig()) if index.settings_hash else {}  # an older set does not name all there is by now
    there = unsaid | index.settings
    differ = [f"{name} {there.get(name) or 'none'} there, {wanted[name] or 'none'} asked" for name in wanted
              if there.get(name) != wanted[name]]  # fmt: skip
    if differ:
        raise ShardError(
            f"{store.url}: holds a shard set built otherwise: {'; '.join(differ)}",
            "choose another --out, or ask for the same",
        )
    return index


def _result_of_existing(store: Store, index: ShardIndex, examined: ScanResult) -> BuildResult:
    """What is there already, where that is what is asked for. Raises ShardError where it is of other sources."""
    if index.sources_hash != hash_sources(examined.clips):
        raise ShardError(
            f"{store.url}: holds a shard set of other sources, or of sources that have changed",
            "choose another --out; --append adds clips and leaves those there as they are",
        )
    rejected = index.notes["rejected"] / max(index.notes["clips"], 1)
    return BuildResult(index, report.read_summary(store, index), rejected, built=False)


def _find_known(store: Store, base: ShardIndex, examined: ScanResult) -> Mask:
    """Which clips the shards hold already, whole or in pieces; told by the shards, not by the report beside them.

    Raises ManifestError for one whose id is there, but is another corpus's.
    """
    listed = (read_checked(store, shard) for shard in base.shards)
    known = {hash_128(whole_key(key)): who.corpus for shard in listed
             for key, who in zip(shard.keys, shard.speakers, strict=True)}  # fmt: skip
    corpora = [source.layout.corpus for source in examined.sources]
    mask = np.zeros(len(examined.clips), bool)
    for row, (pair, source) in enumerate(examined.clips[["key", "source"]].tolist()):
        corpus = known.get(tuple(pair))
        mask[row] = corpus is not None
        if corpus not in (None, corpora[source]):
            place, utterance = examined.find(row)
            raise ManifestError(
                f"{place}: utterance_id {utterance.utterance_id!r} is in {store.url} already, of corpus {corpus!r}",
                "every clip needs an id of its own; rename those of the corpus that is to be added",
            )
    return mask


def _exceptions_of(base: ShardIndex) -> SplitExceptions:
    validation = base.notes["validation"]
    fallback, kept = validation["fallback_speaker"], validation["kept_in_training"]
    return SplitExceptions(None if fallback is None else int(fallback, 16), tuple(int(hash_, 16) for hash_ in kept))


def _next_numbers(base: ShardIndex) -> dict[tuple[str, int], int]:
    """The next free number of each split and bucket."""
    taken: dict[tuple[str, int], int] = {}
    for shard in base.shards:
        number = shard.name.removesuffix(".tar").rpartition("-")[2]
        if number.isdecimal():  # else no build has given it
            taken[shard.split, shard.bucket] = max(taken.get((shard.split, shard.bucket), 0), int(number) + 1)
    return taken


def _keep_ledger_rows(rows: Sequence[LedgerRow], examined: ScanResult) -> LedgerPart:
    """Of the ledger before: a clip that was rejected then and is given again gets a new row."""
    again = {tuple(pair) for pair in examined.clips["key"].tolist()}
    return write_ledger(row for row in rows if hash_128(escape_key(row["utterance_id"])) not in again)


def _merge_indexes(base: ShardIndex, added: ShardIndex) -> ShardIndex:
    """The index of both; the samples of `base` keep their rows."""
    more = added.samples.copy()
    more["shard"] += len(base.shards)
    validation = added.notes["validation"]
    validation["disjoint_by_speaker"] &= base.notes["validation"]["disjoint_by_speaker"]
    return replace(
        added,
        base=base.digest,
        shards=base.shards + added.shards,
        samples=np.concatenate([base.samples, more]),
    )


UNFINISHED = re.compile(rf"({'|'.join(SPLITS)})/(b\d\d-\d{{5}}\.(tar|idx\.zst)|\..*\.part)|(report/)?\.[^/]*\.part")


def _delete_unfinished(store: Store, plan: ShardPlan, lease: BuildLock) -> None:
    """Remove what a build that never published its index left behind: partial files, and shards of another plan."""
    if isinstance(store, BucketStore) and lease.token:  # else another's uploads might go
        store.abort_stale_uploads()
    base = plan.task.base
    kept = {name for name, *_ in plan.shards} | ({shard.name for shard in base.shards} if base else set())
    kept = {name.removesuffix(".tar") for name in kept}
    for name in list(store.names()):
        if UNFINISHED.fullmatch(name) and name.removesuffix(".tar").removesuffix(".idx.zst") not in kept:
            store.delete(name)


@contextmanager
def _scratch(store: Store, shared: bool) -> Iterator[str]:
    """Where the pieces of long recordings wait to be sharded: beside the shards, where there is room.

    Pieces for a bucket stay on this machine, unless they are `shared` with others.
    """
    if isinstance(store, BucketStore):
        bucket = BucketStore(f"{store.url}/{PIECES}")
        bucket.clear()  # a killed build's
        if shared:
            try:
                yield bucket.url
            finally:
                bucket.clear()
            return
    if not isinstance(store, FolderStore):
        with tempfile.TemporaryDirectory(prefix="streamtrain-") as folder:
            yield folder
        return
    pieces = store.folder / PIECES
    remove(pieces)  # a killed build's, or a link that leads elsewhere
    try:
        yield _absolute(str(pieces))
    finally:
        shutil.rmtree(pieces, ignore_errors=True)


# --- for workers elsewhere, whose working directory is another -----------------------------------------------------


def _with_absolute_path(source: Source) -> Source:
    audio = replace(source.layout.audio, path=_absolute(source.layout.audio.path))
    return replace(source, layout=replace(source.layout, audio=audio))


def _absolute(location: str) -> str:
    return location if "://" in location else os.path.abspath(location)
