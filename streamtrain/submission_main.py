"""`main.py` of a submission: transcribes data/audio with the model beside it, offline. Nothing but torch, transformers,
soundfile and numpy; `package` puts it into a zip together with network.py and a model.
"""

import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from streamtrain.network import CTCModel  # noqa: E402

SAMPLE_RATE = 16_000
HOP = SAMPLE_RATE // 100
MIN_SAMPLES = 400  # one frame
LIMIT_SEC = 25.0  # what is longer is cut at quiet moments
BATCH_SEC = {"cuda": 400.0, "cpu": 30.0}  # padded seconds of a forward
LINES = 50  # of progress: the challenge keeps 500
READERS = 4
AHEAD = 64  # clips decoded ahead of their batch
BLOCK = 2**20  # samples read at a time

Waveform = npt.NDArray[np.float32]


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
    broken: list[str] = []
    done = said = samples = 0
    for batch in batches_of(decoded(paths, broken), recogniser.batch_seconds):
        for (name, _), text in zip(batch, recogniser.read([piece for _, piece in batch]), strict=True):
            texts[name].append(text)
        done += len(batch)
        samples += sum(len(piece) for _, piece in batch)
        if done * LINES >= (said + 1) * len(names):
            said = done * LINES // max(len(names), 1)
            print(f"{done:,} pieces of {len(names):,} clips, {time.monotonic() - started:.0f} s", flush=True)
    for name in broken[:20]:
        print(f"{name}: cannot be read, and gets an empty text", flush=True)
    write_rows(Path("submission") / "submission.jsonl", names, texts, settings["field"])
    said_last = f"{len(names):,} rows, {len(broken):,} clips unread, {samples / SAMPLE_RATE:.1f} s of speech"
    print(f"done: {said_last}, {time.monotonic() - started:.2f} s", flush=True)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def find_audio(data: Path, names: Sequence[str]) -> dict[str, Path]:
    """Where each clip lies: as the metadata say, else under its own name; largest files first."""
    named = {}
    if (data / "utterance_metadata.jsonl").is_file():
        rows = read_rows(data / "utterance_metadata.jsonl")
        named = {str(row["utterance_id"]): str(row.get("audio_path") or "") for row in rows}
    found = {}
    for name in names:
        places = [data / named.get(name, ""), data / "audio" / named.get(name, ""), data / "audio" / f"{name}.flac"]
        found[name] = next((place for place in places if place.is_file()), places[-1])
    sizes = {name: os.path.getsize(path) if path.is_file() else 0 for name, path in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (-sizes[name], name))}


def decoded(paths: dict[str, Path], broken: list[str]) -> Iterator[tuple[str, Waveform]]:
    """The pieces of every clip, in that order; the names of clips that cannot be read go to `broken`."""
    with ThreadPoolExecutor(READERS) as pool:
        clips = iter(paths.items())
        pending: deque[tuple[str, Future[list[Waveform]]]] = deque(
            (name, pool.submit(decode, path)) for name, path in islice(clips, AHEAD)
        )
        while pending:
            name, future = pending.popleft()
            pending.extend((name, pool.submit(decode, path)) for name, path in islice(clips, 1))
            try:
                pieces = future.result()
            except Exception:  # whatever is wrong with one clip, the others count
                broken.append(name)
                continue
            yield from ((name, piece) for piece in pieces)


def decode(path: Path) -> list[Waveform]:
    """A clip at 16 kHz, cut at quiet moments where it is too long; none where it is shorter than a frame."""
    with soundfile.SoundFile(path) as file:  # in blocks: what the header says of its length may be anything
        file.seekable = lambda: False  # else soundfile relies on it
        rate, blocks = file.samplerate, []
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            blocks.append(np.nan_to_num(block.mean(axis=1)))
    waveform: Waveform = np.concatenate([*blocks, np.zeros(0, np.float32)])
    if rate != SAMPLE_RATE:  # the challenge's audio is not: enough to say something of it
        places = np.arange(round(len(waveform) * SAMPLE_RATE / rate)) * (rate / SAMPLE_RATE)
        waveform = np.interp(places, np.arange(len(waveform)), waveform).astype(np.float32)
    ends = [0, *quiet_moments(waveform, round(LIMIT_SEC * SAMPLE_RATE)), len(waveform)]
    return [waveform[start:end] for start, end in pairwise(ends) if end - start >= MIN_SAMPLES]


def quiet_moments(waveform: Waveform, limit: int) -> list[int]:
    """Where to cut, in samples: the quietest 0.1 s of the last two fifths before the limit, again and again."""
    cuts, start = [], 0
    while len(waveform) - start > limit:
        window = np.square(waveform[start + 3 * limit // 5 : start + limit])
        level = window[: len(window) // HOP * HOP].reshape(-1, HOP).mean(axis=1)
        smooth = np.convolve(level, np.ones(10), "valid")
        start += 3 * limit // 5 + (int(smooth.argmin()) + 5) * HOP
        cuts.append(start)
    return cuts


def batches_of(pieces: Iterator[tuple[str, Waveform]], seconds: float) -> Iterator[list[tuple[str, Waveform]]]:
    """Consecutive pieces, which are of like length, within a cap on pieces × longest."""
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
    """The model, and how its frames become text."""

    def __init__(self, folder: Path, normalize: bool, batch_seconds: float | None) -> None:
        from transformers import AutoModelForCTC, __version__

        self.version = __version__
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_seconds = batch_seconds or BATCH_SEC[self.device.type]
        torch.set_float32_matmul_precision("high")
        network = AutoModelForCTC.from_pretrained(folder)
        ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self._model = CTCModel(network.float(), ids, normalize).to(self.device).eval()
        said = {number: token.replace("|", " ") for token, number in ids.items()}
        self._symbols = [said[number] if said[number] not in ("[PAD]", "[UNK]") else "" for number in range(len(ids))]
        self._blank = int(network.config.pad_token_id)

    def read(self, pieces: Sequence[Waveform]) -> list[str]:
        """The best path of each piece, its repeats merged and its blanks dropped."""
        try:
            return self._read(pieces)
        except torch.OutOfMemoryError:
            if len(pieces) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(pieces) // 2
        return self.read(pieces[:half]) + self.read(pieces[half:])

    @torch.inference_mode()
    def _read(self, pieces: Sequence[Waveform]) -> list[str]:
        lengths = torch.tensor([len(piece) for piece in pieces])
        rows = [torch.from_numpy(self._normalized(piece)) for piece in pieces]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        ids = self._model(inputs, lengths).argmax(-1).cpu()  # (B, T)
        frames = self._model.frame_counts(lengths).tolist()
        return [self._spell(row[:length]) for row, length in zip(ids, frames, strict=True)]

    def _normalized(self, piece: Waveform) -> Waveform:
        if not self._model.normalize:
            return np.ascontiguousarray(piece)
        normalized: Waveform = (piece - piece.mean()) / np.sqrt(piece.var() + 1e-7)
        return normalized

    def _spell(self, ids: torch.Tensor) -> str:
        merged = torch.unique_consecutive(ids).tolist()
        return " ".join("".join(self._symbols[one] for one in merged if one != self._blank).split())


def write_rows(path: Path, names: Sequence[str], texts: dict[str, list[str]], field: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for name in names:
            text = " ".join(filter(None, texts[name]))
            lines.write(json.dumps({"utterance_id": name, field: text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
