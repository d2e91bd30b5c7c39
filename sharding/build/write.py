"""Carry out a plan in worker processes: cut long recordings, read the audio of every sample, write the shards.

Each clip is read once; its md5 check, its decoding and its copy use the same bytes.
"""

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import NamedTuple

import soundfile
import soxr

from sharding.audio.codec import SAMPLE_RATE, Decoded, decode_native, decode_range, encode, frame_count, is_constant
from sharding.build.lock import check_token
from sharding.errors import AudioError, MissingError, ShardError
from sharding.labels.policy import LabelPolicy
from sharding.pool import count_done
from sharding.report.ledger import (
    NO_LABEL,
    PUBLISHED_WITHOUT,
    TOO_DENSE,
    LedgerPart,
    LedgerRow,
    ledger_row,
    rejected_row,
    write_ledger,
)
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
from sharding.shardset.sample import METADATA, Sample, escape_key, piece_key
from sharding.shardset.schema import HELD_OUT, ShardEntry
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import check_shard
from sharding.sources.archive import open_audio
from sharding.sources.manifest import Layout, Utterance

ENCODER_VERSIONS = (FORMAT_VERSION, soundfile.__libsndfile_version__, soxr.__version__)  # others may write other bytes


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Hold what every job of a build shares."""

    out: str  # URL of the shard set
    scratch: str  # URL of the place for segments not yet in a shard
    layouts: tuple[Layout, ...]
    labels: LabelPolicy
    dry_run: bool  # do all the work, but write nothing
    token: str = ""  # of the build that holds OUT; empty if workers cannot outlive their build
    encoder_versions: tuple[int, str, str] = ENCODER_VERSIONS


@dataclass(frozen=True, slots=True)
class ClipRow:
    """Hold an unparsed row of a source, to be sent to a worker, and what the scan found."""

    source: int
    line: bytes
    place: str  # its file and line
    size: int  # bytes of the clip's audio file
    samples: int  # of the clip at 16 kHz, by its header

    def parse(self, layouts: Sequence[Layout]) -> Utterance:
        return layouts[self.source].parse(self.line, self.place)[0]


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Identify one segment of a long recording."""

    number: int
    count: int
    segment: Segment


class Clip(NamedTuple):
    """Hold a sample to write: its row, as it is and parsed, and what it will be, but for its audio."""

    row: ClipRow
    piece: SegmentRef | None
    utterance: Utterance
    template: Sample


@dataclass(frozen=True, slots=True)
class ShardJob:
    context: BuildContext
    name: str
    bucket: int
    split: str
    samples_planned: tuple[tuple[ClipRow, SegmentRef | None], ...]  # None: the whole clip


@dataclass(frozen=True)
class ShardResult:
    made: tuple[ShardEntry, SampleTable] | None  # None if every sample was refused
    ledger: LedgerPart  # of the whole clips; a split recording already has its row


@dataclass(frozen=True, slots=True)
class CutJob:
    context: BuildContext
    row: ClipRow
    split: str
    max_duration: float
    evidence: Evidence | None
    acoustic_model: PhoneGMM | None
    thresholds: LabelThresholds


def read_example(job: tuple[BuildContext, ClipRow]) -> TrainingExample | None:
    """Return a labelled recording to train the acoustic model on, or None if it cannot be read."""
    context, row = job
    utterance = row.parse(context.layouts)
    try:
        waveform = _decode(context, row, utterance)[1].waveform
    except AudioError:  # reported when the recording is cut or written
        return None
    finally:
        count_done()
    return example_of(utterance.utterance_id, context.labels.normalize(utterance.text), waveform)


def cut_recording(job: CutJob) -> tuple[tuple[Segment, ...], LedgerPart]:
    """Write the segments of a long recording as FLAC files to the scratch place. Return them, none if it is refused."""
    utterance = job.row.parse(job.context.layouts)
    text = job.context.labels.normalize(utterance.text)
    try:
        decoded = _decode(job.context, job.row, utterance)[1]
    except AudioError as error:
        row = rejected_row(utterance, job.split, error.message, job.row.samples / SAMPLE_RATE)
        return (), write_ledger([row])
    finally:
        count_done()
    name, waveform, model = utterance.utterance_id, decoded.waveform, job.acoustic_model
    label = "" if job.split == "unlabelled" else text
    cut = split_recording(
        name, waveform, label, job.max_duration, None, job.evidence, model, job.thresholds, job.context.labels
    )
    segments = tuple(cut)
    _check_worker(open_store(job.context.out), job.context)
    scratch, rows = open_store(job.context.scratch), []
    for number, segment in enumerate(segments):
        sample = _segment_sample(utterance, text, SegmentRef(number, len(segments), segment), job.split)
        start = round(segment.start_sec * SAMPLE_RATE)
        scratch.write(f"{sample.key}.flac", encode(waveform[start : start + segment.samples]))
        row = {"key": sample.key} | asdict(segment) | {"text": sample.text, "label_status": sample.label_status}
        del row["utterance_id"]
        rows.append(row)
    remarks = (*decoded.remarks, *job.context.labels.remarks(utterance.text))
    row = ledger_row(utterance, job.split, "split", segments[-1].end_sec, pieces=rows, remarks=remarks)
    return segments, write_ledger([row])


def make_shard(job: ShardJob) -> ShardResult:
    """Write one shard, unless an interrupted build already wrote it completely from the same inputs."""
    store = open_store(job.context.out, dry_run=job.context.dry_run)
    _check_worker(store, job.context)
    clips = [_parse(job, row, piece) for row, piece in job.samples_planned]
    inputs_digest = _digest_inputs(job, clips)
    shard = _reuse_finished(store, job, inputs_digest, clips)
    if shard is None:
        refused: dict[str, str] = {}
        remarks: dict[str, Sequence[str]] = {}
        contents = _read_samples(job, clips, refused, remarks)
        first = next(contents, None)
        if first is not None:
            shard = write_shard(
                store,
                job.name,
                job.bucket,
                chain([first], contents),
                job.context.labels,
                inputs_digest,
                refused,
                remarks,
            )
        else:
            remove_shard(store, job.name)  # left by another plan
    else:
        refused, remarks = dict(shard.refused), dict(shard.remarks)
        count_done(len(clips))
    lengths = {clip.template.key: clip.row.samples for clip in clips}
    if shard:
        lengths |= zip(shard.keys, shard.samples["samples"].tolist(), strict=True)
    rows = [_ledger_row(job, clip, lengths, refused, remarks) for clip in clips if clip.piece is None]
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
    job: ShardJob, clips: Sequence[Clip], refused: dict[str, str], remarks: dict[str, Sequence[str]]
) -> Iterator[tuple[Sample, int]]:
    """Yield each sample with its audio and its length. Fills `refused` and `remarks` by key as it goes."""
    for clip in clips:
        try:
            sample, length, notes = _read_sample(job, clip)
            if notes:
                remarks[sample.key] = notes
            yield sample, length
        except AudioError as error:
            refused[clip.template.key] = error.message
        count_done()
    _check_worker(open_store(job.context.out), job.context)  # again, before the tar gets its final name


def _ledger_row(
    job: ShardJob,
    clip: Clip,
    lengths: Mapping[str, int],
    refused: Mapping[str, str],
    audio_remarks: Mapping[str, Sequence[str]],
) -> LedgerRow:
    """Return the ledger row of a clip; its length, the reason of its refusal and remarks on its audio are by key."""
    utterance, key = clip.utterance, clip.template.key
    split, seconds = job.split if job.split in HELD_OUT else "train", lengths[key] / SAMPLE_RATE
    if key in refused:
        return rejected_row(utterance, split, refused[key], seconds)
    reason = _why_unlabelled(clip, job.context.labels) if job.split == "unlabelled" else None
    remarks = (*audio_remarks.get(key, ()), *job.context.labels.remarks(utterance.text))
    return ledger_row(utterance, split, "written", seconds, reason=reason, key=key, remarks=remarks)


def _why_unlabelled(clip: Clip, labels: LabelPolicy) -> str:
    text = clip.template.parent_text
    if not text:
        return NO_LABEL
    return TOO_DENSE if frame_count(clip.row.samples) < labels.frames_needed(text) else PUBLISHED_WITHOUT


def _reuse_finished(store: Store, job: ShardJob, inputs_digest: str, clips: Sequence[Clip]) -> ShardRecord | None:
    """Return the shard that an interrupted build wrote, or None if it is absent, damaged or of other inputs."""
    try:
        shard = read_shard_index(store, job.name)
        if shard.inputs_digest != inputs_digest:
            return None
        check_shard(store, shard, job.context.labels)
    except (ShardError, MissingError):
        return None
    for clip in clips:
        if clip.template.key in shard.refused:
            try:
                _read_sample(job, clip)
            except AudioError:
                continue
            return None  # the file was repaired since
    return shard


def _digest_inputs(job: ShardJob, clips: Sequence[Clip]) -> str:
    """Return the SHA-256 of all that determines the shard's bytes: clips, cuts and encoder versions."""
    labels = job.context.labels
    lines = [str((ENCODER_VERSIONS, job.name, labels.profile, labels.units, labels.digest))]
    lines += [repr((clip.utterance.identity, clip.row.size, clip.piece)) for clip in clips]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _parse(job: ShardJob, row: ClipRow, piece: SegmentRef | None) -> Clip:
    utterance = row.parse(job.context.layouts)
    text = job.context.labels.normalize(utterance.text)
    if piece:
        template = _segment_sample(utterance, text, piece, job.split)
    elif job.split == "unlabelled":
        template = _bare_sample(utterance, status="unlabelled", parent=text)
    else:
        template = _bare_sample(utterance, text=text)
    if utterance.words and piece is None:
        template = replace(template, words=utterance.words)
    if utterance.text != text and (piece is None or piece.number == 0):  # of a recording's segments, the first has it
        template = replace(template, written_text=utterance.text)
    return Clip(row, piece, utterance, template)


def _segment_sample(utterance: Utterance, text: str, ref: SegmentRef, split: str) -> Sample:
    whole, segment = _bare_sample(utterance), ref.segment
    held_out = split in HELD_OUT
    status = "reference" if held_out else "unlabelled" if split == "unlabelled" else segment.label_status
    return replace(
        whole,
        key=piece_key(whole.key, ref.number),
        utterance_id=f"{whole.utterance_id}+{ref.number:03d}",
        text="" if held_out else segment.text,
        label_status=status,
        parent_id=whole.utterance_id,
        parent_text=text if status == "unlabelled" or (status == "reference" and ref.number == 0) else None,
        piece=ref.number,
        pieces=ref.count,
        start_sec=segment.start_sec,
        end_sec=segment.end_sec,
    )


def _bare_sample(utterance: Utterance, text: str = "", status: str = "labelled", parent: str | None = None) -> Sample:
    metadata = {name: getattr(utterance, name) for name in METADATA}
    return Sample(escape_key(utterance.utterance_id), b"", text, status, parent_text=parent, **metadata)


def _read_sample(job: ShardJob, clip: Clip) -> tuple[Sample, int, tuple[str, ...]]:
    """Return the sample with its verified audio, passed through or converted; its length at 16 kHz; remarks."""
    row, piece, utterance, template = clip
    if piece:
        audio = open_store(job.context.scratch).read(f"{template.key}.flac")
        return replace(template, audio=audio), piece.segment.samples, ()
    data, decoded = _decode(job.context, row, utterance)
    pcm = decoded.pcm
    if job.split == "train" and template.text and is_constant(pcm):
        raise AudioError("constant signal with a label")
    return replace(template, audio=data if decoded.passthrough else encode(pcm)), len(pcm), decoded.remarks


def _decode(context: BuildContext, row: ClipRow, utterance: Utterance) -> tuple[bytes, Decoded]:
    """Return the bytes of a clip's file, and its sound: of a range of a recording, no other part is read.

    Raises AudioError if the file cannot be decoded, or its size or its md5 is not that of scan and manifest.
    """
    whole = utterance.offset_sec is None
    with open_audio(context.layouts[row.source].audio, utterance.audio_path) as (file, size):
        data = file.read() if whole or utterance.md5_hash else b""
        size = len(data) if whole else size
        if size != row.size:  # its duration bucket may have changed
            raise AudioError(f"changed during the build, from {row.size} bytes to {size}")
        if utterance.md5_hash:
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if md5 != utterance.md5_hash:
                raise AudioError(f"md5 is {md5}, the manifest says {utterance.md5_hash}")
        if utterance.offset_sec is not None:
            file.seek(0)
            return b"", decode_range(file, utterance.offset_sec, utterance.duration_sec)
    return data, decode_native(data, prove=not utterance.md5_hash)
