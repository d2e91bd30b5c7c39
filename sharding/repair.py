"""Check every shard against the index, and make again from the sources what is damaged."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sharding.audio import decode
from sharding.build import BuildSettings, Plan, plan_build, write_shards
from sharding.errors import AudioError, ShardError, StreamtrainError
from sharding.examine import examine, hash_sources
from sharding.fill import Where
from sharding.format import ShardEntry, check_shard, read_index, read_outline, repair_samples
from sharding.lock import sole_build
from sharding.manifest import Reading, Source, read_sources
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
) -> tuple[Faults, bool]:
    """Make damaged shards again, to the same bytes; returns what was wrong, and whether the sample columns were.

    Raises ShardError, and changes nothing, where the sources are not those that the shard set was built of.
    """
    store = open_store(url)
    with sole_build(store):
        outline = read_outline(store)
        faults = find_faults(url, outline.shards, with_audio, workers)
        if faults and outline.base:
            raise ShardError(
                f"{url}: was appended to, and can only be built anew; damaged are {', '.join(faults)}",
                "keep it until the new one is whole",
            )
        if faults:
            settings = BuildSettings(**outline.settings)
            sources = read_sources(locations, Reading(settings.track, columns, settings.group_by))
            with Workers(workers) as pool, tempfile.TemporaryDirectory(prefix="streamtrain-") as scratch:
                where = Where(url, scratch, tuple(source.layout for source in sources), settings.track, dry=True)
                plan = _plan(sources, outline.sources_hash, settings, where, pool, url)
                _rewrite(plan, {shard.name: shard for shard in outline.shards if shard.name in faults}, pool)
        if faults:
            still = find_faults(url, [shard for shard in outline.shards if shard.name in faults], with_audio, workers)
            if still:
                raise ShardError(f"{'; '.join(still.values())}: so it was built", "build the shard set anew")
        columns_are_whole = _columns_are_whole(store)
        if not columns_are_whole:
            repair_samples(store)
    return faults, not columns_are_whole


def _plan(
    sources: Sequence[Source], wanted: str, settings: BuildSettings, where: Where, pool: Workers, url: str
) -> Plan:
    examined = examine(sources, settings.track, pool)
    if hash_sources(examined.clips) != wanted:
        raise ShardError(
            f"{url}: was built of other sources, or of sources that have changed since; nothing was repaired",
            "name all the sources that it was built of",
        )
    plan, _ = plan_build(examined, settings, where, pool)
    return plan


def _rewrite(plan: Plan, damaged: Mapping[str, ShardEntry], pool: Workers) -> None:
    """Once without writing, to see that the bytes come out as the index says; then in earnest."""
    shards = [shard for shard in plan.shards if shard[0] in damaged]
    made = {result.made[0].name: result.made[0] for result in write_shards(plan, shards, pool) if result.made}
    differ = [name for name in damaged if made.get(name) != damaged[name]]
    if differ:
        raise ShardError(
            f"{plan.where.out}: {', '.join(differ)}: comes out otherwise than {plan.where.out}/index.json says; "
            "nothing was repaired",
            "another version of libsndfile or soxr makes other bytes, and so does audio that has changed",
        )
    write_shards(replace(plan, where=replace(plan.where, dry=False)), shards, pool)


def _columns_are_whole(store: Store) -> bool:
    try:
        read_index(store)
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
