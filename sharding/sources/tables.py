"""Read a transcripts file as JSON Lines, whether it is JSON Lines, CSV or TSV, plain or compressed.

Everything is read to its end: a truncated file is reported, not taken for a shorter one.
"""

import csv
import gzip
import io
import json
import os
import string
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from sharding.errors import ManifestError
from sharding.files.document import LINE_BYTES, PIECE_BYTES, DocumentError, max_unpacked, open_regular, parse_row

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


@dataclass(frozen=True, eq=False)
class Lines:
    """Hold a text with one JSON object per line, and the positions of its rows."""

    text: bytes
    starts: npt.NDArray[np.int64]  # (rows,) where the line of each row begins in `text`
    ends: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]  # line numbers in the user's files, from 1
    files: tuple[str, ...] = ()  # the user's files …
    file_numbers: npt.NDArray[np.uint32] | None = None  # (rows,) … and which of them a row is from; None: the only one

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, row: int) -> bytes:
        return self.text[self.starts[row] : self.ends[row]]

    def place(self, row: int) -> str:
        """Return the file and the line of a row, for messages."""
        return f"{self.files[0 if self.file_numbers is None else self.file_numbers[row]]}:{self.numbers[row]}"


class PlacedRow(NamedTuple):
    """Hold a row that the reader of a layout yields, and its place in the user's files."""

    file: str
    line: int  # from 1
    values: dict[str, Any]  # by our names of the fields; any other keys are columns of the user


def pack_rows(rows: Iterable[PlacedRow]) -> Lines:
    """Return rows as JSON Lines, which take less memory than objects."""
    text, starts, numbers, file_numbers = io.BytesIO(), array("q"), array("q"), array("I")
    files: dict[str, int] = {}
    for file, number, values in rows:
        starts.append(text.tell())
        text.write(_write_json(values))
        numbers.append(number)
        file_numbers.append(files.setdefault(file, len(files)))
    begins = np.array(starts, np.int64)
    ends = np.append(begins[1:], text.tell()) - 1
    return Lines(
        text.getvalue(), begins, ends[: len(begins)], np.array(numbers, np.int64), tuple(files), np.array(file_numbers)
    )


def _write_json(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which is rejected, with its place, when the row is parsed
        return json.dumps(values).encode() + b"\n"


def is_table(path: Path) -> bool:
    return _bare_suffix(path) in (".csv", ".tsv")


def read_lines(path: Path, number_columns: Collection[str]) -> Lines:
    """Read the rows of a transcripts file; in a table, `number_columns` become numbers. Raises ManifestError."""
    data = _read_data(path)
    if is_table(path):
        text, numbers = _pack_table(path, data, number_columns)
        lines = replace(_find_lines(text), numbers=numbers)
    else:
        lines = _find_lines(data)
    for row in np.flatnonzero(lines.ends - lines.starts > LINE_BYTES)[:1]:
        raise ManifestError(f"{path}:{lines.numbers[row]}: a row of more than {LINE_BYTES:,} bytes")
    return replace(lines, files=(str(path),))


def read_table(path: Path, number_columns: Collection[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the cells of each row of a CSV or TSV, by the names of its columns.

    Raises ManifestError.
    """
    return _parse_table(path, _read_data(path), number_columns)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line of a JSON Lines file. Raises ManifestError."""
    lines = read_lines(path, ())
    return ((int(lines.numbers[row]), read_row(lines.line(row), lines.place(row))) for row in range(len(lines)))


def first_row(path: Path) -> dict[str, Any]:
    """Return the object on the first line of a file, an empty one if there is none."""
    try:
        with open_regular(path) as file:
            return parse_row(next(_unpack(file, path.suffix.lower()), b"").partition(b"\n")[0])
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, DocumentError):  # reported when the file is read
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
    text = _decode(path, _read_data(path))
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_data(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return _read_whole(_unpack(file, path.suffix.lower()), os.fstat(file.fileno()).st_size)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise ManifestError(f"{path}: damaged ({error})", "the copy may be incomplete") from error
    except DocumentError as error:
        raise ManifestError(f"{path}: {error}", "is it a transcripts file?") from error
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path}:{line}: not UTF-8: {error.reason}", NOT_UTF8) from error


def _read_whole(parts: Iterator[bytes], packed: int) -> bytes:
    """Join the unpacked parts of a file of `packed` bytes. Raises DocumentError for a bomb and for an endless line."""
    whole, line_start = io.BytesIO(), 0  # getvalue() of a BytesIO copies nothing
    for part in parts:
        size = whole.tell() + len(part)
        if size > max(FREE_BYTES, max_unpacked(packed)):
            raise DocumentError(f"its {packed:,} bytes unpack to more than {whole.tell():,}")
        end = max(part.rfind(b"\n"), part.rfind(b"\r"))
        line_start = line_start if end < 0 else whole.tell() + end
        if size - line_start > LINE_BYTES + READ_BYTES:
            raise DocumentError(f"it has a line of more than {LINE_BYTES:,} bytes")
        whole.write(part)
    return whole.getvalue()


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


def _pack_table(path: Path, data: bytes, number_columns: Collection[str]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Return the rows of a CSV or TSV as JSON Lines, and their line numbers."""
    text, numbers = io.BytesIO(), array("q")
    for number, row in _parse_table(path, data, number_columns):
        text.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        numbers.append(number)
        if text.tell() > max(FREE_BYTES, max_unpacked(len(data), TABLE_TIMES)):
            problem = f"its {len(row):,} column names would be repeated {len(numbers):,} times"
            raise ManifestError(f"{path}:{number}: not a table: {problem}", NOT_A_TABLE)
    return text.getvalue(), np.array(numbers, np.int64)


def _parse_table(path: Path, data: bytes, number_columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV or TSV with their line numbers; the header decides a CSV's delimiter.

    Quotes in a TSV are plain characters, as Common Voice writes it.
    """
    csv.field_size_limit(LINE_BYTES)  # the label of a recording of hours is long
    table, plain = io.StringIO(_decode(path, data), newline=""), _bare_suffix(path) == ".tsv"
    reader = csv.reader(
        table,
        delimiter="\t" if plain else _find_delimiter(data),
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
        strict=not plain,
        skipinitialspace=not plain,
    )
    start = 1
    try:
        names = [name.strip() for name in next(reader, [])]
        duplicates = [name for name, count in Counter(names).items() if name and count > 1]
        if duplicates:
            raise csv.Error(f"column {duplicates[0]!r} occurs twice")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) not in (0, len(names)):
                separated = f"separated by {reader.dialect.delimiter!r}"
                raise csv.Error(f"the row has {len(cells)} cells, the header {len(names)}, {separated}")
            if cells:  # else a blank line
                yield start, {name: _number(cell) if name in number_columns else cell
                              for name, cell in zip(names, cells, strict=True)}  # fmt: skip
            start = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path}:{start}: not a table: {error}", NOT_A_TABLE) from error


def _find_delimiter(data: bytes) -> str:
    """Return the delimiter that splits the header of a CSV into the most cells, the first one on a tie."""
    header = data[:HEADER_BYTES].partition(b"\n")[0].partition(b"\r")[0]
    line = header.decode("utf-8-sig", "replace")
    return max(DELIMITERS, key=lambda char: len(next(csv.reader([line], delimiter=char, skipinitialspace=True), [])))


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell  # rejected, with its place, when the row is parsed


def _find_lines(text: bytes) -> Lines:
    """Return start, end and number of every line that is not blank."""
    blocks = [np.zeros((3, 0), np.int64)]
    position, lines_before = 0, 0
    while position < len(text):
        stop = text.find(b"\n", min(position + SEARCH_BYTES, len(text)) - 1) + 1 or len(text)
        part = np.frombuffer(text, np.uint8, stop - position, position)
        ends = np.flatnonzero(part == ord("\n"))
        if part[-1] != ord("\n"):
            ends = np.append(ends, len(part))
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        nonblank = lengths > 0
        if (lengths[nonblank] < ROW_BYTES).any():
            nonblank &= np.logical_or.reduceat(~BLANK[part], starts) | (lengths >= ROW_BYTES)
        rows = np.flatnonzero(nonblank)
        blocks.append(np.stack([starts[rows] + position, ends[rows] + position, rows + lines_before + 1]))
        position, lines_before = stop, lines_before + len(ends)
    return Lines(text, *np.concatenate(blocks, axis=1))
