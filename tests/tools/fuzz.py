"""Documents that are nearly right, for each reader of them: `python -m tests.tools.fuzz N [KIND …]` tries N for each.

A reader returns what can be used, or raises an error of ours, within 2 s of CPU time and 200 MB; whatever else it
does is a fault.
"""

import base64
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import xxhash
import zstandard
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from sharding.audio.vad import Stretch
from sharding.build.external import TarJob, index_tar
from sharding.build.pipeline import RunOptions, _exceptions_of, build
from sharding.errors import AudioError, StreamtrainError
from sharding.files.exclusive import parse_holder, this_process
from sharding.labels.policy import policy_of
from sharding.report import files as report
from sharding.report.ledger import write_ledger
from sharding.report.summary import render
from sharding.segment.cuts import Cut
from sharding.segment.evidence import read_alignments
from sharding.segment.split import LabelThresholds, words_by_evidence
from sharding.shardset.build_config import BuildConfig
from sharding.shardset.index import read_checked, read_index, read_index_headers, read_shard_index
from sharding.shardset.sample import escape_key, sample_from_bytes
from sharding.shardset.store import FolderStore
from sharding.shardset.verify import check_shard
from sharding.sources import archive as archives
from sharding.sources import parquet
from sharding.sources.manifest import read_source
from sharding.sources.options import ManifestOptions
from streamtrain.config import ModelConfig, load_config
from streamtrain.eval.compare import compare_folders
from streamtrain.eval.score import score_files
from streamtrain.infer.export import _model_card
from streamtrain.infer.inputs import Recording, find_recordings
from streamtrain.infer.transcribe import Progress, load
from streamtrain.model.checksums import check_sums
from streamtrain.model.pretrained import load_model, load_trained, save_model
from streamtrain.model.tokenizer import load_vocab
from streamtrain.model.vocab import vocab_of
from streamtrain.run_status import RESULT_NAME, RunResult, read_result, write_result
from streamtrain.submission.package import _check_rows, _field_of
from streamtrain.training.checkpoint import RunState, read_checkpoint
from streamtrain.training.checkpoint import _digest as digest_state
from streamtrain.training.mirror import _read_pointer
from streamtrain.training.run_log import read_log
from streamtrain.training.step_row import StepRow
from tests.tools.corpus import MANIFEST, PHONES, make_corpus

LONGEST_SEC, MOST_BYTES = 2.0, 200 * 2**20
HOSTILE = [None, -1, 0, 2**31, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), -1e308, True, "", "../x", "\0",
           "/dev/zero", "x" * 10_000, [], [[]], {}, {"": None}, [None] * 1_000]  # fmt: skip

RATES = {
    "metric": "cer",
    "profile": "pasketti",
    "units": "characters",
    "cer": 0.5,
    "wer": 0.5,
    "interval_95": [0.1, 0.9],
}


@dataclass(frozen=True)
class Document:
    """A file that is right, how it is packed, and what reads it from its place."""

    path: Path
    read: Callable[[], object]
    unpack: Callable[[bytes], bytes] = bytes
    pack: Callable[[bytes], bytes] = bytes


# --- how a document is spoilt --------------------------------------------------------------------------------------


def spoil(data: bytes, kind: str, first: int, second: int) -> bytes:
    """Return other bytes; the numbers choose where, and what instead."""
    place = first % max(len(data), 1)
    if kind == "flip" and data:
        return data[:place] + bytes([data[place] ^ 1 << second % 8]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + random.Random(second).randbytes(second % 50) + data[place:]
    if kind == "stretch":  # by what no packing makes short
        return data[:place] + base64.b64encode(random.Random(second).randbytes(2**20)) + data[place:]
    if kind == "nest":
        depth, bracket = [10, 500, 100_000][second % 3], [b"[", b'{"a":', b'[{"a":'][second % 5 % 3]
        return data[:place] + bracket * depth + data[place:] if second % 2 else bracket * depth
    if kind == "repeat":
        return data + data[place:] * (second % 100)
    return _replace(data, first, second)


def _replace(data: bytes, first: int, second: int) -> bytes:
    """Another value at one place of a JSON document, or of one of its lines; a field more, or one less."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    line = first % len(lines)
    try:
        document = json.loads(lines[line])
    except ValueError:
        return data
    places = list(_places(document))
    if not places:
        return json.dumps(HOSTILE[second % len(HOSTILE)]).encode()
    node, key = places[first // len(lines) % len(places)]
    if second % 7 == 0:
        del node[key]
    elif second % 7 == 1 and isinstance(node, dict):
        node["more"] = HOSTILE[second // 7 % len(HOSTILE)]
    else:
        node[key] = HOSTILE[second // 7 % len(HOSTILE)]
    lines[line] = json.dumps(document).encode()
    return b"\n".join(lines)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


SPOILT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "stretch", "nest", "repeat", "replace", "replace", "replace", "replace"]),
    st.integers(0, 2**32), st.integers(0, 2**32), st.booleans(),
)  # fmt: skip


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory since its peak was last begun again."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def attempt(document: Document, spoilt: tuple[str, int, int, bool]) -> str:
    """Read a spoilt document, and put the right one back: "read" or "refused". Anything else raises."""
    kind, first, second, inside = spoilt
    whole = document.path.read_bytes()
    data = document.pack(spoil(document.unpack(whole), kind, first, second)) if inside else spoil(
        whole, kind, first, second)  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is in use
    started, memory = time.process_time(), peak_memory()
    try:
        document.path.write_bytes(data)
        document.read()
        outcome = "read"
    except StreamtrainError:
        outcome = "refused"
    finally:
        document.path.write_bytes(whole)
    grown = peak_memory() - memory
    lasted = time.process_time() - started
    assert lasted < LONGEST_SEC * (1 + (sys.gettrace() is not None)), f"{lasted:.1f} s"  # coverage traces each line
    assert grown < MOST_BYTES, f"{grown:,} bytes"
    return outcome


# --- what is read --------------------------------------------------------------------------------------------------


def make_documents(folder: Path) -> dict[str, Document]:
    """Write a document of each kind below a folder."""
    shards = folder / "shards"
    build(
        [make_corpus(folder / "corpus")], str(shards), BuildConfig(num_buckets=2, shard_mb=0.1), RunOptions(workers=1)
    )
    store = FolderStore(shards)
    index = read_index(store)
    name, settings_of_tests = index.shards[0].name, folder / "config.json"
    tar = shards / name
    unpack, pack = zstandard.decompress, zstandard.compress
    files = {
        name: folder / name for name in ("sample", "aligned", "predicted", "actual", "set", "holder", "newest.json")
    }
    files["sample"].write_bytes(tar.read_bytes()[: int(index.samples["bytes"][0])])
    piece = {"gap": 1.5}
    word = {"word": "a", "start": 0.1, "end": 0.2, "confidence": 0.9, "evidence": 3.0, "order": 1.0}
    cut = {"at": 0.5, "words_before": 1, "probability": 0.9, "inside": 0.1}
    row = {"utterance_id": "a", "text": "a b", "seconds": 1.0, "cuts": [cut], "pieces": [piece] * 2,
           "words": [word, word | {"start": 0.6, "end": 0.8}], "without": [2.0], "log_prob": -0.1,
           "error": None}  # fmt: skip
    lines = (json.dumps(row | {"utterance_id": str(number)}) + "\n" for number in range(9))
    files["aligned"].write_bytes(pack("".join(lines).encode()))
    for each in ("predicted", "actual"):
        rows = ({"utterance_id": str(number), "phonetic_text": "kæt"} for number in range(9))
        files[each].write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings_of_tests.write_bytes((Path(__file__).parents[2] / "configs" / "zero2.json").read_bytes())
    files["set"].write_text("data.speed_factors=[0.9, 1, 1.1]")
    files["holder"].write_text(json.dumps(this_process()))
    files["newest.json"].write_text(json.dumps({"checkpoint": "step-1", "files": {"a": ["pieces/1"], "b": []}}))
    card, vocab, checkpoint = folder / "card", folder / "vocab", folder / "step-0000001"
    for place in (card, vocab, checkpoint):
        place.mkdir()
    counts = {"substitutions": 1, "deletions": 0, "insertions": 0, "reference_length": 3}
    clip = {"utterance_id": "a", "child_id": "c", "session_id": "", "corpus": "m", "age_bucket": "", "seconds": 1.0,
            "decoded": True, "reference": "kæt", "hypothesis": "kæp", "confidence": 0.9, "counts": counts,
            "words": counts}  # fmt: skip
    said = RATES | {
        "speakers": 2,
        "clips": 2,
        "split": "valid",
    }
    (card / "scorecard.json").write_text(json.dumps(said))
    clips = (clip | {"utterance_id": str(number), "child_id": str(number % 3)} for number in range(9))
    (card / "hypotheses.jsonl").write_text("".join(json.dumps(one) + "\n" for one in clips))
    ids = {token: number for number, token in enumerate(vocab_of(policy_of("pasketti")).tokens)}
    (vocab / "vocab.json").write_text(json.dumps(ids))
    settings = {"batch_seconds": 4.0, "micro_batches_per_step": 2, "shuffle_shards": 2, "length_jitter": 0.0, "seed": 0,
                "speed_factors": [1.0], "gain_db": 0.0}  # fmt: skip
    state = vars(RunState({}, "", 2, best_score=0.5, best_step=1)) | {"completed": [{"settings": settings, "steps": 1}]}
    written = {"state": state, "scalars": {"optimizer_steps": 1.0, "loss_scaler": {}},
               "files": {"model.safetensors": {"bytes": 1, "checksum": "0"}}}  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(written | {"digest": digest_state(written)}))

    def read_set() -> None:
        index = read_index(store)
        _exceptions_of(index)  # as an append does
        if not index.external:
            BuildConfig(**index.settings)  # as a repair does
        list(read_index_headers(store))
        check_shard(store, read_checked(store, index.shards[0]), index.labels)

    def pack_columns(data: bytes) -> bytes:
        columns = pack(data)
        document = json.loads((shards / "index.json").read_bytes())
        document["samples"]["checksum"] = xxhash.xxh3_64_hexdigest(columns)
        (shards / "index.json").write_bytes(with_digest(json.dumps(document).encode()))
        return columns

    (shards / report.CHECKSUMS_NAME).unlink()  # which refuse all else before it is looked at

    def show_and_append_to_ledger() -> None:
        if summary := report.read_summary(store, index):  # what is read can be shown
            render(summary, store.url)
        try:
            rows, _ = report.archive_report(store, index)
            write_ledger(row for row in rows if escape_key(row["utterance_id"]))
        finally:
            report.drop_archived(store, index)

    def label_pieces() -> None:
        stretches = [Stretch(0, 7_000, voiced=True), Stretch(9_000, 16_000, voiced=True)]
        for evidence in read_alignments(files["aligned"]).by_id.values():
            for text in ("a b", ""):
                cuts = [Cut(position, 1.0, forced=False) for position in evidence.cuts]
                if not evidence.why_unusable(text, evidence.cuts) and evidence.cuts == (8_000,):
                    words_by_evidence(text, evidence, cuts, stretches, 16_000, LabelThresholds(max_gap=9.0))

    return {
        "index.json": Document(shards / "index.json", read_set, bytes, with_digest),
        "samples.bin.zst": Document(shards / index_columns(shards), read_set, unpack, pack_columns),
        ".idx.zst": Document(tar.with_suffix(".idx.zst"), partial(read_shard_index, store, name), unpack, pack),
        "sample": Document(files["sample"], lambda: sample_from_bytes(files["sample"].read_bytes(), PHONES)),
        "ledger": Document(shards / report.LEDGER_NAME, show_and_append_to_ledger, unpack, pack),
        "alignments": Document(files["aligned"], label_pieces, unpack, pack),
        "predicted": Document(files["predicted"], partial(score_files, files["predicted"], files["actual"])),
        "scorecard.json": Document(card / "scorecard.json", partial(compare_folders, card, card)),
        "hypotheses.jsonl": Document(card / "hypotheses.jsonl", partial(compare_folders, card, card)),
        "--config": Document(settings_of_tests, partial(load_config, settings_of_tests)),
        "--set": Document(files["set"], lambda: load_config(
            settings_of_tests, [files["set"].read_bytes().decode(errors="surrogateescape")])),
        "state.json": Document(
            checkpoint / "state.json", partial(read_checkpoint, checkpoint), bytes, with_state_digest),
        "vocab.json": Document(vocab / "vocab.json", partial(load_vocab, vocab)),
        "newest.json": Document(files["newest.json"], partial(_read_pointer, FolderStore(folder))),
        "lock": Document(files["holder"], lambda: parse_holder(files["holder"].read_bytes())),
        **documents_of_others(folder / "others", tar), **documents_of_a_model(folder / "run"),
        **documents_of_a_submission(folder / "submission"),
    }  # fmt: skip


def documents_of_others(folder: Path, shard: Path) -> dict[str, Document]:
    """Transcripts in each form, tars, zips and audio: what nobody here has written."""
    corpus = make_corpus(folder / "corpus", clips=4)
    manifest, found = corpus / MANIFEST, {}

    def read_rows(path: Path) -> None:
        source = read_source(path, ManifestOptions("pasketti"))
        for row in range(len(source)):
            source.parse(row)
        find_recordings([str(path)])

    rows = list(map(json.loads, manifest.read_bytes().splitlines()))
    table = "\n".join(",".join(json.dumps(cell) if isinstance(cell, str) else str(cell) for cell in line)
                      for line in [list(rows[0]), *(list(row.values()) for row in rows)])  # fmt: skip
    texts = {
        "jsonl": manifest.read_bytes(),
        "csv": table.encode(),
        "tsv": table.replace(",", "\t").replace('"', "").encode(),
    }
    for kind, suffix, unpack, pack in (
        ("jsonl", "", bytes, bytes), ("csv", "", bytes, bytes), ("tsv", "", bytes, bytes),
        ("jsonl", ".gz", gzip.decompress, gzip.compress), ("csv", ".zst", zstandard.decompress, zstandard.compress),
    ):  # fmt: skip
        path = corpus / f"rows.{kind}{suffix}"
        path.write_bytes(pack(texts[kind]))
        found[f"transcripts.{kind}{suffix}"] = Document(path, partial(read_rows, path), unpack, pack)
    manifest.unlink()
    sound = next((corpus / "audio").iterdir())
    with tarfile.open(folder / "theirs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            document = json.dumps({"text": "kæt", "child_id": 7, "snr": float("nan"), "more": {"a": [1]}}).encode()
            for name, data in ((f"ä{number}.flac", sound.read_bytes()), (f"ä{number}.json", document)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    job = TarJob(str(folder), "theirs.tar", "valid", PHONES, 25.0)
    found["tar"] = Document(folder / "theirs.tar", partial(index_tar, job))
    with zipfile.ZipFile(folder / "audio.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(sound, "audio/one.flac")
        archive.writestr("audio/two.flac", sound.read_bytes())

    def hear(recording: Recording) -> None:
        if error := load(recording).error:
            raise AudioError(error)

    def read_zip() -> None:
        for cache in (archives._is_archive, archives._open_archive, archives._read_members, archives._decomposed):
            cache.cache_clear()
        for recording in find_recordings([str(folder / "audio.zip")]):
            hear(recording)

    found["zip"] = Document(folder / "audio.zip", read_zip)
    found |= documents_of_layouts(folder / "layouts", sound.read_bytes())
    waveform, rate = soundfile.read(sound, dtype="float32")
    for suffix in ("flac", "wav", "aiff", "ogg", "mp3", "au", "w64", "caf"):
        path = folder / f"sound.{suffix}"
        soundfile.write(path, waveform, rate)
        recording = find_recordings([str(path)])[0]
        found[suffix] = Document(path, partial(hear, recording))
    return found


def documents_of_layouts(folder: Path, sound: bytes) -> dict[str, Document]:
    """A file of each layout of a corpus, beside the others of it, which stay whole."""
    cut = {"id": "c", "start": 0.1, "duration": 0.2, "type": "MonoCut",
           "supervisions": [{"id": name, "start": 0.0, "duration": 0.1, "text": "kæt", "speaker": 7} for name in "ab"],
           "recording": {"id": "r", "duration": 0.5, "sources": [{"type": "file", "source": "a.flac"}]}}  # fmt: skip
    texts = {
        "cuts/cuts_dev.jsonl": json.dumps(cut),
        "nemo/train.json": json.dumps({"audio_filepath": "a.flac", "offset": 0.1, "duration": 0.2, "text": "kæt"}),
        "kaldi/train/wav.scp": "r1 a.flac\nr2 a.flac",
        "kaldi/train/segments": "u1 r1 0 0.1\nu2 r2 0.1 -1",
        "kaldi/train/text": "u1 kæt\nu2 kæt tæk",
        "libri/dev-clean/1/2/1-2.trans.txt": "a kæt\nb tæk",
        "cv/train.tsv": "client_id\tpath\tsentence\tage\ns1\ta\tkæt\ttwenties\ns2\tb\t\t",
        "timit/TEST/DR1/FELC0/SX1.TXT": "0 16000 kæt tæk",
        "cv/test.tsv": "client_id\tpath\tsentence\tage\ns3\ta\tkæt\tteens",
    }
    for name in ("cuts/a.flac", "nemo/a.flac", "kaldi/a.flac", "libri/dev-clean/1/2/a.flac", "cv/clips/a.mp3",
                 "timit/TEST/DR1/FELC0/SX1.WAV"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound)

    def read(location: Path) -> None:
        source = read_source(location, ManifestOptions("pasketti"))
        for row in range(len(source)):
            source.parse(row)

    found = {}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", "utf-8")
        found[name] = Document(folder / name, partial(read, folder / name.split("/")[0]))
    cells = [{"bytes": sound, "path": "a.flac"}, {"bytes": None, "path": "b.flac"}, None]
    (folder / "hub/data").mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"audio": pyarrow.array(cells, kind), "text": ["kæt", "tæk", None], "speaker_id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "hub/data/train-00000-of-00001.parquet", row_group_size=2)
    found["parquet"] = Document(folder / "hub/data/train-00000-of-00001.parquet", partial(read_parquet, folder / "hub"))
    return found


def read_parquet(folder: Path) -> None:
    """Read the rows, and the audio of each."""
    archives._open_column.cache_clear()  # the file is another one each time
    parquet._kept.clear()
    source = read_source(folder, ManifestOptions("pasketti"))
    for row in range(len(source)):
        with suppress(AudioError), archives.open_audio(source.layout.audio, source.parse(row).audio_path) as (file, _):
            file.read()


def documents_of_a_model(run: Path) -> dict[str, Document]:
    """A trained model's folder, and what a run leaves beside it."""
    folder, found = run / "best", {}
    scratch = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
               "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    save_model(load_model(ModelConfig(scratch=scratch)).eval(), folder)
    sums = Document(folder / "SHA256SUMS", partial(check_sums, shutil.copytree(folder, run / "summed")))
    found["SHA256SUMS"] = replace(sums, path=run / "summed" / "SHA256SUMS")
    (folder / "SHA256SUMS").unlink()
    for name in (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "labels.json",
    ):
        found[name] = Document(folder / name, partial(load_trained, folder))
    pretrained = shutil.copytree(folder, run / "pretrained")
    found["vocab.json of others"] = Document(
        pretrained / "vocab.json", partial(load_model, ModelConfig(pretrained=str(pretrained)))
    )
    group = {"name": "a", "rate": 0.5, "clips": 2, "interval_95": [0.1, 0.9]}
    beside = {
        "scorecard.json": RATES | {"speakers": 2, "clips": 2,
                           "split": "valid", "shards": "data", "undecodable": [], "groups": {"corpus": [group]},
                           "validation": {"rejected": 1, "disjoint_by_speaker": False}},
        "training.json": {"model": {"dropout": 0.1}, "train": {"epochs": 2}, "data": {}, "deepspeed": {}},
        "trained_on.json": {"shards": "data", "index": "0", "clips": 2, "hours": 1.5, "rejected": 1},
    }  # fmt: skip
    for name, document in beside.items():
        (run / name).write_text(json.dumps(document))
        found[f"card's {name}"] = Document(run / name, partial(_model_card, run, "name", None))
    write_result(run, RunResult(3, "train.max_steps=3", 0.5, 2))
    found["finished.json"] = Document(run / RESULT_NAME, partial(read_result, run))
    names = [field.name for field in fields(StepRow)]
    (run / "log.csv").write_text("\n".join([",".join(names), *[",".join("1" * len(names))] * 3, ""]))
    found["log.csv"] = Document(run / "log.csv", partial(read_log, run / "log.csv"))
    return found


def documents_of_a_submission(folder: Path) -> dict[str, Document]:
    """What a rehearsal reads, and what an interrupted `transcribe` leaves."""
    (folder / "data").mkdir(parents=True)
    (folder / "submission").mkdir()
    (folder / "submission.json").write_text(json.dumps({"field": "phonetic_text", "normalize": True}))
    rows = "".join(json.dumps({"utterance_id": str(number), "phonetic_text": "kæt"}) + "\n" for number in range(9))
    form, out = folder / "data" / "submission_format.jsonl", folder / "submission" / "submission.jsonl"
    for path in (form, out):
        path.write_text(rows)
    state, partly = folder / ".out.jsonl.part.json", folder / ".out.jsonl.part"
    state.write_text(json.dumps({"digest": "0", "rows": 2, "bytes": 4, "failed": 1}))

    def go_on() -> None:
        partly.write_bytes(b"{}\n{}\n")
        with redirect_stdout(None):
            Progress(folder / "out.jsonl", "0").close()

    return {
        "submission.json": Document(folder / "submission.json", partial(_field_of, folder / "submission.json")),
        "submission_format.jsonl": Document(form, partial(_check_rows, folder, "phonetic_text")),
        "submission.jsonl": Document(out, partial(_check_rows, folder, "phonetic_text")),
        "transcribe's state": Document(state, go_on),
    }


def index_columns(shards: Path) -> str:
    return str(json.loads((shards / "index.json").read_bytes())["samples"]["name"])


def with_digest(data: bytes) -> bytes:
    """An index under the digest that it has by its bytes, if it is one."""
    with suppress(ValueError, TypeError, RecursionError):
        document = json.loads(data)
        undigested = json.dumps(document | {"digest": ""}).encode()
        digest = hashlib.sha256(undigested).hexdigest()
        return undigested.replace(b'"digest": ""', f'"digest": "{digest}"'.encode())
    return data


def with_state_digest(data: bytes) -> bytes:
    with suppress(ValueError, TypeError, RecursionError, AttributeError):
        document = json.loads(data)
        document.pop("digest", None)
        return json.dumps(document | {"digest": digest_state(document)}).encode()
    return data


def try_all(document: Document, examples: int, derandomize: bool) -> Counter[str]:
    """Try so many spoilt documents on a reader; returns how many were read, and how many refused."""
    document.read()  # what is right is read, and brings along the libraries that it needs
    outcomes: Counter[str] = Counter()

    phases = [Phase.explicit, Phase.generate, Phase.shrink]

    @settings(max_examples=examples, derandomize=derandomize, deadline=None, database=None, phases=phases,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(SPOILT)
    @example(("nest", 0, 2, True))  # a hundred thousand brackets
    @example(("nest", 0, 8, True))
    @example(("cut", 0, 0, False))  # an empty file
    @example(("repeat", 0, 99, True))
    def run(spoilt: tuple[str, int, int, bool]) -> None:
        outcomes[attempt(document, spoilt)] += 1

    run()
    return outcomes


def main() -> None:
    np.seterr(all="ignore")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        documents = make_documents(Path(name))
        for kind, document in {kind: documents[kind] for kind in sys.argv[2:] or documents}.items():
            try:
                outcomes = try_all(document, int(sys.argv[1]), derandomize=False)
                print(f"{kind:>18}: {outcomes.total():,} tried, {dict(outcomes)}", flush=True)
            except BaseException as error:
                failed = True
                print(
                    f"{kind:>18}: {type(error).__name__}: {str(error)[:300]}",
                    *getattr(error, "__notes__", []),
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
