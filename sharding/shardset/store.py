"""Where bytes live: a local folder or an object store, behind the same few verbs."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sharding.errors import MissingError, StoreError
from sharding.files.document import open_regular
from sharding.files.names import check_name
from sharding.files.writing import replacing
from sharding.shardset.object_store import PATIENCE_SEC, BucketStore, Content, Range, size_error

FLUSH_BYTES = 8 * 2**20  # a file goes to the disk in such steps, while more of it is made, and leaves the page cache


class Reader(Protocol):
    """Names are relative, with forward slashes, and never lead outside. Every verb raises StoreError, with the name,
    when bytes do not come, or when there are more than `limit` of them.

    Of a range, (offset, length), only what lies within the object is read, so that a shard cut short fails its
    checksum.
    """

    url: str
    remote: bool

    def read(self, name: str, limit: int | None = None) -> bytes: ...
    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]: ...


class Store(Reader, Protocol):
    """A `Reader` that can be written to."""

    def write(self, name: str, data: Content) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> Iterator[str]: ...
    def sizes(self, names: Iterable[str]) -> dict[str, int]: ...
    def delete(self, name: str) -> None: ...


def open_store(location: str | Path, dry_run: bool = False) -> Store:
    """A store for a folder, or for an `s3://`, `gs://`, `az://` or `http(s)://` URL; a `dry` one is never changed.

    Credentials, endpoint and region of a bucket come from the usual environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, …) and are never logged.
    """
    text = str(location)
    bucket = "://" in text and not text.startswith("file://")
    store: Store = BucketStore(text, PATIENCE_SEC) if bucket else FolderStore(Path(text.removeprefix("file://")))
    return DryStore(store) if dry_run else store


class FolderStore:
    """A local folder. A file appears under its name only when it is whole.

    Files are read wherever links lead, as in a download cache that consists of links, and their checksums tell what
    they are; nothing is written or deleted through a link that leads outside.
    """

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def read(self, name: str, limit: int | None = None) -> bytes:
        path = self._path(name)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if limit is not None and size > limit:
                    raise size_error(str(path), size, limit)
                return file.read()
        except FileNotFoundError as error:
            raise MissingError(f"{path}: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        path = self._path(name)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                inside = [(min(offset, size), min(length, size - min(offset, size))) for offset, length in ranges]
                return [os.pread(file.fileno(), length, offset) for offset, length in inside]
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def write(self, name: str, data: Content) -> None:
        waiting = 0  # bytes whose way to the disk has not begun
        with replacing(self._path_to_change(name), len(data) if isinstance(data, bytes) else None) as file:
            for part in [data] if isinstance(data, bytes) else data:
                waiting += file.write(part)
                if waiting >= FLUSH_BYTES:
                    file.flush()
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    waiting = 0

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        return (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The bytes of each file that is there, of those named."""
        found = {}
        for name in names:
            with suppress(OSError):
                found[name] = self._path(name).stat().st_size
        return found

    def delete(self, name: str) -> None:
        self._path_to_change(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        check_name(self.url, name)
        return self.folder / name

    def _path_to_change(self, name: str) -> Path:
        path = self._path(name)
        place = path.parent.resolve()
        if not place.is_relative_to(self.folder.resolve()):
            raise StoreError(f"{path}: a link leads to {place}, outside of {self.folder}: nothing is written there",
                             "name the folder that the link leads to, or remove the link")  # fmt: skip
        return path


class DryStore:
    """Reads like the store it stands for, and writes nothing."""

    def __init__(self, store: Store) -> None:
        self.url, self.remote = store.url, store.remote
        self.read, self.read_ranges, self.exists, self.names = store.read, store.read_ranges, store.exists, store.names
        self.sizes = store.sizes

    def write(self, name: str, data: Content) -> None:
        """Nothing comes, but the work is done."""
        if not isinstance(data, bytes):
            deque(data, maxlen=0)

    def delete(self, name: str) -> None:
        """Nothing goes."""
