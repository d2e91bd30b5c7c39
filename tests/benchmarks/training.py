"""`make bench`: seconds of speech trained on in a second, beside the reference recipe with the same model and clips."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from transformers import Wav2Vec2Config

from sharding.audio.codec import SAMPLE_RATE
from sharding.labels.pasketti import SYMBOLS
from sharding.labels.policy import policy_of
from streamtrain.model.pretrained import ACTIVE_DROPOUTS
from streamtrain.model.vocab import vocab_of
from streamtrain.training.run_log import RunLog, read_log
from streamtrain.training.step_row import StepRow
from tests.benchmarks.report import Line, Quoted, machine, say
from tests.benchmarks.timing import ROOT, WORK

RESULT = WORK / "training.json"
MANIFEST = "train_phon_transcripts.jsonl"
ON_GPU = torch.cuda.is_available()
BASE: dict[str, Any] = {"num_hidden_layers": 12}  # the rest of Wav2Vec2Config is wav2vec2-base already
# Four layers and 1.9 M parameters, in the shape of wav2vec2-base: what two cores train in minutes
SMALL: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": [96] * 7,
    "num_conv_pos_embeddings": 64,
    "num_conv_pos_embedding_groups": 8,
}
MODEL = BASE if ON_GPU else SMALL
PRECISION = {"bf16": {"enabled": True}} if ON_GPU else {}
WORKERS, CLIPS = (10, 12_000) if ON_GPU else (2, 800)
DROPOUT = 0.1  # each of the model's
SAME = dict.fromkeys(ACTIVE_DROPOUTS, DROPOUT) | {
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "sum",
}
BATCH_SEC = 1_600.0 if ON_GPU else 160.0
REFERENCE_JOB_SEC = 85 * 3600 * 20  # of speech: 85 h, 20 epochs; the reference recipe took 5 h 31 min
JOB_GOAL_MIN = 15.0
RANDOM_GOAL, GROUPED_GOAL, WATCH_GOAL = 6.0, 1.0, 0.01


class Step(NamedTuple):
    seconds: float
    speech: float  # seconds


def make_clips(folder: Path, count: int) -> Path:
    """Noise in the challenge's durations: log-normal, median 1.15 s, σ 1.03, from 0.3 to 25 s; 8 symbols a second."""
    if folder.is_dir():
        return folder
    random = np.random.default_rng(0)
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "audio").mkdir(parents=True)
    rows = []
    for number, seconds in enumerate(np.clip(np.exp(random.normal(np.log(1.15), 1.03, count)), 0.3, 25).tolist()):
        sound = random.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)
        soundfile.write(partial / f"audio/{number:05d}.flac", sound, SAMPLE_RATE, subtype="PCM_16")
        label = "".join(random.choice(list(SYMBOLS), max(1, round(8 * seconds))))
        rows.append({"utterance_id": f"{number:05d}", "child_id": f"child-{number % 20}", "phonetic_text": label,
                     "audio_path": f"audio/{number:05d}.flac"})  # fmt: skip
    (partial / MANIFEST).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, folder)
    return folder


def run_ours(shards: Path) -> list[Step]:
    """Two epochs through the command that users run; the second is counted."""
    with TemporaryDirectory(dir=WORK) as home:
        config = {
            "data": {"shards": str(shards), "batch_seconds": BATCH_SEC, "workers": WORKERS},
            "model": {"scratch": MODEL, "freeze_cnn": True, "dropout": DROPOUT},
            "train": {"run_dir": f"{home}/run", "epochs": 2, "micro_batches_per_step": 1, "warmup_steps": 0},
            "eval": {"every_steps": 10_000},
            "deepspeed": {
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "gradient_clipping": 1.0,
                **PRECISION,
            },
        }
        (Path(home) / "config.json").write_text(json.dumps(config))
        said(["launch/train.py", "--config", f"{home}/config.json"])
        return [
            Step(row.seconds, row.audio_sec_per_sec * row.seconds)
            for row in read_log(Path(home) / "run/log.csv")
            if row.epoch == 1
        ]


def run_reference(corpus: Path, sampling: str, epochs: int) -> list[Step]:
    """So many epochs of the Trainer; the last is counted."""
    with TemporaryDirectory(dir=WORK) as home:
        vocab = vocab_of(policy_of("pasketti"))
        model = MODEL | SAME | {"vocab_size": len(vocab), "pad_token_id": vocab.blank}
        (Path(home) / "model.json").write_text(json.dumps(model))
        lines = said(["-m", "tests.benchmarks.trainer", corpus, f"{home}/model.json", sampling, epochs]).splitlines()
    steps = [Step(**json.loads(line)) for line in lines if line.startswith('{"seconds"')]
    return steps[-len(steps) // epochs :]


def said(command: list[object]) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def speed(steps: list[Step]) -> float:
    """Seconds of speech a second."""
    return sum(step.speech for step in steps) / sum(step.seconds for step in steps)


def flops(settings: dict[str, Any]) -> float:
    """Of a second of speech: convolutions forward, the rest forward and backward, attention's own products aside."""
    config = Wav2Vec2Config(**settings)
    rate, channels, convolutions = float(SAMPLE_RATE), 1, 0.0
    for kernel, stride, made in zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True):
        rate /= stride
        convolutions += rate * kernel * channels * made
        channels = made
    width = config.hidden_size
    layers = config.num_hidden_layers * (4 * width**2 + 2 * width * config.intermediate_size)
    positions = width**2 // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    return 2 * (convolutions + 3 * rate * (layers + positions + channels * width))


def watching(steps: int = 2_000) -> float:
    """Seconds that the log, TensorBoard and the bar take of a step."""
    row = StepRow(*[1] * len(StepRow.__dataclass_fields__))
    with TemporaryDirectory() as home:
        monitor = RunLog(Path(home), steps, 0)
        started = time.perf_counter()
        for _ in range(steps):
            monitor.step(row)
        taken = time.perf_counter() - started
        monitor.close()
    return taken / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small counts, to see that it runs")
    quick = parser.parse_args().quick
    facts, count, repetitions = machine(), 100 if quick else CLIPS, 1 if quick else 2
    WORK.mkdir(parents=True, exist_ok=True)
    corpus = make_clips(WORK / f"clips-{count}", count)
    shards = corpus.with_name(f"{corpus.name}-shards")
    said(["-m", "sharding", "build", corpus, "--out", shards, "--valid-fraction", "0.01"])
    runs: dict[str, Callable[[], list[Step]]] = {
        "ours": lambda: run_ours(shards),
        "group_by_length": lambda: run_reference(corpus, "group_by_length", 2),
        "random": lambda: run_reference(corpus, "random", 1),  # its steps are so long that a warm-up does not show
    }
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    step_sec = 0.0
    for _ in range(repetitions):
        for name, once in runs.items():
            steps = once()
            speeds[name].append(speed(steps))
            step_sec = statistics.median(step.seconds for step in steps) if name == "ours" else step_sec
            print(f"  {name}: {speeds[name][-1]:.1f} audio-seconds a second", file=sys.stderr)
    # Lines compare times: seconds for an hour of speech
    quoted = {name: Quoted(3600 / statistics.median(of), 3600 / max(of)) for name, of in speeds.items()}
    share = watching() / step_sec
    lines = [
        Line("s to train on an hour of speech: beside Trainer, random batches of 27", quoted["ours"], quoted["random"],
             RANDOM_GOAL, at_least=True),
        Line("s to train on an hour of speech: beside Trainer, grouped by length", quoted["ours"],
             quoted["group_by_length"], GROUPED_GOAL, at_least=True),
        Line("log, TensorBoard and bar: share of a step", Quoted(100 * share, 100 * share), goal=100 * WATCH_GOAL,
             unit="%"),
    ]  # fmt: skip
    if ON_GPU:
        minutes = [REFERENCE_JOB_SEC / of / 60 for of in speeds["ours"]]
        lines.append(Line("the reference job, 85 h × 20 epochs", Quoted(statistics.median(minutes), min(minutes)),
                          goal=JOB_GOAL_MIN, unit="min"))  # fmt: skip
    notes = [
        f"same model ({MODEL['num_hidden_layers']} layers), frozen convolutions, {'bf16' if ON_GPU else 'fp32'}, "
        f"threads and clips; ours: batches of {BATCH_SEC:g} s, decoded on the way; Trainer: decoded beforehand",
        f"a step of ours takes {step_sec:.2f} s, and its log {1000 * share * step_sec:.2f} ms",
        f"{flops(MODEL) * max(speeds['ours']) / 1e12:.3g} TFLOP/s: of the model alone, its convolutions forward only",
    ]
    say(facts, lines, notes, RESULT, speeds=speeds)


if __name__ == "__main__":
    main()
