"""Where bytes live: a local folder or an object store, behind the same few verbs."""

import os
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sharding.bucket import PATIENCE_SEC, BucketStore, Content, Range
from sharding.errors import MissingError, StoreError

FLUSH_BYTES = 8 * 2**20  # a file goes to the disk in such steps, while more of it is made, and leaves the page cache


class Reader(Protocol):
    """Names are relative, with forward slashes. Every verb raises StoreError, with the name, when bytes do not come.

    Of a range, (offset, length), only what lies within the object is read, so that a shard cut short fails its
    checksum.
    """

    url: str
    remote: bool

    def read(self, name: str) -> bytes: ...
    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]: ...


class Store(Reader, Protocol):
    """A `Reader` that can be written to."""

    def write(self, name: str, data: Content) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> Iterator[str]: ...
    def delete(self, name: str) -> None: ...


def open_store(location: str | Path, dry: bool = False) -> Store:
    """A store for a folder, or for an `s3://`, `gs://`, `az://` or `http(s)://` URL; a `dry` one is never changed.

    Credentials, endpoint and region of a bucket come from the usual environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, …) and are never logged.
    """
    text = str(location)
    bucket = "://" in text and not text.startswith("file://")
    store: Store = BucketStore(text, PATIENCE_SEC) if bucket else FolderStore(Path(text.removeprefix("file://")))
    return DryStore(store) if dry else store


class FolderStore:
    """A local folder. A file appears under its name only when it is whole."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise MissingError(f"{self.folder / name}: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"{self.folder / name}: {error.strerror}") from error

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        try:
            with open(self.folder / name, "rb") as file:
                return [os.pread(file.fileno(), length, offset) for offset, length in ranges]
        except OSError as error:
            raise StoreError(f"{self.folder / name}: {error.strerror}") from error

    def write(self, name: str, data: Content) -> None:
        path = self.folder / name
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # another machine may write the same name
        waiting = 0  # bytes whose way to the disk has not begun
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                for part in [data] if isinstance(data, bytes) else data:
                    waiting += file.write(part)
                    if waiting >= FLUSH_BYTES:
                        file.flush()
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        waiting = 0
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                partial.unlink()

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def names(self) -> Iterator[str]:
        return (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class DryStore:
    """Reads like the store it stands for, and writes nothing."""

    def __init__(self, store: Store) -> None:
        self.url, self.remote = store.url, store.remote
        self.read, self.read_ranges, self.exists, self.names = store.read, store.read_ranges, store.exists, store.names

    def write(self, name: str, data: Content) -> None:
        """Nothing comes, but the work is done."""
        if not isinstance(data, bytes):
            deque(data, maxlen=0)

    def delete(self, name: str) -> None:
        """Nothing goes."""
