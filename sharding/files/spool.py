"""Keep what is too large for memory in a temporary file, mapped: the system drops its pages when it needs the memory.

The file has no name, so that nothing remains of it, however its process ends.
"""

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sharding.errors import StoreError
from sharding.files.writing import write_error

LARGE_FILES = "/var/tmp"  # /tmp is often kept in memory
PREFIX = "streamtrain-"
NEW_SEC = 60.0  # a folder may be younger than its lock
BUFFER_BYTES = 2**20
SAME_USER = "processes of one machine must run as one user, and see each other in /proc"
MORE_ROOM = "TMPDIR=FOLDER in the environment names a folder with more room for temporary files"

Mapped = bytes | mmap.mmap  # both are read by slices


@contextmanager
def large_files_folder() -> Iterator[str]:
    """Yield a new folder for temporary files that may be large, deleted afterwards, with those of killed processes."""
    _delete_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=_place()) as folder, _locked(folder):
        yield folder


def _delete_abandoned() -> None:
    for folder in Path(_place()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or in use
            if time.time() - folder.stat().st_mtime > NEW_SEC:
                with _locked(str(folder)):
                    shutil.rmtree(folder)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which ends with this process. Raises OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class Spool:
    """Write bytes to a temporary file, then read them as mapped memory. Raises StoreError if there is no room."""

    def __init__(self) -> None:
        with _no_room_explained():
            self._file = tempfile.TemporaryFile(dir=_place(), buffering=BUFFER_BYTES)  # noqa: SIM115
        self.size = 0

    def write(self, data: bytes) -> None:
        with _no_room_explained():
            self._file.write(data)
        self.size += len(data)

    def map(self) -> Mapped:
        """Return what was written, and close the file."""
        with _no_room_explained(), self._file:
            self._file.flush()
            return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""


def map_table(rows: int, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """Return a table of zeros, shape (rows,), in a temporary file. Raises StoreError if there is no room for it."""
    size = rows * dtype.itemsize
    if not size:
        return np.zeros(0, dtype)
    with _no_room_explained(size), tempfile.TemporaryFile(dir=_place()) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk ends the process when a page is written
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype)


def copy_table(chosen: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return a copy of rows of a table, shape (N,), in a temporary file."""
    table = map_table(len(chosen), chosen.dtype)
    table[:] = chosen
    return table


class SharedArray(np.ndarray[Any, np.dtype[Any]]):
    """Represent an array in a temporary file: pickled, it is the way to that file, for processes of this machine.

    They map its pages, and have no copy. The array must be alive in this process when they unpickle it.
    """

    _file: IO[bytes] | None

    def __array_finalize__(self, source: object) -> None:
        self._file = None  # of a view or a copy

    def __reduce__(self) -> Any:
        if self._file is None:
            return super().__reduce__()
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return _open_shared, (path, os.fstat(self._file.fileno()).st_ino, self.dtype, self.shape)


def share_array(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only copy of an array in a temporary file. Raises StoreError if there is no room for it."""
    if not values.size:
        return values
    with _no_room_explained(values.nbytes):
        file = tempfile.TemporaryFile(dir=_place(), buffering=0)  # noqa: SIM115
        os.posix_fallocate(file.fileno(), 0, values.nbytes)
        whole = np.frombuffer(mmap.mmap(file.fileno(), values.nbytes), values.dtype).reshape(values.shape)
        whole[...] = values
    return _as_shared(whole, file)


def _open_shared(path: str, inode: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{path}: cannot be shared: {error.strerror}", SAME_USER) from error
    if os.fstat(file.fileno()).st_ino != inode:  # the number of another file by now
        raise StoreError(f"{path}: is another file than the one that was shared", SAME_USER)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _as_shared(np.frombuffer(mapped, dtype).reshape(shape), file)


def _as_shared(values: npt.NDArray[Any], file: IO[bytes]) -> npt.NDArray[Any]:
    values.flags.writeable = False
    shared = values.view(SharedArray)
    shared._file = file
    return shared


def _place() -> str:
    usable = os.path.isdir(LARGE_FILES) and os.access(LARGE_FILES, os.W_OK | os.X_OK)
    return LARGE_FILES if usable and not os.environ.get("TMPDIR") else tempfile.gettempdir()


@contextmanager
def _no_room_explained(needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(Path(_place()), error, needed, MORE_ROOM) from error
