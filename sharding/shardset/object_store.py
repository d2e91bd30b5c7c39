"""An object store behind the verbs of `store.py`, under the faults that such a server has."""

import logging
import math
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

from sharding.errors import MissingError, StoreError, UnreachableError
from sharding.files.names import check_name

log = logging.getLogger("streamtrain")

PATIENCE_SEC = 90.0  # for which what fails is repeated
READ_SHARE = 1 / 3  # of it: as long may an answer take, so that one which never comes is asked for twice more
WRITE_SHARE = 1 / 2  # likewise, with a part on its way up: once more
QUIET_SHARE = 1 / 18  # of it: as long obstore repeats what fails by itself, a part alone, before it is told
CONNECT_SEC = 10.0
BODY_SEC = 3600.0  # for a body that keeps coming: obstore's 30 s would cut off a 64 MB shard on a line of 2 MB/s
TRIES, PAUSE_SEC = 6, 0.5  # where an answer broke off
COALESCE_BYTES = 2**17  # two ranges no further apart are read as one: as long as a request takes
PART_BYTES = 5 * 2**20  # the smallest that S3 takes: within those 45 s, 8 workers need 0.9 MB/s for one each

NO_BUCKET = "<Code>NoSuchBucket</Code>"  # obstore hands on what a server answers as text alone
NO_CREDENTIALS = "169.254.169.254"  # where a client without any looks for those of its machine
LEFT_TO_LIFECYCLE = "unfinished uploads are left to the bucket's lifecycle rule"

Result = TypeVar("Result")
Range = tuple[int, int]  # of an object: offset, length
Content = bytes | Iterable[bytes]  # of an object: at once, or part by part as it is made
ETag = dict[str, str]  # what tells one version of an object from another


@dataclass(frozen=True, slots=True)
class VersionedObject:
    """An object, and what is needed to replace that very version of it."""

    data: bytes
    tag: ETag
    modified: datetime  # by the server's clock


class _Outage:
    """Since when all that this process has asked a store for has failed. Threads may race for it: nothing is lost."""

    def __init__(self, patience_sec: float) -> None:
        self._patience_sec = patience_sec
        self._began: float | None = None
        self._lasted = self._failed = self._told = -math.inf  # times: it lasted until then; of a failure; of a line
        self.error: BaseException = GenericError()

    def begin(self, since: float) -> None:
        self._began = since if self._began is None else min(self._began, since)
        self._lasted = time.monotonic()

    def end(self) -> None:
        self._began = None

    def note(self, error: BaseException, tried: float) -> bool:
        """Note that what was tried then has failed; returns whether that is worth a line."""
        now, began = time.monotonic(), self._began
        if began is None or self._lasted < now - self._patience_sec:  # nothing was asked for in between
            began = tried
        self._began, self._lasted, self._failed, self.error = began, now, now, error
        news = self._told < min(began, now - self._patience_sec)  # a line for each outage, and not too many
        if news:
            self._told = now
        return news

    def is_given_up(self, asked: float) -> bool:
        """Tell whether a request has failed since then, and all of them for as long as there is patience."""
        began = self._began
        return began is not None and self._failed > asked and time.monotonic() >= began + self._patience_sec


class NoBucketError(UnreachableError):
    """A bucket that its server does not have."""


class BucketStore:
    """An object store. What is large goes up in parts, and appears under its name only when it is whole.

    What fails is repeated for `patience_sec`, of which all requests share one count while none of them is answered.
    """

    remote = True

    def __init__(self, url: str, patience_sec: float = PATIENCE_SEC) -> None:
        self.url = url.rstrip("/")
        self.retries = 0  # after what obstore itself repeats
        self._patience_sec = patience_sec
        self._outage = _Outage(patience_sec)
        try:
            self._store, self._writer = (
                _connect(url, patience_sec * share, patience_sec * QUIET_SHARE) for share in (READ_SHARE, WRITE_SHARE)
            )
        except (BaseError, ValueError) as error:
            raise StoreError(f"{url}: {_first_line(error)}", "a bucket's URL is s3://bucket/prefix") from error

    def read(self, name: str, limit: int | None = None) -> bytes:
        check_name(self.url, name)

        def get() -> bytes:
            found = obstore.get(self._store, name)
            if limit is not None and found.meta["size"] > limit:
                raise size_error(f"{self.url}/{name}", found.meta["size"], limit)
            return bytes(found.bytes())

        return self._retry(name, get)

    def read_ranges(self, name: str, ranges: Sequence[Range], asked: float | None = None) -> list[bytes]:
        """Ranges with little between them come with one request, the others in parallel.

        `asked` is when they were wanted, by `time.monotonic()`, if that was before now: what has been given up since
        then is not tried again.
        """
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

        return self._retry(name, read, asked)

    def write(self, name: str, data: Content) -> None:
        check_name(self.url, name)
        whole = data if isinstance(data, bytes) else b"".join(data)
        if len(whole) <= PART_BYTES:
            self._retry(name, lambda: obstore.put(self._writer, name, whole))
            return
        parts = _Parts(whole)
        # One part at a time: the workers of a build share the line as it is, and each part has the same time
        self._retry(
            name,
            lambda: obstore.put(self._writer, name, iter(parts), chunk_size=PART_BYTES, max_concurrency=1),
            moved=lambda: parts.moved,
        )

    def exists(self, name: str) -> bool:
        check_name(self.url, name)
        try:
            self._retry(name, lambda: obstore.head(self._store, name))
        except MissingError:
            return False
        return True

    def names(self) -> Iterator[str]:
        return iter(self._list())

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The bytes of each object that is there, of those named: one listing, a thousand objects with each request."""
        found = self._list()
        return {name: found[name] for name in names if name in found}

    def _list(self) -> dict[str, int]:
        listed = self._retry("", lambda: obstore.list(self._store).collect())
        return {entry["path"]: entry["size"] for entry in listed}

    def delete(self, name: str) -> None:
        check_name(self.url, name)
        try:
            self._retry(name, lambda: obstore.delete(self._store, name))
        except MissingError:
            return

    def clear(self) -> None:
        """Delete all that is there, a thousand objects with each request."""
        with suppress(MissingError):
            self._retry("", lambda: obstore.delete(self._store, list(self.names())))

    def get_versioned(self, name: str) -> VersionedObject | None:
        """An object with its version, or None where there is none."""

        def get() -> VersionedObject:
            result = obstore.get(self._store, name)
            return VersionedObject(bytes(result.bytes()), _tag_of(result.meta), result.meta["last_modified"])

        try:
            return self._retry(name, get)
        except MissingError:
            return None

    def put_if_match(self, name: str, data: bytes, tag: ETag | None) -> ETag | None:
        """Write where the object still has that tag or, with None, where there is none; the new tag.

        None where that is not so, which an answer lost on the way may also cause: `look` tells. Raises
        NotImplementedError where the server knows no such condition and says so.
        """
        mode: Any = tag or "create"
        try:
            return _tag_of(self._retry(name, lambda: obstore.put(self._writer, name, data, mode=mode)))
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
        config = Config(
            s3={"addressing_style": "path"},
            connect_timeout=CONNECT_SEC,
            read_timeout=PATIENCE_SEC * READ_SHARE,
            retries={"mode": "standard", "total_max_attempts": 3},
        )
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

    def failed_elsewhere(self, since: float) -> None:
        """Count the time since then as one in which this store has not answered, as another process has found."""
        self._outage.begin(since)

    def _retry(
        self,
        name: str,
        act: Callable[[], Result],
        asked: float | None = None,
        moved: Callable[[], float] = lambda: -math.inf,
    ) -> Result:
        """Repeat what fails until the outage has lasted for long enough, or answers break off once too often.

        obstore repeats for a while by itself, but not always where an answer breaks off midway. `moved()` is when a
        part of what is asked for last went through, by `time.monotonic()`.
        """
        begun = time.monotonic()
        broken = 0
        while True:
            if self._outage.is_given_up(begun if asked is None else asked):
                raise self._explain(name, self._outage.error) from self._outage.error
            tried = time.monotonic()
            try:
                result = act()
            except (BaseError, OSError) as error:
                explained = self._explain(name, error)
                if not isinstance(error, GenericError) or isinstance(explained, NoBucketError):
                    self._outage.end()  # the server has answered, and will not otherwise
                    raise explained from error
                broken += moved() > tried or time.monotonic() - tried < self._patience_sec * QUIET_SHARE
                if moved() > tried:
                    self._outage.end()
                    begun = tried = moved()
                if self._outage.note(error, tried):
                    log.warning("%s; asked again for up to %g s", explained.message, self._patience_sec)
                over = time.monotonic() >= begun + self._patience_sec or self._outage.is_given_up(tried)
                if over or broken == TRIES:
                    raise explained from error
                self.retries += 1
                time.sleep(PAUSE_SEC)
            else:
                self._outage.end()
                return result

    def _explain(self, name: str, error: BaseException) -> StoreError:
        where = f"{self.url}/{name}"
        if NO_BUCKET in str(error):
            hint = "is its name right, and the server the one meant?"
            return NoBucketError(f"{where}: there is no such bucket", hint)
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{where}: there is no such object")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or NO_CREDENTIALS in str(error):
            hint = "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud, set and right for it?"
            return UnreachableError(f"{where}: access denied", hint)
        return UnreachableError(f"{where}: {_first_line(error)}", "is the server up and in reach, and its URL right?")


class _Parts:
    """An object part by part, in the order in which they go up: one is taken when the one before it has."""

    def __init__(self, whole: bytes) -> None:
        self._whole = whole
        self.moved = -math.inf  # when the last one was taken

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._whole), PART_BYTES):
            self.moved = time.monotonic()
            yield self._whole[start : start + PART_BYTES]


def size_error(where: str, size: int, limit: int) -> StoreError:
    return StoreError(f"{where}: has {size:,} bytes, at most {limit:,} are expected", "is it another file?")


def _connect(url: str, silence_sec: float, repeat_sec: float) -> ObjectStore:
    """Open a store whose requests may wait for so long: of a request all, of a response each silence."""
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=CONNECT_SEC),
        "read_timeout": timedelta(seconds=silence_sec),
        "timeout": timedelta(seconds=BODY_SEC),
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if url.startswith("http://") or (url.startswith("s3://") and endpoint.startswith("http://")):
        options["allow_http"] = True
    first, longest = min(0.1, repeat_sec / 50), min(15.0, repeat_sec / 4)
    backoff = {"init_backoff": timedelta(seconds=first), "max_backoff": timedelta(seconds=longest), "base": 2}
    retries = {  # time is the limit, not their number
        "max_retries": 1_000, "retry_timeout": timedelta(seconds=repeat_sec), "backoff": backoff,
    }  # fmt: skip
    return from_url(url, client_options=options, retry_config=retries)  # type: ignore[call-overload, no-any-return]


def _tag_of(meta: Mapping[str, Any]) -> ETag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key]}


def _first_line(error: BaseException) -> str:
    """obstore appends the server's XML and a debug dump of the whole error chain; before them stands what happened."""
    return str(error).split("\n", 1)[0].split(": <?xml", 1)[0]
