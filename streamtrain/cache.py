"""Shards of a bucket on their way to the ranks of a node: fetched once, verified, kept within a size."""

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from sharding.errors import ShardError, StoreError
from sharding.format import ShardEntry, ShardIndex
from sharding.store import Store

RANGE_BYTES = 8 * 2**20  # a shard is fetched in ranges of this size, so that a broken body costs little
FETCH_TRIES = 3


class ShardCache:
    """A `Store` of whole shards in a local folder that all ranks of a node share.

    A shard is fetched by whichever rank asks first (a file lock keeps the others waiting), checked against the index,
    and renamed into place. Above `limit_bytes` the shards that nobody asked for longest are removed.
    """

    remote = False

    def __init__(self, store: Store, index: ShardIndex, folder: Path, limit_bytes: int) -> None:
        self.url = store.url
        self._store = store
        self._entries = {shard.name: shard for shard in index.shards}
        self._folder = folder / index.digest[:16]  # two shard sets never collide
        self._limit = limit_bytes
        self._pool = ThreadPoolExecutor(8, "fetch")
        self._ahead: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()
        largest = max((shard.bytes for shard in index.shards), default=0)
        if largest * 2 > limit_bytes:
            raise StoreError(
                f"data.cache_gb is {limit_bytes / 2**30:.3g}, a shard takes {largest / 2**30:.3g} GiB",
                "give the cache room for two shards at least, better for a window of each bucket",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: {error.strerror}", "choose another data.cache_dir") from error

    def prefetch(self, names: Sequence[str]) -> None:
        """Start to fetch shards that will be asked for soon."""
        with self._lock:
            for name in names:
                if name not in self._ahead or self._ahead[name].done():
                    self._ahead[name] = self._pool.submit(self._ensure, name)

    def read(self, name: str) -> bytes:
        return self._store.read(name)  # only shards are cached

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        for _ in range(FETCH_TRIES):
            try:
                with open(self._ensure(name), "rb") as file:
                    return os.pread(file.fileno(), length, offset)
            except FileNotFoundError:
                continue  # removed by another rank between the two lines
        raise StoreError(f"{self._folder / name}: vanishes from the cache", "raise data.cache_gb")

    def write(self, name: str, data: bytes) -> None:
        raise StoreError(f"{name}: the cache is for reading")

    def exists(self, name: str) -> bool:
        return self._store.exists(name)

    def _ensure(self, name: str) -> Path:
        path = self._folder / name.replace("/", "-")
        if not path.exists():
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    self._make_room(self._entries[name].bytes)
                    self._fetch(self._entries[name], path)
        os.utime(path)  # when it was last asked for: what eviction goes by
        return path

    def _fetch(self, shard: ShardEntry, path: Path) -> None:
        for _ in range(FETCH_TRIES):
            data = b"".join(self._ranges(shard))
            seen = xxhash.xxh3_64_hexdigest(data)
            if seen == shard.checksum:
                partial = path.with_suffix(f".{os.getpid()}.part")
                try:
                    partial.write_bytes(data)
                    os.replace(partial, path)
                except OSError as error:
                    partial.unlink(missing_ok=True)
                    raise StoreError(f"{path}: {error.strerror}", "is the disk of data.cache_dir full?") from error
                return
        raise ShardError(
            f"{self.url}/{shard.name}: checksum is {seen} after {FETCH_TRIES} fetches, the index says {shard.checksum}",
            "the upload may be incomplete; run `python -m sharding verify` on the shard set",
        )

    def _ranges(self, shard: ShardEntry) -> Iterator[bytes]:
        for start in range(0, shard.bytes, RANGE_BYTES):
            yield self._store.read_range(shard.name, start, min(RANGE_BYTES, shard.bytes - start))

    def _make_room(self, needed: int) -> None:
        with _locked(self._folder / "evict.lock"):
            kept = sorted(self._folder.glob("*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
            used = needed
            for path in kept:
                used += path.stat().st_size
                if used > self._limit:
                    path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock that the kernel releases when its holder dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
