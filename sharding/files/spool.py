"""Keep what is too large for memory in a temporary file, mapped: the system drops its pages when it needs the memory.

The file has no name, so that nothing remains of it, however its process ends.
"""

import errno
import fcntl
import io
import mmap
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sharding.errors import StoreError
from sharding.files.writing import write_error

LARGE_FILES = "/var/tmp"  # /tmp is often kept in memory
PREFIX, MARK = ".streamtrain-tmp", "made-by-streamtrain"  # of a folder's name; a file in each folder of ours
NEW_SEC = 60.0  # a folder may be younger than its lock
SMALL_BYTES = 2**20  # are kept in memory: each mapped file takes a descriptor
BLOCK_ROWS = 2**16
SAME_USER = "processes of one machine must run as one user, and see each other in /proc"
MORE_ROOM = "TMPDIR=FOLDER in the environment names a folder with more room for temporary files"

Mapped = bytes | mmap.mmap  # both are read by slices


@contextmanager
def large_files_folder() -> Iterator[str]:
    """Yield a new folder for temporary files that may be large, deleted afterwards, with those of killed processes."""
    place, host = _place(), socket.gethostname()
    _delete_abandoned(Path(place), host)
    with _no_room_explained(place):
        folder = tempfile.mkdtemp(prefix=f"{PREFIX}-{host}-", dir=place)
        Path(folder, MARK).touch()
    try:
        with ExitStack() as stack:
            with suppress(OSError):  # no locks on this file system: then no folder there is deleted for others either
                stack.enter_context(_locked(folder))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_abandoned(place: Path, host: str) -> None:
    """Delete the folders of processes of this machine that were killed; locks of other machines may be unknown here."""
    for folder in place.glob(f"{PREFIX}-{host}-*"):
        with suppress(OSError):  # of another user, or in use
            if (folder / MARK).is_file() and time.time() - folder.stat().st_mtime > NEW_SEC:
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
    """Write bytes, to a temporary file if they are many, then read them. Raises StoreError if there is no room."""

    def __init__(self) -> None:
        self._place = _place()
        self._file: IO[bytes] = io.BytesIO()
        self.size = 0

    def write(self, data: bytes) -> None:
        with _no_room_explained(self._place):
            if isinstance(self._file, io.BytesIO) and self.size + len(data) > SMALL_BYTES:
                begun = self._file.getvalue()
                self._file = tempfile.TemporaryFile(dir=self._place, buffering=SMALL_BYTES)  # noqa: SIM115
                self._file.write(begun)
            self._file.write(data)
        self.size += len(data)

    def map(self) -> Mapped:
        """Return what was written, and close the file."""
        with _no_room_explained(self._place), self._file:
            if isinstance(self._file, io.BytesIO):
                return self._file.getvalue()
            self._file.flush()
            return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)


def map_table(rows: int, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """Return a table of zeros, shape (rows,), in a temporary file. Raises StoreError if there is no room for it."""
    size, place = rows * dtype.itemsize, _place()
    if size <= SMALL_BYTES:
        return np.zeros(rows, dtype)
    with _no_room_explained(place, size), tempfile.TemporaryFile(dir=place) as file:
        reserve(file, size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype)


def reserve(file: IO[bytes], size: int) -> None:
    """Give an empty file a size, and its room on the disk: else a full disk would end the process at a later write."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        for start in range(0, size, SMALL_BYTES):
            file.write(bytes(min(SMALL_BYTES, size - start)))
        file.flush()


def select_rows(table: npt.NDArray[np.void], chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.void]:
    """Return the chosen rows of a table, shape (N,), in a temporary file."""
    selected, first = map_table(int(chosen.sum()), table.dtype), 0
    for start in range(0, len(table), BLOCK_ROWS):
        rows = table[start : start + BLOCK_ROWS][chosen[start : start + BLOCK_ROWS]]
        selected[first : first + len(rows)] = rows
        first += len(rows)
    return selected


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
        return _open_shared, (path, _identity(self._file), self.dtype, self.shape)


def share_array(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only copy of an array in a temporary file. Raises StoreError if there is no room for it."""
    place = _place()
    if not values.size:
        return values
    with _no_room_explained(place, values.nbytes):
        file = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
        reserve(file, values.nbytes)
        whole = np.frombuffer(mmap.mmap(file.fileno(), values.nbytes), values.dtype).reshape(values.shape)
    whole[...] = values
    return _as_shared(whole, file)


def _identity(file: IO[bytes]) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size


def _open_shared(
    path: str, identity: tuple[int, int, int], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{path}: cannot be shared: {error.strerror}", SAME_USER) from error
    if _identity(file) != identity:  # the number of another file by now
        raise StoreError(f"{path}: is another file than the one that was shared", SAME_USER)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _as_shared(np.frombuffer(mapped, dtype).reshape(shape), file)


def _as_shared(values: npt.NDArray[Any], file: IO[bytes]) -> npt.NDArray[Any]:
    values.flags.writeable = False
    shared = values.view(SharedArray)
    shared._file = file
    return shared


def _place() -> str:
    """Return the folder for temporary files: that of TMPDIR, if it is set, even if it is not there."""
    usable = os.path.isdir(LARGE_FILES) and os.access(LARGE_FILES, os.W_OK | os.X_OK)
    return os.environ.get("TMPDIR") or (LARGE_FILES if usable else tempfile.gettempdir())


@contextmanager
def _no_room_explained(place: str, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise write_error(Path(place), error, needed, MORE_ROOM if no_room else None) from error
