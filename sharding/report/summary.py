"""What a build has made, in numbers: for programs, and as a person reads it at a terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import counted
from sharding.files.document import Fraction, Number, Size, parse
from sharding.report.ledger import (
    CONFIDENCE_EDGES,
    DURATION_TOLERANCE_SEC,
    FATES,
    LEDGER_NAME,
    MAX_LISTED,
    Tally,
    longest_rejected,
)
from sharding.shardset.index import ShardIndex
from sharding.shardset.schema import SPLITS
from sharding.sources.archive import MISSING
from sharding.sources.manifest import printable

ORPHANS_NAME = "report/orphans.txt"


class _Fate(TypedDict):
    clips: Size
    seconds: Number


class _Rejected(TypedDict):
    source: str
    utterance_id: str
    audio_path: str
    reason: str
    seconds: Number


class _Confidence(TypedDict):
    """How right pass 1 was where it was so sure."""

    confidence: tuple[Fraction, Fraction]
    pieces: Size
    wrong: Size


class _Split(TypedDict):
    samples: Size
    hours: Number
    shards: Size
    mb: Number
    bucket_padding: Number
    bucket_ends: NotRequired[list[Number]]  # seconds


class _Validation(TypedDict):
    disjoint_by_speaker: bool


class _Notes(TypedDict):
    validation: _Validation


class Summary(TypedDict):
    """What is read of summary.json; what an older one may lack is not required."""

    clips_in: Size
    seconds_in: Number
    fates: Annotated[dict[Literal["written", "split", "rejected"], _Fate], Field(min_length=3)]
    reasons: dict[str, Size]  # of rejected clips
    worst: list[_Rejected]
    remarks: NotRequired[dict[str, Size]]
    unlabelled_pieces: Size
    labelled_pieces: NotRequired[dict[str, Size]]
    reliability: NotRequired[list[_Confidence]]
    unlabelled_reasons: dict[str, Size]
    orphan_audio: Size
    orphan_rows: Size
    declared_off: list[dict[str, Any]]
    splits: Annotated[dict[Literal["train", "valid", "unlabelled"], _Split], Field(min_length=3)]
    notes: _Notes
    valid_fraction: NotRequired[Fraction | None]
    aligned: NotRequired[bool]


_SUMMARY = TypeAdapter(Summary)


def parse_summary(data: bytes) -> Summary:
    """Return what a summary file says. Raises DocumentError."""
    return parse(data, _SUMMARY)


def summarize(tally: Tally, index: ShardIndex, orphans: Sequence[str], ignored_fields: Iterable[str]) -> Summary:
    """Clips and seconds in = written + split + rejected; then what the shard set holds."""
    document = {
        "clips_in": sum(tally.clips.values()),
        "seconds_in": round(sum(tally.seconds.values()), 3),
        "fates": {fate: {"clips": tally.clips[fate], "seconds": round(tally.seconds[fate], 3)} for fate in FATES},
        "reasons": _commonest_first(tally.reasons),
        "worst": longest_rejected(tally.worst),
        "remarks": _commonest_first(tally.remarks),
        "unlabelled_pieces": sum(tally.unlabelled_pieces.values()),
        "labelled_pieces": dict(sorted(tally.labelled_pieces.items())),
        "reliability": [
            {"confidence": [*CONFIDENCE_EDGES[place : place + 2]], "pieces": count, "wrong": tally.pass1_wrong[place]}
            for place, count in sorted(tally.pass1_counts.items())
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
        "aligned": bool(index.settings.get("alignments")),  # a model was asked for the words of pieces
        "valid_fraction": index.settings.get("valid_fraction"),  # None: tars that others wrote
    }
    return cast(Summary, document)  # of which it has a little more than is read


def _commonest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def render(summary: Summary, url: str, dry: bool = False) -> str:
    """The summary of the set at `url` for a person at a terminal; a `dry` run has left no files to look into."""
    fates, notes, labelled = summary["fates"], summary["notes"], summary.get("labelled_pieces", {})
    lines = [
        f"{counted(summary['clips_in'], 'clip')} in ({summary['seconds_in'] / 3600:.2f} h) = "
        + " + ".join(f"{fate['clips']:,} {name}" for name, fate in fates.items()),
        f"{'split':>12} {'samples':>9} {'hours':>8} {'shards':>7} {'MB':>8} {'padding in buckets':>19}",
    ]
    for split, row in summary["splits"].items():
        lines.append(
            f"{split:>12} {row['samples']:9,} {row['hours']:8.2f} {row['shards']:7,} {row['mb']:8.1f}"
            f" {row['bucket_padding']:18.1%}"
        )
    lines += [f"{count:6,} rejected: {reason}" for reason, count in list(summary["reasons"].items())[:MAX_LISTED]]
    lines += _name_worst(summary, dry)
    lines += [f"{count:6,} noted: {remark}" for remark, count in summary.get("remarks", {}).items()]
    unlabelled = list(summary["unlabelled_reasons"].items())
    lines += [f"{count:6,} unlabelled: {reason}" for reason, count in unlabelled[:MAX_LISTED]]
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
            f"{count:,} declared durations are off by more than {DURATION_TOLERANCE_SEC} s; the measured ones are used"
        )
    lines += _tell_sides(summary)
    if not notes["validation"]["disjoint_by_speaker"]:
        lines.append("validation is not disjoint by speaker: clips without child_id were split by session or by clip")
    return "\n".join(map(printable, lines))


def _tell_sides(summary: Summary) -> list[str]:
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


def _tell_reliability(table: Sequence[_Confidence]) -> list[str]:
    """How right the sounds of the corpus's labels would have been, where a model could tell."""
    if not table:
        return []
    return ["pieces labelled by alignment, by how sure the sounds of the corpus's labels are of them:"] + [
        f"{row['pieces']:6,} at {row['confidence'][0]:.2f} – {row['confidence'][1]:.2f}, "
        f"{row['wrong']:,} of them with other words"
        for row in table
    ]


def _tell_next(summary: Summary, url: str, dry: bool) -> list[str]:
    """Tell what comes next for pieces without a label: a model may know their words, if none was asked yet."""
    told = f"{summary['unlabelled_pieces']:,} pieces of long recordings are kept without a label and not trained on"
    if dry or summary.get("aligned") or "alignment" in summary.get("labelled_pieces", {}):
        return [told]
    return [
        told,
        "a model that was trained on the others may know their words:",
        f"  python -m streamtrain align RUN/best {url} --out alignments.jsonl.zst",
        f"  python -m sharding build SOURCE… --out {url.rstrip('/')}2 --alignments alignments.jsonl.zst",
    ]


def _name_worst(summary: Summary, dry: bool) -> list[str]:
    """The files behind the counts: the longest first, for they cost most."""
    if not summary["worst"]:
        return []
    count = summary["fates"]["rejected"]["clips"]
    more = f", the {len(summary['worst'])} longest" if count > len(summary["worst"]) else ""
    where = "" if dry else f" ({LEDGER_NAME} has all)"
    return [f"rejected files{more}{where}:"] + [
        f"{_tell_seconds(row['seconds'])}  {row['source']}/{row['audio_path']}: {row['reason']}"
        for row in summary["worst"]
    ]


def _tell_seconds(seconds: float) -> str:
    return f"{seconds:8.2f} s" if seconds else f"{'–':>10}"  # of what tells no length


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
