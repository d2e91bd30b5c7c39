"""Audio in, a row of text for each file out, whatever the files are and however they are batched."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from sharding.audio.codec import SAMPLE_RATE, encode
from sharding.audio.codec import decode as decode_audio
from sharding.errors import StreamtrainError
from sharding.segment.cuts import MAX_DURATION_SEC
from sharding.segment.split import split_recording
from sharding.shardset.index import read_index, read_keys
from sharding.shardset.sample import whole_key
from sharding.shardset.store import open_store
from streamtrain.infer.inputs import find_recordings
from streamtrain.infer.transcribe import DecodingOptions, Progress, transcribe
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import join_texts
from streamtrain.model.inference import zero_mean_unit_variance
from streamtrain.model.pretrained import load_trained
from tests.tools.commands import ROOT, run_module
from tests.tools.corpus import recite, sound
from tests.tools.models import SLOW, decode, save, talkative
from tests.tools.training_runs import environment

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, as far as anyone can tell: it says something."""
    return save(talkative("wav2vec2, group norm"), tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def model(folder: Path) -> CTCModel:
    return load_trained(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of 0.3 to 6 s, one of them two folders down."""
    root = tmp_path_factory.mktemp("clips")
    (root / "more" / "still").mkdir(parents=True)
    for number, seconds in enumerate(np.random.default_rng(0).uniform(0.3, 6, 12)):
        place = root / "more" / "still" if number == 7 else root
        (place / f"clip-{number:02d}.flac").write_bytes(encode(sound(seconds, number)))
    (root / "notes.txt").write_text("no audio")
    return root


def half_a_wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(1, 0), SAMPLE_RATE, format="WAV")
    return file.getvalue()[:16_000]


def rows_of(folder: Path, sources: list[Path], out: Path, batch_seconds: float = 30.0) -> list[Row]:
    transcribe(folder, find_recordings([str(source) for source in sources]), out, DecodingOptions(batch_seconds))
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_every_file_of_a_folder_gets_the_text_it_has_alone(
    folder: Path, model: CTCModel, clips: Path, tmp_path: Path
) -> None:
    rows = rows_of(folder, [clips], tmp_path / "deep" / "out.jsonl")
    assert [row["audio_path"] for row in rows] == sorted(str(path) for path in clips.rglob("*.flac"))
    for row in rows:
        waveform: np.ndarray = soundfile.read(row["audio_path"], dtype="float32")[0]
        assert row["phonetic_text"] == decode(model, waveform)
        assert row["error"] is None
        assert 0 < row["confidence"] <= 1
    assert len({row["phonetic_text"] for row in rows}) > 6
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.jsonl"]


def test_alternatives_come_with_their_probabilities_best_first(folder: Path, clips: Path, tmp_path: Path) -> None:
    done = run_module("streamtrain", "transcribe", folder, clips, "--out", tmp_path / "out.jsonl", "--nbest", 3)
    assert done.returncode == 0, done.stderr
    for row in map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines()):
        texts = [one["text"] for one in row["nbest"]]
        scores = [one["log_prob"] for one in row["nbest"]]
        assert len(texts) == len(set(texts)) == 3
        assert texts[0] == row["phonetic_text"]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] <= 0


@pytest.mark.parametrize("batch_seconds", [0.1, 3.0, 11.0, 1000.0])
def test_texts_do_not_depend_on_how_files_are_batched(
    batch_seconds: float, folder: Path, clips: Path, tmp_path: Path
) -> None:
    usual = rows_of(folder, [clips], tmp_path / "usual.jsonl")
    other = rows_of(folder, [clips], tmp_path / "other.jsonl", batch_seconds)
    assert [row["phonetic_text"] for row in other] == [row["phonetic_text"] for row in usual]
    assert [row["confidence"] for row in other] == pytest.approx([row["confidence"] for row in usual], abs=2e-4)


def test_a_batch_beyond_the_memory_of_a_gpu_is_halved(
    folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = rows_of(folder, [clips], tmp_path / "usual.jsonl", 1000)
    forward, sizes = CTCModel.forward, list[int]()

    def on_a_small_gpu(model: CTCModel, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        if len(inputs) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, inputs, lengths)

    monkeypatch.setattr(CTCModel, "forward", on_a_small_gpu)
    limit = 2
    halved = rows_of(folder, [clips], tmp_path / "halved.jsonl", 1000)
    assert [row["phonetic_text"] for row in halved] == [row["phonetic_text"] for row in usual]
    assert max(sizes) > limit
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        rows_of(folder, [clips], tmp_path / "none.jsonl", 1000)


def test_files_and_folders_are_taken_as_they_were_named(folder: Path, clips: Path, tmp_path: Path) -> None:
    sources = [clips / "clip-03.flac", clips / "more", clips / "clip-01.flac"]
    rows = rows_of(folder, sources, tmp_path / "out.jsonl")
    assert [Path(row["audio_path"]).name for row in rows] == ["clip-03.flac", "clip-07.flac", "clip-01.flac"]


def test_another_rate_or_two_channels_are_brought_to_16_khz_mono(folder: Path, model: CTCModel, tmp_path: Path) -> None:
    stereo = np.stack([sound(3, 1), 0.5 * sound(3, 2)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 44_100, subtype="PCM_24")
    waveform, _ = decode_audio((tmp_path / "stereo.wav").read_bytes())
    (row,) = rows_of(folder, [tmp_path / "stereo.wav"], tmp_path / "out.jsonl")
    assert row["phonetic_text"] == decode(model, waveform)


def test_a_file_that_cannot_be_read_gets_a_row_with_its_error(folder: Path, clips: Path, tmp_path: Path) -> None:
    good = (clips / "clip-00.flac").read_bytes()
    damaged = {
        "a.flac": b"not audio",
        "b.flac": b"",
        "c.flac": good[: len(good) // 2],
        "d.flac": encode(np.zeros(399, np.float32)),
        "e.wav": half_a_wav(),
        "f.m4a": b"\0\0\0\x18ftypM4A ",
        "z.flac": good,
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    rows = rows_of(folder, [tmp_path], tmp_path / "out.jsonl")
    assert [Path(row["audio_path"]).name for row in rows] == list(damaged)
    for row in rows[:-1]:
        assert row["error"]
        assert (row["phonetic_text"], row["confidence"]) == ("", 0.0)
    assert "shorter than one frame" in rows[3]["error"]
    assert "cut off" in rows[4]["error"]
    assert rows[-1]["error"] is None
    assert rows[-1]["phonetic_text"]


def test_a_long_recording_is_decoded_in_pieces_cut_at_pauses(folder: Path, model: CTCModel, tmp_path: Path) -> None:
    phrases = ["kætsæt ðɪʃu mowɛs " * 2] * 8
    long = recite(phrases, 0, np.random.default_rng(3))
    assert 26 < len(long) / SAMPLE_RATE < 60
    (tmp_path / "long.flac").write_bytes(encode(long))
    (tmp_path / "short.flac").write_bytes(encode(long[: 3 * SAMPLE_RATE]))
    rows = rows_of(folder, [tmp_path], tmp_path / "out.jsonl")
    waveform, _ = decode_audio((tmp_path / "long.flac").read_bytes())
    ends = np.cumsum([0] + [segment.samples for segment in split_recording("", waveform, "", MAX_DURATION_SEC)])
    assert len(ends) > 2
    assert ends[-1] == len(waveform)
    assert np.diff(ends).max() <= MAX_DURATION_SEC * SAMPLE_RATE
    pieces = [decode(model, waveform[start:end]) for start, end in pairwise(ends)]
    assert rows[0]["phonetic_text"] == join_texts(pieces)
    assert 0 < rows[0]["confidence"] <= 1
    assert rows[1]["error"] is None


def test_what_cannot_be_transcribed_is_told_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.flac").write_bytes(encode(sound(1, 0)))
    for source, said in ((tmp_path / "none", "there is no such file or folder"), (tmp_path / "empty", "no audio in")):
        with pytest.raises(StreamtrainError, match=f"{said}"):
            transcribe(folder, find_recordings([str(source)]), tmp_path / "out.jsonl")
    with pytest.raises(StreamtrainError, match=r"vocab\.json: no vocabulary[^\n]*\nhint: .*RUN/best"):
        transcribe(tmp_path / "empty", find_recordings([str(tmp_path / "clip.flac")]), tmp_path / "out.jsonl")
    for out in (tmp_path / "empty", tmp_path / "clip.flac" / "out.jsonl"):
        with pytest.raises(StreamtrainError, match=f"{out}: .*\nhint: name a path that can be written"):
            transcribe(folder, find_recordings([str(tmp_path / "clip.flac")]), out)
    assert not list(tmp_path.rglob("*out.jsonl*"))


def test_the_command_says_how_many_failed_and_exits_so(folder: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    sources = [clips / "clip-02.flac", tmp_path / "bad.wav"]
    done = run_module("streamtrain", "transcribe", folder, *sources, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert f"{tmp_path / 'out.jsonl'}: 1 recording transcribed, 1 failed\n  {tmp_path / 'bad.wav'}: " in done.stdout
    assert [json.loads(line)["error"] is None for line in (tmp_path / "out.jsonl").open()] == [True, False]


def test_words_are_said_where_the_model_hears_them(folder: Path, model: CTCModel, clips: Path, tmp_path: Path) -> None:
    """The frames of a word spell it, and nothing but it and silence."""
    rows = rows_of(folder, [clips], tmp_path / "out.jsonl")
    transcribe(folder, find_recordings([str(clips)]), tmp_path / "beam.jsonl", DecodingOptions(beam=8))
    beam = [json.loads(line) for line in (tmp_path / "beam.jsonl").open(encoding="utf-8")]
    for row in rows + beam:
        waveform: np.ndarray = soundfile.read(row["audio_path"], dtype="float32")[0]
        words = row["words"]
        assert " ".join(word["word"] for word in words) == row["phonetic_text"]
        ends = [edge for word in words for edge in (word["start"], word["end"])]
        assert ends == sorted(ends)
        assert ends[-1] <= len(waveform) / SAMPLE_RATE
        assert all(0 < word["confidence"] <= 1 for word in words)
    row = rows[0]
    path = log_probs_of(model, row["audio_path"]).argmax(-1)
    for word in row["words"]:
        said = path[round(word["start"] * 50) : round(word["end"] * 50)].tolist()
        assert model.vocab.decode([one for one, before in zip(said, [-1, *said], strict=False)
                                   if one not in (before, model.vocab.blank)]) == word["word"]  # fmt: skip


def test_words_of_a_model_of_other_strides_are_said_at_its_own_frames(clips: Path, tmp_path: Path) -> None:
    slow = talkative("wav2vec2, group norm", **SLOW)
    (row, *_) = rows_of(save(slow, tmp_path / "slow"), [clips], tmp_path / "out.jsonl")
    path = log_probs_of(slow, row["audio_path"]).argmax(-1)
    assert len(row["words"]) > 1
    for word in row["words"]:
        said = torch.unique_consecutive(path[round(word["start"] * 25) : round(word["end"] * 25)]).tolist()
        assert slow.vocab.decode([one for one in said if one != slow.vocab.blank]) == word["word"]


def log_probs_of(model: CTCModel, path: str) -> torch.Tensor:
    """(T, V), of the clip alone."""
    inputs = torch.from_numpy(zero_mean_unit_variance(soundfile.read(path, dtype="float32")[0]))[None]
    with torch.inference_mode():
        return model(inputs, torch.tensor([inputs.shape[1]]))[0]


def test_log_probabilities_are_kept_beside_their_vocabulary(
    folder: Path, model: CTCModel, clips: Path, tmp_path: Path
) -> None:
    options = DecodingOptions(log_probs=tmp_path / "kept")
    transcribe(folder, find_recordings([str(clips)]), tmp_path / "out.jsonl", options)
    assert (tmp_path / "kept" / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()
    for path in clips.rglob("*.flac"):
        kept = np.load(tmp_path / "kept" / f"{path.stem}.npy")
        wanted = log_probs_of(model, str(path)).numpy()
        assert kept.dtype == np.float16
        assert kept.shape == wanted.shape
        np.testing.assert_allclose(kept, wanted, atol=0.02)


def test_a_killed_run_goes_on_and_ends_in_the_same_file(folder: Path, tmp_path: Path) -> None:
    """Three chunks; the kill falls after the first or the second."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1100):
        (many / f"{number:04d}.flac").symlink_to(tmp_path / f"{number % 7}.flac")
    for number in range(7):
        (tmp_path / f"{number}.flac").write_bytes(encode(sound(0.2 + number / 10, number)))
    (many / "0500.flac").unlink()
    (many / "0500.flac").write_bytes(b"no audio")
    command = [sys.executable, "-m", "streamtrain", "transcribe", folder, many, "--out"]
    assert run_module(*command[2:], tmp_path / "whole.jsonl").returncode == 1
    out = tmp_path / "killed.jsonl"
    process = subprocess.Popen(
        list(map(str, [*command, out])),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / ".killed.jsonl.part.json").is_file():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not out.is_file()
    with open(tmp_path / ".killed.jsonl.part", "ab") as torn:
        torn.write(b'{"utterance_id": "07')
    done = run_module(*command[2:], out)
    assert re.search(r"resuming after (512|1,024) recordings", done.stdout)
    assert "1,099 recordings transcribed, 1 failed\n  " in done.stdout
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))
    for sources, said in (([many], "already has all these 1,100 recordings"),
                          ([tmp_path / "0.flac"], "has other content")):  # fmt: skip
        with pytest.raises(StreamtrainError, match=said):
            rows_of(folder, sources, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_runs_do_not_write_one_file(folder: Path, clips: Path, tmp_path: Path) -> None:
    first = Progress(tmp_path / "out.jsonl", "")
    with pytest.raises(StreamtrainError, match=r"out\.jsonl: another run is writing it"):
        rows_of(folder, [clips], tmp_path / "out.jsonl")
    first.finish()
    assert len(rows_of(folder, [clips], tmp_path / "out.jsonl")) == 12


def test_another_request_begins_anew(
    folder: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = Progress(tmp_path / "out.jsonl", "of another model")
    left.write([{"utterance_id": "left behind"}], failed=0)
    del left  # killed
    rows = rows_of(folder, [clips], tmp_path / "out.jsonl")
    assert len(rows) == 12
    said = capsys.readouterr().out
    assert "are for another request; starting over" in said
    assert "resuming" not in said


def test_a_shard_set_is_transcribed_recording_by_recording(folder: Path, small_shards: Path, tmp_path: Path) -> None:
    """Also where a byte of it was flipped: its clip's row tells so."""
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    tar = next(iter((shards / "train").glob("*.tar")))
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    rows = rows_of(folder, [shards], tmp_path / "out.jsonl")
    store = open_store(shards)
    assert len(rows) == len({whole_key(key) for key in read_keys(store, read_index(store))})
    (broken,) = (row for row in rows if row["error"])
    assert "checksum of the sample at byte 0" in broken["error"]
    assert broken["phonetic_text"] == ""


@pytest.mark.parametrize("minutes", [3, pytest.param(120, marks=pytest.mark.long)])
def test_silence_ten_milliseconds_and_hours_are_all_answered(minutes: int, folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(SAMPLE_RATE, np.int16), SAMPLE_RATE)
    soundfile.write(tmp_path / "b.wav", sound(0.01, 0), SAMPLE_RATE)
    hours = np.tile(sound(30, 1), 2 * minutes)
    soundfile.write(tmp_path / "c.flac", hours, SAMPLE_RATE, subtype="PCM_16")
    silence, short, long = rows_of(folder, [tmp_path], tmp_path / "out.jsonl")
    assert silence["error"] is None
    assert "shorter than one frame" in short["error"]
    assert long["error"] is None
    assert 60 * minutes - 100 < long["words"][-1]["end"] <= 60 * minutes


def test_a_model_that_hears_nothing_says_nothing(model: CTCModel, tmp_path: Path) -> None:
    mute = CTCModel(talkative("wav2vec2, group norm").network, model.vocab, normalize=True)
    with torch.no_grad():
        mute.network.lm_head.bias[model.vocab.blank] = 99
    (tmp_path / "clip.flac").write_bytes(encode(sound(1, 0)))
    (row,) = rows_of(save(mute, tmp_path / "mute"), [tmp_path / "clip.flac"], tmp_path / "out.jsonl")
    assert (row["phonetic_text"], row["error"]) == ("", None)
