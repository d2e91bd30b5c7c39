"""Hold a file for one process alone, also on a file system without locks; and name the process that holds one."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from sharding.files.document import SMALL_BYTES, DocumentError, parse
from sharding.files.writing import open_lock_file

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre mounted without flock, some FUSE and NFS
SUFFIX = ".held"
RETRY_SEC = 0.5
TAKING_OVER = "\0streamtrain takes over a lock file"  # an abstract socket: the kernel frees its name at once


class _Holder(TypedDict, total=False):
    """What a lock file says; a build's says more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    host: str
    place: str
    pid: int
    started: int
    since: str


_HOLDER = TypeAdapter(_Holder)


class LockedError(Exception):
    """Another process holds the file: `holder`, if a lock file describes it, and what `remedy` adds to a hint then."""

    def __init__(self, holder: dict[str, Any] | None = None, remedy: str = "") -> None:
        super().__init__(holder, remedy)
        self.holder, self.remedy = holder, remedy

    @property
    def who(self) -> str:
        """Return the holder's name in brackets, to end a message with."""
        return "" if self.holder is None else f" ({name_holder(self.holder)})"


@contextmanager
def exclusive(file: IO[Any], wait_sec: float = 0.0) -> Iterator[None]:
    """Hold an open file for this process alone; raises HeldError if another one holds it for longer than `wait_sec`.

    The kernel's lock ends with the file or the process. On a file system without locks, a lock file beside the file
    takes its place; it excludes as well as that file system creates files exclusively. If its process has died on this
    machine, it is taken over. filelock's SoftFileLock does so only with RENAME_EXCHANGE, which Lustre, NFS and most
    FUSE file systems lack.
    """
    deadline = time.monotonic() + wait_sec
    while True:
        try:
            lock_file = _hold(file)
            break
        except LockedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_SEC)
    try:
        yield
    finally:
        if lock_file is not None:
            with suppress(FileNotFoundError):
                if parse_holder(read_lock_file(lock_file)).get("pid") == os.getpid():  # else somebody deleted ours
                    lock_file.unlink()


def _hold(file: IO[Any]) -> Path | None:
    """Lock a file; returns the lock file, if it takes one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError as error:
        raise LockedError from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    lock_file = Path(f"{file.name}{SUFFIX}")
    while True:
        try:
            with open(lock_file, "x") as created:
                json.dump(this_process(), created)
        except FileExistsError:
            _remove_abandoned(lock_file)
        else:
            said = f"{file.name}: this file system has no file locks; {lock_file.name} beside it is used instead"
            print(said, file=sys.stderr)
            return lock_file


def _remove_abandoned(lock_file: Path) -> None:
    """Remove a lock file if its process has died on this machine; raises HeldError if it may still live."""
    try:
        data = read_lock_file(lock_file)
    except FileNotFoundError:
        return
    holder = parse_holder(data)
    if holder.get("place") != this_process()["place"] or started(holder.get("pid", 0)) == holder.get("started"):
        remedy = f"; if that process or its machine is gone, delete {lock_file}"
        raise LockedError(holder, remedy)
    with socket.socket(socket.AF_UNIX) as sole:  # else two could judge it, and one remove what the other put there
        try:
            sole.bind(TAKING_OVER)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(0.01)
            return
        with suppress(FileNotFoundError):
            if read_lock_file(lock_file) == data:
                lock_file.unlink()


# --- who holds it ---------------------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """Describe this process: unlike any of another boot, container or machine, or a later one of the same number."""
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "host": host,
        "place": f"{host} {boot} {os.readlink('/proc/self/ns/pid')}",
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }


def started(pid: int) -> int:
    """Return when a living process started, in ticks since boot; 0 for a dead one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def read_lock_file(path: Path) -> bytes:
    """Return what a lock file says. Raises OSError, which says what it is instead, if it is a link or no file."""
    with open(path, "rb", opener=open_lock_file) as file:
        return file.read(SMALL_BYTES)


def parse_holder(data: bytes) -> dict[str, Any]:
    """Return what `this_process` described; nothing if it was cut off or is something else."""
    try:
        holder = parse(data, _HOLDER)
    except DocumentError:
        return {}
    return {**holder}


def name_holder(holder: dict[str, Any]) -> str:
    """Name a process for a message."""
    return "pid {pid} on host {host} since {since}".format_map({"pid": "?", "host": "?", "since": "?"} | holder)
