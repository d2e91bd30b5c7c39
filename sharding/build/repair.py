"""Make again from the sources what is damaged, to the same bytes."""

import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from sharding.segment.evidence import NO_ALIGNMENTS, Alignments
from sharding.build.pipeline import BuildConfig, ShardPlan, BuildTask, plan_build, write_shards
from sharding.errors import MissingError, ShardError, StreamtrainError, UnreachableError
from sharding.build.scan import ScanResult, scan, hash_128
from sharding.build.write import BuildContext
from sharding.shardset.index import (
    SampleTable,
    ShardIndex,
    join_samples,
    read_index,
    read_checked,
    read_index_header,
    read_index_headers,
    repair_samples,
)
from sharding.build.lock import exclusive_build
from sharding.sources.manifest import ManifestOptions, read_sources
from sharding.shardset.sample import whole_key
from sharding.shardset.schema import ShardEntry
from sharding.segment.acoustic_model import PhoneGMM, unpack_model
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import Faults, find_faults
from sharding.pool import Workers


def repair(
    url: str,
    locations: Sequence[Path],
    reading: ManifestOptions,
    with_audio: bool,
    workers: int,
    alignments: Alignments = NO_ALIGNMENTS,
) -> tuple[Faults, list[str]]:
    """Make damaged shards again, to the same bytes; returns what was wrong, and the indexes whose sample columns were.

    Raises ShardError, and changes no shard, where the sources are not those that the shard set was built of.
    """
    store = open_store(url)
    with exclusive_build(store):
        outline = read_index_header(store)
        shards = outline.shards
        faults = find_faults(url, outline, with_audio, workers)
        if faults and outline.external:
            raise ShardError(f"{url}: its tars were written by others", "copy the damaged ones again")
        if faults:
            generations = [outline for _, outline in read_index_headers(store)][::-1]
            settings = BuildConfig(**generations[-1].settings)
            if settings.alignments != alignments.digest:
                raise ShardError(
                    f"{url}: was built with {'other' if alignments.digest else 'a file of'} alignments",
                    "name that file: --alignments FILE",
                )
            sources = read_sources(locations, replace(reading, track=settings.track, group_by=settings.group_by))
            with Workers(workers) as pool, tempfile.TemporaryDirectory(prefix="streamtrain-") as scratch:
                context = BuildContext(url, scratch, tuple(source.layout for source in sources), settings.track, dry_run=True)
                given = _tell_apart(store, scan(sources, settings.track, pool), generations, faults)
                plans = [plan_build(BuildTask(part, settings, base, alignments), context, pool, acoustic_model)[0]
                         for part, base, acoustic_model in given]  # fmt: skip
                _rewrite(plans, {shard.name: shard for shard in shards if shard.name in faults}, pool)
            doubtful = tuple(shard for shard in shards if shard.name in faults)
            if still := find_faults(url, replace(outline, shards=doubtful), with_audio, workers):
                told = "; ".join(fault.message for fault in still.values())
                raise ShardError(f"{told}: so it was built", "build the shard set anew")
        listed, mended = join_samples([read_checked(store, shard).samples for shard in shards]), []
        for name, older in read_index_headers(store):
            samples = listed[: sum(shard.count for shard in older.shards)]  # a set grows at its end
            if not _columns_are(store, name, samples):
                repair_samples(store, name, samples)
                mended.append(name)
    return faults, mended


def _tell_apart(
    store: Store, examined: ScanResult, generations: Sequence[ShardIndex], faults: Faults
) -> list[tuple[ScanResult, ShardIndex, PhoneGMM | None]]:
    """For each build that made a damaged shard: its clips, the index that it added to, and the sounds that it learned.

    The shards tell which clips they hold. What none of them tells of is of the build whose indexes are damaged.
    """
    keys = examined.clips["key"][:, 0]
    parts, silent, made = [], [], 0
    for generation in generations:
        own, made = generation.shards[made:], len(generation.shards)
        lists = [_read_keys(store, shard) for shard in own]
        listed = sorted({whole_key(key) for names, _ in lists for key in names})
        hashes = np.array([hash_128(key)[0] for key in listed], np.uint64)
        missing = np.flatnonzero(~np.isin(hashes, keys))
        if len(missing):
            raise ShardError(
                f"{store.url}: was built of other sources: {listed[missing[0]]!r} is in none of these; "
                "nothing was repaired",
                "name all the sources that it was built of",
            )
        parts.append(np.isin(keys, hashes))
        silent.append(not all(complete for _, complete in lists))
    untold = ~np.any(parts, axis=0)
    if untold.any() and sum(silent) > 1:
        raise ShardError(f"{store.url}: the indexes of shards of several builds are damaged; nothing was repaired",
                         "who added which clips cannot be told: build it anew")  # fmt: skip
    result: list[tuple[ScanResult, ShardIndex, PhoneGMM | None]] = []
    before: tuple[ShardEntry, ...] = ()
    for generation, part, is_silent in zip(generations, parts, silent, strict=True):
        if any(shard.name in faults for shard in generation.shards[len(before) :]):
            base = replace(generations[-1], shards=before)  # its bins and its stand-in are those of the first
            acoustic_model = unpack_model(generation.acoustic_model) if generation.acoustic_model else None
            result.append((examined.select(part | untold if is_silent else part), base, acoustic_model))
        before = generation.shards
    return result


def _read_keys(store: Store, shard: ShardEntry) -> tuple[list[str], bool]:
    """The keys of a shard as far as it tells, also of what was refused; and whether these are all."""
    try:
        listed = read_checked(store, shard)
        return [*listed.keys, *listed.refused], True
    except ShardError:
        pass
    try:
        tar = store.read(shard.name)
    except MissingError:
        return [], False
    if xxhash.xxh3_64_hexdigest(tar) != shard.checksum:
        return [], False
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        names = members.getnames()
    return [name.removesuffix(".flac") for name in names if name.endswith(".flac")], False


def _rewrite(plans: Sequence[ShardPlan], damaged: Mapping[str, ShardEntry], pool: Workers) -> None:
    """Once without writing, to see that the bytes come out as the index says; then in earnest."""
    chosen = [(plan, [shard for shard in plan.shards if shard[0] in damaged]) for plan in plans]
    results = [result for plan, shards in chosen for result in write_shards(plan, shards, pool)]
    made = {result.made[0].name: result.made[0] for result in results if result.made}
    differ = [name for name in damaged if made.get(name) != damaged[name]]
    if differ:
        out = plans[0].context.out
        raise ShardError(
            f"{out}: {', '.join(differ)}: comes out otherwise than {out}/index.json says; nothing was repaired",
            "another version of this package, of libsndfile, soxr, silero-vad or torch makes other bytes, and so does "
            "audio that has changed",
        )
    for plan, shards in chosen:
        write_shards(replace(plan, context=replace(plan.context, dry_run=False)), shards, pool)


def _columns_are(store: Store, name: str, samples: SampleTable) -> bool:
    try:
        return np.array_equal(read_index(store, name).samples, samples)
    except UnreachableError:
        raise
    except StreamtrainError:
        return False
