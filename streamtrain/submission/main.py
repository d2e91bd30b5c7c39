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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sharding.audio.codec import SAMPLE_RATE, Waveform, decode  # noqa: E402
from sharding.errors import AudioError  # noqa: E402
from sharding.segment.cuts import split_at_pauses  # noqa: E402
from streamtrain.model.ctc import CTCModel  # noqa: E402
from streamtrain.model.decode import join_texts  # noqa: E402
from streamtrain.model.inference import chunk_by_memory, decode_waveforms  # noqa: E402
from streamtrain.model.vocab import Vocab  # noqa: E402

LINES = 50  # of progress in the log: the challenge keeps 500
NAMED = 50  # maximum of faulty clips in the log
REASON_CHARACTERS = 150
READERS = 4
AHEAD = 256  # clips decoded while the model runs, half of what it gets at once
BLOCK = 2**12  # samples of a damaged clip that are kept or lost together


class Clip(NamedTuple):
    """Hold a clip as the model receives it."""

    name: str
    pieces: list[Waveform]  # none if it cannot be read
    fault: str | None = None  # why it is not complete

    @property
    def seconds(self) -> float:
        return sum(map(len, self.pieces)) / SAMPLE_RATE


def main() -> None:
    started = time.monotonic()
    data = Path("data") if Path("data").is_dir() else HERE / "data"
    settings = json.loads((HERE / "submission.json").read_text(encoding="utf-8"))
    names = [str(row["utterance_id"]) for row in read_rows(data / "submission_format.jsonl")]
    paths = find_audio(data, names)
    model = load_model(HERE / "model", settings)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"ready: on {model.device.type} after {time.monotonic() - started:.2f} s, {versions}", flush=True)
    texts = dict.fromkeys(names, "")
    faults: list[Clip] = []
    done = reported = 0
    speech_sec = 0.0
    for clips in chunk_by_memory(read_clips(paths)):
        pieces = [piece for clip in clips for piece in clip.pieces]
        hypotheses = (hypothesis for hypothesis, _ in decode_waveforms(model, pieces, settings["batch_seconds"]))
        for clip in clips:
            texts[clip.name] = join_texts([hypothesis.text for hypothesis in islice(hypotheses, len(clip.pieces))])
        faults += [clip for clip in clips if clip.fault is not None]
        done += len(clips)
        speech_sec += sum(clip.seconds for clip in clips)
        if done * LINES >= (reported + 1) * len(names):
            reported = done * LINES // len(names)
            print(f"{done:,} of {len(names):,} clips, {time.monotonic() - started:.0f} s", flush=True)
    for clip in faults[:NAMED]:
        outcome = "the text is of what decodes" if clip.pieces else "the text is empty"
        print(f"{clip.name:.80}: {clip.fault:.{REASON_CHARACTERS}}: {outcome}", flush=True)
    write_rows(Path("submission") / "submission.jsonl", names, texts, settings["field"])
    unread = sum(not clip.pieces for clip in faults)
    counts = f"{len(names):,} rows, {unread:,} clips unread, {len(faults) - unread:,} in part"
    seconds = time.monotonic() - started
    print(f"done: {counts}, {speech_sec:.1f} s of speech, {seconds:.2f} s", flush=True)


def load_model(folder: Path, settings: dict[str, Any]) -> CTCModel:
    """Return the model in fp32, on a GPU if there is one. `package` has checked its files."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings["vocab"].items()
    }
    network = transformers.AutoModelForCTC.from_pretrained(folder).float()
    model = CTCModel(network, Vocab(**fields), settings["normalize"])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


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


def read_clips(paths: dict[str, Path]) -> Iterator[Clip]:
    """Yield the clips in the order of `paths`, reading ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        reads = (pool.submit(read_clip, name, path) for name, path in paths.items())
        pending = deque(islice(reads, AHEAD))
        while pending:
            read = pending.popleft()
            pending.extend(islice(reads, 1))
            yield read.result()


def read_clip(name: str, path: Path) -> Clip:
    """Return a clip at 16 kHz, cut at pauses if too long; of a damaged one what decodes."""
    try:
        data = path.read_bytes()
        waveform: Waveform | None
        try:
            waveform, fault = decode(data, prove=True)[0], None
        except AudioError as error:
            waveform, fault = rescue(data), error.message
        return Clip(name, [] if waveform is None else [piece for _, piece in split_at_pauses(waveform)], fault)
    except Exception as error:  # a fault of one clip must not stop the others
        return Clip(name, [], str(getattr(error, "strerror", None) or error).split("\n")[0])


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


def write_rows(path: Path, names: Sequence[str], texts: dict[str, str], field: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for name in names:
            lines.write(json.dumps({"utterance_id": name, field: texts[name]}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
