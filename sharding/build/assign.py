"""Assign samples to shards and speakers to validation. Arithmetic only: no files, no processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.audio.codec import SAMPLE_RATE
from sharding.build.duration_buckets import bucket_of
from sharding.build.scan import ClipTable, hash_128
from sharding.files.spool import map_table
from sharding.segment.split import Segment
from sharding.shardset.sample import escape_key, piece_key
from sharding.shardset.schema import HELD_OUT, SPLITS

FLAC_RATIO = 0.54  # FLAC size of speech / size of its 16-bit PCM, to estimate shard sizes
SAMPLE_OVERHEAD_BYTES = 2048  # about: tar headers, padding and JSON of a sample
CONVERSION_COST = 6  # work of converting a clip / work of passing it through

PLANNED_DTYPE = np.dtype(
    [
        ("clip", "<u4"),  # row in the table of clips
        ("piece", "<u4"),
        ("split", "u1"),  # in SPLITS
        ("bucket", "u1"),
        ("whole", "?"),  # a whole clip, else a segment
        ("samples", "<u8"),
        ("bytes", "<u8"),  # estimate
        ("work", "<u8"),  # samples, weighted by the cost of processing them
        ("order", "<u8", 2),
    ]
)
PlannedTable = npt.NDArray[np.void]  # (N,) of PLANNED_DTYPE
Mask = npt.NDArray[np.bool_]
Sides = npt.NDArray[np.uint8]  # (N,) the split of each clip, in SPLITS; unlabelled: published without labels
Hashes = npt.NDArray[np.uint64]  # of speakers
Segments = Mapping[int, Sequence[Segment]]  # of long recordings, by row of the clip
TRAIN, VALID, UNLABELLED = map(SPLITS.index, ("train", "valid", "unlabelled"))
PlannedShard = tuple[str, int, npt.NDArray[np.int64]]  # name, bucket, rows in the PlannedTable


@dataclass(frozen=True, slots=True)
class SplitExceptions:
    """Hold the hashes of speakers whose split differs from the one that their hash alone determines."""

    fallback_speaker: int | None = None  # in validation, which would otherwise be empty
    kept_in_training: tuple[int, ...] = ()  # in training, as validation would otherwise be too large


def choose_exceptions(speakers: Hashes, fraction: float, in_training: tuple[int, ...] = ()) -> SplitExceptions:
    """Choose the fewest exceptions by which at least one of several speakers, and at most 2 × `fraction`, validate.

    At least one speaker trains, also if there is only one, and so do those `in_training` already. A fraction of 0 or 1
    needs no exception.
    """
    speakers = np.setdiff1d(speakers, np.array(in_training, np.uint64))  # ascending, unique
    if not len(speakers) or not 0 < fraction < 1:
        return SplitExceptions(kept_in_training=in_training)
    total = len(speakers) + len(in_training)
    below = int(is_validation(speakers, fraction, SplitExceptions()).sum())
    count = min(max(below, 1), max(int(2 * fraction * total), 1), total - 1)
    fallback = int(speakers[0]) if count > below else None
    return SplitExceptions(fallback, in_training + tuple(speakers[count : max(below, 1)].tolist()))


def is_validation(speakers: Hashes, fraction: float, exceptions: SplitExceptions) -> Mask:
    """Return which clips, given the hashes of their speakers, are in the validation split, shape (N,).

    A speaker whose hash is below `fraction` validates, apart from the exceptions, and stays there as data grows.
    """
    limit, fallback = np.uint64(max(round(fraction * 2**64) - 1, 0)), exceptions.fallback_speaker
    valid = speakers <= limit if fraction > 0 else np.zeros(len(speakers), bool)
    valid &= ~np.isin(speakers, np.array(exceptions.kept_in_training, np.uint64))
    return valid if fallback is None else valid | (speakers == np.uint64(fallback))


def is_held_out(sides: Sides) -> Mask:
    """Return which clips are scored, never trained on nor filtered by their labels, shape (N,)."""
    return np.isin(sides, [SPLITS.index(split) for split in HELD_OUT])


def list_samples(clips: ClipTable, whole: Mask, segments: Segments, sides: Sides) -> PlannedTable:
    """Return one sample per clip of `whole` and one per segment, without their buckets."""
    rows, parts = np.flatnonzero(whole), sum(map(len, segments.values()))
    members = map_table(len(rows) + parts, PLANNED_DTYPE)
    _fill_whole(members[: len(rows)], clips, rows, sides)
    _fill_segments(members[len(rows) :], segments, sides)
    return members


def assign_shards(
    members: PlannedTable,
    bins: Sequence[float],
    shard_bytes: int,
    min_shards: int,
    first_numbers: Mapping[tuple[str, int], int] | None = None,
) -> list[PlannedShard]:
    """Group samples by split and bucket into shards of about equal size, numbered from `first_numbers` or 0.

    Within a bucket samples follow their column `order`, the hash of their key: mixed, yet independent of the order of
    the sources. (In a dry run, it is the order of the sources.)
    """
    members["bucket"] = bucket_of(members["samples"] / SAMPLE_RATE, bins)
    order = np.lexsort((members["order"][:, 1], members["order"][:, 0], members["bucket"], members["split"]))
    group = members["split"][order].astype(int) * 256 + members["bucket"][order]
    shards = []
    for rows in np.split(order, np.flatnonzero(np.diff(group)) + 1) if len(order) else []:
        split, bucket = SPLITS[members["split"][rows[0]]], int(members["bucket"][rows[0]])
        first = (first_numbers or {}).get((split, bucket), 0)
        for number, part in enumerate(_cut_evenly(rows, members["bytes"][rows], shard_bytes, min_shards), first):
            shards.append((f"{split}/b{bucket:02d}-{number:05d}.tar", bucket, part))
    return shards


def _cut_evenly(
    rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.uint64], shard_bytes: int, min_shards: int
) -> list[npt.NDArray[np.int64]]:
    """Split the rows into parts of about equal size, none of them empty."""
    ends = np.cumsum(sizes.astype(np.int64))
    count = min(max(min_shards, -(-int(ends[-1]) // shard_bytes)), len(rows))
    part = np.arange(count)
    starts = np.searchsorted(ends, part * int(ends[-1]) // count, side="right")
    starts = np.maximum.accumulate(starts - part) + part  # each starts at least one clip after the one before,
    return np.split(rows, np.minimum(starts, len(rows) - count + part)[1:])  # and leaves one for each part that follows


def _fill_whole(members: PlannedTable, clips: ClipTable, rows: npt.NDArray[np.int64], sides: Sides) -> None:
    members["clip"], members["whole"] = rows, True
    members["split"] = np.where(is_held_out(sides[rows]) | clips["fits"][rows], sides[rows], UNLABELLED)
    members["samples"], members["order"] = clips["samples"][rows], clips["key"][rows]
    passthrough = clips["passthrough"][rows]
    audio_bytes = np.where(passthrough, clips["bytes"][rows], _flac_bytes(members["samples"]))
    members["bytes"] = audio_bytes + SAMPLE_OVERHEAD_BYTES
    members["work"] = members["samples"] * np.where(passthrough, 1, CONVERSION_COST)


def _fill_segments(members: PlannedTable, segments: Segments, sides: Sides) -> None:
    rows = ((clip, number, segment) for clip, parts in segments.items() for number, segment in enumerate(parts))
    for member, (clip, number, segment) in zip(members, rows, strict=True):
        side = UNLABELLED if segment.label_status == "unlabelled" and sides[clip] == TRAIN else sides[clip]
        member["clip"], member["piece"], member["split"] = clip, number, side
        member["samples"] = segment.samples
        member["order"] = hash_128(piece_key(escape_key(segment.utterance_id), number))
    members["bytes"] = _flac_bytes(members["samples"]) + SAMPLE_OVERHEAD_BYTES
    members["work"] = members["samples"]


def _flac_bytes(samples: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return np.asarray(samples * (2 * FLAC_RATIO)).astype(np.int64)
