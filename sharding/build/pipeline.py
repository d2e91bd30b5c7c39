"""Build a shard set from sources: scan every clip, split long ones, plan and write the shards, publish the index.

The plan uses headers alone, so the same input and settings give the same bytes for any number of workers; each clip is
then decoded once, by the worker that writes it.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sharding.audio.codec import SAMPLE_RATE
from sharding.build.alphabet import WantedSymbols, settle_alphabet, settle_policy
from sharding.build.assign import (
    TRAIN,
    VALID,
    Mask,
    PlannedShard,
    PlannedTable,
    Segments,
    Sides,
    SplitExceptions,
    assign_shards,
    choose_exceptions,
    is_held_out,
    is_validation,
    list_samples,
)
from sharding.build.dask import ClusterWorkers
from sharding.build.duration_buckets import fit_bins
from sharding.build.lock import BuildLock, exclusive_build
from sharding.build.place import PIECES, check_output
from sharding.build.scan import ScanResult, find_orphans, hash_128, hash_sources, scan
from sharding.build.splits import (
    count_shared_speakers,
    describe_layouts,
    keep_splits,
    publishing,
    settle_splits,
)
from sharding.build.write import (
    BuildContext,
    ClipRow,
    CutJob,
    SegmentRef,
    ShardJob,
    ShardResult,
    cut_recording,
    make_shard,
    read_example,
)
from sharding.errors import ManifestError, ShardError
from sharding.files.spool import large_files_folder
from sharding.files.writing import remove
from sharding.labels.policy import LabelPolicy
from sharding.labels.profiles import allow_profile
from sharding.pool import Workers, available_cores
from sharding.report import files as report
from sharding.report.ledger import LedgerPart, LedgerRow, Tally, rejected_row, same_rows, sum_tallies, write_ledger
from sharding.report.summary import Summary
from sharding.segment.acoustic_model import PhoneGMM, fit, unpack_model
from sharding.segment.evidence import NO_ALIGNMENTS, Alignments
from sharding.segment.split import LabelThresholds
from sharding.shardset.build_config import BuildConfig
from sharding.shardset.index import (
    INDEX_NAME,
    PackedIndex,
    ShardIndex,
    archived_index_name,
    check_presence,
    join_samples,
    pack_index,
    read_checked,
    read_index,
    write_index,
)
from sharding.shardset.object_store import BucketStore
from sharding.shardset.sample import escape_key, whole_key
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import FolderStore, Store, open_store
from sharding.sources.manifest import Source, read_source
from sharding.sources.options import ManifestOptions

LABELS_SAMPLED, MIN_WORDS, ONE_SYMBOL_SHARE = 100, 50, 0.9  # when to warn of blanks between phones
IPA_LETTER, MIN_IPA_SHARE = re.compile("[ɐ-ʯˈˌː]"), 0.02  # when to warn that labels may be phones
FIT_SEC = 2_400.0  # of labelled speech, to train the acoustic model
FIT_MIN_SEC = 120.0  # at least: a model trained on less would memorise its own mistakes
FIT_MAX_CLIP_SEC = 600.0  # longer recordings are not trained on


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Hold the options that do not change a byte of the shards."""

    workers: int = field(default_factory=available_cores)
    manifest_options: ManifestOptions = field(default_factory=ManifestOptions)
    dry_run: bool = False
    append: bool = False
    scheduler: str = ""  # address of a Dask cluster, to use its workers instead
    alignments: Alignments = NO_ALIGNMENTS


@dataclass(frozen=True, eq=False)
class BuildTask:
    """Describe what to build: the clips, the settings, and the existing shard set to append to."""

    scan: ScanResult
    settings: BuildConfig
    labels: LabelPolicy
    base: ShardIndex | None = None
    alignments: Alignments = NO_ALIGNMENTS

    @cached_property
    def exceptions(self) -> SplitExceptions:
        """Choose among the speakers of labelled clips to split; exceptions of a `base` keep their side."""
        clips, fraction = self.scan.clips[~self.published], self.settings.valid_fraction
        exceptions = SplitExceptions() if self.base is None else _exceptions_of(self.base)
        if self.base is not None and self.base.notes["validation"]["clips"]:
            return exceptions
        return choose_exceptions(clips["speaker"][clips["fits"]], fraction, exceptions.kept_in_training)

    @cached_property
    def published(self) -> Mask:
        """Return which clips have their split from their corpus, shape (N,); others are split by speaker."""
        mask: Mask = publishing(self.scan, self.settings)[self.scan.clips["source"]]
        return mask

    @cached_property
    def sides(self) -> Sides:
        """Return the split of each clip, shape (N,), in SPLITS."""
        clips = self.scan.clips
        valid = is_validation(clips["speaker"], self.settings.valid_fraction, self.exceptions)
        by_speaker = np.where(valid, np.uint8(VALID), np.uint8(TRAIN))
        return np.where(self.published, clips["split"] - np.uint8(1), by_speaker)


@dataclass(frozen=True)
class BuildResult:
    """Hold the result of a build, for its caller to print."""

    index: ShardIndex
    summary: Summary | None  # None if the report was not copied along
    rejected: float  # share of the clips of the sources
    built: bool = True  # False if there was nothing to do
    known: int = 0  # clips to append that the shard set already contains


def build(locations: Sequence[Path], out: str, settings: BuildConfig, run: RunOptions) -> BuildResult:
    """Build the shard set OUT from the sources. Raises StreamtrainError for errors that the user can fix."""
    sources = _read_sources(locations, settings, run)
    check_output(open_store(out), locations)
    asked, settings = settings, keep_splits(open_store(out), settings)
    settings, labels = settle_policy(settings, sources)
    store = open_store(out, dry_run=run.dry_run)
    first = _read_base(store, settings, labels)
    labels = first.labels if first else labels
    with ClusterWorkers(run.scheduler) if run.scheduler else Workers(run.workers) as pool:
        scanned = scan(sources, labels, pool)
        _warn_of_labels(scanned, labels)
        orphans = find_orphans(scanned, pool)
        settings = settle_splits(settings, scanned, asked.splits)
        base = _read_base(store, settings, labels)
        if base:
            check_presence(store, base)
        if base and not run.append:
            return _result_of_existing(store, base, scanned)  # before locking: OUT may be read-only
        with nullcontext(BuildLock()) if run.dry_run else exclusive_build(store) as lease:
            base = _read_base(store, settings, labels)  # another build may have finished since
            if base and not run.append:
                return _result_of_existing(store, base, scanned)
            if base and base.labels != labels:  # it was not there when the labels were scanned
                raise ShardError(f"{store.url}: another build has finished since", "give the same command again")
            known = _find_known(store, base, scanned) if base else np.zeros(len(scanned.clips), bool)
            scanned = scanned.select(~known)
            if base and not len(scanned.clips):
                report.restore_archived(store, base)
                return BuildResult(base, report.read_summary(store, base), 0.0, built=False, known=len(known))
            wanted = WantedSymbols(settings.min_symbol_count, asked.alphabet)
            task = _settle_task(BuildTask(scanned, settings, labels, base, run.alignments), wanted, pool)
            old_rows, old_orphans = report.archive_report(store, base) if base else ([], [])
            plan, results, ledger = _make_shards(store, lease, pool, task, run)
            tally = sum_tallies(ledger)
            rejected = tally.clips["rejected"] / max(len(known), 1)
            if base:
                ledger.insert(0, _keep_ledger_rows(old_rows, scanned))
                tally = sum_tallies(ledger)
            index = _index(plan, results, tally, store)
            orphans = sorted({*old_orphans, *orphans})
            grown = base is None or len(index.samples) != len(base.samples) or orphans != old_orphans
            if base and not grown and same_rows(ledger, old_rows):
                report.restore_archived(store, base)  # no new sample or ledger row: runs need not see another index
                return BuildResult(base, report.read_summary(store, base), rejected, known=int(known.sum()))
            packed = pack_index(index)
            summary = report.publish(store, ledger, tally, packed.index, orphans, scanned.ignored_fields)
            lease.check()
            _publish(store, packed, base)
            return BuildResult(packed.index, summary, rejected, known=int(known.sum()))


def _publish(store: Store, packed: PackedIndex, base: ShardIndex | None) -> None:
    """Write the index last: its presence means that all other files are complete."""
    if base:  # runs that started with it find it there
        store.write(archived_index_name(base.digest), store.read(INDEX_NAME))
    write_index(store, packed)
    if base:
        report.drop_archived(store, base)


def _read_sources(locations: Sequence[Path], settings: BuildConfig, run: RunOptions) -> list[Source]:
    allow_profile(settings.profile)  # which the user has named
    options = replace(
        run.manifest_options, profile=settings.profile, group_by=settings.group_by, splits=settings.splits
    )
    return [_with_absolute_path(read_source(location, options)) for location in locations]


def _settle_task(task: BuildTask, wanted: WantedSymbols, pool: Workers) -> BuildTask:
    """Return the task with its alphabet, and without the clips whose symbols are too rare for it."""
    training, held_out = task.sides == TRAIN, is_held_out(task.sides)
    scanned, labels = settle_alphabet(task.scan, training, held_out, task.labels, wanted, pool)
    return replace(task, scan=scanned, labels=labels)


def _warn_of_labels(scanned: ScanResult, policy: LabelPolicy) -> None:
    """Warn if a sample of the labels has a blank after each phone, so that each is a word, or is IPA read as text."""
    chosen = np.unique(np.linspace(0, len(scanned.clips) - 1, LABELS_SAMPLED).astype(int))
    labels = [policy.normalize(scanned.find(row)[1].text) for row in chosen.tolist()]
    lengths = [len(word) for label in labels for word in label.split()]
    if policy.units != "tokens" and len(lengths) >= MIN_WORDS and lengths.count(1) > ONE_SYMBOL_SHARE * len(lengths):
        print(f"{lengths.count(1):,} of {len(lengths):,} words in the labels are one symbol: are the phones separated "
              "by blanks? Each is then learned as a word, with the blank; --units tokens learns phones",
              file=sys.stderr)  # fmt: skip
    symbols = "".join(labels)
    if policy.profile == "text" and len(IPA_LETTER.findall(symbols)) > MIN_IPA_SHARE * len(symbols):
        print("the labels look like IPA, and are read as text: --profile ipa keeps all of it but look-alikes of IPA "
              "letters, pasketti is the challenge's", file=sys.stderr)  # fmt: skip


def _make_shards(
    store: Store, lease: BuildLock, pool: Workers, task: BuildTask, run: RunOptions
) -> tuple["ShardPlan", list[ShardResult], list[LedgerPart]]:
    """Plan and write the shards. Returns the plan, the results and the ledger."""
    with _scratch(store, shared=bool(run.scheduler)) as scratch:
        out, scratch = store.url if store.remote else os.path.abspath(store.url), f"{scratch}/{lease.token}"
        unpacked = "" if run.dry_run or "://" in scratch else f"{scratch}/unpacked"
        layouts = tuple(source.layout.unpacking(unpacked) for source in task.scan.sources)
        token = lease.token if run.scheduler else ""  # local workers die with the build
        context = BuildContext(out, scratch, layouts, task.labels, run.dry_run, token)
        plan, ledger = plan_build(task, context, pool, mixed=not run.dry_run)
        _delete_unfinished(store, plan, lease)
        results = write_shards(plan, plan.shards, pool)
        _delete_unfinished(store, plan, lease)  # files of a worker that died and was replaced
    return plan, results, ledger + [result.ledger for result in results]


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """Hold which samples go into every shard."""

    task: BuildTask
    context: BuildContext
    segments: Segments
    samples_planned: PlannedTable
    bins: tuple[float, ...]
    shards: list[PlannedShard]
    acoustic_model: PhoneGMM | None

    def job(self, shard: PlannedShard) -> ShardJob:
        """Return the job that writes a shard."""
        name, bucket, rows = shard
        members = self.samples_planned[rows]
        segments = [None if whole else SegmentRef(number, len(self.segments[clip]), self.segments[clip][number])
                    for whole, clip, number in members[["whole", "clip", "piece"]].tolist()]  # fmt: skip
        chosen = tuple(zip(_read_rows(self.task.scan, members["clip"]), segments, strict=True))
        return ShardJob(self.context, name, bucket, name.split("/")[0], chosen)


def plan_build(
    task: BuildTask, context: BuildContext, pool: Workers, mixed: bool = True
) -> tuple[ShardPlan, list[LedgerPart]]:
    """Split long recordings and assign samples to shards. Returns the plan and the ledger rows decided so far.

    Unless they are `mixed`, shards have neighbours in the sources, which are read faster.

    Samples added to a `base` go into new shards in its duration bins. The acoustic model is that of the `base`; if that
    has none, it is trained if there are long labelled training recordings.
    """
    clips, settings, base = task.scan.clips, task.settings, task.base
    usable, refused = _drop_refused(task)
    long = usable & (clips["samples"] > round(settings.max_duration * SAMPLE_RATE))
    labelled = usable & clips["fits"] & (task.sides == TRAIN)
    acoustic_model = unpack_model(base.acoustic_model) if base and base.acoustic_model else None
    if acoustic_model is None and (labelled & long).any():
        acoustic_model = _fit_acoustic_model(task, context, pool, labelled, long)
    segments, cuts = _cut_long(task, context, pool, long, acoustic_model)
    members = list_samples(clips, usable & ~long, segments, task.sides)
    if not mixed:
        members["order"][:, 0], members["order"][:, 1] = members["clip"], members["piece"]
    bins = base.duration_bins if base else fit_bins(members["samples"] / SAMPLE_RATE, settings.num_buckets)
    first_numbers = _next_numbers(base) if base else None
    shards = assign_shards(
        members, bins, round(settings.shard_mb * 2**20), settings.min_shards_per_bucket, first_numbers
    )
    return ShardPlan(task, context, segments, members, bins, shards, acoustic_model), [refused, *cuts]


def write_shards(plan: ShardPlan, shards: Sequence[PlannedShard], pool: Workers) -> list[ShardResult]:
    """Write shards, most work first so that workers finish together. Returns results in the order given."""
    order = sorted(range(len(shards)), key=lambda i: -int(plan.samples_planned["work"][shards[i][2]].sum()))
    jobs = (plan.job(shards[i]) for i in order)
    results = pool.map(make_shard, jobs, [len(shards[i][2]) for i in order], "writing")
    by_shard = dict(zip(order, results, strict=True))
    return [by_shard[i] for i in range(len(shards))]


def _drop_refused(task: BuildTask) -> tuple[Mask, LedgerPart]:
    """Return which clips are usable, shape (N,), and the ledger rows of those that the scan refused."""
    held_out = is_held_out(task.sides)
    usable, rows = np.ones(len(held_out), bool), []
    for row, refusal in task.scan.refusals.items():
        if not (refusal.in_training and held_out[row]):
            usable[row] = False
            seconds = int(task.scan.clips["samples"][row]) / SAMPLE_RATE
            rows.append(rejected_row(refusal.utterance, SPLITS[task.sides[row]], refusal.reason, seconds))
    return usable, write_ledger(sorted(rows, key=lambda row: str(row["utterance_id"])))


def _fit_acoustic_model(
    task: BuildTask, context: BuildContext, pool: Workers, labelled: Mask, long: Mask
) -> PhoneGMM | None:
    """Train on up to FIT_SEC of labelled speech, half of it long recordings if possible. Returns None if too little."""
    clips, settings = task.scan.clips, task.settings
    order = np.lexsort(clips["key"].T[::-1])
    order = order[labelled[order] & (clips["samples"][order] <= FIT_MAX_CLIP_SEC * SAMPLE_RATE)]
    rows, seconds = dict[int, None](), 0.0  # a set in training order
    for group, max_sec in ((long, FIT_SEC / 2), (~long, FIT_SEC), (long, FIT_SEC)):
        for row in order[group[order]].tolist():
            duration = clips["samples"][row] / SAMPLE_RATE
            if row not in rows and seconds + duration <= max_sec:
                rows[row], seconds = None, seconds + duration
    if seconds < FIT_MIN_SEC:
        return None
    chosen = np.array(list(rows))
    jobs = zip(repeat(context), _read_rows(task.scan, chosen), strict=False)
    examples = pool.map(read_example, jobs, [1] * len(chosen), "learning")
    return fit([example for example in examples if example], task.labels, settings.max_false_accept)


def _cut_long(
    task: BuildTask, context: BuildContext, pool: Workers, long: Mask, acoustic_model: PhoneGMM | None
) -> tuple[Segments, list[LedgerPart]]:
    """Split the long recordings, longest first. Returns their segments and their ledger rows."""
    clips, settings, alignments, rows = task.scan.clips, task.settings, task.alignments, np.flatnonzero(long)
    rows = rows[np.lexsort((*clips["id"][rows].T, -clips["samples"][rows].astype(np.int64)))]
    splits = [SPLITS[side] for side in task.sides[rows].tolist()]
    max_gap = alignments.bound(settings.max_false_accept)
    thresholds = LabelThresholds(settings.min_confidence, max_gap, settings.min_word_llr)
    jobs = (
        CutJob(
            context,
            row,
            split,
            settings.max_duration,
            alignments.of(row.parse(context.layouts).utterance_id) if alignments.by_id else None,
            acoustic_model if split == "train" else None,  # else the whole recording keeps its label
            thresholds,
        )
        for row, split in zip(_read_rows(task.scan, rows), splits, strict=True)
    )
    results = pool.map(cut_recording, jobs, [1] * len(rows), "splitting")
    segments = {int(row): segments for row, (segments, _) in zip(rows, results, strict=True) if segments}
    return segments, [ledger for _, ledger in results]


def _read_rows(scanned: ScanResult, clips: npt.NDArray[np.integer]) -> list[ClipRow]:
    sources = scanned.sources
    places = scanned.clips[["source", "row", "bytes", "samples"]][clips].tolist()
    return [ClipRow(index, sources[index].line(row), sources[index].place(row), size, samples)
            for index, row, size, samples in places]  # fmt: skip


def _index(plan: ShardPlan, results: Sequence[ShardResult], tally: Tally, store: Store) -> ShardIndex:
    """Return the index of the base, if there is one, and the new shards."""
    task, fallback = plan.task, plan.task.exceptions.fallback_speaker
    clips, exceptions, base = task.scan.clips, task.exceptions, task.base
    shards = [result.made for result in results if result.made]
    samples = join_samples([table for _, table in shards])
    shared = count_shared_speakers(task.scan, task.sides, task.settings, store, base)
    disjoint = bool(clips["named"][~clips["refused"]].all()) and not shared
    splitting = {"layouts": describe_layouts(task.scan, task.settings, base), "shared_speakers": shared}
    if base:  # its samples keep their rows
        samples["shard"] += len(base.shards)
        samples = np.concatenate([base.samples, samples])
        disjoint &= base.notes["validation"]["disjoint_by_speaker"]
    return ShardIndex(
        duration_bins=plan.bins,
        settings=asdict(task.settings),
        settings_hash=task.settings.hash,
        sources_hash=hash_sources(clips, base.sources_hash if base else ""),
        labels=task.labels,
        notes=tally.notes(
            disjoint,
            None if fallback is None else f"{fallback:016x}",
            [f"{speaker:016x}" for speaker in exceptions.kept_in_training],
        )
        | {name: note for name, note in splitting.items() if note},
        shards=(base.shards if base else ()) + tuple(entry for entry, _ in shards),
        samples=samples,
        base=base.digest if base else "",
        acoustic_model=plan.acoustic_model.pack() if plan.acoustic_model else None,
    )


# --- the existing shard set -------------------------------------------------------------------------------------


def _read_base(store: Store, settings: BuildConfig, labels: LabelPolicy) -> ShardIndex | None:
    """Return the index of an existing shard set, or None. Raises ShardError if it was built with other settings."""
    if not store.exists(INDEX_NAME):
        return None
    index, wanted = read_index(store), asdict(settings)
    existing = index.settings
    differences = [f"{name} is {existing.get(name) or 'none'} there, requested {wanted[name] or 'none'}"
                   for name in wanted if existing.get(name) != wanted[name]]  # fmt: skip
    if differences:
        message = f"{store.url}: holds a shard set built with other settings: {'; '.join(differences)}"
        raise ShardError(message, "choose another --out, or use the same settings")
    index.labels.check_digest(store.url)
    return index


def _result_of_existing(store: Store, index: ShardIndex, scanned: ScanResult) -> BuildResult:
    """Return the result of an earlier, identical build. Raises ShardError if its sources differ."""
    if index.sources_hash != hash_sources(scanned.clips):
        message = f"{store.url}: holds a shard set built from other sources, or its sources have changed"
        raise ShardError(message, "choose another --out; --append adds clips and leaves existing shards unchanged")
    rejected = index.notes["rejected"] / max(index.notes["clips"], 1)
    return BuildResult(index, report.read_summary(store, index), rejected, built=False)


def _find_known(store: Store, base: ShardIndex, scanned: ScanResult) -> Mask:
    """Return which clips the shards already contain, whole or split, read from the shards rather than the report.

    Raises ManifestError if a clip's id exists there in another corpus.
    """
    listed = (read_checked(store, shard) for shard in base.shards)
    known = {hash_128(whole_key(key)): speaker.corpus for shard in listed
             for key, speaker in zip(shard.keys, shard.speakers, strict=True)}  # fmt: skip
    corpora = [source.layout.corpus for source in scanned.sources]
    mask = np.zeros(len(scanned.clips), bool)
    for row, (pair, source) in enumerate(scanned.clips[["key", "source"]].tolist()):
        corpus = known.get(tuple(pair))
        mask[row] = corpus is not None
        if corpus not in (None, corpora[source]):
            place, utterance = scanned.find(row)
            if corpus == utterance.corpus:  # of a part of its source
                continue
            raise ManifestError(
                f"{place}: utterance_id {utterance.utterance_id!r} already exists in {store.url}, in corpus {corpus!r}",
                "every clip needs a unique id; rename those of the corpus to append",
            )
    return mask


def _exceptions_of(base: ShardIndex) -> SplitExceptions:
    validation = base.notes["validation"]
    fallback = validation["fallback_speaker"]
    in_training = tuple(int(speaker, 16) for speaker in validation["kept_in_training"])
    return SplitExceptions(None if fallback is None else int(fallback, 16), in_training)


def _next_numbers(base: ShardIndex) -> dict[tuple[str, int], int]:
    """Return the next free shard number of each split and bucket."""
    first_numbers: dict[tuple[str, int], int] = {}
    for shard in base.shards:
        number, group = shard.name.removesuffix(".tar").rpartition("-")[2], (shard.split, shard.bucket)
        if number.isdecimal():  # else the name was not given by a build
            first_numbers[group] = max(first_numbers.get(group, 0), int(number) + 1)
    return first_numbers


def _keep_ledger_rows(rows: Sequence[LedgerRow], scanned: ScanResult) -> LedgerPart:
    """Return the earlier ledger rows, without those of clips that were rejected then and are scanned again."""
    rescanned = {tuple(pair) for pair in scanned.clips["key"].tolist()}
    return write_ledger(row for row in rows if hash_128(escape_key(row["utterance_id"])) not in rescanned)


UNFINISHED = re.compile(rf"({'|'.join(SPLITS)})/(b\d\d-\d{{5}}\.(tar|idx\.zst)|\..*\.part)|(report/)?\.[^/]*\.part")


def _delete_unfinished(store: Store, plan: ShardPlan, lease: BuildLock) -> None:
    """Remove leftovers of a build that never published its index: partial files, and shards of another plan."""
    if isinstance(store, BucketStore) and lease.token:  # without the lock, uploads may belong to another build
        store.abort_stale_uploads()
    base = plan.task.base
    planned = {name for name, *_ in plan.shards} | ({shard.name for shard in base.shards} if base else set())
    planned = {name.removesuffix(".tar") for name in planned}
    for name in list(store.names()):
        if UNFINISHED.fullmatch(name) and name.removesuffix(".tar").removesuffix(".idx.zst") not in planned:
            store.delete(name)


@contextmanager
def _scratch(store: Store, shared: bool) -> Iterator[str]:
    """Yield the URL of a scratch place for segments of long recordings: beside the shards, if OUT is a folder.

    Segments for a bucket stay on this machine, unless they are `shared` with other machines.
    """
    if isinstance(store, BucketStore):
        bucket = BucketStore(f"{store.url}/{PIECES}")
        bucket.clear()  # left by a killed build
        if shared:
            try:
                yield bucket.url
            finally:
                bucket.clear()
            return
    if not isinstance(store, FolderStore):
        with large_files_folder() as folder:
            yield folder
        return
    scratch = store.folder / PIECES
    remove(scratch)  # left by a killed build, or a link to another place
    try:
        yield os.path.abspath(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _with_absolute_path(source: Source) -> Source:  # workers may have another working directory
    audio = replace(source.layout.audio, path=os.path.abspath(source.layout.audio.path))
    return replace(source, layout=replace(source.layout, audio=audio))
