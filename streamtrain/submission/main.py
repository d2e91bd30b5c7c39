"""Transcribe data/audio with the model beside this file, offline: `main.py` of a submission.

It outputs what `transcribe` does, because `package` copies the files that do it into the zip unchanged. Every clip gets
a row: a clip that `transcribe` refuses gets the text of what decodes, and its name and the reason in the log.
"""

import io
import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sharding.audio.codec import SAMPLE_RATE, Waveform, decode  # noqa: E402
from sharding.errors import AudioError  # noqa: E402
from sharding.segment.cuts import split_at_pauses  # noqa: E402
from streamtrain.model.ctc import CTCModel  # noqa: E402
from streamtrain.model.inference import compute_log_probs, usual_batch_seconds  # noqa: E402

LINES = 50  # of progress in the log: the challenge keeps 500
NAMED = 50  # maximum of faulty clips in the log
REASON_CHARACTERS = 150
READERS = 4
AHEAD = 64  # clips decoded ahead of their batch
BLOCK = 2**12  # samples of a damaged clip that are kept or lost together


class Clip(NamedTuple):
    """Hold a clip as the model receives it."""

    pieces: list[Waveform]  # none if it cannot be read
    fault: str | None = None  # why it is not complete


def main() -> None:
    started = time.monotonic()
    data = Path("data") if Path("data").is_dir() else HERE / "data"
    settings = json.loads((HERE / "submission.json").read_text())
    names = [str(row["utterance_id"]) for row in read_rows(data / "submission_format.jsonl")]
    paths = find_audio(data, names)
    recogniser = Recogniser(HERE / "model", settings["normalize"], settings["batch_seconds"])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {recogniser.version}"
    print(f"ready: on {recogniser.device.type} after {time.monotonic() - started:.2f} s, {versions}", flush=True)
    texts: dict[str, list[str]] = {name: [] for name in names}
    faults: dict[str, Clip] = {}
    done = reported = samples = 0
    for batch in batches_of(decoded(paths, faults), recogniser.batch_seconds):
        for (name, _), text in zip(batch, recogniser.read([piece for _, piece in batch]), strict=True):
            texts[name].append(text)
        done += len(batch)
        samples += sum(len(piece) for _, piece in batch)
        if done * LINES >= (reported + 1) * len(names):
            reported = done * LINES // max(len(names), 1)
            print(f"{done:,} pieces of {len(names):,} clips, {time.monotonic() - started:.0f} s", flush=True)
    for name, clip in islice(faults.items(), NAMED):
        outcome = "the text is of what decodes" if clip.pieces else "the text is empty"
        print(f"{name:.80}: {clip.fault:.{REASON_CHARACTERS}}: {outcome}", flush=True)
    write_rows(Path("submission") / "submission.jsonl", names, texts, settings["field"])
    unread = sum(not clip.pieces for clip in faults.values())
    counts = f"{len(names):,} rows, {unread:,} clips unread, {len(faults) - unread:,} in part"
    seconds = time.monotonic() - started
    print(f"done: {counts}, {samples / SAMPLE_RATE:.1f} s of speech, {seconds:.2f} s", flush=True)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def find_audio(data: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return each clip's path, from the metadata or else from its name; largest files first."""
    listed = {}
    if (data / "utterance_metadata.jsonl").is_file():
        rows = read_rows(data / "utterance_metadata.jsonl")
        listed = {str(row["utterance_id"]): str(row.get("audio_path") or "") for row in rows}
    paths = {}
    for name in names:
        places = [data / listed.get(name, ""), data / "audio" / listed.get(name, ""), data / "audio" / f"{name}.flac"]
        paths[name] = next((place for place in places if place.is_file()), places[-1])
    sizes = {name: os.path.getsize(path) if path.is_file() else 0 for name, path in paths.items()}
    return {name: paths[name] for name in sorted(paths, key=lambda name: (-sizes[name], name))}


def decoded(paths: dict[str, Path], faults: dict[str, Clip]) -> Iterator[tuple[str, Waveform]]:
    """Yield the pieces of every clip, in the order of `paths`; clips with a fault are added to `faults`."""
    with ThreadPoolExecutor(READERS) as pool:
        clips = iter(paths.items())
        pending: deque[tuple[str, Future[Clip]]] = deque(
            (name, pool.submit(load, path)) for name, path in islice(clips, AHEAD)
        )
        while pending:
            name, future = pending.popleft()
            pending.extend((name, pool.submit(load, path)) for name, path in islice(clips, 1))
            try:
                clip = future.result()
            except Exception as error:  # a fault of one clip must not stop the others
                clip = Clip([], str(getattr(error, "strerror", None) or error).split("\n")[0])
            if clip.fault is not None:
                faults[name] = clip
            yield from ((name, piece) for piece in clip.pieces)


def load(path: Path) -> Clip:
    """Return a clip at 16 kHz, cut at pauses if too long. Raises AudioError or OSError if nothing of it decodes."""
    data, fault = path.read_bytes(), None
    try:
        waveform, _ = decode(data, prove=True)
    except AudioError as error:
        rescued, fault = rescue(data), error.message
        if rescued is None:
            raise
        waveform = rescued
    return Clip([piece for _, piece in split_at_pauses(waveform)], fault)


def rescue(data: bytes) -> Waveform | None:
    """Return what decodes of a refused clip, with silence for non-finite samples; None if that is too little."""
    blocks: list[Waveform] = []
    with suppress(soundfile.LibsndfileError, RuntimeError), soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seekable = lambda: False  # else soundfile relies on the length in the header
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            blocks.append(np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0))
    if not blocks:
        return None
    rescued = io.BytesIO()
    soundfile.write(rescued, np.concatenate(blocks), file.samplerate, format="WAV", subtype="FLOAT")
    try:
        return decode(rescued.getvalue())[0]
    except AudioError:
        return None


def batches_of(pieces: Iterator[tuple[str, Waveform]], seconds: float) -> Iterator[list[tuple[str, Waveform]]]:
    """Yield batches of consecutive pieces, which have similar lengths, within a cap on pieces × longest."""
    batch: list[tuple[str, Waveform]] = []
    longest = 0
    for name, piece in pieces:
        longest = max(longest, len(piece))
        if batch and longest * (len(batch) + 1) > seconds * SAMPLE_RATE:
            yield batch
            batch, longest = [], len(piece)
        batch.append((name, piece))
    if batch:
        yield batch


class Recogniser:
    """Transcribe waveforms with a model and the symbols of its output."""

    def __init__(self, folder: Path, normalize: bool, batch_seconds: float | None) -> None:
        from transformers import AutoModelForCTC, __version__

        self.version = __version__
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = AutoModelForCTC.from_pretrained(folder)
        ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self._model = CTCModel(network.float(), ids, normalize).to(self.device).eval()
        self.batch_seconds = batch_seconds or usual_batch_seconds(self._model)
        tokens = {i: token.replace("|", " ") for token, i in ids.items()}
        self._symbols = [tokens[i] if tokens[i] not in ("[PAD]", "[UNK]") else "" for i in range(len(ids))]
        self._blank = int(network.config.pad_token_id)

    def read(self, pieces: Sequence[Waveform]) -> list[str]:
        """Return the best path of each piece, repeats merged and blanks dropped."""
        try:
            log_probs, frames = compute_log_probs(self._model, pieces)
        except torch.OutOfMemoryError:
            if len(pieces) == 1:
                raise
        else:
            rows = zip(log_probs.max(dim=-1).indices.cpu(), frames.tolist(), strict=True)
            return [self._spell(row[:length]) for row, length in rows]
        torch.cuda.empty_cache()
        half = len(pieces) // 2
        return self.read(pieces[:half]) + self.read(pieces[half:])

    def _spell(self, ids: torch.Tensor) -> str:
        merged = torch.unique_consecutive(ids).tolist()
        return " ".join("".join(self._symbols[symbol] for symbol in merged if symbol != self._blank).split())


def write_rows(path: Path, names: Sequence[str], texts: dict[str, list[str]], field: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for name in names:
            text = " ".join(filter(None, texts[name]))
            lines.write(json.dumps({"utterance_id": name, field: text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
