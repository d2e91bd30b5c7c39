"""Audio files to JSONL: each decoded, batched by length, and written in the order it was found."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from sharding.archive import AUDIO_SUFFIXES
from sharding.audio import SAMPLE_RATE, Waveform, decode
from sharding.errors import AudioError, StreamtrainError
from sharding.ipa import TRACKS
from sharding.split import split_recording
from streamtrain.collate import zero_mean_unit_variance
from streamtrain.decode import Hypothesis, join_alternatives, join_pieces, read_out
from streamtrain.model import load_trained
from streamtrain.network import CTCModel
from streamtrain.plan import plan_evaluation
from streamtrain.world import World

LIMIT_SEC = 25.0  # longer recordings are decoded in pieces, cut at pauses
CHUNK_FILES = 256  # files held in memory at a time


def transcribe(
    model_folder: Path,
    sources: Sequence[str],
    out: Path,
    batch_seconds: float = 30.0,
    beam: int = 0,
    alternatives: int = 0,
) -> int:
    """Write a JSONL row per audio file; returns how many failed.

    Its fields: `utterance_id` (the file's stem), `audio_path`, `phonetic_text` (of the word track
    `orthographic_text`), `confidence`, `error`; and `alternatives`, the best so many of a `beam`.

    A file that cannot be read gets a row with its error. The texts do not depend on `batch_seconds`.
    """
    files = find_audio(sources)
    model = load_trained(model_folder).to(World().device)
    field = TRACKS[model.vocab.track]
    partial = out.with_name(f".{out.name}.part")
    failed = 0
    if out.is_dir():
        raise StreamtrainError(f"{out}: is a folder", "name a file that can be written")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise StreamtrainError(f"{out}: {error.strerror}", "name a file that can be written") from error
    with open(partial, "w", encoding="utf-8") as lines, tqdm(total=len(files), unit="file", desc="transcribing") as bar:
        for start in range(0, len(files), CHUNK_FILES):
            chunk = files[start : start + CHUNK_FILES]
            for path, result in zip(chunk, _transcribe_chunk(model, chunk, batch_seconds, beam), strict=True):
                row: dict[str, object] = {"utterance_id": path.stem, "audio_path": str(path)}
                if isinstance(result, str):
                    row |= {field: "", "confidence": 0.0, "error": result}
                    failed += 1
                else:
                    row |= {field: result.text, "confidence": round(result.confidence, 4), "error": None}
                    if alternatives:
                        row["alternatives"] = [asdict(one) for one in result.alternatives[:alternatives]]
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update()
    os.replace(partial, out)
    print(f"{out}: {len(files) - failed:,} files transcribed" + (f", {failed:,} failed" if failed else ""))
    return failed


def find_audio(sources: Sequence[str]) -> list[Path]:
    """The audio files named, and those under the folders named. Raises StreamtrainError where there are none."""
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        elif source.is_file():
            found.append(source)
        else:
            raise StreamtrainError(f"{source}: there is no such file or folder")
    if not found:
        raise StreamtrainError(f"no audio in {', '.join(sources)}", f"looked for {', '.join(AUDIO_SUFFIXES)}")
    return found


def _transcribe_chunk(
    model: CTCModel, files: Sequence[Path], batch_seconds: float, beam: int
) -> list[Hypothesis | str]:
    pieces: list[Waveform] = []
    owners: list[int] = []
    errors: dict[int, str] = {}
    for number, path in enumerate(files):
        try:
            waveform, _ = decode(path.read_bytes())
        except (AudioError, OSError) as error:
            errors[number] = error.message if isinstance(error, AudioError) else str(error.strerror)
            continue
        for segment in _segments(waveform):
            pieces.append(segment)
            owners.append(number)
    decoded: list[Hypothesis | None] = [None] * len(pieces)
    device = next(model.parameters()).device
    for batch in plan_evaluation([len(piece) for piece in pieces], batch_seconds):
        rows = [zero_mean_unit_variance(pieces[i]) if model.normalize else pieces[i] for i in batch]
        lengths = torch.tensor([len(row) for row in rows])
        with torch.inference_mode():
            inputs = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
            log_probs = model(inputs.to(device), lengths)  # (B, T, V)
        for i, hypothesis in zip(
            batch, read_out(log_probs, model.frame_counts(lengths), model.vocab, beam), strict=True
        ):
            decoded[i] = hypothesis
    return [errors[number] if number in errors else _join(decoded, owners, number) for number in range(len(files))]


def _segments(waveform: Waveform) -> list[Waveform]:
    if len(waveform) <= LIMIT_SEC * SAMPLE_RATE:
        return [waveform]
    segments = split_recording("", waveform, "", LIMIT_SEC)
    starts = [round(segment.start_sec * SAMPLE_RATE) for segment in segments]
    return [waveform[start : start + segment.samples] for start, segment in zip(starts, segments, strict=True)]


def _join(decoded: Sequence[Hypothesis | None], owners: Sequence[int], number: int) -> Hypothesis:
    mine = [hypothesis for hypothesis, owner in zip(decoded, owners, strict=True) if owner == number and hypothesis]
    return Hypothesis(
        join_pieces([hypothesis.text for hypothesis in mine]),
        sum(hypothesis.confidence for hypothesis in mine) / max(len(mine), 1),
        join_alternatives([hypothesis.alternatives for hypothesis in mine]),
    )
