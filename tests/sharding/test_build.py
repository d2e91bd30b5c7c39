"""A build accounts for every clip, makes the same bytes each time, and keeps validation apart by child."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sharding.audio.codec import encode, frame_count
from sharding.build.assign import SplitExceptions, choose_exceptions, is_validation
from sharding.build.scan import speaker_hash
from sharding.cli import main
from sharding.errors import ManifestError
from sharding.labels.policy import SymbolCounts, check_alphabet, count_foreign
from sharding.labels.units import ctc_frames_needed
from sharding.report.ledger import ledger_row, write_ledger
from sharding.report.summary import _commonest_first, _suggest_alignment
from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from sharding.sources.manifest import Utterance
from tests.tools.commands import ROOT, Command
from tests.tools.corpus import (
    MANIFEST,
    PHONES,
    SAMPLE_RATE,
    WORDS,
    describe,
    make_corpus,
    read_manifest,
    say,
    write_manifest,
)
from tests.tools.shard_sets import SMALL_SHARDS, assert_balanced, digest_of, read_all, read_ledger, read_summary

TEXT = "kæt sæt"
FLAC = encode(say(TEXT))
HEADER_BYTES = 86  # of a FLAC as libsndfile writes it, before its first frame


# --- clips that cannot be used ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A clip that must be refused, and why."""

    reason: str
    data: bytes | None = FLAC
    suffix: str = ".flac"
    text: str = TEXT
    fields: dict[str, object] | None = None  # instead of the true ones
    place: Callable[[Path], object] | None = None  # to do at the clip's path, once its row is written


def write_audio(samples: np.ndarray, kind: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x02]) + data[position + 1 :]


def replace_by_link(target: Path) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return replace


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WAV = write_audio(say(TEXT), "WAV", "PCM_16")
NAN = write_audio(np.where(np.arange(8000) == 4000, np.nan, say(TEXT)[:8000]), "WAV", "FLOAT")
UNCHECKED: dict[str, object] = {"md5_hash": None, "filesize_bytes": None}

BAD_CLIPS = {
    "missing": Bad("audio file is missing", place=Path.unlink),
    "parent-folder": Bad("leads outside its folder", fields={"audio_path": "../outside.flac"}),
    "hidden-parent-folder": Bad("leads outside its folder", fields={"audio_path": "audio/../../outside.flac"}),
    "absolute-path": Bad("leads outside its folder", fields={"audio_path": "/etc/passwd"}),
    "windows-path": Bad("leads outside its folder", fields={"audio_path": "..\\outside.flac"}),
    "link-outside": Bad("leads outside its folder", place=replace_by_link(Path("../../outside.flac"))),
    "link-to-itself": Bad("cannot be read", place=replace_by_link(Path("link-to-itself.flac"))),
    "folder": Bad("not a file", fields={"audio_path": "audio"}),
    "pipe": Bad("not a file", place=replace_by_pipe),
    "zero-byte": Bad("empty (0 bytes)", b""),
    "zero-byte-unchecked": Bad("empty (0 bytes)", b"", fields=UNCHECKED),
    "header-only": Bad("cut off", FLAC[:HEADER_BYTES]),
    "truncated-flac": Bad("cut off", FLAC[: len(FLAC) // 2], fields=UNCHECKED),
    "truncated-wav": Bad("cut off", WAV[: len(WAV) // 2], ".wav", fields=UNCHECKED),
    "flipped-frame": Bad("cut off or damaged", flip(FLAC, len(FLAC) // 2), fields=UNCHECKED),
    "flipped-length": Bad("md5 of the samples", flip(FLAC, 24), fields=UNCHECKED),
    "flipped-under-md5": Bad(
        "md5 is", flip(FLAC, 40), fields={"md5_hash": hashlib.md5(FLAC, usedforsecurity=False).hexdigest()}
    ),
    "wrong-md5": Bad("the manifest says " + "0" * 32, fields={"md5_hash": "0" * 32}),
    "wrong-size": Bad(f"size is {len(FLAC)} bytes, the manifest says 7", fields={"filesize_bytes": 7}),
    "nan": Bad("NaN or infinite", NAN, ".wav"),
    "text-file": Bad("not readable as audio", b"no sound at all"),
    "pickle": Bad("not readable as audio", pickle.dumps(np.zeros(3))),
    "promises-days": Bad("too long", FLAC[:22] + b"\xff" * 4 + FLAC[26:], fields=UNCHECKED),
    "too-short": Bad("shorter than one frame", encode(say("k")[:399]), text=""),
    "silence-with-a-label": Bad("constant signal with a label", encode(np.zeros(16_000, np.float32))),
    "offset-with-a-label": Bad("constant signal with a label", encode(np.full(16_000, 0.25, np.float32))),
    "foreign-symbols": Bad("outside the alphabet: 'q' U+0071, 'X' U+0058", text="kæt qXq"),
}


@pytest.fixture(scope="module")
def bad_build(tmp_path_factory: pytest.TempPathFactory, run_sharding: Command) -> tuple[Path, str]:
    """A shard set of three good clips and all the bad ones, and what the command said."""
    folder = make_corpus(tmp_path_factory.mktemp("bad") / "corpus", clips=3)
    (folder.parent / "outside.flac").write_bytes(FLAC)
    rows = read_manifest(folder)
    for name, bad in BAD_CLIPS.items():
        path = folder / f"audio/{name}{bad.suffix}"
        path.write_bytes(bad.data or b"")
        rows.append(describe(folder, f"audio/{name}{bad.suffix}", bad.text, **bad.fields or {}))
        if bad.place:
            bad.place(path)
    write_manifest(folder, rows)
    out = folder.parent / "shards"
    done = run_sharding("build", folder, "--out", out, "--valid-fraction", 0, "--max-duration", 1000)
    assert done.returncode == 1
    return out, done.stdout + done.stderr


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_bad_clip_is_in_the_ledger_with_its_reason(name: str, bad_build: tuple[Path, str]) -> None:
    row = next(row for row in read_ledger(bad_build[0]) if row["utterance_id"] == name)
    assert row["fate"] == "rejected"
    assert BAD_CLIPS[name].reason in row["reason"]
    assert (row["key"], row["pieces"]) == (None, [])


def test_bad_clips_do_not_keep_the_good_ones_from_being_published(bad_build: tuple[Path, str]) -> None:
    out, _ = bad_build
    assert_balanced(out)
    assert sorted(read_all(out)) == [f"corpus-{number:04d}" for number in range(3)]
    assert read_summary(out)["fates"]["rejected"]["clips"] == len(BAD_CLIPS)


def test_too_many_bad_clips_make_the_command_fail_and_say_where_to_look(bad_build: tuple[Path, str]) -> None:
    _, said = bad_build
    share = len(BAD_CLIPS) / (len(BAD_CLIPS) + 3)
    assert f"{share:.1%} of the clips were rejected, --max-reject-rate allows 1.0%" in said
    assert "report/ledger.jsonl.zst has the reason for each" in said


def test_max_rejected_is_the_share_that_is_forgiven(tmp_path: Path, run_sharding: Command) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=4)
    (folder / read_manifest(folder)[0]["audio_path"]).write_bytes(b"")
    for forgiven, code in ((0.24, 1), (0.25, 0), (0.24, 1)):  # the second and third find it built already
        done = run_sharding("build", folder, "--out", tmp_path / "out", "--max-reject-rate", forgiven)
        assert done.returncode == code
        assert_balanced(tmp_path / "out")


def test_a_corpus_of_bad_clips_alone_ends_in_an_empty_shard_set(tmp_path: Path, run_sharding: Command) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=3)
    for path in (folder / "audio").iterdir():
        path.write_bytes(b"")
    assert run_sharding("build", folder, "--out", tmp_path / "out").returncode == 1
    assert_balanced(tmp_path / "out")
    assert run_sharding("verify", tmp_path / "out").returncode == 0
    assert run_sharding("inspect", tmp_path / "out").returncode == 0


def test_a_rejected_clip_never_hides_another_with_a_like_key(tmp_path: Path, run_sharding: Command) -> None:
    """`a.b` is stored as `a%2Eb`, which may also be an id of its own."""
    folder = make_corpus(tmp_path / "corpus", clips=4)
    rows = read_manifest(folder)
    for row, name in zip(rows, ["a.b", "a%2Eb", "a%252Eb", "a/b"], strict=True):
        row["utterance_id"] = name
    (folder / rows[1]["audio_path"]).unlink()
    write_manifest(folder, rows)
    run_sharding("build", folder, "--out", tmp_path / "out")
    assert_balanced(tmp_path / "out")
    assert {row["utterance_id"]: row["fate"] for row in read_ledger(tmp_path / "out")} == {
        "a.b": "written", "a%2Eb": "rejected", "a%252Eb": "written", "a/b": "written"
    }  # fmt: skip


# --- what is in the shards --------------------------------------------------------------------------------------


def test_every_clip_is_in_the_ledger_and_in_a_shard_with_its_text(small_corpus: Path, small_shards: Path) -> None:
    assert_balanced(small_shards)
    rows = {row["utterance_id"]: row for row in read_manifest(small_corpus)}
    samples = [sample for _, sample in read_all(small_shards).values()]
    assert {sample.utterance_id for sample in samples} == rows.keys()
    for sample in samples:
        row = rows[sample.utterance_id]
        told = (sample.text, sample.child_id, sample.session_id, sample.age_bucket, sample.corpus)
        assert told == (row["phonetic_text"], row["child_id"], row["session_id"], row["age_bucket"], "meadow")
        assert sample.label_status == "labelled"


def test_sixteen_bit_flac_is_passed_through_byte_for_byte(small_corpus: Path, small_shards: Path) -> None:
    for _, sample in read_all(small_shards).values():
        assert sample.audio == (small_corpus / f"audio/{sample.utterance_id}.flac").read_bytes()


def test_other_formats_are_converted_and_their_duration_measured(tmp_path: Path, run_sharding: Command) -> None:
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    formats = [
        ("stereo.flac", 44_100, 2, "PCM_16"), ("deep.flac", 48_000, 1, "PCM_24"), ("phone.wav", 8_000, 1, "PCM_16"),
        ("six.wav", 16_000, 6, "PCM_16"), ("vorbis.ogg", 22_050, 1, "VORBIS"),
        ("layer.mp3", 32_000, 1, "MPEG_LAYER_III"),
    ]  # fmt: skip
    rows = []
    for number, (name, rate, channels, subtype) in enumerate(formats):
        sound = np.random.default_rng(number).normal(0, 0.1, (round(rate * (0.7 + 0.1 * number)), channels))
        soundfile.write(folder / "audio" / name, sound, rate, subtype=subtype)
        rows.append(describe(folder, f"audio/{name}", TEXT, audio_duration_sec=9.0 if name == "six.wav" else None))
    write_manifest(folder, rows)
    done = run_sharding("build", folder, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "1 declared durations are off by more than 0.1 s" in done.stdout
    ledger = {row["utterance_id"]: row for row in read_ledger(tmp_path / "out")}
    for _, sample in read_all(tmp_path / "out").values():
        info = soundfile.info(io.BytesIO(sample.audio))
        number = [Path(name).stem for name, *_ in formats].index(sample.utterance_id)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert info.duration == pytest.approx(0.7 + 0.1 * number, abs=0.001)
        assert ledger[sample.utterance_id]["seconds"] == pytest.approx(info.duration, abs=0.0001)


def test_clips_that_are_refused_for_their_labels_count_with_their_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their rows declare none."""
    folder = make_corpus(tmp_path / "corpus", clips=40, seconds=(1, 2))
    rows = [row | {"audio_duration_sec": None} for row in read_manifest(folder)]
    for row in rows[:2]:
        row["phonetic_text"] = "k9"
    (folder / rows[3]["audio_path"]).write_bytes(b"")
    rows[3] |= {"filesize_bytes": None, "md5_hash": None}
    write_manifest(folder, rows)
    main(["build", str(folder), "--out", str(tmp_path / "out"), "--workers", "1", "--valid-fraction", "0"])
    said = capsys.readouterr().out
    ledger = {row["utterance_id"]: row["seconds"] for row in read_ledger(tmp_path / "out")}
    for row in rows[:3]:
        seconds = soundfile.info(folder / row["audio_path"]).duration
        assert ledger[row["utterance_id"]] == pytest.approx(seconds, abs=1e-3)
    assert " 0.00 s " not in said
    assert f"–  corpus/{rows[3]['audio_path']}" in said


def test_a_label_that_ctc_cannot_emit_is_kept_beside_its_audio(tmp_path: Path, run_sharding: Command) -> None:
    """400 + 320 n samples have n + 1 frames; "kkk" needs five: three symbols, two blanks."""
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    rows = []
    for frames in (4, 5):
        (folder / f"audio/f{frames}.flac").write_bytes(encode(say("kkkk")[: 400 + 320 * (frames - 1)]))
        assert frame_count(400 + 320 * (frames - 1)) == frames
        rows.append(describe(folder, f"audio/f{frames}.flac", "kkk"))
    assert ctc_frames_needed("kkk") == 5
    write_manifest(folder, rows)
    for fraction, tight in ((0.0, ("unlabelled", "", "unlabelled", "kkk")), (1.0, ("valid", "kkk", "labelled", None))):
        out = tmp_path / f"out-{fraction}"
        assert run_sharding("build", folder, "--out", out, "--valid-fraction", fraction).returncode == 0
        stored = {
            key: (split, sample.text, sample.label_status, sample.parent_text)
            for key, (split, sample) in read_all(out).items()
        }
        assert stored == {"f4": tight, "f5": ("valid" if fraction else "train", "kkk", "labelled", None)}
        assert_balanced(out)


# --- the same bytes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora with everything that takes a path of its own: short, long, resampled and refused clips."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = [make_corpus(folder / "east", clips=70, long_clips=1), make_corpus(folder / "west", clips=5, seed=1)]
    rows = read_manifest(sources[1])
    (sources[1] / "audio/high.wav").write_bytes(b"")
    soundfile.write(sources[1] / "audio/high.wav", np.random.default_rng(0).normal(0, 0.1, 20_000), 22_050)
    (sources[1] / "audio/broken.flac").write_bytes(FLAC[:200])
    rows += [describe(sources[1], f"audio/{name}", TEXT) for name in ("high.wav", "broken.flac")]
    write_manifest(sources[1], rows)
    return sources


@pytest.fixture(scope="module")
def mixed_build(mixed_sources: list[Path], run_sharding: Command) -> Path:
    out = mixed_sources[0].parent / "shards"
    done = run_sharding("build", *mixed_sources, "--out", out, *SMALL_SHARDS, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


def test_workers_order_of_sources_and_place_do_not_change_a_byte(
    mixed_sources: list[Path], mixed_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    sources = [(moved / source.name) for source in reversed(mixed_sources)]
    for source in mixed_sources:
        os.symlink(source, moved / source.name)
    done = run_sharding("build", *sources, "--out", tmp_path / "out", *SMALL_SHARDS, "--workers", 2)
    assert done.returncode == 0
    assert digest_of(tmp_path / "out") == digest_of(mixed_build)
    assert len(read_index(open_store(mixed_build)).shards) > 10
    assert read_ledger(tmp_path / "out") == read_ledger(mixed_build)
    assert_balanced(mixed_build)


def test_a_plot_that_is_drawn_otherwise_makes_no_other_shard_set(
    small_corpus: Path, small_shards: Path, tmp_path: Path, run_sharding: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 7")  # as another version of matplotlib may
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    out = tmp_path / "out"
    done = run_sharding("build", small_corpus, "--out", out, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 0, done.stderr
    plots = {(folder / "report/durations.png").read_bytes() for folder in (out, small_shards)}
    assert len(plots) == 2
    assert digest_of(out) == digest_of(small_shards)
    assert read_index(open_store(out)).digest == read_index(open_store(small_shards)).digest
    assert run_sharding("verify", out).returncode == 0


@pytest.mark.parametrize("after_sec", [0.5, 1.2])
def test_a_killed_build_run_again_ends_in_the_same_bytes_and_leaves_nothing(
    after_sec: float, mixed_sources: list[Path], mixed_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    arguments = ["build", *mixed_sources, "--out", tmp_path / "out", *SMALL_SHARDS]
    command = [sys.executable, "-m", "sharding", *map(str, arguments)]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(after_sec)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert run_sharding(*arguments).returncode == 0
    assert digest_of(tmp_path / "out") == digest_of(mixed_build)
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_build_that_lost_its_index_keeps_every_whole_shard_and_makes_the_others_again(
    mixed_sources: list[Path], mixed_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    out = shutil.copytree(mixed_build, tmp_path / "out")
    (out / "index.json").unlink()
    tars = sorted(out.rglob("*.tar"))
    damaged, unmarked, *whole = tars
    damaged.write_bytes(damaged.read_bytes()[:-600])
    unmarked.with_suffix(".idx.zst").unlink()
    before = {path: path.stat().st_mtime_ns for path in tars}
    assert run_sharding("build", *mixed_sources, "--out", out, *SMALL_SHARDS).returncode == 0
    assert digest_of(out) == digest_of(mixed_build)
    assert read_ledger(out) == read_ledger(mixed_build)
    after = {path: path.stat().st_mtime_ns for path in tars}
    assert all(after[path] == before[path] for path in whole)
    assert after[damaged] != before[damaged]
    assert after[unmarked] != before[unmarked]


def test_an_unfinished_build_with_other_settings_leaves_no_shard_behind(
    mixed_sources: list[Path], mixed_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    out = shutil.copytree(mixed_build, tmp_path / "out")
    (out / "index.json").unlink()
    assert (
        run_sharding("build", *mixed_sources, "--out", out, "--num-buckets", 2, "--max-reject-rate", 1).returncode == 0
    )
    index = read_index(open_store(out))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.tar")} == {shard.name for shard in index.shards}
    assert run_sharding("verify", out, "--decode").returncode == 0


def test_an_interrupted_build_stops_without_a_traceback(mixed_sources: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sharding", "build", *map(str, mixed_sources), "--out", str(tmp_path / "out")]
    build = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert build.stderr
    said = build.stderr.read(len("examining"))  # the first bar: its workers are just starting
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said += build.stderr.read()
    assert build.wait() == 130
    assert "stopped" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_zip_makes_the_same_shards_as_its_folder(
    mixed_sources: list[Path], run_sharding: Command, tmp_path: Path
) -> None:
    source = mixed_sources[1]
    zipped = tmp_path / "zipped" / source.name
    zipped.mkdir(parents=True)
    (zipped / MANIFEST).write_bytes((source / MANIFEST).read_bytes())
    with zipfile.ZipFile(zipped / "audio.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((source / "audio").iterdir()):
            archive.write(path, f"audio/{path.name}")
    for folder, out in ((source, "folder"), (zipped, "zip")):
        assert run_sharding("build", folder, "--out", tmp_path / out, *SMALL_SHARDS).returncode == 0
    assert digest_of(tmp_path / "zip") == digest_of(tmp_path / "folder")
    assert read_ledger(tmp_path / "zip") == read_ledger(tmp_path / "folder")


def test_a_hostile_zip_does_no_harm(run_sharding: Command, tmp_path: Path) -> None:
    """A bomb, a member outside, a member whose bytes are damaged, an encrypted one: refused, each with its reason."""
    folder = make_corpus(tmp_path / "corpus", clips=2)
    rows = read_manifest(folder)
    names = {"good": rows[0]["audio_path"], "damaged": rows[1]["audio_path"]}
    with zipfile.ZipFile(folder / "audio.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names.values():
            archive.write(folder / name, name)
            (folder / name).unlink()
        archive.writestr("audio/bomb.flac", bytes(2**26 + 1))
        archive.writestr("audio/locked.flac", FLAC)
        archive.writestr("audio/sized.flac", FLAC)
        archive.writestr("../outside.flac", FLAC)
        offset = archive.getinfo(names["damaged"]).header_offset
    (folder / "audio").rmdir()
    zipped = bytearray((folder / "audio.zip").read_bytes())
    zipped[offset + 300] ^= 0xFF
    directory = zipped.index(b"audio/locked.flac", zipped.index(b"PK\x01\x02")) - 46
    zipped[directory + 8] |= 1  # the flag of an encrypted member
    (folder / "audio.zip").write_bytes(zipped)
    blank = rows[0] | UNCHECKED
    rows += [
        blank | {"utterance_id": "bomb", "audio_path": "audio/bomb.flac"},
        blank | {"utterance_id": "locked", "audio_path": "audio/locked.flac"},
        blank | {"utterance_id": "outside", "audio_path": "../outside.flac"},
        blank | {"utterance_id": "missing", "audio_path": "audio/missing.flac"},
        blank | {"utterance_id": "wrong-size", "audio_path": "audio/sized.flac", "filesize_bytes": 12},
    ]
    write_manifest(folder, rows)
    run_sharding("build", folder, "--out", tmp_path / "out", "--valid-fraction", 0)
    assert_balanced(tmp_path / "out")
    reasons = {row["utterance_id"]: row["reason"] for row in read_ledger(tmp_path / "out")}
    assert reasons.pop("corpus-0000") is None
    assert "cannot be read" in reasons["corpus-0001"]
    assert "would unpack to 67108865" in reasons["bomb"]
    assert "encrypted" in reasons["locked"]
    assert "leads outside" in reasons["outside"]
    assert "missing" in reasons["missing"]
    assert "the manifest says 12" in reasons["wrong-size"]
    assert not (tmp_path / "outside.flac").exists()


# --- OUT --------------------------------------------------------------------------------------------------------


def test_the_same_build_again_has_nothing_to_do(small_corpus: Path, small_shards: Path, run_sharding: Command) -> None:
    before = digest_of(small_shards)
    done = run_sharding("build", small_corpus, "--out", small_shards, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 0
    assert "was built before" in done.stdout
    assert digest_of(small_shards) == before


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--num-buckets", 3, "--shard-mb", 0.1], "num_buckets is 2 there, requested 3"),
        (["--num-buckets", 2, "--shard-mb", 0.1, "--max-duration", 20], "max_duration is 25.0 there, requested 20.0"),
    ],
)
def test_an_out_that_was_built_otherwise_is_left_alone(
    arguments: list[object], difference: str, small_corpus: Path, small_shards: Path, run_sharding: Command
) -> None:
    before = digest_of(small_shards)
    done = run_sharding("build", small_corpus, "--out", small_shards, *arguments)
    assert done.returncode == 1
    assert f"{small_shards}: holds a shard set built with other settings: {difference}" in done.stderr
    assert "hint: choose another --out" in done.stderr
    assert digest_of(small_shards) == before


def test_an_out_built_from_other_sources_is_left_alone(
    small_shards: Path, run_sharding: Command, tmp_path: Path
) -> None:
    other = make_corpus(tmp_path / "other", clips=2)
    done = run_sharding("build", other, "--out", small_shards, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 1
    assert "built from other sources, or its sources have changed" in done.stderr


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing"])
def test_an_out_that_cannot_be_written_is_named(
    out: str, small_corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run_sharding("build", small_corpus, "--out", tmp_path / out)
    assert done.returncode == 1
    assert str(tmp_path / out) in done.stderr
    assert "hint: name a path that can be written" in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-duration", "0"], ["--max-duration", "nan"], ["--max-duration", "long"], ["--shard-mb", "0"],
        ["--shard-mb", "inf"], ["--num-buckets", "0"], ["--num-buckets", "101"], ["--valid-fraction", "1.5"],
        ["--max-reject-rate", "-1"], ["--workers", "0"], ["--workers", "two"], ["--workers", "2.5"], ["--no-such-flag"],
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_at_once(
    arguments: list[str], small_corpus: Path, run_sharding: Command, tmp_path: Path
) -> None:
    done = run_sharding("build", small_corpus, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr
    assert not (tmp_path / "out").exists()


# --- validation -------------------------------------------------------------------------------------------------

ids = st.sets(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6), min_size=1)


def hashes(children: set[str]) -> npt.NDArray[np.uint64]:
    return np.array([speaker_hash(name) for name in sorted(children)], np.uint64)


def chosen(children: set[str], fraction: float, exceptions: SplitExceptions | None = None) -> set[str]:
    exceptions = exceptions or choose_exceptions(hashes(children), fraction)
    mask = is_validation(hashes(children), fraction, exceptions)
    return {name for name, valid in zip(sorted(children), mask, strict=True) if valid}


@given(ids, ids, st.floats(0.01, 1))
def test_a_child_stays_on_its_side_when_data_is_added(children: set[str], more: set[str], fraction: float) -> None:
    exceptions = choose_exceptions(hashes(children), fraction)
    before = chosen(children, fraction)
    assert chosen(children | more, fraction, exceptions) & children == before
    if exceptions == choose_exceptions(hashes(children | more), fraction):
        assert chosen(children | more, fraction) & children == before
    if not before:  # as if they were appended
        later = choose_exceptions(hashes(children | more), fraction, exceptions.kept_in_training)
        assert not chosen(children | more, fraction, later) & children
        assert bool(chosen(children | more, fraction, later)) == bool(more - children)


@given(ids, st.floats(1e-18, 0.999))
def test_neither_side_is_empty_where_there_are_two_children(children: set[str], fraction: float) -> None:
    valid = chosen(children, fraction)
    assert len(valid) < len(children)
    assert bool(valid) == (len(children) > 1)
    assert len(valid) <= max(1, 2 * fraction * len(children))


@given(ids)
def test_everybody_and_nobody_validate_where_it_is_asked_for(children: set[str]) -> None:
    assert chosen(children, 1.0) == children
    assert chosen(children, 0.0) == set()


@pytest.mark.parametrize(("children", "sizes", "said"), [
    (1, {"train": 6, "valid": 0}, "all usable clips are of one speaker"),
    (2, {"train": 3, "valid": 3}, "validation has 50% of the labelled clips, --valid-fraction asks for 10%"),
    (3, {"train": 4, "valid": 2}, "validation has 33% of the labelled clips"),
])  # fmt: skip
def test_a_few_children_are_parted_and_what_is_amiss_is_said(
    children: int, sizes: dict[str, int], said: str, tmp_path: Path, run_sharding: Command
) -> None:
    """By names whose hashes all fall below the fraction: all would validate."""
    folder = make_corpus(tmp_path / "corpus", clips=6, children=children, seconds=(0.3, 0.6))
    names = [name for name in map(str, range(200)) if speaker_hash(name) < 0.1 * 2**64]
    rows = read_manifest(folder)
    write_manifest(folder, [row | {"child_id": names[number % children]} for number, row in enumerate(rows)])
    done = run_sharding("build", folder, "--out", tmp_path / "out")
    index = read_index(open_store(tmp_path / "out"))
    assert done.returncode == 0
    assert {split: len(index.split(split)) for split in sizes} == sizes
    assert said in done.stdout


def test_a_child_who_cannot_be_trained_on_is_not_the_one_who_trains(tmp_path: Path, run_sharding: Command) -> None:
    """Of three, one has no label and one no sound: the third would be alone with them."""
    folder = make_corpus(tmp_path / "corpus", clips=4, children=4, seconds=(0.3, 0.6))
    rows = read_manifest(folder)
    names = sorted(("a", "b", "c", "d"), key=speaker_hash)
    rows = [row | {"child_id": name} for row, name in zip(rows, names, strict=True)]
    rows[0] |= {"phonetic_text": ""}
    (folder / rows[1]["audio_path"]).write_bytes(b"no sound")
    write_manifest(folder, rows)
    run_sharding("build", folder, "--out", tmp_path / "out", "--valid-fraction", 1e-9)
    sides = {sample.child_id: (split, bool(sample.text)) for split, sample in read_all(tmp_path / "out").values()}
    assert sides == {names[0]: ("unlabelled", False), names[2]: ("valid", True), names[3]: ("train", True)}


def test_no_child_is_on_both_sides(tmp_path: Path, run_sharding: Command) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=40, children=20, seconds=(0.3, 0.6))
    done = run_sharding("build", folder, "--out", tmp_path / "out", "--valid-fraction", 0.3)
    samples = read_all(tmp_path / "out").values()
    sides = {split: {sample.child_id for part, sample in samples if part == split} for split in ("train", "valid")}
    assert not sides["train"] & sides["valid"]
    assert len(sides["train"] | sides["valid"]) == 20
    assert 1 <= len(sides["valid"]) <= 12
    assert read_index(open_store(tmp_path / "out")).notes["validation"]["disjoint_by_speaker"]
    assert "some speakers are not known" not in done.stdout


def test_validation_is_never_filtered_by_label(tmp_path: Path, run_sharding: Command) -> None:
    """Foreign symbols and labels without sound count against a model; only what does not decode is left out."""
    folder = make_corpus(tmp_path / "corpus", clips=2)
    (folder / "audio/silent.flac").write_bytes(encode(np.zeros(16_000, np.float32)))
    (folder / "audio/broken.flac").write_bytes(FLAC[:300])
    rows = read_manifest(folder)
    rows[0]["phonetic_text"] = "kæt q"
    rows += [describe(folder, f"audio/{name}.flac", TEXT) for name in ("silent", "broken")]
    write_manifest(folder, rows)
    run_sharding("build", folder, "--out", tmp_path / "out", "--valid-fraction", 1)
    texts = {key: (split, sample.text) for key, (split, sample) in read_all(tmp_path / "out").items()}
    assert texts["corpus-0000"] == ("valid", "kæt q")
    assert texts["silent"] == ("valid", TEXT)
    notes = read_index(open_store(tmp_path / "out")).notes["validation"]
    assert (notes["clips"], notes["rejected"]) == (4, 1)


@pytest.mark.parametrize("side", ["training", "validation"])
def test_labels_of_another_alphabet_end_the_build_whichever_side_has_them(
    side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twelve children one validates: the sentences of one alone would be few in the whole corpus."""
    folder = make_corpus(tmp_path / "corpus", clips=12, children=12, seconds=(2, 3))
    rows = read_manifest(folder)
    alone = min(rows, key=lambda row: speaker_hash(row["child_id"]))
    for row in rows:
        if (row is alone) == (side == "validation"):
            row["phonetic_text"] = "What about the bus"
    write_manifest(folder, rows)
    command = ["build", str(folder), "--out", str(tmp_path / "out"), "--workers", "1", "--valid-fraction", "1e-9"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "'What about the bus' has symbols outside the alphabet of profile pasketti: 'W' U+0057, 'a' U+0061" in said
    name = "training" if side == "training" else "validation and test"
    assert f"% of all symbols in the labels for {name} are foreign, at most 5% are accepted" in said
    assert "hint: --profile english if the labels are English words" in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_alphabet_of_english_is_told_in_letters() -> None:
    counts = count_foreign("été", "row 1", WORDS)
    with pytest.raises(ManifestError, match="the alphabet is 'abcdefghijklmnopqrstuvwxyz"):
        check_alphabet(counts, "training", WORDS)


def test_one_segment_is_counted_as_one() -> None:
    [told] = _suggest_alignment({"unlabelled_pieces": 1}, "shards", dry=True)  # type: ignore[typeddict-item]
    assert told == "1 segment of long recordings is kept without a label, not trained on"


@pytest.mark.parametrize(("foreign", "refused"), [(0, False), (5, False), (6, True)])
def test_a_twentieth_of_foreign_symbols_is_the_most(foreign: int, refused: bool) -> None:
    labels = ["k" * (100 - foreign), "q" * foreign]
    counts = sum((count_foreign(text, "here", PHONES) for text in labels), SymbolCounts())
    with pytest.raises(ManifestError, match="here: 'qqqqqq'") if refused else nullcontext():
        check_alphabet(counts, "training", PHONES)


def test_pieces_without_a_label_are_told_by_reason_with_the_commands_that_come_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_corpus(tmp_path / "corpus", clips=2, children=2, long_clips=1), tmp_path / "out"
    assert main(["build", str(folder), "--out", str(out), "--workers", "1", "--valid-fraction", "0"]) == 0
    said, summary = capsys.readouterr().out, read_summary(out)
    [(reason, count)] = summary["unlabelled_reasons"].items()
    assert reason.startswith("too few labels to train the acoustic model")
    assert count == summary["unlabelled_pieces"] > 1
    assert f"{count:6,} unlabelled: {reason}\n{count:,} segments of long recordings are kept without a label" in said
    assert f"streamtrain align RUN/best {out} --out alignments.jsonl.zst" in said
    assert f"streamtrain build SOURCE… --out {out}2 --alignments alignments.jsonl.zst" in said


def test_reasons_that_differ_only_in_their_numbers_are_one() -> None:
    reasons = ["a word lacks evidence: 1.0 nats for 'a: b'", *(f"a cut is uncertain: 0.{n}" for n in range(3)), None]
    pieces = [{"label_status": "unlabelled" if reason else "labelled", "reason": reason} for reason in reasons]
    utterance = Utterance("id", "", "", "", "", "", None, "", "", None, "")
    tally = write_ledger([ledger_row(utterance, "train", "split", 30.0, pieces=pieces)] * 2).tally
    assert list(_commonest_first(tally.unlabelled_pieces).items()) == [
        ("a cut is uncertain", 6),
        ("a word lacks evidence", 2),
    ]


def test_without_child_ids_the_summary_says_that_validation_is_not_disjoint(
    tmp_path: Path, run_sharding: Command
) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=8)
    write_manifest(folder, [{name: row[name] for name in row if name != "child_id"} for row in read_manifest(folder)])
    done = run_sharding("build", folder, "--out", tmp_path / "out", "--valid-fraction", 0.5)
    assert done.returncode == 0
    assert "some speakers are not known or in several splits" in done.stdout
    assert not read_index(open_store(tmp_path / "out")).notes["validation"]["disjoint_by_speaker"]
    samples = read_all(tmp_path / "out").values()
    sides = {split: {sample.session_id for part, sample in samples if part == split} for split in ("train", "valid")}
    assert not sides["train"] & sides["valid"]
