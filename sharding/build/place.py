"""Check where a shard set may be built: an empty place, an existing shard set, or the leftovers of a killed build."""

import re
from collections.abc import Sequence
from pathlib import Path

from sharding.build.lock import LOCK_NAME
from sharding.errors import MissingError, ShardError
from sharding.shardset.index import INDEX_NAME, read_index_header, read_shard_index
from sharding.shardset.schema import SPLITS
from sharding.shardset.store import FolderStore, Store

SHARD_INDEX = re.compile(rf"((?:{'|'.join(SPLITS)})/b\d\d-\d{{5}})\.idx\.zst")
UNWRITTEN = re.compile(r"(.*/)?\.[^/]*\.[0-9a-f]{32}\.part")  # name of an unfinished file, as given by `replacing`
PIECES = ".pieces"  # folder for the segments of a build until they are in its shards
NO_CONTENT = frozenset([".DS_Store", ".gitignore", ".gitkeep"])
NAMED = 3  # maximum number of files that the error names


def check_output(store: Store, sources: Sequence[Path]) -> None:
    """Raise ShardError if a build there would mix with the sources, or with unrelated files."""
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
            f"{store.url}: holds {len(others):,} files that belong to no shard set and no killed build: {named}",
            "nothing was written; choose an empty or a new place for --out",
        )


def _check_apart(folder: Path, sources: Sequence[Path]) -> None:
    """Raise ShardError if OUT is or contains a source; OUT may be a separate folder within a source."""
    out = folder.resolve()
    for source in sources:
        if (path := source.resolve()).is_relative_to(out):
            relation = "is" if path == out else "holds"
            raise ShardError(f"{folder}: {relation} the source {source}", "choose a separate place for --out")


def has_index(store: Store) -> bool:
    """Return whether the store has an index of this package; a foreign or damaged file of that name is none."""
    try:
        return store.exists(INDEX_NAME) and bool(read_index_header(store))
    except ShardError:
        return False


def _is_shard_index(store: Store, name: str) -> bool:
    try:
        return (match := SHARD_INDEX.fullmatch(name)) is not None and bool(read_shard_index(store, f"{match[1]}.tar"))
    except (ShardError, MissingError):
        return False
