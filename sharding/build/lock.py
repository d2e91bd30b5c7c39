"""Lock a folder or bucket prefix against a second build."""

import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from sharding.errors import MissingError, StoreError
from sharding.files import exclusive as file_lock
from sharding.files.document import SMALL_BYTES
from sharding.files.writing import explaining, open_lock_file
from sharding.shardset.object_store import BucketStore, ETag, VersionedObject
from sharding.shardset.store import FolderStore, Store

LOCK_NAME = ".building"
RENEW_SEC = 15.0
EXPIRY_SEC = 60.0  # since the last renewal of a lease: three renewals have failed
PATIENCE_SEC = 20.0  # for retries of a request, so that a failed renewal is retried in time
HINT = "wait until it has ended, or choose another --out"
BUCKET_HINT = f"{HINT}; the lock of a build killed on another machine expires {EXPIRY_SEC:.0f} s after its last renewal"


class BuildLock:
    """Hold the exclusive build lock. This base class is the no-op used if the place cannot be locked."""

    token = ""  # identifies the build

    def check(self) -> None:
        """Raise StoreError if the lock was lost; to be called before anything irreversible."""


def exclusive_build(store: Store) -> AbstractContextManager[BuildLock]:
    """Lock OUT for this build. Raises StoreError, which names the holder, if another build holds it."""
    return _folder_lock(store.folder) if isinstance(store, FolderStore) else _bucket_lease(store.url)


def check_token(store: Store, token: str) -> None:
    """Raise StoreError if, as seen from a worker's machine, the build of that token does not hold OUT."""
    try:
        holder = file_lock.parse_holder(store.read(LOCK_NAME, SMALL_BYTES))
    except MissingError as error:
        message = f"{store.url}: {socket.gethostname()} cannot see the lock of its build"
        raise StoreError(message, "mount OUT under the same path on every worker, or use a bucket") from error
    if holder.get("token") != token:
        raise StoreError(f"{store.url}: now held by another build ({file_lock.name_holder(holder)})", HINT)


# --- a folder: a file lock that ends with its process -----------------------------------------------------------


class _FolderLock(BuildLock):
    def __init__(self, path: Path) -> None:
        self.path, self.token = path, uuid.uuid4().hex

    def check(self) -> None:
        if not self.is_in_place():
            raise StoreError(f"{self.path}: was removed during this build, and another build may have begun", HINT)

    def is_in_place(self) -> bool:
        try:
            return bool(file_lock.parse_holder(file_lock.read_lock_file(self.path)).get("token") == self.token)
        except FileNotFoundError:
            return False


@contextmanager
def _folder_lock(folder: Path) -> Iterator[BuildLock]:
    with ExitStack() as stack:
        with explaining(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with explaining(folder / LOCK_NAME):
            lock = _acquire(folder, stack)
        try:
            yield lock
        finally:
            if lock.is_in_place():
                lock.path.unlink()  # while locked, so that no other build's file is removed


def _acquire(folder: Path, stack: ExitStack) -> _FolderLock:
    lock = _FolderLock(folder / LOCK_NAME)
    while not lock.is_in_place():  # repeats if the previous build removes the file meanwhile
        stack.close()
        file = stack.enter_context(open(lock.path, "a+b", buffering=0, opener=open_lock_file))  # noqa: SIM115
        try:
            stack.enter_context(file_lock.exclusive(file))
        except file_lock.LockedError as error:
            file.seek(0)
            holder = error.holder or file_lock.parse_holder(file.read(SMALL_BYTES))
            raise _refusal(folder, holder, HINT + error.remedy) from error
        try:
            file.truncate(0)
            file.write(json.dumps(file_lock.this_process() | {"token": lock.token}).encode())
            os.fsync(file.fileno())  # other machines read it
        except OSError:
            lock.path.unlink()  # while locked
            raise
    return lock


# --- a bucket: an object that names the build, renewed while its process lives ----------------------------------


class _BucketLease(BuildLock):
    """Hold a lease by conditional writes, which fail if another build wrote since, so only one build gets it."""

    def __init__(self, url: str) -> None:
        self.store = BucketStore(url, PATIENCE_SEC)
        self.token = uuid.uuid4().hex
        self._holder = file_lock.this_process() | {"token": self.token, "renewals": 0}
        self._tag: ETag | None = None
        self._lost: StoreError | None = None
        self._unreachable = False
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        """Acquire the lease. Returns False if the server has no conditional writes, so that nothing can be locked."""
        try:
            while self._tag is None:
                stored = self.store.get_versioned(LOCK_NAME)
                if stored and self._is_own(stored):  # it was written, but the response was lost
                    self._tag = stored.tag
                else:
                    self._refuse_if_alive(stored)
                    self._tag = self._write(stored.tag if stored else None)
        except NotImplementedError:
            return False
        if self._write(None):  # requires that there is none: this server ignores the condition
            self.store.delete(LOCK_NAME)
            return False
        self._thread.start()
        return True

    def release(self) -> None:
        self._ended.set()
        if self._unreachable:
            return  # the lease soon expires, and an error is reported without waiting
        self._thread.join()
        with suppress(StoreError):
            self.check()  # renews it, so no other build takes it over before the delete
            self.store.delete(LOCK_NAME)

    def check(self) -> None:
        with self._writing:
            if self._lost:
                raise self._lost
            self._holder["renewals"] += 1  # other bytes, another ETag
            self._tag = self._write(self._tag) or self._tag_if_own()
            self._unreachable = False

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SEC):
            try:
                self.check()
            except StoreError:  # retried soon; if the lease is lost, the build's own `check` raises
                self._unreachable = True

    def _write(self, tag: ETag | None) -> ETag | None:
        return self.store.put_if_match(LOCK_NAME, json.dumps(self._holder).encode(), tag)

    def _is_own(self, stored: VersionedObject) -> bool:
        return bool(file_lock.parse_holder(stored.data).get("token") == self.token)

    def _tag_if_own(self) -> ETag:
        """Return the ETag of the stored lease. Raises StoreError if it is no longer this build's."""
        stored = self.store.get_versioned(LOCK_NAME)
        if stored and self._is_own(stored):
            return stored.tag
        holder = file_lock.parse_holder(stored.data) if stored else {}
        cause = f"now held by {file_lock.name_holder(holder)}" if stored else "it was removed"
        self._lost = StoreError(f"{self.store.url}/{LOCK_NAME}: this build lost its lock: {cause}", HINT)
        raise self._lost

    def _refuse_if_alive(self, stored: VersionedObject | None) -> None:
        holder = file_lock.parse_holder(stored.data) if stored else {}
        if holder.get("place") == self._holder["place"]:
            if file_lock.started(holder.get("pid", 0)) == holder.get("started"):
                raise _refusal(self.store.url, holder, BUCKET_HINT)
        elif stored and (age := self._server_time() - stored.modified).total_seconds() <= EXPIRY_SEC:
            raise _refusal(self.store.url, holder, BUCKET_HINT, f", last seen {age.total_seconds():.0f} s ago")

    def _server_time(self) -> datetime:
        """Return the time by the clock that dates the lease, read from an object written now."""
        name = f"{LOCK_NAME}.{self.token}"
        self.store.write(name, b"")
        stored = self.store.get_versioned(name)
        self.store.delete(name)
        if stored is None:
            raise StoreError(f"{self.store.url}/{name}: was written, but cannot be read back")
        return stored.modified


@contextmanager
def _bucket_lease(url: str) -> Iterator[BuildLock]:
    lease = _BucketLease(url)
    if not lease.acquire():
        print(f"{url}: no conditional writes here: make sure that no other build runs", file=sys.stderr)
        yield BuildLock()
        return
    try:
        yield lease
    finally:
        lease.release()


def _refusal(where: str | Path, holder: dict[str, Any], hint: str, last_seen: str = "") -> StoreError:
    return StoreError(f"{where}: another build is running ({file_lock.name_holder(holder)}{last_seen})", hint)
