"""TIMIT as it is on the disc, and as its copies are: fake trees with the real names of speakers, and sound of noise."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.audio.codec import decode, probe
from sharding.errors import AudioError, ManifestError
from sharding.labels.timit import PHONES
from sharding.sources.manifest import Utterance, read_source
from sharding.sources.options import ManifestOptions
from sharding.sources.timit import CORE, DEVELOPMENT
from tests.tools.commands import Command
from tests.tools.shard_sets import assert_balanced, read_all, read_ledger

SENTENCES = ("SA1", "SI573", "SX37")
SPEAKERS = {  # by dialect and name; FCJF0 trains, FAKS0 is of the development set, MDAB0 of the core test
    "TRAIN/DR1/FCJF0": "train",
    "TRAIN/DR2/MARC0": "train",
    "TEST/DR1/FAKS0": "valid",
    "TEST/DR1/MDAB0": "test",
    "TEST/DR1/FJSP0": "test",
}
WORDS = "Don't ask me to carry an oily rag, like that."
PHONE_LINES = "0 2260 h#\n2260 4149 sh\n4149 5000 iy\n5000 8000 ax-h\n8000 16000 h#\n"


def make_timit(top: Path, *, lower: bool = False, twins: bool = False, only_twins: bool = False) -> Path:
    rng = np.random.default_rng(1)

    def named(name: str) -> Path:
        path = top / (name.lower() if lower else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    for speaker in SPEAKERS:
        for sentence in SENTENCES:
            stem = f"{speaker}/{sentence}"
            sound = 0.1 * rng.standard_normal(16_000)
            if not only_twins:
                soundfile.write(named(f"{stem}.WAV"), sound, 16_000, format="NIST", subtype="PCM_16")
            if twins or only_twins:
                riff = named(f"{stem}.WAV").with_name(named(f"{stem}.WAV").name + ".wav")
                soundfile.write(riff, sound, 16_000, format="WAV", subtype="PCM_16")
            named(f"{stem}.TXT").write_text(f"0 16000 {WORDS}\n")
            named(f"{stem}.PHN").write_text(PHONE_LINES)
            named(f"{stem}.WRD").write_text("2260 5000 don't\n5000 8000 ask\n")
    return top


def rows_of(location: Path, **options: object) -> dict[str, Utterance]:
    source = read_source(location, ManifestOptions(**options))  # type: ignore[arg-type]
    assert source.layout.name == "TIMIT"
    return {row.utterance_id: row for row in map(source.parse, range(len(source)))}


def label_file(top: Path, suffix: str = "TXT") -> Path:
    return top / f"TRAIN/DR1/FCJF0/SI573.{suffix}"


def test_the_lists_of_speakers_are_of_the_published_sizes() -> None:
    assert (len(DEVELOPMENT), len(CORE), len(DEVELOPMENT & CORE)) == (50, 24, 0)
    assert Counter(name[0] for name in CORE) == {"M": 16, "F": 8}


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("twins", [{}, {"twins": True}, {"only_twins": True}])
@pytest.mark.parametrize("above", ["", "TIMIT", "data"])
def test_every_copy_gives_the_same_clips_and_the_published_splits(
    tmp_path: Path, lower: bool, twins: dict[str, bool], above: str
) -> None:
    make_timit(tmp_path / "corpus" / above, lower=lower, **twins)
    (tmp_path / "corpus/train_data.csv").write_text("index,path_from_data_dir\n1,TRAIN/DR1/FCJF0/SI573.WAV\n")
    rows = rows_of(tmp_path / "corpus")
    expected = {f"{path.rpartition('/')[2]}_{sentence}": split for path, split in SPEAKERS.items()
                for sentence in SENTENCES[1:]}  # fmt: skip
    assert {name: row.split for name, row in rows.items()} == expected
    row = rows["FCJF0_SI573"]
    assert (row.text, row.child_id, row.session_id) == (WORDS, "FCJF0", "DR1")
    assert row.words == (("don't", 0.14125, 0.3125), ("ask", 0.3125, 0.5))
    assert {name.partition("_")[0] for name, row in rows.items() if row.corpus == "corpus core test"} == {"MDAB0"}
    assert {row.corpus for row in rows.values()} == {"corpus", "corpus core test"}


def test_a_part_of_the_disc_is_read_by_itself(tmp_path: Path) -> None:
    top = make_timit(tmp_path / "TIMIT")
    whole = rows_of(top)
    for part in ("TRAIN", "TEST"):
        rows = rows_of(top / part)
        expected = {name for name, row in whole.items() if row.audio_path.startswith(part)}
        assert (rows.keys(), part == "TRAIN") == (expected, {row.split for row in rows.values()} == {"train"})


@pytest.mark.parametrize("name", ["train", "test", "TRAIN"])
def test_a_disc_in_a_folder_of_such_a_name_is_a_whole_disc(tmp_path: Path, name: str) -> None:
    top = make_timit(tmp_path / name)
    assert {row.split for row in rows_of(top).values()} == {"train", "valid", "test"}


@pytest.mark.parametrize("way", ["..", ".", "link"])
def test_train_under_another_name_is_still_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    train = make_timit(tmp_path / "TIMIT") / "TRAIN"
    (train / "link").symlink_to(train)
    monkeypatch.chdir(train / "DR1" if way == ".." else train)
    assert {row.split for row in rows_of(Path(way)).values()} == {"train"}


def test_a_disc_without_word_times_is_read_without_them(tmp_path: Path) -> None:
    label_file(make_timit(tmp_path), "WRD").unlink()
    assert {name for name, row in rows_of(tmp_path).items() if not row.words} == {"FCJF0_SI573"}


def test_sa_sentences_are_read_on_request(tmp_path: Path) -> None:
    make_timit(tmp_path)
    extra = rows_of(tmp_path, include_sa=True).keys() - rows_of(tmp_path).keys()
    assert extra == {f"{path.rpartition('/')[2]}_SA1" for path in SPEAKERS}


def test_phones_are_tokens_of_the_61(tmp_path: Path) -> None:
    texts = {row.text for row in rows_of(make_timit(tmp_path), labels="phones").values()}
    assert texts == {"h# sh iy ax-h h#"}
    assert set(texts.pop().split()) <= set(PHONES)


@pytest.mark.parametrize(
    ("suffix", "text", "said"),
    [
        ("TXT", "", "0 lines with text, one is expected"),
        ("TXT", "0 16000 One.\n0 16000 Two.\n", "2 lines with text, one is expected"),
        ("TXT", "0 One.\n", r"SI573\.TXT:1: '0 One\.': start, end and label are expected"),
        ("PHN", "\n", "there is no phone in it"),
        ("PHN", "0 2260 h#\n2260 sh\n", r"SI573\.PHN:2: '2260 sh': start, end and label are expected"),
        ("PHN", "0 2260 h# sh\n", r"SI573\.PHN:1: '0 2260 h# sh': start, end and label"),
        ("PHN", "0 2260 h#\n2260 2000 sh\n", r"SI573\.PHN:2: ends at sample 2000, before its start at 2260"),
        ("WRD", "0 2260 do ask\n", r"SI573\.WRD:1: '0 2260 do ask': start, end and label are expected"),
        ("WRD", "0 8000 don't\n8000 16000 ask\nx\n", r"SI573\.WRD:3: 'x': start, end and label are expected"),
        ("PHN", "100 2260 h#\n50 2300 sh\n", r"SI573\.PHN:2: begins at sample 50, the one before it at 100"),
    ],
)
def test_a_malformed_label_is_named_with_its_line(tmp_path: Path, suffix: str, text: str, said: str) -> None:
    label_file(make_timit(tmp_path), suffix).write_text(text)
    with pytest.raises(ManifestError, match=said):
        rows_of(tmp_path, labels="phones" if suffix == "PHN" else "text")


@pytest.mark.parametrize("suffix", ["TXT", "PHN"])
def test_a_missing_label_is_named_and_the_other_labels_are_offered(tmp_path: Path, suffix: str) -> None:
    label_file(make_timit(tmp_path), suffix).unlink()
    labels, other = ("text", "phones") if suffix == "TXT" else ("phones", "text")
    with pytest.raises(ManifestError, match=rf"FCJF0/SI573\.{suffix}: is missing") as caught:
        rows_of(tmp_path, labels=labels)
    assert f"--labels {other}" in str(caught.value.hint)
    rows_of(tmp_path, labels=other)


def test_a_table_has_no_phones_beside_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("audio_path,phonetic_text\na.wav,k\n")
    with pytest.raises(ManifestError, match=r"--labels phones: .* is no corpus that has both"):
        read_source(tmp_path, ManifestOptions(labels="phones"))


def test_a_build_of_the_disc_is_balanced_and_tells_the_core_test_apart(tmp_path: Path, run_sharding: Command) -> None:
    top = make_timit(tmp_path / "TIMIT", twins=True)
    (top / "TRAIN/DR2/MARC0/SX37.WAV").unlink()
    (top / "TRAIN/DR2/MARC0/SX37.WAV.wav").unlink()
    out = tmp_path / "out"
    command = ["build", top, "--out", out, "--track", "word", "--workers", 1, "--max-reject-rate", 0.2]
    done = run_sharding(*command)
    assert done.returncode == 0, done.stderr
    assert_balanced(out)
    summary = json.loads((out / "report/summary.json").read_text())
    assert (summary["orphan_audio"], summary["ignored_fields"]) == (0, [])  # SA sentences are left out on purpose
    assert {sample.words for _, sample in read_all(out).values()} == {
        (("don't", 0.14125, 0.3125), ("ask", 0.3125, 0.5))
    }
    ledger = read_ledger(out)
    assert {row["reason"] for row in ledger if row["fate"] == "rejected"} == {"audio file is missing"}
    assert Counter(row["split"] for row in ledger) == {"train": 4, "valid": 2, "test": 4}
    assert Counter(row["source"] for row in ledger) == {"TIMIT": 8, "TIMIT core test": 2}
    again = run_sharding(*command, "--append")
    assert again.returncode == 0, again.stderr
    assert "9 of the clips to append were there already" in again.stdout


# --- SPHERE -----------------------------------------------------------------------------------------------------


def test_compressed_sphere_is_refused_by_its_header_and_names_the_tool(tmp_path: Path) -> None:
    path = tmp_path / "a.sph"
    soundfile.write(path, np.zeros(16_000), 16_000, format="NIST", subtype="PCM_16")
    plain = path.read_bytes()
    coding = b"sample_coding -s3 pcm"
    assert coding in plain
    header = plain[:1024].replace(coding, b"sample_coding -s26 pcm,embedded-shorten-v2.00")[:1024]
    data = header + b"ajkg\x02" + bytes(4_000)
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(AudioError, match=r"embedded-shorten-v2\.00: convert it, sph2pipe"):
        probe(file)
    with pytest.raises(AudioError, match=r"embedded-shorten-v2\.00: convert it, sph2pipe"):
        decode(data)
    assert len(decode(plain)[0]) == 16_000
