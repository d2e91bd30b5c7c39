"""Any WebDataset reader can take our shards, and we can take the tars of any WebDataset writer."""

import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from sharding.audio.codec import SAMPLE_RATE, decode, encode
from sharding.cli import main
from sharding.labels.pasketti import normalize_ipa
from sharding.report.summary import Summary
from sharding.shardset.index import ShardIndex, read_index, read_keys, read_sample
from sharding.shardset.store import open_store
from streamtrain.data.dataset import ShardStream
from streamtrain.data.plan import PlanSettings, plan_epoch
from streamtrain.distributed import World
from tests.tools.commands import Command
from tests.tools.corpus import say
from tests.tools.shard_sets import read_ledger
from tests.tools.stream_sets import VOCAB, keys_of

TEXTS = ["kæt sæt", "bɪg ˈdɔg", "tʃɪp", "mun sut"]


def sound_as(kind: str, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind.upper())
    return buffer.getvalue()


def write_tars(folder: Path, kind: str, label: str, prefix: str = "", clips: int = 12) -> dict[str, tuple[bytes, str]]:
    """As `webdataset.ShardWriter` writes them, some for training and some for validation; key → sound, text."""
    folder.mkdir(parents=True)
    written = {}
    for split in ("train", "val"):
        with webdataset.ShardWriter(str(folder / f"{split}-%04d.tar"), maxcount=5, verbose=0) as writer:
            for number in range(clips if split == "train" else 4):
                text = TEXTS[number % len(TEXTS)]
                key = f"{prefix}{split}-{number:03d}"
                audio = sound_as(kind, say(normalize_ipa(text), child=number % 3))
                sample: dict[str, Any] = {"__key__": key, kind: audio}
                document = {"child_id": f"{split}-{number % 3}"} | ({label: text} if label != "txt" else {})
                sample |= {"json": json.dumps(document)} | ({"txt": text} if label == "txt" else {})
                writer.write(sample)
                written[key] = audio, text
    return written


def test_tars_with_labels_of_another_alphabet_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", ["what is that", "a boy"])
    write_tars(tmp_path / "tars", "flac", "txt", clips=2)
    assert main(["index", "--profile", "pasketti", str(tmp_path / "tars"), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert "train-0000.tar: train-000: 'what is that' has symbols outside the alphabet" in said
    assert "--profile english" in said
    assert not (tmp_path / "tars" / "index.json").exists()
    assert main(["index", str(tmp_path / "tars"), "--workers", "1", "--profile", "english"]) == 0


@pytest.mark.parametrize("kind", ["flac", "wav", "mp3", "ogg"])
@pytest.mark.parametrize("label", ["txt", "text", "phonetic_text"])
def test_tars_of_shard_writer_are_indexed_and_stream(
    kind: str, label: str, run_sharding: Command, tmp_path: Path
) -> None:
    written = write_tars(tmp_path / "tars", kind, label)
    before = {path: path.read_bytes() for path in (tmp_path / "tars").glob("*.tar")}
    done = run_sharding("index", "--profile", "pasketti", tmp_path / "tars")
    assert done.returncode == 0, done.stderr
    assert "16 samples in 4 tars" in done.stdout
    assert {path: path.read_bytes() for path in before} == before
    store = open_store(tmp_path / "tars")
    index = read_index(store)
    assert set(read_keys(store, index).tolist()) == set(written)
    assert (len(index.split("train")), len(index.split("valid"))) == (12, 4)
    for row, key in enumerate(read_keys(store, index).tolist()):
        sample = read_sample(store, index, row)
        assert (sample.key, sample.audio, sample.text) == (key, written[key][0], normalize_ipa(written[key][1]))
        assert sample.child_id == f"{key.split('-')[0]}-{int(key[-3:]) % 3}"
    plan = plan_epoch(index, PlanSettings(batch_seconds=10, micro_batches_per_step=2), 0)
    items = list(ShardStream(index, store, VOCAB, True, World()).epoch(plan))
    assert keys_of(items) == Counter(key for key in written if key.startswith("train"))
    assert not any(item.batch.failed for item in items)
    assert run_sharding("verify", tmp_path / "tars", "--decode").returncode == 0
    assert run_sharding("inspect", tmp_path / "tars", "--json").returncode == 0
    assert "child validates" not in done.stdout
    assert index.notes["validation"]["disjoint_by_speaker"]


def test_keys_with_folders_and_dots_stay_apart_and_every_other_rate_is_brought_to_16_khz(
    run_sharding: Command, tmp_path: Path
) -> None:
    tone = np.sin(np.arange(44_100) / 10).astype(np.float32)[:, None].repeat(2, axis=1)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, body in (("a/one.wav", sound_as("wav", tone, 44_100)), ("a/one.seg.txt", b"no label"),
                           ("a/one.txt", "kæt".encode()), ("b/one.WAV", sound_as("wav", tone, 44_100)),
                           ("b/one.txt", "sæt".encode())):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    assert run_sharding("index", "--profile", "pasketti", tmp_path).returncode == 0
    store = open_store(tmp_path)
    index = read_index(store)
    assert sorted(read_keys(store, index).tolist()) == ["a%2Fone", "b%2Fone"]
    samples = [read_sample(store, index, row) for row in range(2)]
    assert [sample.text for sample in samples] == ["kæt", "sæt"]
    assert index.samples["samples"].tolist() == [len(decode(sample.audio)[0]) for sample in samples]
    assert index.samples["samples"].tolist() == pytest.approx([SAMPLE_RATE] * 2, abs=2)
    stream = ShardStream(index, store, VOCAB, True, World())
    assert not next(stream.batches([np.array([0, 1])]))[0].failed


def test_what_cannot_be_trained_on_is_left_out_with_its_reason(run_sharding: Command, tmp_path: Path) -> None:
    good = encode(say("kæt"))
    clips = {
        "good": {"flac": good, "txt": "kæt"},
        "mute": {"flac": good},
        "deaf": {"txt": "kæt"},
        "torn": {"flac": good[:-300], "txt": "kæt"},
        "greek": {"flac": good, "txt": "λ"},
        "long": {"flac": encode(np.tile(say("kæt"), 100)), "txt": "kæt"},
        "dense": {"flac": good, "txt": "kæt" * 100},
    }
    with webdataset.ShardWriter(str(tmp_path / "train-%d.tar"), verbose=0) as writer:
        for key, members in clips.items():
            writer.write({"__key__": key} | members)
    done = run_sharding("index", "--profile", "pasketti", tmp_path, "--max-reject-rate", 0.5)
    assert done.returncode == 1
    assert "85.7% of the clips were rejected" in done.stderr
    for reason in ("no label", "deaf has no audio, only txt", "cut off", "outside the alphabet: 'λ'",
                   "longer than 25 s", "more frames than the clip has"):  # fmt: skip
        assert reason in done.stdout
    store = open_store(tmp_path)
    assert read_keys(store, read_index(store)).tolist() == ["good"]
    assert run_sharding("verify", tmp_path, "--decode").returncode == 0


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "there is no tar"),
        (lambda folder: (folder / "x.tar").write_bytes(b"no tar at all" * 100), "x.tar: not a whole tar"),
        (lambda folder: write_tars(folder / "a", "flac", "txt") and write_tars(folder / "b", "flac", "txt"), "the key"),
    ],
)
def test_what_is_no_shard_set_is_told(prepare: Any, said: str, run_sharding: Command, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    prepare(tmp_path / "tars")
    done = run_sharding("index", "--profile", "pasketti", tmp_path / "tars")
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "tars/index.json").exists()


def plain_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def test_one_key_with_two_sounds_or_two_labels_is_rejected(run_sharding: Command, tmp_path: Path) -> None:
    """Whichever were taken might be the wrong one."""
    sound = encode(say("kæt", child=0))
    members = {"a.flac": sound, "a.txt": b"k\xc3\xa6t", "a.wav": sound_as("wav", say("sæt", child=1))}
    members |= {"b.flac": sound, "b.txt": b"bd", "b.json": b'{"phonetic_text": "db"}'}
    members |= {"c.flac": sound, "c.txt": b"bd", "c.json": b'{"phonetic_text": "bd", "text": "bead"}'}
    (tmp_path / "x.tar").write_bytes(plain_tar(members))
    done = run_sharding("index", "--profile", "pasketti", tmp_path, "--max-reject-rate", 1)
    assert "3 clips in" in done.stdout
    assert "= 1 written" in done.stdout
    for reason in ("a has 2 audio files, flac, wav", "b has two labels"):
        assert reason in done.stdout
    assert [done.stdout.count(f"x.tar/{key}: ") for key in "ab"] == [1, 1]  # each file is named once


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        (['{"utterance_id": "take 1"}'] * 2, "the utterance_id 'take 1' is in x.tar and in x"),
        ([], "x.tar: there is no sample in it"),
    ],
)
def test_tars_that_evaluation_would_stop_at_are_not_indexed(
    documents: list[str], told: str, run_sharding: Command, tmp_path: Path
) -> None:
    sound = encode(say("kæt", child=0))
    members = {f"{key}.{kind}": body for key, document in enumerate(documents)
               for kind, body in {"flac": sound, "txt": b"bd", "json": document.encode()}.items()}  # fmt: skip
    (tmp_path / "x.tar").write_bytes(plain_tar(members) if members else bytes(10_240))
    done = run_sharding("index", "--profile", "pasketti", tmp_path)
    assert done.returncode == 1
    assert told in done.stderr


def with_size(tar: bytes, size: bytes) -> bytes:
    """The first header says another size, and its checksum is right."""
    header = bytearray(tar[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


GOOD = plain_tar({f"{name}.{kind}": body for name in "abc" for kind, body in (("flac", encode(say("kæt"))),
                                                                            ("txt", "kæt".encode()))})  # fmt: skip
THIRD_HEADER = GOOD.index(b"b.flac")
ODD = {
    "a damaged header": (GOOD[: THIRD_HEADER + 130] + b"8" + GOOD[THIRD_HEADER + 131 :], "there is no header at byte"),
    "two tars in one": (GOOD + GOOD.replace(b"a.", b"d."), "several tars joined"),
    "no end": (GOOD.rstrip(b"\0") + bytes(300), ""),
    "cut off in a member": (GOOD[: THIRD_HEADER + 900], "has a header with an impossible size"),
    "a negative size": (with_size(GOOD, b"\xff" * 10 + b"\xfe\x00"), ""),
    "an endless size": (with_size(GOOD, b"77777777777\0"), "has a header with an impossible size"),
}


@pytest.mark.parametrize(("tar", "said"), ODD.values(), ids=ODD)
def test_a_tar_that_is_not_whole_is_refused_and_named(
    tar: bytes, said: str, run_sharding: Command, tmp_path: Path
) -> None:
    (tmp_path / "train.tar").write_bytes(tar)
    done = run_sharding("index", "--profile", "pasketti", tmp_path)
    assert done.returncode == 1
    assert "train.tar: " in done.stderr
    assert said in done.stderr
    assert not (tmp_path / "index.json").exists()


def test_odd_labels_are_rejected_and_names_of_any_length_read(run_sharding: Command, tmp_path: Path) -> None:
    good, long = encode(say("kæt")), "x" * 95
    documents = {"list": "[1, 2]", "text": '"kæt"', "number": '{"text": 5}', "deep": "[" * 100_000,
                 "ours": '{"label_status": "labelled", "text": 5, "utterance_id": "x"}'}  # fmt: skip
    members = {f"{key}.{kind}": body for key, document in documents.items()
               for kind, body in (("flac", good), ("json", document.encode()))}  # fmt: skip
    (tmp_path / "train.tar").write_bytes(
        plain_tar(members | {f"{long}.flac": good, f"{long}.text": b"", f"{long}.txt": "k@æt".encode()})
    )
    done = run_sharding("index", "--profile", "pasketti", tmp_path, "--max-reject-rate", 1)
    assert done.returncode == 0, done.stderr
    assert "= 1 written + 0 split + 5 rejected" in done.stdout
    assert "1 noted: '@' is left out of the label, as by the official scorer" in done.stdout


def test_an_index_that_is_there_is_not_overwritten(small_shards: Path, run_sharding: Command, tmp_path: Path) -> None:
    out = shutil.copytree(small_shards, tmp_path / "shards")
    before = (out / "index.json").read_bytes()
    done = run_sharding("index", "--profile", "pasketti", out)
    assert done.returncode == 1
    assert "already has an index.json" in done.stderr
    assert (out / "index.json").read_bytes() == before
    (out / "index.json").unlink()
    assert (
        run_sharding("index", "--profile", "pasketti", out, "--valid", "valid/*", "--max-reject-rate", 1).returncode
        == 0
    )  # ours are tars, too
    assert run_sharding("verify", out, "--decode").returncode == 0


def test_damaged_tars_of_others_cannot_be_made_again(run_sharding: Command, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", "flac", "txt")
    assert run_sharding("index", "--profile", "pasketti", tmp_path / "tars").returncode == 0
    path = sorted((tmp_path / "tars").glob("*.tar"))[0]
    path.write_bytes(path.read_bytes()[:-2000])
    assert run_sharding("verify", tmp_path / "tars").returncode == 1
    done = run_sharding("verify", tmp_path / "tars", "--repair", tmp_path)
    assert done.returncode == 1
    assert "written by others" in done.stderr


def write_labels(path: Path, labels: Sequence[str], child: str = "") -> Path:
    """Write a tar of clips with these labels, and a speaker each of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = sound_as("flac", 0.1 * np.random.default_rng(len(labels)).standard_normal(16_000).astype(np.float32))
    with webdataset.ShardWriter(str(path.parent / "w-%06d.tar"), verbose=0) as writer:
        for number, label in enumerate(labels):
            document = {"text": label, "child_id": child or f"{path.stem}-{number}"}
            writer.write({"__key__": f"{path.stem}-{number:03d}", "flac": sound, "json": json.dumps(document)})
    (path.parent / "w-000000.tar").rename(path)
    return path


def index_of(folder: Path, *options: str) -> tuple[ShardIndex, Summary]:
    assert main(["index", str(folder), "--workers", "1", "--max-reject-rate", "1", *options]) == 0
    return read_index(open_store(folder)), json.loads((folder / "report/summary.json").read_text())


def test_tars_of_a_test_are_neither_trained_nor_validated_on(tmp_path: Path) -> None:
    for name in ("train", "dev", "test", "en-test-1", "latest"):
        write_labels(tmp_path / f"{name}.tar", ["ab"] * 6)
    index, _ = index_of(tmp_path)
    splits = {shard.name: shard.split for shard in index.shards}
    assert splits == {"train.tar": "train", "latest.tar": "train", "dev.tar": "valid", "test.tar": "test",
                      "en-test-1.tar": "test"}  # fmt: skip
    assert index.notes["validation"]["disjoint_by_speaker"]
    assert index.notes["test"] == {"clips": 12, "rejected": 0}


def test_patterns_go_before_usual_names_and_a_tar_is_in_one_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "dev", "test", "other"):
        write_labels(tmp_path / f"{name}.tar", ["ab"] * 6, child="same")
    assert main(["index", str(tmp_path), "--valid", "d*", "--test", "dev.tar"]) == 1
    assert "dev.tar: matches --valid and --test" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--test", "nothing*"]) == 1
    assert "no tar matches --test 'nothing*'" in capsys.readouterr().err
    index, _ = index_of(tmp_path, "--valid", "test.tar", "--test", "o*")
    splits = {shard.name: shard.split for shard in index.shards}
    assert splits == {"train.tar": "train", "dev.tar": "train", "test.tar": "valid", "other.tar": "test"}
    assert not index.notes["validation"]["disjoint_by_speaker"]


def test_the_alphabet_of_tars_is_counted_again_without_samples_of_rare_symbols(tmp_path: Path) -> None:
    """Without the three samples that have x, z is rare too, and with its samples goes y: each within one tar."""
    write_labels(tmp_path / "train-1.tar", ["ab ba"] * 60 + ["zx", "zx", "zx", "zy"])
    write_labels(tmp_path / "train-2.tar", ["ab"] * 4 + ["zy"] * 1 + ["y"] * 3)
    index, summary = index_of(tmp_path, "--min-symbol-count", "5")
    assert (index.labels.symbols, index.labels.counts) == (("a", "b"), (124, 124))
    assert summary["fates"]["rejected"]["clips"] == 8


def test_labels_that_are_mostly_of_rare_symbols_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_labels(tmp_path / "train.tar", [f"abababababababab{chr(0x4E00 + number)}" for number in range(12)] + ["ab"])
    assert main(["index", str(tmp_path), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert "train.tar: train-000: 'abababababababab一': 12 of 13 training labels have symbols of characters" in said
    assert not (tmp_path / "index.json").exists()
    index, _ = index_of(tmp_path, "--min-symbol-count", "1")
    assert len(index.labels.symbols) == 14


def test_the_ledger_says_of_a_sound_what_that_of_a_build_says(tmp_path: Path) -> None:
    """Silence is what is silent in 16 bit."""
    sound = say("kæt")
    clips = {"hushed": 1.4e-5 * np.sign(sound), "turned": np.stack([sound, -sound], 1), "usual": sound}
    members: dict[str, bytes] = {}
    for name, samples in clips.items():
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
        members |= {f"{name}.wav": file.getvalue(), f"{name}.txt": "kæt".encode()}
    (tmp_path / "train.tar").write_bytes(plain_tar(members))
    main(["index", "--profile", "pasketti", str(tmp_path), "--workers", "1"])
    rows = {row["key"]: (row["reason"], row["remarks"]) for row in read_ledger(tmp_path)}
    assert rows == {
        "hushed": ("constant signal with a label", []),
        "turned": (None, ["channels that cancel out: only the loudest is used"]),
        "usual": (None, []),
    }


@pytest.mark.parametrize("arguments", [[], ["--profile", "english"]])
def test_a_folder_of_a_shard_set_is_not_indexed_over(
    arguments: list[str], small_shards: Path, run_sharding: Command, tmp_path: Path
) -> None:
    """Its indexes would be overwritten, before anything is checked."""
    copy = tmp_path / "set"
    shutil.copytree(small_shards, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run_sharding("index", "--profile", "pasketti", copy / "train", *arguments)
    assert done.returncode == 1
    assert "of a shard set, whose indexes would be overwritten\nhint: " in done.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_repair_of_nothing_makes_no_folder(small_corpus: Path, run_sharding: Command, tmp_path: Path) -> None:
    assert run_sharding("verify", tmp_path / "typo", "--repair", small_corpus).returncode == 1
    assert not (tmp_path / "typo").exists()
