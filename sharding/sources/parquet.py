"""Read parquet files as Hugging Face's `datasets` writes them: a column of audio, as bytes or as paths, and its labels.

The audio stays where it is: a row names it as FILE:COLUMN:ROW, and workers read it by row groups.
"""

import errno
import os
import re
import struct
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import xxhash

from sharding.errors import AudioError, ManifestError, StreamtrainError
from sharding.files.document import LINE_BYTES, max_unpacked
from sharding.files.writing import explaining
from sharding.sources.options import ManifestOptions
from sharding.sources.tables import FREE_BYTES, TABLE_NAME, PlacedRow

AUDIO_IN_ROW = re.compile(r"(.+\.parquet):([^/]+):(\d{1,15})")  # file, column, row from 1
SPLIT = re.compile(r"(?i)(?:partial-)?(train|validation|valid|val|dev|test)(?![a-z])")
KNOWN = {  # the columns of published datasets, by our field
    "text": ("text", "sentence", "transcription", "transcript", "phonetic_text", "orthographic_text"),
    "child_id": ("child_id", "speaker_id", "client_id", "speaker", "spk_id"),
    "session_id": ("session_id", "chapter_id"),
    "age_bucket": ("age_bucket", "age"),
    **{name: (name,) for name in ("utterance_id", "audio_duration_sec", "md5_hash", "split")},
}
MAX_GROUP_BYTES, MAX_GROUP_ROWS = 2**30, 2**20  # of a row group, whose audio a worker holds in memory
ROWS_FREELY = 2**20  # of a file; of more rows, each takes a byte at least, or it is a bomb
SPAN = struct.Struct("<QQ")  # where a value begins and ends in a row group that was unpacked
KEPT_GROUPS, KEPT_BYTES = 64, 2**27  # row groups that a process keeps at most, and their bytes
SMALLER_GROUPS = "write it again with groups of 100 rows: pyarrow.parquet.write_table(table, path, row_group_size=100)"


@dataclass(frozen=True)
class _Columns:
    """Hold the columns to read of a file."""

    audio: str
    leaf: str  # the bytes of the audio, as parquet names them; empty: there are paths alone
    path: str  # its paths; empty: there are bytes alone
    labels: Mapping[str, str]  # by the key of a row


def matches(location: Path) -> bool:
    """Return whether this is a parquet file, or a folder without a table that has one, at most two folders below."""
    if not location.is_dir():
        return location.is_file() and location.suffix == ".parquet"
    if any(TABLE_NAME.search(path.name) for path in location.iterdir()):
        return False
    return any(True for below in ("", "*/", "*/*/") for _ in location.glob(f"{below}*.parquet"))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield the rows of every file, in the split that its name begins with. Raises ManifestError."""
    folder = location if location.is_dir() else location.parent
    top = folder.resolve()
    for path in _find_files(location):
        if not options.follow_links and not path.resolve().is_relative_to(top):
            raise ManifestError(f"{path}: is a link that leads outside this folder", "--follow-links reads it")
        name = path.relative_to(folder).as_posix()
        split = SPLIT.match(path.name) or SPLIT.match(path.parent.name)  # `default/train/0000.parquet`
        with _damage_explained(path):
            for number, values in enumerate(_read_file(path, name, options), 1):
                utterance_id = f"{top.name}/{name.removesuffix('.parquet')}/{number}"
                given = {"utterance_id": utterance_id, "split": split[1].lower() if split else ""}
                row = {field: value for field, value in given.items() if field not in options.columns} | values
                yield PlacedRow(str(path), number, row)


def _find_files(location: Path) -> list[Path]:
    """Return the files of a dataset. Raises ManifestError if the folder has several configurations of it."""
    if location.is_file():
        return [location]
    files = sorted(path for path in location.rglob("*.parquet") if path.is_file())
    configurations: dict[str, str] = {}  # their folders
    for path in files:
        folders = path.relative_to(location).parts[:-1]
        name = "/".join(part for part in folders if part != "data" and not SPLIT.match(part))
        configurations.setdefault(name, str(location / name))
    if len(configurations) > 1:
        names = ", ".join(sorted(name or "this folder's own" for name in configurations))
        hint = f"name one of them, such as {max(configurations.values())}"
        raise ManifestError(f"{location}: the dataset has several configurations: {names}", hint)
    return files


def _read_file(path: Path, name: str, options: ManifestOptions) -> Iterator[dict[str, Any]]:
    """Yield the fields of each row by the names of their columns, or by ours. Raises ManifestError."""
    with path.open("rb") as file:
        schema = _open(file).schema_arrow
        columns = _choose_columns(path, schema, options)
        texts = [column for column in columns.labels.values() if _is_text(schema.field(column).type)]
        parquet = _open(file, [*texts, columns.leaf, columns.path])
        audio_key, number, written = options.columns.get("audio_path", "audio_path"), 0, 0
        size = path.stat().st_size
        rows = sum(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
        if rows > max(ROWS_FREELY, size):
            raise ManifestError(f"{path}: its {size:,} bytes unpack to {rows:,} rows")
        by_path = _lacks_bytes(parquet, columns)
        for group in range(parquet.num_row_groups):
            if problem := _too_large(parquet, group):
                raise ManifestError(f"{path}: {problem}", SMALLER_GROUPS)
            wanted = [*columns.labels.values(), *[columns.path] * by_path]
            table = parquet.read_row_group(group, columns=wanted, use_threads=False)
            cells = {key: _values(table.column(column)) for key, column in columns.labels.items()}
            paths = _values(_leaf(table.column(columns.audio))) if by_path else [""] * table.num_rows
            for row, audio_path in enumerate(paths):
                number += 1
                values = {key: column[row] for key, column in cells.items()}
                values[audio_key] = audio_path or f"{name}:{columns.audio}:{number}"
                length = sum(len(value) for value in values.values() if isinstance(value, str))
                written += length
                if length > LINE_BYTES or written > max(FREE_BYTES, max_unpacked(size)):
                    raise ManifestError(f"{path}:{number}: its texts unpack to more than {written:,} bytes")
                yield values


def _choose_columns(path: Path, schema: Any, options: ManifestOptions) -> _Columns:
    """Return the columns that the user named, else those of known names and, of the audio, of its type."""
    named = options.columns.get("audio_path", "")
    candidates = [field.name for field in schema if _is_audio(field.type)]
    audio = named or ("audio" if "audio" in candidates else candidates[0] if len(candidates) == 1 else "")
    if audio not in schema.names:
        found = f"there is no column {audio!r}" if audio else f"{len(candidates)} columns may hold the audio"
        raise _wrong(path, schema, f"{found}: one of bytes, or of {{bytes, path}}, is expected", "audio_path")
    labels = _choose_labels(path, schema, options)
    if not _may_hold_audio(schema.field(audio).type):
        raise _wrong(path, schema, f"column {audio!r} holds no audio: bytes, {{bytes, path}} or paths", "audio_path")
    for column in labels.values():
        if not _is_plain(schema.field(column).type):
            problem = f"column {column!r} is of type {schema.field(column).type}, text or numbers are expected"
            raise ManifestError(f"{path}: {problem}", "--columns FIELD=COLUMN names another one")
    kind = schema.field(audio).type
    if not _is_struct(kind):
        by_path = _is_plain(kind)
        return _Columns(audio, "" if by_path else audio, audio if by_path else "", labels)
    leaf, path_leaf = (f"{audio}.{part}" * (kind.get_field_index(part) >= 0) for part in ("bytes", "path"))
    return _Columns(audio, leaf, path_leaf, labels)


def _choose_labels(path: Path, schema: Any, options: ManifestOptions) -> dict[str, str]:
    """Return the columns of text and numbers by the key of a row: the name that the user gave, else our field."""
    chosen = {field: column for field, column in options.columns.items() if field != "audio_path"}
    labels: dict[str, str] = {}
    for field, known in (KNOWN | {field: (column,) for field, column in chosen.items()}).items():
        found = [column for column in known if column in schema.names]
        if field in chosen and not found:
            raise _wrong(path, schema, f"there is no column {known[0]!r}", field)
        if field == "text" and len(found) != 1:
            raise _wrong(path, schema, f"{len(found)} columns may hold the labels", field)
        labels |= {chosen.get(field, field): column for column in found[:1]}
    if options.group_by in schema.names:
        labels[options.group_by] = options.group_by
    return labels


def _wrong(path: Path, schema: Any, problem: str, field: str) -> ManifestError:
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    shown = columns if len(columns) < 1_000 else f"{columns[:1_000]}…"
    return ManifestError(f"{path}: {problem}; the columns are {shown}", f"--columns {field}=COLUMN names it")


def _is_struct(kind: Any) -> bool:
    return bool(_import().types.is_struct(kind))


def _is_audio(kind: Any) -> bool:
    """Return whether a column may hold audio: `datasets` writes its Audio as {bytes, path}, others plain bytes."""
    types = _import().types
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _may_hold_audio(kind: Any) -> bool:
    """Return whether a column that the user named may hold audio: also paths, or structs of bytes or paths alone."""
    if _is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return _is_audio(kind) or _is_text(kind)


def _is_text(kind: Any) -> bool:
    types = _import().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_plain(kind: Any) -> bool:
    types = _import().types
    return _is_text(kind) or any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean))


def _values(column: Any) -> list[Any]:
    """Return the cells of a column: equal texts are one object, as they are in a file that repeats them."""
    cells: list[Any] = []
    for chunk in column.chunks:
        if _import().types.is_dictionary(chunk.type):
            texts = chunk.dictionary.to_pylist()
            cells += [None if index is None else texts[index] for index in chunk.indices.to_pylist()]
        else:
            cells += [None if cell != cell else cell for cell in chunk.to_pylist()]  # pandas' NaN is no value
    return cells


# --- row groups -------------------------------------------------------------------------------------------------


class AudioColumn:
    """Read the audio of single rows of an open parquet file; `key` identifies the file among those of the process."""

    def __init__(self, key: object, file: IO[bytes], column: str) -> None:
        with _damage_refused():
            kind = _open(file).schema_arrow.field(column).type
            self._leaf = f"{column}.bytes" if _is_struct(kind) else column
            self._parquet, self._key = _open(file, [self._leaf]), key
            groups = range(self._parquet.num_row_groups)
            self._ends = list(accumulate(self._parquet.metadata.row_group(group).num_rows for group in groups))

    def read(self, row: int, unpacked: str = "") -> bytes:
        """Return the audio of a row, counted from 1. Raises AudioError.

        Its row group is unpacked to the folder `unpacked`, if there is one, and is kept in memory else.
        """
        group = bisect_right(self._ends, row - 1)
        if row < 1 or group == len(self._ends):
            raise AudioError(f"parquet file has no row {row}")
        place = row - 1 - (self._ends[group - 1] if group else 0)
        if unpacked:
            audio = self._read_unpacked(Path(unpacked), group, place)
        else:
            with _damage_refused():
                audio = self._read_group(group)[place].as_py()
        if audio is None:
            raise AudioError("row has no audio")
        return bytes(audio)

    def _read_unpacked(self, folder: Path, group: int, place: int) -> bytes | None:
        """Return a value of a row group from its file, which is written first if it is not there.

        Raises AudioError for a fault of the parquet file, StoreError for one of that file or its disk.
        """
        path = folder / f"{xxhash.xxh3_64_hexdigest(repr(self._key).encode())}-{group}"
        if not path.exists():
            with _damage_refused():
                parts = list(_values_of(self._load_group(group)))
            with explaining(path):
                folder.mkdir(parents=True, exist_ok=True)
                partial = folder / f"{path.name}.{uuid.uuid4().hex}"
                try:
                    with partial.open("wb") as file:
                        _write_values(parts, file)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        with explaining(path), path.open("rb", buffering=0) as values:
            start, end = SPAN.unpack(os.pread(values.fileno(), SPAN.size, place * SPAN.size))
            audio = os.pread(values.fileno(), end - start, start) if start else None
            if audio is not None and len(audio) != end - start:
                raise OSError(errno.EIO, "is cut short")
        return audio

    def _read_group(self, group: int) -> Any:
        """Return the audio of a row group, from memory if it was read lately."""
        if (self._key, group) not in _kept:
            column = self._load_group(group)
            _kept[self._key, group] = column, column.nbytes
            while len(_kept) > KEPT_GROUPS or (len(_kept) > 1 and sum(size for _, size in _kept.values()) > KEPT_BYTES):
                _kept.popitem(last=False)
        _kept.move_to_end((self._key, group))
        return _kept[self._key, group][0]

    def _load_group(self, group: int) -> Any:
        """Return the audio of a row group. Repeated values are one, so that it is no larger than in its file."""
        if problem := _too_large(self._parquet, group):
            raise AudioError(f"{problem}: {SMALLER_GROUPS}")
        return _leaf(self._parquet.read_row_group(group, columns=[self._leaf], use_threads=False).column(0))


Values = tuple[Any, Sequence[int | None]]  # of a part of a row group: the values, and which of them each row has


def _values_of(column: Any) -> Iterator[Values]:
    for chunk in column.chunks:
        if _import().types.is_dictionary(chunk.type):
            yield chunk.dictionary, chunk.indices.to_pylist()
        else:
            yield chunk, range(len(chunk))


def _write_values(parts: Sequence[Values], file: IO[bytes]) -> None:
    """Write where the value of each row begins and ends, 0 if it is null, then the values: repeated ones once."""
    spans, position = list[tuple[int, int]](), SPAN.size * sum(len(rows) for _, rows in parts)
    for values, rows in parts:
        sizes = [len(value.as_buffer()) if value.is_valid else 0 for value in values]
        ends = list(accumulate(sizes, initial=position))
        spans += [(0, 0) if row is None or not values[row].is_valid else (ends[row], ends[row + 1]) for row in rows]
        position = ends[-1]
    file.write(b"".join(SPAN.pack(*span) for span in spans))
    for values, _ in parts:
        for value in values:
            file.write(value.as_buffer() or b"")


_kept: OrderedDict[tuple[object, int], tuple[Any, int]] = OrderedDict()  # row groups and their bytes, by last use


def _open(file: IO[bytes], texts: Sequence[str] = ()) -> Any:
    """Open a parquet file. Values of the columns `texts` that are repeated in it are read once."""
    parquet = _import().parquet.ParquetFile(file, pre_buffer=False)
    wanted = {*filter(None, texts)} - _delta_encoded(parquet)
    return _import().parquet.ParquetFile(file, read_dictionary=[*wanted], pre_buffer=False) if wanted else parquet


def _delta_encoded(parquet: Any) -> set[str]:
    """Return the columns in encodings without repeated values, which pyarrow cannot read as a dictionary."""
    groups = (parquet.metadata.row_group(number) for number in range(parquet.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return {chunk.path_in_schema for chunk in chunks if any("DELTA" in encoding for encoding in chunk.encodings)}


def _leaf(column: Any) -> Any:
    """Return a column, or the only field of its structs, null where the struct is."""
    if not _is_struct(column.type):
        return column
    return _import().chunked_array([chunk.flatten()[0] for chunk in column.chunks], column.type.field(0).type)


def _too_large(parquet: Any, group: int) -> str:
    """Return why a row group cannot be read; nothing if it can."""
    metadata = parquet.metadata.row_group(group)
    if metadata.total_byte_size <= MAX_GROUP_BYTES and metadata.num_rows <= MAX_GROUP_ROWS:
        return ""
    limit = f"{MAX_GROUP_ROWS:,} and {MAX_GROUP_BYTES:,} are read"
    return f"a row group has {metadata.num_rows:,} rows and {metadata.total_byte_size:,} bytes, at most {limit}"


def _lacks_bytes(parquet: Any, columns: _Columns) -> bool:
    """Return whether a file gives its audio by paths alone, as its first row group does.

    Its statistics tell it too, but pyarrow ends the process if those of a damaged file contradict each other.
    """
    if not columns.leaf or not columns.path or not parquet.num_row_groups or _too_large(parquet, 0):
        return not columns.leaf
    audio = _leaf(parquet.read_row_group(0, columns=[columns.leaf], use_threads=False).column(0))
    return bool(audio.null_count == len(audio))


def _import() -> Any:
    """Import pyarrow. Raises StreamtrainError if it is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise StreamtrainError("parquet files need the package pyarrow", "pip install pyarrow") from error
    return pyarrow


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _damages() as error:
        if isinstance(error, OSError) and error.strerror:
            raise ManifestError(f"{path}: {error.strerror}") from error
        raise ManifestError(f"{path}: damaged ({_first_line(error)})", "the copy may be incomplete") from error


@contextmanager
def _damage_refused() -> Iterator[None]:
    try:
        yield
    except _damages() as error:
        raise AudioError(f"parquet file is damaged: {_first_line(error)}") from error


def _damages() -> tuple[type[Exception], ...]:
    return _import().ArrowException, OSError, LookupError, UnicodeError


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
