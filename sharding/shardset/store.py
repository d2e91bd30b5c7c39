"""Read and write files in a local folder or an object store through one interface."""

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

FLUSH_BYTES = 8 * 2**20  # a file is flushed in such steps while more of it is generated, and leaves the page cache


class Reader(Protocol):
    """Read files by relative names with forward slashes, which never lead outside. Every method raises StoreError,
    with the name, if a file cannot be read or has more than `limit` bytes.

    A range, (offset, length), is clipped to the object, so that a truncated shard fails its checksum.
    """

    url: str
    remote: bool

    def read(self, name: str, limit: int | None = None) -> bytes: ...
    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]: ...


class Store(Reader, Protocol):
    """Read as a `Reader`, and write, list and delete files."""

    def write(self, name: str, data: Content) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> Iterator[str]: ...
    def sizes(self, names: Iterable[str]) -> dict[str, int]: ...
    def delete(self, name: str) -> None: ...


def open_store(location: str | Path, dry_run: bool = False) -> Store:
    """Open a folder, or an `s3://`, `gs://`, `az://` or `http(s)://` URL; with `dry_run` the store is never changed.

    Credentials, endpoint and region of a bucket come from the usual environment variables (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, …), and are never logged.
    """
    text = str(location)
    bucket = "://" in text and not text.startswith("file://")
    store: Store = BucketStore(text, PATIENCE_SEC) if bucket else FolderStore(Path(text.removeprefix("file://")))
    return DryStore(store) if dry_run else store


class FolderStore:
    """Read and write files of a local folder. A file appears under its name only when it is complete.

    Files are read wherever links lead, as in a download cache that consists of links, because checksums verify their
    contents; nothing is written or deleted through a link that leads outside.
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
        pending = 0  # bytes not yet sent to the disk
        with replacing(self._path_to_change(name), len(data) if isinstance(data, bytes) else None) as file:
            for part in [data] if isinstance(data, bytes) else data:
                pending += file.write(part)
                if pending >= FLUSH_BYTES:
                    file.flush()
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    pending = 0

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        return (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the size in bytes of each of the named files that exists."""
        sizes = {}
        for name in names:
            with suppress(OSError):
                sizes[name] = self._path(name).stat().st_size
        return sizes

    def delete(self, name: str) -> None:
        self._path_to_change(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        check_name(self.url, name)
        return self.folder / name

    def _path_to_change(self, name: str) -> Path:
        path = self._path(name)
        target = path.parent.resolve()
        if not target.is_relative_to(self.folder.resolve()):
            raise StoreError(f"{path}: a link leads to {target}, outside of {self.folder}: nothing is written there",
                             "name the folder that the link leads to, or remove the link")  # fmt: skip
        return path


class DryStore:
    """Read from another store, and write nothing."""

    def __init__(self, store: Store) -> None:
        self.url, self.remote = store.url, store.remote
        self.read, self.read_ranges, self.exists, self.names = store.read, store.read_ranges, store.exists, store.names
        self.sizes = store.sizes

    def write(self, name: str, data: Content) -> None:
        """Consume the data, so that the work is done, but write nothing."""
        if not isinstance(data, bytes):
            deque(data, maxlen=0)

    def delete(self, name: str) -> None:
        """Delete nothing."""
