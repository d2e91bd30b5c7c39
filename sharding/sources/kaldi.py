"""Read Kaldi data folders: `wav.scp`, `text`, `utt2spk` and `segments`, in one folder or in several named by splits."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.errors import ManifestError
from sharding.sources.options import ManifestOptions
from sharding.sources.splits import KNOWN, split_of
from sharding.sources.tables import PlacedRow, read_text

RECORDINGS = "wav.scp"
NO_FILE = re.compile(r"\||\.ark:\d+$")  # a command whose output is the sound, or a place in an archive


def matches(location: Path) -> bool:
    return location.is_dir() and bool(_data_folders(location))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield a row per utterance, of `segments` if there is such a file, else of `wav.scp`. Raises ManifestError."""
    top = location.resolve()
    folders = _data_folders(top)
    for folder in folders:
        if folder != top and not split_of(folder.name):
            hint = f"name the data folders themselves as sources, or rename it to one of {KNOWN}"
            raise ManifestError(f"{folder}: is a data folder, but {folder.name!r} names no split", hint)
    for folder in folders:
        yield from _read_folder(folder, "" if folder == top else f"{folder.name}/")


def _data_folders(location: Path) -> list[Path]:
    if (location / RECORDINGS).is_file():
        return [location]
    return sorted(path.parent for path in location.glob(f"*/{RECORDINGS}"))


def _read_folder(folder: Path, prefix: str) -> Iterator[PlacedRow]:
    recordings = {}
    for number, name, path in _read_pairs(folder / RECORDINGS):
        if NO_FILE.search(path):
            hint = "run the commands once, with their output in WAV or FLAC files, and name these in wav.scp"
            raise ManifestError(f"{folder / RECORDINGS}:{number}: {name!r} is {path!r:.200}, not an audio file", hint)
        recordings[name] = path
    if recordings and not os.path.isfile(folder / next(iter(recordings.values()))):
        prefix = ""  # the paths are relative to the folder of the recipe, or absolute
    texts, speakers = ({name: rest for _, name, rest in _read_pairs(folder / file)} for file in ("text", "utt2spk"))
    split = folder.name if split_of(folder.name) else ""
    segments = folder / "segments"
    for number, name, rest in _read_pairs(segments if segments.is_file() else folder / RECORDINGS):
        recording, span = _parse_segment(f"{segments}:{number}", rest) if segments.is_file() else (name, {})
        if recording not in recordings:
            raise ManifestError(f"{segments}:{number}: recording {recording!r} is not in {RECORDINGS}")
        path = recordings[recording]
        row = {
            "utterance_id": name,
            "audio_path": path if path.startswith("/") else prefix + path,
            "text": texts.pop(name, ""),
            "child_id": speakers.get(name, ""),
            "split": split,
        }
        yield PlacedRow(str(segments if span else folder / RECORDINGS), number, row | span)
    for name in texts:
        raise ManifestError(f"{folder / 'text'}: utterance {name!r} has no recording, in {RECORDINGS} or segments")


def _parse_segment(place: str, rest: str) -> tuple[str, dict[str, Any]]:
    """Return the recording of a line of `segments`, and its range. Raises ManifestError."""
    cells = rest.split()
    try:
        recording, start, end = cells[0], *map(float, cells[1:])
    except (ValueError, IndexError) as error:
        hint = "a line is an utterance, its recording, its start and its end in seconds"
        raise ManifestError(f"{place}: not a segment: {rest!r:.200}", hint) from error
    if end < 0:  # -1: to the end of the recording
        return recording, {"offset_sec": start}
    return recording, {"offset_sec": start, "duration_sec": max(round(end - start, 6), 0.0)}


def _read_pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the first word and the rest of each line. Raises ManifestError if a word comes twice."""
    seen = set[str]()
    for number, line in read_text(path) if path.is_file() else ():
        name, *rest = line.split(maxsplit=1)
        if name in seen:
            raise ManifestError(f"{path}:{number}: {name!r} occurs twice")
        seen.add(name)
        yield number, name, "".join(rest)
