"""Read NeMo's manifests, JSON Lines with `audio_filepath`: one by itself, or a folder of several named by splits."""

import re
from collections.abc import Iterator
from pathlib import Path

from sharding.sources.options import ManifestOptions
from sharding.sources.splits import named_by_split, split_of
from sharding.sources.tables import PlacedRow, first_row, read_rows

COLUMNS = {
    "audio_path": "audio_filepath",
    "text": "text",
    "child_id": "speaker",
    "audio_duration_sec": "duration",
    "offset_sec": "offset",
}
NAME = re.compile(r"(?i)(.+?)([-_.]manifest)?\.jsonl?(\.gz|\.zst)?")  # train_manifest.json, dev_clean.json


def matches(location: Path) -> bool:
    return any("audio_filepath" in first_row(path) for path in named_by_split(location, NAME))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield the rows of each manifest. Raises ManifestError."""
    for path in named_by_split(location, NAME):
        name = NAME.sub(r"\1", path.name)
        for number, row in read_rows(path):
            yield PlacedRow(str(path), number, {"split": name if split_of(name) else "", **row})
