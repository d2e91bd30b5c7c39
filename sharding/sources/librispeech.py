"""Read LibriSpeech: `<subset>/<speaker>/<chapter>/` with FLAC files and a `.trans.txt`. The subset is the split.

A folder that is one subset by itself is read too, and other corpora in this layout, under any names of the subsets.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sharding.sources.options import ManifestOptions
from sharding.sources.tables import PlacedRow, read_text

SUBSET = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")


def matches(location: Path) -> bool:
    """Return whether the first speaker of some subset has a chapter: listing all of a large corpus takes minutes."""
    return any(any(_below(_below(subset)).glob("*.trans.txt")) for subset in _subsets(location))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield the rows of every chapter; a subset of another name has no split."""
    top = location.resolve()
    for transcripts in sorted(path for subset in _subsets(top) for path in subset.glob("*/*/*.trans.txt")):
        chapter = transcripts.parent
        speaker, split = chapter.parent.name, SUBSET.fullmatch(chapter.parents[1].name)
        for number, line in read_text(transcripts):
            name, _, text = line.partition(" ")
            row = {
                "utterance_id": name,
                "audio_path": f"{chapter.relative_to(top).as_posix()}/{name}.flac",
                "text": text,
                "child_id": speaker,
                "session_id": f"{speaker}-{chapter.name}",
                "split": split[1] if split else "",
            }
            yield PlacedRow(str(transcripts), number, row)


def _subsets(location: Path) -> list[Path]:
    """Return the folders of the subsets: those below with such a name, else the folder itself."""
    if not location.is_dir():
        return []
    return [path for path in location.iterdir() if SUBSET.fullmatch(path.name) and path.is_dir()] or [location]


def _below(folder: Path) -> Path:
    """Return the first folder in a folder, the folder itself if it has none."""
    with os.scandir(folder) as entries:
        others = (entry.path for entry in entries if not entry.is_file(follow_symlinks=False))
        return next((Path(path) for path in others if os.path.isdir(path)), folder)
