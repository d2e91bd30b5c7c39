"""What became of every input clip: a row for each, and what they add up to."""

import heapq
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NotRequired

import zstandard
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.files.document import DocumentError, Fraction, Number, parse_json, unpack, validate
from sharding.sources.manifest import Utterance

LEDGER_NAME = "report/ledger.jsonl.zst"
DURATION_TOLERANCE_SEC = 0.1  # a declared duration further than this from the measured one is listed
FATES = ("written", "split", "rejected")
MAX_LISTED = 10  # files that the summary names
CONFIDENCE_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)  # edges of the probabilities in the reliability table
NO_LABEL = "no label: kept, not trained on"
TOO_DENSE = "label needs more frames than the clip has: kept without it"
MAX_UNPACKING = 400  # times its size: rows of one refusal after another shrink to a hundredth

LedgerRow = dict[str, Any]


class _Guess(TypedDict):
    confidence: Fraction
    right: bool


class _Piece(TypedDict):
    label_status: Literal["labelled", "unlabelled", "reference"]
    reason: str | None
    by: NotRequired[str | None]
    pass1: NotRequired[_Guess | None]


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
    remarks: NotRequired[list[str]]  # none in older ledgers


_ROW = TypeAdapter(_Row)
_write_json = json.JSONEncoder(ensure_ascii=False).encode


def ledger_row(
    utterance: Utterance,
    split: str,
    fate: str,
    seconds: float,
    reason: str | None = None,
    key: str | None = None,
    pieces: Sequence[LedgerRow] = (),
    remarks: Sequence[str] = (),
) -> LedgerRow:
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
        "remarks": list(remarks),  # on its sound and its label
    }


def rejected_row(utterance: Utterance, split: str, reason: str, seconds: float) -> LedgerRow:
    """What is told of a clip that lasts so long by its header; else, as if that is 0, as its row declares."""
    return ledger_row(utterance, split, "rejected", seconds or utterance.duration_sec or 0.0, reason)


@dataclass
class Tally:
    """Counts over some clips, which add up."""

    clips: Counter[str] = field(default_factory=Counter)  # by fate
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FATES, 0.0))
    corpora: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)  # whole clips, by reason
    remarks: Counter[str] = field(default_factory=Counter)  # clips, by what is said of their sound or label
    unlabelled_pieces: Counter[str] = field(default_factory=Counter)  # of long recordings, by the kind of reason
    labelled_pieces: Counter[str] = field(default_factory=Counter)  # by how their words were found
    pass1_counts: Counter[int] = field(default_factory=Counter)  # segments labelled by a model, by pass 1's confidence
    pass1_wrong: Counter[int] = field(default_factory=Counter)  # of these, where pass 1 would have given other words
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

    def count(self, row: LedgerRow) -> None:
        fate, seconds, declared = row["fate"], row["seconds"], row["declared_sec"]
        self.clips[fate] += 1
        self.seconds[fate] += seconds
        self.corpora[row["source"]] += 1
        self.remarks.update(row.get("remarks", ()))
        self.validation["clips"] += row["split"] == "valid"
        for piece in row["pieces"]:
            if piece["label_status"] == "unlabelled":
                self.unlabelled_pieces[str(piece["reason"]).partition(":")[0]] += 1
            if piece["label_status"] == "labelled":
                self.labelled_pieces[piece.get("by", "durations")] += 1  # as older ledgers mean
            if guess := piece.get("pass1"):
                place = min(bisect_right(CONFIDENCE_EDGES, guess["confidence"]), len(CONFIDENCE_EDGES) - 1) - 1
                self.pass1_counts[place] += 1
                self.pass1_wrong[place] += not guess["right"]
        if fate == "rejected":
            self.reasons[row["reason"]] += 1
            self.validation["rejected"] += row["split"] == "valid"
            self.worst.append(
                {name: row[name] for name in ("source", "utterance_id", "audio_path", "reason", "seconds")}
            )
        elif row["reason"]:
            self.unlabelled[row["reason"]] += 1
        if fate != "rejected" and declared is not None and abs(declared - seconds) > DURATION_TOLERANCE_SEC:
            self.declared_off.append(
                {"utterance_id": row["utterance_id"], "declared_sec": declared, "measured_sec": seconds}
            )


@dataclass(frozen=True)
class LedgerPart:
    """The ledger's rows of some clips, and what they add up to."""

    lines: bytes  # JSON Lines, zstandard
    tally: Tally


def write_ledger(rows: Iterable[LedgerRow]) -> LedgerPart:
    tally, lines = Tally(), []
    for row in rows:
        tally.count(row)
        lines.append(_write_json(row) + "\n")
    tally.worst = longest_rejected(tally.worst)
    return LedgerPart(zstandard.compress("".join(lines).encode(), 3), tally)


def sum_tallies(parts: Iterable[LedgerPart]) -> Tally:
    total = Tally()
    for part in parts:
        total.add(part.tally)
    return total


def same_rows(parts: Sequence[LedgerPart], rows: Iterable[LedgerRow]) -> bool:
    """Return whether parts of a ledger are some rows, in whatever order."""
    lines = (line for part in parts for line in zstandard.decompress(part.lines).splitlines())
    return sorted(lines) == sorted(_write_json(row).encode() for row in rows)


def parse_ledger(data: bytes) -> list[LedgerRow]:
    """Return the rows of a ledger file. Raises DocumentError."""
    rows = [parse_json(line) for line in unpack(data, MAX_UNPACKING).splitlines()]
    for row in rows:
        validate(row, _ROW)
        if row["fate"] == "rejected" and row["reason"] is None:
            raise DocumentError("a clip was rejected for no 'reason'")
    return rows


def join_parts(parts: Sequence[bytes]) -> bytes:
    """One frame of them all, which says how long it is: many a reader stops after the first, or asks for its size."""
    size = sum(map(zstandard.frame_content_size, parts))
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=size)
    chunks = [compressor.compress(zstandard.decompress(part)) for part in parts]
    return b"".join([*chunks, compressor.flush()])


def longest_rejected(rejected: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nsmallest(MAX_LISTED, rejected, key=lambda row: (-row["seconds"], row["utterance_id"]))
