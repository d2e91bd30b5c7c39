"""`make bench`: seconds of speech trained on in a second, beside the reference recipe with the same model and clips."""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile

from sharding.audio import SAMPLE_RATE
from sharding.ipa import SYMBOLS
from streamtrain.monitor import Monitor, StepRow
from streamtrain.vocab import vocab_of
from tests.bench_report import Line, Quoted, machine, say
from tests.bench_timing import ROOT, WORK

RESULT = WORK / "training.json"
MANIFEST = "train_phon_transcripts.jsonl"
# Four layers and 1.9 M parameters, in the shape of wav2vec2-base: what two cores train in minutes
MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": [96] * 7,
    "num_conv_pos_embeddings": 64,
    "num_conv_pos_embedding_groups": 8,
}
SAME = {"layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0, "ctc_loss_reduction": "sum"}
BATCH_SEC = 160.0
RANDOM_GOAL, GROUPED_GOAL, WATCH_GOAL = 6.0, 1.0, 0.01
WARM = 3  # steps that are not counted: libraries choose their kernels


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


def run_ours(shards: Path, steps: int) -> list[tuple[float, float]]:
    """Seconds and seconds of speech of each step, through the command that users run."""
    with TemporaryDirectory(dir=WORK) as home:
        config = {
            "data": {"shards": str(shards), "batch_seconds": BATCH_SEC},
            "model": {"scratch": MODEL, "freeze_cnn": True, "dropout": 0.1},
            "train": {"run_dir": f"{home}/run", "max_steps": steps, "micro_batches_per_step": 1, "warmup_steps": 0,
                      "checkpoint_every": 10_000},
            "eval": {"every_steps": 10_000},
            "deepspeed": {
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "gradient_clipping": 1.0,
            },
        }  # fmt: skip
        (Path(home) / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "launch/train.py", "--config", f"{home}/config.json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        with open(f"{home}/run/log.csv", newline="") as file:
            rows = [(float(row["audio_sec_per_sec"]), row) for row in csv.DictReader(file)]
        return [(float(row["seconds"]), speed * float(row["seconds"])) for speed, row in rows]


def run_reference(corpus: Path, sampling: str, steps: int) -> list[tuple[float, float]]:
    with TemporaryDirectory(dir=WORK) as home:
        vocab = vocab_of("phonetic")
        model = MODEL | SAME | {"vocab_size": len(vocab), "pad_token_id": vocab.blank, "final_dropout": 0.1}
        (Path(home) / "model.json").write_text(json.dumps(model))
        command = [sys.executable, "-m", "tests.bench_trainer", corpus, f"{home}/model.json", sampling, steps]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [(row["seconds"], row["speech"]) for row in rows]


def speed(steps: list[tuple[float, float]]) -> float:
    """Seconds of speech a second, over all steps but the first."""
    seconds, speech = (sum(column) for column in zip(*steps[WARM:], strict=True))
    return speech / seconds


def watching(steps: int = 2_000) -> float:
    """Seconds that the log, TensorBoard and the bar take of a step."""
    row = StepRow(*[1] * len(StepRow.__dataclass_fields__))
    with TemporaryDirectory() as home:
        monitor = Monitor(Path(home), steps, 0)
        started = time.perf_counter()
        for _ in range(steps):
            monitor.step(row)
        return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small counts, to see that it runs")
    quick = parser.parse_args().quick
    facts, steps, repetitions = machine(), 6 if quick else 24, 1 if quick else 2
    WORK.mkdir(parents=True, exist_ok=True)
    corpus = make_clips(WORK / f"clips-{200 if quick else 4000}", 200 if quick else 4000)
    shards = corpus.with_name(f"{corpus.name}-shards")
    build = [sys.executable, "-m", "sharding", "build", corpus, "--out", shards]
    subprocess.run(list(map(str, build)), cwd=ROOT, check=True, capture_output=True)
    speeds: dict[str, list[float]] = {"ours": [], "random": [], "group_by_length": []}
    ours: list[tuple[float, float]] = []
    for _ in range(repetitions):
        for name in speeds:
            ran = run_ours(shards, 3 * steps) if name == "ours" else run_reference(corpus, name, steps)
            ours = ran if name == "ours" else ours
            speeds[name].append(speed(ran))
            print(f"  {name}: {speeds[name][-1]:.1f} audio-seconds a second", file=sys.stderr)
    # Lines compare times: seconds for an hour of speech
    quoted = {name: Quoted(3600 / statistics.median(of), 3600 / max(of)) for name, of in speeds.items()}
    step_sec = statistics.median(seconds for seconds, _ in ours[WARM:])
    share = watching() / step_sec
    lines = [
        Line("s to train on an hour of speech: beside Trainer, random batches of 27", quoted["ours"], quoted["random"],
             RANDOM_GOAL, at_least=True),
        Line("s to train on an hour of speech: beside Trainer, grouped by length", quoted["ours"],
             quoted["group_by_length"], GROUPED_GOAL, at_least=True),
        Line("log, TensorBoard and bar: share of a step", Quoted(100 * share, 100 * share), goal=100 * WATCH_GOAL,
             unit="%"),
    ]  # fmt: skip
    notes = [
        f"same model ({MODEL['num_hidden_layers']} layers, width {MODEL['hidden_size']}), frozen convolutions, fp32, "
        f"threads and clips; ours: batches of {BATCH_SEC:g} s, decoded on the way; Trainer: decoded beforehand",
        f"a step of ours takes {step_sec:.2f} s, and its log {1000 * share * step_sec:.2f} ms",
    ]
    say(facts, lines, notes, RESULT, speeds=speeds)


if __name__ == "__main__":
    main()
