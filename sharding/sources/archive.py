"""Where a clip's bytes lie: in a folder or in a zip. Neither is trusted, and every refusal has a reason."""

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

AUDIO_FOLDER = "audio"
ARCHIVE = "audio.zip"
MISSING = "audio file is missing"
OUTSIDE = "audio_path leads outside its folder"
ABSOLUTE = f"{OUTSIDE}: --audio-root DIR takes absolute paths below DIR"
LINKED_OUTSIDE = "audio file is a link that leads outside its folder: --follow-links reads it"
LINKED_NOWHERE = "audio file is a link that leads nowhere"

# A zip bomb is a member that unpacks to far more than sound could shrink to.
MAX_MEMBER_BYTES = 2**31
MAX_FILE_BYTES = 2**32  # more than the longest sound that is taken has
MAX_UNPACKING = 100
UTF8_NAME = 0x800  # flag of a zip member; without it, zipfile takes the name for code page 437
SMALL_BYTES = 2**26  # harmless whatever the ratio: digital silence shrinks a thousandfold


@dataclass(frozen=True, slots=True)
class AudioRoot:
    """What the audio paths of a source are relative to."""

    path: str  # a folder, or a zip
    below: str = AUDIO_FOLDER  # the folder in there where orphans are looked for
    given_path: str = ""  # what audio paths begin with …
    packed: str = ""  # … where the members of the zip begin with this
    follow_links: bool = False  # wherever they lead


@contextmanager
def open_audio(root: AudioRoot, audio_path: str) -> Iterator[tuple[IO[bytes], int]]:
    """A clip as a seekable file with its size in bytes; AudioError where it must not or cannot be read.

    RuntimeError is what an encrypted zip member raises.
    """
    if _leads_outside(audio_path):
        raise AudioError(ABSOLUTE if audio_path.startswith("/") else OUTSIDE)
    try:
        opened = _open_by_any_form(root, audio_path)
        with opened[0]:
            yield opened
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        _check_presence(root)
        nowhere = not _is_archive(root.path) and os.path.islink(f"{root.path}/{audio_path}")
        raise AudioError(LINKED_NOWHERE if nowhere else MISSING) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "cut off"
        raise AudioError(f"audio file cannot be read: {reason}") from error


def find_audio(folder: Path, audio_paths: Sequence[str], follow_links: bool = False) -> AudioRoot:
    """Where the clips of a corpus are, told by some of its audio paths: in its folder, in audio/, clips/ or audio.zip.

    Raises ManifestError where none of them is there, or all are links that lead outside and are not to be followed.
    """
    inside = [path for path in audio_paths if not _leads_outside(path)]
    for below in ("", AUDIO_FOLDER, "clips"):
        place = str(folder / below)
        there = [spelt for path in inside for spelt in _spell_on_disk(place, path)[:1]]
        if there:
            if not follow_links and all(_links_outside(place, path) for path in there):
                raise ManifestError(
                    f"{place}: all {len(there):,} audio files looked at are links that lead outside this folder, such "
                    f"as {there[0]!r} to {os.path.realpath(f'{place}/{there[0]}')!r}",
                    "--follow-links reads them, if you trust whoever made the links",
                )
            tops = {_plain(path).rpartition("/")[0].partition("/")[0] for path in there}
            return AudioRoot(place, tops.pop() if len(tops) == 1 else "", follow_links=follow_links)
    seen = ""
    if (folder / ARCHIVE).is_file():
        members = _read_members(str(folder / ARCHIVE))
        prefixes = _find_prefixes(members, inside)
        if prefixes:
            return AudioRoot(str(folder / ARCHIVE), "", *prefixes)
        seen = f"; {ARCHIVE} has {next(iter(members), 'no files')}"
    raise ManifestError(
        f"{folder}: there is no audio: none of {len(audio_paths):,} audio paths looked at, such as {audio_paths[0]!r},"
        f" is in this folder, its {AUDIO_FOLDER}/, clips/ or {ARCHIVE}{seen}",
        "audio paths are relative to the folder of their transcripts file",
    )


def is_audio(name: str) -> bool:
    """Whether a file is a recording, by its name; those in `._x` are what macOS says about the file x."""
    return name.lower().endswith(AUDIO_SUFFIXES) and "/._" not in f"/{name}"


def list_audio(root: AudioRoot) -> list[str]:
    """Every audio file of a zip, or below a folder of `root`, as an audio_path would name it."""
    return list(filter(is_audio, list_files(root)))


def list_files(root: AudioRoot) -> list[str]:
    """The same for files of any kind."""
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
    """The path of every file below a folder, each folder once however many links lead to it."""
    seen: set[str] = set()
    for folder, below, files in os.walk(top, followlinks=follow_links):
        real = os.path.realpath(folder)
        if real in seen:  # such as by a link to a folder above
            below.clear()
            continue
        seen.add(real)
        yield from (os.path.join(folder, name) for name in files)


def actual_path(root: AudioRoot, audio_path: str) -> str:
    """An audio path as `list_audio` spells it: what is there may have its name in another Unicode form."""
    same = [] if audio_path.isascii() or _leads_outside(audio_path) else _spell(root, audio_path)
    return same[0] if len(same) == 1 else audio_path


def _check_presence(root: AudioRoot) -> None:
    """Raise ManifestError where a whole source is away, which is no fault of its clips."""
    if not os.path.exists(root.path):
        raise ManifestError(
            f"{root.path}: is not there on {socket.gethostname()}", "all machines must see the sources, all the time"
        )


def _leads_outside(audio_path: str) -> bool:
    return audio_path.startswith("/") or "\\" in audio_path or (".." in audio_path and ".." in audio_path.split("/"))


@functools.cache
def _is_archive(root: str) -> bool:
    return os.path.isfile(root)


@functools.cache
def _real(root: str) -> tuple[str, str]:
    """The real folder, and that of its audio/, which its owner may have linked to where there is room."""
    return os.path.join(os.path.realpath(root), ""), os.path.join(os.path.realpath(f"{root}/{AUDIO_FOLDER}"), "")


def _links_outside(folder: str, path: str) -> bool:
    return not os.path.realpath(f"{folder}/{path}").startswith(_real(folder))


def _open_by_any_form(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    """Open what has exactly this name, else what has it in another Unicode form, as a Mac's disk or zip may."""
    opener = _open_member if _is_archive(root.path) else _open_file
    try:
        return opener(root, path)
    except (FileNotFoundError, NotADirectoryError, KeyError):
        same = _spell(root, path)
        if len(same) > 1:
            listed = ", ".join(map(ascii, same))
            raise AudioError(f"audio_path fits several files that differ by their Unicode form: {listed}") from None
        if same in ([], [path]):
            raise
        return opener(root, same[0])


def _spell(root: AudioRoot, path: str) -> list[str]:
    return _spell_in_zip(root, path) if _is_archive(root.path) else _spell_on_disk(root.path, path)


def _spell_on_disk(folder: str, path: str) -> list[str]:
    """What is there under this path: by exactly this name, else by each that is canonically equal to it in Unicode."""
    if os.path.lexists(f"{folder}/{path}"):
        return [path]
    found = [""]
    for part in path.split("/"):
        found = [f"{above}{name}/" for above in found for name in _spell_name(f"{folder}/{above}", part)]
    return [path[:-1] for path in found]


def _spell_name(folder: str, name: str) -> list[str]:
    if os.path.lexists(folder + name):
        return [name]
    form = nfc(name)
    return [same for same in (form, *_decomposed(folder).get(form, ())) if os.path.lexists(folder + same)]


@functools.cache
def _decomposed(place: str) -> Mapping[str, list[str]]:
    """The names in a folder or a zip that are not in NFC, by that form."""
    names: dict[str, list[str]] = {}
    with suppress(OSError):  # no folder, no names
        for name in _read_members(place) if _is_archive(place) else os.listdir(place):
            if (form := nfc(name)) != name:
                names.setdefault(form, []).append(name)
    return names


def _open_file(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    """Open first, then look at what was opened: nobody can swap the file in between, and it costs one walk."""
    descriptor = os.open(f"{root.path}/{path}", os.O_RDONLY | os.O_NONBLOCK)  # else to open a pipe waits for ever
    try:
        if not root.follow_links and not os.readlink(f"/proc/self/fd/{descriptor}").startswith(_real(root.path)):
            raise AudioError(LINKED_OUTSIDE)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AudioError("audio_path is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise AudioError(f"audio file of {status.st_size} bytes")
        return os.fdopen(descriptor, "rb", buffering=0), status.st_size
    except AudioError:
        os.close(descriptor)
        raise


@functools.cache
def _open_archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # the directory is read once per process


@functools.cache
def _read_members(path: str) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names, which some tools write with backslashes. Raises ManifestError."""
    try:
        infos = _open_archive(path).infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path}: not a readable zip: {error}") from error
    return {_plain(_member_name(info).replace("\\", "/")): info for info in infos if not info.is_dir()}


def _member_name(info: zipfile.ZipInfo) -> str:
    """A member's name, which macOS and others write in UTF-8 without the flag that says so."""
    try:
        return info.filename if info.flag_bits & UTF8_NAME else info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _plain(path: str) -> str:
    return str(PurePosixPath(path))  # without "." and "//"


def _find_prefixes(members: Mapping[str, zipfile.ZipInfo], audio_paths: Sequence[str]) -> tuple[str, str] | None:
    """What audio paths begin with, and what the members begin with instead: ("", "") where they are the same.

    A zip may lack its audio/, or have a folder more above it. What fits most paths is taken; None where nothing fits.
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
    """The same for a zip, each name as an audio_path would give it."""
    members, said, form = _read_members(root.path), nfc(root.given_path), nfc(_plain(path))
    exact = root.packed + _plain(path).removeprefix(root.given_path)
    wanted = nfc(root.packed) + form.removeprefix(said)
    same = [exact] if exact in members else [wanted, *_decomposed(root.path).get(wanted, ())]
    found = [name for name in same if name in members and name.startswith(root.packed)]
    return [root.given_path + name.removeprefix(root.packed) for name in found if form.startswith(said)]


def _open_member(root: AudioRoot, path: str) -> tuple[IO[bytes], int]:
    name = _plain(path)
    if not name.startswith(root.given_path):
        raise KeyError(name)
    member = _read_members(root.path)[root.packed + name.removeprefix(root.given_path)]
    if member.file_size > min(MAX_MEMBER_BYTES, max(SMALL_BYTES, MAX_UNPACKING * member.compress_size)):
        raise AudioError(f"zip member of {member.compress_size} bytes would unpack to {member.file_size}")
    try:
        return _Member(_open_archive(root.path).open(member), member.file_size), member.file_size
    except ValueError as error:  # its header has a name that is no UTF-8, or lies before the start of the zip
        raise zipfile.BadZipFile(str(error)) from error


class _Member(io.BytesIO):
    """A zip member that unpacks no further than it is read: to look at a header costs a header."""

    def __init__(self, packed: IO[bytes], size: int) -> None:
        super().__init__()
        self.size = size
        self._packed, self._position = packed, 0

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.size if size is None or size < 0 else min(self._position + size, self.size)
        have = super().seek(0, os.SEEK_END)
        if end > have:
            super().write(self._packed.read(end - have))  # at the member's end its CRC is checked
        super().seek(self._position)
        data = super().read(max(0, end - self._position))
        self._position += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = min(max(0, start + offset), self.size)
        return self._position

    def tell(self) -> int:
        return self._position
