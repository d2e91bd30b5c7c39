"""What became of every input clip: the ledger, the summary and a picture of the durations."""

import hashlib
import heapq
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NotRequired

import zstandard
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.archive import MISSING
from sharding.audio import SAMPLE_RATE
from sharding.document import LARGE_BYTES, Number, Share, check, parse_json, unpack
from sharding.errors import MissingError, ShardError
from sharding.format import SPLITS, ShardIndex
from sharding.manifest import Utterance, printable
from sharding.store import Store

LEDGER_NAME = "report/ledger.jsonl.zst"
SUMMARY_NAME = "report/summary.json"
ORPHANS_NAME = "report/orphans.txt"
PLOT_NAME = "report/durations.png"
FILES = (LEDGER_NAME, SUMMARY_NAME, ORPHANS_NAME, PLOT_NAME)
SUMS_NAME = "report/SHA256SUMS"  # of these, and of which index they are
DECLARED_OFF_SEC = 0.1  # a declared duration further than this from the measured one is listed
FATES = ("written", "split", "rejected")
WORST = 10  # files that the summary names
SURE = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)  # edges of the probabilities in the reliability table
NO_LABEL = "no label: kept, not trained on"
TOO_DENSE = "label needs more frames than the clip has: kept without it"


Row = dict[str, Any]  # of the ledger
COPY_HINT = "without it the report cannot grow; copy it again"
MAX_UNPACKING = 400  # times its size: rows of one refusal after another shrink to a hundredth


class _Guess(TypedDict):
    confidence: Share
    right: bool


class _Piece(TypedDict):
    label_status: str
    by: NotRequired[str | None]
    guess: NotRequired[_Guess | None]


class _Row(TypedDict):
    """What is read of a row of a ledger."""

    source: str
    utterance_id: str
    audio_path: str
    split: str
    fate: Literal["written", "split", "rejected"]
    reason: str | None
    seconds: Number
    declared_sec: Number | None
    pieces: list[_Piece]


_ROW = TypeAdapter(_Row)
_write_json = json.JSONEncoder(ensure_ascii=False).encode


def ledger_row(
    utterance: Utterance,
    split: str,
    fate: str,
    seconds: float,
    reason: str | None = None,
    key: str | None = None,
    pieces: Sequence[Row] = (),
    remarks: Sequence[str] = (),
) -> Row:
    """What became of one clip: written, split or rejected."""
    return {
        "source": utterance.corpus,
        "utterance_id": utterance.utterance_id,
        "audio_path": utterance.audio_path,
        "split": split,  # train | valid, by its speaker
        "fate": fate,
        "reason": reason,
        "seconds": round(seconds, 4),
        "declared_sec": utterance.duration_sec,
        "key": key,
        "pieces": list(pieces),
        "remarks": list(remarks),  # on its sound
    }


def rejected_row(utterance: Utterance, split: str, reason: str) -> Row:
    return ledger_row(utterance, split, "rejected", utterance.duration_sec or 0.0, reason)


@dataclass
class Tally:
    """Counts over some clips, which add up."""

    clips: Counter[str] = field(default_factory=Counter)  # by fate
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FATES, 0.0))
    corpora: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)  # whole clips, by reason
    remarks: Counter[str] = field(default_factory=Counter)  # clips, by what is said of their sound
    unlabelled_pieces: Counter[str] = field(default_factory=Counter)  # of long recordings, by the kind of reason
    labelled_pieces: Counter[str] = field(default_factory=Counter)  # by how their words were found
    guessed: Counter[int] = field(default_factory=Counter)  # pieces labelled by a model, by how sure pass 1 was (SURE)
    guessed_wrong: Counter[int] = field(default_factory=Counter)  # of these, where pass 1 would have given other words
    validation: Counter[str] = field(default_factory=Counter)  # clips, rejected
    worst: list[dict[str, Any]] = field(default_factory=list)
    declared_off: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for name in (each.name for each in fields(self)):
            if isinstance(counts := getattr(self, name), Counter):
                counts.update(getattr(other, name))
        for fate in FATES:
            self.seconds[fate] += other.seconds[fate]
        self.worst += other.worst
        self.declared_off += other.declared_off

    def count(self, row: Row) -> None:
        fate, seconds, declared = row["fate"], row["seconds"], row["declared_sec"]
        self.clips[fate] += 1
        self.seconds[fate] += seconds
        self.corpora[row["source"]] += 1
        self.remarks.update(row.get("remarks", ()))  # none in older ledgers
        self.validation["clips"] += row["split"] == "valid"
        for piece in row["pieces"]:
            if piece["label_status"] == "unlabelled":
                self.unlabelled_pieces[str(piece["reason"]).partition(":")[0]] += 1
            if piece["label_status"] == "labelled":
                self.labelled_pieces[piece.get("by", "durations")] += 1  # as older ledgers mean
            if guess := piece.get("guess"):
                place = min(bisect_right(SURE, guess["confidence"]), len(SURE) - 1) - 1
                self.guessed[place] += 1
                self.guessed_wrong[place] += not guess["right"]
        if fate == "rejected":
            self.reasons[row["reason"]] += 1
            self.validation["rejected"] += row["split"] == "valid"
            self.worst.append(
                {name: row[name] for name in ("source", "utterance_id", "audio_path", "reason", "seconds")}
            )
        elif row["reason"]:
            self.unlabelled[row["reason"]] += 1
        if fate != "rejected" and declared is not None and abs(declared - seconds) > DECLARED_OFF_SEC:
            self.declared_off.append(
                {"utterance_id": row["utterance_id"], "declared_sec": declared, "measured_sec": seconds}
            )


@dataclass(frozen=True)
class LedgerPart:
    """The ledger's rows of some clips, and what they add up to."""

    lines: bytes  # JSON Lines, zstandard
    tally: Tally


def write_ledger(rows: Iterable[Row]) -> LedgerPart:
    tally, lines = Tally(), []
    for row in rows:
        tally.count(row)
        lines.append(_write_json(row) + "\n")
    tally.worst = _worst(tally.worst)
    return LedgerPart(zstandard.compress("".join(lines).encode(), 3), tally)


def publish(
    store: Store,
    parts: Sequence[LedgerPart],
    tally: Tally,
    index: ShardIndex,
    orphans: Sequence[str],
    ignored_fields: Iterable[str],
) -> dict[str, Any]:
    """Write the ledger, which adds up to the tally, the summary, the plot, and their sums; returns the summary."""
    from sharding.plots import plot_durations  # matplotlib takes a second to import

    summary = _summarize(tally, index, orphans, ignored_fields)
    files = {
        LEDGER_NAME: _join([part.lines for part in parts]),
        SUMMARY_NAME: json.dumps(summary, ensure_ascii=False, indent=1).encode(),
        ORPHANS_NAME: "".join(f"{name}\n" for name in orphans).encode(),
        PLOT_NAME: plot_durations(index),
    }
    for name, data in (files | {SUMS_NAME: _pack_sums(index, files)}).items():
        store.write(name, data)
    return summary


def add_up(parts: Iterable[LedgerPart]) -> Tally:
    total = Tally()
    for part in parts:
        total.add(part.tally)
    return total


def read_summary(store: Store, index: ShardIndex) -> dict[str, Any] | None:
    """The summary of a shard set, or None where its report was left behind."""
    try:
        document: dict[str, Any] = parse_json(_read(store, index, SUMMARY_NAME))
        render(document, store.url)  # one that cannot be shown is none
    except MissingError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ShardError(f"{store.url}/{SUMMARY_NAME}: damaged ({error})", "the shards may still be well") from error
    return document


def check_report(store: Store, index: ShardIndex) -> list[str]:
    """Return what is wrong with the report. Nothing is if all of it is missing, as from a copy of the shards alone."""
    place = _place(store, index)
    seen = {name: _read_if_there(store, place(name)) for name in (*FILES, SUMS_NAME)}
    if not any(data is not None for data in seen.values()):
        return []
    faults = [f"{store.url}/{place(name)}: is missing" for name, data in seen.items() if data is None]
    sums = seen.pop(SUMS_NAME)
    if sums is None:
        return faults
    where, lines = f"{store.url}/{place(SUMS_NAME)}", [_sum(name, data or b"") for name, data in seen.items()]
    said = sums.decode(errors="replace").split("\n")
    faults += [f"{store.url}/{place(name)}: its checksum is {line[:16]}…, {where} has another"
               for (name, data), line in zip(seen.items(), lines, strict=True)
               if data is not None and line not in said]  # fmt: skip
    if _head(index) not in said:
        faults.append(f"{where}: is not of the index {index.digest[:16]}…, which is here")
    return faults or [f"{where}: says more than the sums"] * (said != [_head(index), *lines, ""])


# --- while a set is appended to -------------------------------------------------------------------------------------


def is_kept(store: Store, index: ShardIndex) -> bool:
    """Tell whether an append to this index has begun and not ended: what is in report/ may be of the next one."""
    return store.exists(_kept(index, SUMS_NAME))


def keep_old(store: Store, index: ShardIndex) -> tuple[list[Row], list[str]]:
    """Return the ledger and the orphans of an index that is about to be appended to, and keep its report aside.

    It is the report of the index until the next one is there, also if this build is killed before. Raises ShardError
    if the ledger or the orphans are damaged or missing.
    """
    try:
        ledger, orphans = (_read(store, index, name) for name in (LEDGER_NAME, ORPHANS_NAME))
        rows = [parse_json(line) for line in unpack(ledger, MAX_UNPACKING).splitlines()]
        for row in rows:
            check(row, _ROW)
        names = orphans.decode().splitlines()
    except MissingError as error:
        hint = "without it the report of what is added cannot be whole; build into another --out"
        raise ShardError(error.message, hint) from error
    except ValueError as error:
        raise ShardError(f"{store.url}/{LEDGER_NAME}: damaged ({error})", COPY_HINT) from error
    if not is_kept(store, index):
        files = {name: data for name in FILES if (data := _read_if_there(store, name)) is not None}
        sums = _read_if_there(store, SUMS_NAME) or _pack_sums(index, files)  # a set older than its sums has none
        for name, data in (files | {SUMS_NAME: sums}).items():  # which come last: they say that the others are there
            store.write(_kept(index, name), data)
    return rows, names


def put_back(store: Store, index: ShardIndex) -> None:
    """Undo `keep_old`, and what was published since then: no next index comes."""
    if is_kept(store, index):
        for name in (*FILES, SUMS_NAME):
            if (data := _read_if_there(store, _kept(index, name))) is not None:
                store.write(name, data)
        forget_old(store, index)


def forget_old(store: Store, index: ShardIndex) -> None:
    """Delete the report of an index that was kept while it was appended to."""
    for name in (SUMS_NAME, *FILES):
        store.delete(_kept(index, name))


def _kept(index: ShardIndex, name: str) -> str:
    return name.replace("/", f"/{index.digest}-", 1)


def _place(store: Store, index: ShardIndex) -> Callable[[str], str]:
    """Return under which name a file of the report of an index lies."""
    return partial(_kept, index) if is_kept(store, index) else str


def _read(store: Store, index: ShardIndex, name: str) -> bytes:
    """Read a file of the report of an index. Raises MissingError, and ShardError if its sum is another."""
    place = _place(store, index)
    data, sums = store.read(place(name), LARGE_BYTES), _read_if_there(store, place(SUMS_NAME))
    if sums is not None:  # of a set older than they are, there are none
        lines = sums.decode(errors="replace").split("\n")
        if _sum(name, data) not in lines or _head(index) not in lines:
            where = f"{store.url}/{place(name)}"
            raise ShardError(f"{where}: damaged: its checksum, or its index, is not as {SUMS_NAME} says", COPY_HINT)
    return data


def _read_if_there(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name, LARGE_BYTES)
    except MissingError:
        return None


def _pack_sums(index: ShardIndex, files: Mapping[str, bytes]) -> bytes:
    return "\n".join([_head(index), *(_sum(name, data) for name, data in files.items()), ""]).encode()


def _head(index: ShardIndex) -> str:
    return f"# report of the shard set whose index has the digest {index.digest}"  # to sha256sum, a comment


def _sum(name: str, data: bytes) -> str:
    """A line of what `sha256sum --check` reads."""
    return f"{hashlib.sha256(data).hexdigest()}  {name.rpartition('/')[2]}"


# --- its parts ------------------------------------------------------------------------------------------------------


def tell_the_same(parts: Sequence[LedgerPart], rows: Iterable[Row]) -> bool:
    """Return whether parts of a ledger are some rows, in whatever order."""
    lines = (line for part in parts for line in zstandard.decompress(part.lines).splitlines())
    return sorted(lines) == sorted(_write_json(row).encode() for row in rows)


def _join(parts: Sequence[bytes]) -> bytes:
    """One frame of them all, which says how long it is: many a reader stops after the first, or asks for its size."""
    size = sum(map(zstandard.frame_content_size, parts))
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=size)
    chunks = [compressor.compress(zstandard.decompress(part)) for part in parts]
    return b"".join([*chunks, compressor.flush()])


def _worst(rejected: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nsmallest(WORST, rejected, key=lambda row: (-row["seconds"], row["utterance_id"]))


def _summarize(
    tally: Tally, index: ShardIndex, orphans: Sequence[str], ignored_fields: Iterable[str]
) -> dict[str, Any]:
    """Clips and seconds in = written + split + rejected; then what the shard set holds."""
    return {
        "clips_in": sum(tally.clips.values()),
        "seconds_in": round(sum(tally.seconds.values()), 3),
        "fates": {fate: {"clips": tally.clips[fate], "seconds": round(tally.seconds[fate], 3)} for fate in FATES},
        "reasons": _commonest_first(tally.reasons),
        "worst": _worst(tally.worst),
        "remarks": _commonest_first(tally.remarks),
        "unlabelled_pieces": sum(tally.unlabelled_pieces.values()),
        "labelled_pieces": dict(sorted(tally.labelled_pieces.items())),
        "reliability": [
            {"confidence": [SURE[place], SURE[place + 1]], "pieces": count, "wrong": tally.guessed_wrong[place]}
            for place, count in sorted(tally.guessed.items())
        ],
        "unlabelled_reasons": _commonest_first(tally.unlabelled + tally.unlabelled_pieces),
        "corpora": dict(sorted(tally.corpora.items())),
        "orphan_audio": len(orphans),
        "orphan_rows": tally.reasons[MISSING],
        "ignored_fields": sorted(ignored_fields),
        "declared_off": sorted(tally.declared_off, key=lambda row: str(row["utterance_id"])),
        "duration_bins": list(index.duration_bins),
        "splits": {split: _split_row(index, split) for split in SPLITS},
        "notes": index.notes,
        "valid_fraction": index.settings.get("valid_fraction"),  # None: tars that others wrote
    }


def _commonest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def render(summary: dict[str, Any], url: str, dry: bool = False) -> str:
    """The summary of the set at `url` for a person at a terminal; a `dry` run has left no files to look into."""
    fates, notes, labelled = summary["fates"], summary["notes"], summary.get("labelled_pieces", {})
    lines = [
        f"{summary['clips_in']:,} clips in ({summary['seconds_in'] / 3600:.2f} h) = "
        + " + ".join(f"{fate['clips']:,} {name}" for name, fate in fates.items()),
        f"{'split':>12} {'samples':>9} {'hours':>8} {'shards':>7} {'MB':>8} {'padding in buckets':>19}",
    ]
    for split, row in summary["splits"].items():
        lines.append(
            f"{split:>12} {row['samples']:9,} {row['hours']:8.2f} {row['shards']:7,} {row['mb']:8.1f}"
            f" {row['bucket_padding']:18.1%}"
        )
    lines += [f"{count:6,} rejected: {reason}" for reason, count in list(summary["reasons"].items())[:WORST]]
    lines += _name_worst(summary, dry)
    lines += [f"{count:6,} noted: {remark}" for remark, count in summary.get("remarks", {}).items()]
    unlabelled = list(summary["unlabelled_reasons"].items())
    lines += [f"{count:6,} unlabelled: {reason}" for reason, count in unlabelled[:WORST]]
    lines += [f"{count:6,} labelled: pieces of long recordings, by {how}" for how, count in labelled.items()]
    lines += _tell_reliability(summary.get("reliability", []))
    if summary["unlabelled_pieces"]:
        lines += _tell_next(summary, url, dry)
    if summary["orphan_audio"]:
        where = "" if dry else f"; {ORPHANS_NAME}"
        lines.append(f"{summary['orphan_audio']:,} audio files have no row in the transcripts (not an error{where})")
    if summary["orphan_rows"]:
        lines.append(f"{summary['orphan_rows']:,} rows of the transcripts have no audio file")
    if summary["declared_off"]:
        count = len(summary["declared_off"])
        lines.append(
            f"{count:,} declared durations are off by more than {DECLARED_OFF_SEC} s; the measured ones are used"
        )
    lines += _tell_sides(summary)
    if not notes["validation"]["disjoint_by_speaker"]:
        lines.append("validation is not disjoint by speaker: clips without child_id were split by session or by clip")
    return "\n".join(map(printable, lines))


def _tell_sides(summary: dict[str, Any]) -> list[str]:
    """Tell if there is nothing to train on, nothing to validate on, or far more of it than was asked for."""
    train, valid = (summary["splits"][split]["samples"] for split in ("train", "valid"))
    fraction = summary.get("valid_fraction")
    lines = []
    if not train:
        lines.append("there is nothing to train on: every labelled clip is a validation child's, or none is labelled")
    if not valid and fraction == 0:
        lines.append("there is nothing to validate on, as --valid-fraction 0 says: training will score nothing")
    elif not valid and fraction is None:
        lines.append("there is nothing to validate on, and training will score nothing: name some tars with --valid")
    elif not valid and train:
        lines += [
            "there is nothing to validate on, and training will score nothing: all clips that could be are of one "
            "speaker, and none may be on both sides",
            "hint: --group-by COLUMN parts them by another column, such as the session's; --valid-fraction 0 if it is "
            "meant so; a set of other speakers, built with --valid-fraction 1, is one to score on afterwards",
        ]
    if train and fraction and valid > 2 * fraction * (train + valid):
        lines.append(f"validation has {valid / (train + valid):.0%} of the labelled clips, --valid-fraction asks for "
                     f"{fraction:.0%}: the speakers are few, or of very unequal shares")  # fmt: skip
    return lines


def _tell_reliability(table: Sequence[dict[str, Any]]) -> list[str]:
    """How right the sounds of the corpus's labels would have been, where a model could tell."""
    if not table:
        return []
    return ["pieces labelled by alignment, by how sure the sounds of the corpus's labels are of them:"] + [
        f"{row['pieces']:6,} at {row['confidence'][0]:.2f} – {row['confidence'][1]:.2f}, "
        f"{row['wrong']:,} of them with other words"
        for row in table
    ]


def _tell_next(summary: dict[str, Any], url: str, dry: bool) -> list[str]:
    """Tell what comes next for pieces without a label: a model may know their words, if none was asked yet."""
    told = f"{summary['unlabelled_pieces']:,} pieces of long recordings are kept without a label and not trained on"
    if dry or "alignment" in summary.get("labelled_pieces", {}):
        return [told]
    return [
        told,
        "a model that was trained on the others may know their words:",
        f"  python -m streamtrain align RUN/best {url} --out alignments.jsonl.zst",
        f"  python -m sharding build SOURCE… --out {url.rstrip('/')}2 --alignments alignments.jsonl.zst",
    ]


def _name_worst(summary: dict[str, Any], dry: bool) -> list[str]:
    """The files behind the counts: the longest first, for they cost most."""
    if not summary["worst"]:
        return []
    count = summary["fates"]["rejected"]["clips"]
    more = f", the {len(summary['worst'])} longest" if count > len(summary["worst"]) else ""
    where = "" if dry else f" ({LEDGER_NAME} has all)"
    return [f"rejected files{more}{where}:"] + [
        f"{row['seconds']:8.2f} s  {row['source']}/{row['audio_path']}: {row['reason']}" for row in summary["worst"]
    ]


def _split_row(index: ShardIndex, split: str) -> dict[str, Any]:
    rows = index.split(split)
    shards = [shard for shard in index.shards if shard.split == split]
    seconds = index.samples["samples"][rows].sum() / SAMPLE_RATE
    ends = index.bucket_ends(split)
    padded = sum(shard.count * ends[shard.bucket] for shard in shards)
    return {
        "samples": len(rows),
        "hours": round(float(seconds) / 3600, 4),
        "shards": len(shards),
        "mb": round(sum(shard.bytes for shard in shards) / 2**20, 2),
        "bucket_padding": round(max(0.0, 1 - float(seconds) / padded), 4) if padded else 0.0,
        "bucket_ends": [round(end, 4) for end in ends],  # seconds
    }
