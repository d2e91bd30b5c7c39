"""A transcripts file as JSON Lines, whatever the user has: JSON Lines, CSV or TSV, plain or compressed.

Everything is read to its end: a file that was cut short on its way here is told, not taken for a shorter one.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from sharding.errors import ManifestError

READ_BYTES = 2**20
SEARCH_BYTES = 2**26
NOT_A_TABLE = "a header is expected, then rows of as many cells, every quote closed, in UTF-8"


class Lines(NamedTuple):
    """One JSON object per line."""

    text: bytes
    starts: npt.NDArray[np.int64]  # (rows,) where each row's line begins
    ends: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]  # of the lines in the user's file, from 1


def is_table(path: Path) -> bool:
    return _bare_suffix(path) in (".csv", ".tsv")


def read_lines(path: Path, number_columns: Collection[str]) -> Lines:
    """The rows of a transcripts file; of a table, `number_columns` become numbers. Raises ManifestError."""
    try:
        with open(path, "rb") as file:
            data = b"".join(_unpack(file, path.suffix.lower()))
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise ManifestError(f"{path}: damaged ({error})", "it may not have been copied whole") from error
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error
    if not is_table(path):
        return _find_lines(data)
    text, numbers = _read_table(path, data, number_columns)
    return _find_lines(text)._replace(numbers=numbers)


def _unpack(file: IO[bytes], suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _unpack_zstd(file)
        return
    yield (gzip.GzipFile(fileobj=file) if suffix == ".gz" else file).read()  # in one piece, which nobody copies


def _unpack_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame; zstandard's own stream reader ends without a word where a frame is cut short."""
    frame, whole = zstandard.ZstdDecompressor().decompressobj(), True
    while data := file.read(READ_BYTES):
        while data:
            yield frame.decompress(data)
            whole, data = frame.eof, frame.unused_data
            if whole:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if not whole:
        raise EOFError("the last frame is cut short")


def _bare_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")


def _read_table(path: Path, data: bytes, number_columns: Collection[str]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """A CSV, or a TSV in which quotes are plain characters (as Common Voice writes it): rows and their lines."""
    csv.field_size_limit(sys.maxsize)  # the label of a recording of hours is long
    file = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    quotes = tabs if _bare_suffix(path) == ".tsv" else {"strict": True, "skipinitialspace": True}
    reader = csv.reader(file, **quotes)
    text, numbers, start = io.BytesIO(), [], 1
    try:
        names = [name.strip() for name in next(reader, [])]
        twice = [name for name, count in Counter(names).items() if name and count > 1]
        if twice:
            raise csv.Error(f"column {twice[0]!r} is there twice")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) not in (0, len(names)):
                raise csv.Error(f"the row has {len(cells)} cells, the header {len(names)}")
            if cells:  # else a blank line
                row = {name: _number(cell) if name in number_columns else cell
                       for name, cell in zip(names, cells, strict=True)}  # fmt: skip
                text.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                numbers.append(start)
            start = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}:{_undecodable_line(data)}: not UTF-8: {error.reason}", NOT_A_TABLE) from error
    except csv.Error as error:
        raise ManifestError(f"{path}:{start}: not a table: {error}", NOT_A_TABLE) from error
    return text.getvalue(), np.array(numbers, np.int64)


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell  # refused, with its place, by whoever expects a number


def _undecodable_line(data: bytes) -> int:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    raise AssertionError("unreachable")


def _find_lines(text: bytes) -> Lines:
    """Start, end and number of every line that is not blank."""
    symbols = np.frombuffer(text, np.uint8)  # looked at in parts, as the comparison takes as much memory again
    parts = (slice(start, start + SEARCH_BYTES) for start in range(0, len(text), SEARCH_BYTES))
    found = [np.flatnonzero(symbols[part] == ord("\n")) + part.start for part in parts]
    ends = np.concatenate([np.zeros(0, np.int64), *found])
    if not text.endswith(b"\n"):
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    filled = ends - starts > 0
    for row in np.flatnonzero(filled & (ends - starts < 16)):  # a row is longer
        filled[row] = bool(text[starts[row] : ends[row]].strip())
    return Lines(text, starts[filled], ends[filled], np.flatnonzero(filled) + 1)
