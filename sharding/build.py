"""From sources to a shard set: examine every clip, split the long ones, plan the shards, write them, publish the index.

What goes where is planned from headers alone, so the same input and settings make the same bytes whatever the number
of workers; each clip is then decoded once, by the worker that writes it.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sharding import report
from sharding.audio import SAMPLE_RATE, AudioInfo, decode, encode, frame_count, is_constant, probe
from sharding.buckets import bucket_of, fit_bins
from sharding.errors import AudioError, ShardError, StoreError, StreamtrainError
from sharding.format import (
    FORMAT_VERSION,
    INDEX_NAME,
    SPLITS,
    Sample,
    Shard,
    ShardIndex,
    check_shard,
    escape_key,
    join_samples,
    piece_key,
    read_index,
    read_shard_index,
    remove_shard,
    write_index,
    write_shard,
)
from sharding.ipa import ctc_frames_needed, foreign_symbols, normalize_ipa
from sharding.manifest import Source, Utterance, open_audio, read_audio, read_sources, size_of
from sharding.split import Segment, split_recording
from sharding.store import FolderStore, Store, open_store
from sharding.workers import Workers, count_done

FLAC_RATIO = 0.54  # of 16-bit PCM: what speech compresses to, for planning the size of shards
CHUNK = 64  # clips per examination task


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """All that decides the bytes of a shard set, beside its sources."""

    limit_sec: float = 25.0
    valid_fraction: float = 0.1
    num_buckets: int = 8
    shard_mb: float = 64.0

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Clip:
    """An utterance that is still in the running."""

    utterance: Utterance
    text: str  # normalised
    split: str  # train | valid
    info: AudioInfo


@dataclass(frozen=True, slots=True)
class Member:
    """One sample to be: everything but its audio, and where that comes from."""

    sample: Sample  # its audio is empty until a worker fills it
    split: str
    samples: int  # planned length at 16 kHz
    bytes: int  # estimate
    origin: tuple[str | int | None, ...]  # path, md5 and size of the clip, wherever its corpus lies
    utterance: Utterance | None  # the clip to read, or
    scratch: str | None  # the FLAC file of a piece that was cut before


@dataclass(frozen=True, slots=True)
class ShardJob:
    name: str
    bucket: int
    members: tuple[Member, ...]

    @property
    def made_of(self) -> str:
        """Digest of all that decides the shard's bytes: the samples, and the clips they come from."""
        parts = [repr((member.sample, member.split, member.samples, member.origin)) for member in self.members]
        return hashlib.sha256("\n".join([str(FORMAT_VERSION), *parts]).encode()).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    shard: Shard | None  # None where every member was refused
    refused: dict[str, str]  # key → reason


@dataclass(frozen=True)
class Built:
    """What a build has made, for its caller to print."""

    index: ShardIndex
    summary: dict[str, Any]
    fresh: bool  # False where the same shard set was there already


def build(sources: Sequence[Path], out: str, settings: BuildSettings, workers: int | None = None) -> Built:
    """Build the shard set OUT from the sources. Raises StreamtrainError for what the user can mend."""
    store = open_store(out)
    corpora = read_sources(sources)
    sources_hash = _hash_sources(corpora)
    if store.exists(INDEX_NAME):
        return _built_before(store, settings, sources_hash)
    ledger = report.Ledger()
    with Workers(workers or available_cores()) as pool, _scratch_folder(store) as scratch:
        clips = _examine(corpora, settings, pool, ledger)
        members = _members(clips, settings, scratch, pool, ledger)
        bins = fit_bins([member.samples / SAMPLE_RATE for member in members], settings.num_buckets)
        jobs = plan_shards(members, bins, round(settings.shard_mb * 2**20))
        _clear_unfinished(store, jobs)
        shards = _write(jobs, store, pool, ledger)
    notes = ledger.notes(by_child=all(clip.utterance.child_id for clip in clips))
    entries, samples = tuple(shard.entry for shard in shards), join_samples(shards)
    index = ShardIndex(bins, asdict(settings), settings.hash, sources_hash, notes, entries, samples)
    summary = report.publish(store, ledger, index, corpora)
    return Built(write_index(store, index), summary, fresh=True)  # last: the index says that all the rest is there


def plan_shards(members: Sequence[Member], bins: Sequence[float], shard_bytes: int) -> list[ShardJob]:
    """Group samples by split and bucket into shards of about equal size, at most about `shard_bytes` each.

    Within a bucket the order is that of the keys' hashes: mixed, yet the same for sources given in any order.
    """
    groups: dict[tuple[str, int], list[Member]] = {}
    for member in sorted(members, key=lambda member: (_mixed(member.sample.key), member.sample.key)):
        groups.setdefault((member.split, bucket_of(member.samples / SAMPLE_RATE, bins)), []).append(member)
    jobs = []
    for (split, bucket), group in sorted(groups.items(), key=lambda item: (SPLITS.index(item[0][0]), item[0][1])):
        ends = np.cumsum([member.bytes for member in group])
        shards = max(1, -(-int(ends[-1]) // shard_bytes))
        which = np.minimum((ends - 1) * shards // int(ends[-1]), shards - 1)
        for number, shard in enumerate(np.unique(which)):
            chosen = tuple(group[i] for i in np.flatnonzero(which == shard))
            jobs.append(ShardJob(f"{split}/b{bucket:02d}-{number:05d}.tar", bucket, chosen))
    return jobs


def choose_validation(utterances: Iterable[Utterance], fraction: float) -> frozenset[str]:
    """The speakers whose every clip goes to validation: SHA-256 of the id below `fraction`, so it stays as data grows.

    Where nobody falls there, the one with the smallest hash.
    """
    speakers = {speaker_of(utterance) for utterance in utterances}
    if not speakers or fraction <= 0:
        return frozenset()
    chosen = frozenset(speaker for speaker in speakers if unit_hash(speaker) < fraction)
    return chosen or frozenset([min(speakers, key=unit_hash)])


def speaker_of(utterance: Utterance) -> str:
    """Whom a clip belongs to, as far as the manifest tells: the child, else the session, else the clip itself."""
    return utterance.child_id or utterance.session_id or utterance.utterance_id


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


# --- the four steps ---------------------------------------------------------------------------------------------


def _examine(corpora: Sequence[Source], settings: BuildSettings, pool: Workers, ledger: report.Ledger) -> list[Clip]:
    """Read every header and check every label; what is refused goes to the ledger."""
    utterances = sorted((u for source in corpora for u in source.utterances), key=lambda u: u.utterance_id)
    validation = choose_validation(utterances, settings.valid_fraction)
    chunks = [utterances[start : start + CHUNK] for start in range(0, len(utterances), CHUNK)]
    infos = [info for chunk in pool.map(_probe_chunk, chunks, len(utterances), "examining") for info in chunk]
    clips = []
    for utterance, info in zip(utterances, infos, strict=True):
        split = "valid" if speaker_of(utterance) in validation else "train"
        text = normalize_ipa(utterance.text)
        foreign = foreign_symbols(text) if split == "train" else ""  # validation is never filtered
        if isinstance(info, str):
            ledger.reject(utterance, split, info)
        elif foreign:
            ledger.reject(utterance, split, f"label has symbols outside the alphabet: {foreign!r}")
        else:
            clips.append(Clip(utterance, text, split, info))
    return clips


def _members(
    clips: Sequence[Clip], settings: BuildSettings, scratch: Path, pool: Workers, ledger: report.Ledger
) -> list[Member]:
    """Every clip becomes one sample, or, over the limit, one for each of its pieces."""
    limit = round(settings.limit_sec * SAMPLE_RATE)
    short = [clip for clip in clips if clip.info.samples <= limit]
    members = [_whole_member(clip) for clip in short]
    for clip, member in zip(short, members, strict=True):
        ledger.write(clip.utterance, clip.split, member.sample, member.samples)
    long = sorted((clip for clip in clips if clip.info.samples > limit), key=lambda clip: -clip.info.samples)
    jobs = [(clip.utterance, clip.text, settings.limit_sec, str(scratch)) for clip in long]
    for clip, segments in zip(long, pool.map(_cut, jobs, len(jobs), "splitting"), strict=True):
        if isinstance(segments, str):
            ledger.reject(clip.utterance, clip.split, segments)
            continue
        pieces = [_piece_member(clip, segments, number, scratch) for number in range(len(segments))]
        members += pieces
        ledger.split(clip.utterance, clip.split, [piece.sample for piece in pieces], segments)
    return members


def _whole_member(clip: Clip) -> Member:
    fits = clip.split == "valid" or (clip.text and frame_count(clip.info.samples) >= ctc_frames_needed(clip.text))
    sample = replace(
        _template(clip.utterance),
        text=clip.text if fits else "",
        label_status="labelled" if fits else "unlabelled",
        parent_text=None if fits else clip.text,
    )
    size = clip.utterance.filesize_bytes if clip.info.passthrough else None
    return Member(
        sample,
        clip.split if fits else "unlabelled",
        clip.info.samples,
        size or _flac_bytes(clip.info.samples),
        _origin(clip.utterance),
        clip.utterance,
        None,
    )


def _piece_member(clip: Clip, segments: Sequence[Segment], piece: int, scratch: Path) -> Member:
    segment = segments[piece]
    reference = clip.split == "valid"
    whole = _template(clip.utterance)
    key = piece_key(whole.key, piece)
    status = "reference" if reference else segment.label_status
    sample = replace(
        whole,
        key=key,
        utterance_id=f"{whole.utterance_id}+{piece:03d}",
        text="" if reference else segment.text,
        label_status=status,
        parent_id=whole.utterance_id,
        parent_text=clip.text if status == "unlabelled" or (reference and piece == 0) else None,
        piece=piece,
        pieces=len(segments),
        start_sec=segment.start_sec,
        end_sec=segment.end_sec,
    )
    split = "unlabelled" if status == "unlabelled" else clip.split
    flac = str(scratch / f"{key}.flac")
    return Member(sample, split, segment.samples, _flac_bytes(segment.samples), _origin(clip.utterance), None, flac)


def _origin(utterance: Utterance) -> tuple[str | int | None, ...]:
    return (utterance.audio_path, utterance.md5_hash, size_of(utterance))


def _template(utterance: Utterance) -> Sample:
    return Sample(
        key=escape_key(utterance.utterance_id),
        audio=b"",
        text="",
        label_status="labelled",
        utterance_id=utterance.utterance_id,
        child_id=utterance.child_id,
        session_id=utterance.session_id,
        corpus=utterance.corpus,
        age_bucket=utterance.age_bucket,
    )


def _write(jobs: Sequence[ShardJob], store: Store, pool: Workers, ledger: report.Ledger) -> list[Shard]:
    """Write every shard, largest first so that no worker is left alone at the end; the order returned is the plan's."""
    order = sorted(range(len(jobs)), key=lambda i: -sum(member.samples for member in jobs[i].members))
    total = sum(len(job.members) for job in jobs)
    results = pool.map(_make_shard, [(jobs[i], store.url) for i in order], total, "writing")
    by_job = dict(zip(order, results, strict=True))
    shards = []
    for i in range(len(jobs)):
        for key, reason in by_job[i].refused.items():
            ledger.refuse_key(key, reason)
        shard = by_job[i].shard
        if shard is not None:
            ledger.measured(shard)
            shards.append(shard)
    return shards


# --- what workers do --------------------------------------------------------------------------------------------


def _probe_chunk(utterances: Sequence[Utterance]) -> list[AudioInfo | str]:
    """The header of each clip, or the reason why it cannot be used."""
    return [_probe_one(utterance) for utterance in utterances]


def _probe_one(utterance: Utterance) -> AudioInfo | str:
    count_done()
    try:
        with open_audio(utterance) as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise AudioError("audio file is empty (0 bytes)")
            if utterance.filesize_bytes not in (None, size):
                raise AudioError(f"size is {size} bytes, the manifest says {utterance.filesize_bytes}")
            file.seek(0)
            return probe(file)
    except AudioError as error:
        return error.message


def _read_checked(utterance: Utterance) -> bytes:
    data = read_audio(utterance)
    if utterance.md5_hash:
        seen = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if seen != utterance.md5_hash:
            raise AudioError(f"md5 is {seen}, the manifest says {utterance.md5_hash}")
    return data


def _cut(job: tuple[Utterance, str, float, str]) -> list[Segment] | str:
    """Split one long recording and leave its pieces as FLAC files in the scratch folder."""
    utterance, text, limit_sec, scratch = job
    count_done()
    try:
        waveform, _ = decode(_read_checked(utterance), prove=True)
    except AudioError as error:
        return error.message
    segments = split_recording(utterance.utterance_id, waveform, text, limit_sec)
    for number, segment in enumerate(segments):
        start = round(segment.start_sec * SAMPLE_RATE)
        piece = waveform[start : start + segment.samples]
        Path(scratch, f"{piece_key(escape_key(utterance.utterance_id), number)}.flac").write_bytes(encode(piece))
    return segments


def _make_shard(job: tuple[ShardJob, str]) -> ShardResult:
    shard_job, url = job
    store, made_of = open_store(url), shard_job.made_of
    finished = _finished(store, shard_job.name, made_of)
    if finished is not None:
        count_done(len(shard_job.members))
        return ShardResult(finished, dict(finished.refused))
    remove_shard(store, shard_job.name)
    contents, refused = [], {}
    for member in shard_job.members:
        count_done()
        try:
            contents.append(_fill(member))
        except AudioError as error:
            refused[member.sample.key] = error.message
    if not contents:
        return ShardResult(None, refused)
    return ShardResult(write_shard(store, shard_job.name, shard_job.bucket, contents, made_of, refused), refused)


def _finished(store: Store, name: str, made_of: str) -> Shard | None:
    """A shard as an earlier, interrupted build left it, where it is whole and was made of the same."""
    try:
        shard = read_shard_index(store, name)
        if shard.made_of != made_of:
            return None
        check_shard(store, shard.entry)
    except (ShardError, StoreError):
        return None
    return shard


def _fill(member: Member) -> tuple[Sample, int]:
    """Give a sample its audio: verified bytes passed through, or decoded, mixed down, resampled and encoded."""
    if member.utterance is None:
        return replace(member.sample, audio=Path(str(member.scratch)).read_bytes()), member.samples
    data = _read_checked(member.utterance)
    waveform, final = decode(data, prove=True)
    if member.split == "train" and member.sample.text and is_constant(waveform):
        raise AudioError("constant signal with a label")
    return replace(member.sample, audio=data if final else encode(waveform)), len(waveform)


# --- what was there before --------------------------------------------------------------------------------------


def _built_before(store: Store, settings: BuildSettings, sources_hash: str) -> Built:
    """The shard set that is already there, if it is the one asked for; otherwise an error that says what differs."""
    index = read_index(store)
    wanted = asdict(settings)
    differ = [f"{name} {index.settings.get(name)} there, {wanted[name]} asked" for name in wanted
              if index.settings.get(name) != wanted[name]]  # fmt: skip
    if index.sources_hash != sources_hash:
        differ.append("other sources, or sources that have changed")
    if differ:
        raise ShardError(
            f"{store.url}: holds a shard set built otherwise: {'; '.join(differ)}",
            "choose another --out, or remove this folder first",
        )
    return Built(index, report.read_summary(store), fresh=False)


LEFT_BEHIND = re.compile(rf"(({'|'.join(SPLITS)})/(b\d\d-\d{{5}}\.(tar|idx\.zst)|\..*\.part)|(report/)?\.[^/]*\.part)")


def _clear_unfinished(store: Store, jobs: Sequence[ShardJob]) -> None:
    """Remove what a build that never published its index left behind: partial files, and shards of another plan."""
    planned = {job.name.removesuffix(".tar") for job in jobs}
    for name in list(store.names()):
        if LEFT_BEHIND.fullmatch(name) and name.removesuffix(".tar").removesuffix(".idx.zst") not in planned:
            store.delete(name)


@contextmanager
def _scratch_folder(store: Store) -> Iterator[Path]:
    """Where the pieces of long recordings wait to be sharded: beside the shards, where there is room."""
    beside = store.folder if isinstance(store, FolderStore) else None
    try:
        if beside is not None:
            beside.mkdir(parents=True, exist_ok=True)
            for left_behind in beside.glob(".pieces-*"):
                shutil.rmtree(left_behind, ignore_errors=True)
        scratch = tempfile.TemporaryDirectory(prefix=".pieces-", dir=beside)
    except OSError as error:
        raise StreamtrainError(f"{store.url}: {error.strerror}", "choose an --out that can be written") from error
    with scratch as folder:
        yield Path(folder)


def unit_hash(text: str) -> float:
    """SHA-256 of a text as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _hash_sources(corpora: Sequence[Source]) -> str:
    """What the sources say, whatever their order and wherever they lie."""
    rows = sorted(
        repr(
            (
                u.utterance_id,
                u.child_id,
                u.session_id,
                u.corpus,
                u.age_bucket,
                u.md5_hash,
                size_of(u),
                u.text,
                u.audio_path,
            )
        )
        for source in corpora
        for u in source.utterances
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _mixed(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())


def _flac_bytes(samples: int) -> int:
    return round(samples * 2 * FLAC_RATIO) + 1024
