"""Check every shard against the index, and make again from the sources what is damaged."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sharding import report
from sharding.audio import decode
from sharding.build import BuildSettings, Plan, plan_build, write_shards
from sharding.errors import AudioError, ShardError, StreamtrainError
from sharding.examine import Examined, examine, hash_pair, hash_sources
from sharding.fill import Where
from sharding.format import (
    ShardEntry,
    ShardIndex,
    check_shard,
    escape_key,
    index_names,
    read_index,
    read_outline,
    repair_samples,
)
from sharding.lock import sole_build
from sharding.manifest import Reading, read_sources
from sharding.store import Store, open_store
from sharding.workers import Workers, count_done

Faults = dict[str, str]  # shard → what is wrong with it


def find_faults(url: str, shards: Sequence[ShardEntry], with_audio: bool, workers: int) -> Faults:
    """Read every shard whole and check all that the index promises of it; `with_audio` decodes each clip as well."""
    jobs = [(url, shard, with_audio) for shard in shards]
    with Workers(min(workers, max(len(jobs), 1))) as pool:
        faults = pool.map(_fault_of, jobs, [shard.count for shard in shards], "verifying")
    return {shard.name: fault for shard, fault in zip(shards, faults, strict=True) if fault}


def repair(
    url: str, locations: Sequence[Path], columns: Mapping[str, str], with_audio: bool, workers: int
) -> tuple[Faults, list[str]]:
    """Make damaged shards again, to the same bytes; returns what was wrong, and whose sample columns were.

    Raises ShardError, and changes nothing, where the sources are not those that the shard set was built of.
    """
    store = open_store(url)
    with sole_build(store):
        names = index_names(store)
        generations = [read_outline(store, name) for name in names]
        shards = generations[-1].shards
        faults = find_faults(url, shards, with_audio, workers)
        if faults:
            settings = BuildSettings(**generations[-1].settings)
            sources = read_sources(locations, Reading(settings.track, columns, settings.group_by))
            with Workers(workers) as pool, tempfile.TemporaryDirectory(prefix="streamtrain-") as scratch:
                where = Where(url, scratch, tuple(source.layout for source in sources), settings.track, dry=True)
                examined = examine(sources, settings.track, pool)
                plans = [plan_build(part, settings, where, pool, base)[0]
                         for part, base in _tell_apart(store, examined, generations)]  # fmt: skip
                _rewrite(plans, {shard.name: shard for shard in shards if shard.name in faults}, pool)
            still = find_faults(url, [shard for shard in shards if shard.name in faults], with_audio, workers)
            if still:
                raise ShardError(f"{'; '.join(still.values())}: so it was built", "build the shard set anew")
        damaged = [name for name in names if not _columns_are_whole(store, name)]
        for name in damaged:
            repair_samples(store, name)
    return faults, damaged


def _tell_apart(
    store: Store, examined: Examined, generations: Sequence[ShardIndex]
) -> Iterator[tuple[Examined, ShardIndex | None]]:
    """What each build was given, the first and every append since, with the index that it added to.

    The ledgers tell, but for one thing: a clip that was refused once may have been given again with the next.
    """
    keys = [tuple(key) for key in examined.clips["key"].tolist()]
    base, before = None, dict[tuple[int, int], str]()
    for index in generations:
        fates = dict.fromkeys(keys, "") if len(generations) == 1 else _read_fates(store, index, generations)
        new = np.array([key in fates and key not in before for key in keys], bool)
        again = np.array([key in fates and before.get(key) == "rejected" for key in keys], bool)
        for given in (new, new | again):
            if hash_sources(examined.clips[given], base.sources_hash if base else "") == index.sources_hash:
                yield examined.select(given), base
                break
        else:
            raise ShardError(
                f"{store.url}: was built of other sources, or of sources that have changed since; nothing was repaired",
                "name all the sources that it was built of",
            )
        base, before = index, fates


def _read_fates(store: Store, index: ShardIndex, generations: Sequence[ShardIndex]) -> dict[tuple[int, int], str]:
    rows = report.read_ledger(store, "" if index is generations[-1] else index.digest)
    return {hash_pair(escape_key(row["utterance_id"])): row["fate"] for row in rows}


def _rewrite(plans: Sequence[Plan], damaged: Mapping[str, ShardEntry], pool: Workers) -> None:
    """Once without writing, to see that the bytes come out as the index says; then in earnest."""
    chosen = [(plan, [shard for shard in plan.shards if shard[0] in damaged]) for plan in plans]
    results = [result for plan, shards in chosen for result in write_shards(plan, shards, pool)]
    made = {result.made[0].name: result.made[0] for result in results if result.made}
    differ = [name for name in damaged if made.get(name) != damaged[name]]
    if differ:
        out = plans[0].where.out
        raise ShardError(
            f"{out}: {', '.join(differ)}: comes out otherwise than {out}/index.json says; nothing was repaired",
            "another version of libsndfile or soxr makes other bytes, and so does audio that has changed",
        )
    for plan, shards in chosen:
        write_shards(replace(plan, where=replace(plan.where, dry=False)), shards, pool)


def _columns_are_whole(store: Store, name: str) -> bool:
    try:
        read_index(store, name)
    except StreamtrainError:
        return False
    return True


def _fault_of(job: tuple[str, ShardEntry, bool]) -> str | None:
    url, shard, with_audio = job
    try:
        for sample in check_shard(open_store(url), shard):
            count_done()
            try:
                if with_audio:
                    decode(sample.audio, prove=True)
            except AudioError as error:
                return f"{url}/{shard.name}: {sample.key}: {error.message}"
    except StreamtrainError as error:
        return error.message
    return None
