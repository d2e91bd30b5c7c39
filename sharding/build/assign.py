"""Decide which sample goes into which shard, and who validates. Arithmetic only: no files, no processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.audio.codec import SAMPLE_RATE
from sharding.build.duration_buckets import bucket_of
from sharding.build.scan import ClipTable, piece_order
from sharding.shardset.schema import SPLITS
from sharding.segment.split import Segment

FLAC_RATIO = 0.54  # of 16-bit PCM: what speech compresses to, for planning the size of shards
SAMPLE_OVERHEAD_BYTES = 2048  # tar headers, padding and JSON of a sample, about
CONVERSION_COST = 6  # times the work of passing a clip through

PLANNED_DTYPE = np.dtype(
    [
        ("clip", "<u4"),  # row in the table of clips
        ("piece", "<u4"),
        ("split", "u1"),  # in SPLITS
        ("bucket", "u1"),
        ("whole", "?"),  # or a piece
        ("samples", "<u8"),
        ("bytes", "<u8"),  # estimate
        ("work", "<u8"),  # samples, weighted by what is to be done with them
        ("order", "<u8", 2),
    ]
)
PlannedTable = npt.NDArray[np.void]  # (N,) of MEMBER_DTYPE
Mask = npt.NDArray[np.bool_]
Segments = Mapping[int, Sequence[Segment]]  # of long recordings, by row of the clip
PlannedShard = tuple[str, int, npt.NDArray[np.int64]]  # name, bucket, rows of the members


@dataclass(frozen=True, slots=True)
class SplitExceptions:
    """The speakers, by hash, who are not on the side that their hash alone says."""

    fallback_speaker: int | None = None  # validates, for want of another
    kept_in_training: tuple[int, ...] = ()  # train, for too many others validate


def choose_exceptions(speakers: npt.NDArray[np.uint64], fraction: float, spared: tuple[int, ...] = ()) -> SplitExceptions:
    """Choose as few as it takes for one of two or more speakers to validate, and no more than twice their share.

    One always trains; a single speaker does, and so do those who are `spared` already. A fraction of 0 or of 1 needs
    no exception.
    """
    speakers = np.setdiff1d(speakers, np.array(spared, np.uint64))  # ascending, each once
    if not len(speakers) or not 0 < fraction < 1:
        return SplitExceptions(kept_in_training=spared)
    everyone = len(speakers) + len(spared)
    below = int(is_validation(speakers, fraction, SplitExceptions()).sum())
    count = min(max(below, 1), max(int(2 * fraction * everyone), 1), everyone - 1)
    stand_in = int(speakers[0]) if count > below else None
    return SplitExceptions(stand_in, spared + tuple(speakers[count : max(below, 1)].tolist()))


def is_validation(speakers: npt.NDArray[np.uint64], fraction: float, exceptions: SplitExceptions) -> Mask:
    """Which clips, given the hashes of their speakers, validate, shape (N,).

    All clips of the speakers whose hash falls below `fraction`, so that they stay there as data grows, but for the
    exceptions.
    """
    below = (
        speakers <= np.uint64(max(round(fraction * 2**64) - 1, 0)) if fraction > 0 else np.zeros(len(speakers), bool)
    )
    below &= ~np.isin(speakers, np.array(exceptions.kept_in_training, np.uint64))
    return below if exceptions.fallback_speaker is None else below | (speakers == np.uint64(exceptions.fallback_speaker))


def list_samples(clips: ClipTable, whole: Mask, segments: Segments, valid: Mask) -> PlannedTable:
    """One sample for each clip of `whole`, and one for each piece. Its bucket is still to be found."""
    return np.concatenate([_whole_clips(clips, np.flatnonzero(whole), valid), _segments_of(segments, valid)])


def assign_shards(
    members: PlannedTable,
    bins: Sequence[float],
    shard_bytes: int,
    min_shards_per_bucket: int,
    taken: Mapping[tuple[str, int], int] | None = None,
) -> list[PlannedShard]:
    """Group samples by split and bucket into shards of about equal size; `taken` numbers are there already.

    Within a bucket the order is that of the keys' hashes: mixed, yet the same for sources given in any order.
    """
    members["bucket"] = bucket_of(members["samples"] / SAMPLE_RATE, bins)
    order = np.lexsort((members["order"][:, 1], members["order"][:, 0], members["bucket"], members["split"]))
    group = members["split"][order].astype(int) * 256 + members["bucket"][order]
    shards = []
    for rows in np.split(order, np.flatnonzero(np.diff(group)) + 1) if len(order) else []:
        split, bucket = SPLITS[members["split"][rows[0]]], int(members["bucket"][rows[0]])
        first = (taken or {}).get((split, bucket), 0)
        for number, chosen in enumerate(_cut_evenly(rows, members["bytes"][rows], shard_bytes, min_shards_per_bucket), first):
            shards.append((f"{split}/b{bucket:02d}-{number:05d}.tar", bucket, chosen))
    return shards


def _cut_evenly(
    rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.uint64], shard_bytes: int, min_shards_per_bucket: int
) -> list[npt.NDArray[np.int64]]:
    """In parts of about equal size, none of them empty."""
    ends = np.cumsum(sizes.astype(np.int64))
    count = min(max(min_shards_per_bucket, -(-int(ends[-1]) // shard_bytes)), len(rows))
    part = np.arange(count)
    starts = np.searchsorted(ends, part * int(ends[-1]) // count, side="right")
    starts = np.maximum.accumulate(starts - part) + part  # each begins at least one clip after the one before,
    return np.split(rows, np.minimum(starts, len(rows) - count + part)[1:])  # and leaves one for each that follows


def _whole_clips(clips: ClipTable, rows: npt.NDArray[np.int64], valid: Mask) -> PlannedTable:
    members = np.zeros(len(rows), PLANNED_DTYPE)
    members["clip"], members["whole"] = rows, True
    members["split"] = np.select([valid[rows], clips["fits"][rows]], [SPLITS.index("valid"), SPLITS.index("train")],
                                 SPLITS.index("unlabelled"))  # fmt: skip
    members["samples"], members["order"] = clips["samples"][rows], clips["key"][rows]
    through = clips["passthrough"][rows]
    members["bytes"] = np.where(through, clips["bytes"][rows], _flac_bytes(members["samples"])) + SAMPLE_OVERHEAD_BYTES
    members["work"] = members["samples"] * np.where(through, 1, CONVERSION_COST)
    return members


def _segments_of(segments: Segments, valid: Mask) -> PlannedTable:
    rows = [(clip, number, segment) for clip, pieces in segments.items() for number, segment in enumerate(pieces)]
    members = np.zeros(len(rows), PLANNED_DTYPE)
    for member, (clip, number, segment) in zip(members, rows, strict=True):
        split = "valid" if valid[clip] else "unlabelled" if segment.label_status == "unlabelled" else "train"
        member["clip"], member["piece"], member["split"] = clip, number, SPLITS.index(split)
        member["samples"] = segment.samples
        member["order"] = piece_order(segment.utterance_id, number)
    members["bytes"] = _flac_bytes(members["samples"]) + SAMPLE_OVERHEAD_BYTES
    members["work"] = members["samples"]
    return members


def _flac_bytes(samples: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return np.asarray(samples * (2 * FLAC_RATIO)).astype(np.int64)
