"""Read lhotse's cuts, JSON Lines with recordings by path: a file by itself, or a folder of several named by splits."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.errors import ManifestError
from sharding.sources.options import ManifestOptions
from sharding.sources.splits import named_by_split, split_of
from sharding.sources.tables import PlacedRow, first_row, read_rows

NAME = re.compile(r"(?i)(?:.*[-_.])?cuts[-_.](.+?)\.jsonl(\.gz|\.zst)?")  # librispeech_cuts_train-clean-5.jsonl.gz
WHOLE_SEC = 0.001  # a cut that differs from its recording by less is all of it
MAKE_FILES = "`lhotse cut trim-to-supervisions`, or cuts.save_audios(), makes cuts of single files"


def matches(location: Path) -> bool:
    return any("supervisions" in first_row(path) for path in named_by_split(location, NAME))


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield a row per supervision of each cut, and one without a text per cut that has none. Raises ManifestError."""
    for path in named_by_split(location, NAME):
        name = NAME.sub(r"\1", path.name)
        for number, cut in read_rows(path):
            try:
                rows = list(_rows_of(cut))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problem = error if isinstance(error, ValueError) else f"not a cut of a recording: {error!r:.200}"
                raise ManifestError(f"{path}:{number}: {problem}", MAKE_FILES) from error
            for row in rows:
                yield PlacedRow(str(path), number, {**row, "split": name if split_of(name) else ""})


def _rows_of(cut: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one cut. Raises ValueError, KeyError, TypeError or AttributeError if it is another thing."""
    if "tracks" in cut or "recording" not in cut:
        raise ValueError(f"cut {cut.get('id')!r:.100} is mixed of several recordings, or has none")
    recording, supervisions = cut["recording"], cut["supervisions"]
    sources = recording["sources"]
    if len(sources) != 1 or sources[0]["type"] != "file" or recording.get("transforms"):
        kinds = ", ".join(str(source["type"]) for source in sources)
        raise ValueError(f"recording {recording['id']!r:.100} is {kinds}: one file without transforms is expected")
    channels = sources[0].get("channels", [0])
    if len(channels) > 1 and not isinstance(cut.get("channel"), list):
        raise ValueError(f"cut {cut['id']!r:.100} is one of {len(channels)} channels: one file per channel is expected")
    for supervision in supervisions or [{}]:
        several = len(supervisions) > 1
        start, length = cut["start"] + several * supervision.get("start", 0.0), cut["duration"]
        length = supervision["duration"] if several else length
        whole = start == 0 and abs(length - recording["duration"]) < WHOLE_SEC
        yield {
            "utterance_id": supervision["id"] if several else cut["id"],
            "audio_path": sources[0]["source"],
            "text": supervision.get("text") or "",
            "child_id": supervision.get("speaker") or "",
            "session_id": recording["id"],
            **({"audio_duration_sec": length} if whole else {"offset_sec": start, "duration_sec": length}),
        }
