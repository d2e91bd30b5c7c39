"""Cache the shards of a bucket on local disk for all ranks of a node: fetch once, verify, evict above a size limit."""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from operator import add
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.errors import ShardError, StoreError, UnreachableError
from sharding.files.document import SMALL_BYTES, STRICT, DocumentError, Number, open_regular, parse
from sharding.files.exclusive import NO_LOCKS
from sharding.files.writing import open_lock_file, write_error
from sharding.shardset.index import ShardIndex, read_samples
from sharding.shardset.object_store import BucketStore, Range
from sharding.shardset.sample import Sample, escape_key
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Reader
from streamtrain.data.plan import ShardSchedule

log = logging.getLogger("streamtrain")

RANGE_BYTES = 8 * 2**20  # a shard is fetched in parallel ranges of this size; a broken response costs one range
RANGES_AT_ONCE = 8
SHARDS_AT_ONCE = 4
STEPS_AHEAD = 32  # shards of these steps are fetched before they are needed
STEPS_BEHIND = 16  # shards of these steps stay if there is room: a slower thread or rank may still read from them
FETCH_TRIES = 3
READ_TRIES = 3  # of a clip: over a network its bytes may arrive wrong twice
DIGEST_CHARS = 16  # of a shard set's digest, as the name of its folder
SHORT_LOCK_SEC = 1.0  # nothing but a fetch holds a lock for longer
EVICT_LOCK = "evict.lock"
SET_FOLDER = re.compile(f"[0-9a-f]{{{DIGEST_CHARS}}}")
ROOM_POLL_SEC = 0.05  # between checks whether another writer has finished, so that shards can be evicted
IDLE_SEC = 600.0  # a shard that is not in the plan, and that was not read for this long, is no longer needed


class FetchError(ShardError):
    """Report a shard that had wrong bytes in every fetch."""


class _FetchFailure(TypedDict):
    """Describe a failed fetch, as its rank records it in the shard's lock file."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    at: Number  # by `time.monotonic()`, which all processes of a machine share
    message: str
    hint: str | None


_FETCH_FAILURE = TypeAdapter(_FetchFailure)


@dataclass(frozen=True)
class StreamCounts:
    """Count the work of a rank's stream since the last query. Times are summed over its threads."""

    batches: float = 0
    clips: float = 0
    silent: float = 0  # clips that are trained as silence
    ready: float = 0  # batches that were loaded already when one was taken, summed over those taken
    read_sec: float = 0
    decode_sec: float = 0
    hits: float = 0  # reads from a shard that was cached already
    misses: float = 0
    bytes: float = 0  # fetched into the cache by this rank
    retries: float = 0  # repeated requests, and shards with wrong bytes on arrival or on disk

    def __add__(self, other: "StreamCounts") -> "StreamCounts":
        return StreamCounts(*map(add, astuple(self), astuple(other)))


class ShardCache:
    """Read whole shards through a local folder that all ranks of a node share, as do other runs; a `Reader`.

    The rank that needs a shard first fetches it (a file lock makes the others wait), checks it against the index, and
    renames it into place. Above `limit_bytes` the shards that the plan needs last, or not again, are evicted.
    """

    remote = False

    def __init__(self, store: BucketStore, index: ShardIndex, folder: Path, limit_bytes: int) -> None:
        self.url = store.url
        self.counts = StreamCounts()
        self._reported_retries = 0  # the store's, up to the last call of take_counts
        self._store = store
        self._entries = {shard.name: shard for shard in index.shards}
        self._root = folder
        self._folder = folder / index.digest[:DIGEST_CHARS]  # two shard sets never collide
        self._limit = limit_bytes
        self._shard_pool = ThreadPoolExecutor(SHARDS_AT_ONCE, "fetch")
        self._range_pools = {ahead: ThreadPoolExecutor(RANGES_AT_ONCE, "range") for ahead in (True, False)}
        self._prefetches: dict[str, Future[None]] = {}
        self._schedule: list[tuple[int, int, str]] = []  # first step, last step, shard: in that order
        self._spans: dict[Path, tuple[int, int]] = {}  # first and last step
        self._step = 0
        self._lock = threading.Lock()
        largest = max((shard.bytes for shard in index.shards), default=0)
        if largest * 2 > limit_bytes:
            raise StoreError(
                f"data.cache_gb is {limit_bytes / 2**30:.3g}, the largest shard has {largest / 2**30:.3g} GiB",
                "give the cache room for at least two shards, better for a shuffle window of each bucket",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._folder.is_symlink():  # the folders of other sets are not checked
                raise OSError(errno.ELOOP, f"{self._folder.name} is a link that leads elsewhere")
            with _locked(folder / EVICT_LOCK):
                pass
        except OSError as error:
            reason = "this file system has no file locks" if error.errno in NO_LOCKS else error.strerror
            raise StoreError(f"data.cache_dir: {folder}: {reason}", "choose a cache_dir on a local disk") from error

    def take_counts(self) -> StreamCounts:
        """Return the counts since the last call."""
        with self._lock:
            counts, self.counts = self.counts, StreamCounts()
        before, self._reported_retries = self._reported_retries, self._store.retries
        return counts + StreamCounts(retries=self._reported_retries - before)

    def _count(self, **increments: int) -> None:
        """Add to the counts; safe to call from any thread."""
        with self._lock:
            self.counts += StreamCounts(**increments)

    # --- prefetching ------------------------------------------------------------------------------------------------

    def set_schedule(self, index: ShardIndex, schedule: ShardSchedule) -> None:
        """Set the steps at which this machine needs each shard, and start at step 0."""
        names = [index.shards[shard].name for shard in schedule.shard]
        with self._lock:
            self._schedule = sorted(zip(schedule.first.tolist(), schedule.last.tolist(), names, strict=True))
            self._spans = {self._path(name): (first, last) for first, last, name in self._schedule}
            self._step = 0

    def prefetch_from(self, step: int) -> None:
        """Start to fetch the shards of the steps from this one on, as many as fit into the cache together."""
        with self._lock:
            self._step = max(self._step, step)
            room, oldest = self._limit, self._step - STEPS_BEHIND
            while self._schedule and self._schedule[0][1] < oldest:
                self._schedule.pop(0)
            for first, last, name in self._schedule:
                room -= self._entries[name].bytes if last >= oldest else 0
                if room < 0 or first >= self._step + STEPS_AHEAD:
                    break
                if last >= self._step and (name not in self._prefetches or self._prefetches[name].done()):
                    self._prefetches[name] = self._shard_pool.submit(self._prefetch, name)

    def stop_prefetching(self) -> None:
        """Cancel the fetches that have not started; those in progress run to their end."""
        with self._lock:
            for future in self._prefetches.values():
                future.cancel()

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, name: str, limit: int | None = None) -> bytes:
        return self._store.read(name, limit)  # only shards are cached

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        with self._open(name) as file:
            return [os.pread(file.fileno(), length, offset) for offset, length in ranges]

    def invalidate(self, name: str) -> None:
        """Remove a shard that is corrupt on this disk, so that the next read fetches it again."""
        log.warning("%s: corrupt in the cache, will be fetched again", self._path(name))
        self._count(retries=1)
        with _locked(self._root / EVICT_LOCK):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{escape_key(name.removesuffix('.tar'))}.tar"

    def _prefetch(self, name: str) -> None:
        if not self._path(name).exists():
            self._open(name, ahead=True).close()

    def _open(self, name: str, ahead: bool = False) -> BinaryIO:
        """Return a shard's open file, fetched if it is not cached. It stays readable even if the shard is evicted."""
        path = self._path(name)
        file = _open_cached(path)
        if file is None:
            self._count(misses=not ahead)
            requested_at = time.monotonic()
            with _locked(path.with_suffix(".lock")) as lock:
                file = _open_cached(path) or self._fetch_once(self._entries[name], path, lock, ahead, requested_at)
        else:
            self._count(hits=1)
        os.utime(file.fileno())  # eviction uses the time of the last request
        return file

    # --- fetching ---------------------------------------------------------------------------------------------------

    def _fetch_once(self, shard: ShardEntry, path: Path, lock: BinaryIO, ahead: bool, requested_at: float) -> BinaryIO:
        """Fetch a shard under its lock. Raises the failure, if any, of another thread or process since `requested_at`.

        If the other was killed instead, the time for which it held the lock counts as an outage of the store.
        """
        if time.monotonic() - requested_at > SHORT_LOCK_SEC:
            _raise_recorded_failure(lock, requested_at)
            self._store.failed_elsewhere(requested_at)
        lock.truncate(0)
        try:
            return self._fetch(shard, path, ahead, requested_at)
        except UnreachableError as error:
            failure = {"at": time.monotonic(), "message": error.message, "hint": error.hint}
            with suppress(OSError):  # the disk may be full: then each waiting rank tries the fetch itself
                lock.write(json.dumps(failure).encode())
            raise

    def _fetch(self, shard: ShardEntry, path: Path, ahead: bool, requested_at: float) -> BinaryIO:
        """Download a shard to `path` and return its open file. If `ahead`, use the prefetch pool, to delay no read."""
        partial = path.with_suffix(".part")  # has no other writer: the shard's lock is held
        try:
            self._reserve(partial, shard.bytes)
            with open(partial, "r+b", opener=open_lock_file) as file:
                for _ in range(FETCH_TRIES):
                    self._download(shard, file, self._range_pools[ahead], requested_at)
                    fetched = open(partial, "rb", opener=open_lock_file)  # noqa: SIM115
                    actual = hashlib.file_digest(fetched, xxhash.xxh3_64).hexdigest()
                    if actual == shard.checksum:
                        os.replace(partial, path)
                        return fetched
                    fetched.close()
                    self._count(retries=1)
        except OSError as error:
            raise write_error(path, error, shard.bytes, "is the disk of data.cache_dir full?") from error
        finally:
            partial.unlink(missing_ok=True)
        raise FetchError(
            f"{self.url}/{shard.name}: checksum is {actual} after {FETCH_TRIES} tries, the index has {shard.checksum}",
            "the upload may be incomplete; run `streamtrain verify` on the shard set",
        )

    def _download(self, shard: ShardEntry, file: BinaryIO, pool: ThreadPoolExecutor, requested_at: float) -> None:
        """Write all ranges of a shard to its file. Raises the first error, after all ranges under way have ended."""

        def fetch(start: int) -> None:
            ranges = [(start, min(RANGE_BYTES, shard.bytes - start))]
            (data,) = self._store.read_ranges(shard.name, ranges, requested_at)
            view = memoryview(data)
            while view:  # a disk that fills up writes a part first, and fails only at the next call
                view = view[os.pwrite(file.fileno(), view, start + len(data) - len(view)) :]

        parts = [pool.submit(fetch, start) for start in range(0, shard.bytes, RANGE_BYTES)]
        wait(parts, return_when=FIRST_EXCEPTION)
        for part in parts:
            part.cancel()
        wait(parts)  # before the file is closed: its descriptor may then be reused for another file
        for part in parts:
            if not part.cancelled():
                part.result()
        self._count(bytes=shard.bytes)

    def _reserve(self, partial: Path, needed: int) -> None:
        """Preallocate `partial`, evicting shards and waiting for other writers until it fits."""
        while True:
            with _locked(self._root / EVICT_LOCK):
                # List parts first: a part renamed in between is then listed as a shard too, and counted once
                others = (part for part in self._files(".part") if part != partial and not _remove_abandoned(part))
                parts = {part.with_suffix(".tar"): _size(part) for part in others}
                shards = {path: path.stat() for path in self._files(".tar")}
                writing = sum(size for path, size in parts.items() if path not in shards)
                if writing + needed <= self._limit:
                    self._evict(shards, self._limit - writing - needed)
                    with open(partial, "wb", opener=open_lock_file) as file:
                        file.truncate(needed)
                    return
            time.sleep(ROOM_POLL_SEC)

    def _files(self, suffix: str) -> Iterator[Path]:
        """Yield the files of all shard sets cached here; skip other folders and links, which the cache does not own."""
        for folder in self._root.iterdir():
            if SET_FOLDER.fullmatch(folder.name) and not folder.is_symlink():
                yield from (path for path in folder.glob(f"*{suffix}") if path.is_file())

    def _evict(self, shards: dict[Path, os.stat_result], room: int) -> None:
        """Remove shards of any set, the ones needed last first, until the others fit in `room`."""
        for path, stat in sorted(shards.items(), key=lambda file: (self._needed_at(*file), -file[1].st_mtime)):
            room -= stat.st_size
            if room < 0:
                path.unlink()

    def _needed_at(self, path: Path, stat: os.stat_result) -> float:
        """Return the step that needs a shard next; for another run's or validation's, a guess from its last use."""
        span = self._spans.get(path)
        if span is None:
            return self._step if time.time() - stat.st_mtime < IDLE_SEC else math.inf
        first, last = span
        if last >= self._step:
            return max(first, self._step)
        return self._step + STEPS_AHEAD if last >= self._step - STEPS_BEHIND else math.inf


def _open_cached(path: Path) -> BinaryIO | None:
    """Return the open file of a cached shard, or None if there is none."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        if path.is_symlink():
            log.warning("%s: is a link that leads nowhere; the shard is fetched and replaces it", path)
        return None
    except OSError as error:
        message = f"data.cache_dir: {path}: {error.strerror}"
        raise StoreError(message, "remove it: the shard is fetched again") from error


def _raise_recorded_failure(lock: BinaryIO, requested_at: float) -> None:
    """Raise the failure recorded in a shard's lock file, if it is later than `requested_at`."""
    lock.seek(0)
    with suppress(DocumentError):  # there is no record, or it is cut off
        failure = parse(lock.read(SMALL_BYTES), _FETCH_FAILURE)
        if failure["at"] > requested_at:
            raise UnreachableError(failure["message"], failure["hint"])


def read_verified(store: Reader, index: ShardIndex, shard: ShardEntry, rows: npt.NDArray[np.int64]) -> list[Sample]:
    """Return samples of a shard. Wrong bytes from the cache or the network are read again before an error is raised."""
    cache = store if isinstance(store, ShardCache) else None
    for _ in range(READ_TRIES - 1 if cache or store.remote else 0):
        try:
            return read_samples(store, index, shard, index.samples[rows])
        except FetchError:
            raise
        except ShardError:
            if cache:
                cache.invalidate(shard.name)
    return read_samples(store, index, shard, index.samples[rows])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove_abandoned(part: Path) -> bool:
    """Remove a partial file and return True if its writer has died; return False if the writer is alive."""
    with open(part.with_suffix(".lock"), "a", opener=open_lock_file) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Hold an advisory lock on a file, and yield the file. The kernel releases the lock if its holder dies."""
    with open(path, "a+b", buffering=0, opener=open_lock_file) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cast(BinaryIO, file)
