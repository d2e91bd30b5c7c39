"""The public API: `import streamtrain as st` and nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from torch.utils.data import DataLoader

import streamtrain as st
from tests.tools.commands import ROOT
from tests.tools.corpus import read_manifest
from tests.tools.models import save, talkative
from tests.tools.training_runs import run

EXAMPLE = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
import streamtrain as st
raw, shards, model, run = sys.argv[1:]
built = st.build([raw], shards, num_buckets=2, valid_fraction=0.3)
print(built.rejected)
config = st.load_config("configs/zero2.json", [
    f"data.shards={shards}", "data.batch_seconds=8", f"model.pretrained={model}", f"train.run_dir={run}",
    "train.max_steps=4", "train.warmup_steps=1", "eval.every_steps=2", "train.micro_batches_per_step=2"])
print(st.plan(shards, config).steps)
result = ThreadPoolExecutor().submit(st.train, config).result()
assert st.train(config) == result  # nothing was left to do
print(result.step, result.best_score)
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()
model = st.load_model(f"{run}/best")
evaluation = st.evaluate(model, st.open_shards(shards))
assert evaluation.cer == result.best_score, (evaluation.cer, result.best_score)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("end")
"""


@pytest.fixture(scope="module")
def shards(work: Path) -> st.ShardSet:
    return st.open_shards(work / "shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> st.Recogniser:
    return st.load_model(save(talkative("wav2vec2, group norm"), tmp_path_factory.mktemp("model") / "best"))


def test_every_name_is_there_and_the_import_takes_no_time() -> None:
    assert all(getattr(st, name) is not None for name in st.__all__)
    assert len(st.__all__) < 20
    code = "import sys, streamtrain; print(sorted({'torch', 'numpy', 'pandas'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert all("Example:" in getattr(st, name).__doc__ for name in st.__all__ if name not in ("Config", "load_config"))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        st.nothing  # noqa: B018


def test_a_shard_set_is_a_mapping_with_a_table(shards: st.ShardSet, work: Path) -> None:
    table = shards.table()
    assert list(shards) == list(table.index)
    assert len(shards) == len(table)
    texts = {row["utterance_id"]: row["phonetic_text"] for row in read_manifest(work / "raw/tiny")}
    key = next(key for key in shards if table.loc[key, "split"] == "train")
    sample = shards[key]
    assert sample.text in texts[sample.parent_id or sample.utterance_id]
    assert len(shards.waveform(key)) == round(table.loc[key, "seconds"] * 16_000)
    with pytest.raises(KeyError):
        shards["nobody"]


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_a_dataset_has_each_labelled_clip_once(shards: st.ShardSet, workers: int, world_size: int) -> None:
    """Whatever the number of ranks and of loader processes; another epoch has another order."""
    table = shards.table()
    orders = []
    for epoch in (0, 1):
        keys = []
        for rank in range(world_size):
            dataset = st.ShardDataset(shards, batch_seconds=8, rank=rank, world_size=world_size)
            dataset.set_epoch(epoch)
            batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
            assert len(batches) == len(dataset)
            assert all(batch.inputs.numel() <= 8 * 16_000 for batch in batches)
            keys += [key for batch in batches for key in batch.keys]
        assert sorted(keys) == sorted(table.index[table["split"] == "train"])
        orders.append(keys)
    assert orders[0] != orders[1]


def test_samples_and_files_are_transcribed_alike(shards: st.ShardSet, model: st.Recogniser, tmp_path: Path) -> None:
    waveform = np.concatenate([shards.waveform(key) for key in list(shards)[:3]])
    soundfile.write(tmp_path / "clip.wav", waveform, 16_000, subtype="FLOAT")
    of_samples, of_file = model.transcribe(waveform, sample_rate=16_000), model.transcribe(tmp_path / "clip.wav")
    assert of_samples == of_file
    assert of_samples.text == " ".join(word.text for word in of_samples.words)
    assert 0 < of_samples.confidence <= 1
    ends = [second for word in of_samples.words for second in (word.start, word.end)]
    assert ends == sorted(ends)
    assert ends[-1] <= len(waveform) / 16_000
    assert model.transcribe(np.stack([waveform, waveform], axis=1), sample_rate=16_000) == of_samples
    opposite = model.transcribe(np.stack([waveform, -waveform], axis=1), sample_rate=16_000)
    assert opposite.text == of_samples.text  # a mix would be silence
    assert model.transcribe((waveform * 32_767).astype(np.int16), sample_rate=16_000).text == of_samples.text
    assert len(model.transcribe(waveform, sample_rate=16_000, nbest=3).nbest) == 3
    assert model.transcribe(waveform.repeat(2), sample_rate=32_000).text


@pytest.mark.parametrize(("samples", "rate", "message"), [
    (np.zeros(16_000, np.float32), None, "without their sample_rate"), (np.zeros(0, np.float32), 16_000, "samples: "),
    (np.full(16_000, np.nan, np.float32), 16_000, "samples: "), (np.zeros((2, 2, 2), np.float32), 16_000, "shape"),
    (np.zeros(100, np.float32), 16_000, "samples: "), (np.zeros(16_000, np.float32), 0, "0 Hz"),
    (np.zeros((2, 160_000), np.float32), 16_000, "shape"), (np.zeros(16_000, np.int64), 16_000, "int64"),
])  # fmt: skip
def test_samples_that_are_no_audio_are_refused(
    samples: np.ndarray, rate: int | None, message: str, model: st.Recogniser
) -> None:
    with pytest.raises(st.StreamtrainError, match=message):
        model.transcribe(samples, rate)


@pytest.mark.parametrize("place", ["missing.wav", "."])
def test_what_is_no_file_is_refused(place: str, model: st.Recogniser, tmp_path: Path) -> None:
    with pytest.raises(st.StreamtrainError, match=str(tmp_path / place)):
        model.transcribe(tmp_path / place)


@pytest.mark.parametrize("split", ["vaild", "unlabelled"])
def test_a_split_without_clips_has_no_score(split: str, shards: st.ShardSet, model: st.Recogniser) -> None:
    with pytest.raises(st.StreamtrainError, match=r"has no labelled clips in split .*, so nothing was scored"):
        st.evaluate(model, shards, split=split)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_see_the_epoch(start: str, work: Path) -> None:
    dataset = st.ShardDataset(work / "shards", batch_seconds=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=start)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([key for batch in loader for key in batch.keys])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_forked_process_does_not_wait_for_a_bucket_and_a_spawned_one_reads_it(bucket: object, url: str) -> None:
    dataset = st.ShardDataset(st.open_shards(url), batch_seconds=8)
    keys = [batch.keys for batch in dataset]
    spawned = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [batch.keys for batch in spawned] == keys
    with pytest.raises(st.StreamtrainError, match="cannot read from a bucket"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))


@pytest.mark.parametrize(("settings", "message"), [
    ({"track": "words"}, "track"), ({"max_duration": -5}, "max_duration"), ({"maxduration": 5}, "maxduration"),
    ({"alignments": "nofile.jsonl"}, "nofile.jsonl"),
])  # fmt: skip
def test_a_setting_that_is_none_is_named(settings: dict[str, object], message: str, work: Path, tmp_path: Path) -> None:
    with pytest.raises(st.StreamtrainError, match=message):
        st.build([work / "raw/tiny"], tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_sources_are_a_list(work: Path, tmp_path: Path) -> None:
    with pytest.raises(st.StreamtrainError, match="a list of folders or files"):
        st.build(str(work / "raw/tiny"), tmp_path / "out")


def test_rates_are_those_of_the_whole_corpus() -> None:
    assert st.cer(["kæt", "dɔg"], ["kæp", "dɔg"]) == 1 / 6
    assert st.wer(["the cat"], ["a cat"]) == 1 / 2
    with pytest.raises(ValueError, match=r"shorter|longer"):
        st.cer(["kæt"], [])


def test_a_script_builds_plans_trains_and_evaluates_in_one_process(work: Path, tmp_path: Path) -> None:
    """Without a main guard, and going on after `train` has returned."""
    arguments = [work / "raw/tiny", tmp_path / "shards", work / "model", tmp_path / "run"]
    done = run([sys.executable, "-c", EXAMPLE, *arguments])
    assert done.stdout.splitlines()[-1] == "end"
