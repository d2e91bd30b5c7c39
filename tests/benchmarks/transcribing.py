"""`make bench`: transcription beside Transformers' pipeline with the same model and clips; what scoring costs."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch

from sharding.labels.pasketti import SYMBOLS, normalize_ipa
from streamtrain.config import ModelConfig
from streamtrain.eval.metrics import count_edits
from streamtrain.model.pretrained import load_model, save_model
from tests.benchmarks.report import Line, Quoted, machine, say
from tests.benchmarks.timing import ROOT, WORK
from tests.benchmarks.training import make_clips, said

RESULT = WORK / "transcribing.json"
BATCH_SIZES = (1, 16)  # of the pipeline
DEMO_GOAL, BASE_GOAL = (3.0, 3.0) if torch.cuda.is_available() else (1.4, 1.0)
SCORE_GOAL, START_GOAL = 20.0, 1.0


def make_model(name: str, scratch: dict[str, object]) -> Path:
    """A model of that shape with random weights, as a run leaves it."""
    folder = WORK / f"model-{name}"
    if not folder.is_dir():
        model = load_model(ModelConfig(scratch=scratch))
        save_model(model, folder)
    return folder


def seconds_of(model: Path, corpus: Path, way: str) -> float:
    lines = said(["-m", "tests.benchmarks.pipeline", model, corpus, way]).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("seconds "))


def hours_of(corpus: Path) -> float:
    return sum(soundfile.info(path).duration for path in corpus.rglob("*.flac")) / 3600


def scoring(clips: int = 20_000) -> float:
    """Microseconds to normalise and compare a clip's two texts of 9 symbols, a fifth of them wrong."""
    random = np.random.default_rng(0)
    symbols = np.array(list(SYMBOLS + "   "))
    references = ["".join(random.choice(symbols, 9)) for _ in range(clips)]
    wrong = random.random((clips, 9)) < 0.2
    heard = [
        "".join(np.where(bad, random.choice(symbols, 9), list(text)))
        for text, bad in zip(references, wrong, strict=True)
    ]
    started = time.perf_counter()
    for reference, hypothesis in zip(references, heard, strict=True):
        count_edits(normalize_ipa(reference), normalize_ipa(hypothesis))
    return 1e6 * (time.perf_counter() - started) / clips


def starting() -> float:
    """Seconds of the whole `score` command over one row."""
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(json.dumps({"utterance_id": "a", "phonetic_text": "kæt"}) + "\n", "utf-8")
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "streamtrain", "score", rows, rows], cwd=ROOT, check=True, capture_output=True
        )
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small counts, to see that it runs")
    quick = parser.parse_args().quick
    facts, repetitions = machine(), 1 if quick else 3
    WORK.mkdir(parents=True, exist_ok=True)
    demo = json.loads((ROOT / "configs/demo.json").read_text())["model"]["scratch"]
    base: dict[str, object] = {"num_hidden_layers": 12}  # the rest of Wav2Vec2Config is wav2vec2-base already
    few, many = (20, 160) if quick else (1_000, 1_000) if torch.cuda.is_available() else (100, 800)
    cases = {
        "the demo's model": (make_model("demo", demo), make_clips(WORK / f"clips-{many}", many), DEMO_GOAL),
        "a base-sized one": (make_model("base", base), make_clips(WORK / f"clips-{few}", few), BASE_GOAL),
    }
    lines, runs = [], {}
    for name, (model, corpus, goal) in cases.items():
        hours = hours_of(corpus)
        ways: dict[str, list[float]] = {way: [] for way in ("ours", *map(str, BATCH_SIZES))}
        for _ in range(repetitions if name.startswith("the demo") else 1 + (not quick)):
            for way, taken in ways.items():
                taken.append(seconds_of(model, corpus, way) / hours)
                print(f"  {name}, {way}: {taken[-1]:.1f} s for an hour of speech", file=sys.stderr)
        runs[name] = ways
        quoted = {way: Quoted(statistics.median(taken), min(taken)) for way, taken in ways.items()}
        lines += [
            Line(f"s to transcribe an hour of speech, {name}: beside the pipeline, batches of {size}",
                 quoted["ours"], quoted[str(size)], goal, at_least=True)
            for size in BATCH_SIZES
        ]  # fmt: skip
    measures: dict[str, tuple[Callable[[], float], float, str]] = {
        "scoring of a short clip": (scoring, SCORE_GOAL, "µs"),
        "`score` from its start to its end": (starting, START_GOAL, "s"),
    }
    for what, (measure, goal, unit) in measures.items():
        taken = [measure() for _ in range(3)]
        lines.append(Line(what, Quoted(statistics.median(taken), min(taken)), goal=goal, unit=unit))
    notes = ["random weights; both from the model's folder to the last text, audio decoded on the way, imports aside"]
    say(facts, lines, notes, RESULT, runs=runs)


if __name__ == "__main__":
    main()
