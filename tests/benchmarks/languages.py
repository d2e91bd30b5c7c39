"""Train the demo's model on other labels than the demo's: German words, and narrow IPA in segments.

`python -m tests.benchmarks.languages` speaks both corpora, builds, trains and evaluates each as a user would, and
prints the scores. Ten minutes on two cores.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sharding.sources.synthetic import SAMPLE_RATE, Espeak, Speaker, open_espeak, plan_children, room_sound
from tests.benchmarks.timing import WORK

WORDS = """
    Äpfel Buch Bär Champagner Deutsch Eule Engel Fisch Garage Haus Hühner Junge Kampagne Katze Kognak König Löwe Milch
    Mädchen Nüsse Orange Öl Pferd Rhythmus Straße Tante Tisch Tür Uhr Vogel Wasser Zeit Zug Zähne grün groß klein neun
    rot schön singen spielen trinken über zwölf
"""
NARROW = [  # espeak's spelling → narrow IPA: diphthongs, affricates, a palatal nasal, aspiration before stress
    ("nj", "ɲ"), ("ɡnə", "ɲə"), ("ts", "t͡s"), ("pf", "p͡f"), ("tʃ", "t͡ʃ"), ("aɪ", "aɪ̯"), ("aʊ", "aʊ̯"), ("ɔø", "ɔʏ̯"),
]  # fmt: skip
ASPIRATED = re.compile(r"(?<![^ ])([ptk])(?=ˈ)")
MAX_RATE = 0.15
Spelling = Callable[[Espeak, str], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=1600)
    options = parser.parse_args()
    worst = 0.0
    for name, spell, column, settings in (
        ("german", lambda espeak, words: f"{words.capitalize()}!", "text", ["--profile", "text"]),
        ("narrow", narrow_ipa, "phonetic_text", ["--profile", "ipa", "--units", "segments"]),
    ):
        folder = WORK / "languages" / name
        shutil.rmtree(folder, ignore_errors=True)
        make_corpus(folder / "raw", options.minutes, spell, column)
        card = run(folder, settings, options.steps)
        metric = card["metric"]
        worst = max(worst, float(card[metric]))
        print(f"{name}: {metric.upper()} {card[metric]:.4f}, CER {card['cer']:.4f}, WER {card['wer']:.4f} "
              f"on {card['clips']} clips, profile {card['profile']}, {card['units']}")  # fmt: skip
    if worst > MAX_RATE:
        raise SystemExit(f"an error rate of {worst:.4f}, at most {MAX_RATE} is expected")


def narrow_ipa(espeak: Espeak, words: str) -> str:
    ipa = espeak.pronounce(words)
    for plain, narrow in NARROW:
        ipa = ipa.replace(plain, narrow)
    return ASPIRATED.sub(r"\1ʰ", ipa)


def make_corpus(folder: Path, minutes: float, spell: Spelling, column: str, children: int = 24, seed: int = 0) -> None:
    """Write FOLDER/transcripts.csv and the clips that it lists."""
    (folder / "audio").mkdir(parents=True)
    with open_espeak() as espeak, open(folder / "transcripts.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio_path", column, "child_id"])
        for child in plan_children(children, seed):
            for number, (sound, label) in enumerate(_clips(espeak, child, 60 * minutes / children, spell)):
                path = f"audio/{child.child_id}-{number:04d}.flac"
                soundfile.write(folder / path, sound, SAMPLE_RATE, subtype="PCM_16")
                table.writerow([path, label, child.child_id])


def _clips(espeak: Espeak, child: Speaker, seconds: float, spell: Spelling) -> Iterator[tuple[np.ndarray, str]]:
    rng, spoken = np.random.default_rng([1, child.number]), 0.0
    espeak.become(child)
    espeak.library.espeak_SetVoiceByName(child.voice.replace("en-us", "de").encode())
    while spoken < seconds:
        words = " ".join(rng.choice(WORDS.split(), int(rng.integers(1, 5)), replace=False))
        label = spell(espeak, words)
        sound = room_sound(espeak.speak(words), child, rng)
        spoken += len(sound) / SAMPLE_RATE
        yield sound, label


def run(folder: Path, settings: list[str], steps: int) -> dict[str, Any]:
    """Build, train and evaluate; return the scorecard."""
    shards, run_dir = folder / "shards", folder / "run"
    changes = [f"data.shards={shards}", f"train.run_dir={run_dir}", f"train.max_steps={steps}"]
    for command in (
        ["build", folder / "raw", "--out", shards, "--max-duration", 6, *settings],
        ["train", "--config", "demo", "--ranks", 2, "--set", *changes],
        ["evaluate", "--ranks", 2, "--model", run_dir / "best", "--shards", shards, "--out", run_dir],
    ):
        subprocess.run([sys.executable, "-m", "streamtrain", *map(str, command)], check=True)
    card: dict[str, Any] = json.loads((run_dir / "scorecard.json").read_text("utf-8"))
    return card


if __name__ == "__main__":
    main()
