"""Carry out a plan in worker processes: cut long recordings, read the audio of every sample, write the shards.

Each clip is read once; its md5 check, its decoding and its copy use the same bytes.
"""

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import soundfile
import soxr

from sharding.audio.codec import SAMPLE_RATE, decode, decode_native, encode, is_constant
from sharding.build.lock import check_token
from sharding.errors import AudioError, MissingError, ShardError
from sharding.labels.ipa import label_remarks, read_label
from sharding.pool import count_done
from sharding.report.ledger import NO_LABEL, TOO_DENSE, LedgerPart, LedgerRow, ledger_row, rejected_row, write_ledger
from sharding.segment.acoustic_model import PhoneGMM, TrainingExample, example_of
from sharding.segment.evidence import Evidence
from sharding.segment.split import LabelThresholds, Segment, split_recording
from sharding.shardset.index import (
    FORMAT_VERSION,
    SampleTable,
    ShardRecord,
    read_shard_index,
    remove_shard,
    write_shard,
)
from sharding.shardset.sample import Sample, escape_key, piece_key
from sharding.shardset.schema import ShardEntry
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import check_shard
from sharding.sources.archive import AudioRoot, open_audio
from sharding.sources.manifest import Layout, Utterance

ENCODER_VERSIONS = (FORMAT_VERSION, soundfile.__libsndfile_version__, soxr.__version__)  # others may write other bytes


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Hold what every job of a build shares."""

    out: str  # URL of the shard set
    scratch: str  # URL of the place for segments not yet in a shard
    layouts: tuple[Layout, ...]
    track: str
    dry_run: bool  # do all the work, but write nothing
    token: str = ""  # of the build that holds OUT; empty if workers cannot outlive their build
    encoder_versions: tuple[int, str, str] = ENCODER_VERSIONS


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """Hold an unparsed row of a source, to be sent to a worker."""

    source: int
    number: int  # line number
    line: bytes

    def parse(self, layouts: Sequence[Layout]) -> Utterance:
        return layouts[self.source].parse(self.line, self.number)[0]


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Identify one segment of a long recording."""

    number: int
    count: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """Describe one sample to write."""

    row: ManifestLine
    bytes: int  # of the clip's audio file
    samples: int  # of the clip at 16 kHz, by its header
    piece: SegmentRef | None


@dataclass(frozen=True, slots=True)
class ShardJob:
    context: BuildContext
    name: str
    bucket: int
    split: str
    samples_planned: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class ShardResult:
    made: tuple[ShardEntry, SampleTable] | None  # None if every sample was refused
    ledger: LedgerPart  # of the whole clips; a split recording already has its row


@dataclass(frozen=True, slots=True)
class ExampleJob:
    context: BuildContext
    row: ManifestLine
    bytes: int  # of the recording's audio file


@dataclass(frozen=True, slots=True)
class CutJob:
    context: BuildContext
    row: ManifestLine
    bytes: int  # of the recording's audio file
    samples: int  # at 16 kHz, by its header
    split: str
    max_duration: float
    evidence: Evidence | None
    acoustic_model: PhoneGMM | None
    thresholds: LabelThresholds


@dataclass(frozen=True)
class CutResult:
    segments: tuple[Segment, ...]  # empty if the recording was refused
    ledger: LedgerPart


def read_example(job: ExampleJob) -> TrainingExample | None:
    """Return a labelled recording to train the acoustic model on, or None if it cannot be read."""
    utterance = job.row.parse(job.context.layouts)
    try:
        data = _read_audio(utterance, job.context.layouts[job.row.source].audio, job.bytes)
        waveform, _ = decode(data, prove=not utterance.md5_hash)
    except AudioError:  # reported when the recording is cut or written
        return None
    finally:
        count_done()
    return example_of(utterance.utterance_id, read_label(utterance.text, job.context.track), waveform)


def cut_recording(job: CutJob) -> CutResult:
    """Split one long recording and write its segments as FLAC files to the scratch place."""
    utterance = job.row.parse(job.context.layouts)
    text = read_label(utterance.text, job.context.track)
    try:
        data = _read_audio(utterance, job.context.layouts[job.row.source].audio, job.bytes)
        decoded = decode_native(data, prove=not utterance.md5_hash)
    except AudioError as error:
        row = rejected_row(utterance, job.split, error.message, job.samples / SAMPLE_RATE)
        return CutResult((), write_ledger([row]))
    finally:
        count_done()
    name, waveform, model = utterance.utterance_id, decoded.waveform, job.acoustic_model
    segments = tuple(split_recording(name, waveform, text, job.max_duration, None, job.evidence, model, job.thresholds))
    _check_worker(open_store(job.context.out), job.context)
    scratch, rows = open_store(job.context.scratch), []
    for number, segment in enumerate(segments):
        sample = _segment_sample(utterance, text, SegmentRef(number, len(segments), segment), job.split)
        start = round(segment.start_sec * SAMPLE_RATE)
        scratch.write(f"{sample.key}.flac", encode(waveform[start : start + segment.samples]))
        row = {"key": sample.key} | asdict(segment) | {"text": sample.text, "label_status": sample.label_status}
        del row["utterance_id"]
        rows.append(row)
    remarks = (*decoded.remarks, *label_remarks(utterance.text, job.context.track))
    row = ledger_row(utterance, job.split, "split", segments[-1].end_sec, pieces=rows, remarks=remarks)
    return CutResult(segments, write_ledger([row]))


def make_shard(job: ShardJob) -> ShardResult:
    """Write one shard, unless an interrupted build already wrote it completely from the same inputs."""
    store = open_store(job.context.out, dry_run=job.context.dry_run)
    _check_worker(store, job.context)
    planned = job.samples_planned
    utterances = [sample.row.parse(job.context.layouts) for sample in planned]
    templates = [_template(job, sample, utterance) for sample, utterance in zip(planned, utterances, strict=True)]
    inputs_digest = _digest_inputs(job, utterances)
    shard = _reuse_finished(store, job, inputs_digest, utterances, templates)
    if shard is None:
        refused: dict[str, str] = {}
        remarks: dict[str, Sequence[str]] = {}
        contents = _read_samples(job, utterances, templates, refused, remarks)
        first = next(contents, None)
        if first is not None:
            shard = write_shard(store, job.name, job.bucket, chain([first], contents), inputs_digest, refused, remarks)
        else:
            remove_shard(store, job.name)  # left by another plan
    else:
        refused, remarks = dict(shard.refused), dict(shard.remarks)
        count_done(len(planned))
    lengths = {template.key: sample.samples for template, sample in zip(templates, planned, strict=True)}
    if shard:
        lengths |= zip(shard.keys, shard.samples["samples"].tolist(), strict=True)
    rows = [_ledger_row(job, utterance, template, lengths[template.key], refused.get(template.key),
                        remarks.get(template.key, ()))
            for sample, utterance, template in zip(planned, utterances, templates, strict=True)
            if sample.piece is None]  # fmt: skip
    return ShardResult((shard.entry, shard.samples) if shard else None, write_ledger(rows))


def _check_worker(store: Store, context: BuildContext) -> None:
    """Raise ShardError if this machine would write other bytes, and StoreError if its build has ended."""
    if context.encoder_versions != ENCODER_VERSIONS:
        versions = (ENCODER_VERSIONS, context.encoder_versions)
        have, want = ("format {}, libsndfile {}, soxr {}".format(*version) for version in versions)
        hint = "install the same versions on all machines"
        raise ShardError(f"{socket.gethostname()} writes shards with {have}; this build needs {want}", hint)
    if context.token:
        check_token(store, context.token)


def _read_samples(
    job: ShardJob,
    utterances: Sequence[Utterance],
    templates: Sequence[Sample],
    refused: dict[str, str],
    remarks: dict[str, Sequence[str]],
) -> Iterator[tuple[Sample, int]]:
    """Yield each sample with its audio and its length. Fills `refused` and `remarks` by key as it goes."""
    for planned, utterance, template in zip(job.samples_planned, utterances, templates, strict=True):
        try:
            sample, length, notes = _read_sample(job, planned, utterance, template)
            if notes:
                remarks[sample.key] = notes
            yield sample, length
        except AudioError as error:
            refused[template.key] = error.message
        count_done()
    _check_worker(open_store(job.context.out), job.context)  # again, before the tar gets its final name


def _ledger_row(
    job: ShardJob, utterance: Utterance, template: Sample, length: int, refusal: str | None, remarks: Sequence[str]
) -> LedgerRow:
    """Return the ledger row of a clip with its remarks: the given ones, on the audio, and those on its label."""
    split, seconds = "valid" if job.split == "valid" else "train", length / SAMPLE_RATE
    if refusal is not None:
        return rejected_row(utterance, split, refusal, seconds)
    reason = (TOO_DENSE if template.parent_text else NO_LABEL) if job.split == "unlabelled" else None
    remarks = (*remarks, *label_remarks(utterance.text, job.context.track))
    return ledger_row(utterance, split, "written", seconds, reason=reason, key=template.key, remarks=remarks)


def _reuse_finished(
    store: Store, job: ShardJob, inputs_digest: str, utterances: Sequence[Utterance], templates: Sequence[Sample]
) -> ShardRecord | None:
    """Return the shard that an interrupted build wrote, or None if it is absent, damaged or of other inputs."""
    try:
        shard = read_shard_index(store, job.name)
        if shard.inputs_digest != inputs_digest:
            return None
        check_shard(store, shard, job.context.track)
    except (ShardError, MissingError):
        return None
    for planned, utterance, template in zip(job.samples_planned, utterances, templates, strict=True):
        if template.key in shard.refused:
            try:
                _read_sample(job, planned, utterance, template)
            except AudioError:
                continue
            return None  # the file was repaired since
    return shard


def _digest_inputs(job: ShardJob, utterances: Sequence[Utterance]) -> str:
    """Return the SHA-256 of all that determines the shard's bytes: clips, cuts and encoder versions."""
    lines = [str((ENCODER_VERSIONS, job.name, job.context.track))]
    for sample, utterance in zip(job.samples_planned, utterances, strict=True):
        lines.append(repr((utterance.values, sample.bytes, sample.piece)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _template(job: ShardJob, planned: PlannedSample, utterance: Utterance) -> Sample:
    """Return the sample without its audio."""
    text = read_label(utterance.text, job.context.track)
    if planned.piece:
        return _segment_sample(utterance, text, planned.piece, "valid" if job.split == "valid" else "train")
    if job.split == "unlabelled":
        return _bare_sample(utterance, status="unlabelled", parent=text)
    return _bare_sample(utterance, text=text)


def _segment_sample(utterance: Utterance, text: str, ref: SegmentRef, split: str) -> Sample:
    whole, segment = _bare_sample(utterance), ref.segment
    status = "reference" if split == "valid" else segment.label_status
    return replace(
        whole,
        key=piece_key(whole.key, ref.number),
        utterance_id=f"{whole.utterance_id}+{ref.number:03d}",
        text="" if split == "valid" else segment.text,
        label_status=status,
        parent_id=whole.utterance_id,
        parent_text=text if status == "unlabelled" or (status == "reference" and ref.number == 0) else None,
        piece=ref.number,
        pieces=ref.count,
        start_sec=segment.start_sec,
        end_sec=segment.end_sec,
    )


def _bare_sample(utterance: Utterance, text: str = "", status: str = "labelled", parent: str | None = None) -> Sample:
    return Sample(
        key=escape_key(utterance.utterance_id),
        audio=b"",
        text=text,
        label_status=status,
        parent_text=parent,
        utterance_id=utterance.utterance_id,
        child_id=utterance.child_id,
        session_id=utterance.session_id,
        corpus=utterance.corpus,
        age_bucket=utterance.age_bucket,
    )


def _read_sample(
    job: ShardJob, planned: PlannedSample, utterance: Utterance, template: Sample
) -> tuple[Sample, int, tuple[str, ...]]:
    """Return the sample with its verified audio, passed through or converted; its length at 16 kHz; remarks."""
    if planned.piece:
        audio = open_store(job.context.scratch).read(f"{template.key}.flac")
        return replace(template, audio=audio), planned.piece.segment.samples, ()
    data = _read_audio(utterance, job.context.layouts[planned.row.source].audio, planned.bytes)
    decoded = decode_native(data, prove=not utterance.md5_hash)
    pcm = decoded.pcm
    if job.split == "train" and template.text and is_constant(pcm):
        raise AudioError("constant signal with a label")
    return replace(template, audio=data if decoded.passthrough else encode(pcm)), len(pcm), decoded.remarks


def _read_audio(utterance: Utterance, audio: AudioRoot, size: int) -> bytes:
    """Return the bytes of a clip. Raises AudioError if their size or the md5 is not that of scan and manifest."""
    with open_audio(audio, utterance.audio_path) as (file, _):
        data = file.read()
    if len(data) != size:  # its duration bucket may have changed
        raise AudioError(f"changed during the build, from {size} bytes to {len(data)}")
    if utterance.md5_hash:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if md5 != utterance.md5_hash:
            raise AudioError(f"md5 is {md5}, the manifest says {utterance.md5_hash}")
    return data
