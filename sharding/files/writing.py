"""Write files completely or not at all, follow links, write directly to devices and pipes, and explain failures."""

import errno
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sharding.errors import StoreError

STDOUT = Path("/dev/stdout")
NAME_BYTES = 255  # longest name in a folder
LINKS_FOLLOWED = 40  # as the kernel does
FOREIGN_FILE = errno.EMLINK  # of a file that is also, or only, in another place
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # for a folder, on some FUSE and network file systems
HINTS = {
    errno.ENOSPC: "make room there, and run the same command again",
    errno.EDQUOT: "your quota is used up: make room or have it raised, and run the same command again",
    errno.EFBIG: "the size of files is limited: check `ulimit -f` and the limit of this file system",
    errno.EROFS: "it is mounted read-only: name another path",
    errno.EACCES: "name a path that you may write to",
    errno.EPERM: "name a path that you may write to",
    FOREIGN_FILE: "remove the file or link of that name; it may be an attack by whoever made this folder",
}


def write_error(path: Path, error: OSError, needed: int | None = None, hint: str | None = None) -> StoreError:
    """Return the error of a failed write: path, reason, the free space if it ran out, and a hint."""
    reason = error.strerror or str(error)
    existing = next(ancestor for ancestor in (path, *path.absolute().parents) if os.path.exists(ancestor))
    if error.errno == errno.ENOSPC and (existing.is_file() or existing.is_dir()):
        required = "" if needed is None else f"{needed:,} bytes are to be written, "
        reason += f" ({required}{shutil.disk_usage(existing).free:,} are free)"
    return StoreError(f"{path}: {reason}", hint or HINTS.get(error.errno or 0, "name a path that can be written"))


@contextmanager
def explaining(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise StoreError, with a hint, if writing `path` in this context fails; a broken pipe is raised unchanged."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise write_error(path, error, needed) from error


@contextmanager
def written(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write `path`, as named by a user.

    A regular file appears under its name, or replaces another, when it is complete; a link stays, and its target is
    replaced. A device, a FIFO and this process's standard output are written to directly.
    """
    target = file_to_replace(path)
    if target is not None:
        with replacing(target, needed) as file:
            yield file
        return
    print(end="", flush=True)  # earlier output comes first
    with explaining(path):
        descriptor = _descriptor(path)
        raw = _Stream(path if descriptor is None else os.dup(descriptor), "w")
    with raw.explaining(path), io.BufferedWriter(raw) as file:
        yield file


@contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when it is complete. Raises StoreError if it cannot be written."""
    partial = sibling(path, f".{uuid.uuid4().hex}.part")  # unique, as another process may write the same name
    with explaining(path, needed):
        if not os.path.exists(path.parent):  # if it is a file, the opening below reports it
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # a name that is too long is reported now, not after the write
        raw = _open_nameless(path.parent) or _File(partial, "x")
    with raw.explaining(path, needed):
        try:
            with io.BufferedWriter(raw) as file:
                yield file
                file.flush()
                raw.sync()
                with explaining(path):
                    raw.name_if_nameless(partial)
            with explaining(path):
                os.replace(partial, path)
                sync(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink()


def sibling(path: Path, ending: str) -> Path:
    """Return a hidden path beside a file with its name, truncated if necessary, and an ending."""
    room = NAME_BYTES - len(ending) - 1
    return path.with_name(f".{os.fsencode(path.name)[:room].decode(errors='ignore')}{ending}")


def write(path: Path, data: bytes | str) -> None:
    """Write a whole file, text as UTF-8, in the way of `written`."""
    content = data.encode() if isinstance(data, str) else data
    with written(path, len(content)) as file:
        file.write(content)


def write_inside(path: Path, data: bytes | str) -> None:
    """Write a whole file in a folder that others may have filled: a link of its name is replaced, not followed."""
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, len(content)) as file:
        file.write(content)


def append(path: Path, text: str) -> None:
    """Append to a file in a folder that others may have filled. Raises StoreError if it is a link or not writable."""
    with explaining(path, len(text)), open(path, "a", encoding="utf-8", newline="", opener=open_lock_file) as file:
        file.write(text)


def open_lock_file(name: str, flags: int) -> int:
    """Open a file to change in place, for `open(…, opener=open_lock_file)`, without waiting for a pipe.

    Raises OSError if the name is a link, a hard link, or not a file: whoever made the folder may have placed it there.
    """
    try:
        descriptor = os.open(name, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        problem = "is a link that leads elsewhere" if error.errno == errno.ELOOP else "is a pipe or socket, not a file"
        raise OSError(FOREIGN_FILE, problem, name) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        problem = "is a hard link to another file" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise OSError(FOREIGN_FILE, problem, name)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def remove(path: Path) -> None:
    """Delete a file, a folder with its contents, or a link but not its target; do nothing if there is none."""
    with explaining(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_to_replace(path: Path) -> Path | None:
    """Return the file, or unused path, that a path resolves to; None if it must be written to directly."""
    if _descriptor(path) is not None:
        return None
    target = Path(os.path.realpath(path))
    with suppress(OSError):  # it does not exist yet, or the error is reported when it is written
        if not stat.S_ISREG(target.stat().st_mode):
            return None
    return None if os.path.islink(target) else target  # still a link: links in a circle


def is_stdout(path: Path) -> bool:
    """Return whether a path is this process's standard output, which messages share."""
    return _descriptor(path) == 1


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _descriptor(path: Path) -> int | None:
    """Return the open descriptor of this process that a path names, as /dev/stdout, /dev/fd/63 or a link does."""
    for _ in range(LINKS_FOLLOWED):
        if path == STDOUT:
            return 1
        path = Path(os.path.realpath(path.parent)) / path.name
        if named := re.fullmatch(rf"/proc/{os.getpid()}/fd/(\d+)", str(path)):
            return int(named[1])
        if not os.path.islink(path):
            return None
        path = path.parent / path.readlink()
    return None


def _open_nameless(folder: Path) -> "_File | None":
    """Open a new file without a name, so that nothing remains of it if its writer is killed.

    Returns None if that fails: NFS and many FUSE file systems have no such files.
    """
    try:
        file = _File(folder, "w", opener=lambda name, _: os.open(name, os.O_WRONLY | os.O_TMPFILE, 0o666))
    except OSError:
        return None  # a file with a name is tried next, and its error is reported
    file.nameless = True
    return file


class _File(io.FileIO):
    """Represent a file that distinguishes its own failures from those of the code that writes to it."""

    nameless = False
    _failed = False

    def name_if_nameless(self, path: Path) -> None:
        if not self.nameless:
            return
        descriptors = os.open("/proc/self/fd", os.O_RDONLY)
        try:
            os.link(str(self.fileno()), path, src_dir_fd=descriptors, follow_symlinks=True)
        finally:
            os.close(descriptors)

    def write(self, data: Any, /) -> int:
        with self._recording_failure():
            return super().write(data)

    def sync(self) -> None:
        with self._recording_failure():
            os.fsync(self.fileno())

    @contextmanager
    def explaining(self, path: Path, needed: int | None = None) -> Iterator[None]:
        """Raise StoreError if this file could not be written."""
        try:
            yield
        except OSError as error:
            if not self._failed or isinstance(error, BrokenPipeError):
                raise
            raise write_error(path, error, needed) from error

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._failed = True
            raise


class _Stream(_File):
    """Represent a stream without seek: a device, a FIFO, or a file that others write to, too."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        raise io.UnsupportedOperation("it is written sequentially")
