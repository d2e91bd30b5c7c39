"""Record the fate of every input clip, one ledger row each, and count the rows."""

import heapq
import io
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NotRequired

import zstandard
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.files.document import DocumentError, Fraction, Number, parse_json, unpack, validate
from sharding.sources.manifest import Utterance

LEDGER_NAME = "report/ledger.jsonl.zst"
DURATION_TOLERANCE_SEC = 0.1  # a declared duration that differs more from the measured one is listed
FATES = ("written", "split", "rejected")
MAX_LISTED = 10  # files that the summary names
CONFIDENCE_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)  # bin edges of the reliability table
NO_LABEL = "no label: kept, not trained on"
PUBLISHED_WITHOUT = "published as unlabelled: kept, not trained on"
TOO_DENSE = "label needs more frames than the clip has: kept without it"
MAX_UNPACKING = 400  # times the packed size: consecutive rows of rejected clips compress to a hundredth

LedgerRow = dict[str, Any]


class _Pass1(TypedDict):
    confidence: Fraction
    right: bool


class _SegmentRow(TypedDict):
    label_status: Literal["labelled", "unlabelled", "reference"]
    reason: str | None
    by: NotRequired[str | None]
    pass1: NotRequired[_Pass1 | None]


class _CheckedRow(TypedDict):
    """Describe the fields that are read from a ledger row."""

    source: str
    utterance_id: str
    audio_path: str
    split: str
    fate: Literal["written", "split", "rejected"]
    reason: str | None
    seconds: Number
    declared_sec: Number | None
    pieces: list[_SegmentRow]
    remarks: NotRequired[list[str]]  # older ledgers have none


_ROW = TypeAdapter(_CheckedRow)
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
    """Return the ledger row of one clip that was written, split or rejected."""
    return {
        "source": utterance.corpus,
        "utterance_id": utterance.utterance_id,
        "audio_path": utterance.audio_path,
        "split": split,  # train | valid | test, chosen by speaker or as published
        "fate": fate,
        "reason": reason,
        "seconds": round(seconds, 4),
        "declared_sec": utterance.duration_sec,
        "key": key,
        "pieces": list(pieces),
        "remarks": list(remarks),  # about its audio and its label
    }


def rejected_row(utterance: Utterance, split: str, reason: str, seconds: float) -> LedgerRow:
    """Return the row of a rejected clip. `seconds` is from its header; if it is 0, the declared duration counts."""
    return ledger_row(utterance, split, "rejected", seconds or utterance.duration_sec or 0.0, reason)


@dataclass
class Tally:
    """Hold counts of clips, which can be added to those of other clips."""

    clips: Counter[str] = field(default_factory=Counter)  # by fate
    seconds: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FATES, 0.0)))  # by fate
    corpora: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)  # whole clips, by reason
    remarks: Counter[str] = field(default_factory=Counter)  # clips, by remark on their audio or label
    unlabelled_pieces: Counter[str] = field(default_factory=Counter)  # segments of long recordings, by kind of reason
    labelled_pieces: Counter[str] = field(default_factory=Counter)  # segments, by how their words were assigned
    pass1_counts: Counter[int] = field(default_factory=Counter)  # segments labelled in pass 2, by confidence of pass 1
    pass1_wrong: Counter[int] = field(default_factory=Counter)  # of these, those with other words in pass 1
    validation: Counter[str] = field(default_factory=Counter)  # "clips" and "rejected" of the validation split
    test: Counter[str] = field(default_factory=Counter)  # likewise of the test split
    worst: list[dict[str, Any]] = field(default_factory=list)
    declared_off: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            (mine.update if isinstance(mine, Counter) else mine.extend)(theirs)

    def count(self, row: LedgerRow) -> None:
        fate, seconds, declared = row["fate"], row["seconds"], row["declared_sec"]
        self.clips[fate] += 1
        self.seconds[fate] += seconds
        self.corpora[row["source"]] += 1
        self.remarks.update(row.get("remarks", ()))
        held_out = {"valid": self.validation, "test": self.test}.get(row["split"], Counter[str]())
        held_out["clips"] += 1
        for segment in row["pieces"]:
            if segment["label_status"] == "unlabelled":
                self.unlabelled_pieces[str(segment["reason"]).partition(":")[0]] += 1
            if segment["label_status"] == "labelled":
                self.labelled_pieces[segment.get("by", "durations")] += 1  # what older ledgers mean
            if pass1 := segment.get("pass1"):
                edge = min(bisect_right(CONFIDENCE_EDGES, pass1["confidence"]), len(CONFIDENCE_EDGES) - 1) - 1
                self.pass1_counts[edge] += 1
                self.pass1_wrong[edge] += not pass1["right"]
        if fate == "rejected":
            self.reasons[row["reason"]] += 1
            held_out["rejected"] += 1
            self.worst.append(
                {name: row[name] for name in ("source", "utterance_id", "audio_path", "reason", "seconds")}
            )
        elif row["reason"]:
            self.unlabelled[row["reason"]] += 1
        if fate != "rejected" and declared is not None and abs(declared - seconds) > DURATION_TOLERANCE_SEC:
            self.declared_off.append(
                {"utterance_id": row["utterance_id"], "declared_sec": declared, "measured_sec": seconds}
            )

    def notes(self, disjoint: bool, fallback: str | None, in_training: Sequence[str]) -> dict[str, Any]:
        """Return the notes of an index: the count of clips, and the speakers whose split is an exception."""
        return {
            "clips": sum(self.clips.values()),
            "rejected": self.clips["rejected"],
            "validation": {
                "disjoint_by_speaker": disjoint,
                "fallback_speaker": fallback,
                "kept_in_training": list(in_training),
                "clips": self.validation["clips"],
                "rejected": self.validation["rejected"],
            },
            **({"test": {name: self.test[name] for name in ("clips", "rejected")}} if self.test else {}),
        }


@dataclass(frozen=True)
class LedgerPart:
    """Hold the ledger rows of some clips and their tally."""

    lines: bytes  # JSON Lines, compressed by zstandard
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
    """Return whether parts of a ledger hold exactly these rows, in any order."""
    lines = (line for part in parts for line in zstandard.decompress(part.lines).splitlines())
    return sorted(lines) == sorted(_write_json(row).encode() for row in rows)


def parse_ledger(data: bytes) -> Iterator[LedgerRow]:
    """Yield the rows of a ledger file. Raises DocumentError."""
    for line in io.BytesIO(unpack(data, MAX_UNPACKING)):
        row = parse_json(line)
        validate(row, _ROW)
        if row["fate"] == "rejected" and row["reason"] is None:
            raise DocumentError("a rejected clip has no 'reason'")
        yield row


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Return all parts as one frame with its size: many readers stop after the first frame, or need the size."""
    size = sum(map(zstandard.frame_content_size, parts))
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=size)
    chunks = [compressor.compress(zstandard.decompress(part)) for part in parts]
    return b"".join([*chunks, compressor.flush()])


def longest_rejected(rejected: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nsmallest(MAX_LISTED, rejected, key=lambda row: (-row["seconds"], row["utterance_id"]))
