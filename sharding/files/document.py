"""Read documents that others may have written, within limits of size, depth and type.

A reader gives the expected type, and pydantic reports how a document differs from it. Reading takes memory in
proportion to the file, so that a small file cannot fill the memory of a machine.
"""

import codecs
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import zstandard
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

SMALL_BYTES = 2**24  # limit for a document that does not grow with a shard set, such as a scorecard
LARGE_BYTES = 2**32  # limit for one that does
LINE_BYTES = 2**22  # limit for a row: the label of a recording of ten hours fits
MAX_UNPACKING = 100  # ratio to the packed size: our files reach 10, a list of refusals 80
UNPACKED_FREELY = 2**20  # bytes, allowed at any ratio
BRACKETS_FREELY, BYTES_OF_BRACKET = 1_000, 16  # an empty list takes 3 bytes of a document, and 64 of memory
PIECE_BYTES = 2**10  # read at once from a frame, as they may unpack to 32 MB
MAX_FAULTS = 100

STRICT = ConfigDict(extra="forbid")  # for our own files: an unknown field may mean anything

Count = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
Size = Annotated[int, Field(strict=True, ge=0, le=2**40)]  # bytes, samples or steps
Hash = Annotated[int, Field(strict=True, ge=0, le=2**64 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Second = Annotated[float, Field(strict=True, ge=0, le=10**9)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]

LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # left of an emoji by programs that cut UTF-16 text
Document = TypeVar("Document")


class DocumentError(ValueError):
    """Describe what is wrong with a document; its reader adds the location and a hint."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, which names the kind, if it is a folder, a pipe or a device."""
    mode = os.stat(path).st_mode  # before it is opened: opening a pipe blocks forever
    if stat.S_ISREG(mode):
        return open(path, "rb")
    kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
    raise OSError(errno.EINVAL, f"is a {kind}, not a file", str(path))


def read_document(path: Path, limit: int = SMALL_BYTES) -> bytes:
    """Read a whole file. Raises OSError if it cannot be read, DocumentError if it has more than `limit` bytes."""
    with open_regular(path) as file:
        fits = os.fstat(file.fileno()).st_size <= limit  # else it may be a sparse file of any size
        data = file.read(limit + 1) if fits else b""
    if not fits or len(data) > limit:
        raise DocumentError(f"it has more than {limit:,} bytes")
    return data


def parse_json(data: bytes, finite: bool = True) -> Any:
    """Parse one JSON value, without NaN or infinite literals if `finite`. Raises DocumentError if it is invalid."""
    if data.count(b"[") + data.count(b"{") > BRACKETS_FREELY + len(data) // BYTES_OF_BRACKET:
        raise DocumentError("it has too many brackets")
    try:
        return from_json(data, allow_inf_nan=not finite)
    except ValueError as error:
        raise DocumentError(f"not JSON: {error}") from error


def parse_row(data: bytes) -> dict[str, Any]:
    """Parse one JSON object of another program: NaN and lone surrogates are allowed.

    Raises DocumentError if it is invalid, is not an object, or has a key twice.
    """
    data = data.removeprefix(codecs.BOM_UTF8)  # Windows tools start a file with it
    try:
        row = parse_json(data, finite=False)
    except DocumentError as error:
        if not LONE_SURROGATE.search(data):
            raise
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            raise error from None
    if not isinstance(row, dict):
        raise DocumentError(f"a JSON object is expected, found {type(row).__name__}")
    if data.count(b":") > len(row):  # else it is flat, and its keys are distinct
        json.loads(data, object_pairs_hook=_check_unique)
    return row


def parse(data: bytes, schema: TypeAdapter[Document]) -> Document:
    """Parse one JSON value as a type. Raises DocumentError, which names the first field that does not fit."""
    return validate(parse_json(data), schema)


def validate(value: Any, schema: TypeAdapter[Document]) -> Document:
    """Return a parsed document as a type. Raises DocumentError, which names the first field that does not fit."""
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        raise DocumentError(_explain(error)) from error


def unpack(data: bytes, max_ratio: int = MAX_UNPACKING) -> bytes:
    """Unpack a zstandard frame. Raises DocumentError if it is damaged or too large, or does not state its size."""
    try:
        size = zstandard.frame_content_size(data)
        if size < 0 or size > max_unpacked(len(data), max_ratio):
            problem = "does not state its unpacked size" if size < 0 else f"unpacks to {size:,} bytes, too many"
            raise DocumentError(f"its frame of {len(data):,} bytes {problem}")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise DocumentError(str(error)) from error


def unpack_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a zstandard frame while unpacking it. Raises DocumentError if it is damaged or truncated."""
    unpacker, line, packed, unpacked = zstandard.ZstdDecompressor().decompressobj(), list[bytes](), 0, 0
    try:
        while piece := file.read(PIECE_BYTES):
            chunk = unpacker.decompress(piece)
            packed, unpacked = packed + len(piece), unpacked + len(chunk)
            if unpacked > max_unpacked(packed):
                raise DocumentError(f"its first {packed:,} bytes unpack to more than {max_unpacked(packed):,}")
            line.append(chunk)
            if b"\n" in chunk:  # joined once per line, so that a long line takes linear time
                *lines, rest = b"".join(line).split(b"\n")
                line = [rest]
                yield from lines
    except zstandard.ZstdError as error:
        raise DocumentError(str(error)) from error
    if any(line) or not unpacker.eof:
        raise DocumentError("it is truncated")


def max_unpacked(packed: int, max_ratio: int = MAX_UNPACKING) -> int:
    """Return how many bytes `packed` bytes may unpack to."""
    return max(UNPACKED_FREELY, max_ratio * packed)


def _check_unique(pairs: Sequence[tuple[str, Any]]) -> None:
    keys = set[str]()
    for key, _ in pairs:
        if key in keys:
            raise DocumentError(f"{key!a:.100} occurs twice")
        keys.add(key)


def _explain(error: ValidationError) -> str:
    if error.error_count() > MAX_FAULTS:
        return f"it has {error.error_count():,} faults: it is the wrong kind of document"
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] in ("missing", "unexpected_keyword_argument", "extra_forbidden"):
        return f"{where!a:.100} is {'missing' if first['type'] == 'missing' else 'unknown'}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where!a:.100} is {first['input']!a:.100}: {message[0].lower()}{message[1:]}" if where else message
