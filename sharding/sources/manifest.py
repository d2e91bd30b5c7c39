"""A transcripts file and the audio it speaks of: rows as the user has them, and each row as an `Utterance`.

A corpus may have a hundred million rows, so they stay what they are on disk, lines of JSON; workers parse them, a
few hundred at a time, where they are needed.
"""

import difflib
import functools
import operator
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sharding.errors import ManifestError, counted
from sharding.files.document import DocumentError, parse_row
from sharding.files.names import canonical_name, canonical_speaker, name_of
from sharding.labels.ipa import TRACKS
from sharding.sources.archive import AUDIO_FOLDER, AudioRoot, find_audio, is_audio, walk_files
from sharding.sources.tables import is_table, read_lines

UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # lone surrogates, which JSON can spell and UTF-8 cannot
MAKE_TABLE = (
    "make a CSV with the columns audio_path, phonetic_text and child_id; from labels in a file for each recording, the "
    "README's recipe makes it"
)
SAMPLED_ROWS = 256  # of a file are looked at before the work begins
SHOWN = 20  # columns in a message
NUMBER_HINT = "with a point for decimals; or leave the column out: audio is measured"
TABLE_NAME = re.compile(r"(?i)\.(jsonl|[ct]sv)(\.gz|\.zst)?$")
MAX_NUMBER = 2**53  # beyond it a float skips whole numbers
REQUIRED_FIELDS = ("utterance_id", "audio_path", "text")
OPTIONAL_FIELDS = ("child_id", "session_id", "audio_duration_sec", "age_bucket", "md5_hash", "filesize_bytes")
NAME_FIELDS = ("utterance_id", "child_id", "session_id", "age_bucket")  # which may be numbers
NUMBER_FIELDS = ("audio_duration_sec", "filesize_bytes")
COMMON_VOICE = {"audio_path": "path", "text": "sentence", "child_id": "client_id", "age_bucket": "age"}


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row of a transcripts file. Absent optional fields are empty or None."""

    utterance_id: str
    child_id: str
    session_id: str
    group: str  # of the column that --group-by names
    corpus: str  # the name of the source folder
    audio_path: str  # relative to the source's audio root
    duration_sec: float | None  # as declared; the measured one wins
    age_bucket: str
    md5_hash: str
    filesize_bytes: int | None
    text: str  # as written, not yet normalised

    @property
    def values(self) -> tuple[object, ...]:
        """All of its fields."""
        values: tuple[object, ...] = _values(self)
        return values

    @property
    def speaker(self) -> str:
        """Whom a clip belongs to, as far as is told: the group, the child, the session, else the clip itself."""
        return self.group or self.child_id or self.session_id or canonical_name(self.utterance_id)


_values = operator.attrgetter(*(each.name for each in fields(Utterance)))


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """How the user says that transcripts are to be read."""

    track: str = "phonetic"
    columns: Mapping[str, str] = field(default_factory=dict)  # our field → their column, where the names differ
    group_by: str = ""  # a column; its clips are all trained on or all validated on
    follow_links: bool = False  # to audio outside the source's folder
    audio_root: str = ""  # a folder that holds all audio, where its paths are absolute or relative to it
    fields: tuple[str, ...] = REQUIRED_FIELDS + OPTIONAL_FIELDS  # that are read


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one source are to be read: small, for it travels with them to the workers."""

    corpus: str
    transcripts: str  # for messages
    audio: AudioRoot
    columns: tuple[tuple[str, str], ...]  # (our field, their column), every field that is read
    group_by: str
    names_clips: bool  # False: transcripts without ids, where the audio path stands in
    absolute: tuple[str, ...] = ()  # what an absolute audio path may begin with
    backslashes: bool = False  # audio paths have them for slashes, as Windows writes paths

    def parse(self, line: bytes, number: int) -> tuple[Utterance, frozenset[str]]:
        """A row, and the columns in it that are not ours. Raises ManifestError with its place."""
        where = f"{self.transcripts}:{number}"
        row, text, ignored = self._read(line, number)
        columns = dict(self.columns)
        group = row.get(self.group_by)
        group = str(group) if isinstance(group, bool) else name_of(group)
        seconds, size = (
            _number(row.get(columns[name]), columns[name], where) for name in ("audio_duration_sec", "filesize_bytes")
        )
        utterance = Utterance(
            utterance_id=text["utterance_id"],
            child_id=canonical_speaker(text["child_id"]),
            session_id=canonical_speaker(text["session_id"]),
            group=canonical_speaker(text_of(group, self.group_by, where)),
            corpus=self.corpus,
            audio_path=text["audio_path"],
            duration_sec=seconds,
            age_bucket=canonical_name(text["age_bucket"]),
            md5_hash=text["md5_hash"].lower(),
            filesize_bytes=None if size is None else int(size),
            text=text["text"],
        )
        return utterance, ignored

    def locate(self, line: bytes, number: int) -> tuple[str, str]:
        """Return the id and the audio path of a row. Raises ManifestError with its place."""
        text = self._read(line, number)[1]
        return text["utterance_id"], text["audio_path"]

    def _read(self, line: bytes, number: int) -> tuple[dict[str, Any], dict[str, str], frozenset[str]]:
        """Return a row, its fields that are text, and the columns in it that are not ours."""
        where = f"{self.transcripts}:{number}"
        row = read_row(line, number, self.transcripts)
        ignored, fault = _check_columns(self, tuple(row))
        if fault:
            raise ManifestError(f"{where}: {fault[0]}", fault[1])
        names = {name: name_of(row.get(column)) for name, column in self.columns if name in NAME_FIELDS}
        text = {name: text_of(names.get(name, row.get(column)), column, where) for name, column in self.columns
                if name not in NUMBER_FIELDS}  # fmt: skip
        text["audio_path"] = self._relative(text["audio_path"])
        if not self.names_clips:
            text["utterance_id"] = os.path.splitext(text["audio_path"])[0]
        if not text["utterance_id"] or not text["audio_path"]:
            raise ManifestError(f"{where}: 'utterance_id' and 'audio_path' must not be empty")
        return row, text, ignored

    def _relative(self, audio_path: str) -> str:
        """Return a path below the audio root as relative to it, any other as it is, with slashes."""
        if self.backslashes:
            audio_path = audio_path.replace("\\", "/")
        root = next((root for root in self.absolute if audio_path.startswith(root)), "")
        return audio_path.removeprefix(root).lstrip("/") if root else audio_path


@functools.lru_cache(maxsize=256)  # rows of a file have the same few sets of columns
def _check_columns(layout: Layout, row: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, str | None] | None]:
    """The columns of a row that are not ours; and what is wrong with its columns, with a hint."""
    columns = dict(layout.columns)
    ignored = frozenset(row).difference(columns.values(), [layout.group_by])
    required = REQUIRED_FIELDS if layout.names_clips else REQUIRED_FIELDS[1:]
    missing = {name: columns[name] for name in required if name in columns and columns[name] not in row}
    if missing:
        return frozenset(), (_missing(list(missing.values()), row), _hint(missing, row))
    if not layout.names_clips and columns["utterance_id"] in row:
        return frozenset(), (f"{columns['utterance_id']!r} is a field of this row and not of others", None)
    if layout.group_by and layout.group_by not in row:
        near = difflib.get_close_matches(layout.group_by, row, 1, 0.6)
        hint = f"did you mean {near[0]!r}?" if near else "--group-by names a column of the transcripts"
        return frozenset(), (_missing([layout.group_by], row), hint)
    others = [columns[name] for name in OPTIONAL_FIELDS if name in columns]
    others += ["utterance_id"] * (not layout.names_clips)
    for column in sorted(ignored):
        near = difflib.get_close_matches(column, others, 1, 0.75)
        if near and near[0] not in row:
            return frozenset(), (f"unknown field {column!r}", f"did you mean {near[0]!r}?")
    return frozenset(map(printable, ignored)), None


def _missing(columns: Sequence[str], row: Sequence[str]) -> str:
    named = " and ".join(map(repr, columns))
    lacking = f"field {named} is" if len(columns) == 1 else f"fields {named} are"
    return f"{lacking} missing; the row has: {_enumerate(row)}"


def _enumerate(columns: Sequence[str]) -> str:
    return ", ".join(columns[:SHOWN]) + (f" and {len(columns) - SHOWN:,} more" if len(columns) > SHOWN else "")


def _hint(missing: Mapping[str, str], row: Sequence[str]) -> str:
    """What to do where the columns of some fields are missing."""
    track = next((track for track, label in TRACKS.items() if label in row), None)
    if missing.get("text") in TRACKS.values() and track:
        rest = {name: missing[name] for name in missing if name != "text"}
        return f"--track {track} takes these labels" + (f"; {_hint(rest, row)}" if rest else "")
    near = {name: _near(name, column, row) for name, column in missing.items()}
    blank = next((found for found in near.values() if found != found.strip()), None)
    if blank:  # as no option can say it
        return f"take the blanks off {blank!r}"
    options = ",".join(f"{name}={found or 'COLUMN'}" for name, found in near.items())
    (name, column), *others = missing.items()
    if others or not near[name]:
        return f"--columns says which is which: {options}"
    renamed = column in (name, *TRACKS.values())
    return (f"rename {near[name]!r} to {column!r}, or say " if renamed else "did you mean ") + f"--columns {options}"


def _near(name: str, column: str, row: Sequence[str]) -> str:
    """The column that may be meant, if there is one."""
    return next(iter(difflib.get_close_matches(column, row, 1, 0.6) or {name} & set(row)), "")


@dataclass(frozen=True, eq=False)
class Source:
    """One corpus as the user has it."""

    layout: Layout
    text: bytes  # JSON Lines
    starts: npt.NDArray[np.int64]  # (rows,) where each row's line begins
    ends: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]  # of the lines in the user's file, from 1

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, row: int) -> bytes:
        return self.text[self.starts[row] : self.ends[row]]


def read_sources(locations: Sequence[Path], reading: ManifestOptions) -> list[Source]:
    """Read every source. Raises ManifestError where one cannot be read."""
    return [read_source(location, reading) for location in locations]


def read_source(location: Path, reading: ManifestOptions) -> Source:
    """A folder with its transcripts and audio, or the transcripts file itself. Raises ManifestError."""
    if location.is_file() and is_audio(location.name):
        raise ManifestError(f"{location}: is audio: a source is the table that names it", MAKE_TABLE)
    transcripts = location if location.is_file() else _find_transcripts(location, reading.track)
    folder, table = transcripts.parent, is_table(transcripts)
    common_voice = table and (folder / "clips").is_dir() and not (folder / AUDIO_FOLDER).is_dir()
    theirs = {"text": TRACKS[reading.track]} | (COMMON_VOICE if common_voice else {}) | dict(reading.columns)
    columns = {name: theirs.get(name, name) for name in reading.fields}
    lines = read_lines(transcripts, [columns[name] for name in NUMBER_FIELDS if name in columns])
    if not len(lines.starts):
        kind = "one row below a header" if table else "one JSON object per line"
        raise ManifestError(f"{transcripts}: the file has no rows", f"{kind} is expected")
    root = os.path.abspath(reading.audio_root) if reading.audio_root else ""
    if root and not os.path.isdir(root):
        raise ManifestError(f"--audio-root {reading.audio_root}: there is no such folder")
    layout = Layout(
        corpus=canonical_name(printable(folder.resolve().name)),
        transcripts=str(transcripts),
        audio=AudioRoot(root or str(folder)),
        columns=tuple(columns.items()),
        group_by=reading.group_by,
        names_clips=True,
        absolute=tuple(os.path.join(path, "") for path in (root, os.path.realpath(root))) if root else (),
    )
    return _check_rows(Source(layout, lines.text, lines.starts, lines.ends, lines.numbers), reading)


def _check_rows(source: Source, reading: ManifestOptions) -> Source:
    """Find out by some rows spread over the file where the audio is, and whether clips have names; a wrong file too."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED_ROWS).astype(int))
    rows = [(source.line(row), int(source.numbers[row])) for row in chosen]
    transcripts, folder = source.layout.transcripts, source.layout.audio.path
    seen = frozenset().union(*(read_row(*row, transcripts) for row in rows))
    names_clips = "utterance_id" in reading.columns or "utterance_id" in seen
    layout = replace(source.layout, names_clips=names_clips)
    paths = [layout.locate(*row)[1] for row in rows]
    for name, column in reading.columns.items():
        if name in reading.fields and column not in seen:
            raise ManifestError(
                f"{transcripts}: --columns {name}={column}: there is no such column",
                f"there are: {_enumerate(sorted(seen))}",
            )
    if all(path.startswith("/") for path in paths):
        common = os.path.commonpath(map(os.path.dirname, paths))
        elsewhere = f", and not below --audio-root {reading.audio_root}" if reading.audio_root else ""
        raise ManifestError(
            f"{transcripts}: audio paths are absolute, such as {paths[0]!r}{elsewhere}",
            f"--audio-root DIR takes those that lie below DIR, such as {common}",
        )
    try:
        audio = find_audio(Path(folder), paths, reading.follow_links)
    except ManifestError:
        slashed = [path.replace("\\", "/") for path in paths]
        if slashed == paths:
            raise
        audio, layout = find_audio(Path(folder), slashed, reading.follow_links), replace(layout, backslashes=True)
    return replace(source, layout=replace(layout, audio=audio))


def parse_columns(text: str) -> dict[str, str]:
    """`audio_path=path,text=sentence` → {"audio_path": "path", "text": "sentence"}. Raises ManifestError."""
    fields = REQUIRED_FIELDS + OPTIONAL_FIELDS
    columns = {}
    for pair in filter(None, text.split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if name not in fields or not equals or not column:
            near = difflib.get_close_matches(name, fields, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(fields)}"
            raise ManifestError(f"--columns: {pair!r}: FIELD=COLUMN is expected", hint)
        columns[name] = column
    return columns


def _find_transcripts(folder: Path, track: str) -> Path:
    if not folder.is_dir():
        raise ManifestError(
            f"{folder}: there is no such folder or file",
            "give a folder with a transcripts JSONL, CSV or TSV, or that file itself",
        )
    kind = {"phonetic": "phon", "word": "word"}[track]
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found: list[Path] = []
    for pattern in (rf"{kind}_transcripts\.jsonl", r"\.jsonl", r"^validated\.tsv", r"\.[ct]sv"):
        found = found or [path for path in files if re.search(rf"(?i){pattern}(\.gz|\.zst)?$", path.name)]
    if not found:
        raise _no_table(folder)
    if len(found) > 1:
        seen = ", ".join(path.name for path in found)
        hint = "name the file itself instead of its folder"
        raise ManifestError(f"{folder}: one table of transcripts is expected, found: {seen}", hint)
    return found[0]


def _no_table(folder: Path) -> ManifestError:
    """Tell what there is instead of a table, and where one is or how to make one."""
    files = list(walk_files(str(folder), follow_links=False))
    recordings = counted(sum(map(is_audio, files)), "audio file")
    said = f"{folder}: no table (JSONL, CSV or TSV) in this folder; in and below it {recordings}"
    below = sorted({os.path.dirname(path) for path in files if TABLE_NAME.search(path)})
    if not below:
        return ManifestError(said, MAKE_TABLE)
    more = f" and {len(below) - SHOWN:,} more" if len(below) > SHOWN else ""
    return ManifestError(said, f"did you mean {' '.join(map(shlex.quote, below[:SHOWN]))}{more}?")


def read_row(line: bytes, number: int, transcripts: str) -> dict[str, Any]:
    """Read one line of a transcripts file. Raises ManifestError with its place."""
    try:
        return parse_row(line)
    except DocumentError as error:
        hint = "one JSON object per line is expected, in UTF-8"
        raise ManifestError(f"{transcripts}:{number}: {error}", hint) from error


def text_of(value: Any, column: str, where: str) -> str:
    """Return the text of a cell, "" if there is none. Raises ManifestError."""
    if value is not None and not isinstance(value, str):
        raise ManifestError(f"{where}: {column!r} is {_short(value)}, a string is expected")
    if value and not value.isprintable() and UNPRINTABLE.search(value):
        raise ManifestError(f"{where}: {column!r} is {_short(value)}, which holds NUL or half a character")
    return value or ""


def _number(value: Any, column: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_NUMBER:
        raise ManifestError(f"{where}: {column!r} is {_short(value)}, a number of 0 or more is expected", NUMBER_HINT)
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def printable(text: str) -> str:
    """On one line, with what no terminal and no UTF-8 file should hold spelt out: files may have any name."""
    return "".join(symbol if symbol.isprintable() else symbol.encode("unicode_escape").decode() for symbol in text)
