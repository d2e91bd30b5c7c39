"""Where a shard set may be built: in an empty place, on one of its own, or on what a killed build has left."""

import re
from collections.abc import Sequence
from pathlib import Path

from sharding.errors import MissingError, ShardError
from sharding.shardset.index import INDEX_NAME, read_index_header, read_shard_index
from sharding.build.lock import LOCK_NAME
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import FolderStore, Store

SHARD_INDEX = re.compile(rf"((?:{'|'.join(SPLITS)})/b\d\d-\d{{5}})\.idx\.zst")
UNWRITTEN = re.compile(r"(.*/)?\.[^/]*\.[0-9a-f]{32}\.part")  # as `replacing` calls what is not whole yet
PIECES = ".pieces"  # the folder in which a build keeps what it has cut, until that is in its shards
NO_CONTENT = frozenset([".DS_Store", ".gitignore", ".gitkeep"])
NAMED = 3  # of the files in the way


def check_output(store: Store, sources: Sequence[Path]) -> None:
    """Raise ShardError if a build there would mix with the sources, or with files of something else."""
    if isinstance(store, FolderStore):
        _check_apart(store.folder, sources)
    if store.exists(LOCK_NAME) or has_index(store):
        return
    others = []
    for name in store.names():
        if name.startswith((LOCK_NAME, f"{PIECES}/")) or _is_shard_index(store, name):
            return
        if name not in NO_CONTENT and not UNWRITTEN.fullmatch(name):
            others.append(name)
    if others:
        named = ", ".join(sorted(others)[:NAMED]) + ", …" * (len(others) > NAMED)
        raise ShardError(
            f"{store.url}: holds {len(others):,} files, of no shard set, nor of a build that was killed: {named}",
            "nothing was written there; choose another --out: an empty place, or a new one",
        )


def _check_apart(folder: Path, sources: Sequence[Path]) -> None:
    """Raise ShardError if OUT is a source, or holds one; a folder of its own within a source's is well."""
    out = folder.resolve()
    for source in sources:
        if (there := source.resolve()).is_relative_to(out):
            said = f"{'is' if there == out else 'holds'} the source {source}"
            raise ShardError(f"{folder}: {said}", "choose a place of its own for --out")


def has_index(store: Store) -> bool:
    """Return whether there is an index of ours; another's file of that name, or a damaged one, is none."""
    try:
        return store.exists(INDEX_NAME) and bool(read_index_header(store))
    except ShardError:
        return False


def _is_shard_index(store: Store, name: str) -> bool:
    try:
        return (found := SHARD_INDEX.fullmatch(name)) is not None and bool(read_shard_index(store, f"{found[1]}.tar"))
    except (ShardError, MissingError):
        return False
