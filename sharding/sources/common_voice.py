"""Read a locale of Common Voice: its tables of validated clips, or those of its official splits, and clips/*.mp3."""

from collections.abc import Iterator
from pathlib import Path

from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.sources.options import NUMBER_FIELDS, ManifestOptions
from sharding.sources.tables import PlacedRow, read_table

COLUMNS = {"audio_path": "path", "text": "sentence", "child_id": "client_id", "age_bucket": "age"}
OFFICIAL = ("train", "dev", "test")  # other.tsv and invalidated.tsv hold clips that nobody, or too few, confirmed
SUFFIXES = (".tsv", ".tsv.gz", ".tsv.zst")


def matches(location: Path) -> bool:
    return (location / "clips").is_dir() and any(_find(location, name) for name in (*OFFICIAL, "validated"))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield the rows of the official splits, else of all validated clips. Raises ManifestError.

    The official splits are disjoint by speaker, and have one recording of each sentence.
    """
    validated, official = _find(location, "validated"), {name: _find(location, name) for name in OFFICIAL}
    whole = official["train"] and (official["dev"] or official["test"])
    by_hash = options.splits == "hash" or not whole
    tables = {"": validated} if by_hash and validated else official
    column = options.columns.get("audio_path", COLUMNS["audio_path"])
    numbers = [theirs for ours, theirs in options.columns.items() if ours in NUMBER_FIELDS]
    for split, table in tables.items():
        for number, row in read_table(table, numbers) if table else ():
            path = row.get(column)
            if path and not path.lower().endswith(AUDIO_SUFFIXES):
                row[column] = f"{path}.mp3"  # as the first releases leave it out
            yield PlacedRow(str(table), number, {**row, "split": "" if by_hash else split})


def _find(location: Path, name: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := location / f"{name}{suffix}").is_file()), None)
