"""The main job through the real launcher: two real ranks, real shards, real kills."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from corpus import make_corpus
from seaweed import BUCKET, SECRET_KEY, Seaweed
from tiny_model import make_tiny_model

from sharding.audio import SAMPLE_RATE
from sharding.format import read_index, read_keys, read_sample
from sharding.ipa import normalize_ipa
from sharding.store import open_store

ROOT = Path(__file__).parent.parent
AUGMENTED = ["data.speed_factors=[0.9,1,1.1]", "model.mask_feature_prob=0.2", "model.mask_feature_length=4"]
EXACT = ["model.dropout=0", "deepspeed.torch_autocast.enabled=false"]  # fp32 without dropout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny corpus, its shards, and a tiny pretrained model."""
    folder = tmp_path_factory.mktemp("work")
    make_corpus(folder / "raw" / "tiny", clips=48, children=6, seconds=(0.6, 2.0), long_clips=1, symbols="ɑeiostkm")
    run([sys.executable, "-m", "sharding", "build", folder / "raw" / "tiny", "--out", folder / "shards"])
    make_tiny_model(folder / "model")
    return folder


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def run(command: list[object], expect: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=240
    )
    if expect is not None:
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def training(
    work: Path, name: str, *settings: str, ranks: int = 2, resume: str = "auto", config: str = "zero2"
) -> list[object]:
    """The literal command of the README, made tiny."""
    return [
        "deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), "launch/train.py",
        "--config", f"configs/{config}.json", "--resume", resume, "--set",
        f"data.shards={work / 'shards'}", f"model.pretrained={work / 'model'}", f"train.run_dir={work / name}",
        "data.batch_seconds=4", "train.micro_batches_per_step=4", "train.warmup_steps=2",
        "deepspeed.optimizer.params.lr=1e-3", *settings,
    ]  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path) -> list[str]:
    return [row["loss"] for row in read_rows(run_dir)]


def test_the_commands_of_the_readme_lead_from_shards_to_a_model_that_transformers_runs(work: Path) -> None:
    run(training(work, "run", "train.max_steps=4", "eval.every_steps=2", "train.checkpoint_every=2"))
    folder = work / "run"
    rows = read_rows(folder)
    assert ",".join(rows[0]) == "step,epoch,loss,lr,grad_norm,audio_sec_per_sec,padding,data_wait,silent,cer"
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["cer"]) for row in rows] == [False, True, False, True]
    with open(folder / "ranks.csv", newline="") as file:
        ranks = list(csv.DictReader(file))
    assert [(row["step"], row["rank"]) for row in ranks] == [("4", "0"), ("4", "1")]
    assert all(float(row["decode_ms"]) > 0 and 0 <= float(row["data_wait"]) < 1 for row in ranks)
    assert all((row["cache_hits"], row["retries"], row["silent"]) == ("1.0", "0", "0") for row in ranks)
    for name in ("config.json", "samples.txt", "curves.png", "scorecard.json", "tensorboard", "best", "checkpoints"):
        assert (folder / name).exists(), name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]

    out = work / "evaluation"
    run(["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "launch/evaluate.py",
         "--model", folder / "best", "--shards", work / "shards", "--out", out])  # fmt: skip
    card = json.loads((out / "scorecard.json").read_text())
    in_training = json.loads((folder / "scorecard.json").read_text())
    assert {name: card[name] for name in ("cer", "edits", "reference_length", "clips")} == {
        name: in_training[name] for name in ("cer", "edits", "reference_length", "clips")
    }
    assert card["cer"] == card["edits"] / card["reference_length"]
    for group in card["groups"].values():
        assert sum(row["edits"] for row in group) == card["edits"]
        assert sum(row["clips"] for row in group) == card["clips"]
    assert "CER" in run([sys.executable, "-m", "streamtrain", "summary", folder]).stdout

    from transformers import AutoModelForCTC, pipeline

    AutoModelForCTC.from_pretrained(folder / "best")
    clip = next(iter((work / "raw" / "tiny" / "audio").glob("*.flac")))
    waveform, rate = soundfile.read(clip, dtype="float32")
    assert rate == SAMPLE_RATE
    transcribe = pipeline("automatic-speech-recognition", str(folder / "best"))
    transcripts = work / "transcripts.jsonl"
    run([sys.executable, "-m", "streamtrain", "transcribe", folder / "best", clip, "--out", transcripts])
    heard = json.loads(transcripts.read_text())["phonetic_text"]
    assert normalize_ipa(transcribe(waveform)["text"]) == heard  # the pipeline keeps double spaces


def test_one_and_two_ranks_compute_the_same_losses_and_the_same_score(work: Path) -> None:
    cards = []
    for ranks in (1, 2):
        name = f"ranks-{ranks}"
        run(training(work, name, *EXACT, *AUGMENTED, "train.max_steps=6", "eval.every_steps=3", ranks=ranks))
        cards.append(json.loads((work / name / "scorecard.json").read_text()))
    one, two = ([float(loss) for loss in losses(work / f"ranks-{ranks}")] for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    assert len(set(one)) == 6
    counts = [[card[name] for name in ("cer", "edits", "reference_length", "clips")] for card in cards]
    assert counts[0] == counts[1]


def test_every_zero_stage_computes_the_same_losses(work: Path) -> None:
    found = []
    for config in ("zero1", "zero2", "zero3"):
        # The tiny model's tensors are small enough to be kept whole under ZeRO-3: part them all the same
        part = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if config == "zero3" else []
        run(training(work, config, *EXACT, *part, "train.max_steps=3", "eval.every_steps=1", config=config))
        found.append([float(loss) for loss in losses(work / config)])
        assert (work / config / "best" / "model.safetensors").stat().st_size > 50_000  # gathered under ZeRO-3 too
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_shards_in_a_bucket_train_the_same_model(work: Path, seaweed: Seaweed) -> None:
    url, there = f"s3://{BUCKET}/training/shards", seaweed.environment
    run([sys.executable, "-m", "sharding", "build", work / "raw" / "tiny", "--out", url], **there)
    run([sys.executable, "-m", "sharding", "verify", url], **there)
    run(training(work, "from-disk", *EXACT, "train.max_steps=3"))
    cache = f"data.cache_dir={work / 'cache'}"
    run(training(work, "from-bucket", *EXACT, "train.max_steps=3", f"data.shards={url}", cache), **there)
    assert losses(work / "from-bucket") == losses(work / "from-disk")
    assert list((work / "cache").rglob("*.tar"))
    assert not any(SECRET_KEY in path.read_text() for path in (work / "from-bucket").glob("*.json"))


def test_the_score_counts_every_validation_recording_once_at_any_world_size(work: Path) -> None:
    store = open_store(work / "shards")
    index = read_index(store)
    wanted = {read_sample(store, index, row).recording_id for row in index.split("valid").tolist()}
    run(training(work, "scored", "train.max_steps=1"))
    found = []
    for ranks in (1, 3):
        out = work / f"scored-by-{ranks}"
        run(["deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), "launch/evaluate.py",
             "--model", work / "scored" / "best", "--shards", work / "shards", "--out", out])  # fmt: skip
        rows = [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()]
        found.append([row | {"confidence": None} for row in rows])  # its last digits go with the number of threads
    assert found[0] == found[1]
    ids = [row["utterance_id"] for row in found[0]]
    assert len(ids) == len(set(ids))
    assert set(ids) == wanted


def test_a_killed_run_goes_on_and_repeats_the_uninterrupted_losses_to_the_bit(work: Path) -> None:
    settings = (
        "train.max_steps=12",
        "train.checkpoint_every=3",
        "eval.every_steps=6",
        "deepspeed.torch_autocast.enabled=false",
        *AUGMENTED,
    )
    run(training(work, "whole", *settings))
    for _ in range(2):  # killed twice in a row, each time after another checkpoint
        kill_after_a_checkpoint(training(work, "killed", *settings), work / "killed")
    done = run(training(work, "killed", *settings))
    assert "resumed at step" in done.stderr + done.stdout
    assert losses(work / "killed") == losses(work / "whole")
    assert len({row["epoch"] for row in read_rows(work / "whole")}) > 1  # over the border of an epoch too


def test_a_run_goes_on_with_the_clips_it_began_with_while_its_shard_set_grows(work: Path) -> None:
    shards = shutil.copytree(work / "shards", work / "growing")
    settings = (f"data.shards={shards}", "train.max_steps=6", "train.checkpoint_every=2", *EXACT)
    run(training(work, "before-growth", *settings))
    kill_after_a_checkpoint(training(work, "over-growth", *settings), work / "over-growth")
    more = make_corpus(work / "raw" / "more", clips=12, symbols="ɑeiostkm", seed=1)
    run([sys.executable, "-m", "sharding", "build", more, "--out", shards, "--append"])
    done = run(training(work, "over-growth", *settings))
    assert "has grown by 12 samples" in done.stderr + done.stdout
    assert losses(work / "over-growth") == losses(work / "before-growth")


def kill_after_a_checkpoint(command: list[object], run_dir: Path) -> None:
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    newest = max((run_dir / "checkpoints").glob("step-*/state.json"), default=None)
    deadline = time.monotonic() + 120
    while max((run_dir / "checkpoints").glob("step-*/state.json"), default=None) == newest:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher; its ranks die with it
    process.wait()


def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_lost(work: Path) -> None:
    run(training(work, "damaged", "train.max_steps=2", "train.checkpoint_every=1"))
    newest = work / "damaged" / "checkpoints" / "step-0000002"
    for name in ("engine/mp_rank_00_model_states.pt", "state.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        done = run(training(work, "damaged", "train.max_steps=2", "train.checkpoint_every=1"), expect=1)
        assert "CheckpointError" in done.stderr
        assert "step-0000002" in done.stderr
        assert "Traceback" not in done.stderr
        (newest / name).write_bytes(whole)
    assert (work / "damaged" / "checkpoints" / "step-0000001" / "state.json").is_file()


def test_a_model_is_not_overwritten_by_a_run_that_lost_its_checkpoints(work: Path) -> None:
    run(training(work, "lost", "train.max_steps=1"))
    before = (work / "lost" / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(work / "lost" / "checkpoints")
    done = run(training(work, "lost", "train.max_steps=1"), expect=1)
    assert "holds a model in best/" in done.stderr
    done = run(training(work, "lost", "train.max_steps=1", "model.pretrained=nowhere", resume="none"), expect=1)
    assert "nowhere" in done.stderr
    assert (work / "lost" / "best" / "model.safetensors").read_bytes() == before


def test_a_run_killed_before_its_first_step_goes_on_with_the_same_command(work: Path) -> None:
    settings = ("train.max_steps=2", "eval.every_steps=1")
    kill_after_a_checkpoint(training(work, "early", *settings), work / "early")
    run(training(work, "early", *settings))
    assert len(losses(work / "early")) == 2


def test_a_second_run_in_the_same_folder_is_refused(work: Path) -> None:
    (work / "held").mkdir()
    with open(work / "held" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(training(work, "held", "train.max_steps=1", ranks=1), expect=1)
    assert "another run is writing here" in done.stderr


def test_a_checkpoint_of_another_run_is_refused_by_name(work: Path) -> None:
    run(training(work, "first", "train.max_steps=1"))
    done = run(training(work, "first", "train.max_steps=1", "train.seed=7"), expect=1)
    assert "CheckpointError" in done.stderr
    assert "train.seed was 0, is 7" in done.stderr
    assert "--resume none" in done.stderr
    assert "RUN/best" in done.stderr
    assert "Traceback" not in done.stderr
    other = training(work, "second", "train.max_steps=1", resume=str(work / "nothing"))
    assert "not a checkpoint" in run(other, expect=1).stderr


def test_a_finished_run_says_so_and_starts_over_only_when_told(work: Path) -> None:
    run(training(work, "finished", "train.max_steps=2"))
    first = losses(work / "finished")
    assert "all 2 steps are done" in run(training(work, "finished", "train.max_steps=2")).stderr
    run(training(work, "finished", "train.max_steps=2", resume="none"))
    assert losses(work / "finished") == first


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        (["data.batch_second=4"], 1, "did you mean 'data.batch_seconds'?"),
        (["data.shards=nowhere"], 1, "there is no shard set here"),
        (["data.batch_seconds=0.5"], 1, "raise data.batch_seconds"),
        (["model.pretrained=facebook/wav2vec2-base"], 1, "model 'facebook/wav2vec2-base' cannot be loaded"),
        (["deepspeed.gradient_accumulation_steps=2"], 1, "train.micro_batches_per_step"),
        (["deepspeed.gradient_cliping=1"], 1, "did you mean 'deepspeed.gradient_clipping'?"),
        (["deepspeed.zero_optimization.stage=7"], 1, "DeepSpeed does not take the section 'deepspeed'"),
        (["train.max_steps"], 1, "before --set"),
        ([], 3, "run 1, 2, 4 ranks"),
    ],
)
def test_a_mistake_is_told_in_words(work: Path, settings: list[str], ranks: int, message: str) -> None:
    done = run(training(work, "mistaken", *settings, ranks=ranks), expect=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(re.escape(message), done.stderr)) == 1  # told once, not by every rank


def test_the_labels_of_a_step_are_what_the_plan_says(work: Path) -> None:
    """The forecast's keys are those of the shards, each once per epoch."""
    keys = work / "keys.jsonl"
    run([sys.executable, "-m", "streamtrain", "plan", work / "shards", "--set", "data.batch_seconds=4", "--keys", keys])
    planned = [key for line in keys.read_text().splitlines() for key in json.loads(line)["keys"]]
    store = open_store(work / "shards")
    index = read_index(store)
    assert sorted(planned) == sorted(read_keys(store, index)[index.split("train")])
