"""What `make bench` builds shards of: copies of real speech, the same speech as WAV, and a million tiny clips."""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from sharding.labels.pasketti import SYMBOLS
from tests.tools.corpus import MANIFEST, SAMPLE_RATE, Row, describe, write_manifest

FINAL = ("FLAC", "PCM_16", SAMPLE_RATE, 1)  # what the build stores as it is
LENGTHS_SEC = (0.1, 25.0)  # longer clips would be split, which no reference does
SHAPES = ((44_100, 2), (48_000, 1))  # (rate, channels) of the WAVs, by turns

TINY_SAMPLES = 8_000  # 0.5 s, 24 frames: room for a label of 20 symbols
TINY_LABEL, TINY_SPACES = 20, (5, 11, 16)  # symbols; where its spaces stand
TINY_FILES = 1_000  # a file has at most 65,000 names on ext4, and a thousand files have a thousand md5s
TINY_FOLDER = 10_000  # clips
CHILDREN, SESSIONS = 2_000, 4


def flac_corpus(home: Path, source: Path, count: int) -> Path:
    """Copies of the source's clips under new names, 16 kHz mono FLAC, so that the build passes them through."""

    def write(folder: Path) -> Iterator[Row]:
        clips = read_speech(source)
        for number in range(count):
            row, flac = clips[number % len(clips)]
            yield save(folder, row, number, ".flac", flac)

    return once(home / f"flac-{fingerprint(source)}-{count}", write)


def wav_corpus(home: Path, source: Path, count: int) -> Path:
    """The same speech as 16-bit WAV, by turns 44.1 kHz stereo and 48 kHz mono."""

    def write(folder: Path) -> Iterator[Row]:
        clips = read_speech(source)
        for number in range(count):
            row, flac = clips[number % len(clips)]
            rate, channels = SHAPES[number % len(SHAPES)]
            waveform, _ = soundfile.read(io.BytesIO(flac), dtype="float32")
            mono = 0.9 * soxr.resample(waveform, SAMPLE_RATE, rate, quality="HQ")
            sides = np.stack([mono, 0.8 * mono], axis=1)[:, :channels]  # (samples, channels), and not twice the same
            wav = io.BytesIO()
            soundfile.write(wav, sides, rate, format="WAV", subtype="PCM_16")
            yield save(folder, row, number, ".wav", wav.getvalue())

    return once(home / f"wav-{fingerprint(source)}-{count}", write)


def tiny_corpus(home: Path, count: int) -> Path:
    """So many rows, each with an id and a label of its own, whose audio are hard links to a few soft noises."""

    def write(folder: Path) -> Iterator[Row]:
        rng = np.random.default_rng(0)
        (folder / "tiny").mkdir()
        tiny = []
        for number in range(min(TINY_FILES, count)):
            noise = rng.integers(-2, 3, TINY_SAMPLES).astype(np.int16)  # compresses to 2.6 kB: the disk is not the test
            soundfile.write(folder / f"tiny/{number}.flac", noise, SAMPLE_RATE, subtype="PCM_16")
            tiny.append((folder / f"tiny/{number}.flac", describe(folder, f"tiny/{number}.flac", "")))
        children = [rng.bytes(8).hex() for _ in range(CHILDREN)]
        for start in range(0, count, TINY_FOLDER):
            (folder / f"audio/{start // TINY_FOLDER:03d}").mkdir()
            for number, text in enumerate(make_labels(min(TINY_FOLDER, count - start), rng), start):
                file, row = tiny[number % len(tiny)]
                child, utterance_id = children[number % CHILDREN], f"U_{rng.bytes(8).hex()}"
                audio_path = f"audio/{start // TINY_FOLDER:03d}/{utterance_id}.flac"
                os.link(file, folder / audio_path)
                yield row | {
                    "utterance_id": utterance_id,
                    "child_id": f"C_{child}",
                    "session_id": f"S_{child[:15]}{number // CHILDREN % SESSIONS}",
                    "audio_path": audio_path,
                    "phonetic_text": text,
                }
        shutil.rmtree(folder / "tiny")  # their other names stay

    return once(home / f"tiny-{count}", write)


def make_labels(count: int, rng: np.random.Generator) -> list[str]:
    """Words of random symbols, no two alike in a row: CTC would need a frame between those."""
    letters = np.array(list(SYMBOLS))
    steps = rng.integers(1, len(letters), (count, TINY_LABEL))
    labels = letters[np.cumsum(steps, axis=1) % len(letters)]
    labels[:, TINY_SPACES] = " "
    return ["".join(label) for label in labels]


def once(folder: Path, write: Callable[[Path], Iterator[Row]]) -> Path:
    """Make a corpus, unless an earlier run has; it has its name only when whole."""
    if not folder.is_dir():
        print(f"making {folder}", file=sys.stderr)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        (part / "audio").mkdir(parents=True)
        write_manifest(part, write(part))
        part.rename(folder)
    return folder


def save(folder: Path, row: Row, number: int, suffix: str, data: bytes) -> Row:
    """Write one clip; its row has the nine fields of the challenge."""
    audio_path = f"audio/{row['utterance_id']}-{number:05d}{suffix}"
    (folder / audio_path).write_bytes(data)
    kept = {field: row[field] for field in ("child_id", "session_id", "age_bucket") if field in row}
    return describe(folder, audio_path, row["phonetic_text"], **kept)


def read_speech(source: Path) -> list[tuple[Row, bytes]]:
    """Row and 16 kHz mono FLAC of every clip of a folder that decodes and is neither tiny nor long."""
    clips = []
    for line in transcripts(source).read_text("utf-8").splitlines():
        row = json.loads(line)
        data = (source / row["audio_path"]).read_bytes()
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                final = (file.format, file.subtype, file.samplerate, file.channels) == FINAL
                rate, waveform = file.samplerate, file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:  # the demo corpus has a damaged clip
            continue
        if not final:
            flac = io.BytesIO()
            mono = soxr.resample(waveform.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")
            soundfile.write(flac, mono, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            data = flac.getvalue()
        if LENGTHS_SEC[0] <= len(waveform) / rate <= LENGTHS_SEC[1]:
            clips.append((row, data))
    return clips


def transcripts(source: Path) -> Path:
    return next(iter(sorted(source.glob("*phon_transcripts.jsonl"))), source / MANIFEST)


def fingerprint(source: Path) -> str:
    return f"{source.name}-{hashlib.sha256(transcripts(source).read_bytes()).hexdigest()[:6]}"
