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
from sharding.segment.evidence import NOTHING_ALIGNED, WRONG_SHARE, Alignments, Evidence
from sharding.build.assign import (
    Exceptions,
    Mask,
    MemberTable,
    PlannedShard,
    Segments,
    assign_shards,
    choose_exceptions,
    is_validation,
    list_members,
)
from sharding.audio.codec import SAMPLE_RATE
from sharding.shardset.object_store import BucketStore
from sharding.build.duration_buckets import fit_bins
from sharding.build.dask import ClusterWorkers
from sharding.segment.cuts import LIMIT_SEC
from sharding.errors import ManifestError, ShardError
from sharding.build.scan import Examined, examine, find_orphans, hash_pair, hash_sources
from sharding.build.write import (
    CutJob,
    ListenJob,
    Member,
    Piece,
    Row,
    ShardJob,
    ShardResult,
    Where,
    cut,
    listen_to,
    make_shard,
)
from sharding.shardset.index import (
    INDEX_NAME,
    ShardIndex,
    check_presence,
    join_samples,
    keep_old_index,
    pack_index,
    read_index,
    read_listed,
    write_index,
)
from sharding.labels.ipa import SymbolCounts, check_alphabet, read_label
from sharding.report.ledger import LedgerPart, LedgerRow, Tally, add_up, rejected_row, tell_the_same, write_ledger
from sharding.build.lock import Lease, sole_build
from sharding.sources.manifest import Reading, Source, read_sources
from sharding.build.place import PIECES, check_place
from sharding.shardset.sample import escape_key, whole_key
from sharding.shardset.schema import SPLITS
from sharding.segment.acoustic_model import Sounds, learn, unpack_sounds
from sharding.segment.split import Gates
from sharding.shardset.store import FolderStore, Store, open_store
from sharding.report.summary import Summary
from sharding.pool import Workers, available_cores
from sharding.files.writing import remove

LABELS_LOOKED_AT, WORDS_TOLD, ONE_SYMBOL_SHARE = 100, 50, 0.9  # of labels whose phones blanks part
LEARN_SEC = 2_400.0  # of labelled speech, from which the sounds of the symbols are learned …
LEARN_LEAST_SEC = 120.0  # … and so many at least: less would know its own mistakes by heart
LEARN_LONGEST_SEC = 600.0  # no longer recording is learned from


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """All that decides the bytes of a shard set, beside its sources."""

    limit_sec: float = LIMIT_SEC
    valid_fraction: float = 0.1
    num_buckets: int = 8
    shard_mb: float = 64.0
    min_shards: int = 1
    track: str = "phonetic"
    group_by: str = ""
    min_confidence: float = Gates.min_confidence
    wrong_share: float = WRONG_SHARE
    min_evidence: float = Gates.min_evidence
    alignments: str = ""  # digest of what a model has aligned

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class HowToRun:
    """What does not change a byte of the shards."""

    workers: int = field(default_factory=available_cores)
    reading: Reading = field(default_factory=Reading)
    dry: bool = False
    append: bool = False
    scheduler: str = ""  # of a Dask cluster whose workers to use instead
    alignments: Alignments = NOTHING_ALIGNED


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be built: of which clips, how, and beside which shards that are there already."""

    examined: Examined
    settings: BuildSettings
    base: ShardIndex | None = None
    alignments: Alignments = NOTHING_ALIGNED

    @cached_property
    def exceptions(self) -> Exceptions:
        """Choose among the speakers of clips with labels; those of a `base` stay on the side where they are."""
        clips, fraction = self.examined.clips, self.settings.valid_fraction
        kept = Exceptions() if self.base is None else _exceptions_of(self.base)
        if self.base is not None and self.base.notes["validation"]["clips"]:
            return kept
        return choose_exceptions(clips["speaker"][clips["fits"]], fraction, kept.spared)

    @cached_property
    def valid(self) -> Mask:
        """Which clips validate."""
        return is_validation(self.examined.clips["speaker"], self.settings.valid_fraction, self.exceptions)


@dataclass(frozen=True)
class Built:
    """What a build has made, for its caller to print."""

    index: ShardIndex
    summary: Summary | None  # None where its report was left behind
    rejected: float  # share of the clips of the sources
    fresh: bool = True  # False where there was nothing to do
    known: int = 0  # clips that were there already, of those to append


def build(locations: Sequence[Path], out: str, settings: BuildSettings, how: HowToRun) -> Built:
    """Build the shard set OUT from the sources. Raises StreamtrainError for what the user can mend."""
    sources = read_sources(locations, replace(how.reading, track=settings.track, group_by=settings.group_by))
    sources = [_with_absolute_path(source) for source in sources]  # workers may be elsewhere
    store = open_store(out, dry=how.dry)
    check_place(open_store(out), locations)
    with ClusterWorkers(how.scheduler) if how.scheduler else Workers(how.workers) as pool:
        examined = examine(sources, settings.track, pool)
        _warn_of_parted_phones(examined, settings.track)
        orphans = find_orphans(examined, pool)
        base = _read_base(store, settings)
        if base:
            check_presence(store, base)
        if base and not how.append:
            return _built_before(store, base, examined)  # in a place, maybe, where nothing can be written
        with nullcontext(Lease()) if how.dry else sole_build(store) as lease:
            base = _read_base(store, settings)  # another build may have ended a moment ago
            if base and not how.append:
                return _built_before(store, base, examined)
            known = _are_known(store, base, examined) if base else np.zeros(len(examined.clips), bool)
            examined = examined.select(~known)
            if base and not len(examined.clips):
                report.put_back(store, base)
                return Built(base, report.read_summary(store, base), 0.0, fresh=False, known=len(known))
            task = Task(examined, settings, base, how.alignments)
            _check_labels(task)
            old_rows, old_orphans = report.keep_old(store, base) if base else ([], [])
            plan, results, ledger = _make_shards(store, lease, pool, task, how)
            tally = add_up(ledger)
            rejected = tally.clips["rejected"] / max(len(known), 1)
            if base:
                ledger.insert(0, _rows_that_stay(old_rows, examined))
                tally = add_up(ledger)
            index = _index(plan, results, tally)
            orphans = sorted({*old_orphans, *orphans})
            told = orphans == old_orphans and tell_the_same(ledger, old_rows)
            if base and told and len(index.samples) == len(base.samples):
                report.put_back(store, base)  # nothing new to train on, nor to tell: no run need see another
                return Built(base, report.read_summary(store, base), rejected, known=int(known.sum()))
            packed = pack_index(index)
            summary = report.publish(store, ledger, tally, packed.index, orphans, examined.ignored_fields)
            lease.check()
            if base:
                keep_old_index(store, base)
            write_index(store, packed)  # last: it says that all the rest is there
            if base:
                report.forget_old(store, base)
            return Built(packed.index, summary, rejected, known=int(known.sum()))


def _check_labels(task: Task) -> None:
    """Raise ManifestError if the labels of either side are of another alphabet."""
    clips, track = task.examined.clips, task.settings.track
    for side, mine in (("training", ~task.valid), ("validation", task.valid)):
        symbols, foreign = (int(clips[name][mine].sum()) for name in ("symbols", "foreign"))
        if foreign:
            place, utterance = task.examined.find(int(np.argmax(np.where(mine, clips["foreign"], 0))))
            worst = (foreign, place, read_label(utterance.text, track))
            check_alphabet(SymbolCounts(symbols, foreign, worst), side, track)


def _warn_of_parted_phones(examined: Examined, track: str) -> None:
    """Say so if a blank follows each phone in the labels, some of which are looked at: each is a word then."""
    chosen = np.unique(np.linspace(0, len(examined.clips) - 1, LABELS_LOOKED_AT).astype(int))
    labels = (read_label(examined.find(row)[1].text, track) for row in chosen.tolist())
    lengths = [len(word) for label in labels for word in label.split()]
    if track == "phonetic" and len(lengths) >= WORDS_TOLD and lengths.count(1) > ONE_SYMBOL_SHARE * len(lengths):
        print(f"{lengths.count(1):,} of {len(lengths):,} words of the labels are one symbol: are these phones parted "
              "by blanks? Each is learned as a word of its own, with the blank", file=sys.stderr)  # fmt: skip


def _make_shards(
    store: Store, lease: Lease, pool: Workers, task: Task, how: HowToRun
) -> tuple["Plan", list[ShardResult], list[LedgerPart]]:
    """Plan the shards, and write them."""
    with _scratch(store, shared=bool(how.scheduler)) as scratch:
        layouts = tuple(source.layout for source in task.examined.sources)
        out, scratch = _absolute(store.url), f"{scratch}/{lease.token}"
        token = lease.token if how.scheduler else ""  # workers of this machine die with the build
        where = Where(out, scratch, layouts, task.settings.track, how.dry, token)
        plan, ledger = plan_build(task, where, pool)
        _clear_unfinished(store, plan, lease)
        results = write_shards(plan, plan.shards, pool)
        _clear_unfinished(store, plan, lease)  # a worker may have died, and another done its work
    return plan, results, ledger + [result.ledger for result in results]


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """What every shard is to hold."""

    task: Task
    where: Where
    segments: Segments
    members: MemberTable
    bins: tuple[float, ...]
    shards: list[PlannedShard]
    sounds: Sounds | None

    def job(self, shard: PlannedShard) -> ShardJob:
        name, bucket, rows = shard
        members = self.members[rows]
        lines = _read_rows(self.task.examined, members["clip"])
        clips = self.task.examined.clips[members["clip"]]
        pieces = [None if whole else self._piece(clip, piece)
                  for whole, clip, piece in members[["whole", "clip", "piece"]].tolist()]  # fmt: skip
        chosen = tuple(map(Member, lines, clips["bytes"].tolist(), clips["samples"].tolist(), pieces))
        return ShardJob(self.where, name, bucket, name.split("/")[0], chosen)

    def _piece(self, clip: int, number: int) -> Piece:
        segments = self.segments[clip]
        return Piece(number, len(segments), segments[number])


def plan_build(task: Task, where: Where, pool: Workers, sounds: Sounds | None = None) -> tuple[Plan, list[LedgerPart]]:
    """Split what is long, and say what every shard is to hold; with the ledger's rows of all that is decided so far.

    What is added to a `base` goes into shards of its own, in the bins that are there. The `sounds` of the symbols are
    its own too, or learned, where they are not given and somebody needs them.
    """
    clips, settings, base = task.examined.clips, task.settings, task.base
    usable, refused = _refuse(task)
    long = usable & (clips["samples"] > round(settings.limit_sec * SAMPLE_RATE))
    labelled = usable & clips["fits"] & ~task.valid
    if sounds is None and base and base.sounds:
        sounds = unpack_sounds(base.sounds)
    if sounds is None and (labelled & long).any():
        sounds = _learn(task, where, pool, labelled, long)
    segments, cuts = _cut(task, where, pool, long, sounds)
    members = list_members(clips, usable & ~long, segments, task.valid)
    bins = base.duration_bins if base else fit_bins(members["samples"] / SAMPLE_RATE, settings.num_buckets)
    taken = _numbers_taken(base) if base else None
    shards = assign_shards(members, bins, round(settings.shard_mb * 2**20), settings.min_shards, taken)
    return Plan(task, where, segments, members, bins, shards, sounds), [refused, *cuts]


def write_shards(plan: Plan, shards: Sequence[PlannedShard], pool: Workers) -> list[ShardResult]:
    """Write shards, the most work first so that no worker is left alone at the end; results in the order given."""
    order = sorted(range(len(shards)), key=lambda i: -int(plan.members["work"][shards[i][2]].sum()))
    jobs = (plan.job(shards[i]) for i in order)
    results = pool.map(make_shard, jobs, [len(shards[i][2]) for i in order], "writing")
    in_order = dict(zip(order, results, strict=True))
    return [in_order[i] for i in range(len(shards))]


def _refuse(task: Task) -> tuple[Mask, LedgerPart]:
    """Which clips are left, and the ledger's rows of those that the examination refused."""
    valid = task.valid
    usable, rows = np.ones(len(valid), bool), []
    for row, refusal in task.examined.refusals.items():
        if not (refusal.in_training and valid[row]):
            usable[row] = False
            seconds = int(task.examined.clips["samples"][row]) / SAMPLE_RATE
            rows.append(rejected_row(refusal.utterance, "valid" if valid[row] else "train", refusal.reason, seconds))
    return usable, write_ledger(sorted(rows, key=lambda row: str(row["utterance_id"])))


def _learn(task: Task, where: Where, pool: Workers, labelled: Mask, long: Mask) -> Sounds | None:
    """The sounds of some of the labels, half of them of long recordings where there are both; None of too few."""
    clips, settings = task.examined.clips, task.settings
    order = np.lexsort(clips["key"].T[::-1])
    order = order[labelled[order] & (clips["samples"][order] <= LEARN_LONGEST_SEC * SAMPLE_RATE)]
    rows, seconds = dict[int, None](), 0.0  # in the order in which they are learned from
    for some, enough in ((long, LEARN_SEC / 2), (~long, LEARN_SEC), (long, LEARN_SEC)):
        for row in order[some[order]].tolist():
            lasting = clips["samples"][row] / SAMPLE_RATE
            if row not in rows and seconds + lasting <= enough:
                rows[row], seconds = None, seconds + lasting
    if seconds < LEARN_LEAST_SEC:
        return None
    chosen = np.array(list(rows))
    jobs = map(ListenJob, repeat(where), _read_rows(task.examined, chosen), clips["bytes"][chosen].tolist())
    examples = pool.map(listen_to, jobs, [1] * len(chosen), "learning")
    return learn([example for example in examples if example], settings.track, settings.wrong_share)


def _cut(
    task: Task, where: Where, pool: Workers, long: Mask, sounds: Sounds | None
) -> tuple[Segments, list[LedgerPart]]:
    """Split the long recordings, longest first."""
    clips, settings, alignments, rows = task.examined.clips, task.settings, task.alignments, np.flatnonzero(long)
    rows = rows[np.lexsort((*clips["id"][rows].T, -clips["samples"][rows].astype(np.int64)))]
    lines, sizes, lengths = (
        _read_rows(task.examined, rows),
        clips["bytes"][rows].tolist(),
        clips["samples"][rows].tolist(),
    )
    splits = np.where(task.valid[rows], "valid", "train").tolist()
    gates = Gates(settings.min_confidence, alignments.bound(settings.wrong_share), settings.min_evidence)
    jobs = (
        CutJob(
            where,
            line,
            size,
            samples,
            split,
            settings.limit_sec,
            _evidence_of(line, where, alignments),
            None if split == "valid" else sounds,
            gates,
        )  # validation keeps the label of the whole
        for line, size, samples, split in zip(lines, sizes, lengths, splits, strict=True)
    )
    results = pool.map(cut, jobs, [1] * len(rows), "splitting")
    segments = {int(row): result.segments for row, result in zip(rows, results, strict=True) if result.segments}
    return segments, [result.ledger for result in results]


def _evidence_of(row: Row, where: Where, alignments: Alignments) -> Evidence | None:
    return alignments.of(row.parse(where.layouts).utterance_id) if alignments.by_id else None


def _read_rows(examined: Examined, clips: npt.NDArray[np.integer]) -> list[Row]:
    sources = examined.sources
    places = examined.clips[["source", "row"]][clips].tolist()
    return [Row(source, int(sources[source].numbers[row]), sources[source].line(row)) for source, row in places]


def _index(plan: Plan, results: Sequence[ShardResult], tally: Tally) -> ShardIndex:
    task = plan.task
    clips, exceptions, base = task.examined.clips, task.exceptions, task.base
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
                "stand_in": None if exceptions.stand_in is None else f"{exceptions.stand_in:016x}",
                "spared": [f"{speaker:016x}" for speaker in exceptions.spared],
                "clips": tally.validation["clips"],
                "rejected": tally.validation["rejected"],
            },
        },
        shards=tuple(entry for entry, _ in made),
        samples=join_samples([table for _, table in made]),
        sounds=plan.sounds.pack() if plan.sounds else None,
    )
    return index if base is None else _grown(base, index)


# --- what was there before --------------------------------------------------------------------------------------


def _read_base(store: Store, settings: BuildSettings) -> ShardIndex | None:
    """The index of the shard set that is there already, if one is. Raises ShardError where it was built otherwise."""
    if not store.exists(INDEX_NAME):
        return None
    index, wanted = read_index(store), asdict(settings)
    unsaid = asdict(BuildSettings()) if index.settings_hash else {}  # an older set does not name all there is by now
    there = unsaid | index.settings
    differ = [f"{name} {there.get(name) or 'none'} there, {wanted[name] or 'none'} asked" for name in wanted
              if there.get(name) != wanted[name]]  # fmt: skip
    if differ:
        raise ShardError(
            f"{store.url}: holds a shard set built otherwise: {'; '.join(differ)}",
            "choose another --out, or ask for the same",
        )
    return index


def _built_before(store: Store, index: ShardIndex, examined: Examined) -> Built:
    """What is there already, where that is what is asked for. Raises ShardError where it is of other sources."""
    if index.sources_hash != hash_sources(examined.clips):
        raise ShardError(
            f"{store.url}: holds a shard set of other sources, or of sources that have changed",
            "choose another --out; --append adds clips and leaves those there as they are",
        )
    rejected = index.notes["rejected"] / max(index.notes["clips"], 1)
    return Built(index, report.read_summary(store, index), rejected, fresh=False)


def _are_known(store: Store, base: ShardIndex, examined: Examined) -> Mask:
    """Which clips the shards hold already, whole or in pieces; told by the shards, not by the report beside them.

    Raises ManifestError for one whose id is there, but is another corpus's.
    """
    listed = (read_listed(store, shard) for shard in base.shards)
    known = {hash_pair(whole_key(key)): who.corpus for shard in listed
             for key, who in zip(shard.keys, shard.who, strict=True)}  # fmt: skip
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


def _exceptions_of(base: ShardIndex) -> Exceptions:
    validation = base.notes["validation"]
    stand_in, spared = validation["stand_in"], validation.get("spared", [])  # an older set has none
    return Exceptions(None if stand_in is None else int(stand_in, 16), tuple(int(one, 16) for one in spared))


def _numbers_taken(base: ShardIndex) -> dict[tuple[str, int], int]:
    """The next free number of each split and bucket."""
    taken: dict[tuple[str, int], int] = {}
    for shard in base.shards:
        number = shard.name.removesuffix(".tar").rpartition("-")[2]
        if number.isdecimal():  # else no build has given it
            taken[shard.split, shard.bucket] = max(taken.get((shard.split, shard.bucket), 0), int(number) + 1)
    return taken


def _rows_that_stay(rows: Sequence[LedgerRow], examined: Examined) -> LedgerPart:
    """Of the ledger before: a clip that was rejected then and is given again gets a new row."""
    again = {tuple(pair) for pair in examined.clips["key"].tolist()}
    return write_ledger(row for row in rows if hash_pair(escape_key(row["utterance_id"])) not in again)


def _grown(base: ShardIndex, added: ShardIndex) -> ShardIndex:
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


LEFT_BEHIND = re.compile(rf"({'|'.join(SPLITS)})/(b\d\d-\d{{5}}\.(tar|idx\.zst)|\..*\.part)|(report/)?\.[^/]*\.part")


def _clear_unfinished(store: Store, plan: Plan, lease: Lease) -> None:
    """Remove what a build that never published its index left behind: partial files, and shards of another plan."""
    if isinstance(store, BucketStore) and lease.token:  # else another's uploads might go
        store.abort_stale_uploads()
    base = plan.task.base
    kept = {name for name, *_ in plan.shards} | ({shard.name for shard in base.shards} if base else set())
    kept = {name.removesuffix(".tar") for name in kept}
    for name in list(store.names()):
        if LEFT_BEHIND.fullmatch(name) and name.removesuffix(".tar").removesuffix(".idx.zst") not in kept:
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
