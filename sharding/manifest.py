"""A transcripts file and the audio it speaks of become utterances; every refusal has a reason."""

import difflib
import functools
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sharding.errors import AudioError, ManifestError

UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # lone surrogates, which JSON can spell and UTF-8 cannot
MAX_NUMBER = 2**53  # beyond it a float skips whole numbers
REQUIRED_FIELDS = ("utterance_id", "audio_path", "phonetic_text")
OPTIONAL_FIELDS = ("child_id", "session_id", "audio_duration_sec", "age_bucket", "md5_hash", "filesize_bytes")
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
OUTSIDE = "audio_path leads outside its folder"

# A zip bomb is a member that unpacks to far more than sound could shrink to.
MAX_MEMBER_BYTES = 2**31
MAX_UNPACKING = 100
SMALL_BYTES = 2**26  # harmless whatever the ratio: digital silence shrinks a thousandfold


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row of a transcripts file. Absent optional fields are empty or None."""

    utterance_id: str
    child_id: str
    session_id: str
    corpus: str  # the name of the source folder
    audio_path: str  # relative to `audio_root`
    audio_root: str  # a folder, or a zip
    duration_sec: float | None  # as declared; the measured one wins
    age_bucket: str
    md5_hash: str
    filesize_bytes: int | None
    text: str  # as written, not yet normalised
    line: str  # file:line, for messages


@dataclass(frozen=True, slots=True)
class Source:
    """One corpus as the user has it."""

    corpus: str
    utterances: tuple[Utterance, ...]
    orphans: int  # audio files that no row speaks of
    ignored_fields: tuple[str, ...]  # columns that are not ours


def read_sources(locations: Sequence[Path]) -> list[Source]:
    """Read every source. Raises ManifestError where one cannot be read, or where an utterance id comes twice."""
    sources = [read_source(location) for location in locations]
    first_seen: dict[str, Utterance] = {}
    for utterance in (utterance for source in sources for utterance in source.utterances):
        earlier = first_seen.setdefault(utterance.utterance_id, utterance)
        if earlier is not utterance:
            raise ManifestError(
                f"{utterance.line}: utterance_id {utterance.utterance_id!r} was seen before, at {earlier.line}",
                "every clip needs an id of its own; rename one, or leave one of the sources out",
            )
    return sources


def read_source(location: Path) -> Source:
    """A folder with a transcripts JSONL beside `audio/` or `audio.zip`, or the JSONL itself."""
    transcripts = location if location.is_file() else _find_transcripts(location)
    folder = transcripts.parent
    archive = folder / "audio.zip"
    in_archive = archive.is_file() and not (folder / "audio").is_dir()
    root, corpus = str(archive if in_archive else folder), folder.resolve().name
    rows = list(_read_rows(transcripts))
    if not rows:
        raise ManifestError(f"{transcripts}: the file has no rows", "one JSON object per line is expected")
    utterances = tuple(_utterance(row, f"{transcripts}:{number}", corpus, root) for number, row in rows)
    known = {*REQUIRED_FIELDS, *OPTIONAL_FIELDS}
    return Source(
        corpus=corpus,
        utterances=utterances,
        orphans=_count_orphans(utterances, folder, archive if in_archive else None),
        ignored_fields=tuple(sorted({field for _, row in rows for field in row} - known)),
    )


def read_audio(utterance: Utterance) -> bytes:
    """The bytes of a clip. Raises AudioError, with the reason for the ledger, where they cannot be had."""
    with open_audio(utterance) as file:
        data = file.read()
    if not data:
        raise AudioError("audio file is empty (0 bytes)")
    return data


def size_of(utterance: Utterance) -> int | None:
    """Bytes of a clip: as declared, else as found, or None where there is no such file."""
    if utterance.filesize_bytes is not None:
        return utterance.filesize_bytes
    try:
        with open_audio(utterance) as file:
            return file.seek(0, 2)
    except AudioError:
        return None


@contextmanager
def open_audio(utterance: Utterance) -> Iterator[IO[bytes]]:
    """The clip as a seekable file, in its folder or in its zip; AudioError where it must not or cannot be read.

    RuntimeError is what an encrypted zip member and a loop of links raise.
    """
    path = PurePosixPath(utterance.audio_path)
    if path.is_absolute() or ".." in path.parts or "\\" in utterance.audio_path:
        raise AudioError(OUTSIDE)
    try:
        if Path(utterance.audio_root).is_file():
            yield io.BytesIO(_read_member(utterance.audio_root, str(path), utterance.filesize_bytes))
        else:
            with open(_find_file(Path(utterance.audio_root), path), "rb") as file:
                yield file
    except (FileNotFoundError, KeyError) as error:
        raise AudioError("audio file is missing") from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise AudioError(f"audio file cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _find_file(root: Path, path: PurePosixPath) -> Path:
    root = root.resolve()
    found = (root / path).resolve()
    if not found.is_relative_to(root):  # a link may lead outside
        raise AudioError(OUTSIDE)
    if found.exists() and not found.is_file():  # to open a pipe would wait for ever
        raise AudioError("audio_path is not a file")
    return found


@functools.cache
def _open_archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # the directory is read once per process


def _read_member(archive: str, name: str, declared: int | None) -> bytes:
    member = _open_archive(archive).getinfo(name)
    if declared not in (None, member.file_size):
        raise AudioError(f"size is {member.file_size} bytes, the manifest says {declared}")
    if member.file_size > min(MAX_MEMBER_BYTES, max(SMALL_BYTES, MAX_UNPACKING * member.compress_size)):
        raise AudioError(f"zip member of {member.compress_size} bytes would unpack to {member.file_size}")
    return _open_archive(archive).read(member)


def _find_transcripts(folder: Path) -> Path:
    if not folder.is_dir():
        raise ManifestError(f"{folder}: there is no such folder or file", "give a folder with a transcripts JSONL")
    found = sorted(folder.glob("*phon_transcripts.jsonl")) or sorted(folder.glob("*.jsonl"))
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise ManifestError(
            f"{folder}: one transcripts file is expected (*phon_transcripts.jsonl), found: {seen}",
            "name the file itself instead of its folder",
        )
    return found[0]


def _read_rows(transcripts: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(transcripts, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_row(line, f"{transcripts}:{number}")
    except OSError as error:
        raise ManifestError(f"{transcripts}: {error.strerror}") from error


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte-order mark is what Windows tools begin a file with
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON: {error}", "one JSON object per line is expected, in UTF-8") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    missing = [field for field in REQUIRED_FIELDS if field not in row]
    if missing:
        raise ManifestError(
            f"{where}: field {missing[0]!r} is missing; the row has: {', '.join(row)}", _nearest(missing[0], row)
        )
    for field in row.keys() - {*REQUIRED_FIELDS, *OPTIONAL_FIELDS}:
        near = difflib.get_close_matches(field, OPTIONAL_FIELDS, 1, 0.75)
        if near and near[0] not in row:
            raise ManifestError(f"{where}: unknown field {field!r}", f"did you mean {near[0]!r}?")
    return row


def _nearest(wanted: str, row: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(wanted, list(row), 1, 0.6)
    return f"rename {near[0]!r} to {wanted!r}" if near else None


def _utterance(row: dict[str, Any], where: str, corpus: str, root: str) -> Utterance:
    def text(field: str) -> str:
        value = row.get(field)
        if value is not None and not isinstance(value, str):
            raise ManifestError(f"{where}: {field!r} is {value!r}, a string is expected")
        if value and UNPRINTABLE.search(value):
            raise ManifestError(f"{where}: {field!r} is {value!r}, which holds NUL or half a character")
        return value or ""

    def number(field: str) -> float | None:
        value = row.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_NUMBER:
            raise ManifestError(f"{where}: {field!r} is {value!r}, a number of 0 or more is expected")
        return float(value)

    if not text("utterance_id") or not text("audio_path"):
        raise ManifestError(f"{where}: 'utterance_id' and 'audio_path' must not be empty")
    size = number("filesize_bytes")
    return Utterance(
        utterance_id=text("utterance_id"),
        child_id=text("child_id"),
        session_id=text("session_id"),
        corpus=corpus,
        audio_path=text("audio_path"),
        audio_root=root,
        duration_sec=number("audio_duration_sec"),
        age_bucket=text("age_bucket"),
        md5_hash=text("md5_hash").lower(),
        filesize_bytes=None if size is None else int(size),
        text=text("phonetic_text"),
        line=where,
    )


def _count_orphans(utterances: Iterable[Utterance], folder: Path, archive: Path | None) -> int:
    listed = {str(PurePosixPath(utterance.audio_path)) for utterance in utterances}
    if archive is not None:
        try:
            names: Iterable[str] = _open_archive(str(archive)).namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise ManifestError(f"{archive}: not a readable zip: {error}") from error
    else:
        names = (path.relative_to(folder).as_posix() for path in (folder / "audio").rglob("*"))
    return sum(name.lower().endswith(AUDIO_SUFFIXES) and name not in listed for name in names)
