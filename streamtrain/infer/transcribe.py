"""Transcribe recordings to JSONL: decode, batch by length, write rows in input order; resume after a kill."""

import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import TypeAdapter
from tqdm import tqdm
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE, Waveform, decode
from sharding.errors import AudioError, MissingError, ShardError, StreamtrainError, counted, reason_of
from sharding.files.document import LARGE_BYTES, STRICT, Size, parse, parse_json, read_document
from sharding.files.exclusive import LockedError, exclusive
from sharding.files.writing import explaining, file_to_replace, open_lock_file, sibling, sync, write_inside, written
from sharding.segment.cuts import split_at_pauses
from sharding.shardset.sample import escape_key
from streamtrain.data.dataset import read_ahead
from streamtrain.distributed import World
from streamtrain.infer.inputs import Recording
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import Hypothesis, Word, join_nbest, join_texts, word_timestamps
from streamtrain.model.inference import LogProbs, chunk_by_memory, decode_waveforms
from streamtrain.model.labels import field_of
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

READERS = 2
LISTED = 10  # failed recordings that are named at the end


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """Hold the settings of decoding."""

    batch_seconds: float | None = None  # padded seconds per forward, None: by the model; texts do not depend on it
    beam: int = 0  # prefixes; 0: the best path
    nbest: int = 0  # hypotheses per recording, from the beam
    log_probs: Path | None = None  # folder for each recording's log-probabilities


@dataclass(frozen=True, eq=False, slots=True)
class LoadedRecording:
    """Hold a recording's decoded and cut audio, or the error that prevented it."""

    recording: Recording
    utterance_id: str
    pieces: tuple[tuple[float, Waveform], ...] = ()  # each with its start, s
    error: str | None = None

    @property
    def seconds(self) -> float:
        return sum(len(waveform) for _, waveform in self.pieces) / SAMPLE_RATE


def transcribe(
    model_folder: Path, recordings: Sequence[Recording], out: Path, options: DecodingOptions | None = None
) -> int:
    """Write a JSONL row per recording; return how many failed.

    Fields: `utterance_id` (a file's stem), `audio_path`, the text under the name that its profile has for it
    (`phonetic_text`, `orthographic_text`, `text`), that `profile` and the `units`, `confidence`, `words` (each with its
    `start` and `end` in seconds and its confidence), `error`; and `nbest`, the best hypotheses of a beam.

    A recording that cannot be read gets a row with its error. A killed run resumes if the request is the same, and the
    resulting file is identical to that of an uninterrupted run.
    """
    options = options or DecodingOptions()
    _check_free(out, recordings)
    model = load_trained(model_folder).to(World().device)
    warn_unless_finished(model_folder)
    if options.log_probs:
        write_inside(options.log_probs / "vocab.json", (model_folder / "vocab.json").read_bytes())
    with closing(Progress(out, _digest(model_folder, model, recordings, options))) as progress:
        left = recordings[progress.rows :]
        failed, errors = progress.failed, list[str]()
        with tqdm(total=len(recordings), initial=progress.rows, unit="file", desc="transcribing") as bar:
            for chunk in chunk_by_memory(read_ahead(load, iter(left), READERS)):
                rows = decode_recordings(model, chunk, options)
                named = [f"  {row['audio_path']}: {row['error']}" for row in rows if row["error"] is not None]
                failed += len(named)
                errors += named[: LISTED - len(errors)]
                progress.write(rows, failed)
                bar.update(len(rows))
        progress.finish()
    done = f"{out}: {counted(len(recordings) - failed, 'recording')} transcribed"
    print("\n".join([done + (f", {failed:,} failed" if failed else ""), *errors]))
    if failed > len(errors):
        print(f"  (and {failed - len(errors):,} more: an `error` is in their rows)")
    return failed


def _check_free(out: Path, recordings: Sequence[Recording]) -> None:
    """Raise StreamtrainError if the file exists: its rows do not record the model, so it is not overwritten."""
    place = file_to_replace(out)
    if place is None or not place.is_file() or not place.stat().st_size:
        return
    try:
        rows = [parse_json(line) for line in read_document(place, LARGE_BYTES).splitlines()]
        same = [row["audio_path"] for row in rows] == [recording.audio_path for recording in recordings]
    except (ValueError, TypeError, KeyError):
        same = False
    content = f"already has all these {len(recordings):,} recordings" if same else "has other content"
    raise StreamtrainError(f"{out}: {content}", "name another file, or delete this one to write it again")


class _State(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    digest: str
    rows: Size
    bytes: Size
    failed: Size


_STATE = TypeAdapter(_State)


class Progress:
    """Track the rows written so far to a partial file, which is renamed when it is complete."""

    def __init__(self, out: Path, digest: str) -> None:
        self._out, self._digest = out, digest
        self._held = ExitStack()
        self.rows = self.failed = 0
        self._place = place = file_to_replace(out)
        if place is None:  # a device or a pipe: written rows cannot be resumed, so a later run starts over
            self._file = self._held.enter_context(written(out))
            return
        self._partial, self._state = sibling(place, ".part"), sibling(place, ".part.json")
        with explaining(out):
            if not place.parent.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._held.enter_context(open(self._partial, "ab", opener=open_lock_file))  # noqa: SIM115
        try:
            self._held.enter_context(exclusive(self._file))
        except LockedError as error:
            raise StreamtrainError(
                f"{out}: another run is writing it{error.holder_note}",
                f"wait for it, or name another file{error.remedy}",
            ) from error
        size = 0
        if self._state.is_file() and self._partial.is_file():
            try:
                state = parse(read_document(self._state), _STATE)
                if state["digest"] == digest and self._partial.stat().st_size >= state["bytes"]:
                    self.rows, self.failed, size = state["rows"], state["failed"], state["bytes"]
            except ValueError:
                pass  # a truncated state has no information: start over
            if not self.rows:
                print(f"{self._partial}: an earlier run's rows are for another request; starting over")
        if self.rows:
            print(f"resuming after {counted(self.rows, 'recording')} of an earlier run")
        self._file.truncate(size)

    def write(self, rows: Sequence[dict[str, Any]], failed: int) -> None:
        """Write rows durably: a later run does not repeat them once this has returned."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with explaining(self._out, len(data)):
            self._file.write(data)
            self._file.flush()
            if self._place is not None:
                os.fsync(self._file.fileno())
                state = {"digest": self._digest, "rows": self.rows + len(rows), "bytes": self._file.tell(),
                         "failed": failed}  # fmt: skip
                write_inside(self._state, json.dumps(state))
        self.rows += len(rows)

    def finish(self) -> None:
        if self._place is not None:
            with explaining(self._out):
                os.replace(self._partial, self._place)
                sync(self._place.parent)
                self._state.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the file to other runs, finished or not. Written rows stay, so the next run can resume."""
        if self._place is not None and not self.rows:
            self._partial.unlink(missing_ok=True)
        with explaining(self._out):  # closing retries what could not be written
            self._held.close()


def load(recording: Recording) -> LoadedRecording:
    """Decode a recording and cut it if it is too long; its `error` is set if it cannot be read.

    Raises StoreError if its store fails, which is no fault of the recording.
    """
    try:
        chunks = recording.load()
        pieces = tuple(
            (chunk.start_sec + start / SAMPLE_RATE, waveform)
            for chunk in chunks
            for start, waveform in split_at_pauses(decode(chunk.audio, prove=True)[0])
        )
        return LoadedRecording(recording, chunks[0].utterance_id or recording.utterance_id, pieces)
    except (AudioError, MissingError, ShardError) as error:
        message = error.message
    except OSError as error:
        message = reason_of(error)
    return LoadedRecording(recording, recording.utterance_id, error=message)


def decode_recordings(
    model: CTCModel, items: Sequence[LoadedRecording], options: DecodingOptions
) -> list[dict[str, Any]]:
    """Return the row of each recording."""
    waveforms = [waveform for item in items for _, waveform in item.pieces]
    decoded = iter(decode_waveforms(model, waveforms, options.batch_seconds, options.beam))
    return [_row(item, list(islice(decoded, len(item.pieces))), model, options) for item in items]


def _row(
    loaded: LoadedRecording, decoded: Sequence[tuple[Hypothesis, LogProbs]], model: CTCModel, options: DecodingOptions
) -> dict[str, Any]:
    """Return the row of a recording, joined from its decoded pieces."""
    field, frame_sec = field_of(model.labels), model.frame_samples / SAMPLE_RATE
    row: dict[str, Any] = {"utterance_id": loaded.utterance_id, "audio_path": loaded.recording.audio_path}
    if model.labels is not None:  # for whoever scores the text
        row |= {"profile": model.labels.profile, "units": model.labels.units}
    if loaded.error is not None:
        return row | {field: "", "confidence": 0.0, "words": [], "error": loaded.error}
    hypotheses = [hypothesis for hypothesis, _ in decoded]
    samples = [len(waveform) for _, waveform in loaded.pieces]
    shares = [count / sum(samples) for count in samples]
    row |= {
        field: join_texts([hypothesis.text for hypothesis in hypotheses]),
        "confidence": round(sum(item.confidence * share for item, share in zip(hypotheses, shares, strict=True)), 4),
        "words": [
            _timed(word, start)
            for (hypothesis, log_probs), (start, _) in zip(decoded, loaded.pieces, strict=True)
            for word in word_timestamps(log_probs, hypothesis.text, model.vocab, frame_sec)
        ],
        "error": None,
    }
    if options.nbest:
        joined = join_nbest([hypothesis.nbest for hypothesis in hypotheses])
        row["nbest"] = [asdict(item) for item in joined[: options.nbest]]
    if options.log_probs:
        array = io.BytesIO()
        np.save(array, np.concatenate([log_probs for _, log_probs in decoded]).astype(np.float16))
        write_inside(options.log_probs / f"{escape_key(loaded.utterance_id)}.npy", array.getvalue())
    return row


def _timed(word: Word, start_sec: float) -> dict[str, Any]:
    return {
        "word": word.text,
        "start": round(start_sec + word.start, 3),
        "end": round(start_sec + word.end, 3),
        "confidence": round(word.confidence, 4),
    }


def _digest(folder: Path, model: CTCModel, recordings: Sequence[Recording], options: DecodingOptions) -> str:
    """Return a digest of everything that determines the rows."""
    state = xxhash.xxh3_128()
    for name in ("config.json", "model.safetensors"):
        with open(folder / name, "rb") as file:
            while data := file.read(2**23):
                state.update(data)
    for recording in recordings:
        state.update(f"{recording.utterance_id}\0{recording.audio_path}\0{recording.stamp}\n".encode())
    state.update(repr((options, model.normalize, model.vocab, field_of(model.labels))).encode())
    return state.hexdigest()
