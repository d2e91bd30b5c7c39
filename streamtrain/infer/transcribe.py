"""Recordings to JSONL: each decoded, batched by length, and written in the order it was found; goes on after a kill."""

import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import TypeAdapter
from tqdm import tqdm
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE, Waveform, decode
from sharding.errors import AudioError, MissingError, ShardError, StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, STRICT, Size, parse, parse_json, read_document
from sharding.files.exclusive import LockedError, exclusive
from sharding.files.writing import explaining, file_to_replace, open_lock_file, sibling, sync, write_inside, written
from sharding.labels.ipa import TRACKS
from sharding.segment.cuts import split_at_pauses
from sharding.shardset.sample import escape_key
from streamtrain.data.dataset import read_ahead
from streamtrain.data.plan import plan_evaluation
from streamtrain.distributed import World
from streamtrain.infer.inputs import Recording
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import Hypothesis, Word, decode_log_probs, join_nbest, join_texts, word_timestamps
from streamtrain.model.inference import chunk_by_memory, compute_log_probs, usual_batch_seconds
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

READERS = 2

LogProbs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How recordings are read out."""

    batch_seconds: float | None = None  # padded seconds of a forward, or by the model; texts do not depend on it
    beam: int = 0  # prefixes; 0: the best path
    nbest: int = 0  # texts of each recording, of a beam
    log_probs: Path | None = None  # folder for each recording's log-probabilities


@dataclass(frozen=True, eq=False, slots=True)
class LoadedRecording:
    """A recording that was decoded and cut, or why it could not be."""

    recording: Recording
    utterance_id: str
    pieces: tuple[Waveform, ...] = ()
    starts: tuple[float, ...] = ()  # of the pieces, s
    error: str | None = None

    @property
    def seconds(self) -> float:
        return sum(map(len, self.pieces)) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was read out of one piece."""

    hypothesis: Hypothesis
    words: list[Word]
    log_probs: LogProbs | None  # (T, V), where it is to be kept


def transcribe(
    model_folder: Path, recordings: Sequence[Recording], out: Path, options: DecodingOptions | None = None
) -> int:
    """Write a JSONL row per recording; returns how many failed.

    Its fields: `utterance_id` (a file's stem), `audio_path`, `phonetic_text` (of the word track `orthographic_text`),
    `confidence`, `words` (each with its `start` and `end` in seconds and its confidence), `error`; and `alternatives`,
    the best so many of a beam.

    A recording that cannot be read gets a row with its error. What a killed run has done is not done again, where the
    same is asked for; the file is then the same as if nothing had been.
    """
    options = options or DecodingOptions()
    _check_free(out, recordings)
    model = load_trained(model_folder).to(World().device)
    warn_unless_finished(model_folder)
    if options.log_probs:
        write_inside(options.log_probs / "vocab.json", (model_folder / "vocab.json").read_bytes())
    with closing(Progress(out, _digest(model_folder, model.normalize, recordings, options))) as progress:
        left = recordings[progress.rows :]
        failed = progress.failed
        with tqdm(total=len(recordings), initial=progress.rows, unit="file", desc="transcribing") as bar:
            for chunk in chunk_by_memory(read_ahead(load, iter(left), READERS)):
                rows = _read_chunk(model, chunk, options)
                failed += sum(row["error"] is not None for row in rows)
                progress.write(rows, failed)
                bar.update(len(rows))
        progress.finish()
    done = f"{out}: {counted(len(recordings) - failed, 'recording')} transcribed"
    print(done + (f", {failed:,} failed" if failed else ""))
    return failed


def _check_free(out: Path, recordings: Sequence[Recording]) -> None:
    """Raise StreamtrainError if the file is there: it does not tell by which model, so it is not written over."""
    place = file_to_replace(out)
    if place is None or not place.is_file() or not place.stat().st_size:
        return
    try:
        rows = [parse_json(line) for line in read_document(place, LARGE_BYTES).splitlines()]
        same = [row["audio_path"] for row in rows] == [recording.audio_path for recording in recordings]
    except (ValueError, TypeError, KeyError):
        same = False
    said = f"holds all these {len(recordings):,} recordings: it is done already" if same else "holds something else"
    raise StreamtrainError(f"{out}: {said}", "name another file; or delete it, to transcribe them (anew)")


class _State(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    digest: str
    rows: Size
    bytes: Size
    failed: Size


_STATE = TypeAdapter(_State)


class Progress:
    """The rows that were written so far, of a file under another name until they are all there."""

    def __init__(self, out: Path, digest: str) -> None:
        self._out, self._digest = out, digest
        self._held = ExitStack()
        self.rows = self.failed = 0
        self._place = place = file_to_replace(out)
        if place is None:  # a device or a pipe: what went there stays there, and a later run begins anew
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
                f"{out}: another run is writing it{error.holder}", f"wait for it, or name another file{error.remedy}"
            ) from error
        size = 0
        if self._state.is_file() and self._partial.is_file():
            try:
                state = parse(read_document(self._state), _STATE)
                if state["digest"] == digest and self._partial.stat().st_size >= state["bytes"]:
                    self.rows, self.failed, size = state["rows"], state["failed"], state["bytes"]
            except ValueError:
                pass  # a state that was cut off says nothing: begin anew
            if not self.rows:
                print(f"{self._partial}: what an earlier run has done is of another request; all is done anew")
        if self.rows:
            print(f"going on after {counted(self.rows, 'recording')} that an earlier run has done")
        self._file.truncate(size)

    def write(self, rows: Sequence[dict[str, Any]], failed: int) -> None:
        """Rows that a later run need not make again once this has returned."""
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
        """Let other runs write the file, finished or not. Rows that were written stay, for the next run to go on."""
        if self._place is not None and not self.rows:
            self._partial.unlink(missing_ok=True)
        with explaining(self._out):  # what could not be written is tried once more
            self._held.close()


def load(recording: Recording) -> LoadedRecording:
    """Decode a recording and cut what is too long. What is wrong with it is told in `error`.

    Raises StoreError where the place it comes from fails, which is no fault of the recording.
    """
    try:
        loaded = recording.load()
        pieces: list[Waveform] = []
        starts: list[float] = []
        for piece in loaded:
            waveform, _ = decode(piece.audio, prove=True)
            for start, segment in split_at_pauses(waveform):
                pieces.append(segment)
                starts.append(piece.start_sec + start / SAMPLE_RATE)
        name = loaded[0].utterance_id or recording.utterance_id
        return LoadedRecording(recording, name, tuple(pieces), tuple(starts))
    except (AudioError, MissingError, ShardError) as error:
        said = error.message
    except OSError as error:
        said = str(error.strerror or error)
    return LoadedRecording(recording, recording.utterance_id, error=said)


def _read_chunk(model: CTCModel, sounds: Sequence[LoadedRecording], options: DecodingOptions) -> list[dict[str, Any]]:
    pieces = [piece for sound in sounds for piece in sound.pieces]
    heard = iter(_read_pieces(model, pieces, options))
    return [_row(sound, [next(heard) for _ in sound.pieces], model, options) for sound in sounds]


def _read_pieces(model: CTCModel, pieces: Sequence[Waveform], options: DecodingOptions) -> list[Transcript]:
    """Each piece, in batches of like length."""
    heard: dict[int, Transcript] = {}
    seconds = options.batch_seconds or usual_batch_seconds(model)
    for batch in plan_evaluation([len(piece) for piece in pieces], seconds):
        log_probs, frames = compute_log_probs(model, [pieces[i] for i in batch])
        hypotheses = decode_log_probs(log_probs, frames, model.vocab, options.beam)
        rows = log_probs.cpu().numpy()
        for i, row, length, hypothesis in zip(batch.tolist(), rows, frames.tolist(), hypotheses, strict=True):
            words = word_timestamps(row[:length], hypothesis.text, model.vocab)
            heard[i] = Transcript(hypothesis, words, row[:length].copy() if options.log_probs else None)
    return [heard[i] for i in range(len(pieces))]


def _row(
    sound: LoadedRecording, heard: Sequence[Transcript], model: CTCModel, options: DecodingOptions
) -> dict[str, Any]:
    """The row of a recording, from its pieces."""
    track, frame_sec = model.vocab.track, model.frame_samples / SAMPLE_RATE
    row: dict[str, Any] = {"utterance_id": sound.utterance_id, "audio_path": sound.recording.audio_path}
    if sound.error is not None:
        return row | {TRACKS[track]: "", "confidence": 0.0, "words": [], "error": sound.error}
    hypotheses = [piece.hypothesis for piece in heard]
    shares = [len(piece) / sum(map(len, sound.pieces)) for piece in sound.pieces]
    row |= {
        TRACKS[track]: join_texts([hypothesis.text for hypothesis in hypotheses]),
        "confidence": round(sum(one.confidence * share for one, share in zip(hypotheses, shares, strict=True)), 4),
        "words": [
            _timed(word, start, frame_sec)
            for piece, start in zip(heard, sound.starts, strict=True)
            for word in piece.words
        ],
        "error": None,
    }
    if options.nbest:
        joined = join_nbest([hypothesis.nbest for hypothesis in hypotheses])
        row["nbest"] = [asdict(one) for one in joined[: options.nbest]]
    if options.log_probs:
        kept = np.concatenate([piece.log_probs for piece in heard if piece.log_probs is not None])
        array = io.BytesIO()
        np.save(array, kept.astype(np.float16))
        write_inside(options.log_probs / f"{escape_key(sound.utterance_id)}.npy", array.getvalue())
    return row


def _timed(word: Word, start_sec: float, frame_sec: float) -> dict[str, Any]:
    return {
        "word": word.text,
        "start": round(start_sec + word.first_frame * frame_sec, 3),
        "end": round(start_sec + word.end_frame * frame_sec, 3),
        "confidence": round(word.confidence, 4),
    }


def _digest(model: Path, normalize: bool, recordings: Sequence[Recording], options: DecodingOptions) -> str:
    """Of all that decides the rows."""
    state = xxhash.xxh3_128()
    for name in ("config.json", "model.safetensors", "vocab.json"):
        with open(model / name, "rb") as file:
            while data := file.read(2**23):
                state.update(data)
    for recording in recordings:
        state.update(f"{recording.utterance_id}\0{recording.audio_path}\0{recording.stamp}\n".encode())
    state.update(repr((options, normalize)).encode())
    return state.hexdigest()
