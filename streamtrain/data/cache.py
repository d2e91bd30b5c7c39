"""Shards of a bucket on their way to the ranks of a node: fetched once, verified, kept within a size."""

import errno
import fcntl
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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.shardset.object_store import BucketStore, Range
from sharding.files.document import SMALL_BYTES, STRICT, DocumentError, Number, parse
from sharding.errors import ShardError, StoreError, UnreachableError
from sharding.files.exclusive import NO_LOCKS
from sharding.shardset.index import ShardIndex, read_samples
from sharding.shardset.sample import Sample, escape_key
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import (Reader)
from sharding.files.document import open_regular
from sharding.files.writing import write_error, open_lock_file
from streamtrain.data.plan import ShardSchedule

log = logging.getLogger("streamtrain")

RANGE_BYTES = 8 * 2**20  # a shard is fetched in ranges of this size, in parallel; a broken body costs one of them
RANGES_AT_ONCE = 8
SHARDS_AT_ONCE = 4
STEPS_AHEAD = 32  # shards of these steps are fetched before they are needed
STEPS_BEHIND = 16  # shards of these steps are kept if there is room: a slower thread or rank may still read from them
FETCH_TRIES = 3
READS = 3  # of a clip that comes wrong over a network, which may happen twice
DIGITS = 16  # of a set's digest, which name its folder
HELD_SEC = 1.0  # longer than a lock is held for anything but a fetch
EVICT_LOCK = "evict.lock"
SET_FOLDER = re.compile(f"[0-9a-f]{{{DIGITS}}}")
WAIT_FOR_ROOM_SEC = 0.05  # between looks whether another thread has finished writing, so that something can go
IDLE_SEC = 600.0  # a shard that is not in the plan, and that nobody asked for so long, is no longer needed


class FetchError(ShardError):
    """A shard whose bytes came wrong from the store, however often it was asked for them."""


class _Abandoned(TypedDict):
    """What a lock file says of the fetch that its last holder gave up."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    at: Number  # by `time.monotonic()`, which all processes of a machine share
    message: str
    hint: str | None


_ABANDONED = TypeAdapter(_Abandoned)


@dataclass
class CacheCounts:
    """What a rank has asked its cache for."""

    hits: int = 0  # times that a shard was here already, when it was to be read from
    misses: int = 0
    bytes: int = 0  # fetched by this rank
    retries: int = 0  # requests that were repeated, and shards that came or stood wrong


class ShardCache:
    """A `Reader` of whole shards in a local folder that all ranks of a node share, and other runs too.

    A shard is fetched by whichever rank asks first (a file lock keeps the others waiting), checked against the index,
    and renamed into place. Above `limit_bytes` those go that the plan needs last, or not again.
    """

    remote = False

    def __init__(self, store: BucketStore, index: ShardIndex, folder: Path, limit_bytes: int) -> None:
        self.url = store.url
        self.counts = CacheCounts()
        self._repeated = 0  # requests, up to the last call of take_counts
        self._store = store
        self._entries = {shard.name: shard for shard in index.shards}
        self._root = folder
        self._folder = folder / index.digest[:DIGITS]  # two shard sets never collide
        self._limit = limit_bytes
        self._shards = ThreadPoolExecutor(SHARDS_AT_ONCE, "fetch")
        self._ranges = {ahead: ThreadPoolExecutor(RANGES_AT_ONCE, "range") for ahead in (True, False)}
        self._ahead: dict[str, Future[None]] = {}
        self._uses: list[tuple[int, int, str]] = []  # first step, last step, shard: in that order
        self._spans: dict[Path, tuple[int, int]] = {}
        self._step = 0
        self._lock = threading.Lock()
        largest = max((shard.bytes for shard in index.shards), default=0)
        if largest * 2 > limit_bytes:
            raise StoreError(
                f"data.cache_gb is {limit_bytes / 2**30:.3g}, a shard takes {largest / 2**30:.3g} GiB",
                "give the cache room for two shards at least, better for a window of each bucket",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._folder.is_symlink():  # those of other sets are left alone
                raise OSError(errno.ELOOP, f"{self._folder.name} is a link that leads elsewhere")
            with _locked(folder / EVICT_LOCK):
                pass
        except OSError as error:
            said = "this file system has no file locks" if error.errno in NO_LOCKS else error.strerror
            raise StoreError(f"data.cache_dir: {folder}: {said}", "choose a cache_dir on a local disk") from error

    def take_counts(self) -> CacheCounts:
        """What was asked of it since the last call."""
        with self._lock:
            counts, self.counts = self.counts, CacheCounts()
        repeated = self._store.retries
        counts.retries += repeated - self._repeated
        self._repeated = repeated
        return counts

    def _count(self, **more: int) -> None:
        """Threads count together."""
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    # --- what is to come --------------------------------------------------------------------------------------------

    def set_schedule(self, index: ShardIndex, uses: ShardSchedule) -> None:
        """Learn when this machine will need which shard."""
        names = [index.shards[shard].name for shard in uses.shard]
        with self._lock:
            self._uses = sorted(zip(uses.first.tolist(), uses.last.tolist(), names, strict=True))
            self._spans = {self._path(name): (first, last) for first, last, name in self._uses}
            self._step = 0

    def prefetch_from(self, step: int) -> None:
        """Start to fetch what the steps from this one on need, as much of it as fits into the cache together."""
        with self._lock:
            self._step = max(self._step, step)
            room, oldest = self._limit, self._step - STEPS_BEHIND
            while self._uses and self._uses[0][1] < oldest:
                self._uses.pop(0)
            for first, last, name in self._uses:
                room -= self._entries[name].bytes if last >= oldest else 0
                if room < 0 or first >= self._step + STEPS_AHEAD:
                    break
                if last >= self._step and (name not in self._ahead or self._ahead[name].done()):
                    self._ahead[name] = self._shards.submit(self._touch, name)

    def stop_prefetching(self) -> None:
        """Forget what was to be fetched; what is under way comes to its end."""
        with self._lock:
            for future in self._ahead.values():
                future.cancel()

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, name: str, limit: int | None = None) -> bytes:
        return self._store.read(name, limit)  # only shards are cached

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        with self._open(name) as file:
            return [os.pread(file.fileno(), length, offset) for offset, length in ranges]

    def invalidate(self, name: str) -> None:
        """Remove a shard whose bytes have spoilt on this disk, so that it is fetched again."""
        log.warning("%s: spoilt in the cache, fetched again", self._path(name))
        self._count(retries=1)
        with _locked(self._root / EVICT_LOCK):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{escape_key(name.removesuffix('.tar'))}.tar"

    def _touch(self, name: str) -> None:
        if not self._path(name).exists():
            self._open(name, ahead=True).close()

    def _open(self, name: str, ahead: bool = False) -> BinaryIO:
        """The shard's file, fetched if it is not here. Once open it can be read, even if it is evicted meanwhile."""
        path = self._path(name)
        file = _opened(path)
        if file is None:
            self._count(misses=not ahead)
            asked = time.monotonic()
            with _locked(path.with_suffix(".lock")) as lock:
                file = _opened(path) or self._fetch_once(self._entries[name], path, lock, ahead, asked)
        else:
            self._count(hits=1)
        os.utime(file.fileno())  # when it was last asked for
        return file

    # --- fetching ---------------------------------------------------------------------------------------------------

    def _fetch_once(self, shard: ShardEntry, path: Path, lock: BinaryIO, ahead: bool, asked: float) -> BinaryIO:
        """Fetch a shard whose lock is held, unless another thread or process has given it up since it was `asked` for.

        If that one was killed instead, the time for which it held the lock counts.
        """
        if time.monotonic() - asked > HELD_SEC:
            _raise_if_given_up(lock, asked)
            self._store.failed_elsewhere(asked)
        lock.truncate(0)
        try:
            return self._fetch(shard, path, ahead, asked)
        except UnreachableError as error:
            given_up = {"at": time.monotonic(), "message": error.message, "hint": error.hint}
            with suppress(OSError):  # of a full disk: those who wait try it themselves
                lock.write(json.dumps(given_up).encode())
            raise

    def _fetch(self, shard: ShardEntry, path: Path, ahead: bool, asked: float) -> BinaryIO:
        """Write a shard under its name, and return it opened. What is needed now does not wait for what is `ahead`."""
        partial = path.with_suffix(".part")  # nobody else writes it: the shard's lock is held
        try:
            self._reserve(partial, shard.bytes)
            with open(partial, "r+b", opener=open_lock_file) as file:
                for _ in range(FETCH_TRIES):
                    self._fill(shard, file, self._ranges[ahead], asked)
                    seen = _checksum(file)
                    if seen == shard.checksum:
                        kept = open(partial, "rb", opener=open_lock_file)  # noqa: SIM115
                        os.replace(partial, path)
                        return kept
                    self._count(retries=1)
        except OSError as error:
            raise write_error(path, error, shard.bytes, "is the disk of data.cache_dir full?") from error
        finally:
            partial.unlink(missing_ok=True)
        raise FetchError(
            f"{self.url}/{shard.name}: checksum is {seen} after {FETCH_TRIES} fetches, the index says {shard.checksum}",
            "the upload may be incomplete; run `python -m sharding verify` on the shard set",
        )

    def _fill(self, shard: ShardEntry, file: BinaryIO, pool: ThreadPoolExecutor, asked: float) -> None:
        """Fetch all ranges of a shard into its file; the first error ends it."""

        def fetch(start: int) -> None:
            (data,) = self._store.read_ranges(shard.name, [(start, min(RANGE_BYTES, shard.bytes - start))], asked)
            view = memoryview(data)
            while view:  # a disk that fills up takes a part first, and then says so
                view = view[os.pwrite(file.fileno(), view, start + len(data) - len(view)) :]

        parts = [pool.submit(fetch, start) for start in range(0, shard.bytes, RANGE_BYTES)]
        wait(parts, return_when=FIRST_EXCEPTION)
        for part in parts:
            part.cancel()
        wait(parts)  # before the file is closed, whose number another may get
        for part in parts:
            if not part.cancelled():
                part.result()
        self._count(bytes=shard.bytes)

    def _reserve(self, partial: Path, needed: int) -> None:
        """Make `partial` as large as it will be, once what others are writing leaves room; what can go goes."""
        while True:
            with _locked(self._root / EVICT_LOCK):
                # Parts first: one that is renamed meanwhile stands among the shards then, and is counted once
                others = (part for part in self._files(".part") if part != partial and not _abandoned(part))
                parts = {part.with_suffix(".tar"): _size(part) for part in others}
                shards = {path: path.stat() for path in self._files(".tar")}
                writing = sum(size for path, size in parts.items() if path not in shards)
                if writing + needed <= self._limit:
                    self._evict(shards, self._limit - writing - needed)
                    with open(partial, "wb", opener=open_lock_file) as file:
                        file.truncate(needed)
                    return
            time.sleep(WAIT_FOR_ROOM_SEC)

    def _files(self, suffix: str) -> Iterator[Path]:
        """Yield the files of all sets that are cached here; other folders, and where links lead, are not ours."""
        for folder in self._root.iterdir():
            if SET_FOLDER.fullmatch(folder.name) and not folder.is_symlink():
                yield from (path for path in folder.glob(f"*{suffix}") if path.is_file())

    def _evict(self, shards: dict[Path, os.stat_result], room: int) -> None:
        """Remove shards, of whatever set, until the others fit in `room`: those first that are needed last."""
        for path, stat in sorted(shards.items(), key=lambda file: (self._needed_at(*file), -file[1].st_mtime)):
            room -= stat.st_size
            if room < 0:
                path.unlink()

    def _needed_at(self, path: Path, stat: os.stat_result) -> float:
        """The step at which a shard is needed next. Of another run's, or of validation, only its last use tells."""
        span = self._spans.get(path)
        if span is None:
            return self._step if time.time() - stat.st_mtime < IDLE_SEC else math.inf
        first, last = span
        if last >= self._step:
            return max(first, self._step)
        return self._step + STEPS_AHEAD if last >= self._step - STEPS_BEHIND else math.inf


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open_regular(path)
    except FileNotFoundError:
        if path.is_symlink():
            log.warning("%s: is a link that leads nowhere; the shard is fetched and takes its place", path)
        return None
    except OSError as error:
        raise StoreError(
            f"data.cache_dir: {path}: {error.strerror}", "remove it: the shard is fetched again"
        ) from error


def _raise_if_given_up(lock: BinaryIO, asked: float) -> None:
    """Raise what a shard was given up for if that was after it was `asked` for."""
    lock.seek(0)
    with suppress(DocumentError):  # there is none, or it is cut off
        given_up = parse(lock.read(SMALL_BYTES), _ABANDONED)
        if given_up["at"] > asked:
            raise UnreachableError(given_up["message"], given_up["hint"])


def read_verified(store: Reader, index: ShardIndex, shard: ShardEntry, rows: npt.NDArray[np.int64]) -> list[Sample]:
    """Samples of a shard. What spoilt in the cache or on the way is fetched anew before it is an error."""
    cache = store if isinstance(store, ShardCache) else None
    for _ in range(READS - 1 if cache or store.remote else 0):
        try:
            return read_samples(store, index, shard, index.samples[rows])
        except FetchError:
            raise
        except ShardError:
            if cache:
                cache.invalidate(shard.name)
    return read_samples(store, index, shard, index.samples[rows])


def _checksum(file: BinaryIO) -> str:
    state, position = xxhash.xxh3_64(), 0
    while data := os.pread(file.fileno(), RANGE_BYTES, position):
        state.update(data)
        position += len(data)
    return state.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _abandoned(part: Path) -> bool:
    """Whether a part was left behind by a process that is no more; then it is removed."""
    with open(part.with_suffix(".lock"), "a", opener=open_lock_file) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Hold, and yield, a file whose advisory lock the kernel releases when its holder dies."""
    with open(path, "a+b", buffering=0, opener=open_lock_file) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cast(BinaryIO, file)
