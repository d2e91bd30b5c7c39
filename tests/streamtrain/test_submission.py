"""The zip keeps the challenge's contract: alone, offline, every id once; and says what `transcribe` says."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sharding.audio.codec import SAMPLE_RATE, encode
from sharding.labels.policy import policy_of
from sharding.shardset.index import join_samples, pack_index, read_index, read_sample, write_index, write_shard
from sharding.shardset.sample import escape_key
from sharding.shardset.store import open_store
from streamtrain.infer.inputs import find_recordings
from streamtrain.infer.transcribe import transcribe
from streamtrain.model.ctc import CTCModel
from streamtrain.model.tokenizer import save_vocab
from streamtrain.model.vocab import vocab_of
from streamtrain.submission.package import TAKEN_ALONG, PackageError, package, rehearse, render
from tests.tools.commands import ROOT, run_module
from tests.tools.corpus import make_corpus, sound
from tests.tools.models import make_network, save, talkative

Row = dict[str, Any]
SECONDS = (0.03, 0.3, 1.1, 2.2, 2.3, 6.0, 12.0, 26.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(talkative("wav2vec2, group norm"), tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The challenge's folder: clips of all lengths, of which one is missing, one damaged and one too short."""
    return lay_out(tmp_path_factory.mktemp("challenge") / "data", "phonetic_text")


def lay_out(folder: Path, field: str) -> Path:
    (folder / "audio").mkdir(parents=True)
    names = [f"U_{number}" for number in range(len(SECONDS))]
    for number, (name, seconds) in enumerate(zip(names, SECONDS, strict=True)):
        (folder / "audio" / f"{name}.flac").write_bytes(encode(sound(seconds, number)))
    (folder / "audio" / "U_damaged.flac").write_bytes(encode(sound(1, 1))[:900])
    (folder / "audio" / "U_short.flac").write_bytes(encode(np.zeros(300, np.float32)))
    names = [*names[::-1], "U_damaged", "U_missing", "U_short"]  # in no order that a program would choose
    metadata = [{"utterance_id": name, "audio_path": f"audio/{name}.flac", "age_bucket": "5-7"} for name in names]
    write(folder / "utterance_metadata.jsonl", metadata)
    write(folder / "submission_format.jsonl", [{"utterance_id": name, field: ""} for name in names])
    return folder


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def unpacked(archive: Path, folder: Path, data: Path) -> Path:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    (folder / "data").symlink_to(data)
    return folder


@pytest.mark.parametrize("family", ["wav2vec2, group norm", "WavLM, layer norm"])
def test_it_says_what_transcribe_says(family: str, data: Path, tmp_path: Path) -> None:
    folder = save(talkative(family), tmp_path / "best")
    package(folder, tmp_path / "submission.zip")
    done = rehearse(tmp_path / "submission.zip", str(data))
    assert (done.clips, done.unread) == (len(SECONDS) + 3, 3)
    assert done.log_lines < 60
    assert done.rate is None
    rows = submission_of(tmp_path / "submission.zip", data, tmp_path / "there")
    transcribe(folder, find_recordings([str(data / "audio")]), tmp_path / "ours.jsonl")
    ours = {row["utterance_id"]: row["phonetic_text"] for row in read(tmp_path / "ours.jsonl")}
    assert [row["utterance_id"] for row in rows] == [
        row["utterance_id"] for row in read(data / "submission_format.jsonl")
    ]
    for row in rows:
        name, text = row["utterance_id"], row["phonetic_text"]
        assert text == ours.get(name, ""), name
    assert sum(bool(row["phonetic_text"]) for row in rows) >= len(SECONDS) - 1


def submission_of(archive: Path, data: Path, folder: Path) -> list[Row]:
    unpacked(archive, folder, data)
    subprocess.run([sys.executable, "-I", "main.py"], cwd=folder, check=True, capture_output=True)
    return read(folder / "submission" / "submission.jsonl")


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_word_track_writes_words(tmp_path: Path) -> None:
    network = make_network("wav2vec2, group norm")
    vocab = vocab_of(policy_of("english"))
    network.lm_head = type(network.lm_head)(network.lm_head.in_features, len(vocab))
    network.config.vocab_size = len(vocab)
    folder = save(CTCModel(network, vocab, normalize=True).eval(), tmp_path / "best")
    command = ["package", folder, "--out", tmp_path / "zips" / "words.zip", "--check"]
    done = run_module("streamtrain", *command, lay_out(tmp_path / "data", "orthographic_text"))
    assert done.returncode == 0, done.stderr
    assert "words.zip: written" in done.stdout
    assert "profile english" in done.stdout
    assert "3 unread, 0 in part" in done.stdout


def test_the_command_rehearses_on_noise_or_on_a_shard_set(model: Path, small_shards: Path, tmp_path: Path) -> None:
    for data, said in ((), "rehearsed offline on 16 clips"), ((small_shards,), ", CER "):
        done = run_module("streamtrain", "package", model, "--out", tmp_path / "submission.zip", "--check", *data)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert "minutes on this machine's cpu" in done.stdout


def test_recordings_that_the_build_split_are_said_to_be_left_out(model: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "raw", clips=6, children=2, long_clips=1)
    done = run_module("sharding", "build", tmp_path / "raw", "--out", tmp_path / "shards", "--valid-fraction", 1)
    assert done.returncode == 0, done.stderr
    package(model, tmp_path / "submission.zip")
    rehearsed = rehearse(tmp_path / "submission.zip", str(tmp_path / "shards"))
    assert (rehearsed.clips, rehearsed.left_out) == (6, 1)
    assert f"CER {rehearsed.rate:.4f} without 1 recording that the build split" in render(rehearsed, "phonetic")


def test_the_same_model_makes_the_same_zip_with_nothing_else_in_it(model: Path, tmp_path: Path) -> None:
    (shutil.copytree(model, tmp_path / "copy") / "optimizer.pt").write_bytes(b"not for others")
    package(model, tmp_path / "one.zip")
    package(tmp_path / "copy", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert set(packed.namelist()) == {
            "main.py", "submission.json", "model/config.json", "model/model.safetensors", "model/vocab.json",
            *(f"{folder}/{name}" for folder, names in TAKEN_ALONG.items() for name in names),
        }  # fmt: skip


GOOD = """
import json, os
os.mkdir("submission")
rows = [json.loads(line) for line in open("data/submission_format.jsonl")]
print("ready: on cpu after 0.1 s")
with open("submission/submission.jsonl", "w") as out:
    for row in rows:
        out.write(json.dumps(row) + "\\n")
print("done: 0 clips unread, 0 in part, 3.0 s of speech, 0.2 s")
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("import json", "import deepspeed, json", "No module named 'deepspeed'"),
        ("import json", "import sharding, json", "No module named 'sharding'"),
        ("import json", "import socket, json\nsocket.create_connection(('127.0.0.1', 9))", "there is no network"),
        ("in rows:", "in rows[1:]:", "lacking ['U_7']"),
        ("in rows:", "in rows + rows[:1]:", "surplus ['U_7']"),
        ("in rows:", "in rows[::-1]:", "in another order"),
        ("dumps(row)", "dumps(row | {'phonetic_text': 'kaß'})", "symbols that are not allowed: 'a' U+0061, 'ß' U+00DF"),
        ("dumps(row)", "dumps(row | {'text': 'x'})", "utterance_id and phonetic_text are wanted"),
        ("dumps(row)", "dumps(row | {'phonetic_text': None})", "utterance_id and phonetic_text are wanted"),
        ("import json", "print('x\\n' * 500)\nimport json", "its log has 503 lines of up to "),
        ("import json", "print('x' * 301)\nimport json", "its log has 3 lines of up to 301 characters"),
        ('"submission/submission.jsonl"', '"submission.jsonl"', "wrote no submission/submission.jsonl"),
        ('print("done', 'raise SystemExit(3)\nprint("done', "ended with status 3"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract_is_refused(before: str, after: str, said: str, data: Path, tmp_path: Path) -> None:
    script = GOOD.replace(before, after)
    assert script != GOOD
    for name, main in (("good", GOOD), ("bad", script)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("main.py", main)
            archive.writestr("submission.json", json.dumps({"field": "phonetic_text"}))
    assert rehearse(tmp_path / "good.zip", str(data)).clips == len(SECONDS) + 3
    with pytest.raises(PackageError) as refused:
        rehearse(tmp_path / "bad.zip", str(data))
    assert said in refused.value.message


def test_a_module_of_the_submission_is_found_though_one_of_its_name_is_installed_and_hidden(tmp_path: Path) -> None:
    """The zip brings a `streamtrain` of its own; of an installed one it sees nothing."""
    for place in ("installed", "there"):
        (tmp_path / place / "streamtrain").mkdir(parents=True)
        (tmp_path / place / "streamtrain" / "__init__.py").write_text(f"where = {place!r}")
    (tmp_path / "installed" / "other.py").write_text("")
    info = tmp_path / "installed" / "streamtrain-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: streamtrain\nVersion: 0.1.0\n")
    (info / "top_level.txt").write_text("streamtrain\nother\n")
    main = tmp_path / "there" / "main.py"
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); sys.path.insert(0, {str(ROOT)!r})\n"
    script += "from streamtrain.submission import sandbox\n"
    script += "for name in [name for name in sys.modules if name.startswith('streamtrain')]: del sys.modules[name]\n"
    script += f"sandbox.rehearse(['numpy'], {str(main)!r})\n"
    finds = f"import sys\nsys.path.insert(0, {str(main.parent)!r})\n"
    main.write_text(finds + "import streamtrain\nprint(streamtrain.where)\nimport other\n")
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "there\n"
    assert "No module named 'other'" in done.stderr


def test_a_file_that_lies_about_its_length_costs_no_more_than_itself(model: Path, tmp_path: Path) -> None:
    """One that promises 2³⁶ − 1 samples, and one that, as streams do, says nothing of it."""
    (tmp_path / "data" / "audio").mkdir(parents=True)
    good = encode(sound(3, 1))
    packed = int.from_bytes(good[18:26], "big") & ~(2**36 - 1)  # the last 36 bits are the number of samples
    for name, samples in (("lies", 2**36 - 1), ("streams", 0), ("whole", 3 * SAMPLE_RATE)):
        data = good[:18] + (packed | samples).to_bytes(8, "big") + good[26:]
        (tmp_path / "data" / "audio" / f"{name}.flac").write_bytes(data)
    write(
        tmp_path / "data" / "submission_format.jsonl", [{"utterance_id": name} for name in ("lies", "streams", "whole")]
    )
    package(model, tmp_path / "submission.zip")
    lies, streams, whole = submission_of(tmp_path / "submission.zip", tmp_path / "data", tmp_path / "there")
    assert streams["phonetic_text"] == whole["phonetic_text"] != ""
    assert lies["phonetic_text"] in ("", whole["phonetic_text"])


def test_what_is_projected_is_of_the_clips_that_were_asked_for(model: Path, tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data", "phonetic_text")
    write(data / "submission_format.jsonl", [{"utterance_id": "U_3"}])
    package(model, tmp_path / "submission.zip")
    done = rehearse(tmp_path / "submission.zip", str(data))
    assert done.speech_sec == pytest.approx(SECONDS[3], abs=0.1)
    assert "torch 2" in done.versions


def test_ids_may_be_anything(model: Path, small_shards: Path, tmp_path: Path) -> None:
    store = open_store(small_shards)
    index = read_index(store)
    rows = index.split("valid").tolist()
    made = [
        write_shard(open_store(tmp_path / "shards"), f"valid/b00-0000{number}.tar", 0,
                    [(replace(read_sample(store, index, row), key=escape_key(name), utterance_id=name),
                      int(index.samples["samples"][row]))], index.labels)
        for number, (row, name) in enumerate(zip(rows, ("a/b", "../../escaped"), strict=False))
    ]  # fmt: skip
    tables = [shard.samples.copy() for shard in made]
    for number, table in enumerate(tables):
        table["shard"] = number
    entries = tuple(shard.entry for shard in made)
    whole = replace(index, shards=entries, samples=join_samples(tables))
    write_index(open_store(tmp_path / "shards"), pack_index(whole))
    package(model, tmp_path / "submission.zip")
    assert rehearse(tmp_path / "submission.zip", str(tmp_path / "shards")).unread == 0


def test_a_folder_that_is_no_model_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    for lacking, said in (
        ("vocab.json", "no vocabulary"), ("model.safetensors", "cannot be loaded"), ("its own", "is another model's"),
    ):  # fmt: skip
        folder = shutil.copytree(model, tmp_path / lacking, ignore=shutil.ignore_patterns("SHA256SUMS"))
        if lacking == "its own":
            save_vocab(vocab_of(policy_of("english")), folder, True, True)
        else:
            (folder / lacking).unlink()
        done = run_module("streamtrain", "package", folder, "--out", tmp_path / "submission.zip")
        assert done.returncode == 1
        assert said in done.stderr
    assert not list(tmp_path.glob("*.zip*"))


def odd_clips(folder: Path) -> list[str]:
    """Clips as people have them, and of each the name that a submission would give it."""
    whole, other = sound(3, 1), sound(3, 2)
    noisy = np.concatenate([sound(14, 3), np.zeros(8_000, np.float32), sound(16, 4)])
    clips: dict[str, tuple[np.ndarray, int, str]] = {
        "mono.flac": (whole, SAMPLE_RATE, "PCM_16"),
        "stereo.flac": (np.stack([whole, other], 1), SAMPLE_RATE, "PCM_16"),
        "antiphase.flac": (np.stack([whole, -whole], 1), SAMPLE_RATE, "PCM_16"),
        "integers.wav": (whole * 2**15, SAMPLE_RATE, "FLOAT"),
        "deep.flac": (whole, SAMPLE_RATE, "PCM_24"),
        "slow.flac": (whole, 8_000, "PCM_16"),
        "quick.flac": (whole, 44_100, "PCM_16"),
        "long.flac": (noisy, SAMPLE_RATE, "PCM_16"),
    }
    for name, (samples, rate, subtype) in clips.items():
        soundfile.write(folder / name, samples, rate, subtype=subtype)
    return list(clips)


def test_odd_clips_get_the_text_that_transcribe_gives_them(model: Path, tmp_path: Path) -> None:
    """Two channels, opposite ones, floats in the range of integers, other rates, and what has to be cut."""
    audio = tmp_path / "data" / "audio"
    audio.mkdir(parents=True)
    names = odd_clips(audio)
    write(tmp_path / "data" / "submission_format.jsonl", [{"utterance_id": Path(name).stem} for name in names])
    write(
        tmp_path / "data" / "utterance_metadata.jsonl",
        [{"utterance_id": Path(name).stem, "audio_path": f"audio/{name}"} for name in names],
    )
    package(model, tmp_path / "submission.zip")
    assert rehearse(tmp_path / "submission.zip", str(tmp_path / "data")).unread == 0  # nothing else need be installed
    rows = submission_of(tmp_path / "submission.zip", tmp_path / "data", tmp_path / "there")
    transcribe(model, find_recordings([str(audio)]), tmp_path / "ours.jsonl")
    ours = {row["utterance_id"]: row["phonetic_text"] for row in read(tmp_path / "ours.jsonl")}
    assert {row["utterance_id"]: row["phonetic_text"] for row in rows} == ours
    assert all(ours.values())
    assert ours["mono"] == ours["antiphase"] == ours["integers"] != ours["slow"]


def test_a_clip_that_is_not_whole_keeps_what_is_left_and_is_named(model: Path, tmp_path: Path) -> None:
    audio, whole = tmp_path / "data" / "audio", sound(3, 1)
    audio.mkdir(parents=True)
    holes = whole.copy()
    holes[20_000:20_010] = np.nan, np.inf, -np.inf, *[np.nan] * 7
    soundfile.write(audio / "holes.wav", holes, SAMPLE_RATE, subtype="FLOAT")
    flac = encode(whole)
    (audio / "cut.flac").write_bytes(flac[: len(flac) * 2 // 3])
    soundfile.write(audio / "half.wav", whole, SAMPLE_RATE, subtype="PCM_16")
    half = (audio / "half.wav").read_bytes()
    (audio / "half.wav").write_bytes(half[: len(half) // 2])
    rows = [{"utterance_id": path.stem, "audio_path": f"audio/{path.name}"} for path in sorted(audio.iterdir())]
    write(tmp_path / "data" / "submission_format.jsonl", [{"utterance_id": row["utterance_id"]} for row in rows])
    write(tmp_path / "data" / "utterance_metadata.jsonl", rows)
    package(model, tmp_path / "submission.zip")
    done = rehearse(tmp_path / "submission.zip", str(tmp_path / "data"))
    assert (done.unread, done.in_part) == (0, 3)
    unpacked(tmp_path / "submission.zip", tmp_path / "there", tmp_path / "data")
    command = [sys.executable, "-I", "main.py"]
    log = subprocess.run(command, cwd=tmp_path / "there", check=True, capture_output=True, text=True).stdout
    for name, reason in ("cut", "cut off"), ("half", "cut off: 48022 bytes are missing"), ("holes", "NaN or infinite"):
        assert f"\n{name}: {reason}" in log
    assert all(row["phonetic_text"] for row in read(tmp_path / "there" / "submission" / "submission.jsonl"))
