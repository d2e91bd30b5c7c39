"""`inspect` says what anyone would count in the tars, adds up, draws it, and names the index that is damaged."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from sharding.errors import ShardError
from sharding.pool import Workers
from sharding.report import plots
from sharding.report.inspect import SILENCE_DB, measure_shard
from sharding.shardset.index import ShardIndex, read_index
from sharding.shardset.store import open_store
from sharding.shardset.table import read_clips
from tests.tools.commands import Command
from tests.tools.corpus import PHONES, make_corpus, read_manifest, write_manifest
from tests.tools.seaweed import BUCKET, Seaweed
from tests.tools.shard_sets import flip_byte

Row = dict[str, Any]
GROUPS = ("by_split", "by_bucket", "by_corpus", "by_age")
PICTURES = {
    "durations.png": (960, 480),
    "symbols_per_second.png": (960, 480),
    "loudness.png": (960, 480),
    "symbols.png": (1560, 480),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, run_sharding: Command) -> Path:
    """Two corpora, four ages and none, clips without a child, and two with more label than they can hold, one of them
    silent. Nobody changes it, and it has no report.
    """
    folder = tmp_path_factory.mktemp("inspected")
    for name, clips, ages in (("meadow", 30, ["3-4", "12+", "5-7"]), ("forest", 16, ["8-11", "", "12+"])):
        rows = read_manifest(make_corpus(folder / name, clips=clips, children=5))
        rows = [row | {"age_bucket": ages[number % 3]} for number, row in enumerate(rows)]
        rows[3] |= {"phonetic_text": "kæt " * 200, "md5_hash": None, "filesize_bytes": None}
        rows[4] |= {"child_id": ""}
        write_manifest(folder / name, rows)
    soundfile.write(folder / "forest" / rows[3]["audio_path"], np.zeros(16_000), 16_000, subtype="PCM_16")
    out = folder / "shards"
    done = run_sharding(
        "build", folder / "meadow", folder / "forest", "--out", out, "--num-buckets", 3, "--shard-mb", 0.1
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(out / "report")
    return out


def test_a_reader_that_has_enough_is_no_error(shards: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m sharding inspect {shards} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, len(done.stderr.splitlines())) == ("{", 1)  # what is begun


def inspect_json(run_sharding: Command, *arguments: object) -> Row:
    done = run_sharding("inspect", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document: Row = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def document(shards: Path, run_sharding: Command) -> Row:
    return inspect_json(run_sharding, shards)


def count_by_hand(shards: Path) -> dict[str, dict[Any, Row]]:
    """What `inspect --json` should say, from the tars alone and by other means."""
    bins = json.loads((shards / "index.json").read_bytes())["duration_bins"]
    groups: dict[str, dict[Any, Row]] = {name: defaultdict(lambda: defaultdict(int)) for name in (*GROUPS, "totals")}
    sets: dict[Any, set[str]] = defaultdict(set)
    for path in sorted(shards.rglob("*.tar")):
        split, bucket = path.parent.name, int(path.name[1:3])
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            bodies = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
        for flac, document, member, meta in zip(bodies[::2], bodies[1::2], members[::2], members[1::2], strict=True):
            fields = json.loads(document)
            seconds = soundfile.info(io.BytesIO(flac)).duration
            keys = {"by_split": split, "by_bucket": (split, bucket), "totals": "total"}
            keys |= {"by_corpus": fields["corpus"], "by_age": fields["age_bucket"] or "unknown"}
            for name, key in keys.items():
                row = groups[name][key]
                row["samples"] += 1
                row["hours"] += seconds / 3600
                row["symbols"] += len(fields["text"])
                row["labelled"] += seconds if fields["text"] else 0
                row["edges"] += bins[bucket]
                row["mb"] += sum(512 + -(-info.size // 512) * 512 for info in (member, meta)) / 2**20
                sets[name, key, "shards"].add(str(path))
                sets[name, key, "speakers"] |= {fields["child_id"]} - {""}
    for name, group in groups.items():
        for key, row in group.items():
            row |= {kind: len(sets[name, key, kind]) for kind in ("shards", "speakers")}
            row["mean_seconds"] = row["hours"] * 3600 / row["samples"]
            labelled, edges = row.pop("labelled"), row.pop("edges")
            row["symbols_per_second"] = row["symbols"] / labelled if labelled else None
            row["padding"] = 1 - row["hours"] * 3600 / edges
    return groups


def numbers_of(row: Row) -> Row:
    names = {"split", "bucket", "from_sec", "to_sec", "corpus", "age_bucket"}
    return {name: value for name, value in row.items() if name not in names}


def colour_share(png: Path, colour: str) -> float:
    """How much of a picture is drawn in a colour."""
    pixels = imread(png)[:, :, :3]
    return float((np.abs(pixels - to_rgb(colour)) < 0.02).all(axis=2).mean())


# --- the tables -------------------------------------------------------------------------------------------------


def test_json_says_what_a_plain_reader_counts_in_the_tars(shards: Path, document: Row) -> None:
    wanted = count_by_hand(shards)
    seen = {
        "totals": {"total": document["totals"]},
        "by_split": {row["split"]: row for row in document["by_split"] if row["samples"]},
        "by_bucket": {(row["split"], row["bucket"]): row for row in document["by_bucket"]},
        "by_corpus": {row["corpus"]: row for row in document["by_corpus"]},
        "by_age": {row["age_bucket"]: row for row in document["by_age"]},
    }
    assert len(wanted["by_split"]) == 3
    assert set(seen["by_corpus"]) == {"meadow", "forest"}
    assert list(seen["by_age"]) == ["3-4", "5-7", "8-11", "12+", "unknown"]
    for name, group in wanted.items():
        assert set(seen[name]) == set(group)
        for key, row in group.items():
            assert numbers_of(seen[name][key]) == pytest.approx(dict(row), abs=1e-6), (name, key)


def test_bucket_rows_carry_the_edges_of_the_index(shards: Path, document: Row) -> None:
    bins = [0.0, *read_index(open_store(shards)).duration_bins]
    for row in document["by_bucket"]:
        assert [row["from_sec"], row["to_sec"]] == bins[row["bucket"] : row["bucket"] + 2]


@pytest.mark.parametrize("column", ["samples", "hours", "symbols", "mb"])
@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_sum_to_the_total(name: str, column: str, document: Row) -> None:
    assert sum(row[column] for row in document[name]) == pytest.approx(document["totals"][column], abs=1e-4)


def test_the_terminal_shows_the_same_numbers_aligned(shards: Path, document: Row, run_sharding: Command) -> None:
    done = run_sharding("inspect", shards)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert {len(line) for line in lines if line} == {len(lines[0])}
    total = next(line.split() for line in lines if line.startswith("total"))
    totals = document["totals"]
    assert total[1:4] == [f"{totals['samples']:,}", str(totals["speakers"]), f"{totals['hours']:.2f}"]
    assert total[5] == f"{totals['symbols']:,}"
    edges = [f"{row['split']:<10} {row['from_sec']:.1f}–{row['to_sec']:.1f} s" for row in document["by_bucket"]]
    assert [edge for edge in edges if any(line.startswith(f"{edge} ") for line in lines)] == edges


def test_an_empty_split_has_a_row_of_zeros(small_shards: Path, run_sharding: Command) -> None:
    document = inspect_json(run_sharding, small_shards)
    assert [row["split"] for row in document["by_split"]] == ["train", "valid", "test", "unlabelled"]
    row = document["by_split"][3]
    assert [row[name] for name in ("split", "samples", "hours", "mean_seconds")] == ["unlabelled", 0, 0, None]
    assert "unlabelled" not in {row["split"] for row in document["by_bucket"]}
    assert re.search(r"^unlabelled +0 +0 +0\.00 +– ", run_sharding("inspect", small_shards).stdout, re.MULTILINE)


def test_a_shard_set_without_a_clip_is_shown_and_drawn(tmp_path: Path, run_sharding: Command) -> None:
    folder = make_corpus(tmp_path / "corpus", clips=2)
    for path in (folder / "audio").iterdir():
        path.write_bytes(b"")
    run_sharding("build", folder, "--out", tmp_path / "out")
    document = inspect_json(run_sharding, tmp_path / "out", "--plots", tmp_path / "plots")
    assert document["totals"]["samples"] == 0
    assert [document[name] for name in ("by_bucket", "by_corpus", "by_age")] == [[], [], []]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == set(PICTURES)


def test_a_bucket_is_inspected_like_a_folder(
    shards: Path,
    document: Row,
    run_sharding: Command,
    seaweed: Seaweed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    for path in (path for path in shards.rglob("*") if path.is_file()):
        open_store(url).write(path.relative_to(shards).as_posix(), path.read_bytes())
    assert inspect_json(run_sharding, url, "--plots", tmp_path, "--workers", 1) == document
    assert (tmp_path / "loudness.png").exists()


# --- the plots --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(shards: Path, tmp_path_factory: pytest.TempPathFactory, run_sharding: Command) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "plots"
    done = run_sharding("inspect", shards, "--json", "--plots", folder, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["samples"] == 46
    assert f"wrote {', '.join(PICTURES)} to {folder}" in done.stderr
    return folder


@pytest.mark.parametrize(("name", "size"), PICTURES.items())
def test_a_plot_is_a_png_with_something_in_it(name: str, size: tuple[int, int], drawn: Path) -> None:
    assert (drawn / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width = imread(drawn / name).shape[:2]
    assert (width, height) == size
    assert colour_share(drawn / name, plots.COLOURS["train"]) > 0.0005
    assert (colour_share(drawn / name, plots.COLOURS["valid"]) > 0) == (name != "symbols.png")


def test_a_plot_of_nothing_has_none_of_the_colours(tmp_path: Path, shards: Path) -> None:
    whole = read_index(open_store(shards))
    none = ShardIndex(whole.duration_bins, {}, "", "", whole.labels, {}, (), whole.samples[:0])
    pictures = {
        "durations.png": plots.plot_durations(none),
        "symbols_per_second.png": plots.plot_symbol_rates(none),
        "loudness.png": plots.plot_loudness(none, np.zeros(0)),
        "symbols.png": plots.plot_symbols(none, {}),
    }
    for name, png in pictures.items():
        (tmp_path / name).write_bytes(png)
        assert colour_share(tmp_path / name, plots.COLOURS["train"]) == 0
        assert colour_share(tmp_path / name, plots.COLOURS["valid"]) == 0


def test_the_report_of_a_build_has_the_same_plot_of_durations(
    small_shards: Path, tmp_path: Path, run_sharding: Command
) -> None:
    done = run_sharding("inspect", small_shards, "--plots", tmp_path)
    assert done.stdout.endswith(f"to {tmp_path}\n")
    assert (tmp_path / "durations.png").read_bytes() == (small_shards / "report/durations.png").read_bytes()


def test_levels_and_symbols_are_those_of_the_tars(shards: Path) -> None:
    entries = read_index(open_store(shards)).shards
    with Workers(2) as pool:
        jobs = [(str(shards), entry, PHONES) for entry in entries]
        measured = pool.map(measure_shard, jobs, [entry.count for entry in entries], "measuring")
    assert min(min(levels) for levels, _ in measured) == SILENCE_DB
    for entry, (levels, counts) in zip(entries, measured, strict=True):
        wanted: list[float] = []
        symbols: Counter[str] = Counter()
        with tarfile.open(shards / entry.name) as tar:
            for member in tar:
                body = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".flac"):  # a sine at full scale is at -3 dB
                    power = np.mean(soundfile.read(io.BytesIO(body))[0] ** 2)
                    wanted.append(10 * np.log10(power) if power else SILENCE_DB)
                else:
                    symbols.update(json.loads(body)["text"])
        assert levels == pytest.approx(wanted, abs=1e-3)
        assert counts == symbols


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def assert_named(done: "subprocess.CompletedProcess[str]", path: Path) -> None:
    """One line that says what is wrong with the file, and what to do about it."""
    assert done.returncode == 1
    assert done.stdout == ""
    message, hint = done.stderr.splitlines()[-2:]
    assert str(path) in message
    assert hint.startswith("hint: ")


def test_a_flipped_byte_of_a_shard_index_is_named(copied: Path, run_sharding: Command) -> None:
    path = min(copied.glob("*/*.idx.zst"))
    whole, store = path.read_bytes(), open_store(copied)
    for seed in range(100):
        path.write_bytes(whole)
        flip_byte(path, np.random.default_rng(seed))
        with pytest.raises(ShardError, match=re.escape(str(path))):
            read_clips(store, read_index(store))
    assert_named(run_sharding("inspect", copied), path)


def test_the_index_of_another_shard_is_named(copied: Path) -> None:
    one, other = sorted(copied.glob("*/*.idx.zst"))[:2]
    shutil.copy(one, other)
    store = open_store(copied)
    with pytest.raises(ShardError, match=re.escape(str(other))):
        read_clips(store, read_index(store))


def test_a_missing_shard_index_is_named(copied: Path, run_sharding: Command) -> None:
    path = max(copied.glob("*/*.idx.zst"))
    path.unlink()
    assert_named(run_sharding("inspect", copied, "--json"), path)


def test_a_folder_without_a_shard_set_is_named(tmp_path: Path, run_sharding: Command) -> None:
    assert_named(run_sharding("inspect", tmp_path), tmp_path / "index.json")


def test_a_damaged_tar_is_named_when_it_is_drawn(copied: Path, run_sharding: Command) -> None:
    path = min(copied.glob("*/*.tar"))
    flip_byte(path, np.random.default_rng(0))
    done = run_sharding("inspect", copied, "--plots", copied / "plots", "--workers", 1)
    assert done.returncode == 1
    assert f"ShardError: {path}: checksum is" in done.stderr


def test_a_place_that_cannot_be_written_is_named_before_the_audio_is_read(shards: Path, run_sharding: Command) -> None:
    done = run_sharding("inspect", shards, "--plots", shards / "index.json")
    assert done.returncode == 1
    assert str(shards / "index.json") in done.stderr
    assert "measuring" not in done.stderr
