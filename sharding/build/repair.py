"""Rebuild damaged shards and indexes from the sources, to the same bytes."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from sharding.build.lock import exclusive_build
from sharding.build.pipeline import BuildTask, ShardPlan, plan_build, write_shards
from sharding.build.scan import ScanResult, hash_128, scan
from sharding.build.splits import check_splits
from sharding.build.write import BuildContext
from sharding.errors import MissingError, ShardError
from sharding.files.spool import large_files_folder
from sharding.pool import Workers
from sharding.segment.evidence import NO_ALIGNMENTS, Alignments
from sharding.shardset.build_config import BuildConfig
from sharding.shardset.index import ShardIndex, read_checked, read_index_header, read_index_headers, repair_columns
from sharding.shardset.sample import whole_key
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import Faults, find_faults
from sharding.sources.manifest import read_source
from sharding.sources.options import ManifestOptions


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
    read_index_header(store)  # before the lock makes a folder, where there is no shard set
    with exclusive_build(store):
        header = read_index_header(store)
        faults = find_faults(url, header, with_audio, workers)
        damaged = {shard.name: shard for shard in header.shards if shard.name in faults}
        if faults and header.external:
            raise ShardError(f"{url}: its tars were written by others", "copy the damaged ones again")
        if faults:
            settings = BuildConfig(**header.settings)
            if settings.alignments != alignments.digest:
                message = f"{url}: was built with {'other' if alignments.digest else 'a file of'} alignments"
                raise ShardError(message, "name that file: --alignments FILE")
            header.labels.check_digest(url)
            manifest_options = replace(
                manifest_options, profile=settings.profile, group_by=settings.group_by, splits=settings.splits
            )
            sources = [read_source(location, manifest_options) for location in locations]
            with Workers(workers) as pool, large_files_folder() as scratch:
                layouts = tuple(source.layout.unpacking(f"{scratch}/unpacked") for source in sources)
                context = BuildContext(url, scratch, layouts, header.labels, dry_run=True)
                scanned = scan(sources, header.labels, pool)
                if settings.splits == "official":
                    check_splits(scanned)
                builds = _separate_builds(store, scanned, faults)
                plans = [plan_build(BuildTask(clips, settings, header.labels, base, alignments), context, pool)[0]
                         for base, clips in builds]  # fmt: skip
                _rewrite(plans, damaged, pool)
            if left := find_faults(url, replace(header, shards=tuple(damaged.values())), with_audio, workers):
                messages = "; ".join(fault.message for fault in left.values())
                raise ShardError(f"{messages}: the original build has the same fault", "rebuild the shard set")
        return faults, repair_columns(store)


def _separate_builds(store: Store, scanned: ScanResult, faults: Faults) -> Iterator[tuple[ShardIndex, ScanResult]]:
    """Yield, for each build that wrote a damaged shard, its index without its own shards, and its clips.

    The shards list their clips. Clips that no shard lists belong to the build whose shard indexes are damaged.
    """
    keys = scanned.clips["key"][:, 0]
    builds, listed, count = [], np.zeros(len(keys), bool), 0
    for _, generation in [*read_index_headers(store)][::-1]:
        before, shards = generation.shards[:count], generation.shards[count:]
        names, complete, count = set[str](), True, len(generation.shards)
        for shard in shards:
            try:
                record = read_checked(store, shard)
                names.update(map(whole_key, (*record.keys, *record.refused)))
            except ShardError:
                names.update(map(whole_key, _list_tar(store, shard)))
                complete = False
        hashes = {hash_128(name)[0]: name for name in names}
        if missing := sorted(hashes.keys() - set(keys.tolist()), key=hashes.__getitem__):
            message = f"was built from other sources: {hashes[missing[0]]!r} is in none of these; nothing was repaired"
            raise ShardError(f"{store.url}: {message}", "name all the sources that it was built from")
        mask = np.isin(keys, np.array(list(hashes), np.uint64))
        listed |= mask
        if any(shard.name in faults for shard in shards):
            builds.append((replace(generation, shards=before), mask, complete))
    if sum(not complete for *_, complete in builds) > 1 and not listed.all():
        raise ShardError(f"{store.url}: shard indexes of several builds are damaged; nothing was repaired",
                         "cannot determine which build added which clips: rebuild the shard set")  # fmt: skip
    for base, mask, complete in builds:
        yield base, scanned.select(mask if complete else mask | ~listed)


def _list_tar(store: Store, shard: ShardEntry) -> list[str]:
    """Return the keys in a shard whose list of them is damaged; none if the tar is damaged too."""
    with suppress(MissingError):
        tar = store.read(shard.name)
        if xxhash.xxh3_64_hexdigest(tar) == shard.checksum:
            with tarfile.open(fileobj=io.BytesIO(tar)) as members:
                return [name.removesuffix(".flac") for name in members.getnames() if name.endswith(".flac")]
    return []


def _rewrite(plans: Sequence[ShardPlan], damaged: Mapping[str, ShardEntry], pool: Workers) -> None:
    """Rebuild the damaged shards, first without writing. Raises ShardError if the bytes are not those of the index."""
    chosen = [(plan, [shard for shard in plan.shards if shard[0] in damaged]) for plan in plans]
    results = [result for plan, shards in chosen for result in write_shards(plan, shards, pool)]
    made = {result.made[0] for result in results if result.made}
    different = [name for name, entry in damaged.items() if entry not in made]
    if different:
        out = plans[0].context.out
        raise ShardError(
            f"{out}: rebuilt {', '.join(different)}: not the bytes that {out}/index.json expects; nothing was repaired",
            "check that the audio, and the versions of this package, libsndfile, soxr, silero-vad and torch, are those "
            "of the original build",
        )
    for plan, shards in chosen:
        write_shards(replace(plan, context=replace(plan.context, dry_run=False)), shards, pool)
