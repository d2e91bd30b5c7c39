"""Any WebDataset reader reads the shards, and no damaged byte passes for a sound one."""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import ShardError, StreamtrainError
from sharding.report.files import check_report
from sharding.shardset.index import (
    FORMAT_VERSION,
    SpeakerInfo,
    read_checked,
    read_index,
    read_keys,
    read_sample,
    read_shard_index,
)
from sharding.shardset.sample import Sample, escape_key, piece_key, sample_from_bytes, sample_to_bytes
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import check_shard
from tests.tools.commands import Command
from tests.tools.corpus import PHONES, make_corpus, read_manifest, write_manifest
from tests.tools.shard_sets import flip_byte

STRANGE_IDS = ["a.b", "a/b", "../a", "a b", "über", "a%2Eb", "a+000", "con\tcat", "x" * 300, "x" * 299 + "y", "."]

texts = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def strange_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose ids are anything but file names."""
    folder = make_corpus(tmp_path_factory.mktemp("strange") / "corpus", clips=len(STRANGE_IDS))
    return write_manifest(
        folder,
        [row | {"utterance_id": name} for row, name in zip(read_manifest(folder), STRANGE_IDS, strict=True)],
    )


def test_plain_webdataset_reads_every_sample_once(strange_corpus: Path, run_sharding: Command) -> None:
    out = strange_corpus.parent / "shards"
    assert run_sharding("build", strange_corpus, "--out", out).returncode == 0
    tars = sorted(str(path) for path in out.rglob("*.tar"))
    read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    rows = {row["utterance_id"]: row for row in read_manifest(strange_corpus)}
    seen: Counter[str] = Counter()
    for sample in read:
        meta = json.loads(sample["json"])
        row = rows[meta["utterance_id"]]
        samples, rate = soundfile.read(io.BytesIO(sample["flac"]))
        assert rate == 16_000
        assert len(samples) == round(row["audio_duration_sec"] * rate)
        assert meta["text"] == row["phonetic_text"]
        seen[meta["utterance_id"]] += 1
    assert seen == Counter(STRANGE_IDS)
    assert len({sample["__key__"] for sample in read}) == len(STRANGE_IDS)


def test_the_tars_carry_no_date_and_no_owner(small_shards: Path) -> None:
    for path in small_shards.rglob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in members} == {(0, 0, 0, "", "")}
        assert all(info.isfile() for info in members)


@given(st.lists(texts, unique=True, max_size=10))
def test_keys_stay_apart_and_fit_in_a_tar(ids: list[str]) -> None:
    keys = [escape_key(name) for name in ids]
    assert len(set(keys)) == len(ids)
    for key in keys:
        assert not set(key) & set("./\\ ")
        assert len(piece_key(key, 12_345).encode()) + len(".flac") <= 100


@given(st.binary(max_size=2000), texts, texts.filter(bool), st.none() | texts, st.integers(0, 9))
def test_a_sample_comes_back_as_it_was(audio: bytes, text: str, name: str, parent: str | None, piece: int) -> None:
    sample = Sample(escape_key(name), audio, text, "labelled", name)
    if parent is not None:
        sample = Sample(piece_key(escape_key(name), piece), audio, "", "unlabelled", name, parent_id=parent,
                        parent_text=text, piece=piece, pieces=10, start_sec=0.5, end_sec=1.25)  # fmt: skip
    assert sample_from_bytes(sample_to_bytes(sample), PHONES) == sample


@given(st.binary(max_size=3000), st.integers(0, 1535))
def test_bytes_that_are_no_sample_are_refused_not_crashed_on(junk: bytes, cut: int) -> None:
    raw = sample_to_bytes(Sample("key", b"audio", "text", "labelled", "id"))
    for damaged in (junk, raw[:cut] + junk, junk + raw):
        if damaged != raw:
            with pytest.raises(ShardError):
                sample_from_bytes(damaged, PHONES)


def test_the_columns_of_a_shard_and_of_the_index_agree(small_shards: Path) -> None:
    store = open_store(small_shards)
    index = read_index(store)
    columns = [name for name in index.samples.dtype.names or () if name != "shard"]
    for number, entry in enumerate(index.shards):
        shard = read_shard_index(store, entry.name)
        assert shard.entry == entry
        rows = index.samples[index.samples["shard"] == number]
        assert all((shard.samples[name] == rows[name]).all() for name in columns)
        samples = check_shard(store, shard, PHONES)
        assert [sample.key for sample in samples] == list(shard.keys)
        speakers = [SpeakerInfo(sample.corpus, sample.age_bucket, sample.child_id) for sample in samples]
        assert speakers == list(shard.speakers)
    assert (index.samples["samples"].sum(), len(index.samples)) == (
        sum(entry.samples for entry in index.shards),
        sum(entry.count for entry in index.shards),
    )


# --- damage -----------------------------------------------------------------------------------------------------

FILES = ("index.json", "samples.bin.zst", "*/*.idx.zst", "*/*.tar", "report/*")


@pytest.fixture
def copied(small_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_shards, tmp_path / "copy"))


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("seed", range(4))
def test_verify_names_the_file_with_a_flipped_byte(
    pattern: str, seed: int, copied: Path, run_sharding: Command
) -> None:
    rng = np.random.default_rng(seed)
    path = Path(rng.choice(sorted(path for path in copied.glob(pattern) if path.stat().st_size)))
    flip_byte(path, rng)
    done = run_sharding("verify", copied)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "hint: " in done.stderr


def check_all(store: Store) -> None:
    index = read_index(store)
    for shard in index.shards:
        check_shard(store, read_checked(store, shard), PHONES)
    if faults := check_report(store, index):
        raise ShardError("\n".join(faults))


@pytest.mark.parametrize("pattern", FILES)
def test_no_flipped_byte_anywhere_goes_unnoticed(pattern: str, copied: Path) -> None:
    """As above for many more bytes, without a process for each."""
    rng = np.random.default_rng(7)
    store = open_store(copied)
    for path in sorted(path for path in copied.glob(pattern) if path.stat().st_size):
        whole = path.read_bytes()
        for _ in range(150 // len(list(copied.glob(pattern)))):
            position = flip_byte(path, rng)
            with pytest.raises(StreamtrainError) as caught:
                check_all(store)
            assert str(path) in str(caught.value), position
            path.write_bytes(whole)


def test_a_flipped_byte_of_a_sample_is_noticed_when_it_is_read_and_the_others_are_sound(copied: Path) -> None:
    rng = np.random.default_rng(3)
    store = open_store(copied)
    index = read_index(store)
    for row, column in enumerate(index.samples):
        path = copied / index.shards[column["shard"]].name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[int(column["offset"]) + int(rng.integers(column["bytes"]))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        for other in range(len(index.samples)):
            if other != row:
                read_sample(store, index, other)
        with pytest.raises(ShardError, match=path.name):
            read_sample(store, index, row)
        path.write_bytes(whole)


def test_a_flipped_byte_of_the_keys_is_noticed_when_they_are_read(copied: Path) -> None:
    store = open_store(copied)
    index = read_index(store)
    path = next(iter(sorted(copied.glob("*/*.idx.zst"))))
    whole = path.read_bytes()
    for seed in range(50):
        flip_byte(path, np.random.default_rng(seed))
        with pytest.raises(ShardError, match=path.name):
            read_keys(store, index)
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [lambda size: size // 2, lambda size: size - 1024, lambda size: size - 1, lambda _: 0])
def test_a_truncated_tar_is_noticed(keep: Callable[[int], int], copied: Path, run_sharding: Command) -> None:
    path = min(copied.glob("*/*.tar"))
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data))])
    done = run_sharding("verify", copied)
    assert done.returncode == 1
    assert str(path) in done.stderr


@pytest.mark.parametrize("pattern", FILES)
def test_a_missing_file_is_noticed(pattern: str, copied: Path, run_sharding: Command) -> None:
    path = min(copied.glob(pattern))
    path.unlink()
    done = run_sharding("verify", copied)
    assert done.returncode == 1
    assert str(path) in done.stderr


def test_a_sound_shard_set_is_verified_and_decoded(small_shards: Path, run_sharding: Command) -> None:
    done = run_sharding("verify", small_shards, "--decode")
    assert done.returncode == 0
    assert "12 samples, all as the index says" in done.stdout


def test_a_damaged_ledger_of_a_set_that_is_built_again_is_named(
    small_corpus: Path, copied: Path, run_sharding: Command
) -> None:
    (copied / "report/ledger.jsonl.zst").write_text("{")
    done = run_sharding("build", small_corpus, "--out", copied, "--num-buckets", 2, "--shard-mb", 0.1)
    assert done.returncode == 1
    assert str(copied / "report/ledger.jsonl.zst") in done.stderr


def test_an_index_of_another_version_is_refused(copied: Path) -> None:
    path = copied / "index.json"
    path.write_text(path.read_text().replace(f'"version": {FORMAT_VERSION}', '"version": 1'))
    with pytest.raises(ShardError, match=f"format version is 1, this program reads {FORMAT_VERSION}"):
        read_index(open_store(copied))
