"""A shard set that grows keeps what it has; one that is damaged is made again to the same bytes."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sharding.audio.codec import SAMPLE_RATE
from sharding.cli import main
from sharding.shardset.index import read_index, read_index_headers, read_keys
from sharding.shardset.store import open_store
from tests.tools.commands import Command
from tests.tools.corpus import describe, make_corpus, read_manifest, write_manifest
from tests.tools.shard_sets import SMALL_SHARDS, assert_balanced, digest_of, read_all, read_ledger, read_summary


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora with short and long clips of different children."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_corpus(folder / "first", clips=24, children=8, long_clips=1),
        make_corpus(folder / "second", clips=12, children=6, seconds=(0.5, 4.0), long_clips=1, seed=1),
    ]


@pytest.fixture(scope="module")
def first_build(sources: list[Path], run_sharding: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    assert run_sharding("build", sources[0], "--out", out, *SMALL_SHARDS).returncode == 0
    return out


@pytest.fixture
def built(first_build: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first_build, tmp_path / "shards")


# --- growth -----------------------------------------------------------------------------------------------------


def test_appending_adds_clips_and_touches_nothing(built: Path, sources: list[Path], run_sharding: Command) -> None:
    before, old, old_index = read_all(built), digest_of(built), read_index(open_store(built))
    reported = {path.name for path in (built / "report").iterdir()}
    done = run_sharding("build", sources[1], "--out", built, "--append", *SMALL_SHARDS)
    assert done.returncode == 0, done.stderr
    after, new, index = read_all(built), digest_of(built), read_index(open_store(built))
    assert before.items() <= after.items()
    assert {name: new.get(name) for name in old if name != "index.json"} == {
        name: digest for name, digest in old.items() if name != "index.json"
    }
    assert index.duration_bins == old_index.duration_bins
    wanted = {row["utterance_id"] for source in sources for row in read_manifest(source)}
    assert {sample.parent_id or sample.utterance_id for _, sample in after.values()} == wanted
    assert_balanced(built)
    done = run_sharding("verify", built, "--decode")
    assert (done.returncode, "has begun" in done.stderr) == (0, False)
    assert {path.name for path in (built / "report").iterdir()} == reported


def test_a_bucket_ends_at_its_longest_clip_though_longer_ones_were_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name, seconds in (("short", (0.5, 1.0)), ("long", (3.0, 4.0))):
        folder = make_corpus(tmp_path / name, clips=6, children=3, seconds=seconds)
        command = ["build", str(folder), "--out", str(out), "--append", "--workers", "1", "--num-buckets", "2"]
        assert main(command) == 0
    index = read_index(open_store(out))
    for split in ("train", "valid"):
        lengths = index.samples["samples"][index.split(split)] / SAMPLE_RATE
        ends = [index.duration_bins[0], max(lengths.max(), index.duration_bins[-1])]
        last = lengths > ends[0]
        assert (ends[1] > 3) == (split == "train")  # beyond the edge of 1.1 s, where there are long ones
        padding = 1 - lengths.sum() / np.where(last, ends[1], ends[0]).sum()
        row = read_summary(out)["splits"][split]
        assert row["bucket_ends"] == pytest.approx(ends, abs=1e-4)
        assert row["bucket_padding"] == pytest.approx(padding, abs=1e-4)
        capsys.readouterr()
        assert main(["inspect", str(out), "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        [bucket] = [each for each in table["by_bucket"] if each["split"] == split and each["bucket"] == 1]
        assert bucket["to_sec"] == pytest.approx(ends[1], abs=1e-5)
        assert bucket["padding"] == pytest.approx(1 - lengths[last].mean() / ends[1], abs=1e-5)
        [whole] = [each for each in table["by_split"] if each["split"] == split]
        assert whole["padding"] == pytest.approx(padding, abs=1e-5)


def test_validation_children_stay_where_they_were(built: Path, sources: list[Path], run_sharding: Command) -> None:
    """Also the one who stands in because nobody's hash falls below the fraction."""
    sides_before = sides(built)
    assert run_sharding("build", *sources, "--out", built, "--append", *SMALL_SHARDS).returncode == 0
    sides_after = sides(built)
    assert sides_before["valid"] <= sides_after["valid"]
    assert not sides_after["valid"] & sides_after["train"]
    assert not sides_before["train"] & sides_after["valid"]


def test_a_second_speaker_who_is_appended_validates(tmp_path: Path, run_sharding: Command) -> None:
    """The first trains already, and goes on to with the clips that come with the second's."""
    first = make_corpus(tmp_path / "first", clips=3, children=1, seconds=(0.3, 0.6))
    second = make_corpus(tmp_path / "second", clips=4, children=2, seconds=(0.3, 0.6))
    rows = read_manifest(second)
    write_manifest(second, [rows[0] | {"child_id": "first-child-0"}, *rows[1:]])
    for source in (first, second):
        assert run_sharding("build", source, "--out", tmp_path / "out", "--append").returncode == 0
    parted = sides(tmp_path / "out")
    assert "first-child-0" in parted["train"]
    assert len(parted["valid"]) == 1
    assert not parted["train"] & parted["valid"]
    shard = next((tmp_path / "out" / "train").glob("*.tar"))
    kept = shard.read_bytes()
    shard.write_bytes(b"")
    assert run_sharding("verify", tmp_path / "out", "--repair", first, second).returncode == 0
    assert shard.read_bytes() == kept


def sides(out: Path) -> dict[str, set[str]]:
    samples = read_all(out).values()
    return {split: {sample.child_id for part, sample in samples if part == split} for split in ("train", "valid")}


def test_the_index_before_is_kept_and_still_reads(built: Path, sources: list[Path], run_sharding: Command) -> None:
    store = open_store(built)
    old, keys = read_index(store), read_keys(store, read_index(store)).tolist()
    assert run_sharding("build", sources[1], "--out", built, "--append", *SMALL_SHARDS).returncode == 0
    kept = read_index(store, f"index-{old.digest}.json")
    assert kept.digest == old.digest
    assert kept.samples.tolist() == old.samples.tolist()
    assert read_keys(store, kept).tolist() == keys
    assert read_index(store).base == old.digest
    assert read_index(store).samples[: len(keys)].tolist() == old.samples.tolist()


def test_what_is_there_is_not_added_again(built: Path, sources: list[Path], run_sharding: Command) -> None:
    before = digest_of(built)
    done = run_sharding("build", sources[0], "--out", built, "--append", *SMALL_SHARDS)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert digest_of(built) == before


def test_appending_twice_keeps_every_index(built: Path, sources: list[Path], run_sharding: Command) -> None:
    third = make_corpus(built.parent / "third", clips=3, seed=2)
    digests = []
    for source in (sources[1], third):
        digests.append(read_index(open_store(built)).digest)
        assert run_sharding("build", source, "--out", built, "--append", *SMALL_SHARDS).returncode == 0
    for digest in digests:
        assert read_index(open_store(built), f"index-{digest}.json").digest == digest
    assert Counter(key.split("-")[0] for key in read_all(built) if "+" not in key) == {
        "first": 24, "second": 12, "third": 3
    }  # fmt: skip
    assert_balanced(built)


def test_a_rejected_clip_that_was_mended_is_added_later(tmp_path: Path, run_sharding: Command) -> None:
    folder, out = make_corpus(tmp_path / "corpus", clips=6), tmp_path / "out"
    rows = read_manifest(folder)
    path = folder / rows[2]["audio_path"]
    sound = path.read_bytes()
    path.write_bytes(sound[:-50])
    rows[2] = describe(folder, rows[2]["audio_path"], rows[2]["phonetic_text"], **rows[2] | {"md5_hash": None})
    write_manifest(folder, rows)
    assert run_sharding("build", folder, "--out", out, "--max-reject-rate", 1).returncode == 0
    assert read_summary(out)["fates"]["rejected"]["clips"] == 1
    path.write_bytes(sound)
    assert run_sharding("build", folder, "--out", out, "--append", "--max-reject-rate", 0).returncode == 0
    assert_balanced(out)
    assert len(read_all(out)) == 6
    assert all(row["fate"] == "written" for row in read_ledger(out))


def test_appending_with_other_settings_is_refused(built: Path, sources: list[Path], run_sharding: Command) -> None:
    before = digest_of(built)
    done = run_sharding("build", sources[1], "--out", built, "--append", "--shard-mb", 7)
    assert done.returncode == 1
    assert "shard_mb is 0.2 there, requested 7.0" in done.stderr
    assert digest_of(built) == before


def test_an_id_that_another_corpus_has_is_refused(
    built: Path, sources: list[Path], run_sharding: Command, tmp_path: Path
) -> None:
    other = shutil.copytree(sources[0], tmp_path / "other")
    before = digest_of(built)
    done = run_sharding("build", other, "--out", built, "--append", *SMALL_SHARDS)
    assert done.returncode == 1
    assert "already exists in" in done.stderr
    assert ", in corpus 'first'" in done.stderr
    assert digest_of(built) == before


def test_an_append_that_was_killed_before_its_index_leaves_no_trace_in_the_next(
    built: Path, sources: list[Path], run_sharding: Command
) -> None:
    append_without_index(built, sources[1], run_sharding)
    third = make_corpus(built.parent / "third", clips=3, seed=2)
    assert run_sharding("build", third, "--out", built, "--append", *SMALL_SHARDS).returncode == 0
    assert {row["source"] for row in read_ledger(built)} == {"first", "third"}
    assert_balanced(built)


def append_without_index(built: Path, source: Path, run_sharding: Command) -> None:
    """Append until the report is there and the index is not, as a kill may leave it."""
    obstacle = built / f"index-{read_index(open_store(built)).digest}.json"  # the old one is to be kept there first
    obstacle.mkdir()
    done = run_sharding("build", source, "--out", built, "--append", *SMALL_SHARDS)
    assert (done.returncode, obstacle.name in done.stderr) == (1, True)
    obstacle.rmdir()
    assert {row["source"] for row in read_ledger(built)} == {"first", "second"}


def test_the_report_of_an_index_stays_whole_if_an_append_to_it_is_killed(
    built: Path, sources: list[Path], run_sharding: Command
) -> None:
    report = built / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    append_without_index(built, sources[1], run_sharding)
    done = run_sharding("verify", built)
    assert done.returncode == 0, done.stderr
    assert "an --append has begun and not ended" in done.stderr
    build = ("build", sources[0], "--out", built, *SMALL_SHARDS)
    assert "25 clips in" in run_sharding(*build).stdout  # of its own sources, not of both
    assert run_sharding(*build, "--append").returncode == 0  # which adds nothing
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    done = run_sharding("verify", built)
    assert (done.returncode, "has begun" in done.stderr) == (0, False)


def test_what_is_refused_again_makes_no_other_index_and_counts_by_itself(
    built: Path, run_sharding: Command, tmp_path: Path
) -> None:
    bad = make_corpus(tmp_path / "bad", clips=2, seed=3)
    (bad / read_manifest(bad)[0]["audio_path"]).write_bytes(b"")
    arguments = ("build", bad, "--out", built, "--append", "--shard-mb", 0.2, "--max-reject-rate", 0.4)
    indexes = []
    for _ in range(3):
        done = run_sharding(*arguments)
        assert done.returncode == 1
        indexes.append((built / "index.json").read_bytes())
        assert_balanced(built)
    assert indexes[0] == indexes[1] == indexes[2]
    assert "50.0% of the clips were rejected, --max-reject-rate allows 40.0%" in done.stderr
    good = make_corpus(tmp_path / "good", clips=3, seed=4)
    assert run_sharding("build", good, *arguments[2:]).returncode == 0
    assert {row["source"] for row in read_ledger(built)} == {"first", "bad", "good"}
    assert_balanced(built)


def test_a_damaged_ledger_is_named(built: Path, sources: list[Path], run_sharding: Command) -> None:
    flip_in_the_middle(built / "report" / "ledger.jsonl.zst")
    done = run_sharding("build", sources[1], "--out", built, "--append", *SMALL_SHARDS)
    assert done.returncode == 1
    assert "ledger" in done.stderr
    assert "damaged" in done.stderr


# --- a dry run, and the size of shards --------------------------------------------------------------------------


def test_a_dry_run_tells_all_and_writes_nothing(
    sources: list[Path], first_build: Path, run_sharding: Command, tmp_path: Path
) -> None:
    done = run_sharding("build", sources[0], "--out", tmp_path / "out", "--dry-run", *SMALL_SHARDS)
    assert done.returncode == 0
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()
    wet = run_sharding("build", sources[0], "--out", tmp_path / "out", *SMALL_SHARDS)
    known, next_commands = wet.stdout.split("a model trained on the other clips may be able to align their words:\n")
    assert len(next_commands.splitlines()) == 3
    assert done.stdout.splitlines()[:-1] == known.splitlines()
    assert digest_of(tmp_path / "out") == digest_of(first_build)


def test_a_dry_run_finds_what_only_decoding_finds(run_sharding: Command, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=4)
    rows = read_manifest(folder)
    path = folder / rows[0]["audio_path"]
    path.write_bytes(path.read_bytes()[:-2000])
    rows[0] |= {"md5_hash": None, "filesize_bytes": None}
    write_manifest(folder, rows)
    done = run_sharding("build", folder, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 1
    assert f"corpus/{rows[0]['audio_path']}: cut off" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("min_shards", [1, 3, 50])
def test_every_bucket_has_so_many_shards_as_far_as_it_has_clips(
    min_shards: int, sources: list[Path], run_sharding: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_sharding("build", sources[0], "--out", out, "--min-shards-per-bucket", min_shards).returncode == 0
    index = read_index(open_store(out))
    shards, clips = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for shard in index.shards:
        shards[shard.split, shard.bucket] += 1
        clips[shard.split, shard.bucket] += shard.count
    assert all(shards[group] == min(min_shards, clips[group]) for group in clips)


# --- repair -----------------------------------------------------------------------------------------------------


def flip_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize("pattern", ["train/*.tar", "unlabelled/*.tar", "*/*.idx.zst", "samples.bin.zst"])
@pytest.mark.parametrize("damage", [flip_in_the_middle, cut_short, os.unlink])
def test_what_is_damaged_is_made_again_to_the_same_bytes(
    pattern: str, damage: Callable[[Path], None], built: Path, sources: list[Path], run_sharding: Command
) -> None:
    before = digest_of(built)
    doomed = sorted(built.glob(pattern))[0]
    damage(doomed)
    others = {path: path.stat().st_mtime_ns for path in built.rglob("*.tar") if path.stem != doomed.name.split(".")[0]}
    assert run_sharding("verify", built).returncode == 1
    done = run_sharding("verify", built, "--repair", sources[0])
    assert done.returncode == 0, done.stderr
    assert "made again" in done.stdout
    assert digest_of(built) == before
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in others.items())
    assert run_sharding("verify", built, "--decode").returncode == 0


@pytest.mark.parametrize("given_again", ["", "as it was", "mended"])
def test_what_was_appended_is_made_again_too(
    given_again: str, tmp_path: Path, sources: list[Path], run_sharding: Command
) -> None:
    """Whether a clip that was refused at first was given again with what was appended, or not."""
    first, out = shutil.copytree(sources[0], tmp_path / "first"), tmp_path / "out"
    refused = first / read_manifest(first)[0]["audio_path"]
    refused.write_bytes(b"")
    build = ("build", "--out", out, "--max-reject-rate", 1, *SMALL_SHARDS)
    assert run_sharding(*build, first).returncode == 0
    if given_again == "mended":
        shutil.copy(sources[0] / refused.relative_to(first), refused)
    given = [first, sources[1]] if given_again else [sources[1]]
    assert run_sharding(*build, *given, "--append").returncode == 0
    before = digest_of(out)
    latest, first_index = (outline for _, outline in read_index_headers(open_store(out)))
    old = {shard.name for shard in first_index.shards}
    new = {shard.name for shard in latest.shards} - old
    doomed = [out / min(old), out / min(new), next(out.glob("samples-*.bin.zst")), out / "samples.bin.zst",
              (out / max(new)).with_suffix(".idx.zst")]  # fmt: skip
    for path in doomed:
        flip_in_the_middle(path)
    assert run_sharding("verify", out).returncode == 1
    assert run_sharding("verify", out, "--repair", sources[1]).returncode == 1  # not all of the sources
    done = run_sharding("verify", out, "--repair", first, sources[1])
    assert done.returncode == 0, done.stderr
    assert digest_of(out) == before
    assert run_sharding("verify", out, "--decode").returncode == 0


def test_verify_looks_at_the_index_that_an_older_run_may_need(
    built: Path, sources: list[Path], run_sharding: Command
) -> None:
    assert run_sharding("build", sources[1], "--out", built, "--append", *SMALL_SHARDS).returncode == 0
    old = next(built.glob("index-*.json"))
    flip_in_the_middle(old)
    done = run_sharding("verify", built)
    assert done.returncode == 1
    assert old.name in done.stderr
    assert "training runs that started with it, and repairs, require it" in done.stderr
    doomed = sorted(built.glob("train/*.tar"))[0]
    flip_in_the_middle(doomed)
    assert doomed.name in run_sharding("verify", built).stderr  # shards first
    old.write_bytes((built / "index.json").read_bytes())
    assert "under the name of another index" in run_sharding("verify", built, "--repair", *sources).stderr
    old.unlink()
    assert f"{old.name}: is missing" in run_sharding("verify", built, "--repair", *sources).stderr


def test_a_sound_shard_set_needs_no_repair(built: Path, sources: list[Path], run_sharding: Command) -> None:
    done = run_sharding("verify", built, "--repair", sources[0])
    assert done.returncode == 0
    assert "nothing is damaged" in done.stdout


def test_repair_from_other_sources_is_refused_and_changes_nothing(
    built: Path, sources: list[Path], run_sharding: Command
) -> None:
    flip_in_the_middle(sorted(built.glob("train/*.tar"))[0])
    before = digest_of(built)
    done = run_sharding("verify", built, "--repair", sources[1])
    assert done.returncode == 1
    assert "was built from other sources" in done.stderr
    assert digest_of(built) == before


def test_repair_from_audio_that_changed_unseen_is_refused(
    built: Path, sources: list[Path], run_sharding: Command, tmp_path: Path
) -> None:
    """Without md5 in the manifest only the shard's own checksum can tell."""
    folder, out = shutil.copytree(sources[0], tmp_path / "first"), tmp_path / "out"
    write_manifest(folder, [row | {"md5_hash": None} for row in read_manifest(folder)])
    assert run_sharding("build", folder, "--out", out, *SMALL_SHARDS).returncode == 0
    doomed = sorted(out.glob("train/*.tar"))[0]
    clip = next(path for path in (folder / "audio").iterdir() if path.stem.encode() in doomed.read_bytes())
    flip_in_the_middle(clip)  # of the same size, and it does not decode
    flip_in_the_middle(doomed)
    before = digest_of(out)
    done = run_sharding("verify", out, "--repair", folder)
    assert done.returncode == 1
    assert "not the bytes that" in done.stderr
    assert json.loads((out / "index.json").read_bytes())["digest"] == read_index(open_store(out)).digest
    assert digest_of(out) == before
