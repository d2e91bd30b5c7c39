"""Decide whose splits count, those that a corpus publishes or those by speaker; count the speakers in several."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sharding.build.scan import NO_SPLIT, UNKNOWN_SPLIT, ScanResult, speaker_hash
from sharding.errors import ManifestError
from sharding.report.ledger import MAX_LISTED
from sharding.shardset.build_config import BuildConfig
from sharding.shardset.index import INDEX_NAME, ShardIndex, read_checked, read_index_header
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import Store
from sharding.sources.manifest import printable
from sharding.sources.splits import KNOWN


def keep_splits(store: Store, settings: BuildConfig) -> BuildConfig:
    """Return the settings with the splits of an existing shard set, if they are left open."""
    if settings.splits != "auto" or not store.exists(INDEX_NAME):
        return settings
    return replace(settings, splits=read_index_header(store).settings.get("splits", "hash"))


def settle_splits(settings: BuildConfig, scanned: ScanResult, asked: str) -> BuildConfig:
    """Return the settings with a decision on whose splits count; of several sources, only some may publish theirs.

    `asked` are the splits that the user asked for; `settings` may have those of an existing set. Raises ManifestError
    if official splits are asked for and no source has them, or a row lacks one; or if the set was split by speaker
    and a source publishes a test, which would be trained on.
    """
    has_splits = _have_splits(scanned)
    if asked == "auto" and settings.splits == "hash" and has_splits.any():
        place = scanned.sources[int(has_splits.argmax())].layout.transcripts
        raise ManifestError(
            f"{place}: has splits of its own, but the shard set was split by speaker, and would train on its test",
            "--splits hash appends it so; to keep its splits, build a shard set of its own",
        )
    if settings.splits == "auto":
        settings = replace(settings, splits="official" if has_splits.any() else "hash")
    elif asked == "official" and not has_splits.any():
        raise ManifestError(
            f"--splits official: the rows of {scanned.sources[0].layout.transcripts} have no split",
            "--columns split=COLUMN names theirs; --splits hash splits by speaker",
        )
    if settings.splits == "official":
        check_splits(scanned)
    return settings


def publishing(scanned: ScanResult, settings: BuildConfig) -> npt.NDArray[np.bool_]:
    """Return which sources are split as they were published, shape (sources,)."""
    return _have_splits(scanned) & (settings.splits == "official")


def _have_splits(scanned: ScanResult) -> npt.NDArray[np.bool_]:
    given = scanned.clips["source"][scanned.clips["split"] != NO_SPLIT]
    return np.bincount(given, minlength=len(scanned.sources)) > 0


def check_splits(scanned: ScanResult) -> None:
    """Raise ManifestError if a row of a source that publishes splits has none, or an unknown one."""
    clips = scanned.clips
    wrong = _have_splits(scanned)[clips["source"]] & np.isin(clips["split"], (NO_SPLIT, UNKNOWN_SPLIT))
    for row in np.flatnonzero(wrong)[:1].tolist():
        place, utterance = scanned.find(row)
        problem = f"split is {utterance.split!r:.100}" if utterance.split else "the row has no split, but others have"
        raise ManifestError(f"{place}: {problem}", f"splits are {KNOWN}; --splits hash splits by speaker instead")


def describe_layouts(scanned: ScanResult, settings: BuildConfig, base: ShardIndex | None) -> dict[str, str]:
    """Return how each source was read and split, by its corpus; nothing if all are tables, split by speaker."""
    official = publishing(scanned, settings)
    earlier = dict(base.notes.get("layouts", {})) if base else {}
    layouts = [source.layout for source in scanned.sources]
    if not earlier and not official.any() and not any(layout.name for layout in layouts):
        return {}
    return {layout.corpus: f"{layout.name or 'a table'}, {'official splits' if own else 'split by speaker'}"
            for layout, own in zip(layouts, official.tolist(), strict=True)} | earlier  # fmt: skip


def count_shared_speakers(
    scanned: ScanResult, sides: npt.NDArray[np.uint8], settings: BuildConfig, store: Store, base: ShardIndex | None
) -> dict[str, Any]:
    """Return the count and some names of speakers with clips in several splits; nothing if there is none.

    Only published splits share speakers. Of clips that are appended to, the shards know the `child_id` alone.
    """
    if settings.splits != "official":
        return {}
    clips, names = scanned.clips, dict[int, str]()
    pairs = [np.stack([clips["speaker"], sides.astype(np.uint64)], axis=1)[~clips["refused"]]]
    for shard in base.shards if base else ():
        children = {speaker_hash(info.child_id): info.child_id for info in read_checked(store, shard).speakers}
        children.pop(speaker_hash(""), None)
        names |= children
        pairs += [np.array([(child, SPLITS.index(shard.split)) for child in children], np.uint64).reshape(-1, 2)]
    known = np.unique(np.concatenate(pairs), axis=0)
    known = known[known[:, 1] != SPLITS.index("unlabelled")]
    speakers, counts = np.unique(known[:, 0], return_counts=True)
    shared, examples = speakers[counts > 1], []
    for speaker in shared[:MAX_LISTED].tolist():
        name = names.get(speaker) or scanned.find(int(np.argmax(clips["speaker"] == speaker)))[1].speaker
        splits = ", ".join(SPLITS[side] for side in known[known[:, 0] == speaker, 1].tolist())
        examples.append(f"{printable(name)} ({splits})")
    return {"count": len(shared), "examples": examples} if len(shared) else {}
