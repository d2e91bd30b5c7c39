"""List the layouts of corpora that are read as they were published, each by a reader of its own, found by its files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sharding.sources import common_voice, kaldi, lhotse, librispeech, nemo, parquet, timit
from sharding.sources.options import ManifestOptions
from sharding.sources.tables import PlacedRow


@dataclass(frozen=True)
class CorpusLayout:
    """Describe a layout: its name in messages and in the summary, and the two functions of its reader."""

    name: str
    matches: Callable[[Path], bool]  # whether the folder or the file that the user named is laid out like this
    read: Callable[[Path, ManifestOptions], Iterator[PlacedRow]]  # its rows; may raise ManifestError
    columns: Mapping[str, str] = field(default_factory=dict)  # our field → their column, of rows with their names
    fields: tuple[str, ...] = ()  # that its rows have beside those of all rows
    has_phones: bool = False  # --labels phones, and words with their times
    left_out: Callable[[ManifestOptions], str] = lambda options: ""  # a pattern of audio that it leaves out on purpose


LAYOUTS = (  # the first that matches is used
    CorpusLayout("Common Voice", common_voice.matches, common_voice.read, common_voice.COLUMNS),
    CorpusLayout("LibriSpeech", librispeech.matches, librispeech.read),
    CorpusLayout("Kaldi", kaldi.matches, kaldi.read),
    CorpusLayout("NeMo", nemo.matches, nemo.read, nemo.COLUMNS),
    CorpusLayout("lhotse", lhotse.matches, lhotse.read),
    CorpusLayout("TIMIT", timit.matches, timit.read, fields=("subcorpus",), has_phones=True, left_out=timit.left_out),
    CorpusLayout("parquet", parquet.matches, parquet.read),
)


def find_layout(location: Path) -> CorpusLayout | None:
    """Return the layout of a folder or file, None if it is that of a table of transcripts."""
    for layout in LAYOUTS:
        with suppress(OSError):  # such as a folder that cannot be listed: whoever reads the source names it
            if layout.matches(location):
                return layout
    return None
