"""Rebuild damaged shards and indexes from the sources, to the same bytes."""

import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from sharding.build.lock import exclusive_build
from sharding.build.pipeline import BuildTask, ShardPlan, plan_build, write_shards
from sharding.build.scan import ScanResult, hash_128, scan
from sharding.build.write import BuildContext
from sharding.errors import MissingError, ShardError, StreamtrainError, UnreachableError
from sharding.pool import Workers
from sharding.segment.acoustic_model import PhoneGMM, unpack_model
from sharding.segment.evidence import NO_ALIGNMENTS, Alignments
from sharding.shardset.build_config import BuildConfig
from sharding.shardset.index import (
    SampleTable,
    ShardIndex,
    join_samples,
    read_checked,
    read_index,
    read_index_header,
    read_index_headers,
    repair_samples,
)
from sharding.shardset.sample import whole_key
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import Faults, find_faults
from sharding.sources.manifest import ManifestOptions, read_sources


def repair(
    url: str,
    locations: Sequence[Path],
    manifest_options: ManifestOptions,
    with_audio: bool,
    workers: int,
    alignments: Alignments = NO_ALIGNMENTS,
) -> tuple[Faults, list[str]]:
    """Rebuild damaged shards, to the same bytes. Returns the faults, and the indexes whose sample columns were damaged.

    Raises ShardError, and changes no shard, if the sources are not those that the shard set was built from.
    """
    store = open_store(url)
    with exclusive_build(store):
        header = read_index_header(store)
        faults = find_faults(url, header, with_audio, workers)
        damaged = {shard.name: shard for shard in header.shards if shard.name in faults}
        if faults and header.external:
            raise ShardError(f"{url}: its tars were written by others", "copy the damaged ones again")
        if faults:
            generations = [generation for _, generation in read_index_headers(store)][::-1]
            settings = BuildConfig(**generations[-1].settings)
            if settings.alignments != alignments.digest:
                message = f"{url}: was built with {'other' if alignments.digest else 'a file of'} alignments"
                raise ShardError(message, "name that file: --alignments FILE")
            manifest_options = replace(manifest_options, track=settings.track, group_by=settings.group_by)
            sources = read_sources(locations, manifest_options)
            with Workers(workers) as pool, tempfile.TemporaryDirectory(prefix="streamtrain-") as scratch:
                layouts = tuple(source.layout for source in sources)
                context = BuildContext(url, scratch, layouts, settings.track, dry_run=True)
                builds = _separate_builds(store, scan(sources, settings.track, pool), generations, faults)
                plans = [plan_build(BuildTask(clips, settings, base, alignments), context, pool, acoustic_model)[0]
                         for clips, base, acoustic_model in builds]  # fmt: skip
                _rewrite(plans, damaged, pool)
            if left := find_faults(url, replace(header, shards=tuple(damaged.values())), with_audio, workers):
                messages = "; ".join(fault.message for fault in left.values())
                raise ShardError(f"{messages}: the original build has the same fault", "rebuild the shard set")
        all_samples, repaired = join_samples([read_checked(store, shard).samples for shard in header.shards]), []
        for name, generation in read_index_headers(store):
            samples = all_samples[: sum(shard.count for shard in generation.shards)]  # a set grows at its end
            if not _has_samples(store, name, samples):
                repair_samples(store, name, samples)
                repaired.append(name)
    return faults, repaired


def _separate_builds(
    store: Store, scanned: ScanResult, generations: Sequence[ShardIndex], faults: Faults
) -> list[tuple[ScanResult, ShardIndex, PhoneGMM | None]]:
    """Return for each build that wrote a damaged shard: its clips, the index that it added to, its acoustic model.

    The shards list their clips. Clips that no shard lists belong to the build whose shard indexes are damaged.
    """
    keys = scanned.clips["key"][:, 0]
    masks, incomplete, count = [], [], 0
    for generation in generations:
        shards, count = generation.shards[count:], len(generation.shards)
        lists = [_read_keys(store, shard) for shard in shards]
        listed = sorted({whole_key(key) for names, _ in lists for key in names})
        hashes = np.array([hash_128(key)[0] for key in listed], np.uint64)
        missing = np.flatnonzero(~np.isin(hashes, keys))
        if len(missing):
            message = f"was built from other sources: {listed[missing[0]]!r} is in none of these; nothing was repaired"
            raise ShardError(f"{store.url}: {message}", "name all the sources that it was built from")
        masks.append(np.isin(keys, hashes))
        incomplete.append(not all(complete for _, complete in lists))
    unlisted = ~np.any(masks, axis=0)
    if unlisted.any() and sum(incomplete) > 1:
        raise ShardError(f"{store.url}: shard indexes of several builds are damaged; nothing was repaired",
                         "cannot determine which build added which clips: rebuild the shard set")  # fmt: skip
    result: list[tuple[ScanResult, ShardIndex, PhoneGMM | None]] = []
    before: tuple[ShardEntry, ...] = ()
    for generation, mask, is_incomplete in zip(generations, masks, incomplete, strict=True):
        if any(shard.name in faults for shard in generation.shards[len(before) :]):
            base = replace(generations[-1], shards=before)  # bins and fallback speaker are those of the first build
            acoustic_model = unpack_model(generation.acoustic_model) if generation.acoustic_model else None
            result.append((scanned.select(mask | unlisted if is_incomplete else mask), base, acoustic_model))
        before = generation.shards
    return result


def _read_keys(store: Store, shard: ShardEntry) -> tuple[list[str], bool]:
    """Return the readable keys of a shard, including refused samples, and whether the list is complete."""
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
    """Rebuild the damaged shards, first without writing. Raises ShardError if the bytes are not those of the index."""
    chosen = [(plan, [shard for shard in plan.shards if shard[0] in damaged]) for plan in plans]
    results = [result for plan, shards in chosen for result in write_shards(plan, shards, pool)]
    entries = {result.made[0].name: result.made[0] for result in results if result.made}
    different = [name for name in damaged if entries.get(name) != damaged[name]]
    if different:
        out = plans[0].context.out
        raise ShardError(
            f"{out}: rebuilt {', '.join(different)}: not the bytes that {out}/index.json expects; nothing was repaired",
            "check that the audio, and the versions of this package, libsndfile, soxr, silero-vad and torch, are those "
            "of the original build",
        )
    for plan, shards in chosen:
        write_shards(replace(plan, context=replace(plan.context, dry_run=False)), shards, pool)


def _has_samples(store: Store, name: str, samples: SampleTable) -> bool:
    """Return whether an index is readable and has these sample columns."""
    try:
        return np.array_equal(read_index(store, name).samples, samples)
    except UnreachableError:
        raise
    except StreamtrainError:
        return False
