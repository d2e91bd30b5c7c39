"""Write files: whole or not at all, through links, and straight to what is no file; say what stands in the way."""

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
NAME_BYTES = 255  # of a name in a folder
LINKS_FOLLOWED = 40  # as the kernel does
FOREIGN_FILE = errno.EMLINK  # of a file that is elsewhere, too or only
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of a folder, on some FUSE and network file systems
HINTS = {
    errno.ENOSPC: "make room there, and give the same command again",
    errno.EDQUOT: "your quota is used up: make room or have it raised, and give the same command again",
    errno.EFBIG: "the size of files is limited here: see `ulimit -f`, and what this file system holds",
    errno.EROFS: "it is mounted read-only: name another place",
    errno.EACCES: "name a place where you may write",
    errno.EPERM: "name a place where you may write",
    FOREIGN_FILE: "remove what has that name; where this folder came from, somebody may mean harm",
}


def write_error(path: Path, error: OSError, needed: int | None = None, hint: str | None = None) -> StoreError:
    """Return what is told of a failed write: the path, the reason, the room if that is the reason, what to do."""
    said = error.strerror or str(error)
    there = next(above for above in (path, *path.absolute().parents) if os.path.exists(above))
    if error.errno == errno.ENOSPC and (there.is_file() or there.is_dir()):
        wanted = "" if needed is None else f"{needed:,} bytes are to be written, "
        said += f" ({wanted}{shutil.disk_usage(there).free:,} are free)"
    return StoreError(f"{path}: {said}", hint or HINTS.get(error.errno or 0, "name a place that can be written"))


@contextmanager
def explaining(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise StoreError, with a hint, if what is done inside to write `path` fails; a reader that left is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise write_error(path, error, needed) from error


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Yield a file whose bytes go where a person who names `path` wants them.

    A file appears under its name, or takes another's place, when it is whole; a link stays, and what it leads to is
    replaced. A device, a FIFO and this process's standard output are written to as they are.
    """
    place = file_to_replace(path)
    if place is not None:
        with replacing(place) as file:
            yield file
        return
    print(end="", flush=True)  # what was printed before comes first
    with explaining(path):
        descriptor = _descriptor(path)
        raw = _Stream(path if descriptor is None else os.dup(descriptor), "w")
    with raw.told(path), io.BufferedWriter(raw) as file:
        yield file


@contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when it is whole. Raise StoreError if it cannot be written."""
    partial = sibling(path, f".{uuid.uuid4().hex}.part")  # another process may write the same name
    with explaining(path, needed):
        if not os.path.exists(path.parent):  # if it is a file, what is opened below says so
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # a name that is too long is told now, not when all is written
        raw = _open_nameless(path.parent) or _File(partial, "x")
    with raw.told(path, needed):
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
    """Return a hidden name beside a file, for what belongs to it; the name of the file is cut in there if need be."""
    room = NAME_BYTES - len(ending) - 1
    return path.with_name(f".{os.fsencode(path.name)[:room].decode(errors='ignore')}{ending}")


def write(path: Path, data: bytes | str) -> None:
    """Write a whole file, text as UTF-8, as `written` does."""
    content = data.encode() if isinstance(data, str) else data
    place = file_to_replace(path)
    with replacing(place, len(content)) if place is not None else written(path) as file:
        file.write(content)


def write_inside(path: Path, data: bytes | str) -> None:
    """Write a whole file of a folder that others may have filled: it takes the place of a link of its name."""
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, len(content)) as file:
        file.write(content)


def append(path: Path, text: str) -> None:
    """Add to the end of such a file. Raise StoreError if it cannot be written, or leads elsewhere."""
    with explaining(path, len(text)), open(path, "a", encoding="utf-8", newline="", opener=open_lock_file) as file:
        file.write(text)


def open_lock_file(name: str, flags: int) -> int:
    """Open a file that is changed where it lies, for `open(…, opener=own_file)`; it waits for no pipe.

    Raises OSError if the name is a link, another name of some file, or no file: whoever made the folder decided that.
    """
    try:
        descriptor = os.open(name, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        said = "is a link that leads elsewhere" if error.errno == errno.ELOOP else "is a pipe or a socket, not a file"
        raise OSError(FOREIGN_FILE, said, name) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        said = "is also the file of another name" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise OSError(FOREIGN_FILE, said, name)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link alone; nothing if there is none."""
    with explaining(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_to_replace(path: Path) -> Path | None:
    """Return the file, or free name, that a path leads to; None if it leads to what is written to as it is."""
    if _descriptor(path) is not None:
        return None
    place = Path(os.path.realpath(path))
    with suppress(OSError):  # there is none yet, or it is told when it is to be made
        if not stat.S_ISREG(place.stat().st_mode):
            return None
    return None if os.path.islink(place) else place  # links that lead in a circle


def is_stdout(path: Path) -> bool:
    """Tell whether what is written there shares the standard output with messages."""
    return _descriptor(path) == 1


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _descriptor(path: Path) -> int | None:
    """Return which of this process's open files a path names, such as /dev/stdout, /dev/fd/63 or a link to one."""
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
    """Open a new file that has no name yet, so that nothing stays of it if its writer is killed.

    None if that cannot be done: NFS and many FUSE file systems have no such files.
    """
    try:
        file = _File(folder, "w", opener=lambda name, _: os.open(name, os.O_WRONLY | os.O_TMPFILE, 0o666))
    except OSError:
        return None  # a file with a name is tried next, and what stands in its way is told
    file.nameless = True
    return file


class _File(io.FileIO):
    """A file that tells its own failures from those of what fills it."""

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
        with self._noting():
            return super().write(data)

    def sync(self) -> None:
        with self._noting():
            os.fsync(self.fileno())

    @contextmanager
    def told(self, path: Path, needed: int | None = None) -> Iterator[None]:
        """Raise StoreError if this file could not be written."""
        try:
            yield
        except OSError as error:
            if not self._failed or isinstance(error, BrokenPipeError):
                raise
            raise write_error(path, error, needed) from error

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._failed = True
            raise


class _Stream(_File):
    """Written from front to back: a device, a FIFO, or a file that others write to as well."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        raise io.UnsupportedOperation("it is written from front to back")
