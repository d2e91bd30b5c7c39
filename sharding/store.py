"""Where bytes live: a local folder or an object store, behind the same few verbs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from sharding.errors import MissingError, StoreError


class Reader(Protocol):
    """Names are relative, with forward slashes. Every verb raises StoreError, with the name, when bytes do not come.

    Of a range only what lies within the object is read, so that a shard cut short fails its checksum.
    """

    url: str
    remote: bool

    def read(self, name: str) -> bytes: ...
    def read_range(self, name: str, offset: int, length: int) -> bytes: ...


class Store(Reader, Protocol):
    """A `Reader` that can be written to."""

    def write(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self) -> Iterator[str]: ...
    def delete(self, name: str) -> None: ...


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
        except FileNotFoundError as error:
            raise MissingError(f"{self.folder / name}: {error.strerror}") from error
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

    def names(self) -> Iterator[str]:
        return (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class BucketStore:
    """An object store. Writes are multipart where they are large, so an object is whole or absent."""

    remote = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options: dict[str, bool] = {}
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        if url.startswith("http://") or (url.startswith("s3://") and endpoint.startswith("http://")):
            options["allow_http"] = True
        try:
            self._store: ObjectStore = from_url(url, client_options=options)  # type: ignore[call-overload]
        except (BaseError, ValueError) as error:
            raise StoreError(f"{url}: {_first_line(error)}", "a bucket's URL is s3://bucket/prefix") from error

    def read(self, name: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except (BaseError, OSError) as error:
            raise self._explain(name, error) from error

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, name, start=offset, length=length))
        except (BaseError, OSError) as error:
            if "416 Range Not Satisfiable" in str(error):
                return b""  # beyond the end, as of a file; checksums tell
            raise self._explain(name, error) from error

    def write(self, name: str, data: bytes) -> None:
        try:
            obstore.put(self._store, name, data)
        except (BaseError, OSError) as error:
            raise self._explain(name, error) from error

    def exists(self, name: str) -> bool:
        try:
            obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise self._explain(name, error) from error
        return True

    def names(self) -> Iterator[str]:
        try:
            for batch in obstore.list(self._store):
                yield from (entry["path"] for entry in batch)
        except (BaseError, OSError) as error:
            raise self._explain("", error) from error

    def delete(self, name: str) -> None:
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise self._explain(name, error) from error

    def _explain(self, name: str, error: BaseException) -> StoreError:
        where = f"{self.url}/{name}"
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{where}: there is no such object")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or ASKED_FOR_CREDENTIALS in str(error):
            hint = "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud, set and right for it?"
            return StoreError(f"{where}: access denied", hint)
        return StoreError(f"{where}: {_first_line(error)}")


ASKED_FOR_CREDENTIALS = "169.254.169.254"  # where a client without any looks for those of its machine


def _first_line(error: BaseException) -> str:
    """obstore appends the server's XML and a debug dump of the whole error chain; before them stands what happened."""
    return str(error).split("\n", 1)[0].split(": <?xml", 1)[0]
