"""Shards of a bucket on their way to the ranks of a node: fetched once, verified, kept within a size."""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from sharding.errors import ShardError, StoreError
from sharding.format import ShardEntry, ShardIndex
from sharding.store import Reader

log = logging.getLogger("streamtrain")

RANGE_BYTES = 8 * 2**20  # a shard is fetched in ranges of this size, so that a broken body costs little
FETCH_TRIES = 3
EVICT_LOCK = "evict.lock"
WAIT_FOR_ROOM_SEC = 0.05  # between looks whether another thread has finished writing, so that something can go


class ShardCache:
    """A `Reader` of whole shards in a local folder that all ranks of a node share, and other runs too.

    A shard is fetched by whichever rank asks first (a file lock keeps the others waiting), checked against the index,
    and renamed into place. Above `limit_bytes` the shards that nobody asked for longest are removed.
    """

    remote = False

    def __init__(self, store: Reader, index: ShardIndex, folder: Path, limit_bytes: int) -> None:
        self.url = store.url
        self._store = store
        self._entries = {shard.name: shard for shard in index.shards}
        self._root = folder
        self._folder = folder / index.digest[:16]  # two shard sets never collide
        self._limit = limit_bytes
        self._pool = ThreadPoolExecutor(8, "fetch")
        self._ahead: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        largest = max((shard.bytes for shard in index.shards), default=0)
        if largest * 2 > limit_bytes:
            raise StoreError(
                f"data.cache_gb is {limit_bytes / 2**30:.3g}, a shard takes {largest / 2**30:.3g} GiB",
                "give the cache room for two shards at least, better for a window of each bucket",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (folder / EVICT_LOCK).touch()
        except OSError as error:
            raise StoreError(f"{self._folder}: {error.strerror}", "choose another data.cache_dir") from error

    def prefetch(self, names: Sequence[str]) -> None:
        """Start to fetch shards that will be asked for soon, as many of the first as fit in half of the cache."""
        with self._lock:
            room = self._limit // 2
            for name in names:
                room -= self._entries[name].bytes
                if room < 0:
                    break
                if name not in self._ahead or self._ahead[name].done():
                    self._ahead[name] = self._pool.submit(self._touch, name)

    def stop_prefetching(self) -> None:
        """Forget what was to be fetched; what is under way comes to its end."""
        with self._lock:
            for future in self._ahead.values():
                future.cancel()

    def read(self, name: str) -> bytes:
        return self._store.read(name)  # only shards are cached

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self._open(name) as file:
            return os.pread(file.fileno(), length, offset)

    def drop(self, name: str) -> None:
        """Remove a shard whose bytes have spoilt on this disk, so that it is fetched again."""
        log.warning("%s: spoilt in the cache, fetched again", self._path(name))
        with _locked(self._root / EVICT_LOCK):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "-")

    def _touch(self, name: str) -> None:
        self._open(name).close()

    def _open(self, name: str) -> BinaryIO:
        """The shard's file, fetched if it is not here. Once open it can be read, even if it is evicted meanwhile."""
        path = self._path(name)
        file = _opened(path)
        if file is None:
            with _locked(path.with_suffix(".lock")):
                file = _opened(path) or self._fetch(self._entries[name], path)
        os.utime(file.fileno())  # when it was last asked for: what eviction goes by
        return file

    def _fetch(self, shard: ShardEntry, path: Path) -> BinaryIO:
        for _ in range(FETCH_TRIES):
            data = b"".join(self._ranges(shard))
            seen = xxhash.xxh3_64_hexdigest(data)
            if seen == shard.checksum:
                return self._keep(path, data)
        raise ShardError(
            f"{self.url}/{shard.name}: checksum is {seen} after {FETCH_TRIES} fetches, the index says {shard.checksum}",
            "the upload may be incomplete; run `python -m sharding verify` on the shard set",
        )

    def _ranges(self, shard: ShardEntry) -> Iterator[bytes]:
        for start in range(0, shard.bytes, RANGE_BYTES):
            yield self._store.read_range(shard.name, start, min(RANGE_BYTES, shard.bytes - start))

    def _keep(self, path: Path, data: bytes) -> BinaryIO:
        """Write a shard under its name, and return it opened."""
        partial = path.with_suffix(".part")  # nobody else writes it: the shard's lock is held
        try:
            self._reserve(partial, len(data))
            with open(partial, "r+b") as file:
                file.write(data)
            kept = open(partial, "rb")  # noqa: SIM115
            os.replace(partial, path)
            return kept
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"{path}: {error.strerror}", "is the disk of data.cache_dir full?") from error

    def _reserve(self, partial: Path, needed: int) -> None:
        """Make `partial` as large as it will be, once what others are writing leaves room; the oldest shards go."""
        while True:
            with _locked(self._root / EVICT_LOCK):
                # Parts first: one that is renamed meanwhile is counted twice rather than not at all
                others = (part for part in self._root.glob("*/*.part") if part != partial and not _abandoned(part))
                writing = sum(map(_size, others))
                if writing + needed <= self._limit:
                    self._evict(self._limit - writing - needed)
                    with open(partial, "wb") as file:
                        file.truncate(needed)
                    return
            time.sleep(WAIT_FOR_ROOM_SEC)

    def _evict(self, room: int) -> None:
        """Remove the shards, of whatever set, that nobody asked for longest, until the others fit in `room`."""
        for path in sorted(self._root.glob("*/*.tar"), key=lambda path: path.stat().st_mtime, reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _abandoned(part: Path) -> bool:
    """Whether a part was left behind by a process that is no more; then it is removed."""
    with open(part.with_suffix(".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock that the kernel releases when its holder dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
