"""Keep a second build out of the same folder or bucket prefix."""

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

from sharding.shardset.object_store import BucketStore, VersionedObject, ETag
from sharding.files.document import SMALL_BYTES
from sharding.errors import MissingError, StoreError
from sharding.files.exclusive import LockedError, exclusive, name_holder, parse_holder, read_lock_file, started, this_process
from sharding.shardset.store import FolderStore, Store
from sharding.files.writing import explaining, open_lock_file

LOCK_NAME = ".building"
RENEW_SEC = 15.0
EXPIRY_SEC = 60.0  # since a lease was renewed: three renewals have failed
PATIENCE_SEC = 20.0  # with the server, so that a renewal that failed is tried again in time
HINT = "wait until it has ended, or choose another --out"
BUCKET_HINT = f"{HINT}; a build that was killed elsewhere is taken for gone after {EXPIRY_SEC:.0f} s of silence"


class BuildLock:
    """What a build holds while it is the only one; as it stands here, of a place that cannot be guarded."""

    token = ""  # what it is known by

    def check(self) -> None:
        """Raise StoreError where it no longer is the only one: to be called before what cannot be undone."""


def exclusive_build(store: Store) -> AbstractContextManager[BuildLock]:
    """Hold OUT for this build alone; StoreError, with who holds it, where another does."""
    return _folder_lock(store.folder) if isinstance(store, FolderStore) else _bucket_lease(store.url)


def check_token(store: Store, token: str) -> None:
    """Raise StoreError where the build of that token does not hold OUT, as seen from here: another machine."""
    try:
        holder = parse_holder(store.read(LOCK_NAME, SMALL_BYTES))
    except MissingError as error:
        raise StoreError(
            f"{store.url}: {socket.gethostname()} does not see the build that it works for",
            "every worker must see OUT under the same path, or OUT be a bucket",
        ) from error
    if holder.get("token") != token:
        raise StoreError(f"{store.url}: now held by another build ({name_holder(holder)})", HINT)


# --- a folder: a lock that ends with its holder ---------------------------------------------------------------------


class _FolderLock(BuildLock):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex

    def check(self) -> None:
        if not self.is_in_place():
            raise StoreError(f"{self.path}: was removed during this build, and another may have begun", HINT)

    def is_in_place(self) -> bool:
        try:
            return bool(parse_holder(read_lock_file(self.path)).get("token") == self.token)
        except FileNotFoundError:
            return False


@contextmanager
def _folder_lock(folder: Path) -> Iterator[BuildLock]:
    with ExitStack() as held:
        with explaining(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with explaining(folder / LOCK_NAME):
            lock = _locked(folder, held)
        try:
            yield lock
        finally:
            if lock.is_in_place():
                lock.path.unlink()  # while it is locked, so that nobody else's is removed


def _locked(folder: Path, held: ExitStack) -> _FolderLock:
    lock = _FolderLock(folder / LOCK_NAME)
    while not lock.is_in_place():  # more than once if the build before removes it while it is being taken
        held.close()
        file = held.enter_context(open(lock.path, "a+b", buffering=0, opener=open_lock_file))  # noqa: SIM115
        try:
            held.enter_context(exclusive(file))
        except LockedError as error:
            file.seek(0)
            raise _refusal(folder, error.holder or parse_holder(file.read(SMALL_BYTES)), HINT + error.remedy) from error
        try:
            file.truncate(0)
            file.write(json.dumps(this_process() | {"token": lock.token}).encode())
            os.fsync(file.fileno())  # other machines read it
        except OSError:
            lock.path.unlink()  # while it is locked
            raise
    return lock


# --- a bucket: an object that says who builds, renewed as long as that process lives --------------------------------


class _BucketLease(BuildLock):
    """Every write is on condition that nobody else wrote since, so of two that want the lease one gets it."""

    def __init__(self, url: str) -> None:
        self.store = BucketStore(url, PATIENCE_SEC)
        self.token = uuid.uuid4().hex
        self._holder = this_process() | {"token": self.token, "renewals": 0}
        self._tag: ETag | None = None
        self._lost: StoreError | None = None
        self._away = False
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        """False where the server knows no conditions, so that nothing can be guarded."""
        try:
            while self._tag is None:
                found = self.store.get_versioned(LOCK_NAME)
                if found and self._is_mine(found):  # it was written, but the answer got lost
                    self._tag = found.tag
                else:
                    self._refuse_if_alive(found)
                    self._tag = self._write(found.tag if found else None)
        except NotImplementedError:
            return False
        if self._write(None):  # on condition that there is none: this server ignores it
            self.store.delete(LOCK_NAME)
            return False
        self._thread.start()
        return True

    def release(self) -> None:
        self._ended.set()
        if self._away:
            return  # what stays behind is taken for gone soon, and an error need not wait
        self._thread.join()
        with suppress(StoreError):
            self.check()  # ours, and fresh: nobody takes it over before it is removed
            self.store.delete(LOCK_NAME)

    def check(self) -> None:
        with self._writing:
            if self._lost:
                raise self._lost
            self._holder["renewals"] += 1  # other bytes, another tag
            self._tag = self._write(self._tag) or self._tag_if_mine()
            self._away = False

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SEC):
            try:
                self.check()
            except StoreError:  # tried again soon; what is lost, the build's own `check` tells
                self._away = True

    def _write(self, tag: ETag | None) -> ETag | None:
        return self.store.put_if_match(LOCK_NAME, json.dumps(self._holder).encode(), tag)

    def _is_mine(self, found: VersionedObject) -> bool:
        return bool(parse_holder(found.data).get("token") == self.token)

    def _tag_if_mine(self) -> ETag:
        found = self.store.get_versioned(LOCK_NAME)
        if found and self._is_mine(found):
            return found.tag
        taker = f"now held by {name_holder(parse_holder(found.data))}" if found else "somebody removed it"
        self._lost = StoreError(f"{self.store.url}/{LOCK_NAME}: this build has lost its place: {taker}", HINT)
        raise self._lost

    def _refuse_if_alive(self, found: VersionedObject | None) -> None:
        holder = parse_holder(found.data) if found else {}
        if holder.get("place") == self._holder["place"]:
            if started(holder.get("pid", 0)) == holder.get("started"):
                raise _refusal(self.store.url, holder, BUCKET_HINT)
        elif found and (silence := self._server_time() - found.modified).total_seconds() <= EXPIRY_SEC:
            raise _refusal(self.store.url, holder, BUCKET_HINT, f", last seen {silence.total_seconds():.0f} s ago")

    def _server_time(self) -> datetime:
        """By the clock that dates the lease: that of an object written now."""
        name = f"{LOCK_NAME}.{self.token}"
        self.store.write(name, b"")
        found = self.store.get_versioned(name)
        self.store.delete(name)
        if found is None:
            raise StoreError(f"{self.store.url}/{name}: was written and is not there")
        return found.modified


@contextmanager
def _bucket_lease(url: str) -> Iterator[BuildLock]:
    lease = _BucketLease(url)
    if not lease.acquire():
        print(f"{url}: no conditional writes here, so see to it that no other build runs", file=sys.stderr)
        yield BuildLock()
        return
    try:
        yield lease
    finally:
        lease.release()


def _refusal(where: str | Path, holder: dict[str, Any], hint: str, seen: str = "") -> StoreError:
    return StoreError(f"{where}: another build is running ({name_holder(holder)}{seen})", hint)
