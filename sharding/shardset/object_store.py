"""Read and write an object store with the methods of `store.Store`, and retry the faults of its server."""

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

PATIENCE_SEC = 90.0  # how long failed requests are retried
READ_SHARE = 1 / 3  # of the patience: time limit of a response, so that a lost one is requested twice more
WRITE_SHARE = 1 / 2  # likewise for the upload of a part, which is then sent once more
QUIET_SHARE = 1 / 18  # of the patience: obstore's own retries, of a part alone, before the failure is reported
CONNECT_SEC = 10.0
BODY_SEC = 3600.0  # for a body that keeps coming: obstore's 30 s would cut off a 64 MB shard on a line of 2 MB/s
TRIES, PAUSE_SEC = 6, 0.5  # if a response broke off
COALESCE_BYTES = 2**17  # ranges with smaller gaps are read as one: a gap takes as long as a request
PART_BYTES = 5 * 2**20  # smallest part of S3: 8 workers with one part each within those 45 s need 0.9 MB/s

NO_BUCKET = "<Code>NoSuchBucket</Code>"  # obstore passes on a server's answer only as text
NO_CREDENTIALS = "169.254.169.254"  # a client without credentials requests those of its machine there
LEFT_TO_LIFECYCLE = "unfinished uploads are left to the bucket's lifecycle rule"

Result = TypeVar("Result")
Range = tuple[int, int]  # of an object: offset, length
Content = bytes | Iterable[bytes]  # of an object: at once, or part by part as it is generated
ETag = dict[str, str]  # identifies a version of an object


@dataclass(frozen=True, slots=True)
class VersionedObject:
    """Hold an object, and the tag that is needed to replace exactly this version of it."""

    data: bytes
    tag: ETag
    modified: datetime  # by the server's clock


class _Outage:
    """Track since when all requests of this process to a store have failed. Threads may race on it without harm."""

    def __init__(self, patience_sec: float) -> None:
        self._patience_sec = patience_sec
        self._began: float | None = None
        self._last_seen = self._last_failure = self._last_logged = -math.inf
        self.error: BaseException = GenericError()

    def begin(self, since: float) -> None:
        self._began = since if self._began is None else min(self._began, since)
        self._last_seen = time.monotonic()

    def end(self) -> None:
        self._began = None

    def record_failure(self, error: BaseException, tried: float) -> bool:
        """Record the failure of a request sent at `tried`. Return whether to log it."""
        now, began = time.monotonic(), self._began
        if began is None or self._last_seen < now - self._patience_sec:  # no request was sent in between
            began = tried
        self._began, self._last_seen, self._last_failure, self.error = began, now, now, error
        is_new = self._last_logged < min(began, now - self._patience_sec)  # one line for each outage, and not too many
        if is_new:
            self._last_logged = now
        return is_new

    def is_given_up(self, requested: float) -> bool:
        """Return whether a request has failed since `requested`, and all of them for the whole patience."""
        began = self._began
        return began is not None and self._last_failure > requested and time.monotonic() >= began + self._patience_sec


class BucketStore:
    """Read and write an object store. A large object is uploaded in parts, and has its name only when complete.

    Failed requests are retried for `patience_sec`, a limit shared by all requests while none of them is answered.
    """

    remote = True

    def __init__(self, url: str, patience_sec: float = PATIENCE_SEC) -> None:
        self.url = url.rstrip("/")
        self.retries = 0  # on top of obstore's own
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
            result = obstore.get(self._store, name)
            if limit is not None and result.meta["size"] > limit:
                raise size_error(f"{self.url}/{name}", result.meta["size"], limit)
            return bytes(result.bytes())

        return self._retry(name, get)

    def read_ranges(self, name: str, ranges: Sequence[Range], requested: float | None = None) -> list[bytes]:
        """Read byte ranges of an object: neighbouring ones with one request, others in parallel.

        `requested` is the `time.monotonic()` at which they were first needed, if earlier than now: if the store was
        given up since then, they are not tried again.
        """
        check_name(self.url, name)
        starts, lengths = (list(column) for column in zip(*ranges, strict=True))

        def read() -> list[bytes]:
            try:
                parts = obstore.get_ranges(self._store, name, starts=starts, lengths=lengths, coalesce=COALESCE_BYTES)
                return [bytes(part) for part in parts]
            except GenericError as error:
                if "416 Range Not Satisfiable" in str(error):
                    return [b""] * len(starts)  # beyond the end, as for a file; the checksum differs then
                raise

        return self._retry(name, read, requested)

    def write(self, name: str, data: Content) -> None:
        check_name(self.url, name)
        whole = data if isinstance(data, bytes) else b"".join(data)
        if len(whole) <= PART_BYTES:
            self._retry(name, lambda: obstore.put(self._writer, name, whole))
            return
        last_taken = -math.inf

        def parts() -> Iterator[bytes]:
            """Yield the parts in upload order: each is taken when the previous one is uploaded."""
            nonlocal last_taken
            for start in range(0, len(whole), PART_BYTES):
                last_taken = time.monotonic()
                yield whole[start : start + PART_BYTES]

        # One part at a time: the workers of a build already share the bandwidth, and each part has the same time limit
        self._retry(
            name,
            lambda: obstore.put(self._writer, name, parts(), chunk_size=PART_BYTES, max_concurrency=1),
            last_progress=lambda: last_taken,
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
        """Return the size in bytes of each of the named objects that exists: one listing, 1000 objects per request."""
        sizes = self._list()
        return {name: sizes[name] for name in names if name in sizes}

    def _list(self) -> dict[str, int]:
        objects = self._retry("", lambda: obstore.list(self._store).collect())
        return {meta["path"]: meta["size"] for meta in objects}

    def delete(self, name: str) -> None:
        check_name(self.url, name)
        try:
            self._retry(name, lambda: obstore.delete(self._store, name))
        except MissingError:
            return

    def clear(self) -> None:
        """Delete all objects, 1000 per request."""
        with suppress(MissingError):
            self._retry("", lambda: obstore.delete(self._store, list(self.names())))

    def get_versioned(self, name: str) -> VersionedObject | None:
        """Return an object with its version, or None if it does not exist."""

        def get() -> VersionedObject:
            result = obstore.get(self._store, name)
            return VersionedObject(bytes(result.bytes()), _tag_of(result.meta), result.meta["last_modified"])

        try:
            return self._retry(name, get)
        except MissingError:
            return None

    def put_if_match(self, name: str, data: bytes, tag: ETag | None) -> ETag | None:
        """Write only if the object's ETag is `tag` (None: if it does not exist). Return the new ETag.

        Returns None if the condition fails, which a lost response may also cause: `get_versioned` resolves that. Raises
        NotImplementedError if the server reports that it does not support conditional writes.
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

        Returns their number. Only for the single build that writes there: uploads of others would be aborted, too. A
        bucket without a prefix is left alone, as others may use it.
        """
        bucket, prefix = urlsplit(self.url).netloc, urlsplit(self.url).path.strip("/")
        if not self.url.startswith("s3://") or not prefix:
            return 0
        try:
            import boto3  # an optional extra: obstore cannot list uploads
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            print(f"{self.url}: without boto3 {LEFT_TO_LIFECYCLE}", file=sys.stderr)
            return 0
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        try:
            silence_sec = PATIENCE_SEC * READ_SHARE
            config = Config(s3={"addressing_style": "path"}, connect_timeout=CONNECT_SEC, read_timeout=silence_sec)
            storage = boto3.session.Session(region_name=region).resource("s3", config=config)
            uploads = list(storage.Bucket(bucket).multipart_uploads.filter(Prefix=f"{prefix}/"))
            for upload in uploads:
                upload.abort()
            return len(uploads)
        except (BotoCoreError, ClientError) as error:  # the credentials may lack only this permission
            print(f"{self.url}: {_first_line(error)}; {LEFT_TO_LIFECYCLE}", file=sys.stderr)
            return 0

    def failed_elsewhere(self, since: float) -> None:
        """Record that, according to another process, this store has not answered since the time `since`."""
        self._outage.begin(since)

    def _retry(
        self,
        name: str,
        act: Callable[[], Result],
        requested: float | None = None,
        last_progress: Callable[[], float] = lambda: -math.inf,
    ) -> Result:
        """Retry `act` until the outage has lasted `patience_sec`, or responses have broken off TRIES times.

        obstore retries for a while by itself, but not always if a response breaks off midway. `last_progress()` is the
        `time.monotonic()` at which a part of the request last went through.
        """
        begun = time.monotonic()
        broken = 0
        while True:
            if self._outage.is_given_up(begun if requested is None else requested):
                raise self._explain(name, self._outage.error) from self._outage.error
            tried = time.monotonic()
            try:
                result = act()
            except (BaseError, OSError) as error:
                explained = self._explain(name, error)
                if not isinstance(error, GenericError) or NO_BUCKET in str(error):
                    self._outage.end()  # the server has answered, and a retry would not change that
                    raise explained from error
                broken += last_progress() > tried or time.monotonic() - tried < self._patience_sec * QUIET_SHARE
                if last_progress() > tried:
                    self._outage.end()
                    begun = tried = last_progress()
                if self._outage.record_failure(error, tried):
                    log.warning("%s; retrying for up to %g s", explained.message, self._patience_sec)
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
            return UnreachableError(f"{where}: there is no such bucket", "are its name and the server's URL right?")
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{where}: there is no such object")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or NO_CREDENTIALS in str(error):
            hint = "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or your cloud's credentials, set and valid for it?"
            return UnreachableError(f"{where}: access denied", hint)
        return UnreachableError(f"{where}: {_first_line(error)}", "is the server up and reachable, and its URL right?")


def size_error(where: str, size: int, limit: int) -> StoreError:
    return StoreError(f"{where}: has {size:,} bytes, at most {limit:,} are expected", "is it the wrong file?")


def _connect(url: str, silence_sec: float, repeat_sec: float) -> ObjectStore:
    """Open a store. `silence_sec` limits a whole request and each gap in a response; `repeat_sec` obstore's retries."""
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
    retries = {  # limited by time, not by number
        "max_retries": 1_000, "retry_timeout": timedelta(seconds=repeat_sec), "backoff": backoff,
    }  # fmt: skip
    return from_url(url, client_options=options, retry_config=retries)  # type: ignore[call-overload, no-any-return]


def _tag_of(meta: Mapping[str, Any]) -> ETag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key]}


def _first_line(error: BaseException) -> str:
    """Return what happened, without the server's XML and the dump of the error chain that obstore appends."""
    return str(error).split("\n", 1)[0].split(": <?xml", 1)[0]
