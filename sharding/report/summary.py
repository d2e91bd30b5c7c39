"""Summarize a build in numbers, as JSON for programs and as text for a terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import counted
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
SHOWN_SYMBOLS, RAREST = 80, 8  # of an alphabet
Summary = dict[str, Any]  # summary.json


def summarize(tally: Tally, index: ShardIndex, orphans: Sequence[str], ignored_fields: Iterable[str]) -> Summary:
    """Return the summary: clips and seconds in = written + split + rejected, then the content of the shard set."""
    return {
        "clips_in": sum(tally.clips.values()),
        "seconds_in": round(sum(tally.seconds.values()), 3),
        "fates": {fate: {"clips": tally.clips[fate], "seconds": round(tally.seconds[fate], 3)} for fate in FATES},
        "reasons": _commonest_first(tally.reasons),
        "worst": longest_rejected(tally.worst),
        "remarks": _commonest_first(tally.remarks),
        "unlabelled_pieces": sum(tally.unlabelled_pieces.values()),
        "labelled_pieces": dict(sorted(tally.labelled_pieces.items())),
        "reliability": [
            {"confidence": [*CONFIDENCE_EDGES[edge : edge + 2]], "pieces": count, "wrong": tally.pass1_wrong[edge]}
            for edge, count in sorted(tally.pass1_counts.items())
        ],
        "unlabelled_reasons": _commonest_first(tally.unlabelled + tally.unlabelled_pieces),
        "corpora": dict(sorted(tally.corpora.items())),
        "orphan_audio": len(orphans),
        "orphan_rows": tally.reasons[MISSING],
        "ignored_fields": sorted(ignored_fields),
        "declared_off": sorted(tally.declared_off, key=lambda row: str(row["utterance_id"])),
        "labels": index.labels.document(),
        "duration_bins": list(index.duration_bins),
        "splits": {split: _split_row(index, split) for split in SPLITS},
        "notes": index.notes,
        "aligned": bool(index.settings.get("alignments")),  # built with alignments of a model (pass 2)
        "official_splits": index.settings.get("splits") == "official",
        "valid_fraction": index.settings.get("valid_fraction"),  # None: tars of other programs
    }


def _commonest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def render(summary: Summary, url: str, dry: bool = False) -> str:
    """Return the summary of the set at `url` as text; a `dry` run has written no files, so none are named."""
    fates, notes, labelled = summary["fates"], summary["notes"], summary["labelled_pieces"]
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
    lines += _render_labels(summary["labels"])
    lines += [f"{count:6,} rejected: {reason}" for reason, count in list(summary["reasons"].items())[:MAX_LISTED]]
    lines += _list_longest_rejected(summary, dry)
    lines += [f"{count:6,} noted: {remark}" for remark, count in summary["remarks"].items()]
    unlabelled = list(summary["unlabelled_reasons"].items())
    lines += [f"{count:6,} unlabelled: {reason}" for reason, count in unlabelled[:MAX_LISTED]]
    lines += [f"{count:6,} labelled: segments of long recordings, by {method}" for method, count in labelled.items()]
    lines += _render_reliability(summary["reliability"])
    if summary["unlabelled_pieces"]:
        lines += _suggest_alignment(summary, url, dry)
    if summary["orphan_audio"]:
        file = "" if dry else f"; {ORPHANS_NAME}"
        lines.append(f"{summary['orphan_audio']:,} audio files have no row in the transcripts (not an error{file})")
    if summary["orphan_rows"]:
        lines.append(f"{summary['orphan_rows']:,} rows of the transcripts have no audio file")
    if summary["declared_off"]:
        count = len(summary["declared_off"])
        lines.append(
            f"{count:,} declared durations are off by more than {DURATION_TOLERANCE_SEC} s; the measured ones are used"
        )
    lines += _warn_about_splits(summary) + _explain_splits(notes)
    return "\n".join(map(printable, lines))


def _render_labels(labels: dict[str, Any]) -> list[str]:
    """Return the profile and the alphabet, with its rarest symbols, among which typing errors show."""
    symbols = labels["symbols"]
    shown = " ".join(symbols[:SHOWN_SYMBOLS]) + (f" and {len(symbols) - SHOWN_SYMBOLS:,} more"
                                                  if len(symbols) > SHOWN_SYMBOLS else "")  # fmt: skip
    lines = [f"labels: profile {labels['profile']}, {counted(len(symbols), 'symbol')} of {labels['units']}: {shown}"]
    if labels["counts"]:
        rarest = sorted(zip(labels["counts"], symbols, strict=True))[:RAREST]
        lines.append("rarest symbols: " + ", ".join(f"{symbol} {count:,} ×" for count, symbol in rarest))
    return lines


def _explain_splits(notes: dict[str, Any]) -> list[str]:
    """Return how each corpus was split, unless all were by speaker, and the speakers in several splits."""
    lines = [f"{corpus}: {layout}" for corpus, layout in notes.get("layouts", {}).items()]
    shared = notes.get("shared_speakers")
    if shared:
        more = ", …" if shared["count"] > len(shared["examples"]) else ""
        lines.append(f"{counted(shared['count'], 'speaker')} in several of the published splits, so that scores are "
                     f"too optimistic: {', '.join(shared['examples'])}{more}")  # fmt: skip
    elif notes["validation"]["clips"] and not notes["validation"]["disjoint_by_speaker"]:
        lines.append("some speakers are not known or in several splits, so that scores may be too optimistic: child_id "
                     "names them")  # fmt: skip
    return lines


def _warn_about_splits(summary: Summary) -> list[str]:
    """Return warnings if training or validation is empty, or validation far larger than requested."""
    train, valid = (summary["splits"][split]["samples"] for split in ("train", "valid"))
    fraction = summary["valid_fraction"]
    lines = []
    if not train:
        lines.append("there is nothing to train on: no clip is labelled, or all labelled clips are for validation")
    if not valid and fraction == 0:
        lines.append("there is nothing to validate on, because of --valid-fraction 0: training will compute no score")
    elif not valid and summary["official_splits"]:
        lines.append("there is nothing to validate on, training will compute no score: the published splits have no "
                     "validation; --splits hash splits by speaker")  # fmt: skip
    elif not valid and fraction is None:
        lines.append("there is nothing to validate on, training will compute no score: name some tars with --valid")
    elif not valid and train:
        lines += [
            "there is nothing to validate on, training will compute no score: all usable clips are of one speaker, "
            "and no speaker may be in both splits",
            "hint: --group-by COLUMN splits by another column, such as the session; --valid-fraction 0 if this is "
            "intended; to score afterwards, build a set of other speakers with --valid-fraction 1",
        ]
    if not summary["official_splits"] and train and fraction and valid > 2 * fraction * (train + valid):
        lines.append(f"validation has {valid / (train + valid):.0%} of the labelled clips, --valid-fraction asks for "
                     f"{fraction:.0%}: there are few speakers, or their shares are very unequal")  # fmt: skip
    return lines


def _render_reliability(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return the accuracy of pass 1 by its confidence, on segments that pass 2 labelled."""
    if not table:
        return []
    return ["segments labelled by alignment, by the confidence of the acoustic model (pass 1) in them:"] + [
        f"{row['pieces']:6,} at {row['confidence'][0]:.2f} – {row['confidence'][1]:.2f}, "
        f"{row['wrong']:,} of them with other words in pass 1"
        for row in table
    ]


def _suggest_alignment(summary: Summary, url: str, dry: bool) -> list[str]:
    """Return the count of segments without a label, and the commands to align them if no model has."""
    count = summary["unlabelled_pieces"]
    are_kept = "is kept" if count == 1 else "are kept"
    message = f"{counted(count, 'segment')} of long recordings {are_kept} without a label, not trained on"
    if dry or summary["aligned"] or "alignment" in summary["labelled_pieces"]:
        return [message]
    return [
        message,
        "a model trained on the other clips may be able to align their words:",
        f"  streamtrain align RUN/best {url} --out alignments.jsonl.zst",
        f"  streamtrain build SOURCE… --out {url.rstrip('/')}2 --alignments alignments.jsonl.zst",
    ]


def _list_longest_rejected(summary: Summary, dry: bool) -> list[str]:
    """Return lines that name the rejected files, longest first because they cost most."""
    if not summary["worst"]:
        return []
    count = summary["fates"]["rejected"]["clips"]
    more = f", the {len(summary['worst'])} longest" if count > len(summary["worst"]) else ""
    ledger = "" if dry else f" ({LEDGER_NAME} has all)"
    return [f"rejected files{more}{ledger}:"] + [
        f"{_format_seconds(row['seconds'])}  {row['source']}/{row['audio_path']}: {row['reason']}"
        for row in summary["worst"]
    ]


def _format_seconds(seconds: float) -> str:
    return f"{seconds:8.2f} s" if seconds else f"{'–':>10}"  # of unknown length


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
