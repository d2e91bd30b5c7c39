"""Package a model as the challenge's submission, a zip that runs without this package, and rehearse its run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE, encode
from sharding.errors import StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, parse, parse_row, read_document
from sharding.files.writing import written
from sharding.labels.policy import policy_of
from sharding.labels.profiles import PROFILES, TRACKS
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.sample import escape_key
from sharding.shardset.store import open_store
from streamtrain.eval.score import score_files
from streamtrain.model.labels import field_of
from streamtrain.model.pretrained import load_trained
from streamtrain.run_status import warn_unless_finished

HERE = Path(__file__).parent
CONTRACT = "Python 3.11, torch 2.9.1, transformers 4.57.6"
RUNTIME = ("torch", "transformers", "soundfile", "numpy", "safetensors", "soxr")  # of its machine's packages
MODEL_FILES = ("config.json", "model.safetensors", "vocab.json")
TAKEN_ALONG = {  # a submission reads audio, cuts, infers and decodes with the same files
    "sharding": ("__init__.py", "errors.py", "audio/__init__.py", "audio/codec.py", "audio/containers.py",
                 "audio/flac.py", "audio/libflac.py", "audio/vad.py", "labels/__init__.py", "labels/units.py",
                 "segment/__init__.py", "segment/cuts.py"),
    "streamtrain": ("__init__.py", "model/__init__.py", "model/batches.py", "model/ctc.py", "model/decode.py",
                    "model/inference.py", "model/vocab.py"),
    "silero_vad": ("__init__.py", "model.py", "utils_vad.py", "data/__init__.py", "data/silero_vad.jit"),
}  # fmt: skip
NO_DATE = (1980, 1, 1, 0, 0, 0)  # the same model gives the same zip

CLIPS, SPEECH_SEC, LIMIT_SEC = 77_011, 38.4 * 3600, 2 * 3600  # the hidden test set, and the time limit of its run
MAX_LINES, MAX_COLUMNS = 500, 300  # limits of its log
REHEARSED_CLIPS = 200
REHEARSAL_LIMIT_SEC = 3600
SYNTHETIC_SEC = (0.01, 0.025, 0.03, 0.3, 1.1, 1.1, 1.2, 2.0, 4.4, 6.5, 12.6, 24.9, 25.1, 61.0)


class PackageError(StreamtrainError):
    """Report a submission that breaks the challenge's contract; the message names the clause."""


class _Settings(TypedDict):
    """Describe what is read from submission.json."""

    field: Literal["phonetic_text", "orthographic_text"]


_SETTINGS = TypeAdapter(_Settings)


@dataclass(frozen=True)
class Rehearsal:
    """Hold the results of a submission on some clips, run as the challenge would run it."""

    clips: int
    speech_sec: float
    ready_sec: float  # from its start until the model is loaded, imports included
    work_sec: float  # from then to its end
    device: str
    versions: str  # of Python, torch and transformers
    log_lines: int
    rate: float | None  # CER or WER, if the labels are known
    left_out: int  # recordings of the shard set that are not in it, as the build split them
    unread: int
    in_part: int  # incomplete clips; their text is of what decodes

    @property
    def projected_sec(self) -> float:
        """Return the projected seconds for the whole test set, on a machine like this one."""
        return self.ready_sec + self.work_sec / max(self.speech_sec, 1e-9) * SPEECH_SEC


def package(model: Path, out: Path, batch_seconds: float | None = None) -> str:
    """Write `out`, a zip with main.py at its root and the model beside it. Returns the profile of its texts.

    `batch_seconds` are the padded seconds of a forward; None: chosen by the machine. Raises StreamtrainError if the
    folder holds no complete model.
    """
    loaded = load_trained(model)
    warn_unless_finished(model)
    profile = loaded.labels.profile if loaded.labels else ""
    if profile not in TRACKS.values():
        raise PackageError(
            f"{model}: its labels are of profile {profile or 'unknown'}, not one of the challenge's",
            f"train on shards of profile {' or '.join(TRACKS.values())}",
        )
    if loaded.labels and (foreign := set(loaded.labels.symbols) - set(PROFILES[profile].symbols)):
        raise PackageError(f"{model}: writes symbols that are not allowed: {', '.join(sorted(foreign)[:10])}",
                           f"train on shards of profile {profile} with its own alphabet and units")  # fmt: skip
    settings = {
        "field": field_of(loaded.labels),
        "normalize": loaded.normalize,
        "batch_seconds": batch_seconds,
        "vocab": asdict(loaded.vocab),
    }
    files = {
        "main.py": (HERE / "main.py").read_bytes(),
        "submission.json": json.dumps(settings, ensure_ascii=False, indent=1).encode(),
    }
    for name, parts in TAKEN_ALONG.items():
        files |= {f"{name}/{part}": (_folder_of(name) / part).read_bytes() for part in parts}
    with written(out) as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(_member(name), data, zipfile.ZIP_DEFLATED)
        for name in MODEL_FILES:
            with (
                open(model / name, "rb") as source,
                archive.open(_member(f"model/{name}"), "w", force_zip64=True) as target,
            ):
                shutil.copyfileobj(source, target)
    return profile


def _folder_of(name: str) -> Path:
    """Return the folder of a package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise PackageError(f"{name} is not installed, and its files are part of a submission")
    return Path(spec.origin).parent


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, NO_DATE)
    member.external_attr = 0o644 << 16  # readable by everyone, whoever unpacks it
    return member


def rehearse(archive: Path, data: str | None = None, python: str = sys.executable) -> Rehearsal:
    """Run and check a submission as the challenge does: unpacked, offline, with the runtime's packages alone.

    `data` is a folder in the challenge's layout, or a shard set (its validation clips are used); None: noise.
    `python` may be an interpreter that has the runtime's exact versions. Raises PackageError if the contract is
    broken.
    """
    with tempfile.TemporaryDirectory(prefix="submission-") as name:
        folder = Path(name)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        field = _field_of(folder / "submission.json")
        labels, left_out = _lay_out(folder / "data", data, field)
        started = time.monotonic()
        log, work_sec, speech_sec = _run(folder, python)
        total_sec = time.monotonic() - started
        rows = _check_rows(folder, field)
        ready = re.search(r"^ready: on (\w+) after ([\d.]+) s(?:, (.*))?$", log, re.MULTILINE)
        unread = re.search(r"([\d,]+) clips unread, ([\d,]+) in part", log)
        if ready is None or unread is None:
            raise PackageError(f"main.py logs no line with `ready: …` or none with `… clips unread`:\n{log[-2000:]}")
        work_sec -= float(ready[2])
        lines = log.splitlines()
        if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_COLUMNS:
            raise PackageError(f"its log has {len(lines)} lines of up to {max(map(len, lines))} characters")
        rate = None
        if labels is not None:
            rate = next(iter(score_files(folder / "submission" / "submission.jsonl", labels).values()))
        return Rehearsal(
            clips=rows,
            speech_sec=speech_sec,
            ready_sec=max(total_sec - work_sec, 0.0),
            work_sec=work_sec,
            device=ready[1],
            versions=ready[3] or "versions unknown",
            log_lines=len(lines),
            rate=rate,
            left_out=left_out,
            unread=int(unread[1].replace(",", "")),
            in_part=int(unread[2].replace(",", "")),
        )


def render(done: Rehearsal, profile: str) -> str:
    rate = "" if done.rate is None else f", {'WER' if profile == 'english' else 'CER'} {done.rate:.4f}"
    if done.left_out:
        rate += f" without {counted(done.left_out, 'recording')} that the build split"
    within = "within" if done.projected_sec < LIMIT_SEC else "ABOVE"
    return (
        f"rehearsed offline on {done.clips:,} clips ({done.speech_sec:,.0f} s of speech, {done.unread} unread, "
        f"{done.in_part} in part){rate}\n"
        f"with {done.versions}; the challenge has {CONTRACT} (set --python to an interpreter that has them)\n"
        f"every id once and in order, only allowed symbols, {done.log_lines} lines of log\n"
        f"the test set ({CLIPS:,} clips, {SPEECH_SEC / 3600:g} h) would take {done.projected_sec / 60:,.0f} minutes on "
        f"this machine's {done.device}: {within} the limit of {LIMIT_SEC / 3600:g} hours on an A100"
    )


def _run(folder: Path, python: str) -> tuple[str, float, float]:
    """Run main.py; return its log, and from its last line the seconds that it took and the seconds of speech."""
    variables = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        variables["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    command = [python, "-I", str(HERE / "sandbox.py"), ",".join(RUNTIME), "main.py"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=variables, text=True, timeout=REHEARSAL_LIMIT_SEC,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"main.py cannot be run by {python}: {error}") from error
    summary = re.search(r"^done: .*?([\d.]+) s of speech, ([\d.]+) s$", done.stdout, re.MULTILINE)
    if done.returncode or summary is None:
        raise PackageError(f"main.py ended with status {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout, float(summary[2]), float(summary[1])


def _field_of(settings: Path) -> str:
    """Return the field that the rows have besides the id."""
    try:
        return parse(read_document(settings), _SETTINGS)["field"]
    except (OSError, DocumentError) as error:
        raise PackageError(f"{settings.name}: {error}", "`package` writes the archive") from error


def _check_rows(folder: Path, field: str) -> int:
    """Return the number of rows. Raises PackageError if they do not match the format file."""
    out = folder / "submission" / "submission.jsonl"
    if not out.is_file():
        raise PackageError("main.py wrote no submission/submission.jsonl")
    wanted = [row["utterance_id"] for row in _read_rows(folder / "data" / "submission_format.jsonl")]
    rows = list(_read_rows(out))
    actual = [row["utterance_id"] for row in rows]
    if actual != wanted:
        surplus, missing = Counter(actual) - Counter(wanted), Counter(wanted) - Counter(actual)
        raise PackageError(
            f"{len(actual):,} rows, {len(wanted):,} wanted; surplus {list(surplus)[:3]}, lacking {list(missing)[:3]}, "
            "or in another order"
        )
    labels = policy_of(next(profile for profile in TRACKS.values() if PROFILES[profile].field == field))
    for row in rows:
        if row.keys() != {"utterance_id", field} or not isinstance(row[field], str):
            raise PackageError(f"a row is {row}, utterance_id and {field} are wanted")
        if foreign := labels.foreign(row[field]):
            raise PackageError(f"{row['utterance_id']}: symbols that are not allowed: {labels.name(foreign)}")
    return len(rows)


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = read_document(path, LARGE_BYTES).split(b"\n")
    except (OSError, DocumentError) as error:
        raise PackageError(f"{path.name}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = parse_row(line) if line.strip() else None
        except DocumentError as error:
            raise PackageError(f"{path.name}:{number}: {error}") from error
        if row is None:
            continue
        if not isinstance(row.get("utterance_id"), str):
            raise PackageError(f"{path.name}:{number}: its utterance_id is missing or not text")
        yield row


# --- the data of a rehearsal ------------------------------------------------------------------------------------


def _lay_out(folder: Path, data: str | None, field: str) -> tuple[Path | None, int]:
    """Lay out `data/` as the challenge does; return a file with the labels, if they are known.

    Also returns how many of the chosen recordings of a shard set are left out, because the build split them.
    """
    if data is not None and (Path(data) / "submission_format.jsonl").is_file():
        folder.symlink_to(Path(data).resolve())
        return None, 0
    (folder / "audio").mkdir(parents=True)
    if data is None:
        _write_clips(folder, field, {f"U_{i:016x}": (audio, None) for i, audio in enumerate(_synthetic_clips())})
        return None, 0
    store = open_store(data)
    index = read_index(store)
    if index.labels.field != field or index.labels.profile not in TRACKS.values():
        raise PackageError(f"{data}: its labels are of profile {index.labels.profile!r}, the model outputs {field}")
    rows = index.split("valid")
    selected = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), REHEARSED_CLIPS)).astype(int))]
    samples = [read_sample(store, index, row) for row in selected.tolist()]
    clips = {sample.utterance_id: (sample.audio, sample.text) for sample in samples if sample.parent_id is None}
    if not clips:
        raise PackageError(f"{data}: has no uncut validation clip to rehearse on")
    left_out = {sample.parent_id for sample in samples if sample.parent_id is not None}
    return _write_clips(folder, field, clips), len(left_out)


def _write_clips(folder: Path, field: str, clips: Mapping[str, tuple[bytes, str | None]]) -> Path:
    labels = folder.parent / "labels.jsonl"
    with (
        open(folder / "submission_format.jsonl", "w", encoding="utf-8") as form,
        open(folder / "utterance_metadata.jsonl", "w", encoding="utf-8") as metadata,
        open(labels, "w", encoding="utf-8") as references,
    ):
        for name, (audio, text) in clips.items():
            audio_path = f"audio/{escape_key(name)}.flac"  # an id may be anything
            (folder / audio_path).write_bytes(audio)
            form.write(json.dumps({"utterance_id": name, field: ""}) + "\n")
            metadata.write(json.dumps({"utterance_id": name, "audio_path": audio_path}) + "\n")
            references.write(json.dumps({"utterance_id": name, field: text}, ensure_ascii=False) + "\n")
    return labels


def _synthetic_clips() -> Sequence[bytes]:
    """Return noise of all lengths, silence, and a file that is not audio."""
    random = np.random.default_rng(0)
    noise = [random.normal(0, 0.05, round(seconds * SAMPLE_RATE)).astype(np.float32) for seconds in SYNTHETIC_SEC]
    return [*map(encode, [*noise, np.zeros(SAMPLE_RATE, np.float32)]), b"not audio"]
