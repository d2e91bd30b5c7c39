"""Corpora in the layouts that they were published in: their rows, their splits, and ranges of their recordings."""

import gzip
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.audio.codec import SAMPLE_RATE, decode
from sharding.cli import main
from sharding.errors import ManifestError
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.store import open_store
from sharding.sources.manifest import Source, Utterance, read_source
from sharding.sources.options import ManifestOptions
from sharding.sources.splits import split_of
from tests.tools.commands import Command
from tests.tools.corpus import make_corpus, read_manifest, write_manifest
from tests.tools.shard_sets import assert_balanced, digest_of, read_all, read_ledger, read_summary

Row = dict[str, object]
Splits = dict[str, str]  # of each clip, by its id
Corpus = Callable[[Path], Splits]
TRACK = ("--track", "word")
TEXT = "it's a text of words"


def make_audio(path: Path, seconds: float = 1.0, rate: int = SAMPLE_RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) + sum(map(ord, path.name)))
    soundfile.write(path, 0.1 * rng.standard_normal(round(seconds * rate)), rate)


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows_of(source: Source) -> list[Utterance]:
    return [source.parse(row) for row in range(len(source))]


def read_rows(location: Path, options: ManifestOptions = ManifestOptions("word")) -> list[Utterance]:  # noqa: B008
    return rows_of(read_source(location, options))


def samples_of(out: Path) -> dict[str, tuple[str, Sample]]:
    """By utterance id, or that of the recording: the split of a sample, and the sample."""
    return {sample.parent_id or sample.utterance_id: (split, sample) for split, sample in read_all(out).values()}


def make_librispeech(folder: Path) -> Splits:
    splits = {}
    for subset, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-other", "61")):
        chapter = folder / subset / speaker / "198"
        names = [f"{speaker}-198-{number:04d}" for number in range(3)]
        for name in names:
            make_audio(chapter / f"{name}.flac")
        write_lines(chapter / f"{speaker}-198.trans.txt", [f"{name} IT'S A TEXT OF WORDS" for name in names])
        splits |= dict.fromkeys(names, {"dev": "valid"}.get(subset.split("-")[0], subset.split("-")[0]))
    write_lines(folder / "SPEAKERS.TXT", ["; id", "19 | F | train-clean-100 | 25.19 | Kara"])
    return splits


COMMON_VOICE = [
    "client_id",
    "path",
    "sentence",
    "up_votes",
    "down_votes",
    "age",
    "gender",
    "accents",
    "locale",
    "segment",
]


def make_common_voice(folder: Path, header: Sequence[str] = COMMON_VOICE, suffix: str = ".mp3") -> Splits:
    splits, everything = Splits(), []
    for table, count in (("train", 3), ("dev", 2), ("test", 2), ("other", 1), ("invalidated", 1)):
        rows = []
        for number in range(count):
            name = f"common_voice_en_{table}_{number}"
            make_audio(folder / f"clips/{name}.mp3", rate=32_000)
            values = {"client_id": f"{table}{number}", "path": name + suffix, "sentence": 'It\'s a "text" of words',
                      "age": "twenties", "locale": "en"}  # fmt: skip
            rows.append("\t".join(values.get(column, "") for column in header))
            splits |= {name: split_of(table) or ""} if split_of(table) else {}
        write_lines(folder / f"{table}.tsv", ["\t".join(header), *rows])
        everything += rows if split_of(table) else []
    write_lines(folder / "validated.tsv", ["\t".join(header), *everything])
    return splits


def make_kaldi(folder: Path) -> Splits:
    """Make three data folders, of which one has segments."""
    splits = Splits()
    for name in ("train", "dev", "test"):
        data, recordings = folder / name, [f"{name}-rec{number}" for number in range(2)]
        for recording in recordings:
            make_audio(folder / f"wav/{recording}.wav", 4.0)
        write_lines(data / "wav.scp", [f"{recording} wav/{recording}.wav" for recording in recordings])
        spans = {f"{recording}-{start}": (recording, start, end) for recording in recordings
                 for start, end in ((0, 1.5), (2, -1))}  # fmt: skip
        if name == "train":
            write_lines(data / "segments", [f"{key} {' '.join(map(str, span))}" for key, span in spans.items()])
        names = list(spans) if name == "train" else recordings
        write_lines(data / "text", [f"{key} {TEXT}" for key in names])
        write_lines(data / "utt2spk", [f"{key} {key.split('-')[1]}-{name}" for key in names])
        splits |= dict.fromkeys(names, split_of(name) or "")
    return splits


def make_nemo(folder: Path) -> Splits:
    splits = Splits()
    for name in ("train", "dev", "test"):
        make_audio(folder / f"{name}.flac", 3.0)
        rows = [{"audio_filepath": f"{name}.flac", "offset": offset, "duration": 1.25, "text": TEXT, "speaker": name}
                for offset in (0, 1.5)]  # fmt: skip
        write_lines(folder / f"{name}_manifest.json", rows)
        splits |= {name: split_of(name) or "", f"{name}-00001500": split_of(name) or ""}
    return splits


def make_cut(
    name: str, path: str, start: float, duration: float, *spans: tuple[str, float, float]
) -> dict[str, object]:
    """Make a cut of a recording of 6 s, with supervisions of the given ids, starts and durations."""
    supervisions = [
        {
            "id": key,
            "recording_id": path,
            "start": begin,
            "duration": length,
            "channel": 0,
            "text": TEXT,
            "speaker": "s1",
        }
        for key, begin, length in spans
    ]
    sources = [{"type": "file", "channels": [0], "source": path}]
    recording = {"id": path, "sources": sources, "sampling_rate": 16_000, "num_samples": 96_000, "duration": 6.0}
    return {"id": name, "start": start, "duration": duration, "channel": 0, "supervisions": supervisions,
            "recording": recording, "type": "MonoCut"}  # fmt: skip


def write_cuts(path: Path, cuts: Sequence[object]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))


def make_lhotse(folder: Path) -> Splits:
    splits = Splits()
    for name in ("train-clean-5", "dev-clean-2", "test"):
        make_audio(folder / f"audio/{name}.flac", 6.0)
        make_audio(folder / f"audio/{name}-whole.flac", 6.0)
        cuts = [make_cut(f"{name}-a", f"audio/{name}.flac", 0.0, 2.0, ("a", 0.0, 2.0)),
                make_cut(f"{name}-b", f"audio/{name}.flac", 2.0, 4.0, (f"{name}-b1", 0.5, 1.0), (f"{name}-b2", 2, 1.5)),
                make_cut(f"{name}-c", f"audio/{name}-whole.flac", 0.0, 6.0, ("c", 0.0, 6.0))]  # fmt: skip
        write_cuts(folder / f"corpus_cuts_{name}.jsonl.gz", cuts)
        splits |= {f"{name}-{key}": split_of(name) or "" for key in ("a", "b1", "b2", "c")}
    return splits


LAYOUTS: dict[str, Corpus] = {
    "Common Voice": make_common_voice,
    "LibriSpeech": make_librispeech,
    "Kaldi": make_kaldi,
    "NeMo": make_nemo,
    "lhotse": make_lhotse,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_corpus_is_built_with_its_own_splits(name: str, tmp_path: Path) -> None:
    splits = LAYOUTS[name](tmp_path / "corpus")
    root = ("--audio-root", str(tmp_path / "corpus")) if name == "Kaldi" else ()
    assert main(["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, *root]) == 0
    samples = samples_of(tmp_path / "out")
    assert {key: split for key, (split, _) in samples.items()} == splits
    assert {sample.text for _, sample in samples.values()} == {TEXT}
    assert_balanced(tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    assert summary["notes"]["layouts"] == {"corpus": f"{name}, official splits"}
    assert summary["notes"]["test"] == {"clips": sum(split == "test" for split in splits.values()), "rejected": 0}
    assert {row["utterance_id"]: row["split"] for row in read_ledger(tmp_path / "out")} == splits
    assert summary["notes"].get("shared_speakers", {}).get("count", 0) == (1 if name == "lhotse" else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_by_speaker_are_asked_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = LAYOUTS[name](tmp_path / "corpus")
    root = ("--audio-root", str(tmp_path / "corpus")) if name == "Kaldi" else ()
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--splits", "hash", *TRACK, *root]
    assert main(build) == 0
    samples = samples_of(tmp_path / "out")
    assert samples.keys() == splits.keys()
    sides: dict[str, set[str]] = {}
    for split, sample in samples.values():
        sides.setdefault(sample.child_id, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    assert "test" not in set().union(*sides.values())
    assert f"corpus: {name}, split by speaker" in capsys.readouterr().out
    assert main(build) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_part_of_a_corpus_is_a_corpus(tmp_path: Path) -> None:
    make_librispeech(tmp_path / "LibriSpeech")
    make_kaldi(tmp_path / "data")
    make_nemo(tmp_path / "nemo")
    one = read_source(tmp_path / "LibriSpeech/dev-clean", ManifestOptions("word"))
    assert [row.audio_path for row in rows_of(one)] == [f"84/198/84-198-000{number}.flac" for number in range(3)]
    assert {row.split for row in rows_of(one)} == {"dev"}
    kaldi = read_rows(tmp_path / "data/dev", ManifestOptions("word", audio_root=str(tmp_path / "data")))
    assert {split_of(row.split) for row in kaldi} == {"valid"}
    assert {row.split for row in read_rows(tmp_path / "nemo/test_manifest.json")} == {"test"}


def test_a_message_names_the_file_and_the_line_of_a_row(tmp_path: Path) -> None:
    make_librispeech(tmp_path / "libri")
    make_common_voice(tmp_path / "cv")
    assert read_source(tmp_path / "libri", ManifestOptions("word")).place(1).endswith("84/198/84-198.trans.txt:2")
    places = [read_source(tmp_path / "cv", ManifestOptions("word")).place(row) for row in (0, 3, 6)]
    assert places == [f"{tmp_path}/cv/{name}" for name in ("train.tsv:2", "dev.tsv:2", "test.tsv:3")]


# --- Common Voice ---------------------------------------------------------------------------------------------------


def test_an_old_release_has_other_names(tmp_path: Path) -> None:
    old = ["client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent"]
    splits = make_common_voice(tmp_path, old, suffix="")
    rows = read_rows(tmp_path)
    assert {row.utterance_id: split_of(row.split) for row in rows} == splits
    assert all(row.audio_path.endswith(".mp3") and row.age_bucket == "twenties" for row in rows)
    assert {row.text for row in rows} == {'It\'s a "text" of words'}


def test_validated_clips_alone_have_no_splits(tmp_path: Path) -> None:
    make_common_voice(tmp_path)
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").unlink()
    rows = read_rows(tmp_path)
    assert len(rows) == 7
    assert {row.split for row in rows} == {""}


@pytest.mark.parametrize(("cells", "wrong"), [("c\tx.mp3\ttext", 3), ("c\tx.mp3\ttext\t1\t2\t3\t4\t5\t6\t7\t8", 11)])
def test_a_row_of_too_few_or_too_many_cells_is_named(cells: str, wrong: int, tmp_path: Path) -> None:
    make_common_voice(tmp_path)
    with open(tmp_path / "dev.tsv", "a") as file:
        file.write(f"{cells}\n")
    with pytest.raises(ManifestError, match=rf"dev\.tsv:4: not a table: the row has {wrong} cells, the header 10"):
        read_source(tmp_path, ManifestOptions("word"))


# --- Kaldi ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("wav.scp", "x sph2pipe -f wav x.sph |", r"wav\.scp:3: 'x' is 'sph2pipe -f wav x\.sph \|', not an audio file"),
        ("wav.scp", "x data/raw.ark:1234", r"wav\.scp:3: 'x' is 'data/raw\.ark:1234', not an audio file"),
        ("wav.scp", "train-rec0 y.wav", r"wav\.scp:3: 'train-rec0' occurs twice"),
        ("segments", "x train-rec0 1.0 soon", r"segments:5: not a segment: 'train-rec0 1\.0 soon'"),
        ("segments", "x train-rec0 1.0", r"segments:5: not a segment"),
        ("segments", "x other 1.0 2.0", r"segments:5: recording 'other' is not in wav\.scp"),
        ("text", "x words", r"text: utterance 'x' has no recording"),
    ],
)
def test_a_line_that_is_no_row_of_a_data_folder_is_named(file: str, line: str, message: str, tmp_path: Path) -> None:
    make_kaldi(tmp_path)
    with open(tmp_path / "train" / file, "a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(ManifestError, match=message):
        read_source(tmp_path, ManifestOptions("word", audio_root=str(tmp_path)))


def test_a_data_folder_of_an_unknown_name_is_not_guessed_at(tmp_path: Path) -> None:
    make_kaldi(tmp_path)
    (tmp_path / "dev").rename(tmp_path / "test_dev93")
    with pytest.raises(ManifestError, match="'test_dev93' names no split"):
        read_source(tmp_path, ManifestOptions("word", audio_root=str(tmp_path)))


def test_paths_of_a_data_folder_never_lead_out_of_it(tmp_path: Path) -> None:
    make_audio(tmp_path / "secret.wav")
    for name in ("a", "b"):
        make_audio(tmp_path / f"data/wav/{name}.wav")
    paths = {
        "a": "wav/a.wav",
        "b": str(tmp_path / "data/wav/b.wav"),
        "x": "../secret.wav",
        "y": str(tmp_path / "secret.wav"),
    }
    write_lines(tmp_path / "data/wav.scp", [f"{name} {path}" for name, path in paths.items()])
    write_lines(tmp_path / "data/text", [f"{name} {TEXT}" for name in paths])
    build = ["build", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *TRACK, "--max-reject-rate", "1"]
    assert main(build) == 0
    fates = {row["utterance_id"]: row["fate"] for row in read_ledger(tmp_path / "out")}
    assert fates == {"a": "written", "b": "written", "x": "rejected", "y": "rejected"}


# --- NeMo and lhotse ------------------------------------------------------------------------------------------------


def test_columns_of_a_manifest_can_be_named(tmp_path: Path) -> None:
    make_nemo(tmp_path)
    options = ManifestOptions("word", columns={"session_id": "speaker", "text": "audio_filepath"})
    row = read_rows(tmp_path / "dev_manifest.json", options)[0]
    assert (row.session_id, row.text) == ("dev", "dev.flac")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tracks": []}, "is mixed of several recordings, or has none"),
        ({"recording": {"id": "r", "sources": [{"type": "command", "source": "x |"}]}}, "'r' is command: one file"),
        ({"recording": {"id": "r", "sources": [{"type": "file"}, {"type": "file"}]}}, "'r' is file, file: one file"),
        ({"recording": {"id": "r", "sources": [{"type": "file", "channels": [0, 1]}]}}, "'a' is one of 2 channels"),
        ({"recording": 3}, "not a cut of a recording"),
        ({"supervisions": [{}, {}]}, "not a cut of a recording"),
    ],
)
def test_a_cut_of_another_kind_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    make_audio(tmp_path / "a.flac", 6.0)
    cut = make_cut("a", "a.flac", 0.0, 6.0, ("s", 0.0, 6.0))
    write_cuts(tmp_path / "cuts_train.jsonl.gz", [cut, cut | change])
    with pytest.raises(ManifestError, match=rf"cuts_train\.jsonl\.gz:2: .*{message}"):
        read_source(tmp_path, ManifestOptions("word"))


# --- splits of a table ----------------------------------------------------------------------------------------------


def make_table(folder: Path, splits: Sequence[str], speakers: Sequence[str] = ()) -> list[str]:
    """Make a CSV of a clip per split; return the options to build it."""
    rows = ["audio_path,orthographic_text,child_id,split"]
    for number, split in enumerate(splits):
        make_audio(folder / f"{number}.flac", 1.0 + number / 10)
        rows.append(f"{number}.flac,{TEXT},{speakers[number] if speakers else number},{split}")
    write_lines(folder / "table.csv", rows)
    return ["build", str(folder), "--out", str(folder.parent / "out"), *TRACK]


def test_names_of_splits_are_mapped(tmp_path: Path) -> None:
    names = [
        "train",
        "Training",
        "dev",
        "validation",
        "val",
        "validated",
        "test.clean",
        "TESTING",
        "train_other_500",
        "unlabeled",
    ]
    assert main(make_table(tmp_path / "corpus", names)) == 0
    samples = samples_of(tmp_path / "out")
    splits = ["train", "train", "valid", "valid", "valid", "valid", "test", "test", "train", "unlabelled"]
    assert [samples[str(number)][0] for number in range(len(names))] == splits
    last = samples["9"][1]
    assert (last.text, last.label_status, last.parent_text) == ("", "unlabelled", TEXT)
    reasons = {row["utterance_id"]: row["reason"] for row in read_ledger(tmp_path / "out")}
    assert reasons["9"] == "published as unlabelled: kept, not trained on"


@pytest.mark.parametrize(
    ("split", "message"), [("", "the row has no split, but others have"), ("fold3", "split is 'fold3'")]
)
def test_a_row_without_a_split_is_named(
    split: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = make_table(tmp_path / "corpus", ["train", "test", split])
    assert main(build) == 1
    assert f"{tmp_path}/corpus/table.csv:4: {message}" in capsys.readouterr().err
    assert main([*build, "--splits", "hash"]) == 0


def test_a_speaker_on_two_sides_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make_table(tmp_path / "corpus", ["train", "dev", "test", "test"], ["ann", "bob", "ann", "cid"])) == 0
    assert "1 speaker in several of the published splits, so that scores are too optimistic: ann (train, test)" in (
        capsys.readouterr().out
    )
    notes = read_index(open_store(tmp_path / "out")).notes
    assert notes["shared_speakers"] == {"count": 1, "examples": ["ann (train, test)"]}
    assert notes["validation"]["disjoint_by_speaker"] is False


def test_of_two_sources_each_is_split_in_its_own_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_table(tmp_path / "corpus", ["train", "dev", "test"])
    make_table(tmp_path / "other", [""] * 8, [f"child{number}" for number in range(8)])
    (tmp_path / "other").rename(tmp_path / "raw")
    for number in range(8):
        (tmp_path / f"raw/{number}.flac").rename(tmp_path / f"raw/r{number}.flac")
    table = (tmp_path / "raw/table.csv").read_text()
    write_lines(
        tmp_path / "raw/table.csv",
        [line if number == 0 else f"r{line}" for number, line in enumerate(table.splitlines())],
    )
    assert (
        main(["build", *(str(tmp_path / name) for name in ("corpus", "raw")), "--out", str(tmp_path / "out"), *TRACK])
        == 0
    )
    samples = samples_of(tmp_path / "out")
    assert [samples[str(number)][0] for number in range(3)] == ["train", "valid", "test"]
    assert {samples[f"r{number}"][0] for number in range(8)} == {"train", "valid"}
    printed = capsys.readouterr().out
    assert "corpus: a table, official splits" in printed
    assert "raw: a table, split by speaker" in printed
    assert main(["build", str(tmp_path / "raw"), "--out", str(tmp_path / "x"), *TRACK, "--splits", "official"]) == 1
    assert "--splits official: the rows of" in capsys.readouterr().err


def test_a_set_grows_with_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_librispeech(tmp_path / "LibriSpeech")
    out = tmp_path / "out"
    for number, subset in enumerate(("train-clean-100", "dev-clean", "test-other")):
        source = tmp_path / "LibriSpeech" / subset
        assert main(["build", str(source), "--out", str(out), *TRACK, *["--append"] * (number > 0)]) == 0
    printed = capsys.readouterr().out
    assert "there is nothing to validate on" in printed.split("built")[0]
    assert {key: split for key, (split, _) in samples_of(out).items()} == make_librispeech(tmp_path / "LibriSpeech")
    assert_balanced(out)
    # a speaker that was in training comes back in test
    chapter = tmp_path / "more/test-clean/19/200"
    make_audio(chapter / "19-200-0000.flac")
    write_lines(chapter / "19-200.trans.txt", ["19-200-0000 WORDS"])
    assert main(["build", str(tmp_path / "more/test-clean"), "--out", str(out), *TRACK, "--append"]) == 0
    assert "19 (train, test)" in capsys.readouterr().out
    index = read_index(open_store(out))
    assert index.notes["shared_speakers"]["count"] == 1
    assert index.settings["splits"] == "official"


def test_held_out_clips_are_not_filtered_by_their_labels(tmp_path: Path) -> None:
    make_table(tmp_path / "corpus", ["train", "dev", "test"] * 30)
    table = (tmp_path / "corpus/table.csv").read_text().splitlines()
    table[1:4] = [line.replace(TEXT, TEXT * 20) for line in table[1:4]]  # more symbols than frames
    table[4:7] = [line.replace(TEXT, "ß " + TEXT) for line in table[4:7]]  # a symbol that the track has not
    write_lines(tmp_path / "corpus/table.csv", table)
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--max-reject-rate", "1"]
    assert main(build) == 0
    samples = samples_of(tmp_path / "out")
    assert [samples[name][0] if name in samples else "rejected" for name in ("0", "1", "2")] == [
        "unlabelled",
        "valid",
        "test",
    ]
    assert [samples[name][0] if name in samples else "rejected" for name in ("3", "4", "5")] == [
        "rejected",
        "valid",
        "test",
    ]


def test_long_test_recordings_are_references(tmp_path: Path) -> None:
    for name in ("train", "dev", "test", "unlabelled"):
        make_audio(tmp_path / f"corpus/{name}.flac", 8.0)
    rows = [{"audio_path": f"{name}.flac", "orthographic_text": TEXT, "child_id": name, "split": name}
            for name in ("train", "dev", "test", "unlabelled")]  # fmt: skip
    write_lines(tmp_path / "corpus/rows.jsonl", rows)
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--max-duration", "3"]
    assert main(build) == 0
    for name, split in (("dev", "valid"), ("test", "test"), ("unlabelled", "unlabelled")):
        pieces = [(where, one) for where, one in read_all(tmp_path / "out").values() if one.parent_id == name]
        status = "unlabelled" if split == "unlabelled" else "reference"
        assert {(where, one.label_status, one.text) for where, one in pieces} == {(split, status, "")}
        assert len(pieces) > 1
        assert {one.parent_text for _, one in pieces if one.piece == 0} == {TEXT}
    assert_balanced(tmp_path / "out")


# --- ranges of longer recordings ------------------------------------------------------------------------------------

SPANS = [(0.0, 1.0), (0.75, 1.5), (2.0, None), (1.003, 0.4), (0.0, 3.0)]  # offset and duration in s, some overlap


def make_ranges(folder: Path, suffix: str, rate: int) -> dict[str, np.ndarray]:
    """Make a recording of 3 s and a table of ranges of it. Return the sound of each, at the rate of the recording."""
    make_audio(folder / f"long.{suffix}", 3.0, rate)
    whole, _ = soundfile.read(folder / f"long.{suffix}", dtype="float32")
    sounds, rows = {}, []
    for number, (offset, duration) in enumerate(SPANS):
        stop = len(whole) if duration is None else round((offset + duration) * rate)
        sounds[f"u{number}"] = whole[round(offset * rate) : stop]
        rows.append({"utterance_id": f"u{number}", "audio_path": f"long.{suffix}", "orthographic_text": TEXT,
                     "begin": offset, "duration_sec": duration, "child_id": f"c{number}"})  # fmt: skip
    write_lines(folder / "rows.jsonl", rows)
    return sounds


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 16_000), ("flac", 16_000), ("ogg", 44_100), ("mp3", 32_000)])
def test_a_range_of_a_recording_is_a_clip(suffix: str, rate: int, tmp_path: Path) -> None:
    sounds = make_ranges(tmp_path / "corpus", suffix, rate)
    build = ["build", str(tmp_path / "corpus"), *TRACK, "--columns", "offset_sec=begin", "--shard-mb", "0.01"]
    outs = [tmp_path / "out", tmp_path / "again"]
    for out, workers in zip(outs, ("1", "3"), strict=True):
        assert main([*build, "--out", str(out), "--workers", workers]) == 0
        assert_balanced(out)
    assert digest_of(outs[0]) == digest_of(outs[1])
    for name, sound in sounds.items():
        waveform, passthrough = decode(samples_of(outs[0])[name][1].audio, prove=True)
        assert passthrough
        assert abs(len(waveform) - len(sound) * SAMPLE_RATE / rate) <= 1
        if rate == SAMPLE_RATE:
            assert np.abs(waveform - sound).max() <= 2**-15


def test_a_range_of_a_recording_in_a_zip_is_a_clip(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    sounds = make_ranges(folder, "wav", SAMPLE_RATE)
    with zipfile.ZipFile(folder / "audio.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "long.wav", "long.wav")
    (folder / "long.wav").unlink()
    assert main(["build", str(folder), "--out", str(tmp_path / "out"), *TRACK, "--columns", "offset_sec=begin"]) == 0
    for name, (_, sample) in samples_of(tmp_path / "out").items():
        assert np.abs(decode(sample.audio)[0] - sounds[name]).max() <= 2**-15


def test_a_range_is_read_without_the_rest(tmp_path: Path) -> None:
    """Damage before and behind it does not matter, and a file of hours costs no more than one of seconds."""
    make_ranges(tmp_path / "corpus", "flac", 16_000)
    data = bytearray((tmp_path / "corpus/long.flac").read_bytes())
    data[-2_000:-1_000] = bytes(1_000)
    (tmp_path / "corpus/long.flac").write_bytes(data)
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--columns", "offset_sec=begin"]
    assert main([*build, "--max-reject-rate", "1"]) == 0
    fates = {row["utterance_id"]: row["fate"] for row in read_ledger(tmp_path / "out")}
    assert fates == {"u0": "written", "u1": "written", "u2": "rejected", "u3": "written", "u4": "rejected"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"offset_sec": 2.5, "duration_sec": 1.0},
            "the range from 2.5 s to 3.5 s leads beyond the recording's end at 3.000 s",
        ),
        ({"offset_sec": 3.0}, "leads beyond the recording's end"),
        ({"offset_sec": 1.0, "duration_sec": 0.0}, "the range from 1 s to 1 s is empty"),
        ({"offset_sec": 1.0, "duration_sec": 0.01}, "shorter than one frame"),
        ({}, "3 rows name this audio file"),
        ({"offset_sec": 0.0, "duration_sec": 1.0}, "2 rows name this range of this audio file"),
    ],
)
def test_a_range_that_is_none_is_rejected(fields: dict[str, float], reason: str, tmp_path: Path) -> None:
    make_audio(tmp_path / "corpus/long.wav", 3.0)
    ranges = [{"offset_sec": 0.0, "duration_sec": 1.0}, {"offset_sec": 1.5, "duration_sec": 1.52}, fields]
    rows = [{"utterance_id": f"u{number}", "audio_path": "long.wav", "orthographic_text": TEXT, **span}
            for number, span in enumerate(ranges)]  # fmt: skip
    write_lines(tmp_path / "corpus/rows.jsonl", rows)
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--max-reject-rate", "1"]
    main(build)
    ledger = {row["utterance_id"]: row for row in read_ledger(tmp_path / "out")}
    assert ledger["u2"]["fate"] == "rejected"
    assert reason in ledger["u2"]["reason"]
    assert ledger["u1"]["fate"] == ("rejected" if "3 rows" in reason else "written")


def test_ranges_of_a_recording_stay_on_one_side(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        make_audio(tmp_path / f"corpus/{number}.wav", 2.0)
        rows += [{"audio_path": f"{number}.wav", "orthographic_text": TEXT, "offset_sec": offset, "duration_sec": 0.6}
                 for offset in (0, 0.5, 1.25)]  # fmt: skip
    write_lines(tmp_path / "corpus/rows.jsonl", rows)
    assert (
        main(["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--valid-fraction", "0.4"])
        == 0
    )
    sides: dict[str, set[str]] = {}
    for name, (split, _) in samples_of(tmp_path / "out").items():
        sides.setdefault(name.split("-")[0], set()).add(split)
    assert len(sides) == 12
    assert all(len(found) == 1 for found in sides.values())
    assert set().union(*sides.values()) == {"train", "valid"}


def test_a_long_range_is_split_and_repaired(tmp_path: Path) -> None:
    make_audio(tmp_path / "corpus/long.wav", 12.0)
    rows = [{"utterance_id": f"u{offset}", "audio_path": "long.wav", "orthographic_text": TEXT, "offset_sec": offset,
             "duration_sec": length, "child_id": str(offset)} for offset, length in [(1, 8), (9, 2)]]  # fmt: skip
    write_lines(tmp_path / "corpus/rows.jsonl", rows)
    out = tmp_path / "out"
    build = [
        "build",
        str(tmp_path / "corpus"),
        "--out",
        str(out),
        *TRACK,
        "--max-duration",
        "3",
        "--valid-fraction",
        "0",
    ]
    assert main(build) == 0
    assert_balanced(out)
    index = read_index(open_store(out))
    pieces = [sample for _, sample in read_all(out).values() if sample.parent_id == "u1"]
    assert sum(len(decode(piece.audio)[0]) for piece in pieces) == 8 * SAMPLE_RATE
    before = digest_of(out)
    for shard in index.shards:
        (out / shard.name).write_bytes(b"damaged")
    assert main(["verify", str(out), "--repair", str(tmp_path / "corpus")]) == 0
    assert digest_of(out) == before
    assert read_sample(open_store(out), index, 0).audio


def test_a_changed_range_is_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ranges(tmp_path / "corpus", "wav", 16_000)
    build = ["build", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), *TRACK, "--columns", "offset_sec=begin"]
    assert main(build) == 0
    rows = (tmp_path / "corpus/rows.jsonl").read_text()
    (tmp_path / "corpus/rows.jsonl").write_text(rows.replace("0.75", "0.5"))
    assert main(build) == 1
    assert "built from other sources, or its sources have changed" in capsys.readouterr().err


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    make_librispeech(tmp_path)
    (tmp_path / "dev-clean/84/198/84-198.trans.txt").write_bytes(b"84-198-0000 A\n84-198-0001 \xff\n")
    with pytest.raises(ManifestError, match=r"84-198\.trans\.txt:2: not UTF-8"):
        read_source(tmp_path, ManifestOptions("word"))


def test_a_published_test_is_not_appended_to_a_set_that_was_split_by_speaker(
    tmp_path: Path, run_sharding: Command
) -> None:
    """It would be trained on; unless the user says that speakers decide."""
    first, second, out = make_corpus(tmp_path / "first"), make_corpus(tmp_path / "second", seed=1), tmp_path / "out"
    rows = [row | {"split": ("train", "dev", "test")[i % 3]} for i, row in enumerate(read_manifest(second))]
    write_manifest(second, rows)
    assert run_sharding("build", first, "--out", out).returncode == 0
    refused = run_sharding("build", second, "--out", out, "--append")
    assert refused.returncode == 1
    assert "has splits of its own, but the shard set was split by speaker" in refused.stderr
    done = run_sharding("build", second, "--out", out, "--append", "--splits", "hash")
    assert done.returncode == 0, done.stderr
    official = tmp_path / "official"
    assert run_sharding("build", second, "--out", official).returncode == 0
    done = run_sharding("build", first, "--out", official, "--append")  # a source without splits goes by speaker
    assert done.returncode == 0, done.stderr
    assert len(read_index(open_store(official)).split("test")) == len(rows) // 3
