"""What workers do with a plan: cut long recordings, give every sample its audio, write the shards.

Each clip is read once; its md5, its decoding and the copy are made of the same bytes.
"""

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import soundfile
import soxr

from sharding.segment.evidence import Evidence
from sharding.sources.archive import AudioRoot, open_audio
from sharding.audio.codec import SAMPLE_RATE, decode, decode_native, encode, is_constant
from sharding.errors import AudioError, MissingError, ShardError
from sharding.shardset.index import FORMAT_VERSION, SampleTable, ShardRecord, read_shard_index, remove_shard, write_shard
from sharding.labels.ipa import label_remarks, read_label
from sharding.report.ledger import NO_LABEL, TOO_DENSE, LedgerPart, LedgerRow, ledger_row, rejected_row, write_ledger
from sharding.build.lock import check_token
from sharding.sources.manifest import Layout, Utterance
from sharding.shardset.sample import Sample, escape_key, piece_key
from sharding.shardset.schema import ShardEntry
from sharding.segment.acoustic_model import TrainingExample, PhoneGMM, example_of
from sharding.segment.split import LabelThresholds, Segment, split_recording
from sharding.shardset.store import Store, open_store
from sharding.shardset.verify import check_shard
from sharding.pool import count_done

ENCODER_VERSIONS = (FORMAT_VERSION, soundfile.__libsndfile_version__, soxr.__version__)  # others may make other bytes


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What every job of a build shares."""

    out: str  # URL of the shard set
    scratch: str  # URL of the place where pieces wait
    layouts: tuple[Layout, ...]
    track: str
    dry_run: bool  # do everything, write nothing
    token: str = ""  # of the build that holds OUT; without one there is nobody who could work for a build that ended
    encoder_versions: tuple[int, str, str] = ENCODER_VERSIONS


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """A row of a source, on its way to a worker."""

    source: int
    number: int  # of the line
    line: bytes

    def parse(self, layouts: Sequence[Layout]) -> Utterance:
        return layouts[self.source].parse(self.line, self.number)[0]


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One of the pieces that a long recording was cut into."""

    number: int
    count: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample to be."""

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
    made: tuple[ShardEntry, SampleTable] | None  # None where every member was refused
    ledger: LedgerPart  # of the whole clips; a split recording has its row already


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
    segments: tuple[Segment, ...]  # none where the recording was refused
    ledger: LedgerPart


def read_example(job: ExampleJob) -> TrainingExample | None:
    """A labelled recording to learn sounds from; None where it cannot be read."""
    utterance = job.row.parse(job.context.layouts)
    try:
        data = _read_audio(utterance, job.context.layouts[job.row.source].audio, job.bytes)
        waveform, _ = decode(data, prove=not utterance.md5_hash)
    except AudioError:  # told when it is cut, or written
        return None
    finally:
        count_done()
    return example_of(utterance.utterance_id, read_label(utterance.text, job.context.track), waveform)


def cut_recording(job: CutJob) -> CutResult:
    """Split one long recording and leave its pieces as FLAC files in the scratch place."""
    utterance = job.row.parse(job.context.layouts)
    text = read_label(utterance.text, job.context.track)
    try:
        data = _read_audio(utterance, job.context.layouts[job.row.source].audio, job.bytes)
        decoded = decode_native(data, prove=not utterance.md5_hash)
    except AudioError as error:
        return CutResult(
            (), write_ledger([rejected_row(utterance, job.split, error.message, job.samples / SAMPLE_RATE)])
        )
    finally:
        count_done()
    waveform = decoded.waveform
    segments = tuple(
        split_recording(
            utterance.utterance_id, waveform, text, job.max_duration, None, job.evidence, job.acoustic_model, job.thresholds
        )
    )
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
    """Write one shard, unless an earlier, interrupted build has left it whole and made of the same."""
    store = open_store(job.context.out, dry_run=job.context.dry_run)
    _check_worker(store, job.context)
    utterances = [member.row.parse(job.context.layouts) for member in job.samples_planned]
    templates = [_template(job, member, utterance) for member, utterance in zip(job.samples_planned, utterances, strict=True)]
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
            remove_shard(store, job.name)  # of another plan
    else:
        refused, remarks = dict(shard.refused), dict(shard.remarks)
        count_done(len(job.samples_planned))
    made = (shard.entry, shard.samples) if shard else None
    lengths = {template.key: member.samples for template, member in zip(templates, job.samples_planned, strict=True)}
    if shard:
        lengths |= zip(shard.keys, shard.samples["samples"].tolist(), strict=True)
    rows = [_ledger_row(job, utterance, template, lengths, refused, remarks.get(template.key, ()))
            for member, utterance, template in zip(job.samples_planned, utterances, templates, strict=True)
            if member.piece is None]  # fmt: skip
    return ShardResult(made, write_ledger(rows))


def _check_worker(store: Store, context: BuildContext) -> None:
    """Raise, on a machine of a cluster, where what is written would be wrong, or nobody waits for it any more."""
    if context.encoder_versions != ENCODER_VERSIONS:
        have, want = ("format {}, libsndfile {}, soxr {}".format(*made_by) for made_by in (ENCODER_VERSIONS, context.encoder_versions))
        hint = "install the same versions on all machines"
        raise ShardError(f"{socket.gethostname()} makes shards with {have}; this build with {want}", hint)
    if context.token:
        check_token(store, context.token)


def _read_samples(
    job: ShardJob,
    utterances: Sequence[Utterance],
    templates: Sequence[Sample],
    refused: dict[str, str],
    remarks: dict[str, Sequence[str]],
) -> Iterator[tuple[Sample, int]]:
    """Yield each sample with its audio and its length; `refused` and `remarks` take, by key, what is to be said."""
    for member, utterance, template in zip(job.samples_planned, utterances, templates, strict=True):
        try:
            sample, length, said = _read_sample(job, member, utterance, template)
            if said:
                remarks[sample.key] = said
            yield sample, length
        except AudioError as error:
            refused[template.key] = error.message
        count_done()
    _check_worker(open_store(job.context.out), job.context)  # once more before the tar appears under its name


def _ledger_row(
    job: ShardJob,
    utterance: Utterance,
    template: Sample,
    lengths: dict[str, int],
    refused: dict[str, str],
    remarks: Sequence[str],
) -> LedgerRow:
    """Return the row of a clip with all `remarks`: those given, on its sound, and those on its label."""
    split = "valid" if job.split == "valid" else "train"
    if template.key in refused:
        return rejected_row(utterance, split, refused[template.key], lengths[template.key] / SAMPLE_RATE)
    why = (TOO_DENSE if template.parent_text else NO_LABEL) if job.split == "unlabelled" else None
    seconds, remarks = lengths[template.key] / SAMPLE_RATE, (*remarks, *label_remarks(utterance.text, job.context.track))
    return ledger_row(utterance, split, "written", seconds, reason=why, key=template.key, remarks=remarks)


def _reuse_finished(
    store: Store, job: ShardJob, inputs_digest: str, utterances: Sequence[Utterance], templates: Sequence[Sample]
) -> ShardRecord | None:
    try:
        shard = read_shard_index(store, job.name)
        if shard.inputs_digest != inputs_digest:
            return None
        check_shard(store, shard, job.context.track)
    except (ShardError, MissingError):
        return None
    for member, utterance, template in zip(job.samples_planned, utterances, templates, strict=True):
        if template.key in shard.refused:
            try:
                _read_sample(job, member, utterance, template)
            except AudioError:
                continue
            return None  # the file was mended since
    return shard


def _digest_inputs(job: ShardJob, utterances: Sequence[Utterance]) -> str:
    """Of all that decides the shard's bytes: the clips, what is made of them, and the encoders."""
    parts = [
        repr((utterance.values, member.bytes, member.piece))
        for member, utterance in zip(job.samples_planned, utterances, strict=True)
    ]
    return hashlib.sha256("\n".join([str((ENCODER_VERSIONS, job.name, job.context.track)), *parts]).encode()).hexdigest()


def _template(job: ShardJob, member: PlannedSample, utterance: Utterance) -> Sample:
    """The sample without its audio."""
    text = read_label(utterance.text, job.context.track)
    if member.piece:
        return _segment_sample(utterance, text, member.piece, "valid" if job.split == "valid" else "train")
    if job.split == "unlabelled":
        return _bare_sample(utterance, label_status="unlabelled", parent_text=text)
    return _bare_sample(utterance, text=text)


def _segment_sample(utterance: Utterance, text: str, piece: SegmentRef, split: str) -> Sample:
    whole, segment = _bare_sample(utterance), piece.segment
    status = "reference" if split == "valid" else segment.label_status
    return replace(
        whole,
        key=piece_key(whole.key, piece.number),
        utterance_id=f"{whole.utterance_id}+{piece.number:03d}",
        text="" if split == "valid" else segment.text,
        label_status=status,
        parent_id=whole.utterance_id,
        parent_text=text if status == "unlabelled" or (status == "reference" and piece.number == 0) else None,
        piece=piece.number,
        pieces=piece.count,
        start_sec=segment.start_sec,
        end_sec=segment.end_sec,
    )


def _bare_sample(
    utterance: Utterance, text: str = "", label_status: str = "labelled", parent_text: str | None = None
) -> Sample:
    return Sample(
        key=escape_key(utterance.utterance_id),
        audio=b"",
        text=text,
        label_status=label_status,
        parent_text=parent_text,
        utterance_id=utterance.utterance_id,
        child_id=utterance.child_id,
        session_id=utterance.session_id,
        corpus=utterance.corpus,
        age_bucket=utterance.age_bucket,
    )


def _read_sample(job: ShardJob, member: PlannedSample, utterance: Utterance, template: Sample) -> tuple[Sample, int, tuple[str, ...]]:
    """Return the sample with its audio, verified bytes passed through or converted; its length at 16 kHz; remarks."""
    if member.piece:
        audio = open_store(job.context.scratch).read(f"{template.key}.flac")
        return replace(template, audio=audio), member.piece.segment.samples, ()
    data = _read_audio(utterance, job.context.layouts[member.row.source].audio, member.bytes)
    decoded = decode_native(data, prove=not utterance.md5_hash)
    pcm = decoded.pcm
    if job.split == "train" and template.text and is_constant(pcm):
        raise AudioError("constant signal with a label")
    return replace(template, audio=data if decoded.passthrough else encode(pcm)), len(pcm), decoded.remarks


def _read_audio(utterance: Utterance, audio: AudioRoot, size: int) -> bytes:
    """The bytes of a clip, which are those that were examined, as far as their number and the manifest's md5 tell."""
    with open_audio(audio, utterance.audio_path) as (file, _):
        data = file.read()
    if len(data) != size:  # it may belong into another bucket now
        raise AudioError(f"changed during the build, from {size} bytes to {len(data)}")
    if utterance.md5_hash:
        seen = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if seen != utterance.md5_hash:
            raise AudioError(f"md5 is {seen}, the manifest says {utterance.md5_hash}")
    return data
