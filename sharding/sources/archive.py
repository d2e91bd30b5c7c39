"""Open the bytes of a clip: a file, a member of a zip, a row of parquet. None is trusted; refusals have a reason."""

import functools
import io
import os
import re
import socket
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.errors import AudioError, ManifestError
from sharding.files.names import nfc
from sharding.sources.parquet import AUDIO_IN_ROW, AudioColumn

AUDIO_FOLDER = "audio"
ARCHIVE = "audio.zip"
MISSING = "audio file is missing"
OUTSIDE = "audio_path leads outside its folder"
ABSOLUTE = f"{OUTSIDE}: --audio-root DIR accepts absolute paths below DIR"
LINKED_OUTSIDE = "audio file is a link that leads outside its folder: --follow-links reads it"
LINKED_NOWHERE = "audio file is a link that leads nowhere"

# Limits against zip bombs: members that unpack to far more than audio could have been compressed by.
MAX_MEMBER_BYTES = 2**31
MAX_FILE_BYTES = 2**32  # above the size of the longest recording that is accepted
MAX_UNPACKING = 100
UTF8_NAME = 0x800  # flag of a zip member; without it, zipfile decodes the name as code page 437
SMALL_BYTES = 2**26  # accepted at any ratio: digital silence compresses a thousandfold


@dataclass(frozen=True, slots=True)
class AudioRoot:
    """Hold what the audio paths of a source are relative to."""

    path: str  # a folder or a zip
    below: str = AUDIO_FOLDER  # the folder in it that is searched for orphans
    given_path: str = ""  # prefix of the audio paths …
    packed: str = ""  # … in whose place the members of the zip have this one
    follow_links: bool = False  # even out of the folder
    unpacked: str = ""  # a folder for row groups of parquet files, to read single rows of them; empty: memory


@contextmanager
def open_audio(root: AudioRoot, audio_path: str) -> Iterator[tuple[IO[bytes], int]]:
    """Yield a clip as a seekable file and its size in bytes. Raises AudioError if it must not or cannot be read."""
    if _leads_outside(audio_path):
        raise AudioError(ABSOLUTE if audio_path.startswith("/") else OUTSIDE)
    try:
        opened = (_open_row if ".parquet:" in audio_path else _open_by_any_form)(root, audio_path)
        with opened[0]:
            yield opened
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        _check_presence(root)
        dangling = not _is_archive(root.path) and os.path.islink(f"{root.path}/{audio_path}")
        raise AudioError(LINKED_NOWHERE if dangling else MISSING) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted
        reason = getattr(error, "strerror", None) or str(error) or "cut off"
        raise AudioError(f"audio file cannot be read: {reason}") from error


def find_audio(folder: Path, audio_paths: Sequence[str], follow_links: bool = False) -> AudioRoot:
    """Return where the clips of a corpus are, by some of its audio paths: its folder, audio/, clips/ or audio.zip.

    Raises ManifestError if none of them is there, or if all are links that lead outside and must not be followed.
    """
    inside = [_file_of(path) for path in audio_paths if not _leads_outside(path)]
    for below in ("", AUDIO_FOLDER, "clips"):
        directory = str(folder / below)
        existing = [match for path in inside for match in _spell_on_disk(directory, path)[:1]]
        if existing:
            if not follow_links and all(_links_outside(directory, path) for path in existing):
                raise ManifestError(
                    f"{directory}: all {len(existing):,} audio files checked are links that lead outside this folder, "
                    f"such as {existing[0]!r} to {os.path.realpath(f'{directory}/{existing[0]}')!r}",
                    "--follow-links reads them, if you trust whoever made the links",
                )
            tops = {_plain(path).rpartition("/")[0].partition("/")[0] for path in existing}
            return AudioRoot(directory, tops.pop() if len(tops) == 1 else "", follow_links=follow_links)
    zip_note = ""
    if (folder / ARCHIVE).is_file():
        members = _read_members(str(folder / ARCHIVE))
        prefixes = _find_prefixes(members, inside)
        if prefixes:
            return AudioRoot(str(folder / ARCHIVE), "", *prefixes)
        zip_note = f"; {ARCHIVE} has {next(iter(members), 'no files')}"
    raise ManifestError(
        f"{folder}: there is no audio: none of {len(audio_paths):,} audio paths checked, such as {audio_paths[0]!r},"
        f" is in this folder, its {AUDIO_FOLDER}/, clips/ or {ARCHIVE}{zip_note}",
        "audio paths are relative to the folder of their transcripts file",
    )


def is_audio(name: str) -> bool:
    """Return whether a file is a recording, by its name; macOS stores its metadata of the file x in `._x`."""
    return name.lower().endswith(AUDIO_SUFFIXES) and "/._" not in f"/{name}"


def list_audio(root: AudioRoot) -> list[str]:
    """Return every audio file of a zip, or below `root.below`, in the form of an audio_path."""
    return list(filter(is_audio, list_files(root)))


def list_files(root: AudioRoot) -> list[str]:
    """Return every file of a zip, or below `root.below`, in the form of an audio_path."""
    if _is_archive(root.path):
        length = len(root.packed)
        names = [root.given_path + name[length:] if name.startswith(root.packed) else name
                 for name in _read_members(root.path)]  # fmt: skip
    else:
        _check_presence(root)
        start = os.path.join(root.path, "")
        files = walk_files(os.path.join(root.path, root.below), root.follow_links)
        names = [path.removeprefix(start) for path in files]
    return sorted(name.encode("utf-8", "backslashreplace").decode() for name in names)  # Linux allows any bytes


def walk_files(top: str, follow_links: bool) -> Iterator[str]:
    """Yield the path of every file below a folder, each folder once even if several links lead to it."""
    visited: set[str] = set()
    for folder, below, files in os.walk(top, followlinks=follow_links):
        real = os.path.realpath(folder)
        if real in visited:  # such as through a link to a parent folder
            below.clear()
            continue
        visited.add(real)
        yield from (os.path.join(folder, name) for name in files)


def actual_path(root: AudioRoot, audio_path: str) -> str:
    """Return an audio path as `list_audio` spells it: the file may have its name in another Unicode form."""
    matches = [] if audio_path.isascii() or _leads_outside(audio_path) else _spell(root, audio_path)
    return matches[0] if len(matches) == 1 else audio_path


def _check_presence(root: AudioRoot) -> None:
    """Raise ManifestError if a whole source is missing, which is not the fault of its clips."""
    if not os.path.exists(root.path):
        raise ManifestError(
            f"{root.path}: does not exist on {socket.gethostname()}", "all machines need the sources all the time"
        )


def _leads_outside(audio_path: str) -> bool:
    return audio_path.startswith("/") or "\\" in audio_path or (".." in audio_path and ".." in audio_path.split("/"))


@functools.cache
def _is_archive(root: str) -> bool:
    return os.path.isfile(root)


@functools.cache
def _real(root: str) -> tuple[str, str]:
    """Return the real path of a folder and of its audio/, which its owner may have linked to a larger disk."""
    return os.path.join(os.path.realpath(root), ""), os.path.join(os.path.realpath(f"{root}/{AUDIO_FOLDER}"), "")


def _links_outside(folder: str, path: str) -> bool:
    return not os.path.realpath(f"{folder}/{path}").startswith(_real(folder))


def _open_by_any_form(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    """Open the file with exactly this name, else with another Unicode form of it, as on a Mac's disk or in its zip."""
    opener = _open_member if _is_archive(root.path) else _open_file
    try:
        return opener(root, path)
    except (FileNotFoundError, NotADirectoryError, KeyError):
        matches = _spell(root, path)
        if len(matches) > 1:
            listed = ", ".join(map(ascii, matches))
            raise AudioError(f"audio_path matches several files that differ only in Unicode form: {listed}") from None
        if matches in ([], [path]):
            raise
        return opener(root, matches[0])


def _spell(root: AudioRoot, path: str) -> list[str]:
    return _spell_in_zip(root, path) if _is_archive(root.path) else _spell_on_disk(root.path, path)


def _spell_on_disk(folder: str, path: str) -> list[str]:
    """Return the existing paths that match `path`: the exact one, else all canonically equivalent ones in Unicode."""
    if os.path.lexists(f"{folder}/{path}"):
        return [path]
    matches = [""]
    for part in path.split("/"):
        matches = [f"{above}{name}/" for above in matches for name in _spell_name(f"{folder}/{above}", part)]
    return [path[:-1] for path in matches]


def _spell_name(folder: str, name: str) -> list[str]:
    if os.path.lexists(folder + name):
        return [name]
    form = nfc(name)
    return [other for other in (form, *_decomposed(folder).get(form, ())) if os.path.lexists(folder + other)]


@functools.cache
def _decomposed(place: str) -> Mapping[str, list[str]]:
    """Return the names in a folder or a zip that are not in NFC, by their NFC form."""
    names: dict[str, list[str]] = {}
    with suppress(OSError):  # no folder, no names
        for name in _read_members(place) if _is_archive(place) else os.listdir(place):
            if (form := nfc(name)) != name:
                names.setdefault(form, []).append(name)
    return names


def _open_file(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    """Open a file, then check what was opened: it cannot be swapped in between, and the path is walked only once."""
    descriptor, size = _open_regular(root, path)
    if size > MAX_FILE_BYTES:
        os.close(descriptor)
        raise AudioError(f"audio file is {size} bytes, at most {MAX_FILE_BYTES} are accepted")
    return os.fdopen(descriptor, "rb", buffering=0), size


def _open_regular(root: AudioRoot, path: str) -> tuple[int, int]:
    descriptor = os.open(f"{root.path}/{path}", os.O_RDONLY | os.O_NONBLOCK)  # else opening a pipe blocks forever
    try:
        if not root.follow_links and not os.readlink(f"/proc/self/fd/{descriptor}").startswith(_real(root.path)):
            raise AudioError(LINKED_OUTSIDE)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AudioError("audio_path is not a file")
        return descriptor, status.st_size
    except AudioError:
        os.close(descriptor)
        raise


def _file_of(path: str) -> str:
    """Return the file that an audio path leads to: a parquet file, if it names a row of one."""
    match = AUDIO_IN_ROW.fullmatch(path)
    return match[1] if match else path


def _open_row(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    match = AUDIO_IN_ROW.fullmatch(path)
    if match is None or _is_archive(root.path):
        return _open_by_any_form(root, path)
    audio = _open_column(root, match[1], match[2]).read(int(match[3]), root.unpacked)
    return io.BytesIO(audio), len(audio)


@functools.lru_cache(maxsize=64)
def _open_column(root: AudioRoot, path: str, column: str) -> AudioColumn:
    descriptor, _ = _open_regular(root, path)
    return AudioColumn((root.path, path, column), os.fdopen(descriptor, "rb", buffering=0), column)


@functools.cache
def _open_archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # the directory is read once per process


@functools.cache
def _read_members(path: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files in a zip by name, with slashes if a tool wrote backslashes. Raises ManifestError."""
    try:
        infos = _open_archive(path).infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path}: not a readable zip: {error}") from error
    return {_plain(_member_name(info).replace("\\", "/")): info for info in infos if not info.is_dir()}


def _member_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name, which macOS and others write in UTF-8 without setting its flag."""
    try:
        return info.filename if info.flag_bits & UTF8_NAME else info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _plain(path: str) -> str:
    return str(PurePosixPath(path))  # without "." and "//"


def _find_prefixes(members: Mapping[str, zipfile.ZipInfo], audio_paths: Sequence[str]) -> tuple[str, str] | None:
    """Return the prefix of the audio paths and the one that members have instead; ("", "") if they are the same.

    A zip may lack its audio/, or have a folder more on top. Returns the pair that fits most paths, None if none fits.
    """
    paths = [_plain(path) for path in audio_paths]
    forms = {nfc(name) for name in members}
    if any(nfc(path) in forms for path in paths):
        return "", ""
    fits: Counter[tuple[str, str]] = Counter()
    by_file = {nfc(path).rpartition("/")[2]: path for path in paths}
    for name in members:
        path = by_file.get(nfc(name).rpartition("/")[2])
        if path and nfc(name).endswith(f"/{nfc(path)}"):
            fits["", name.rsplit("/", path.count("/") + 1)[0] + "/"] += 1
    for path in paths:
        tails = [path[slash.end() :] for slash in re.finditer("/", path)]  # the longest first
        found = next((tail for tail in tails if nfc(tail) in forms), None)
        if found:
            fits[path.removesuffix(found), ""] += 1
    return fits.most_common(1)[0][0] if fits else None


def _spell_in_zip(root: AudioRoot, path: str) -> list[str]:
    """Return the members of a zip that match `path`, in any Unicode form, each in the form of an audio_path."""
    members, prefix, form = _read_members(root.path), nfc(root.given_path), nfc(_plain(path))
    exact_name = root.packed + _plain(path).removeprefix(root.given_path)
    wanted = nfc(root.packed) + form.removeprefix(prefix)
    candidates = [exact_name] if exact_name in members else [wanted, *_decomposed(root.path).get(wanted, ())]
    matches = [name for name in candidates if name in members and name.startswith(root.packed)]
    return [root.given_path + name.removeprefix(root.packed) for name in matches if form.startswith(prefix)]


def _open_member(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    name = _plain(path)
    if not name.startswith(root.given_path):
        raise KeyError(name)
    member = _read_members(root.path)[root.packed + name.removeprefix(root.given_path)]
    if member.file_size > min(MAX_MEMBER_BYTES, max(SMALL_BYTES, MAX_UNPACKING * member.compress_size)):
        raise AudioError(f"zip member of {member.compress_size} bytes would unpack to {member.file_size}")
    try:
        return _Member(_open_archive(root.path).open(member), member.file_size), member.file_size
    except ValueError as error:  # the name in its header is not UTF-8, or the header lies before the zip's start
        raise zipfile.BadZipFile(str(error)) from error


class _Member(io.BytesIO):
    """Read a zip member, unpacking it no further than it is read: reading a header costs only a header."""

    def __init__(self, packed: IO[bytes], size: int) -> None:
        super().__init__()
        self.size = size
        self._packed, self._position = packed, 0

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.size if size is None or size < 0 else min(self._position + size, self.size)
        unpacked = super().seek(0, os.SEEK_END)
        if end > unpacked:
            super().write(self._packed.read(end - unpacked))  # zipfile checks the CRC at the member's end
        super().seek(self._position)
        data = super().read(max(0, end - self._position))
        self._position += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        chunk = self.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = min(max(0, start + offset), self.size)
        return self._position

    def tell(self) -> int:
        return self._position
