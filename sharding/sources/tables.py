"""Read a transcripts file as JSON Lines, whether it is JSON Lines, CSV or TSV, plain or compressed.

Everything is read to its end: a truncated file is reported, not taken for a shorter one.
"""

import csv
import gzip
import io
import json
import os
import re
import string
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from sharding.errors import ManifestError
from sharding.files.document import LINE_BYTES, PIECE_BYTES, DocumentError, max_unpacked, open_regular, parse_row
from sharding.files.spool import Mapped, Spool

TABLE_NAME = re.compile(r"(?i)\.(jsonl|[ct]sv)(\.gz|\.zst)?$")
READ_BYTES = 2**20
ROW_BYTES = 16  # only shorter lines are checked for being blank: no row is that short
TABLE_TIMES = 30  # a table's size, at most, as JSON: rows of empty cells repeat the names of their columns
FREE_BYTES = 2**25  # unpacked at any ratio: tables of a few words compress a thousandfold
SEARCH_BYTES = 2**22  # searched at a time: for bare line ends, the numbers take eight times as much
BLANK = np.isin(np.arange(256), np.frombuffer(string.whitespace.encode(), np.uint8))  # by byte
DELIMITERS = (",", ";", "\t")  # of a CSV; Excel writes semicolons if the comma is the decimal separator
HEADER_BYTES = 2**16  # searched for the delimiter
NOT_UTF8 = "a table is expected in UTF-8; in Excel: save as CSV UTF-8"
NOT_A_TABLE = "a header is expected, then rows with as many cells, every quote closed, in UTF-8"


LINE_DTYPE = np.dtype([("start", "<u8"), ("bytes", "<u4"), ("number", "<u4"), ("file", "<u4")])
_pack_line = struct.Struct("<QIII").pack


@dataclass(frozen=True, eq=False)
class Lines:
    """Hold a text with one JSON object per line, and the positions of its rows: both in files, mapped into memory."""

    text: Mapped
    rows: npt.NDArray[np.void]  # (rows,) of LINE_DTYPE; `number`, from 1, is that of the line in the user's file
    files: tuple[str, ...]  # the user's files, by the column `file`

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, row: int) -> bytes:
        start, size, _, _ = self.rows[row].item()
        return self.text[start : start + size]

    def place(self, row: int) -> str:
        """Return the file and the line of a row, for messages."""
        _, _, number, file = self.rows[row].item()
        return f"{self.files[file]}:{number}"


class PlacedRow(NamedTuple):
    """Hold a row that the reader of a layout yields, and its place in the user's files."""

    file: str
    line: int  # from 1
    values: dict[str, Any]  # by our names of the fields; any other keys are columns of the user


def pack_rows(rows: Iterable[PlacedRow]) -> Lines:
    """Return rows as JSON Lines."""
    text, lines, files = Spool(), Spool(), dict[str, int]()
    for file, number, values in rows:
        line = _write_json(values)
        _check_length(len(line) - 1, f"{file}:{number}")
        lines.write(_pack_line(text.size, len(line) - 1, number, files.setdefault(file, len(files))))
        text.write(line)
    return Lines(text.map(), np.frombuffer(lines.map(), LINE_DTYPE), tuple(files))


def _check_length(size: int, place: str) -> None:
    if size > LINE_BYTES:
        raise ManifestError(f"{place}: a row of {size:,} bytes, at most {LINE_BYTES:,} are read")


def _write_json(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which is rejected, with its place, when the row is parsed
        return json.dumps(values).encode() + b"\n"


def is_table(path: Path) -> bool:
    return _bare_suffix(path) in (".csv", ".tsv")


def read_lines(path: Path, number_columns: Collection[str]) -> Lines:
    """Read the rows of a transcripts file; in a table, `number_columns` become numbers. Raises ManifestError."""
    if is_table(path):
        return pack_rows(PlacedRow(str(path), *row) for row in read_table(path, number_columns))
    data, found = Spool(), Spool()
    for part in _read_parts(path):
        data.write(part)
    text = data.map()
    for block in _find_lines(text):
        for number, size in block[["number", "bytes"]][block["bytes"] > LINE_BYTES][:1].tolist():
            _check_length(size, f"{path}:{number}")
        found.write(block.tobytes())
    return Lines(text, np.frombuffer(found.map(), LINE_DTYPE), (str(path),))


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line of a JSON Lines file. Raises ManifestError."""
    lines = read_lines(path, ())
    for row in range(len(lines)):
        yield int(lines.rows["number"][row]), read_row(lines.line(row), lines.place(row))


def first_row(path: Path) -> dict[str, Any]:
    """Return the object on the first line of a file, an empty one if there is none."""
    begun = b""
    try:
        for part in _read_parts(path):
            begun += part
            if b"\n" in part:
                break
        return parse_row(begun.partition(b"\n")[0])
    except (ManifestError, DocumentError):  # reported when the file is read
        return {}


def read_row(line: bytes, place: str) -> dict[str, Any]:
    """Parse one line of a transcripts file. Raises ManifestError with its place."""
    try:
        return parse_row(line)
    except DocumentError as error:
        hint = "one JSON object per line is expected, in UTF-8"
        raise ManifestError(f"{place}: {error}", hint) from error


def read_text(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line that is not blank, and the line. Raises ManifestError."""
    text = _Text(path)
    return ((number, line.strip()) for number, line in enumerate(text.lines("\n"), 1) if line.strip())


class _Text(io.BufferedIOBase):
    """Read a file as text while it is unpacked."""

    def __init__(self, path: Path) -> None:
        self.name, self._parts = str(path), _read_parts(path)
        self._begun = next(self._parts, b"")
        self.header = self._begun[:HEADER_BYTES]
        self.size = self._lines = 0  # bytes and line ends that were read

    def lines(self, newline: str) -> Iterator[str]:
        """Yield the lines, each with its end. Raises ManifestError."""
        try:
            yield from io.TextIOWrapper(self, "utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            line = self._lines - error.object.count(b"\n", error.start) + 1
            raise ManifestError(f"{self.name}:{line}: not UTF-8: {error.reason}", NOT_UTF8) from error

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        part, self._begun = self._begun or next(self._parts, b""), b""
        self.size += len(part)
        self._lines += part.count(b"\n")
        return part


def _read_parts(path: Path) -> Iterator[bytes]:
    """Yield the unpacked parts of a file. Raises ManifestError, also for a bomb, and for an endless line."""
    size = line_start = 0
    try:
        with open_regular(path) as file:
            packed = os.fstat(file.fileno()).st_size
            for part in _unpack(file, path.suffix.lower()):
                if size + len(part) > max(FREE_BYTES, max_unpacked(packed)):
                    raise DocumentError(f"its {packed:,} bytes unpack to more than {size:,}")
                end = max(part.rfind(b"\n"), part.rfind(b"\r"))
                line_start = line_start if end < 0 else size + end
                size += len(part)
                if size - line_start > LINE_BYTES + READ_BYTES:
                    raise DocumentError(f"it has a line of more than {LINE_BYTES:,} bytes")
                if part:  # an empty one would be taken for the end
                    yield part
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise ManifestError(f"{path}: damaged ({error})", "the copy may be incomplete") from error
    except DocumentError as error:
        raise ManifestError(f"{path}: {error}", "is it a transcripts file?") from error
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error


def _unpack(file: IO[bytes], suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        return _unpack_zstd(file)
    unpacked = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
    return iter(lambda: unpacked.read(READ_BYTES), b"")


def _unpack_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the data of all frames; zstandard's own stream reader ends silently if a frame is cut short."""
    frame, complete = zstandard.ZstdDecompressor().decompressobj(), True
    while data := file.read(PIECE_BYTES):
        while data:
            yield frame.decompress(data)
            complete, data = frame.eof, frame.unused_data
            if complete:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if not complete:
        raise EOFError("the last frame is cut short")


def _bare_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")


def read_table(path: Path, number_columns: Collection[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the cells of each row of a CSV or TSV, by the names of its columns.

    The header decides a CSV's delimiter. Quotes in a TSV are plain characters, as Common Voice writes it. Raises
    ManifestError.
    """
    csv.field_size_limit(LINE_BYTES)  # the label of a recording of hours is long
    text, plain = _Text(path), _bare_suffix(path) == ".tsv"
    reader = csv.reader(
        text.lines(newline=""),
        delimiter="\t" if plain else _find_delimiter(text.header),
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
        strict=not plain,
        skipinitialspace=not plain,
    )
    start, written = 1, 0
    try:
        names = [name.strip() for name in next(reader, [])]
        duplicates = [name for name, count in Counter(names).items() if name and count > 1]
        if duplicates:
            raise csv.Error(f"column {duplicates[0]!r} occurs twice")
        named, start = max(sum(map(len, names)), 1), reader.line_num + 1
        for cells in reader:
            if len(cells) not in (0, len(names)):
                separated = f"separated by {reader.dialect.delimiter!r}"
                raise csv.Error(f"the row has {len(cells)} cells, the header {len(names)}, {separated}")
            written += named * bool(cells)
            if written > max(FREE_BYTES, max_unpacked(text.size, TABLE_TIMES)):
                raise csv.Error(f"its {len(names):,} column names would be repeated {written // named:,} times")
            if cells:  # else a blank line
                yield start, {name: _number(cell) if name in number_columns else cell
                              for name, cell in zip(names, cells, strict=True)}  # fmt: skip
            start = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path}:{start}: not a table: {error}", NOT_A_TABLE) from error


def _find_delimiter(data: bytes) -> str:
    """Return the delimiter that splits the header of a CSV into the most cells, the first one on a tie."""
    header = data.partition(b"\n")[0].partition(b"\r")[0]
    line = header.decode("utf-8-sig", "replace")
    return max(DELIMITERS, key=lambda char: len(next(csv.reader([line], delimiter=char, skipinitialspace=True), [])))


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell  # rejected, with its place, when the row is parsed


def _find_lines(text: Mapped) -> Iterator[npt.NDArray[np.void]]:
    """Yield the positions and numbers of all lines that are not blank, as tables of LINE_DTYPE."""
    position, lines_before = 0, 0
    while position < len(text):
        stop = text.find(b"\n", min(position + SEARCH_BYTES, len(text)) - 1) + 1 or len(text)
        part = np.frombuffer(text[position:stop], np.uint8)
        ends = np.flatnonzero(part == ord("\n"))
        if part[-1] != ord("\n"):
            ends = np.append(ends, len(part))
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        nonblank = lengths > 0
        if (lengths[nonblank] < ROW_BYTES).any():
            nonblank &= np.logical_or.reduceat(~BLANK[part], starts) | (lengths >= ROW_BYTES)
        rows = np.flatnonzero(nonblank)
        block = np.zeros(len(rows), LINE_DTYPE)
        block["start"], block["bytes"] = starts[rows] + position, lengths[rows]
        block["number"] = rows + lines_before + 1
        yield block
        position, lines_before = stop, lines_before + len(ends)
