"""A tiny corpus in the challenge's layout. Its sound is made up, but real: every symbol is a chord of its own."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from sharding.labels.pasketti import SYMBOLS
from sharding.labels.policy import policy_of

PHONES, WORDS = policy_of("pasketti"), policy_of("english")
SAMPLE_RATE = 16_000
SYMBOL_SEC = 0.1
MANIFEST = "train_phon_transcripts.jsonl"

Row = dict[str, Any]
Sound = npt.NDArray[np.float32]


def make_corpus(
    folder: Path,
    *,
    clips: int = 12,
    children: int = 4,
    seconds: tuple[float, float] = (0.5, 2.0),
    long_clips: int = 0,
    symbols: str = SYMBOLS,
    seed: int = 0,
) -> Path:
    """Write FOLDER/audio/*.flac and its transcripts: `clips` short ones, then `long_clips` of 26 to 30 s.

    The children take turns. Ids begin with the folder's name, so that corpora can be built together. Fewer `symbols`
    are easier to learn.
    """
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True)
    rows = []
    for number in range(clips + long_clips):
        phrases = [make_text(rng.uniform(*seconds), symbols, rng)]
        while number >= clips and sum(map(phrase_seconds, phrases)) < 26:
            phrases.append(make_text(rng.uniform(1.5, 3.0), symbols, rng))
        child = number % children
        audio_path = f"audio/{folder.name}-{number:04d}.flac"
        soundfile.write(folder / audio_path, recite(phrases, child, rng), SAMPLE_RATE, subtype="PCM_16")
        child_id, session_id = f"{folder.name}-child-{child}", f"{folder.name}-session-{child}-{number % 2}"
        rows.append(describe(folder, audio_path, " ".join(phrases), child_id=child_id, session_id=session_id))
    return write_manifest(folder, rows)


def describe(folder: Path, audio_path: str, text: str, /, **fields: object) -> Row:
    """A row with the nine fields of the challenge, true of the file as it is now; `fields` replace them."""
    data = (folder / audio_path).read_bytes()
    try:
        duration = soundfile.info(io.BytesIO(data)).duration
    except soundfile.LibsndfileError:
        duration = 0.0
    return {
        "utterance_id": Path(audio_path).stem,
        "child_id": "child-0",
        "session_id": "session-0",
        "audio_path": audio_path,
        "audio_duration_sec": round(min(duration, 1e6), 3),
        "age_bucket": "5-7",
        "md5_hash": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        "filesize_bytes": len(data),
        "phonetic_text": text,
    } | fields


def write_manifest(folder: Path, rows: Iterable[Row]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / MANIFEST).write_text(lines, "utf-8")
    return folder


def read_manifest(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8").splitlines()]


def make_text(seconds: float, symbols: str, rng: np.random.Generator) -> str:
    """Words of two to five symbols that take about so long to say."""
    words: list[str] = []
    while not words or phrase_seconds(" ".join(words)) < seconds - 3 * SYMBOL_SEC:
        words.append("".join(rng.choice(list(symbols), rng.integers(2, 6))))
    return " ".join(words)


def phrase_seconds(text: str) -> float:
    return len(text) * SYMBOL_SEC


def recite(phrases: Sequence[str], child: int, rng: np.random.Generator) -> Sound:
    """The phrases with pauses of 0.4 to 0.9 s between them, in a room that hums softly throughout."""
    parts = [say(phrases[0], child)]
    for phrase in phrases[1:]:
        parts += [np.zeros(round(rng.uniform(0.4, 0.9) * SAMPLE_RATE), np.float32), say(phrase, child)]
    sound = np.concatenate(parts)
    return sound + rng.normal(0, 0.003, len(sound)).astype(np.float32)


def say(text: str, child: int = 0) -> Sound:
    """A chord of 0.1 s for each symbol, the higher the later it stands in the alphabet; spaces are silent."""
    samples = round(SYMBOL_SEC * SAMPLE_RATE)
    time, fade = np.arange(samples) / SAMPLE_RATE, np.hanning(samples)
    chords = []
    for symbol in text:
        pitch = 180 * 2 ** (SYMBOLS.index(symbol) / 12) * (1 + 0.01 * child) if symbol in SYMBOLS else 0.0
        chords.append(0.3 * fade * (np.sin(2 * np.pi * pitch * time) + 0.5 * np.sin(3 * np.pi * pitch * time)))
    return np.concatenate(chords).astype(np.float32)


def sound(seconds: float, seed: int) -> np.ndarray:
    """A glissando whose loudness changes."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * (200 + 300 * time * random.uniform(0.5, 2)) * time) * (1 + np.sin(7 * time)) / 3
    return (tone + random.normal(0, 0.02, len(time))).astype(np.float32)
