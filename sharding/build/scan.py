"""Scan every clip for the plan: parse its row, check its label, read its audio header.

A clip becomes one row of a numeric table, so that a plan of millions fits in memory; its text stays in its source.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.audio.codec import AudioInfo, frame_count, probe, probe_range
from sharding.errors import AudioError, ManifestError
from sharding.files.names import canonical_name
from sharding.files.spool import map_table, select_rows
from sharding.labels.policy import LabelPolicy
from sharding.labels.units import ctc_frames_needed
from sharding.pool import Workers, count_done
from sharding.shardset.sample import escape_key
from sharding.shardset.schema import SPLITS
from sharding.sources.archive import AudioRoot, actual_path, list_audio, open_audio
from sharding.sources.manifest import Layout, Source, Utterance, printable
from sharding.sources.splits import split_of

CHUNK, CHUNKS_PER_WORKER = 256, 8  # maximum rows per task; minimum tasks per worker, if there are enough rows

CLIP_DTYPE = np.dtype(
    [
        ("source", "<u4"),
        ("row", "<u4"),  # in its source
        ("id", "<u8", 2),  # xxh3-128 of the utterance id, as names are compared
        ("key", "<u8", 2),  # xxh3-128 of its key: the order within a bucket
        ("content", "<u8", 2),  # xxh3-128 of all values of the row, with the size of the audio
        ("path", "<u8"),  # xxh3-64 of the audio path, as the file is actually named
        ("range", "<u8"),  # xxh3-64 of the range of it that the clip is, 0: all of it
        ("speaker", "<u8"),  # first 8 bytes of the SHA-256 of the speaker, by which validation is split
        ("split", "u1"),  # as published: its number in SPLITS + 1, NO_SPLIT or UNKNOWN_SPLIT
        ("named", "?"),  # whether the speaker is a child, or a group that the user chose
        ("fits", "?"),  # has a label that CTC can emit in the frames of the clip
        ("symbols", "<u4"),  # number in its label
        ("foreign", "<u4"),  # number of these that are not in the alphabet
        ("refused", "?"),
        ("passthrough", "?"),
        ("samples", "<u8"),  # at 16 kHz
        ("bytes", "<u8"),  # of the audio file
    ]
)
NO_SPLIT, UNKNOWN_SPLIT = 0, 255
ClipTable = npt.NDArray[np.void]  # (N,) of CLIP_DTYPE


@dataclass(frozen=True, slots=True)
class Refusal:
    """Hold the reason why a clip cannot be used."""

    utterance: Utterance
    reason: str
    in_training: bool = False  # refused in training only: validation is never filtered by its labels


@dataclass(frozen=True, eq=False)
class ScanResult:
    """Hold the table of clips of some sources, and the sources, from which their rows can be read."""

    clips: ClipTable
    refusals: dict[int, Refusal]  # by row of `clips`
    ignored_fields: frozenset[str]
    sources: tuple[Source, ...] = ()

    def select(self, chosen: npt.NDArray[np.bool_]) -> "ScanResult":
        """Return the chosen clips alone."""
        if chosen.all():
            return self
        new_row = np.cumsum(chosen) - 1
        refusals = {int(new_row[row]): refusal for row, refusal in self.refusals.items() if chosen[row]}
        return replace(self, clips=select_rows(self.clips, chosen), refusals=refusals)

    def find(self, clip: int) -> tuple[str, Utterance]:
        """Return the file and line of a clip's row, and the row."""
        number, row = self.clips[["source", "row"]][clip].item()
        source = self.sources[number]
        return source.place(row), source.parse(row)


def scan(sources: Sequence[Source], labels: LabelPolicy, pool: Workers) -> ScanResult:
    """Scan every row of every source; refuse audio that several rows name.

    Raises ManifestError if a row is malformed or an id is duplicated.
    """
    chunk = max(1, min(CHUNK, sum(map(len, sources)) // (CHUNKS_PER_WORKER * pool.count)))
    chunks = [(number, start) for number, source in enumerate(sources) for start in range(0, len(source), chunk)]
    sizes = [min(chunk, len(sources[number]) - start) for number, start in chunks]

    def jobs() -> Iterator[tuple[Layout, LabelPolicy, list[tuple[bytes, str]]]]:
        for number, start in chunks:
            source = sources[number]
            rows = range(start, min(start + chunk, len(source)))
            yield source.layout, labels, [(source.line(row), source.place(row)) for row in rows]

    clips, refusals, ignored = map_table(sum(sizes), CLIP_DTYPE), dict[int, Refusal](), set[str]()
    first, parts = 0, pool.stream(_scan_chunk, jobs(), sizes, "examining")
    for (number, start), part in zip(chunks, parts, strict=True):
        rows = clips[first : first + len(part.clips)]
        rows[:], rows["source"], rows["row"] = part.clips, number, np.arange(start, start + len(rows))
        refusals |= {first + row: refusal for row, refusal in part.refusals.items()}
        ignored |= part.ignored_fields
        first += len(rows)
    result = ScanResult(clips, refusals, frozenset(ignored), tuple(sources))
    _check_ids(result)
    return _refuse_shared_audio(result)


def hash_sources(clips: ClipTable, base: str = "") -> str:
    """Return a digest of the sources' content, independent of order and paths; chained to that of a `base`."""
    content = clips["content"]
    added = hashlib.sha256(content[np.lexsort((content[:, 1], content[:, 0]))].tobytes()).hexdigest()
    return hashlib.sha256((base + added).encode()).hexdigest() if base else added


def find_orphans(scanned: ScanResult, pool: Workers) -> list[str]:
    """Return the audio files that no row names, as corpus/path, with unprintable characters escaped."""
    sources, clips, orphans = scanned.sources, scanned.clips, []
    listings = pool.map(_list_audio, [source.layout for source in sources], [0] * len(sources), "listing")
    for number, (names, hashes) in enumerate(listings):
        audio = sources[number].layout.audio  # several transcripts may share it
        sharing = [index for index, source in enumerate(sources) if source.layout.audio == audio]
        known = clips["path"][np.isin(clips["source"], sharing)]
        corpus = sources[number].layout.corpus
        unknown = [names[row] for row in np.flatnonzero(~np.isin(hashes, known))]
        left_out = re.compile(sources[number].layout.left_out or r"(?!)")  # the second matches nothing
        orphans += [printable(f"{corpus}/{name}") for name in unknown if not left_out.fullmatch(name)]
    return sorted(set(orphans))


def hash_128(text: str) -> tuple[int, int]:
    high, low = divmod(xxhash.xxh3_128_intdigest(text.encode()), 2**64)
    return high, low


def speaker_hash(speaker: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a speaker, as a number."""
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:8], "big")


# --- in the workers ---------------------------------------------------------------------------------------------


def _scan_chunk(job: tuple[Layout, LabelPolicy, list[tuple[bytes, str]]]) -> ScanResult:
    layout, labels, rows = job
    clips, refusals, ignored = [], {}, frozenset[str]()
    for row, (line, place) in enumerate(rows):
        utterance, unused = layout.parse(line, place)
        ignored |= unused
        clip, refusal = _scan_one(utterance, layout.audio, labels)
        clips.append(clip)
        if refusal:
            refusals[row] = refusal
        count_done()
    return ScanResult(np.array(clips, CLIP_DTYPE), refusals, ignored)


def _scan_one(utterance: Utterance, audio: AudioRoot, labels: LabelPolicy) -> tuple[tuple[object, ...], Refusal | None]:
    """Return the clip's row of the table, without its position, and its refusal, if it is refused."""
    text = labels.normalize(utterance.text)
    refusal, info, size = None, AudioInfo(0, False), 0
    try:
        with open_audio(audio, utterance.audio_path) as (file, size):
            if size == 0:
                raise AudioError("audio file is empty (0 bytes)")
            if utterance.filesize_bytes not in (None, size):
                raise AudioError(f"size is {size} bytes, the manifest says {utterance.filesize_bytes}")
            offset, length = utterance.offset_sec, utterance.duration_sec
            info = probe(file) if offset is None else probe_range(file, offset, length)
    except AudioError as error:
        refusal = Refusal(utterance, error.message)
    symbols = labels.symbols_of(text)
    foreign = labels.count_foreign(symbols) if labels.symbols else 0
    if foreign and not refusal:
        refusal = Refusal(utterance, str(labels.why_foreign(text)), in_training=True)
    clip = {
        "source": 0,
        "row": 0,
        "id": hash_128(canonical_name(utterance.utterance_id)),
        "key": hash_128(escape_key(utterance.utterance_id)),
        "content": hash_128(repr((utterance.identity, size))),
        "path": _hash_path(actual_path(audio, utterance.audio_path)),
        "range": _hash_range(utterance),
        "speaker": speaker_hash(utterance.speaker),
        "split": _number_split(utterance.split),
        "named": bool(utterance.group or utterance.child_id),
        "fits": bool(text) and frame_count(info.samples) >= ctc_frames_needed(symbols),
        "symbols": len(symbols),
        "foreign": foreign,
        "refused": refusal is not None and not refusal.in_training,
        "passthrough": info.passthrough,
        "samples": info.samples,
        "bytes": size,
    }
    return tuple(clip[name] for name in CLIP_DTYPE.names or ()), refusal


def _number_split(name: str) -> int:
    split = split_of(name)
    return NO_SPLIT if not name else UNKNOWN_SPLIT if split is None else SPLITS.index(split) + 1


def _hash_range(utterance: Utterance) -> int:
    span = repr((utterance.offset_sec, utterance.duration_sec))
    return 0 if utterance.offset_sec is None else xxhash.xxh3_64_intdigest(span.encode()) or 1


def _list_audio(layout: Layout) -> tuple[list[str], npt.NDArray[np.uint64]]:
    names = list_audio(layout.audio)
    return names, np.array([_hash_path(name) for name in names], np.uint64)


def _plain(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _hash_path(path: str) -> int:
    return xxhash.xxh3_64_intdigest(_plain(path).encode())


def _check_ids(scanned: ScanResult) -> None:
    """Raise ManifestError if two rows have the same id."""
    ids = scanned.clips["id"]
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids, the one given first comes first
    repeats = np.flatnonzero((ids[order[1:]] == ids[order[:-1]]).all(axis=1))
    if len(repeats):
        (first, before), (second, repeat) = map(scanned.find, sorted(order[repeats[0] : repeats[0] + 2].tolist()))
        spelling = "" if before.utterance_id == repeat.utterance_id else f", as {before.utterance_id!a}: looks the same"
        name = f"{repeat.utterance_id!a}" if spelling else f"{repeat.utterance_id!r}"
        hint = "every clip needs a unique id; rename one of the two, or omit one of the sources"
        if os.path.realpath(second) == os.path.realpath(first):
            hint = "this source is named twice: omit one of them"
        raise ManifestError(f"{second}: utterance_id {name} was seen before, at {first}{spelling}", hint)


def _refuse_shared_audio(scanned: ScanResult) -> ScanResult:
    """Refuse clips if several rows name their audio, or the same range of it.

    Each label is then of a part of it, or one of them is wrong. The rows may also be on both sides of the split, and
    validation would then use training audio.
    """
    clips, sources = scanned.clips, scanned.sources
    rows = defaultdict[tuple[object, ...], dict[int, Utterance]](dict)
    for row, by_range in _find_shared_audio(scanned):
        layout, utterance = sources[int(clips["source"][row])].layout, scanned.find(row)[1]
        span = (utterance.offset_sec, utterance.duration_sec) if by_range else ()
        rows[layout.audio, _plain(actual_path(layout.audio, utterance.audio_path)), *span][row] = utterance
    shared = dict[int, Refusal]()
    for key, group in rows.items():
        named = "this range of this audio file" if len(key) > 2 else "this audio file; cut it into one file per row"
        if len(group) > 1:
            shared |= {row: Refusal(one, f"{len(group)} rows name {named}") for row, one in group.items()}
    clips["refused"][list(shared)] = True
    return replace(scanned, refusals=scanned.refusals | shared)


def _find_shared_audio(scanned: ScanResult) -> Iterator[tuple[int, bool]]:
    """Yield the clips whose audio file others have too, and whether all of these are ranges, but some the same."""
    clips, roots = scanned.clips, [source.layout.audio for source in scanned.sources]  # several may share one
    firsts = np.array([roots.index(root) for root in roots], np.uint64)
    files = np.column_stack([firsts[clips["source"]], clips["path"], clips["range"]])
    order = np.lexsort(files.T[::-1])
    equal = files[order[1:]] == files[order[:-1]]
    same_file, same_range = equal[:, :2].all(axis=1), equal.all(axis=1)
    group = np.cumsum(np.append(False, ~same_file))
    has_whole = (np.bincount(group, clips["range"][order] == 0) > 0)[group]
    for same, by_range, chosen in ((same_file, False, has_whole), (same_range, True, ~has_whole)):
        rows = order[(np.append(same, False) | np.append(False, same)) & chosen]
        yield from ((row, by_range) for row in rows.tolist())
