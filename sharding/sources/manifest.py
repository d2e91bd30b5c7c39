"""Read a transcripts file and the audio that it names: rows in the user's form, and each row as an `Utterance`.

A corpus may have a hundred million rows, so they stay lines of JSON, as on disk; workers parse them, a few hundred at
a time, when they are needed.
"""

import difflib
import functools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sharding.errors import ManifestError, counted
from sharding.files.names import canonical_name, canonical_speaker, name_of
from sharding.labels.profiles import profile_of
from sharding.sources import common_voice
from sharding.sources.archive import AUDIO_FOLDER, AudioRoot, find_audio, is_audio, walk_files
from sharding.sources.layouts import CorpusLayout, find_layout
from sharding.sources.options import NAME_FIELDS, NUMBER_FIELDS, OPTIONAL_FIELDS, REQUIRED_FIELDS, ManifestOptions
from sharding.sources.tables import TABLE_NAME, Lines, is_table, pack_rows, read_lines, read_row

UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # lone surrogates, which JSON can express and UTF-8 cannot
MAKE_TABLE = (
    "make a CSV with the columns audio_path, phonetic_text and child_id; the README "
    "shows how to make it from one label file per recording"
)
SAMPLED_ROWS = 256  # rows of a file that are checked before the build starts
SHOWN = 20  # columns in a message
NUMBER_HINT = "use a decimal point, or leave the column out: audio is measured"
MAX_NUMBER = 2**53  # beyond it a float cannot represent every integer
LABEL_COLUMNS = {  # column → the profile of its labels, if none is named; the first that a table has counts
    "phonetic_text": "pasketti",
    "orthographic_text": "english",
    **dict.fromkeys(("text", "sentence", "transcription", "transcript"), "text"),
}
COMMON_WORDS = ("split", "offset_sec", "duration_sec")  # near to names that columns of others may have


TimedWord = tuple[str, float, float]  # a word, its start and its end in seconds


class Utterance(NamedTuple):
    """Hold a row of a transcripts file. Absent optional fields are empty or None."""

    utterance_id: str
    child_id: str
    session_id: str
    group: str  # value in the column that --group-by names
    corpus: str  # the name of the source folder, and of a part of it that is scored by itself
    audio_path: str  # relative to the source's audio root
    duration_sec: float | None  # as declared; the measured duration takes precedence, but for a range
    age_bucket: str
    md5_hash: str
    filesize_bytes: int | None
    text: str  # as written, not yet normalised
    split: str = ""  # as published
    offset_sec: float | None = None  # where the clip begins in its audio file, of which it is a range
    words: tuple[TimedWord, ...] = ()  # of its label, if the corpus has their times

    @property
    def identity(self) -> tuple[object, ...]:
        """Return all values, for digests: without words, if there are none, so that older digests stay."""
        return tuple(self) if self.words else tuple(self)[:-1]

    @property
    def speaker(self) -> str:
        """Return the speaker of a clip as far as known: the group, the child, the session, else the clip itself.

        A range of a recording stands for all of it.
        """
        recording = self.audio_path if self.offset_sec is not None else ""
        return self.group or self.child_id or self.session_id or recording or canonical_name(self.utterance_id)


class Located(NamedTuple):
    """Hold the id of a clip, and its audio: a file, or a range of it."""

    utterance_id: str
    audio_path: str
    offset_sec: float | None
    duration_sec: float | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Describe how to read the rows of a source; small, because it travels with them to the workers."""

    corpus: str
    transcripts: str  # for messages: the file, or the folder of a corpus layout
    audio: AudioRoot
    columns: tuple[tuple[str, str], ...]  # (our field, their column) of every field that is read
    group_by: str
    names_clips: bool  # False: the transcripts have no ids, so the audio path is used
    absolute: tuple[str, ...] = ()  # prefixes that are removed from absolute audio paths: the folder's own
    backslashes: bool = False  # audio paths have them instead of slashes, as on Windows
    profile: str = "text"  # the usual one of its labels
    name: str = ""  # of the corpus layout that its rows were read from; empty: a table of transcripts
    has_words: bool = False  # its rows have words with their times
    left_out: str = ""  # a pattern of audio that it leaves out on purpose

    def unpacking(self, folder: str) -> "Layout":
        """Return the layout with row groups of parquet files unpacked to a folder when they are first read."""
        return replace(self, audio=replace(self.audio, unpacked=folder))

    def parse(self, line: bytes, place: str) -> tuple[Utterance, frozenset[str]]:
        """Return a row as an `Utterance`, and its unused columns. Raises ManifestError with the row's place."""
        row, text, ignored = self.read(line, place)
        group = row.get(self.group_by)
        group = str(group) if isinstance(group, bool) else name_of(group)
        numbers = self._read_numbers(row, place)
        size = numbers["filesize_bytes"]
        utterance = Utterance(
            utterance_id=text["utterance_id"],
            child_id=canonical_speaker(text["child_id"]),
            session_id=canonical_speaker(text["session_id"]),
            group=canonical_speaker(text_of(group, self.group_by, place)),
            corpus=f"{self.corpus} {text.get('subcorpus', '')}".rstrip(),
            audio_path=text["audio_path"],
            duration_sec=_duration(numbers),
            age_bucket=canonical_name(text["age_bucket"]),
            md5_hash=text["md5_hash"].lower(),
            filesize_bytes=None if size is None else int(size),
            text=text["text"],
            split=text["split"],
            offset_sec=numbers["offset_sec"],
            words=tuple((word, start, end) for word, start, end in row.get("words") or ()) if self.has_words else (),
        )
        return utterance, ignored

    def locate(self, line: bytes, place: str) -> "Located":
        """Return where the audio of a row is. Raises ManifestError with the row's place."""
        row, text, _ = self.read(line, place)
        numbers = self._read_numbers(row, place)
        return Located(text["utterance_id"], text["audio_path"], numbers["offset_sec"], _duration(numbers))

    def read(self, line: bytes, place: str) -> tuple[dict[str, Any], dict[str, str], frozenset[str]]:
        """Return a row, its text fields, and its unused columns. Raises ManifestError with the row's place."""
        row = read_row(line, place)
        ignored, fault = _check_columns(self, tuple(row))
        if fault:
            raise ManifestError(f"{place}: {fault[0]}", fault[1])
        names = {name: name_of(row.get(column)) for name, column in self.columns if name in NAME_FIELDS}
        text = {name: text_of(names.get(name, row.get(column)), column, place) for name, column in self.columns
                if name not in NUMBER_FIELDS}  # fmt: skip
        text["audio_path"] = self._relative(text["audio_path"])
        if not self.names_clips:
            column = dict(self.columns).get("offset_sec", "")
            offset = _number(row.get(column), column, place)
            begins = f"-{round(1000 * offset):08d}" if offset else ""  # ms
            text["utterance_id"] = os.path.splitext(text["audio_path"])[0] + begins
        if not text["utterance_id"] or not text["audio_path"]:
            raise ManifestError(f"{place}: 'utterance_id' and 'audio_path' must not be empty")
        return row, text, ignored

    def _read_numbers(self, row: Mapping[str, Any], place: str) -> dict[str, float | None]:
        return {name: _number(row.get(column), column, place) for name, column in self.columns if name in NUMBER_FIELDS}

    def _relative(self, audio_path: str) -> str:
        """Return an audio path with slashes, and relative to the audio root if it lies below it."""
        if self.backslashes:
            audio_path = audio_path.replace("\\", "/")
        root = next((root for root in self.absolute if audio_path.startswith(root)), "")
        return audio_path.removeprefix(root).lstrip("/") if root else audio_path


@functools.lru_cache(maxsize=256)  # the rows of a file share a few sets of columns
def _check_columns(layout: Layout, row: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, str | None] | None]:
    """Return the unused columns of a row; and, if its columns are wrong, an error message and a hint."""
    columns = dict(layout.columns)
    ignored = frozenset(row).difference(columns.values(), [layout.group_by], ["words"] * layout.has_words)
    required = REQUIRED_FIELDS if layout.names_clips else REQUIRED_FIELDS[1:]
    missing = {name: columns[name] for name in required if name in columns and columns[name] not in row}
    if missing:
        return frozenset(), (_missing(list(missing.values()), row), _hint(missing, row))
    if not layout.names_clips and columns["utterance_id"] in row:
        return frozenset(), (f"{columns['utterance_id']!r} is a field of this row but not of others", None)
    if layout.group_by and layout.group_by not in row:
        near = difflib.get_close_matches(layout.group_by, row, 1, 0.6)
        hint = f"did you mean {near[0]!r}?" if near else "--group-by names a column of the transcripts"
        return frozenset(), (_missing([layout.group_by], row), hint)
    others = [columns[name] for name in OPTIONAL_FIELDS if name in columns and name not in COMMON_WORDS]
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
    """Return the hint for a row that lacks the columns of some fields."""
    profile = next((profile for label, profile in LABEL_COLUMNS.items() if label in row), None)
    if missing.get("text") in LABEL_COLUMNS and profile:
        rest = {name: missing[name] for name in missing if name != "text"}
        return f"use --profile {profile} for these labels" + (f"; {_hint(rest, row)}" if rest else "")
    near = {name: next(iter(difflib.get_close_matches(column, row, 1, 0.6) or {name} & set(row)), "")
            for name, column in missing.items()}  # the columns that are probably meant  # fmt: skip
    blank = next((match for match in near.values() if match != match.strip()), None)
    if blank:  # --columns strips its names, so it cannot name this one
        return f"remove the blanks around {blank!r}"
    options = ",".join(f"{name}={match or 'COLUMN'}" for name, match in near.items())
    (name, column), *others = missing.items()
    if others or not near[name]:
        return f"map the columns with --columns {options}"
    renamed = column in (name, *LABEL_COLUMNS)
    return (f"rename {near[name]!r} to {column!r}, or use " if renamed else "did you mean ") + f"--columns {options}"


@dataclass(frozen=True, eq=False)
class Source(Lines):
    """Hold one corpus of the user: the lines of its transcripts, and its layout."""

    layout: Layout = field(kw_only=True)

    def parse(self, row: int) -> Utterance:
        """Return a row. Raises ManifestError with its place."""
        return self.layout.parse(self.line(row), self.place(row))[0]


def read_source(location: Path, options: ManifestOptions) -> Source:
    """Read a corpus in a layout of its own, a folder with its transcripts and audio, or the transcripts file itself.

    Raises ManifestError.
    """
    if location.is_file() and is_audio(location.name):
        raise ManifestError(f"{location}: is an audio file: a source is the table that lists it", MAKE_TABLE)
    corpus = find_layout(location)
    if options.labels == "phones" and not (corpus and corpus.has_phones):
        raise ManifestError(f"--labels phones: {location} is no corpus that has both", "leave it out, or name TIMIT")
    if corpus:
        return _read_corpus(corpus, location, options)
    transcripts = location if location.is_file() else _find_transcripts(location, options.profile)
    folder, table = transcripts.parent, is_table(transcripts)
    has_clips = table and (folder / "clips").is_dir() and not (folder / AUDIO_FOLDER).is_dir()
    renamed = (common_voice.COLUMNS if has_clips else {}) | dict(options.columns)
    lines = read_lines(transcripts, [renamed.get(name, name) for name in NUMBER_FIELDS if name in options.fields])
    if not len(lines):
        kind = "one row below a header" if table else "one JSON object per line"
        raise ManifestError(f"{transcripts}: the file has no rows", f"{kind} is expected")
    if "text" not in renamed:
        renamed["text"] = _label_column(read_row(lines.line(0), lines.place(0)), options.profile)
    columns = {name: renamed.get(name, name) for name in options.fields}
    source = _locate_audio(lines, folder, transcripts, columns, options)
    profile = LABEL_COLUMNS.get(renamed["text"], "text")
    return replace(source, layout=replace(source.layout, profile=profile))


def _read_corpus(corpus: CorpusLayout, location: Path, options: ManifestOptions) -> Source:
    """Read a corpus by the reader of its layout. Raises ManifestError."""
    renamed = {**corpus.columns, **options.columns}
    columns = {name: renamed.get(name, name) for name in (*options.fields, *corpus.fields)}
    lines = pack_rows(corpus.read(location, options))
    if not len(lines):
        raise ManifestError(f"{location}: is laid out as {corpus.name}, but has no rows")
    folder = location if location.is_dir() else location.parent
    source = _locate_audio(lines, folder, location, columns, options)
    profile = "timit39" if corpus.has_phones and options.labels == "phones" else "text"
    layout = replace(source.layout, name=corpus.name, profile=profile, left_out=corpus.left_out(options))
    return replace(source, layout=replace(layout, has_words=corpus.has_phones))


def _locate_audio(
    lines: Lines, folder: Path, transcripts: Path, columns: Mapping[str, str], options: ManifestOptions
) -> Source:
    """Return the lines as a source whose audio was found. Raises ManifestError."""
    root = os.path.abspath(options.audio_root) if options.audio_root else ""
    if root and not os.path.isdir(root):
        raise ManifestError(f"--audio-root {options.audio_root}: there is no such folder")
    layout = Layout(
        corpus=canonical_name(printable(folder.resolve().name)),
        transcripts=str(transcripts),
        audio=AudioRoot(root or str(folder)),
        columns=tuple(columns.items()),
        group_by=options.group_by,
        names_clips=True,
        absolute=tuple(os.path.join(make(root or folder), "") for make in (os.path.abspath, os.path.realpath)),
    )
    return _check_rows(Source(**vars(lines), layout=layout), options)


def _check_rows(source: Source, options: ManifestOptions) -> Source:
    """Locate the audio, detect whether clips have ids and reject a wrong file, by some rows spread over the file."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED_ROWS).astype(int))
    rows = [(source.line(row), source.place(row)) for row in chosen.tolist()]
    transcripts, folder = source.layout.transcripts, source.layout.audio.path
    present = frozenset().union(*(read_row(*row) for row in rows))
    names_clips = "utterance_id" in options.columns or "utterance_id" in present
    layout = replace(source.layout, names_clips=names_clips)
    paths = [layout.read(*row)[1]["audio_path"] for row in rows]
    for name, column in options.columns.items():
        if name in options.fields and column not in present:
            raise ManifestError(
                f"{transcripts}: --columns {name}={column}: there is no such column",
                f"the columns are: {_enumerate(sorted(present))}",
            )
    if all(path.startswith("/") for path in paths):
        common = os.path.commonpath(map(os.path.dirname, paths))
        elsewhere = f", and not below --audio-root {options.audio_root}" if options.audio_root else ""
        raise ManifestError(
            f"{transcripts}: audio paths are absolute, such as {paths[0]!r}{elsewhere}",
            f"--audio-root DIR accepts those below DIR, such as {common}",
        )
    try:
        audio = find_audio(Path(folder), paths, options.follow_links)
    except ManifestError:
        slashed = [path.replace("\\", "/") for path in paths]
        if slashed == paths:
            raise
        audio, layout = find_audio(Path(folder), slashed, options.follow_links), replace(layout, backslashes=True)
    return replace(source, layout=replace(layout, audio=audio))


def parse_columns(text: str) -> dict[str, str]:
    """Parse `audio_path=path,text=sentence` to {"audio_path": "path", "text": "sentence"}. Raises ManifestError."""
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


def _label_column(row: Mapping[str, Any], profile: str) -> str:
    """Return the column of a table's labels: that of the profile, else the first with a usual name."""
    if profile:  # never a column of another profile: its labels may pass for this one's
        wanted = [profile_of(profile).field, *(column for column, usual in LABEL_COLUMNS.items() if usual == "text")]
        wanted += ["orthographic_text"] * (wanted[0] == "text")
        wanted += ["phonetic_text"] * (wanted[0] == "text" and profile != "text")  # such as raw, or the user's own
    else:
        wanted = [*LABEL_COLUMNS]
    return next((column for column in wanted if column in row), wanted[0])


def _find_transcripts(folder: Path, profile: str) -> Path:
    if not folder.is_dir():
        raise ManifestError(
            f"{folder}: there is no such folder or file",
            "give a folder with a transcripts JSONL, CSV or TSV, or that file itself",
        )
    kind = "phon" if not profile or profile_of(profile).field == "phonetic_text" else "word"
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found: list[Path] = []
    for pattern in (rf"{kind}_transcripts\.jsonl", r"\.jsonl", r"^validated\.tsv", r"\.[ct]sv"):
        found = found or [path for path in files if re.search(rf"(?i){pattern}(\.gz|\.zst)?$", path.name)]
    if not found:
        raise _no_table(folder)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        hint = "name the file itself instead of its folder"
        raise ManifestError(f"{folder}: one table of transcripts is expected, found: {names}", hint)
    return found[0]


def _no_table(folder: Path) -> ManifestError:
    """Return the error for a folder without a table: what it contains, and where a table is or how to make one."""
    files = list(walk_files(str(folder), follow_links=False))
    recordings = counted(sum(map(is_audio, files)), "audio file")
    message = f"{folder}: no table (JSONL, CSV or TSV) in this folder; in and below it {recordings}"
    below = sorted({os.path.dirname(path) for path in files if TABLE_NAME.search(path)})
    if not below:
        return ManifestError(message, MAKE_TABLE)
    more = f" and {len(below) - SHOWN:,} more" if len(below) > SHOWN else ""
    return ManifestError(message, f"did you mean {' '.join(map(shlex.quote, below[:SHOWN]))}{more}?")


def text_of(value: Any, column: str, place: str) -> str:
    """Return the text of a cell, "" if there is none. Raises ManifestError if it is no text."""
    if value is not None and not isinstance(value, str):
        raise ManifestError(f"{place}: {column!r} is {_short(value)}, a string is expected")
    if value and not value.isprintable() and UNPRINTABLE.search(value):
        raise ManifestError(f"{place}: {column!r} is {_short(value)}, which contains NUL or a lone surrogate")
    return value or ""


def _number(value: Any, column: str, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_NUMBER:
        raise ManifestError(f"{place}: {column!r} is {_short(value)}, a number of 0 or more is expected", NUMBER_HINT)
    return float(value)


def _duration(numbers: Mapping[str, float | None]) -> float | None:
    """Return the length of a clip that its row declares, of a range under either name."""
    length = numbers["duration_sec"]
    return numbers["audio_duration_sec"] if length is None else length


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def printable(text: str) -> str:
    """Return a text with unprintable characters escaped, so on one line and valid UTF-8: files may have any name."""
    return "".join(symbol if symbol.isprintable() else symbol.encode("unicode_escape").decode() for symbol in text)
