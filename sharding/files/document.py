"""Read documents that others may have written: none is larger, deeper or other than its reader expects.

A reader says as a type what it wants, and pydantic where a document differs from it. What is read takes memory in
proportion to the file, so that a small file cannot fill a machine.
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

SMALL_BYTES = 2**24  # of a document that does not grow with a shard set, such as a scorecard
LARGE_BYTES = 2**32  # of one that does
LINE_BYTES = 2**22  # of a row: the label of a recording of ten hours takes one
MAX_UNPACKING = 100  # times its size: ours unpack to ten times theirs, a list of refusals to eighty times
UNPACKED_FREELY = 2**20  # bytes, whatever the ratio
BRACKETS_FREELY, BYTES_OF_BRACKET = 1_000, 16  # an empty list takes 3 bytes of a document, and 64 of memory
PIECE_BYTES = 2**10  # of a frame at a time, which may unpack to 32 MB
MAX_FAULTS = 100

STRICT = ConfigDict(extra="forbid")  # of files that are ours: a field that is not known may mean anything

Count = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
Size = Annotated[int, Field(strict=True, ge=0, le=2**40)]  # bytes, samples or steps
Hash = Annotated[int, Field(strict=True, ge=0, le=2**64 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Second = Annotated[float, Field(strict=True, ge=0, le=10**9)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]

HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # what a program that cuts texts by 16 bits leaves of an emoji
Wanted = TypeVar("Wanted")


class DocumentError(ValueError):
    """What is wrong with a document; its reader adds where it lies, and what to do."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. Raises OSError, which says what it is instead, if it is a folder, a pipe or a device."""
    mode = os.stat(path).st_mode  # before it is opened: to open a pipe waits for ever
    if stat.S_ISREG(mode):
        return open(path, "rb")
    kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
    raise OSError(errno.EINVAL, f"is a {kind}, not a file", str(path))


def read_document(path: Path, limit: int = SMALL_BYTES) -> bytes:
    """Read a file whole. Raises OSError, and DocumentError if it is larger than any such document."""
    with open_regular(path) as file:
        small = os.fstat(file.fileno()).st_size <= limit  # else it may be a hole of any size
        data = file.read(limit + 1) if small else b""
    if not small or len(data) > limit:
        raise DocumentError(f"it has more than {limit:,} bytes")
    return data


def parse_json(data: bytes, finite: bool = True) -> Any:
    """Parse one JSON value, if `finite` without NaN or infinite literals. Raises DocumentError."""
    if data.count(b"[") + data.count(b"{") > BRACKETS_FREELY + len(data) // BYTES_OF_BRACKET:
        raise DocumentError("it consists of brackets")
    try:
        return from_json(data, allow_inf_nan=not finite)
    except ValueError as error:
        raise DocumentError(f"not JSON: {error}") from error


def parse_row(data: bytes) -> dict[str, Any]:
    """Parse one JSON object of another program: a number may be NaN, a text hold half a character, no key come twice.

    Raises DocumentError.
    """
    data = data.removeprefix(codecs.BOM_UTF8)  # with which Windows tools begin a file
    try:
        row = parse_json(data, finite=False)
    except DocumentError as error:
        if not HALF_CHARACTER.search(data):
            raise
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            raise error from None
    if not isinstance(row, dict):
        raise DocumentError(f"a JSON object is expected, found {type(row).__name__}")
    if data.count(b":") > len(row):  # else it is flat, and each key is another
        json.loads(data, object_pairs_hook=_refuse_twice)
    return row


def parse(data: bytes, wanted: TypeAdapter[Wanted]) -> Wanted:
    """Parse one JSON value that must fit a type. Raises DocumentError, which names the first field that does not."""
    return validate(parse_json(data), wanted)


def validate(value: Any, wanted: TypeAdapter[Wanted]) -> Wanted:
    """Return what a parsed document says, as a type. Raises DocumentError, which names the first field that differs."""
    try:
        return wanted.validate_python(value)
    except ValidationError as error:
        raise DocumentError(_explain(error)) from error


def unpack(data: bytes, most_times: int = MAX_UNPACKING) -> bytes:
    """Unpack a zstandard frame that says how long it is, as all of ours do. Raises DocumentError."""
    try:
        size = zstandard.frame_content_size(data)
        if size < 0 or size > max_unpacked(len(data), most_times):
            said = "does not say how long it is" if size < 0 else f"says that it unpacks to {size:,} bytes"
            raise DocumentError(f"its frame of {len(data):,} bytes {said}")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise DocumentError(str(error)) from error


def unpack_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a zstandard frame while it is unpacked. Raises DocumentError, also if it is cut short."""
    unpacker, begun, packed, unpacked = zstandard.ZstdDecompressor().decompressobj(), list[bytes](), 0, 0
    try:
        while piece := file.read(PIECE_BYTES):
            fresh = unpacker.decompress(piece)
            packed, unpacked = packed + len(piece), unpacked + len(fresh)
            if unpacked > max_unpacked(packed):
                raise DocumentError(f"its first {packed:,} bytes unpack to more than {max_unpacked(packed):,}")
            begun.append(fresh)
            if b"\n" in fresh:  # joined once a line: a long one takes time in proportion to its length
                *lines, left = b"".join(begun).split(b"\n")
                begun = [left]
                yield from lines
    except zstandard.ZstdError as error:
        raise DocumentError(str(error)) from error
    if any(begun) or not unpacker.eof:
        raise DocumentError("it ends in the middle")


def max_unpacked(packed: int, most_times: int = MAX_UNPACKING) -> int:
    """Return how many bytes some packed ones may unpack to."""
    return max(UNPACKED_FREELY, most_times * packed)


def _refuse_twice(pairs: Sequence[tuple[str, Any]]) -> None:
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise DocumentError(f"{key!a:.100} is there twice")
        seen.add(key)


def _explain(error: ValidationError) -> str:
    if error.error_count() > MAX_FAULTS:
        return f"it has {error.error_count():,} faults: it is another kind of document"
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] in ("missing", "unexpected_keyword_argument", "extra_forbidden"):
        return f"{where!a:.100} is {'missing' if first['type'] == 'missing' else 'unknown'}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{where!a:.100} is {first['input']!a:.100}: {said[0].lower()}{said[1:]}" if where else said
