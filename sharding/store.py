"""Where bytes live: a local folder or an object store, behind the same few verbs."""

import os
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from sharding.errors import StoreError


class Store(Protocol):
    """Names are relative, with forward slashes. Every verb raises StoreError, with the name, when bytes do not come."""

    url: str
    remote: bool

    def read(self, name: str) -> bytes: ...
    def read_range(self, name: str, offset: int, length: int) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...


def open_store(location: str | Path) -> Store:
    """A store for a folder, or for an `s3://`, `gs://`, `az://` or `http(s)://` URL.

    Credentials, endpoint and region of a bucket come from the usual environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, …) and are never logged.
    """
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        return BucketStore(text)
    return FolderStore(Path(text.removeprefix("file://")))


class FolderStore:
    """A local folder. A file appears under its name only when it is whole."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise StoreError(f"{self.folder / name}: {error.strerror}") from error

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise StoreError(f"{self.folder / name}: {error.strerror}") from error

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"{path}: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()


class BucketStore:
    """An object store. Writes are multipart where they are large, so an object is whole or absent."""

    remote = True

    def __init__(self, url: str) -> None:
        self.url = url
        options: dict[str, bool] = {}
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        if url.startswith("http://") or (url.startswith("s3://") and endpoint.startswith("http://")):
            options["allow_http"] = True
        try:
            self._store: ObjectStore = from_url(url, client_options=options)  # type: ignore[call-overload]
        except (BaseError, ValueError) as error:
            raise StoreError(
                f"{url}: {error}", "is the URL s3://bucket/prefix, and are the credentials set?"
            ) from error

    def read(self, name: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}/{name}: {_first_line(error)}") from error

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, name, start=offset, length=length))
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}/{name}: {_first_line(error)}") from error

    def write(self, name: str, data: bytes) -> None:
        try:
            obstore.put(self._store, name, data)
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}/{name}: {_first_line(error)}") from error

    def exists(self, name: str) -> bool:
        try:
            obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}/{name}: {_first_line(error)}") from error
        return True


def _first_line(error: BaseException) -> str:
    """obstore appends a debug dump of the whole error chain; the first line says what happened."""
    return str(error).split("\n", 1)[0]
