"""Lock a file exclusively, also on a file system without locks, and identify the process that holds a lock."""

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
    """Describe a lock file; the lock file of a build has more fields."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    host: str
    place: str
    pid: int
    started: int
    since: str


_HOLDER = TypeAdapter(_Holder)


class LockedError(Exception):
    """Report that another process holds a file: `holder`, if a lock file describes it, with a `remedy` for hints."""

    def __init__(self, holder: dict[str, Any] | None = None, remedy: str = "") -> None:
        super().__init__(holder, remedy)
        self.holder, self.remedy = holder, remedy

    @property
    def holder_note(self) -> str:
        """Return the holder's name in brackets as the end of a message, or nothing if it is unknown."""
        return "" if self.holder is None else f" ({name_holder(self.holder)})"


@contextmanager
def exclusive(file: IO[Any], wait_sec: float = 0.0) -> Iterator[None]:
    """Lock an open file for this process. Raises LockedError if another process holds it for longer than `wait_sec`.

    The kernel's lock ends with the file or the process. On a file system without locks, a lock file beside the file
    replaces it, which is as reliable as exclusive creation of files on that file system. If its process has died on
    this machine, it is taken over. filelock's SoftFileLock does so only with RENAME_EXCHANGE, which Lustre, NFS and
    most FUSE file systems lack.
    """
    deadline = time.monotonic() + wait_sec
    while True:
        try:
            lock_file = _lock(file)
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
                if parse_holder(read_lock_file(lock_file)).get("pid") == os.getpid():  # else somebody has deleted ours
                    lock_file.unlink()


def _lock(file: IO[Any]) -> Path | None:
    """Lock a file. Return the lock file, or None if the kernel's lock is used. Raises LockedError if it is held."""
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
            with open(lock_file, "x") as output:
                json.dump(this_process(), output)
        except FileExistsError:
            _remove_abandoned(lock_file)
        else:
            notice = f"{file.name}: this file system has no file locks; {lock_file.name} beside it is used instead"
            print(notice, file=sys.stderr)
            return lock_file


def _remove_abandoned(lock_file: Path) -> None:
    """Delete a lock file if its process has died on this machine. Raises LockedError if it may still be running."""
    try:
        data = read_lock_file(lock_file)
    except FileNotFoundError:
        return
    holder = parse_holder(data)
    if holder.get("place") != this_process()["place"] or started(holder.get("pid", 0)) == holder.get("started"):
        remedy = f"; if that process or its machine is gone, delete {lock_file}"
        raise LockedError(holder, remedy)
    with socket.socket(socket.AF_UNIX) as mutex:  # else two could check it, and one delete the other's new file
        try:
            mutex.bind(TAKING_OVER)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(0.01)
            return
        with suppress(FileNotFoundError):
            if read_lock_file(lock_file) == data:
                lock_file.unlink()


# --- the holder -----------------------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """Describe this process, unlike any of another boot, container or machine, or a later one with the same pid."""
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "host": host,
        "place": f"{host} {boot} {os.readlink('/proc/self/ns/pid')}",
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }


def started(pid: int) -> int:
    """Return the start time of a running process in ticks since boot; 0 for a dead one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def read_lock_file(path: Path) -> bytes:
    """Return the contents of a lock file. Raises OSError, which names the kind, if it is a link or not a file."""
    with open(path, "rb", opener=open_lock_file) as file:
        return file.read(SMALL_BYTES)


def parse_holder(data: bytes) -> dict[str, Any]:
    """Parse what `this_process` described; return {} if it is truncated or something else."""
    try:
        holder = parse(data, _HOLDER)
    except DocumentError:
        return {}
    return {**holder}


def name_holder(holder: dict[str, Any]) -> str:
    """Return the name of a process for a message."""
    return "pid {pid} on host {host} since {since}".format_map({"pid": "?", "host": "?", "since": "?"} | holder)
