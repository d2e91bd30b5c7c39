"""Bad sources stop the command before anything is written, and the message says what, where and what to do."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.sources.manifest import read_source
from sharding.sources.options import ManifestOptions
from tests.tools.commands import Command
from tests.tools.corpus import MANIFEST, make_corpus, read_manifest, write_manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", clips=3, children=2)


@pytest.fixture
def refuse(tmp_path: Path, run_sharding: Command) -> Callable[..., str]:
    """Build, expect a refusal that leaves nothing behind, and return its message."""

    def run(*arguments: object) -> str:
        done = run_sharding("build", *arguments, "--out", tmp_path / "out", "--workers", 1)
        assert done.returncode == 1
        assert not (tmp_path / "out").exists()
        return done.stderr

    return run


def test_a_missing_folder_is_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in refuse(tmp_path / "nowhere")


def test_without_sources_the_message_says_where_they_belong(
    tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuse()
    assert "data/raw/*" in message
    assert "hint: unpack each corpus into a folder there" in message


def test_a_folder_without_a_manifest_or_with_two_is_refused(corpus: Path, refuse: Callable[..., str]) -> None:
    (corpus / "more_phon_transcripts.jsonl").write_bytes((corpus / MANIFEST).read_bytes())
    message = refuse(corpus)
    assert "more_phon_transcripts.jsonl, train_phon_transcripts.jsonl" in message
    assert "name the file itself" in message
    for path in corpus.glob("*.jsonl"):
        path.unlink()
    message = refuse(corpus)
    assert "no table (JSONL, CSV or TSV) in this folder; in and below it " in message
    assert "make a CSV with the columns audio_path, phonetic_text and child_id" in message
    recording = next((corpus / "audio").iterdir())
    assert f"{recording}: is an audio file: a source is the table that lists it" in refuse(recording)


def test_for_a_folder_without_a_table_those_below_that_have_one_are_named(
    corpus: Path, refuse: Callable[..., str]
) -> None:
    assert f"hint: did you mean {corpus}?" in refuse(corpus.parent)


def test_an_empty_manifest_is_refused(corpus: Path, refuse: Callable[..., str]) -> None:
    write_manifest(corpus, [])
    assert f"{corpus / MANIFEST}: the file has no rows" in refuse(corpus)


@pytest.mark.parametrize(
    "line",
    [
        b'{"utterance_id": "a", ',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'["utterance_id"]',
        b'{"utterance_id": "\\ud800", "audio_path": "a.flac", "phonetic_text": ""}',
        b'{"utterance_id": "a", "audio_path": "a\\u0000.flac", "phonetic_text": ""}',
        b'{"utterance_id": "", "audio_path": "a.flac", "phonetic_text": ""}',
        b'{"utterance_id": true, "audio_path": "a.flac", "phonetic_text": ""}',
        b'{"utterance_id": "a", "audio_path": "a.flac", "phonetic_text": "", "filesize_bytes": 1' + b"0" * 400 + b"}",
        b'{"utterance_id": "a", "audio_path": "a.flac", "phonetic_text": "", "audio_duration_sec": NaN}',
        b'{"utterance_id": "a", "audio_path": "a.flac", "phonetic_text": "", "audio_duration_sec": -1}',
        b'{"utterance_id": "a", "audio_path": "a.flac", "phonetic_text": "", "audio_duration_sec": true}',
    ],
    ids=lambda line: line[:80].decode("latin-1"),
)
def test_a_malformed_line_is_named_by_file_and_number(line: bytes, corpus: Path, refuse: Callable[..., str]) -> None:
    rows = (corpus / MANIFEST).read_bytes().splitlines()
    (corpus / MANIFEST).write_bytes(b"\n".join([*rows[:2], b"", line, *rows[2:]]))
    assert f"{corpus / MANIFEST}:4: " in refuse(corpus)


@pytest.mark.parametrize(
    ("right", "wrong", "hint"),
    [
        ("utterance_id", "uterance_id", "rename 'uterance_id' to 'utterance_id'"),
        ("audio_path", "audiopath", "rename 'audiopath' to 'audio_path'"),
        ("phonetic_text", "phonetic_txt", "rename 'phonetic_txt' to 'phonetic_text'"),
        ("child_id", "childId", "did you mean 'child_id'?"),
        ("child_id", "child", "did you mean 'child_id'?"),
        ("md5_hash", "md5hash", "did you mean 'md5_hash'?"),
        ("audio_duration_sec", "audio_duration", "did you mean 'audio_duration_sec'?"),
    ],
)
def test_a_misspelt_field_stops_the_build_with_a_suggestion(
    right: str, wrong: str, hint: str, corpus: Path, refuse: Callable[..., str]
) -> None:
    rows = read_manifest(corpus)
    rows[1][wrong] = rows[1].pop(right)
    write_manifest(corpus, rows)
    message = refuse(corpus)
    assert f"{corpus / MANIFEST}:2: " in message
    assert f"hint: {hint}" in message


def test_a_field_that_is_not_ours_is_listed_and_does_no_harm(
    corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    write_manifest(corpus, [row | {"microphone": "near"} for row in read_manifest(corpus)])
    assert run_sharding("build", corpus, "--out", tmp_path / "out").returncode == 0
    assert json.loads((tmp_path / "out/report/summary.json").read_text())["ignored_fields"] == ["microphone"]


def test_an_id_seen_twice_is_refused_with_both_places(corpus: Path, refuse: Callable[..., str]) -> None:
    rows = read_manifest(corpus)
    write_manifest(corpus, [*rows, rows[1]])
    message = refuse(corpus)
    assert f"{corpus / MANIFEST}:4: " in message
    assert f"seen before, at {corpus / MANIFEST}:2" in message


def test_a_source_given_twice_is_refused(corpus: Path, refuse: Callable[..., str]) -> None:
    assert "this source is named twice" in refuse(corpus, corpus)


def test_a_broken_zip_is_refused(corpus: Path, refuse: Callable[..., str]) -> None:
    for path in (corpus / "audio").iterdir():
        path.unlink()
    (corpus / "audio").rmdir()
    (corpus / "audio.zip").write_bytes(b"PK\x03\x04 and no more")
    assert f"{corpus / 'audio.zip'}: not a readable zip" in refuse(corpus)


def test_windows_line_ends_byte_order_mark_and_blank_lines_are_read(corpus: Path) -> None:
    text = (corpus / MANIFEST).read_bytes()
    (corpus / MANIFEST).write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\r\n"))
    source = read_source(corpus, ManifestOptions())
    rows = [source.parse(row).utterance_id for row in range(len(source))]
    assert rows == [row["utterance_id"] for row in map(json.loads, text.splitlines())]
    assert source.rows["number"].tolist() == [1, 3, 5]


def test_orphans_on_both_sides_are_listed(corpus: Path, run_sharding: Command, tmp_path: Path) -> None:
    """Audio without a row, in a folder and in a zip; a row without audio."""
    rows = read_manifest(corpus)
    write_manifest(corpus, rows[1:])
    (corpus / rows[2]["audio_path"]).unlink()
    for where in ("folder", "zip"):
        out = tmp_path / where
        assert run_sharding("build", corpus, "--out", out).returncode == 1
        summary = json.loads((out / "report/summary.json").read_text())
        assert (summary["orphan_audio"], summary["orphan_rows"]) == (1, 1)
        assert (out / "report/orphans.txt").read_text() == f"corpus/{rows[0]['audio_path']}\n"
        if where == "folder":
            with zipfile.ZipFile(corpus / "audio.zip", "w") as archive:
                for path in (corpus / "audio").iterdir():
                    archive.write(path, f"audio/{path.name}")
            shutil.rmtree(corpus / "audio")
