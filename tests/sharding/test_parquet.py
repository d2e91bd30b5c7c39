"""Datasets in parquet files, as `datasets` lays them out on disk and on the Hub."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import AudioError, ManifestError, StoreError
from sharding.sources.archive import AudioRoot, open_audio
from sharding.sources.manifest import Source, Utterance, read_source
from sharding.sources.options import ManifestOptions
from tests.tools.commands import Command
from tests.tools.shard_sets import assert_balanced, read_all, read_ledger

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Cell = dict[str, Any] | None
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def clip(number: int, seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    sound = 0.1 * np.random.default_rng(number).standard_normal(round(seconds * 16_000))
    soundfile.write(buffer, sound, 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_parquet(path: Path, audio: Sequence[Cell], kind: Any = AUDIO, name: str = "audio", **columns: Any) -> Path:
    """Write rows as `datasets` does: its features in the metadata of the schema, and groups of few rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {key: columns.pop(key) for key in ("compression", "use_dictionary", "row_group_size") if key in columns}
    columns = columns or {"sentence": [f"word {'abcdefghij'[row % 10]}" for row in range(len(audio))]}
    table = pa.table({name: pa.array(audio, kind)} | columns)
    features = {name: {"_type": "Audio"}} | {column: {"dtype": "string", "_type": "Value"} for column in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, **({"row_group_size": 3} | options))
    return path


def embedded(numbers: Sequence[int]) -> list[Cell]:
    return [{"bytes": clip(number), "path": f"{number}.flac"} for number in numbers]


def make_dataset(folder: Path, below: str = "data") -> Path:
    """Make a dataset of five clips for training in two files, and two for validation and test each."""
    parts = {"train-00000-of-00002": range(4), "train-00001-of-00002": [4], "validation-00000-of-00001": [5, 6]}
    for name, numbers in (parts | {"test-00000-of-00001": [7, 8]}).items():
        speakers = [f"speaker-{name[:2]}-{number % 2}" for number in numbers]
        write_parquet(folder / below / f"{name}.parquet", embedded(numbers), speaker_id=speakers,
                      text=[f"number {'abcdefghi'[number]}" for number in numbers])  # fmt: skip
    return folder


def rows_of(source: Source) -> list[Utterance]:
    return [source.parse(row) for row in range(len(source))]


def read_rows(location: Path, **options: Any) -> list[Utterance]:
    return rows_of(read_source(location, ManifestOptions(**options)))


def audio_of(folder: Path, row: Utterance) -> bytes:
    with open_audio(AudioRoot(str(folder)), row.audio_path) as (file, size):
        data = file.read()
    assert len(data) == size
    return data


def read_row(folder: Path, row: int, unpacked: str = "") -> bytes:
    with open_audio(AudioRoot(str(folder), unpacked=unpacked), f"a.parquet:audio:{row}") as (file, _):
        return file.read()


# --- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "data", "en"])
def test_splits_are_those_of_the_files_and_every_row_has_its_audio(tmp_path: Path, below: str) -> None:
    folder = make_dataset(tmp_path / "corpus", below)
    source = read_source(folder, ManifestOptions())
    rows = rows_of(source)
    assert source.layout.name == "parquet"
    assert Counter(row.split for row in rows) == {"train": 5, "validation": 2, "test": 2}
    assert {row.text: audio_of(folder, row) for row in rows} == {f"number {'abcdefghi'[n]}": clip(n) for n in range(9)}
    assert {row.child_id for row in rows if row.split == "test"} == {"speaker-te-0", "speaker-te-1"}
    assert len({row.utterance_id for row in rows}) == 9
    last = next(row for row in range(9) if rows[row].text == "number d")
    assert source.place(last).endswith("train-00000-of-00002.parquet:4")


def test_a_converted_branch_names_its_splits_by_folder(tmp_path: Path) -> None:
    for split, number in (("train", 0), ("partial-train", 1), ("validation", 2), ("test", 3)):
        write_parquet(tmp_path / f"default/{split}/0000.parquet", embedded([number]))
    assert [row.split for row in read_rows(tmp_path)] == ["train", "test", "train", "validation"]


def test_a_file_of_no_split_is_read_without_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "corpus/all.parquet", embedded([0, 1]))
    for location in (path, path.parent):
        assert [(row.split, row.utterance_id) for row in read_rows(location)] == [
            ("", "corpus/all/1"),
            ("", "corpus/all/2"),
        ]


def test_one_of_several_configurations_is_to_be_named(tmp_path: Path) -> None:
    make_dataset(tmp_path, "en")
    make_dataset(tmp_path, "de")
    with pytest.raises(ManifestError, match="several configurations: de, en") as caught:
        read_rows(tmp_path)
    assert caught.value.hint == f"name one of them, such as {tmp_path / 'en'}"
    assert len(read_rows(tmp_path / "en")) == 9


def test_a_table_beside_parquet_files_comes_first(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    (tmp_path / "a.wav").write_bytes(clip(0))
    (tmp_path / "a.csv").write_text("audio_path,phonetic_text\na.wav,k\n")
    assert [row.audio_path for row in read_rows(tmp_path)] == ["a.wav"]


def test_columns_of_other_names_are_chosen(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "words": ["c", "d"], "who": [1, 2], "id": ["x", "y"], "school": ["p", "q"]}
    write_parquet(tmp_path / "a.parquet", embedded([0, 1]), name="clip", **columns)
    rows = read_rows(tmp_path, columns={"text": "words", "child_id": "who", "utterance_id": "id"}, group_by="school")
    assert [(row.utterance_id, row.text, row.child_id, row.group) for row in rows] == [
        ("x", "c", "1", "p"),
        ("y", "d", "2", "q"),
    ]
    assert audio_of(tmp_path, rows[1]) == clip(1)


def test_audio_may_be_plain_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/0.flac").write_bytes(clip(0))
    write_parquet(tmp_path / "paths/a.parquet", [{"bytes": None, "path": "audio/0.flac"}, None])
    os.rename(tmp_path / "audio", tmp_path / "paths/audio")
    write_parquet(tmp_path / "bytes/a.parquet", [clip(0)], pa.binary(), "wav")
    write_parquet(tmp_path / "names/a.parquet", ["audio/0.flac"], pa.string(), "file")
    (tmp_path / "names/audio").symlink_to("../paths/audio")
    named, missing = read_rows(tmp_path / "paths")
    assert (named.audio_path, audio_of(tmp_path / "paths", named)) == ("audio/0.flac", clip(0))
    with pytest.raises(AudioError, match="row has no audio"):
        audio_of(tmp_path / "paths", missing)
    assert audio_of(tmp_path / "bytes", read_rows(tmp_path / "bytes")[0]) == clip(0)
    (row,) = read_rows(tmp_path / "names", columns={"audio_path": "file"}, follow_links=True)
    assert row.audio_path == "audio/0.flac"


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 11),
    st.sampled_from(["NONE", "SNAPPY", "ZSTD", "GZIP"]),
    st.booleans(),
)
def test_each_row_of_any_file_gives_its_own_bytes_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int | None], group: int, compression: str, dictionary: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    values = [None if number is None else bytes([number]) * (number * 5_000) for number in numbers]
    cells = [None if number == 2 else {"bytes": value, "path": "x.flac"}
             for number, value in zip(numbers, values, strict=True)]  # fmt: skip
    write_parquet(folder / "a.parquet", cells, row_group_size=group, compression=compression, use_dictionary=dictionary)
    for row, value in enumerate(values, 1):
        for unpacked in ("", str(folder / "unpacked")):
            if numbers[row - 1] in (None, 2):
                with pytest.raises(AudioError, match="row has no audio"):
                    read_row(folder, row, unpacked)
            else:
                assert read_row(folder, row, unpacked) == value


# --- builds -----------------------------------------------------------------------------------------------------


def test_a_build_is_balanced_and_keeps_the_audio(tmp_path: Path, run_sharding: Command) -> None:
    folder = make_dataset(tmp_path / "corpus")
    cells = [
        *embedded([9]),
        {"bytes": None, "path": None},
        {"bytes": b"no audio", "path": "x.wav"},
        {"bytes": b"", "path": ""},
    ]
    write_parquet(folder / "data/train-00002-of-00003.parquet", cells, text=["a", "b", "c", "d"], speaker_id=["e"] * 4)
    out = tmp_path / "out"
    done = run_sharding("build", folder, "--out", out, "--track", "word", "--workers", 2, "--max-reject-rate", 1)
    assert done.returncode == 0, done.stderr
    assert_balanced(out)
    reasons = sorted(row["reason"].partition(";")[0] for row in read_ledger(out) if row["fate"] == "rejected")
    assert reasons == [
        "audio file is empty (0 bytes)",
        "not readable as audio: Format not recognised",
        "row has no audio",
    ]
    stored = {sample.audio for _, sample in read_all(out).values()}
    assert stored == {clip(number) for number in range(10)}


# --- bad input --------------------------------------------------------------------------------------------------


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"words": ["a"]}, {}, r"0 columns may hold the labels; the columns are audio .*, words \(string\)"),
        ({"text": ["a"], "sentence": ["a"]}, {}, "2 columns may hold the labels"),
        ({"text": ["a"]}, {"columns": {"text": "words"}}, "there is no column 'words'"),
        ({"text": ["a"]}, {"columns": {"audio_path": "sound"}}, "there is no column 'sound'"),
        ({"text": [["a"]]}, {}, "column 'text' is of type list.*, text or numbers are expected"),
        ({"text": [b"a"], "audio": [1]}, {}, "column 'text' is of type binary"),
        ({"text": ["a"], "audio": [1], "other": [{"bytes": "x", "name": "y"}]}, {}, "0 columns may hold the audio"),
        ({"text": ["a"], "audio": [1], "a": [b"x"], "b": [b"x"]}, {}, "2 columns may hold the audio"),
    ],
)
def test_a_wrong_column_is_named_with_those_that_there_are(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    table = pa.table({"audio": pa.array(embedded([0]), AUDIO)} | columns)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match=said) as caught:
        read_rows(tmp_path, **options)
    assert "--columns" in str(caught.value.hint)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-20], lambda data: data[:100], lambda data: b"", lambda data: b"PAR1" + data[-100:]]
)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    damage(write_parquet(tmp_path / "a.parquet", embedded([0])), change)
    with pytest.raises(ManifestError, match=r"a\.parquet: damaged \(.*\)"):
        read_rows(tmp_path)


def test_flipped_bytes_never_give_a_traceback(tmp_path: Path) -> None:
    """Over the whole file: a page header may lie anywhere."""
    whole = write_parquet(tmp_path / "a.parquet", embedded([0, 1, 2, 3]), sentence=["a", "b", "c", "d"]).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = bytearray(whole)
        position = int(rng.integers(len(data) - 1_500, len(data))) if number % 2 else int(rng.integers(len(data)))
        data[position] ^= 1 << int(rng.integers(8))
        (folder / "a.parquet").write_bytes(data)
        with suppress(ManifestError, AudioError):
            for row in read_rows(folder):
                audio_of(folder, row)


def test_row_groups_that_fill_memory_are_refused_with_the_way_to_write_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", embedded([0, 1, 2]))
    monkeypatch.setattr("sharding.sources.parquet.MAX_GROUP_BYTES", 10_000)
    with pytest.raises(
        ManifestError, match=r"a\.parquet: a row group has 3 rows and [\d,]+ bytes, at most [\d,]+ and 10,000"
    ) as caught:
        read_rows(tmp_path)
    assert "row_group_size=100" in str(caught.value.hint)
    with pytest.raises(AudioError, match="row_group_size=100"):
        read_row(tmp_path, 1)


def test_text_that_unpacks_without_end_is_refused_in_little_memory(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 1_000_000]))
    audio = pa.array([{"bytes": b"x", "path": "x"}] * 100_000, AUDIO)
    pq.write_table(pa.table({"audio": audio, "text": text}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000  # for 100 GB of text
    with pytest.raises(ManifestError, match=r"a\.parquet:\d+: its texts unpack to more than"):
        read_rows(tmp_path)


def test_rows_of_nothing_without_end_are_refused(tmp_path: Path) -> None:
    """Two million empty rows in some kilobytes."""
    audio = pa.nulls(2_000_000, AUDIO)
    table = pa.table({"audio": audio, "text": pa.nulls(2_000_000, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match=r"a\.parquet: its [\d,]+ bytes unpack to 2,000,000 rows"):
        read_rows(tmp_path)


def test_audio_that_repeats_in_a_row_group_takes_its_memory_once(tmp_path: Path) -> None:
    """A hundred gigabytes, were each row a copy of its own."""
    audio = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array([b"x" * 1_000_000]))
    table = pa.table({"audio": pa.StructArray.from_arrays([audio], names=["bytes"])})
    pq.write_table(table, tmp_path / "a.parquet")
    for unpacked in ("", str(tmp_path / "unpacked")):
        assert read_row(tmp_path, 77_777, unpacked) == b"x" * 1_000_000
    (file,) = (tmp_path / "unpacked").iterdir()
    assert file.stat().st_size == 1_000_000 + 16 * 100_000


def test_a_damaged_row_group_is_a_fault_of_its_clips_also_if_it_is_unpacked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", embedded([0, 1, 2]), compression="NONE", use_dictionary=False)
    assert read_row(tmp_path, 2, str(tmp_path / "whole")) == clip(1)
    data = path.read_bytes()
    place = data.index(clip(0)[:64])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "a.parquet").write_bytes(data[: place - 4] + b"\xff\xff\xff\x7f" + data[place:])
    for unpacked in ("", str(damaged / "unpacked")):
        with pytest.raises(AudioError, match="parquet file is damaged"):
            read_row(damaged, 2, unpacked)
    assert not (damaged / "unpacked").exists()


def test_an_unpacked_row_group_that_was_cut_short_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", embedded([0, 1, 2]))
    read_row(tmp_path, 3, str(tmp_path / "unpacked"))
    (file,) = (tmp_path / "unpacked").iterdir()
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(StoreError, match="is cut short"):
        read_row(tmp_path, 3, str(tmp_path / "unpacked"))


def test_no_room_to_unpack_is_told_and_no_fault_of_the_clip(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", embedded([0]))
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/unpacked/.*: Not a directory"):
        read_row(tmp_path, 1, str(tmp_path / "file/unpacked"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a.parquet:audio:3", "parquet file has no row 3"),
        ("a.parquet:audio:0", "parquet file has no row 0"),
        ("a.parquet:sound:1", "parquet file is damaged"),
        ("b.parquet:audio:1", "audio file is missing"),
        ("../a.parquet:audio:1", "leads outside"),
        ("link.parquet:audio:1", "is a link that leads outside"),
    ],
)
def test_a_row_that_is_not_there_has_a_reason(tmp_path: Path, path: str, said: str) -> None:
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", embedded([0, 1]))
    write_parquet(tmp_path / "out.parquet", embedded([0]))
    (folder / "link.parquet").symlink_to("../out.parquet")
    with pytest.raises(AudioError, match=said), open_audio(AudioRoot(str(folder)), path):
        pass


def test_links_that_lead_outside_are_read_on_request(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "blobs/1234.parquet", embedded([0]))
    folder = tmp_path / "snapshots/main"
    (folder / "data").mkdir(parents=True)
    (folder / "data/train-00000-of-00001.parquet").symlink_to(path)
    with pytest.raises(ManifestError, match="is a link that leads outside") as caught:
        read_rows(folder)
    assert caught.value.hint == "--follow-links reads it"
    assert [row.split for row in read_rows(folder, follow_links=True)] == ["train"]


def test_without_pyarrow_the_package_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", embedded([0]))
    program = (
        "import sys; sys.modules['pyarrow'] = None; from sharding.cli import main; "
        f"sys.exit(main(['build', {str(tmp_path)!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "parquet files need the package pyarrow" in done.stderr
    assert "hint: pip install pyarrow" in done.stderr
    assert "Traceback" not in done.stderr
