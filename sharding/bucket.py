"""An object store behind the verbs of `store.py`, under the faults that such a server has."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from sharding.errors import MissingError, StoreError
from sharding.names import check_name

PATIENCE_SEC = 90.0  # for which what fails is repeated
SILENCE_SHARE = 2 / 3  # of it: as long may an answer take, so that one which never comes is asked for once more
CONNECT_SEC = 10.0
BODY_SEC = 3600.0  # for a body that keeps coming: obstore's 30 s would cut off a 64 MB shard on a line of 2 MB/s
TRIES, PAUSE_SEC = 6, 0.5  # where an answer broke off
COALESCE_BYTES = 2**17  # two ranges no further apart are read as one: as long as a request takes
PART_BYTES = 5 * 2**20  # the smallest that S3 takes: within those 60 s, 8 workers need 0.7 MB/s for one each

ASKED_FOR_CREDENTIALS = "169.254.169.254"  # where a client without any looks for those of its machine
LEFT_TO_LIFECYCLE = "unfinished uploads are left to the bucket's lifecycle rule"

Result = TypeVar("Result")
Range = tuple[int, int]  # of an object: offset, length
Content = bytes | Iterable[bytes]  # of an object: at once, or part by part as it is made
Tag = dict[str, str]  # what tells one version of an object from another


@dataclass(frozen=True, slots=True)
class Found:
    """An object, and what is needed to replace that very version of it."""

    data: bytes
    tag: Tag
    modified: datetime  # by the server's clock


class BucketStore:
    """An object store. What is large goes up in parts, and appears under its name only when it is whole.

    What fails is repeated for `patience_sec`. A server that is away is told after that time, one that takes requests
    and never answers after 4/3 of it.
    """

    remote = True

    def __init__(self, url: str, patience_sec: float = PATIENCE_SEC) -> None:
        self.url = url.rstrip("/")
        self.retries = 0  # after what obstore itself repeats
        self._patience_sec = patience_sec
        patience = timedelta(seconds=patience_sec)
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=CONNECT_SEC),
            "read_timeout": patience * SILENCE_SHARE,  # of a request all, of a response each silence
            "timeout": timedelta(seconds=BODY_SEC),
        }
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        if url.startswith("http://") or (url.startswith("s3://") and endpoint.startswith("http://")):
            options["allow_http"] = True
        retries = {"max_retries": 1_000, "retry_timeout": patience}  # time is the limit, not their number
        try:
            self._store: ObjectStore = from_url(url, client_options=options, retry_config=retries)  # type: ignore[call-overload]
        except (BaseError, ValueError) as error:
            raise StoreError(f"{url}: {_first_line(error)}", "a bucket's URL is s3://bucket/prefix") from error

    def read(self, name: str, limit: int | None = None) -> bytes:
        check_name(self.url, name)

        def get() -> bytes:
            found = obstore.get(self._store, name)
            if limit is not None and found.meta["size"] > limit:
                raise too_large(f"{self.url}/{name}", found.meta["size"], limit)
            return bytes(found.bytes())

        return self._insist(name, get)

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Ranges with little between them come with one request, the others in parallel."""
        check_name(self.url, name)
        starts, lengths = (list(column) for column in zip(*ranges, strict=True))

        def read() -> list[bytes]:
            try:
                found = obstore.get_ranges(self._store, name, starts=starts, lengths=lengths, coalesce=COALESCE_BYTES)
                return [bytes(data) for data in found]
            except GenericError as error:
                if "416 Range Not Satisfiable" in str(error):
                    return [b""] * len(starts)  # beyond the end, as of a file; checksums tell
                raise

        return self._insist(name, read)

    def write(self, name: str, data: Content) -> None:
        check_name(self.url, name)
        whole = data if isinstance(data, bytes) else b"".join(data)
        # One part at a time: the workers of a build share the line as it is, and each part has the same time
        self._insist(name, lambda: obstore.put(self._store, name, whole, chunk_size=PART_BYTES, max_concurrency=1))

    def exists(self, name: str) -> bool:
        check_name(self.url, name)
        try:
            self._insist(name, lambda: obstore.head(self._store, name))
        except MissingError:
            return False
        return True

    def names(self) -> Iterator[str]:
        return iter([entry["path"] for entry in self._insist("", lambda: obstore.list(self._store).collect())])

    def delete(self, name: str) -> None:
        check_name(self.url, name)
        try:
            self._insist(name, lambda: obstore.delete(self._store, name))
        except MissingError:
            return

    def clear(self) -> None:
        """Delete all that is there, a thousand objects with each request."""
        with suppress(MissingError):
            self._insist("", lambda: obstore.delete(self._store, list(self.names())))

    def look(self, name: str) -> Found | None:
        """An object with its version, or None where there is none."""

        def get() -> Found:
            result = obstore.get(self._store, name)
            return Found(bytes(result.bytes()), _tag_of(result.meta), result.meta["last_modified"])

        try:
            return self._insist(name, get)
        except MissingError:
            return None

    def write_if(self, name: str, data: bytes, tag: Tag | None) -> Tag | None:
        """Write where the object still has that tag or, with None, where there is none; the new tag.

        None where that is not so, which an answer lost on the way may also cause: `look` tells. Raises
        NotImplementedError where the server knows no such condition and says so.
        """
        mode: Any = tag or "create"
        try:
            return _tag_of(self._insist(name, lambda: obstore.put(self._store, name, data, mode=mode)))
        except StoreError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                return None
            if "501 Not Implemented" in error.message:
                raise NotImplementedError from error
            raise

    def abort_stale_uploads(self) -> int:
        """Abort the unfinished multipart uploads under the prefix, which a killed build leaves and the owner pays for.

        Returns how many there were. Only for the one who builds there: it would also end another's uploads. A bucket
        without a prefix is left alone, as others may use it.
        """
        bucket, prefix = urlsplit(self.url).netloc, urlsplit(self.url).path.strip("/")
        if not self.url.startswith("s3://") or not prefix:
            return 0
        try:
            import boto3  # an extra: obstore cannot list uploads
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            print(f"{self.url}: without boto3 {LEFT_TO_LIFECYCLE}", file=sys.stderr)
            return 0
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        config = Config(s3={"addressing_style": "path"}, connect_timeout=CONNECT_SEC, retries={"mode": "standard"})
        aborted = 0
        try:
            client = boto3.session.Session(region_name=region).client("s3", config=config)
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{prefix}/")
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                aborted += 1
        except (BotoCoreError, ClientError) as error:  # the keys may lack just this permission
            print(f"{self.url}: {_first_line(error)}; {LEFT_TO_LIFECYCLE}", file=sys.stderr)
        return aborted

    def _insist(self, name: str, act: Callable[[], Result]) -> Result:
        """obstore repeats what fails, but not always where an answer breaks off midway; then all is begun anew."""
        give_up = time.monotonic() + self._patience_sec
        for left in reversed(range(TRIES)):
            try:
                return act()
            except (BaseError, OSError) as error:
                if not (left and isinstance(error, GenericError) and time.monotonic() < give_up):
                    raise self._explain(name, error) from error
                self.retries += 1
                time.sleep(PAUSE_SEC)
        raise AssertionError("unreachable")

    def _explain(self, name: str, error: BaseException) -> StoreError:
        where = f"{self.url}/{name}"
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{where}: there is no such object")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or ASKED_FOR_CREDENTIALS in str(error):
            hint = "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud, set and right for it?"
            return StoreError(f"{where}: access denied", hint)
        return StoreError(f"{where}: {_first_line(error)}", "is the server up and in reach, and its URL right?")


def too_large(where: str, size: int, limit: int) -> StoreError:
    return StoreError(f"{where}: has {size:,} bytes, at most {limit:,} are expected", "is it another file?")


def _tag_of(meta: Mapping[str, Any]) -> Tag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key]}


def _first_line(error: BaseException) -> str:
    """obstore appends the server's XML and a debug dump of the whole error chain; before them stands what happened."""
    return str(error).split("\n", 1)[0].split(": <?xml", 1)[0]
