"""Corpora in the layouts that they were published in."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.errors import ManifestError
from sharding.sources.manifest import Source, Utterance, read_source
from sharding.sources.options import ManifestOptions


def make_audio(path: Path, seconds: float = 1.0, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    soundfile.write(path, 0.1 * rng.standard_normal(round(seconds * rate)), rate)


def rows_of(source: Source) -> list[Utterance]:
    return [source.parse(row) for row in range(len(source))]


def make_librispeech(folder: Path) -> dict[str, str]:
    """Make a LibriSpeech of three subsets. Return the split of each clip."""
    splits = {}
    for subset, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-other", "61")):
        chapter = folder / subset / speaker / "198"
        names = [f"{speaker}-198-{number:04d}" for number in range(3)]
        for name in names:
            make_audio(chapter / f"{name}.flac")
        lines = "".join(f"{name} IT'S NUMBER {name[-1]}\n" for name in names)
        (chapter / f"{speaker}-198.trans.txt").write_text(lines)
        splits |= dict.fromkeys(names, subset.split("-")[0])
    (folder / "SPEAKERS.TXT").write_text("; id\n19 | F | train-clean-100 | 25.19 | Kara\n")
    return splits


def test_librispeech_has_its_splits_by_subset(tmp_path: Path) -> None:
    splits = make_librispeech(tmp_path / "LibriSpeech")
    source = read_source(tmp_path / "LibriSpeech", ManifestOptions())
    rows = rows_of(source)
    assert {row.utterance_id: row.split for row in rows} == splits
    assert {row.child_id for row in rows} == {"19", "84", "61"}
    assert source.layout.name == "LibriSpeech"
    assert source.place(1).endswith("dev-clean/84/198/84-198.trans.txt:2")
    one = read_source(tmp_path / "LibriSpeech" / "dev-clean", ManifestOptions())
    assert [row.audio_path for row in rows_of(one)] == [f"84/198/84-198-000{number}.flac" for number in range(3)]


def test_a_line_that_is_no_text_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    make_librispeech(tmp_path)
    (tmp_path / "dev-clean/84/198/84-198.trans.txt").write_bytes(b"84-198-0000 A\n84-198-0001 \xff\n")
    with pytest.raises(ManifestError, match=r"84-198\.trans\.txt:2: not UTF-8"):
        read_source(tmp_path, ManifestOptions())
