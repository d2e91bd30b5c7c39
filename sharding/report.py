"""What became of every input clip: the ledger, the summary and a picture of the durations."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import zstandard

from sharding.audio import SAMPLE_RATE
from sharding.errors import ShardError
from sharding.format import SPLITS, Sample, Shard, ShardIndex, escape_key
from sharding.manifest import Source, Utterance
from sharding.split import Segment
from sharding.store import Reader, Store

LEDGER_NAME = "report/ledger.jsonl.zst"
SUMMARY_NAME = "report/summary.json"
PLOT_NAME = "report/durations.png"
DECLARED_OFF_SEC = 0.1  # a declared duration further than this from the measured one is listed


class Ledger:
    """One row per input clip: written, split or rejected. Nothing vanishes."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}  # by the key of the whole clip
        self._split: dict[str, str] = {}
        self._declared: dict[str, float | None] = {}

    def write(self, utterance: Utterance, split: str, sample: Sample, samples: int) -> None:
        self._add(utterance, split, "written", samples / SAMPLE_RATE, key=sample.key)
        if sample.label_status == "unlabelled":
            few = "label needs more frames than the clip has: kept without it"
            self._rows[sample.key]["reason"] = few if sample.parent_text else "no label: kept, not trained on"

    def split(self, utterance: Utterance, split: str, samples: Sequence[Sample], segments: Sequence[Segment]) -> None:
        pieces = [
            {"key": sample.key, **{name: value for name, value in asdict(segment).items() if name != "utterance_id"}}
            | {"text": sample.text, "label_status": sample.label_status}
            for sample, segment in zip(samples, segments, strict=True)
        ]
        self._add(utterance, split, "split", segments[-1].end_sec, pieces=pieces)

    def reject(self, utterance: Utterance, split: str, reason: str) -> None:
        self._add(utterance, split, "rejected", utterance.duration_sec or 0.0, reason=reason)

    def refuse_key(self, key: str, reason: str) -> None:
        """A clip that looked well by its header did not decode."""
        row = self._rows[key]
        row |= {"fate": "rejected", "reason": reason, "key": None, "seconds": round(self._declared[key] or 0.0, 4)}

    def measured(self, shard: Shard) -> None:
        """The true lengths of a shard's whole clips, now that they were decoded."""
        for key, samples in zip(shard.keys, shard.samples["samples"].tolist(), strict=True):
            if key in self._rows and self._rows[key]["fate"] == "written":
                self._rows[key]["seconds"] = round(samples / SAMPLE_RATE, 4)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by utterance id."""
        return sorted(self._rows.values(), key=lambda row: str(row["utterance_id"]))

    def declared_off(self) -> list[dict[str, Any]]:
        """Clips whose declared duration is more than 0.1 s from the measured one."""
        return [
            {"utterance_id": row["utterance_id"], "declared_sec": declared, "measured_sec": row["seconds"]}
            for key, row in self._rows.items()
            if row["fate"] != "rejected"
            and (declared := self._declared[key]) is not None
            and abs(declared - row["seconds"]) > DECLARED_OFF_SEC
        ]

    def notes(self, by_child: bool) -> dict[str, Any]:
        """What a scorecard must repeat about the shard set."""
        rejected = [key for key, row in self._rows.items() if row["fate"] == "rejected"]
        return {
            "clips": len(self._rows),
            "rejected": len(rejected),
            "validation": {
                "disjoint_by_speaker": by_child,
                "clips": sum(split == "valid" for split in self._split.values()),
                "rejected": sum(self._split[key] == "valid" for key in rejected),
            },
        }

    def _add(self, utterance: Utterance, split: str, fate: str, seconds: float, **rest: Any) -> None:
        row_key = escape_key(utterance.utterance_id)
        self._declared[row_key] = utterance.duration_sec
        self._split[row_key] = split
        self._rows[row_key] = {
            "source": utterance.corpus,
            "utterance_id": utterance.utterance_id,
            "fate": fate,
            "reason": None,
            "seconds": round(seconds, 4),
            "key": None,
            "pieces": [],
        } | rest


def publish(store: Store, ledger: Ledger, index: ShardIndex, corpora: Sequence[Source]) -> dict[str, Any]:
    """Write the ledger, the summary and the plot; returns the summary."""
    rows = ledger.rows()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    store.write(LEDGER_NAME, zstandard.ZstdCompressor(level=9).compress(lines.encode()))
    summary = summarize(rows, index, corpora) | {"declared_off": ledger.declared_off()}
    store.write(SUMMARY_NAME, json.dumps(summary, ensure_ascii=False, indent=1).encode())
    store.write(PLOT_NAME, _plot_durations(index))
    return summary


def read_summary(store: Reader) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(store.read(SUMMARY_NAME))
    except ValueError as error:
        raise ShardError(f"{store.url}/{SUMMARY_NAME}: damaged ({error})", "the shards may still be well") from error
    return document


def summarize(rows: Sequence[dict[str, Any]], index: ShardIndex, corpora: Sequence[Source]) -> dict[str, Any]:
    """Clips and seconds in = written + split + rejected; then what the shard set holds."""
    fates = {fate: [row for row in rows if row["fate"] == fate] for fate in ("written", "split", "rejected")}
    return {
        "clips_in": len(rows),
        "seconds_in": round(sum(row["seconds"] for row in rows), 3),
        "fates": {
            fate: {"clips": len(group), "seconds": round(sum(row["seconds"] for row in group), 3)}
            for fate, group in fates.items()
        },
        "reasons": dict(Counter(row["reason"] for row in fates["rejected"]).most_common()),
        "unlabelled_pieces": sum(
            piece["label_status"] == "unlabelled" for row in fates["split"] for piece in row["pieces"]
        ),
        "unlabelled_reasons": dict(Counter(row["reason"] for row in fates["written"] if row["reason"]).most_common()),
        "rejected": [
            {name: row[name] for name in ("source", "utterance_id", "reason")} for row in fates["rejected"][:10]
        ],
        "corpora": dict(Counter(utterance.corpus for source in corpora for utterance in source.utterances)),
        "orphan_audio": sum(source.orphans for source in corpora),
        "ignored_fields": sorted({field for source in corpora for field in source.ignored_fields}),
        "duration_bins": list(index.duration_bins),
        "splits": {split: _split_row(index, split) for split in SPLITS},
        "notes": index.notes,
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as a person reads it in a terminal."""
    fates, notes = summary["fates"], summary["notes"]
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
    lines += [f"{count:6,} rejected: {reason}" for reason, count in summary["reasons"].items()]
    lines += [f"{count:6,} unlabelled: {reason}" for reason, count in summary["unlabelled_reasons"].items()]
    if summary["unlabelled_pieces"]:
        lines.append(
            f"{summary['unlabelled_pieces']:6,} unlabelled: pieces of long recordings; which words they hold is not "
            "certain, so they are kept and not trained on"
        )
    if summary["orphan_audio"]:
        lines.append(f"{summary['orphan_audio']:,} audio files have no row in the transcripts (not an error)")
    if summary["declared_off"]:
        count = len(summary["declared_off"])
        lines.append(
            f"{count:,} declared durations are off by more than {DECLARED_OFF_SEC} s; the measured ones are used"
        )
    if not summary["splits"]["train"]["samples"]:
        lines.append("there is nothing to train on: every labelled clip is a validation child's, or none is labelled")
    if not notes["validation"]["disjoint_by_speaker"]:
        lines.append("validation is not disjoint by speaker: clips without child_id were split by session or by clip")
    return "\n".join(lines)


def _split_row(index: ShardIndex, split: str) -> dict[str, Any]:
    rows = index.split(split)
    shards = [shard for shard in index.shards if shard.split == split]
    seconds = index.samples["samples"][rows].sum() / SAMPLE_RATE
    edges = sum(shard.count * index.duration_bins[shard.bucket] for shard in shards)
    return {
        "samples": len(rows),
        "hours": round(float(seconds) / 3600, 4),
        "shards": len(shards),
        "mb": round(sum(shard.bytes for shard in shards) / 2**20, 2),
        "bucket_padding": round(max(0.0, 1 - float(seconds) / edges), 4) if edges else 0.0,
    }


def _plot_durations(index: ShardIndex) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for split, colour in zip(SPLITS, ("#33658a", "#f6ae2d", "#b0b0b0"), strict=True):
        rows = index.split(split)
        if len(rows):
            seconds = index.samples["samples"][rows] / SAMPLE_RATE
            bins = np.geomspace(max(seconds.min(), 0.1), max(index.duration_bins[-1], 0.2), 60).tolist()
            axes.hist(
                seconds, bins=bins, histtype="step", label=f"{split} ({len(rows):,})", color=colour, linewidth=1.5
            )
    for edge in index.duration_bins:
        axes.axvline(edge, color="black", alpha=0.25, linewidth=0.7)
    axes.set(xscale="log", yscale="log", xlabel="duration, s (lines: bucket edges)", ylabel="clips")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    if len(index.samples):
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
