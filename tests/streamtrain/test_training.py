"""The main job: the README's commands through the real launcher, real ranks, real shards, real kills."""

import csv
import fcntl
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from sharding.audio.codec import SAMPLE_RATE, encode
from sharding.cli import main
from sharding.errors import StreamtrainError
from sharding.labels.pasketti import normalize_ipa
from sharding.labels.policy import policy_of
from sharding.shardset.index import (
    join_samples,
    pack_index,
    read_checked,
    read_index,
    read_keys,
    read_sample,
    write_index,
    write_shard,
)
from sharding.shardset.store import open_store
from sharding.shardset.verify import check_shard
from streamtrain.config import ModelConfig
from streamtrain.data.patience import GRACE_SEC
from streamtrain.distributed import PREEMPTED
from streamtrain.eval.metrics import EditCounts, TextEdits, spoken_words
from streamtrain.eval.scorecard import ClipScore, Evaluation
from streamtrain.model.ctc import CTCModel
from streamtrain.model.pretrained import load_model, save_model
from streamtrain.model.vocab import vocab_of
from streamtrain.run_status import read_result
from streamtrain.training.checkpoint import list_checkpoints, load_state, open_checkpoint
from streamtrain.training.run import _check_frames
from streamtrain.training.run_log import RankRow, RunLog, read_log, render_run
from streamtrain.training.step_row import StepRow
from streamtrain.training.trainer import TrainError
from tests.tools.corpus import PHONES, make_corpus, read_manifest, write_manifest
from tests.tools.models import SLOW, TINY, make_network
from tests.tools.ports import free_port
from tests.tools.seaweed import BUCKET, SECRET_KEY, Seaweed
from tests.tools.shard_sets import make_index
from tests.tools.stream_sets import opened_by_nobody, write_set
from tests.tools.tiny_model import make_tiny_model
from tests.tools.training_runs import (
    AUGMENTED,
    EXACT,
    PART_ALL,
    losses,
    processes,
    read_rows,
    run,
    start,
    steps_saved,
    training,
    wait_for_all,
    wait_until,
)


def test_the_commands_of_the_readme_lead_from_shards_to_a_model_that_transformers_runs(work: Path) -> None:
    run(training(work, "run", "train.max_steps=4", "eval.every_steps=2", "train.checkpoint_every=2"), warm=False)
    folder = work / "run"
    rows = read_rows(folder)
    assert ",".join(rows[0]) == (
        "step,epoch,loss,lr,grad_norm,seconds,audio_sec_per_sec,padding,data_wait,silent,skipped,"
        "eval_loss,eval_per,eval_wer,eval_cer,eval_score,eval_runtime"
    )
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["eval_cer"]) for row in rows] == [False, True, False, True]
    with open(folder / "ranks.csv", newline="") as file:
        ranks = list(csv.DictReader(file))
    assert [(row["step"], row["rank"]) for row in ranks] == [("4", "0"), ("4", "1")]
    assert all(float(row["decode_ms"]) > 0 and 0 <= float(row["data_wait"]) < 1 for row in ranks)
    assert all((row["cache_hits"], row["retries"], row["silent"]) == ("1.0", "0", "0") for row in ranks)
    for name in ("config.json", "samples.txt", "curves.png", "scorecard.json", "tensorboard", "best", "checkpoints"):
        assert (folder / name).exists(), name
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-0000002",
        "step-0000004",
        "newest",
        "best",
    }

    out = work / "evaluation"
    run(["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "launch/evaluate.py",
         "--model", folder / "best", "--shards", work / "shards", "--out", out], warm=False)  # fmt: skip
    card = json.loads((out / "scorecard.json").read_text())
    in_training = json.loads((folder / "scorecard.json").read_text())
    assert {name: card[name] for name in ("cer", "edits", "reference_length", "clips")} == {
        name: in_training[name] for name in ("cer", "edits", "reference_length", "clips")
    }
    assert card["cer"] == card["edits"] / card["reference_length"]
    for group in card["groups"].values():
        assert sum(row["edits"] for row in group) == card["edits"]
        assert sum(row["clips"] for row in group) == card["clips"]
    ours = [sys.executable, "-m", "streamtrain"]
    assert "CER" in run([*ours, "summary", folder], warm=False).stdout

    from transformers import AutoModelForCTC, pipeline

    AutoModelForCTC.from_pretrained(folder / "best")
    clip = next(iter((work / "raw" / "tiny" / "audio").glob("*.flac")))
    waveform, rate = soundfile.read(clip, dtype="float32")
    assert rate == SAMPLE_RATE
    transcribe = pipeline("automatic-speech-recognition", str(folder / "best"))
    transcripts = work / "transcripts.jsonl"
    run([*ours, "transcribe", folder / "best", clip, "--out", transcripts], warm=False, OMP_NUM_THREADS="2")
    heard = json.loads(transcripts.read_text())["phonetic_text"]
    assert normalize_ipa(transcribe(waveform)["text"]) == heard  # the pipeline keeps double spaces

    for command in (
        ["align", folder / "best", work / "shards", "--out", work / "alignments.jsonl.zst"],
        ["export", folder / "best", "--out", work / "exported"],
        ["package", folder / "best", "--out", work / "packed.zip"],
        ["plan", work / "shards", "--config", "configs/zero2.json", "--plot", work / "plan.png"],
        ["compare", out, out],
    ):
        done = run([*ours, *command], warm=False)
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr


WORLDS = [(f"zero{stage}", ranks) for stage in (1, 2, 3) for ranks in (1, 2, 4)]
FEW_WORLDS = {("zero2", 2, "learns"), ("zero3", 2, "learns"), ("zero1", 4, "frozen"), ("zero2", 2, "empty")}
KINDS = {
    "frozen": [],
    "learns": ["model.freeze_cnn=false"],
    # Fewer clips than micro-batches: some ranks' are empty
    "empty": ["model.freeze_cnn=false", "train.micro_batches_per_step=16", "data.shards={work}/few"],
}
SMALL_BUCKETS = ["deepspeed.zero_optimization.reduce_bucket_size=4000",
                 "deepspeed.zero_optimization.allgather_bucket_size=4000"]  # several in a backward  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What 20 steps have made."""

    losses: list[float]
    norms: list[float]  # of the gradients
    params: dict[str, torch.Tensor]
    score: list[object]


@pytest.fixture(scope="module")
def alone(work: Path) -> Callable[[str], Outcome]:
    """Return what one rank computes under ZeRO-2, by kind."""
    few = make_corpus(work / "raw" / "few", clips=14, children=5, seconds=(0.6, 2.0), symbols="ɑeiostkm")
    run([sys.executable, "-m", "sharding", "build", few, "--out", work / "few"])
    assert len(read_index(open_store(work / "few")).split("train")) < 16
    return cache(lambda kind: outcome(work, f"alone-{kind}", 1, "zero2", *KINDS[kind]))


def outcome(work: Path, name: str, ranks: int, config: str, *settings: str) -> Outcome:
    settings = tuple(each.format(work=work) for each in settings)
    settings = (*EXACT, *AUGMENTED, *SMALL_BUCKETS, *([PART_ALL] if config == "zero3" else []), *settings)
    run(training(work, name, "train.max_steps=20", "eval.every_steps=10", *settings, ranks=ranks, config=config))
    rows, card = read_rows(work / name), json.loads((work / name / "scorecard.json").read_text())
    return Outcome(
        losses(work / name),
        [float(row["grad_norm"]) for row in rows],
        load_state(open_checkpoint(list_checkpoints(work / name / "checkpoints")[-1])).params,
        [card[name] for name in ("cer", "edits", "reference_length", "clips", "step")],
    )


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert len(set(found.losses)) == 20
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert found.params.keys() == expected.params.keys()
    for name, weight in found.params.items():
        if not name.endswith("k_proj.bias"):  # softmax cancels it: its gradient is rounding, which Adam makes large
            distance = torch.linalg.vector_norm(weight - expected.params[name])
            assert distance <= 1e-4 * torch.linalg.vector_norm(expected.params[name]), name
    assert found.score == expected.score


@pytest.mark.parametrize(
    ("config", "ranks", "kind"),
    [
        pytest.param(*world, kind, marks=() if (*world, kind) in FEW_WORLDS else pytest.mark.long)
        for kind in KINDS
        for world in WORLDS
    ],
)
def test_every_zero_stage_and_number_of_ranks_computes_the_same(
    config: str, ranks: int, kind: str, work: Path, alone: Callable[[str], Outcome]
) -> None:
    """Whether or not the front end learns, whether or not batches are padded or empty: losses, norms, weights, score.

    At some steps a batch is padded on one rank and not on another, in buckets that one backward fills several times.
    """
    name = f"{config}-{ranks}-{kind}"
    assert_equal(outcome(work, name, ranks, config, *KINDS[kind]), alone(kind))
    assert (work / name / "best" / "model.safetensors").stat().st_size > 50_000  # gathered


@pytest.mark.parametrize(("config", "ranks", "seconds"), [("zero2", 1, 16), ("zero3", 2, 9)])
def test_merged_micro_batches_compute_the_same(
    config: str, ranks: int, seconds: int, work: Path, alone: Callable[[str], Outcome]
) -> None:
    name, merged = f"merged-{config}-{ranks}", f"data.device_batch_seconds={seconds}"
    assert_equal(outcome(work, name, ranks, config, *KINDS["learns"], merged), alone("learns"))


# Every part of a recipe at once, and the ranks must still agree
RECIPE = ["train.schedule=cosine", "train.final_lr_ratio=0.1", "train.head_lr=3e-3", "train.layer_decay=0.8",
          "train.freeze_encoder_steps=3", "train.ema_decay=0.9", "model.gradient_checkpointing=true"]  # fmt: skip


def test_a_recipe_computes_the_same_at_any_number_of_ranks_and_under_any_stage(work: Path) -> None:
    found = []
    for config, ranks in (("zero2", 1), ("zero3", 2)):
        name, settings = f"recipe-{config}", (*EXACT, *RECIPE, "train.max_steps=8", "eval.every_steps=4")
        run(training(work, name, *settings, *([PART_ALL] if config == "zero3" else []), ranks=ranks, config=config))
        found.append((losses(work / name), json.loads((work / name / "scorecard.json").read_text())["edits"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


def test_what_the_probe_runs_leaves_no_trace_in_what_is_learnt(work: Path) -> None:
    """Not even where weight decay goes into the moments, of which the probe has some made."""
    adam = ["deepspeed.optimizer.type=Adam", "deepspeed.optimizer.params.weight_decay=0.1",
            "deepspeed.optimizer.params.adam_w_mode=false"]  # fmt: skip
    for probe in ("true", "false"):
        settings = (*EXACT, *adam, f"train.probe={probe}", "train.max_steps=4", "eval.every_steps=9")
        run(training(work, f"probed-{probe}", *settings, ranks=1))
    assert losses(work / "probed-true") == losses(work / "probed-false")


FAMILIES = {
    "wav2vec2-layer-norm": ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "hubert": ("Hubert", {}),
    "wavlm": ("WavLM", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_trained_scored_and_exported(name: str, work: Path) -> None:
    """Under ZeRO-3, whose hooks are the same for one rank, and in bf16: both are hard on some of them."""
    family, settings = FAMILIES[name]
    encoder = make_tiny_model(work / f"{name}-encoder", family=family, **settings)
    bf16 = ["deepspeed.torch_autocast.enabled=false", "deepspeed.bf16.enabled=true"]
    steps = ["train.max_steps=3", "eval.every_steps=3", f"model.pretrained={encoder}", "model.mask_time_prob=0.2"]
    run(training(work, name, PART_ALL, *bf16, *steps, ranks=1, config="zero3"))
    assert len(set(losses(work / name))) == 3
    run([sys.executable, "-m", "streamtrain", "export", work / name / "best", "--out", work / name / "export"])
    card = (work / name / "export" / "README.md").read_text("utf-8")
    head = yaml.safe_load(card.split("---")[1])
    scored = json.loads((work / name / "scorecard.json").read_text("utf-8"))
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(scored["cer"], abs=1e-6)
    index = read_index(open_store(work / "shards"))
    assert f"Trained on {len(index.split('train')):,} clips" in card
    assert "| `model.mask_time_prob` | `0.2` |" in card
    assert "![curves](curves.png)" in card
    assert all((work / name / "export" / each).is_file() for each in ("curves.png", "training.json", "scorecard.json"))


def test_training_ends_when_the_score_gets_no_better(work: Path) -> None:
    """A rate too small to change a symbol."""
    settings = ("deepspeed.optimizer.params.lr=1e-12", "train.patience=2", "eval.every_steps=1", "train.max_steps=9")
    done = run(training(work, "patient", *settings, ranks=1))
    assert "no better score in 2 evaluations: training ends here, at step 2" in done.stderr
    assert re.search(
        r"finished at step 2, by train\.patience=2; best CER \d\.\d+ at step 0: training did not improve the model",
        done.stderr,
    )
    assert len(losses(work / "patient")) == 2
    again = run(training(work, "patient", *settings, ranks=1)).stderr
    assert "no better score in 2 evaluations; raise train.patience to continue" in again
    assert len(losses(work / "patient")) == 2


def test_a_set_without_validation_clips_trains_and_says_that_nothing_is_scored(work: Path) -> None:
    shards, folder = work / "all-train", work / "unscored"
    build = ["build", str(work / "raw" / "tiny"), "--out", str(shards), "--valid-fraction", "0", "--workers", "1"]
    assert main(build) == 0
    command = training(work, "unscored", f"data.shards={shards}", "train.max_steps=2", "eval.every_steps=1", ranks=1)
    done = run(command)
    assert "no clips in split 'valid': nothing is scored" in done.stderr
    assert "finished at step 2, by train.max_steps=2; nothing was scored: best/ holds the last weights" in done.stderr
    [newest] = list_checkpoints(folder / "checkpoints")[-1:]
    last = load_state(open_checkpoint(newest)).params
    kept = load_model(ModelConfig(pretrained=str(folder / "best"))).network.state_dict()
    assert newest.name == "step-0000002"
    assert all(torch.equal(last[name], kept[name]) for name in last)
    assert "all 2 steps are done" in run(command).stderr
    assert "nothing was scored" in render_run(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluation = ["launch/evaluate.py", "--model", folder / "best", "--shards", shards, "--out", work / "no-score"]
    assert "nothing was scored" in run([sys.executable, *evaluation], expect=1).stderr


def test_the_word_track_is_trained_and_scored_in_letters_and_words(work: Path) -> None:
    corpus = make_corpus(work / "raw" / "words", clips=24, symbols="etaoinsh")
    rows = [row | {"orthographic_text": row["phonetic_text"].title() + "!"} for row in read_manifest(corpus)]
    write_manifest(corpus, rows)
    shards = work / "word-shards"
    run([sys.executable, "-m", "sharding", "build", corpus, "--out", shards, "--profile", "english"])
    settings = [f"data.shards={shards}", "train.max_steps=2", "eval.every_steps=1", "eval.select=wer"]
    done = run(training(work, "words", *settings))
    assert (
        len(re.findall(r"{'eval_loss': [\d.]+, 'eval_wer': [\d.]+, 'eval_cer': [\d.]+, 'eval_runtime'", done.stdout))
        == 3
    )
    best, card = work / "words" / "best", json.loads((work / "words" / "scorecard.json").read_text())
    assert set("".join(json.loads((best / "vocab.json").read_text()))) >= set("abcdefghijklmnopqrstuvwxyz'|")
    scored = [json.loads(line) for line in (work / "words" / "hypotheses.jsonl").read_text().splitlines()]
    assert card["reference_words"] == sum(len(spoken_words(row["reference"])) for row in scored)
    assert card["wer"] == card["word_edits"] / card["reference_words"] == read_result(work / "words").best_score
    assert f"WER {card['wer']:.4f}; before training" in render_run(work / "words")
    assert all(row["eval_wer"] == row["eval_score"] != "" for row in read_rows(work / "words"))
    assert all(row["reference"] == row["reference"].lower().strip("!") for row in scored)
    out, clip = work / "words.jsonl", next(iter((corpus / "audio").glob("*.flac")))
    run([sys.executable, "-m", "streamtrain", "transcribe", best, clip, "--out", out])
    assert "orthographic_text" in json.loads(out.read_text())
    command = ["launch/evaluate.py", "--model", best, "--shards", work / "shards", "--out", work / "unlike"]
    assert "the model writes profile english in characters" in run([sys.executable, *command], expect=1).stderr


def test_two_machines_that_start_their_own_ranks_train_together(work: Path) -> None:
    """Two launchers, each with one rank of its own, meet at an address: what a hostfile or Slurm makes of two nodes."""
    hosts, port = work / "hosts", free_port()
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    where = ["--hostfile", hosts, "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    script = training(work, "nodes", *EXACT, "train.max_steps=3", ranks=1)[1:]
    machines = [
        start(["deepspeed", *where, "--node_rank", node, *script], work / f"node-{node}.out") for node in (1, 0)
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0], (work / "node-0.out").read_text()[-3000:]
    run(training(work, "one-node", *EXACT, "train.max_steps=3"))
    assert losses(work / "nodes") == losses(work / "one-node")


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_gradients_that_are_not_finite_are_skipped_and_in_the_end_fatal(half: bool, work: Path) -> None:
    """A learning rate that breaks the model at its first step."""
    broken = ("deepspeed.optimizer.params.lr=1e30", "train.warmup_steps=0", "train.max_steps=40", "eval.every_steps=50")
    precision = ("deepspeed.torch_autocast.enabled=false", f"deepspeed.bf16.enabled={str(half).lower()}")
    shutil.rmtree(work / "broken", ignore_errors=True)
    done = run(training(work, "broken", *EXACT, *broken, *precision, ranks=1), expect=1)
    assert "its gradient is not finite, as in the 19 steps before it" in done.stderr
    assert "hint: lower the learning rate" in done.stderr
    assert "Traceback" not in done.stderr
    rows = read_rows(work / "broken")
    assert [row["skipped"] for row in rows] == ["0", *["1"] * (len(rows) - 1)]


@pytest.mark.parametrize(
    ("config", "forwards"), [pytest.param("zero2", 0, marks=pytest.mark.long), ("zero3", 0), ("zero1", 9)]
)
def test_ranks_whose_gradients_are_of_other_weights_are_stopped(config: str, forwards: int, work: Path) -> None:
    """From the start, which is seen before the first step; and from a later step on, which that step sees."""
    command = training(work, f"unlike-{config}", *EXACT, "train.max_steps=40", "train.probe=false", config=config)
    command = ["tests/tools/unlike_rank.py" if word == "launch/train.py" else word for word in command]
    done = run(command, expect=1, UNLIKE_AFTER=str(forwards))
    assert "get gradients on some ranks but not on others" in done.stderr
    assert "encoder.layers." in done.stderr
    assert (work / f"unlike-{config}" / "log.csv").is_file() == bool(forwards)


@pytest.mark.parametrize("forwards", [0, 40])
def test_gradients_that_arrive_in_another_order_are_never_used(forwards: int, work: Path) -> None:
    """As they did from batches without padding: seen before the first step, or in the step that would use them."""
    name = f"unordered-{forwards}"
    settings = (*EXACT, *AUGMENTED, "model.freeze_cnn=false", "train.max_steps=40", "train.checkpoint_every=1")
    command = training(work, name, *settings, "eval.every_steps=50", "train.probe=false", config="zero2")
    command = ["tests/tools/unlike_rank.py" if word == "launch/train.py" else word for word in command]
    done = run(command, expect=1, UNLIKE_AFTER=str(forwards), UNLIKE_ORDER="1")
    assert "TrainError: gradients arrive in a different order on rank" in done.stderr
    assert "conv_layers.0.layer_norm." in done.stderr
    assert "Traceback" not in done.stderr
    if forwards:
        assert max(steps_saved(work / name)) == len(losses(work / name)) < 40
    else:
        assert not (work / name / "log.csv").exists()


def test_clips_that_do_not_decode_though_their_checksums_hold_stop_the_run_when_they_are_many(work: Path) -> None:
    store = open_store(shutil.copytree(work / "shards", work / "undecodable"))
    index, made = read_index(store), []
    for shard in index.shards:
        samples = check_shard(store, read_checked(store, shard), PHONES)
        if shard.split == "train":
            samples = [replace(sample, audio=sample.audio[:100]) for sample in samples]
        lengths = index.samples["samples"][index.samples["shard"] == len(made)].tolist()
        made.append(write_shard(store, shard.name, shard.bucket, zip(samples, lengths, strict=True), PHONES))
    entries = tuple(shard.entry for shard in made)
    samples = join_samples([shard.samples for shard in made])
    write_index(store, pack_index(replace(index, shards=entries, samples=samples)))
    done = run(training(work, "deaf", f"data.shards={store.url}", "train.max_steps=9"), expect=1)
    assert "does not decode as planned: trained as silence, without its label" in done.stderr
    assert re.search(r"TrainError: \d+ clips of this epoch do not decode although their checksums match", done.stderr)
    assert done.stderr.count("TrainError") == 1


def test_a_model_of_other_strides_trains_and_names_what_its_frames_cannot_spell(tmp_path: Path) -> None:
    """At 25 frames a second a label of 20 equal symbols has a frame for each, but none for the blanks between."""
    tone = encode(np.sin(np.arange(16_000) / 9).astype(np.float32) / 2)
    write_set(tmp_path / "set", 30, lengths=[16_000] * 30, spoilt=dict.fromkeys(range(30), tone), texts={7: "k" * 20})
    model = [f"model.scratch={json.dumps(TINY | SLOW)}", "model.pretrained=null", f"data.shards={tmp_path / 'set'}"]
    done = run(training(tmp_path, "slow", *model, "train.epochs=1", "train.probe=false", ranks=1))
    assert re.findall(r"(\S+) has a label of more symbols and blanks than frames", done.stderr) == ["clip-0-007"]
    rows = read_rows(tmp_path / "slow")
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert [sum(int(row[name]) for row in rows) for name in ("silent", "skipped")] == [1, 0]


@pytest.mark.parametrize("at_once", [2, 3, 9])
@pytest.mark.parametrize("factors", [(), (0.9, 1.1)])
def test_a_model_that_makes_fewer_frames_than_symbols_is_refused_in_words(
    factors: tuple[float, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtrain.training.run.CHECKED_ROWS", at_once)
    index, slow = make_index([1.0] * 9), make_network("wav2vec2, group norm", conv_stride=[5, 2, 2, 2, 2, 2, 8])
    model = CTCModel(slow, vocab_of(policy_of("pasketti")), normalize=True)
    for symbols in range(1, 40):
        index.samples["label_length"] = 1
        index.samples["label_length"][4] = symbols
        frames = 12 if factors and symbols <= 23 else 13  # beyond, no epoch plays it faster
        if symbols <= frames:
            _check_frames(model, index, factors)
            continue
        said = f"1 of 9 .* 12.5 a second.: .* .row 4 of the index. has {symbols} symbols and {frames} frames\nhint: use"
        with pytest.raises(TrainError, match=said):
            _check_frames(model, index, factors)


def test_a_log_of_another_version_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,epoch,loss\n1,0,0.5\n")
    with pytest.raises(StreamtrainError, match=r"log\.csv: is not the log of a run"):
        read_log(tmp_path / "log.csv")


def test_a_log_that_was_cut_off_is_gone_on_with_and_a_damaged_one_is_told_in_words(tmp_path: Path) -> None:
    """A full disk may cut a symbol in two; the same command, given again, must not stop at that."""
    log = RunLog(tmp_path, total_steps=9, done_steps=0)
    counts = EditCounts(1, 1, 1, 4)
    clip = ClipScore("a", "", "", "", "", 1.0, True, "ðə ʃɪp", "ðə ʃiːp", 0.5, counts, counts)
    for step in (1, 2):
        log.step(StepRow(step, 0, 0.5, 1e-3, 1.0, 0.1, 9.0, 0.0, 0.0, 0, 0, None))
        log.ranks([RankRow(step, 0, 0.0, 1.0, 0.1, 0.1, 1.0, 0.0, 0, 0)])
    log.evaluated(2, Evaluation(TextEdits(counts, counts, counts, counts), (clip,), PHONES, {}), 0.5, 0.1)
    log.close()
    for name in ("samples.txt", "ranks.csv", "log.csv"):
        whole = (tmp_path / name).read_bytes()
        for end in range(len(whole) - 50, len(whole) + 1):
            (tmp_path / name).write_bytes(whole[:end])
            RunLog(tmp_path, total_steps=9, done_steps=2).close()
            assert (tmp_path / name).read_bytes() == whole[: whole.rfind(b"\n", 0, end) + 1]
        for damage in (b"\xff", b"9" * 200_000):
            (tmp_path / name).write_bytes(whole.replace(b"2,", damage + b","))
            with pytest.raises(StreamtrainError, match=rf"{name}: is not the log of a run"):
                RunLog(tmp_path, total_steps=9, done_steps=2)
        (tmp_path / name).write_bytes(whole)


def test_machines_with_other_configurations_are_stopped(work: Path) -> None:
    hosts, port = work / "unlike-hosts", free_port()
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    where = ["--hostfile", hosts, "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    logs = [work / f"unlike-node-{node}.out" for node in (0, 1)]
    machines = []
    for node, log in enumerate(logs):
        script = training(work, "unlike-nodes", f"train.seed={node}", ranks=1)[1:]
        machines.append(start(["deepspeed", *where, "--node_rank", node, *script], log))
    assert all(machine.wait(120) for machine in machines)
    assert "ranks [1] have another configuration" in logs[0].read_text()


def test_a_rank_whose_data_hang_stops_within_seconds_of_a_sigterm(work: Path) -> None:
    shards, log = shutil.copytree(work / "shards", work / "mute"), work / "mute.out"
    with opened_by_nobody(*(shards / "train").glob("*.tar")):
        process = start(training(work, "mute-run", f"data.shards={shards}", "train.probe=false", ranks=1), log)
        wait_until((work / "mute-run" / "before.json").is_file, process, log)
        time.sleep(1)
        process.terminate()
        assert process.wait(GRACE_SEC + 10) == PREEMPTED
    assert "stopped: rank 0's batch of step 1 of this epoch has not arrived within" in log.read_text()
    assert "rerun the same command to resume from the latest checkpoint" in log.read_text()


@pytest.mark.long
def test_a_rank_that_nobody_joins_says_where_it_waited(work: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    port = str(free_port())
    done = run(training(work, "alone-of-two", ranks=1), expect=1, **alone, MASTER_PORT=port, DEEPSPEED_TIMEOUT="1")
    assert f"the ranks cannot connect at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_others_within_the_time_out(work: Path) -> None:
    folder, log = work / "hanging", work / "hanging.out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSPEED_TIMEOUT", "1")  # minutes
        process = start(training(work, "hanging", "train.max_steps=500"), log)
    wait_until(lambda: (folder / "log.csv").is_file() and len(read_rows(folder)) > 3, process, log)
    everyone = processes(process)
    everyone["rank 1"].suspend()
    wait_for_all(everyone, 150)
    assert "a peer rank exited or hangs" in log.read_text()


def test_the_largest_batch_is_found(work: Path) -> None:
    command = training(work, "sized", ranks=2)
    command.insert(command.index("--config"), "--find-batch-seconds")
    found = re.search(r"data\.batch_seconds=(\d+) fits", run(command).stdout)
    assert found
    assert int(found[1]) > 100
    assert not (work / "sized").exists()


def test_shards_in_a_bucket_train_the_same_model(work: Path, seaweed: Seaweed) -> None:
    url, there = f"s3://{BUCKET}/training/shards", seaweed.environment
    run([sys.executable, "-m", "sharding", "build", work / "raw" / "tiny", "--out", url], **there)
    run([sys.executable, "-m", "sharding", "verify", url], **there)
    run(training(work, "from-disk", *EXACT, "train.max_steps=3", ranks=1))
    cache = f"data.cache_dir={work / 'cache'}"
    run(training(work, "from-bucket", *EXACT, "train.max_steps=3", f"data.shards={url}", cache), **there)
    assert losses(work / "from-bucket") == pytest.approx(losses(work / "from-disk"), rel=1e-5)
    assert list((work / "cache").rglob("*.tar"))
    assert not any(SECRET_KEY in path.read_text() for path in (work / "from-bucket").glob("*.json"))


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_the_score_counts_every_validation_recording_once_at_any_world_size(ranks: int, work: Path) -> None:
    store = open_store(work / "shards")
    index = read_index(store)
    wanted = {read_sample(store, index, row).recording_id for row in index.split("valid").tolist()}
    if not (work / "scored").exists():
        run(training(work, "scored", "train.max_steps=1", ranks=1))
    found = []
    for size, *beam in ((1,), (ranks,), (1, "--beam", 4), (ranks, "--beam", 4)):
        out = work / f"scored-by-{size}{''.join(map(str, beam))}"
        launcher = ["deepspeed", "--num_accelerators", size, "--master_port", free_port()] if size > 1 else ["python"]
        run([*launcher, "launch/evaluate.py", "--model", work / "scored" / "best", "--shards", work / "shards",
             "--out", out, *beam])  # fmt: skip
        rows = [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()]
        found.append([row | {"confidence": None} for row in rows])  # its last digits go with the number of threads
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]  # a beam hears otherwise than the best path does
    for rows in found[::2]:
        ids = [row["utterance_id"] for row in rows]
        assert len(ids) == len(set(ids))
        assert set(ids) == wanted


@pytest.mark.parametrize("ranks", [4, pytest.param(2, marks=pytest.mark.long)])
def test_ranks_that_get_no_clip_change_nothing(ranks: int, work: Path) -> None:
    """One validation clip, and more ranks than that."""
    out = work / f"lonely-{ranks}"
    make_corpus(out / "raw", clips=3, children=3)
    run([sys.executable, "-m", "sharding", "build", out / "raw", "--out", out / "shards", "--valid-fraction", 0.01])
    assert len(read_index(open_store(out / "shards")).split("valid")) == 1
    encoder = load_model(ModelConfig(pretrained=str(work / "model")))
    save_model(encoder, out / "model")
    scored = []
    for launcher in (["python"], ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port()]):
        run([*launcher, "launch/evaluate.py", "--model", out / "model", "--shards", out / "shards", "--out", out])
        (row,) = (json.loads(line) for line in (out / "hypotheses.jsonl").read_text("utf-8").splitlines())
        scored.append(
            (row["hypothesis"], row["counts"], json.loads((out / "scorecard.json").read_text("utf-8"))["cer"])
        )
    assert scored[0] == scored[1]


def test_a_second_run_in_the_same_folder_is_refused(work: Path) -> None:
    (work / "held").mkdir()
    with open(work / "held" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(training(work, "held", "train.max_steps=1", ranks=1), expect=1)
    assert "another run is writing here" in done.stderr


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        (["data.batch_second=4"], 1, "did you mean 'data.batch_seconds'?"),
        (["data.shards=nowhere"], 2, "there is no shard set here"),
        (["data.batch_seconds=0.5"], 1, "raise data.batch_seconds"),
        (["model.pretrained=facebook/wav2vec2-base"], 1, "model 'facebook/wav2vec2-base' cannot be loaded"),
        (["deepspeed.gradient_accumulation_steps=2"], 1, "train.micro_batches_per_step"),
        (["deepspeed.gradient_cliping=1"], 1, "did you mean 'deepspeed.gradient_clipping'?"),
        (["deepspeed.zero_optimization.stage=7"], 1, "1, 2 and 3 are supported"),
        (["train.max_steps"], 1, "before --set"),
        ([], 3, "run 1, 2 or 4 ranks"),
    ],
)
def test_a_mistake_is_told_in_words(work: Path, settings: list[str], ranks: int, message: str) -> None:
    done = run(training(work, "mistaken", *settings, ranks=ranks), expect=1, warm=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(re.escape(message), done.stderr)) == 1  # told once, not by every rank
    assert not (work / "mistaken").exists()


def test_the_labels_of_a_step_are_what_the_plan_says(work: Path) -> None:
    """The forecast's keys are those of the shards, each once per epoch."""
    keys = work / "keys.jsonl"
    run([sys.executable, "-m", "streamtrain", "plan", work / "shards", "--set", "data.batch_seconds=4", "--keys", keys])
    planned = [key for line in keys.read_text().splitlines() for key in json.loads(line)["keys"]]
    store = open_store(work / "shards")
    index = read_index(store)
    assert sorted(planned) == sorted(read_keys(store, index)[index.split("train")])
