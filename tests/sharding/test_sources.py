"""Sources as users have them: tables, columns of other names, Common Voice, compressed files, zips, odd names."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sharding.audio.codec import encode
from sharding.cli import main
from sharding.errors import ManifestError
from sharding.labels.pasketti import normalize_words
from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from sharding.sources.archive import AudioRoot, find_audio, open_audio
from sharding.sources.manifest import Utterance, read_source
from sharding.sources.options import ManifestOptions
from sharding.sources.tables import read_lines, read_table
from tests.tools.commands import Command
from tests.tools.corpus import MANIFEST, WORDS, Row, describe, make_corpus, read_manifest, say, write_manifest
from tests.tools.shard_sets import assert_balanced, digest_of, read_all, read_ledger, read_summary

TEXT = "kæt sæt"
KIDS = Path(__file__).parents[3] / "shared/corpora/kids_a"
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Build, expect a refusal in one sentence that leaves nothing behind, and return it."""

    def run(*arguments: object) -> str:
        assert main(["build", *map(str, arguments), "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        said = capsys.readouterr().err
        opening, sentence, *hint = [line for line in said.splitlines() if line and "%|" not in line]
        assert opening.startswith("building ")
        assert sentence.startswith("ManifestError: ")
        assert len(hint) <= 1
        assert all(line.startswith("hint: ") for line in hint)
        return said

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips with punctuation in their labels, some cells empty, and a file that no row speaks of."""
    folder = make_corpus(tmp_path_factory.mktemp("plain") / "meadow", clips=6, children=3, seconds=(0.3, 0.6))
    rows = read_manifest(folder)
    rows[1] |= {"phonetic_text": 'ˈkæt, "sæt"', "age_bucket": "", "filesize_bytes": None}
    rows[2] |= {"phonetic_text": '"kæt', "audio_duration_sec": None}
    (folder / "audio/nobody.flac").write_bytes(encode(say(TEXT)))
    return write_manifest(folder, rows)


@pytest.fixture(scope="module")
def plain_build(corpus: Path, run_sharding: Command) -> Path:
    return build(run_sharding, corpus, out=corpus.parent / "shards")


def build(run_sharding: Command, *arguments: object, out: Path) -> Path:
    done = run_sharding("build", *arguments, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert_balanced(out)
    return out


def all_of(out: Path) -> tuple[dict[str, str], list[Row], str]:
    """Everything that a build of the same clips must repeat, the report included."""
    return digest_of(out), read_ledger(out), (out / "report/orphans.txt").read_text()


def copy_audio(corpus: Path, folder: Path) -> Path:
    """A folder of the same name, so that its shards may be the same."""
    folder.mkdir(parents=True)
    shutil.copytree(corpus / "audio", folder / "audio")
    return folder


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows))))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(rows: Sequence[Row], path: Path) -> None:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    path.write_text("".join("\t".join("" if cell is None else str(cell) for cell in line) + "\n" for line in lines))


def rename(rows: Iterable[Row], **columns: str) -> list[Row]:
    return [{columns.get(name, name): value for name, value in row.items()} for row in rows]


def parse_all(path: Path, reading: ManifestOptions = ManifestOptions()) -> list[Utterance]:  # noqa: B008
    source = read_source(path, reading)
    return [source.parse(row) for row in range(len(source))]


# --- tables -----------------------------------------------------------------------------------------------------


def test_a_csv_makes_the_same_bytes_as_json_lines(
    corpus: Path, plain_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    """Quotes, commas and line ends within cells, a byte-order mark, and columns of other names."""
    folder = copy_audio(corpus, tmp_path / corpus.name)
    rows = [row | {"note": 'she said "no", \n\r\nand left'} for row in read_manifest(corpus)]
    names = {"audio_path": "path", "phonetic_text": "sentence", "audio_duration_sec": "length"}
    write_csv(rename(rows, **names), folder / "clips.csv")
    (folder / "clips.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "clips.csv").read_bytes())
    columns = "audio_path=path,text=sentence,audio_duration_sec=length"
    out = build(run_sharding, folder, "--profile", "pasketti", "--columns", columns, out=tmp_path / "out")
    assert all_of(out) == all_of(plain_build)
    assert read_summary(out)["ignored_fields"] == ["note"]


def test_a_tsv_takes_quotes_as_they_stand_and_makes_the_same_bytes(
    corpus: Path, plain_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    folder = copy_audio(corpus, tmp_path / corpus.name)
    write_tsv([row | {"note": '5" tall, "'} for row in read_manifest(corpus)], folder / "clips.tsv")
    assert all_of(build(run_sharding, folder, out=tmp_path / "out")) == all_of(plain_build)


def zstd_in_frames(data: bytes) -> bytes:
    """As parallel compressors write it: several frames, and some bytes in between that are to be skipped."""
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return zstandard.compress(data[:500]) + skipped + zstandard.compress(data[500:])


def zstd_in_small_frames(data: bytes) -> bytes:
    """With an empty frame first, and frames that unpack to less than a read of the packed file."""
    return b"".join(zstandard.compress(data[start : start + 900]) for start in range(-900, len(data), 900))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "x.jsonl.gz": gzip.compress,
    "x.jsonl.zst": zstandard.compress,
    "frames.jsonl.zst": zstd_in_frames,
    "small.jsonl.zst": zstd_in_small_frames,
    "members.jsonl.gz": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
}


@pytest.mark.parametrize("name", PACKERS)
def test_a_compressed_file_is_read_like_the_plain_one(name: str, corpus: Path, tmp_path: Path) -> None:
    (corpus / name).write_bytes(PACKERS[name]((corpus / MANIFEST).read_bytes()))
    assert parse_all(corpus / name) == parse_all(corpus / MANIFEST)
    (corpus / name).unlink()


@pytest.mark.parametrize("ending", ["", ".zst", ".gz", "small.zst", "frames.zst"])
@pytest.mark.parametrize("rows", [1, 100, 4_000])
def test_a_compressed_table_is_read_to_its_end(ending: str, rows: int, tmp_path: Path) -> None:
    """Letters that hardly compress, so that the packed file is read in many parts."""
    random = np.random.default_rng(rows)
    cells = [f"clip-{row};{''.join(map(chr, random.integers(97, 123, 40)))}" for row in range(rows)]
    data = "\n".join(["audio_path;text", *cells]).encode()
    pack = {"": bytes, ".zst": zstandard.compress, ".gz": gzip.compress, "small.zst": zstd_in_small_frames,
            "frames.zst": zstd_in_frames}[ending]  # fmt: skip
    path = tmp_path / f"x.csv{ending.replace('small', '').replace('frames', '')}"
    path.write_bytes(pack(data))
    read = [";".join(row.values()) for _, row in read_table(path)]
    assert read == cells
    if ending:
        path.write_bytes(pack(data)[:-5])
        with pytest.raises(ManifestError, match="damaged"):
            list(read_table(path))


def test_a_row_that_is_too_long_is_refused_in_a_table_too(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"audio_path,text\na,b\n{'a' * 3_000_000},{'b' * 3_000_000}\n")
    with pytest.raises(ManifestError, match=r"x.csv:3: a row of 6,000,\d+ bytes"):
        read_lines(path, ())


def test_a_compressed_csv_makes_the_same_bytes(
    corpus: Path, plain_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    folder = copy_audio(corpus, tmp_path / corpus.name)
    write_csv(read_manifest(corpus), folder / "clips.csv")
    (folder / "clips.csv.gz").write_bytes(gzip.compress((folder / "clips.csv").read_bytes()))
    (folder / "clips.csv").unlink()
    assert all_of(build(run_sharding, folder, out=tmp_path / "out")) == all_of(plain_build)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("kept", [0.4, 0.97, 0.999])
def test_a_compressed_file_that_is_cut_short_is_refused(name: str, kept: float, corpus: Path, tmp_path: Path) -> None:
    """Of sixty thousand rows, so that whole blocks unpack before the end is missed."""
    copy_audio(corpus, tmp_path / "copy")
    data = PACKERS[name]((corpus / MANIFEST).read_bytes() * 10_000)
    (tmp_path / "copy" / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ManifestError, match=rf"{name}: damaged .*\nhint: the copy may be incomplete"):
        read_source(tmp_path / "copy", ManifestOptions())


def test_rubbish_in_a_compressed_file_is_refused(corpus: Path, tmp_path: Path) -> None:
    copy_audio(corpus, tmp_path / "copy")
    packed = bytearray(gzip.compress((corpus / MANIFEST).read_bytes()))
    packed[60] ^= 0xFF
    for name, data in (("x.jsonl.gz", bytes(packed)), ("x.jsonl.gz", b"no gzip"), ("x.jsonl.zst", b"no zstandard")):
        (tmp_path / "copy" / name).write_bytes(data)
        with pytest.raises(ManifestError, match=f"{name}: damaged"):
            read_source(tmp_path / "copy" / name, ManifestOptions())


HEADER = "utterance_id,audio_path,phonetic_text"
GOOD = "first,audio/meadow-0000.flac,k"
ROW = f"{HEADER}\n{GOOD}\n"
BAD_TABLES: dict[str, tuple[str, str]] = {  # what is in the file, and what is said of it
    "a cell too many": (f"{ROW}b,audio/b.flac,k,k\n", ":3: not a table: the row has 4 cells, the header 3"),
    "one too many everywhere": (f"{HEADER}\na,audio/b.flac,k,k\n", ":2: not a table: the row has 4 cells"),
    "a cell too few": (f"{ROW}b,audio/b.flac\n", ":3: not a table: the row has 2 cells, the header 3"),
    "an open quote": (f'{ROW}b,"audio/b.flac,k\n{GOOD}\n', ":3: not a table: unexpected end of data"),
    "text after a quote": (f'{ROW}b,"audio/"b.flac,k\n', ":3: not a table: ',' expected after"),
    "a column twice": (f"{HEADER},audio_path\n{GOOD},x\n", ":1: not a table: column 'audio_path' occurs twice"),
    "nothing": ("", ": the file has no rows"),
    "a header alone": (f"{HEADER}\n", ": the file has no rows"),
    "no path": (f"{ROW}b,,k\n", ":3: 'utterance_id' and 'audio_path' must not be empty"),
    "NUL": (f"{ROW}b,audio/\0.flac,k\n", ":3: 'audio_path' is 'audio/\\x00.flac', which contains NUL"),
    "a misspelt column": (
        ROW.replace("audio_path", "audio_pth"),
        ":2: field 'audio_path' is missing; the row has: utterance_id, audio_pth, phonetic_text\n"
        "hint: rename 'audio_pth' to 'audio_path', or use --columns audio_path=audio_pth",
    ),
    "a misspelt id": (ROW.replace("utterance_id", "uterance_id"), "hint: did you mean 'utterance_id'?"),
    "a foreign column": (ROW.replace("audio_path", "wav"), "map the columns with --columns audio_path=COLUMN"),
    "a path twice": (
        "audio_path,phonetic_text\naudio/meadow-0000.flac,k\n\naudio/meadow-0000.wav,k\n",
        "x.csv:4: utterance_id 'audio/meadow-0000' was seen before, at ",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_is_none_is_refused_with_its_line(name: str, corpus: Path, tmp_path: Path, refuse: Refuse) -> None:
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    text, message = BAD_TABLES[name]
    table.write_text(text)
    said = refuse(table, "--workers", 1)
    assert str(table) in said
    assert message in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf8_is_refused_with_its_line(
    encoding: str, corpus: Path, tmp_path: Path, refuse: Refuse
) -> None:
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    table.write_text(f"{ROW}b,audio/b.flac,é\n", encoding)
    said = refuse(table)
    assert f"{table}:{3 if encoding == 'latin-1' else 1}: not UTF-8" in said
    assert "in Excel: save as CSV UTF-8" in said


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_a_table_of_excel_is_read_whatever_parts_its_cells_and_its_paths(delimiter: str, tmp_path: Path) -> None:
    (tmp_path / "Übung").mkdir()
    soundfile.write(tmp_path / "Übung/1.wav", np.zeros(8000), 16_000)
    rows = [["audio_path", "phonetic_text", "child_id", "Dauer; s, etwa"], ["Übung\\1.wav", TEXT, "Jörg, 5", "2,58"]]
    with open(tmp_path / "x.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    source = read_source(tmp_path / "x.csv", ManifestOptions())
    utterance = source.parse(0)
    assert (utterance.audio_path, utterance.text, utterance.child_id) == ("Übung/1.wav", TEXT, "Jörg, 5")
    with open_audio(source.layout.audio, utterance.audio_path) as (_, size):
        assert size > 0
    source = read_source(tmp_path / "x.csv", ManifestOptions(columns={"audio_duration_sec": "Dauer; s, etwa"}))
    with pytest.raises(ManifestError, match=r"(?s)'2,58', a number.*leave the column out: audio is measured"):
        source.parse(0)


def test_the_recipe_of_the_readme_makes_a_table_that_a_build_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data/raw/mine"
    (folder / "Zoë").mkdir(parents=True)
    soundfile.write(folder / "Zoë/1.wav", np.zeros(8000), 16_000)
    (folder / "Zoë/1.txt").write_text(f"{TEXT}\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "sharding/README.md").read_text("utf-8")
    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "csv.writer" in code)
    exec(recipe)
    source = read_source(folder, ManifestOptions())
    utterance = source.parse(0)
    assert (utterance.audio_path, utterance.text, utterance.child_id) == ("Zoë/1.wav", TEXT, "Zoë")


@pytest.mark.parametrize("cell", ["1s", "nan", "inf", "1e400", "-1", "0x10", "true", "9007199254740993"])
@pytest.mark.parametrize("column", ["audio_duration_sec", "size"])
def test_rubbish_in_a_number_column_is_refused_with_its_line(
    column: str, cell: str, corpus: Path, tmp_path: Path, refuse: Refuse
) -> None:
    """The line is that of the file, also after a cell with line ends in it."""
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    table.write_text(f'{HEADER},{column}\na,audio/meadow-0000.flac,"k\n\nk",\nb,audio/meadow-0001.flac,k,{cell}\n')
    said = refuse(table, "--columns", "filesize_bytes=size" if column == "size" else "")
    assert f"{table}:5: {column!r} is " in said
    assert "a number of 0 or more is expected" in said


def test_a_table_without_ids_is_named_by_its_audio(corpus: Path, tmp_path: Path) -> None:
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    table.write_text("audio_path,phonetic_text\naudio/meadow-0000.flac,k\n\naudio/meadow-0001.flac,\n\n")
    utterances = parse_all(table)
    assert [utterance.utterance_id for utterance in utterances] == ["audio/meadow-0000", "audio/meadow-0001"]
    assert [utterance.text for utterance in utterances] == ["k", ""]
    assert read_source(table, ManifestOptions()).rows["number"].tolist() == [2, 4]


def test_json_lines_without_ids_are_named_by_their_audio_like_a_table(corpus: Path, tmp_path: Path) -> None:
    folder = copy_audio(corpus, tmp_path / "corpus")
    rows = [{name: row[name] for name in row if name != "utterance_id"} for row in read_manifest(corpus)]
    write_manifest(folder, rows)
    write_csv(rows, tmp_path / "corpus" / "x.csv")
    utterances = parse_all(folder / MANIFEST)
    assert utterances[0].utterance_id == "audio/meadow-0000"
    assert [one.utterance_id for one in utterances] == [one.utterance_id for one in parse_all(folder / "x.csv")]


def test_a_row_that_alone_has_no_id_or_one_is_refused(corpus: Path, tmp_path: Path, refuse: Refuse) -> None:
    folder = copy_audio(corpus, tmp_path / "corpus")
    rows = read_manifest(corpus)
    del rows[1]["utterance_id"]
    assert ":2: field 'utterance_id' is missing" in refuse(write_manifest(folder, rows))
    bare = {name: value for name, value in rows[0].items() if name != "utterance_id"}
    rows = [bare | {"audio_path": f"audio/{number}.flac"} for number in range(600)]
    rows[1]["utterance_id"] = "x"  # not one of those that are looked at before the work
    assert ":2: 'utterance_id' is a field of this row but not of others" in refuse(
        write_manifest(folder, [*rows, bare])
    )


@pytest.mark.parametrize(("row", "said"), [
    ({"audio_filepath": "x.wav", "duration": 1.5, "text": "kæt"},
     "field 'audio_path' is missing; the row has: audio_filepath, duration, text\n"
     "hint: rename 'audio_filepath' to 'audio_path', or use --columns audio_path=audio_filepath\n"),
    ({"wav": "x.wav", "ipa": "kæt"}, "hint: map the columns with --columns audio_path=COLUMN,text=COLUMN\n"),
    ({"wav": "x.wav", "orthographic_text": "cat"},
     "hint: map the columns with --columns audio_path=COLUMN\n"),
])  # fmt: skip
def test_all_fields_that_are_missing_are_told_at_once(row: Row, said: str, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "corpus").mkdir()
    assert said in refuse(write_manifest(tmp_path / "corpus", [row]))


# --- absolute audio paths ---------------------------------------------------------------------------------------


def test_absolute_paths_below_the_audio_root_make_the_same_bytes_as_relative_ones(
    corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    """By the root's name or by the folder that it is a link to; relative ones are looked up there too."""
    folder, disk = tmp_path / "manifests" / "meadow", tmp_path / "disk"
    folder.mkdir(parents=True)
    shutil.copytree(corpus / "audio", disk / "audio")
    (tmp_path / "root").symlink_to(disk)
    rows = read_manifest(corpus)
    plain = build(run_sharding, write_manifest(copy_audio(corpus, tmp_path / "meadow"), rows), out=tmp_path / "plain")
    tops = (f"{tmp_path}/root/", f"{disk}//", "")
    rows = [row | {"audio_path": tops[number % 3] + row["audio_path"]} for number, row in enumerate(rows)]
    write_manifest(folder, rows)
    out = build(run_sharding, folder, "--audio-root", tmp_path / "root", out=tmp_path / "out")
    assert all_of(out) == all_of(plain)
    shard = next(out.glob("train/*.tar"))
    shard.write_bytes(b"")
    repairing = ("verify", out, "--audio-root", tmp_path / "root", "--repair", folder)
    assert run_sharding(*repairing).returncode == 0
    assert digest_of(out) == digest_of(plain)


def test_absolute_paths_are_refused_with_the_option_that_takes_them(
    corpus: Path, tmp_path: Path, refuse: Refuse
) -> None:
    rows = [row | {"audio_path": f"{corpus}/{row['audio_path']}"} for row in read_manifest(corpus)]
    folder = write_manifest(copy_audio(corpus, tmp_path / "corpus"), rows)
    said = f"audio paths are absolute, such as '{corpus}/audio/meadow-0000.flac'"
    hint = f"hint: --audio-root DIR accepts those below DIR, such as {corpus}/audio\n"
    assert f"{said}\n{hint}" in refuse(folder)
    assert f"{said}, and not below --audio-root {folder}\n{hint}" in refuse(folder, "--audio-root", folder)
    assert "--audio-root nowhere: there is no such folder" in refuse(folder, "--audio-root", "nowhere")


def test_no_path_escapes_the_audio_root(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "audio").mkdir(parents=True)
    (tmp_path / "root-beside").mkdir()
    shutil.copy(corpus / "audio/meadow-0000.flac", tmp_path / "root-beside" / "x.flac")
    shutil.copy(corpus / "audio/meadow-0000.flac", root / "audio" / "good.flac")
    (root / "link.flac").symlink_to(tmp_path / "root-beside" / "x.flac")
    paths = {
        f"{root}/audio/good.flac": None,
        f"{root}/../root-beside/x.flac": "audio_path leads outside its folder",
        f"{root}-beside/x.flac": "audio_path leads outside its folder: --audio-root DIR accepts",
        f"{root}/link.flac": "audio file is a link that leads outside",
    }
    row = read_manifest(corpus)[0]
    rows = [row | {"utterance_id": str(number), "audio_path": path} for number, path in enumerate(paths)]
    folder = tmp_path / "manifests"
    folder.mkdir()
    command = ["build", str(write_manifest(folder, rows)), "--audio-root", str(root), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", "1", "--max-reject-rate", "1"]) == 0
    reasons = {row["utterance_id"]: row["reason"] for row in read_ledger(tmp_path / "out")}
    for number, reason in enumerate(paths.values()):
        assert (reasons[str(number)] or "").startswith(reason or ""), reasons
        assert bool(reasons[str(number)]) == bool(reason)


# --- columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "column"), [("child_id", "speaker"), ("utterance_id", "id"), ("text", "phonetic")])
def test_a_column_that_columns_names_must_be_there(
    name: str, column: str, corpus: Path, tmp_path: Path, refuse: Refuse
) -> None:
    """Misspelt, an optional one would otherwise be taken for absent, and validation would hear everybody."""
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    table.write_text(f"{HEADER},speeker\n{GOOD},anna\n")
    for transcripts in (corpus, table):
        assert column in refuse(transcripts, "--columns", f"{name}={column}")


def test_a_hundred_thousand_columns_do_no_harm(corpus: Path, tmp_path: Path) -> None:
    table = copy_audio(corpus, tmp_path / "corpus") / "x.csv"
    names = ",".join(f"column {number}" for number in range(100_000))
    table.write_text(f"{HEADER},{names}\n{GOOD}{',7' * 100_000}\n")
    assert parse_all(table)[0].text == "k"
    table.write_text(f"{names}\n{'7,' * 99_999}7\n")
    with pytest.raises(ManifestError) as refusal:
        parse_all(table)
    assert "column 19 and 99,980 more" in refusal.value.message
    assert len(refusal.value.message) < 1000


# --- Common Voice, and words ------------------------------------------------------------------------------------

CV_COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
)
SENTENCES = ['He said "no", twice.', "Don’t stop—it's good!", '"', "Chapter 7", "Façade", "An ice-cream\u00a0please"]


def make_common_voice(folder: Path, clips: int = 16, clients: int = 8) -> Path:
    """As Mozilla publishes it: MP3 files in clips/, and TSV files of which validated.tsv has what was approved."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number in range(clips):
        name, client = f"common_voice_en_{4_000_000 + number}.mp3", number % clients
        sound = np.random.default_rng(number).normal(0, 0.1, 48_000 + 480 * number)
        soundfile.write(folder / "clips" / name, sound, 48_000, format="MP3", subtype="MPEG_LAYER_III")
        age = ["twenties", "", "teens"][client % 3]
        sentence = SENTENCES[number] if number < len(SENTENCES) else "The quick brown fox"
        cells = [f"{client:0128x}", name, f"{number:064x}", sentence, "", 2, 0, age, "", "", "", "en", ""]
        rows.append(dict(zip(CV_COLUMNS.split(), cells, strict=True)))
    write_tsv(rows, folder / "validated.tsv")
    for name in ("train", "dev", "test", "other", "invalidated"):
        write_tsv(rows[:2], folder / f"{name}.tsv")
    write_tsv([{"clip": rows[0]["path"], "duration[ms]": 1000}], folder / "clip_durations.tsv")
    write_tsv([{"sentence": "x", "reason": "y"}], folder / "reported.tsv")
    return folder


def test_validated_clips_of_common_voice_are_split_by_speaker(run_sharding: Command, tmp_path: Path) -> None:
    folder = make_common_voice(tmp_path / "en")
    arguments = ("--track", "word", "--group-by", "client_id", "--valid-fraction", 0.4, "--max-reject-rate", 1)
    out = build(run_sharding, folder, *arguments, "--splits", "hash", out=tmp_path / "out")
    samples = read_all(out)
    stored = {sample.utterance_id: (split, sample) for split, sample in samples.values()}
    fates = {row["utterance_id"]: (row["split"], row["fate"], row["reason"]) for row in read_ledger(out)}
    names = [f"common_voice_en_{4_000_000 + number}" for number in range(16)]
    assert fates.keys() == set(names)
    assert {sample.age_bucket for _, sample in stored.values()} == {"twenties", "", "teens"}
    sides = {side: {sample.child_id for split, sample in stored.values() if (split == "valid") == side}
             for side in (True, False)}  # fmt: skip
    assert sides[True]
    assert sides[False]
    assert not sides[True] & sides[False]
    assert read_index(open_store(out)).notes["validation"]["disjoint_by_speaker"]
    texts = {name: sample.text for name, (_, sample) in stored.items()}
    assert {name: texts[name] for name in (names[0], names[1], names[2], names[5], names[9])} == {
        names[0]: "he said no twice", names[1]: "don't stop it's good", names[2]: "",
        names[5]: "an ice cream please", names[9]: "the quick brown fox",
    }  # fmt: skip
    for number, symbols in ((3, "7"), (4, "ç")):  # refused in training, kept as it is where it validates
        reason = f"label has symbols outside the alphabet: {WORDS.name(symbols)}"
        assert fates[names[number]] in (("train", "rejected", reason), ("valid", "written", None))
    for name, (_, sample) in stored.items():
        info = soundfile.info(io.BytesIO(sample.audio))
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert info.duration == pytest.approx(1 + 0.01 * (int(name[-2:])), abs=0.08)  # MP3 pads
    assert (out / "report/orphans.txt").read_text() == ""


@pytest.mark.skipif(not KIDS.exists(), reason="the real corpus is not part of the repository")
def test_the_word_track_of_a_real_corpus_is_written_whole(run_sharding: Command, tmp_path: Path) -> None:
    out = build(run_sharding, KIDS, "--track", "word", out=tmp_path / "out")
    rows = [json.loads(line) for line in (KIDS / "train_word_transcripts.jsonl").read_text().splitlines()]
    assert {row["fate"] for row in read_ledger(out)} == {"written"}
    texts = {sample.utterance_id: sample.text for _, sample in read_all(out).values()}
    assert texts == {row["utterance_id"]: normalize_words(row["orthographic_text"]) for row in rows}
    assert len(texts) == 420


def test_the_word_track_takes_the_word_transcripts(corpus: Path, tmp_path: Path) -> None:
    folder = copy_audio(corpus, tmp_path / corpus.name)
    shutil.copy(corpus / MANIFEST, folder)
    rows = [{"orthographic_text" if name == "phonetic_text" else name: row[name] for name in row} for row in
            read_manifest(corpus)]  # fmt: skip
    (folder / "train_word_transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "._train_word_transcripts.jsonl").write_bytes(b"\0what macOS leaves on other disks")
    words = read_source(folder, ManifestOptions("english")).layout
    assert Path(words.transcripts).name == "train_word_transcripts.jsonl"
    assert Path(read_source(folder, ManifestOptions()).layout.transcripts).name == MANIFEST


@pytest.mark.parametrize(
    ("text", "expected", "foreign"),
    [
        ("", "", ""),
        ("Don’t STOP!", "don't stop", ""),
        ("ice-cream,  please…\n", "ice cream please", ""),
        ("co\u00adoperate \u200bnow", "cooperate now", ""),
        ("ﬁne Ａpple", "fine apple", ""),
        ("5 o'clock", "5 o'clock", "5"),
        ("naïve café", "naïve café", "ïé"),
        ("日本", "日本", "日本"),
        ("so [laughs] we <noise> went (inaudible) home", "so we went home", ""),
    ],
)
def test_words_become_letters_apostrophes_and_spaces(text: str, expected: str, foreign: str) -> None:
    assert normalize_words(text) == expected
    assert "".join(WORDS.foreign(expected)) == foreign


@given(st.text())
def test_the_normal_form_of_words_has_single_spaces_and_is_its_own(text: str) -> None:
    once = normalize_words(text)
    assert once == " ".join(once.split())
    assert normalize_words(once) == once


# --- which clips belong together --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [["north", "south", "east", "wést"], [1, 2, 3, 40], [True, False, 1.5, None]])
def test_a_group_stays_on_one_side_whatever_its_column(
    values: list[Any], run_sharding: Command, tmp_path: Path
) -> None:
    """Children change schools here, so the column alone decides."""
    folder = make_corpus(tmp_path / "corpus", clips=24, children=5, seconds=(0.2, 0.3))
    rows = [row | {"school": values[number % len(values)]} for number, row in enumerate(read_manifest(folder))]
    for row in rows:
        if row["school"] is None:
            row["child_id"] = "the one without a school"
    write_manifest(folder, rows)
    out = build(run_sharding, folder, "--group-by", "school", "--valid-fraction", 0.5, out=tmp_path / "out")
    splits = {row["utterance_id"]: row["split"] for row in read_ledger(out)}
    sides = {(str(row["school"]), splits[row["utterance_id"]]) for row in rows}
    assert len(sides) == len(values)
    assert set(splits.values()) == {"train", "valid"}


def test_a_group_that_is_no_column_is_refused(corpus: Path, refuse: Refuse) -> None:
    said = refuse(corpus, "--group-by", "sesion_id")
    assert f"{corpus / MANIFEST}:1: field 'sesion_id' is missing" in said
    assert "hint: did you mean 'session_id'?" in said
    assert "hint: --group-by names a column" in refuse(corpus, "--group-by", "x")


def test_a_group_that_is_a_list_is_refused(corpus: Path, tmp_path: Path, refuse: Refuse) -> None:
    folder = copy_audio(corpus, tmp_path / "corpus")
    write_manifest(folder, [row | {"school": ["x" * 1000]} for row in read_manifest(corpus)])
    said = refuse(folder, "--group-by", "school")
    assert "'school' is ['xxx" in said
    assert len(said.splitlines()[-1]) < 500


# --- many sources -----------------------------------------------------------------------------------------------


def test_a_quoted_pattern_names_every_match(run_sharding: Command, tmp_path: Path) -> None:
    for number, name in enumerate(("east", "west", "other")):
        make_corpus(tmp_path / "corpora" / name, clips=2, seconds=(0.2, 0.3), seed=number)
    out = build(run_sharding, tmp_path / "corpora/*t", out=tmp_path / "out")
    assert read_summary(out)["corpora"] == {"east": 2, "west": 2}
    out = build(run_sharding, tmp_path / "corpora/*t" / MANIFEST, tmp_path / "corpora/o*", out=tmp_path / "files")
    assert read_summary(out)["corpora"] == {"east": 2, "other": 2, "west": 2}


def test_a_pattern_without_a_match_is_refused_by_its_name(tmp_path: Path, refuse: Refuse) -> None:
    assert f"{tmp_path}/corpora/*: there is no such folder or file" in refuse(tmp_path / "corpora/*")


# --- where the audio lies ---------------------------------------------------------------------------------------


def zip_audio(corpus: Path, folder: Path, name: Callable[[str], str], how: int = zipfile.ZIP_DEFLATED) -> Path:
    """A folder of the same name with audio.zip, whose members are named `name(file name)`."""
    folder.mkdir(parents=True)
    shutil.copy(corpus / MANIFEST, folder)
    with zipfile.ZipFile(folder / "audio.zip", "w", how) as archive:
        for path in sorted((corpus / "audio").iterdir()):
            archive.writestr(name(path.name), path.read_bytes())
    return folder


SHAPES: dict[str, Callable[[str], str]] = {
    "as audio paths say": lambda name: f"audio/{name}",
    "without audio/": lambda name: name,
    "a folder more": lambda name: f"corpus-1.0/audio/{name}",
    "two folders more": lambda name: f"data/corpus-1.0/audio/{name}",
    "from Windows": lambda name: f"audio\\{name}",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zip_makes_the_same_bytes_however_its_folders_are(
    shape: str, corpus: Path, plain_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    how = zipfile.ZIP_STORED if shape == "without audio/" else zipfile.ZIP_DEFLATED
    folder = zip_audio(corpus, tmp_path / corpus.name, SHAPES[shape], how)
    with zipfile.ZipFile(folder / "audio.zip", "a") as archive:
        archive.writestr("__MACOSX/audio/._meadow-0000.flac", b"what macOS adds")
        archive.mkdir("audio")
    assert all_of(build(run_sharding, folder, out=tmp_path / "out")) == all_of(plain_build)


def test_folders_are_only_added_or_left_out_never_exchanged(tmp_path: Path) -> None:
    """Another speaker's 001.flac is another clip."""
    with zipfile.ZipFile(tmp_path / "audio.zip", "w") as archive:
        for name in ("top/audio/b/001.flac", "top/audio/b/002.flac", "top/audio/c/001.flac"):
            archive.writestr(name, b"x")
    paths = [f"audio/{speaker}/00{number}.flac" for speaker in "abc" for number in (1, 2)]
    assert find_audio(tmp_path, paths) == AudioRoot(str(tmp_path / "audio.zip"), "", "", "top/")
    with pytest.raises(ManifestError, match=r"audio\.zip has top/audio/b/001\.flac"):
        find_audio(tmp_path, ["audio/a/001.flac", "audio/a/002.flac", "b/x/001.flac"])


def test_audio_paths_may_start_in_the_audio_folder(corpus: Path, run_sharding: Command, tmp_path: Path) -> None:
    folder = copy_audio(corpus, tmp_path / corpus.name)
    rows = [row | {"audio_path": row["audio_path"].removeprefix("audio/")} for row in read_manifest(corpus)]
    out = build(run_sharding, write_manifest(folder, rows), out=tmp_path / "out")
    assert (out / "report/orphans.txt").read_text() == "meadow/nobody.flac\n"


def test_the_audio_folder_may_be_a_link_to_another_disk(
    corpus: Path, plain_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    folder = tmp_path / corpus.name
    folder.mkdir()
    shutil.copy(corpus / MANIFEST, folder)
    (folder / "audio").symlink_to(corpus / "audio")
    assert all_of(build(run_sharding, folder, out=tmp_path / "out")) == all_of(plain_build)


def drop_audio(folder: Path) -> None:
    shutil.rmtree(folder / "audio")


def empty_audio(folder: Path) -> None:
    drop_audio(folder)
    (folder / "audio").mkdir()


def zip_something_else(folder: Path) -> None:
    drop_audio(folder)
    with zipfile.ZipFile(folder / "audio.zip", "w") as archive:
        archive.writestr("sound/other.flac", b"x")


def zip_nothing(folder: Path) -> None:
    drop_audio(folder)
    zipfile.ZipFile(folder / "audio.zip", "w").close()


@pytest.mark.parametrize(
    ("lose", "seen"),
    [
        (drop_audio, "'audio/meadow-0000.flac'"),
        (empty_audio, "'audio/meadow-0000.flac'"),
        (zip_something_else, "audio.zip has sound/other.flac"),
        (zip_nothing, "audio.zip has no files"),
    ],
)
def test_a_source_without_any_audio_is_refused_at_once(
    lose: Callable[[Path], None], seen: str, corpus: Path, tmp_path: Path, refuse: Refuse
) -> None:
    folder = copy_audio(corpus, tmp_path / corpus.name)
    shutil.copy(corpus / MANIFEST, folder)
    lose(folder)
    said = refuse(folder)
    assert f"{folder}: there is no audio: none of 6 audio paths checked" in said
    assert seen in said
    assert "hint: audio paths are relative to the folder of their transcripts file" in said


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"PK\x05\x06" + b"\xff" * 18])
def test_a_zip_that_is_none_is_refused_at_once(data: bytes, corpus: Path, tmp_path: Path, refuse: Refuse) -> None:
    folder = zip_audio(corpus, tmp_path / corpus.name, SHAPES["without audio/"])
    (folder / "audio.zip").write_bytes(data)
    assert f"{folder / 'audio.zip'}: not a readable zip" in refuse(folder)


# --- odd, but allowed -------------------------------------------------------------------------------------------


def test_odd_names_are_written_and_listed(run_sharding: Command, tmp_path: Path) -> None:
    """Ids of any length and script, paths with detours, file names that are no text, links in a circle."""
    folder = make_corpus(tmp_path / "odd\nfolder", clips=6, seconds=(0.2, 0.3))
    rows = read_manifest(folder)
    ids = ["x" * 10_000, "y" * 10_000, "é", unicodedata.normalize("NFD", "ö"), "a\nb", "🦊/.."]
    for row, name in zip(rows, ids, strict=True):
        row["utterance_id"] = name
    rows[0]["audio_path"] = "./audio//" + Path(rows[0]["audio_path"]).name
    (folder / "audio/new\nline.flac").write_bytes(encode(say(TEXT)))
    rows.append(describe(folder, "audio/new\nline.flac", TEXT, **{"half \ud800": "a column"}))
    (folder / "audio/lonely\n\x1b[2J.flac").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(folder) + b"/audio/\xff\xfe.flac")).write_bytes(b"")
    (folder / "audio/circle").symlink_to(".")
    (folder / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = build(run_sharding, folder, out=tmp_path / "out")
    assert {sample.utterance_id for _, sample in read_all(out).values()} == {*ids, "new\nline"}
    assert (out / "report/orphans.txt").read_text().splitlines() == [
        "odd\\nfolder/audio/\\udcff\\udcfe.flac",
        "odd\\nfolder/audio/lonely\\n\\x1b[2J.flac",
    ]
    assert read_summary(out)["ignored_fields"] == ["half \\ud800"]
    assert run_sharding("verify", out, "--decode").returncode == 0


def test_the_command_speaks_where_the_terminal_knows_no_ipa(
    run_sharding: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=2, seconds=(0.2, 0.3))
    write_manifest(folder, [row | {"phonetic_text": "k" * 30 + "ß"} for row in read_manifest(folder)])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["build", str(folder), "--out", str(tmp_path / "out"), "--valid-fraction", "0", "--dry-run"]) == 1
    terminal.flush()
    assert b"outside the alphabet: '\\xdf'" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


FORMATS: dict[str, tuple[int, int, int, dict[str, str]]] = {  # frames, rate, channels, how to write it
    "s400.flac": (400, 16_000, 1, {}),
    "s400.wav": (400, 16_000, 1, {}),
    "s1103.wav": (1103, 44_100, 1, {}),  # 400.2 at 16 kHz
    "wide.wav": (96_000, 192_000, 8, {"subtype": "FLOAT"}),
    "slow.flac": (2000, 4_000, 1, {"subtype": "PCM_24"}),
    "opus.ogg": (24_000, 48_000, 1, {"format": "OGG", "subtype": "OPUS"}),
    "opus.opus": (24_000, 48_000, 2, {"format": "OGG", "subtype": "OPUS"}),
    "double.wav": (8000, 16_000, 1, {"subtype": "DOUBLE"}),
    "law.wav": (4000, 8_000, 1, {"subtype": "ALAW"}),
}
REFUSED_FORMATS = {
    "s399.flac": (399, 16_000, "shorter than one frame: 399 samples"),
    "s399.wav": (399, 16_000, "shorter than one frame: 399 samples"),
    "none.wav": (0, 16_000, "no samples"),
    "deaf.wav": (9000, 900, "sample rate is 900 Hz"),
}


def test_audio_of_any_kind_becomes_16_khz_mono(run_sharding: Command, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, (frames, rate, channels, how) in FORMATS.items():
        soundfile.write(folder / "audio" / name, noise.normal(0, 0.1, (frames, channels)), rate, **how)
    for name, (frames, rate, _) in REFUSED_FORMATS.items():
        soundfile.write(folder / "audio" / name, noise.normal(0, 0.1, frames), rate)
    names = [*FORMATS, *REFUSED_FORMATS]
    write_manifest(folder, [describe(folder, f"audio/{name}", "k", utterance_id=name) for name in names])
    out = build(run_sharding, folder, "--max-reject-rate", 1, out=tmp_path / "out")
    reasons = {row["utterance_id"]: row["reason"] for row in read_ledger(out) if row["fate"] == "rejected"}
    assert reasons.keys() == REFUSED_FORMATS.keys()
    assert all(REFUSED_FORMATS[name][2] in reason for name, reason in reasons.items())
    for _, sample in read_all(out).values():
        frames, rate, _, _ = FORMATS[sample.utterance_id]
        info = soundfile.info(io.BytesIO(sample.audio))
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert info.frames == round(frames * 16_000 / rate)


def test_what_was_done_to_a_sound_or_a_label_is_in_the_ledger_and_the_summary(
    run_sharding: Command, tmp_path: Path
) -> None:
    """Also of a recording that was cut, and if a killed build is run again. Silence is what is silent in 16 bit."""
    folder, sound = tmp_path / "microphones", say(TEXT)
    (folder / "audio").mkdir(parents=True)
    turned = np.stack([sound, -0.9 * sound], 1)
    for name, samples, subtype in (
        ("turned", turned, "PCM_16"),
        ("long", np.tile(turned, (40, 1)), "PCM_16"),
        ("integers", sound * 2.0**15, "FLOAT"),
        ("hushed", sound * 2e-5, "FLOAT"),
        ("usual", sound, "PCM_16"),
    ):
        soundfile.write(folder / f"audio/{name}.wav", samples, 16_000, subtype=subtype)
    texts = {"long": f"{TEXT}:", "usual": f"@{TEXT}:@"}  # which SAMPA means as phones
    write_manifest(folder, [describe(folder, f"audio/{path.name}", texts.get(path.stem, TEXT))
                            for path in (folder / "audio").iterdir()])  # fmt: skip
    command = (
        "build",
        folder,
        "--out",
        tmp_path / "out",
        "--workers",
        1,
        "--valid-fraction",
        0,
        "--max-reject-rate",
        1,
    )
    at = "'@' is left out of the label, as by the official scorer"
    colon = "':' is left out of the label, as by the official scorer; length is 'ː' U+02D0"
    cancelled = "channels that cancel out: only the loudest is used"
    integers = "float samples in the range of integers: divided by 32768"
    for _ in range(2):
        (tmp_path / "out/index.json").unlink(missing_ok=True)
        done = run_sharding(*command)
        assert done.returncode == 0, done.stderr
        rows = {row["utterance_id"]: row for row in read_ledger(tmp_path / "out")}
        assert {name: row["remarks"] for name, row in rows.items()} == {
            "turned": [cancelled], "long": [cancelled, colon], "integers": [integers], "hushed": [],
            "usual": [colon, at],
        }  # fmt: skip
        assert rows["hushed"]["reason"] == "constant signal with a label"
        assert read_summary(tmp_path / "out")["remarks"] == {cancelled: 2, colon: 2, at: 1, integers: 1}
        assert f"2 noted: {cancelled}" in done.stdout
        assert f"2 noted: {colon}" in done.stdout
    sounds = {key: soundfile.read(io.BytesIO(one.audio))[0] for key, (_, one) in read_all(tmp_path / "out").items()}
    for name in ("turned", "integers"):
        np.testing.assert_allclose(sounds[name], sounds["usual"], atol=1e-4)  # three 16-bit steps
