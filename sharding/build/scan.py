"""The first look at every clip: its row is parsed, its label checked, its header read. All that the plan needs.

A clip becomes one row of a table of numbers, so that a plan of millions fits in memory; its text stays on its line.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from sharding.sources.archive import AudioRoot, list_audio, open_audio, actual_path
from sharding.audio.codec import AudioInfo, frame_count, probe
from sharding.errors import AudioError, ManifestError
from sharding.labels.ipa import alphabet_of, count_symbols, ctc_frames_needed, foreign_symbols, name_symbols, read_label
from sharding.sources.manifest import Layout, Source, Utterance, printable
from sharding.files.names import canonical_name
from sharding.shardset.sample import escape_key, piece_key
from sharding.pool import Workers, count_done

CHUNK, CHUNKS_PER_WORKER = 256, 8  # rows of a task at most; tasks of a worker at least, as far as there are rows

CLIP_DTYPE = np.dtype(
    [
        ("source", "<u4"),
        ("row", "<u4"),  # in its source
        ("id", "<u8", 2),  # xxh3-128 of the utterance id, as names are compared
        ("key", "<u8", 2),  # xxh3-128 of its key: the order within a bucket
        ("said", "<u8", 2),  # xxh3-128 of all that the row says, with the size of the audio
        ("path", "<u8"),  # xxh3-64 of the audio path, as the file is named
        ("speaker", "<u8"),  # first 8 bytes of the SHA-256 of whom validation keeps apart
        ("named", "?"),  # whether that is a child, or a group that the user chose
        ("fits", "?"),  # has a label that CTC can emit in so many frames
        ("symbols", "<u4"),  # of its label
        ("foreign", "<u4"),  # of these, how many are not in the alphabet
        ("refused", "?"),
        ("passthrough", "?"),
        ("samples", "<u8"),  # at 16 kHz
        ("bytes", "<u8"),  # of the audio file
    ]
)
ClipTable = npt.NDArray[np.void]  # (N,) of CLIP_DTYPE


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a clip cannot be used."""

    utterance: Utterance
    reason: str
    in_training: bool = False  # only there: validation is never filtered by its labels


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The clips of some sources, and where the rest of what is said of them can be read."""

    clips: ClipTable
    refusals: dict[int, Refusal]  # by row of `clips`
    ignored_fields: frozenset[str]
    sources: tuple[Source, ...] = ()

    def select(self, chosen: npt.NDArray[np.bool_]) -> "ScanResult":
        """The chosen clips alone."""
        new_row = np.cumsum(chosen) - 1
        refusals = {int(new_row[row]): refusal for row, refusal in self.refusals.items() if chosen[row]}
        return replace(self, clips=self.clips[chosen], refusals=refusals)

    def find(self, clip: int) -> tuple[str, Utterance]:
        """Where the user finds the row of a clip, and the row."""
        number, row = self.clips[["source", "row"]][clip].item()
        source = self.sources[number]
        line = int(source.numbers[row])
        return f"{source.layout.transcripts}:{line}", source.layout.parse(source.line(row), line)[0]


def scan(sources: Sequence[Source], track: str, pool: Workers) -> ScanResult:
    """Examine every row of every source; refuse audio that several rows name.

    Raises ManifestError for a row that is none, or an id that comes twice.
    """
    chunk = max(1, min(CHUNK, sum(map(len, sources)) // (CHUNKS_PER_WORKER * pool.count)))
    chunks = [(number, start) for number, source in enumerate(sources) for start in range(0, len(source), chunk)]
    sizes = [min(chunk, len(sources[number]) - start) for number, start in chunks]

    def jobs() -> Iterator[tuple[Layout, str, list[tuple[int, bytes]]]]:
        for number, start in chunks:
            source = sources[number]
            rows = range(start, min(start + chunk, len(source)))
            yield source.layout, track, [(int(source.numbers[row]), source.line(row)) for row in rows]

    parts = pool.map(_scan_chunk, jobs(), sizes, "examining")
    clips = np.concatenate([part.clips for part in parts]) if parts else np.zeros(0, CLIP_DTYPE)
    clips["source"] = np.repeat([number for number, _ in chunks], sizes)
    clips["row"] = np.concatenate(
        [np.arange(start, start + size) for (_, start), size in zip(chunks, sizes, strict=True)]
    )
    starts = np.cumsum([0, *sizes])
    refusals = {int(start) + row: refusal for start, part in zip(starts, parts, strict=False)
                for row, refusal in part.refusals.items()}  # fmt: skip
    ignored = frozenset[str]().union(*(part.ignored_fields for part in parts))
    examined = ScanResult(clips, refusals, ignored, tuple(sources))
    _check_ids(examined)
    return _refuse_shared_audio(examined)


def hash_sources(clips: ClipTable, base: str = "") -> str:
    """What the sources say, whatever their order and wherever they lie; with the hash of the `base` appended to."""
    said = clips["said"]
    added = hashlib.sha256(said[np.lexsort((said[:, 1], said[:, 0]))].tobytes()).hexdigest()
    return hashlib.sha256((base + added).encode()).hexdigest() if base else added


def find_orphans(examined: ScanResult, pool: Workers) -> list[str]:
    """Audio files that no row speaks of, as corpus/path, each on a line whatever its name."""
    sources, clips, orphans = examined.sources, examined.clips, []
    listings = pool.map(_list_audio, [source.layout for source in sources], [0] * len(sources), "listing")
    for number, (names, hashes) in enumerate(listings):
        audio = sources[number].layout.audio  # which several transcripts may share
        same = [other for other, source in enumerate(sources) if source.layout.audio == audio]
        known = clips["path"][np.isin(clips["source"], same)]
        corpus = sources[number].layout.corpus
        orphans += [printable(f"{corpus}/{names[row]}") for row in np.flatnonzero(~np.isin(hashes, known))]
    return sorted(set(orphans))


def hash_128(text: str) -> tuple[int, int]:
    high, low = divmod(xxhash.xxh3_128_intdigest(text.encode()), 2**64)
    return high, low


def piece_order(utterance_id: str, piece: int) -> tuple[int, int]:
    return hash_128(piece_key(escape_key(utterance_id), piece))


def speaker_hash(speaker: str) -> int:
    """SHA-256 of a speaker as a number below 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:8], "big")


# --- what workers do --------------------------------------------------------------------------------------------


def _scan_chunk(job: tuple[Layout, str, list[tuple[int, bytes]]]) -> ScanResult:
    layout, track, rows = job
    clips, refusals, ignored = [], {}, frozenset[str]()
    for row, (number, line) in enumerate(rows):
        utterance, others = layout.parse(line, number)
        ignored |= others
        clip, refusal = _scan_one(utterance, layout.audio, track)
        clips.append(clip)
        if refusal:
            refusals[row] = refusal
        count_done()
    return ScanResult(np.array(clips, CLIP_DTYPE), refusals, ignored)


def _scan_one(utterance: Utterance, audio: AudioRoot, track: str) -> tuple[tuple[object, ...], Refusal | None]:
    """The clip's row of the table, which does not know yet where it stands."""
    text = read_label(utterance.text, track)
    refusal, info, size = None, AudioInfo(0, False), 0
    try:
        with open_audio(audio, utterance.audio_path) as (file, size):
            if size == 0:
                raise AudioError("audio file is empty (0 bytes)")
            if utterance.filesize_bytes not in (None, size):
                raise AudioError(f"size is {size} bytes, the manifest says {utterance.filesize_bytes}")
            info = probe(file)
    except AudioError as error:
        refusal = Refusal(utterance, error.message)
    alphabet = alphabet_of(track)
    counts = count_symbols(text, "", alphabet)
    if (foreign := foreign_symbols(text, alphabet)) and not refusal:
        reason = f"label has symbols outside the alphabet: {name_symbols(foreign, alphabet)}"
        refusal = Refusal(utterance, reason, in_training=True)
    clip = {
        "source": 0,
        "row": 0,
        "id": hash_128(canonical_name(utterance.utterance_id)),
        "key": hash_128(escape_key(utterance.utterance_id)),
        "said": hash_128(repr((utterance.values, size))),
        "path": _hash_path(actual_path(audio, utterance.audio_path)),
        "speaker": speaker_hash(utterance.speaker),
        "named": bool(utterance.group or utterance.child_id),
        "fits": bool(text) and frame_count(info.samples) >= ctc_frames_needed(text),
        "symbols": counts.symbols,
        "foreign": counts.foreign,
        "refused": refusal is not None and not refusal.in_training,
        "passthrough": info.passthrough,
        "samples": info.samples,
        "bytes": size,
    }
    return tuple(clip[name] for name in CLIP_DTYPE.names or ()), refusal


def _list_audio(layout: Layout) -> tuple[list[str], npt.NDArray[np.uint64]]:
    names = list_audio(layout.audio)
    return names, np.array([_hash_path(name) for name in names], np.uint64)


def _plain(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _hash_path(path: str) -> int:
    return xxhash.xxh3_64_intdigest(_plain(path).encode())


def _check_ids(examined: ScanResult) -> None:
    ids = examined.clips["id"]
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of two the same the first given comes first
    twice = np.flatnonzero((ids[order[1:]] == ids[order[:-1]]).all(axis=1))
    if len(twice):
        (first, one), (second, other) = map(examined.find, sorted(order[twice[0] : twice[0] + 2].tolist()))
        spelt = "" if one.utterance_id == other.utterance_id else f", as {one.utterance_id!a}: to a reader the same"
        name = f"{other.utterance_id!a}" if spelt else f"{other.utterance_id!r}"
        twice_named = "this source is named twice: leave one of them out"
        raise ManifestError(
            f"{second}: utterance_id {name} was seen before, at {first}{spelt}",
            twice_named
            if os.path.realpath(second) == os.path.realpath(first)
            else "every clip needs an id of its own; rename one, or leave one of the sources out",
        )


def _refuse_shared_audio(examined: ScanResult) -> ScanResult:
    """Refuse clips whose audio file another row names, too: each label is of a part of it, or one of them is wrong.

    Both sides might hold it, too, and validation would be of what was trained on.
    """
    clips, sources = examined.clips, examined.sources
    roots = [source.layout.audio for source in sources]  # which several transcripts may share
    firsts = np.array([roots.index(root) for root in roots], np.uint64)
    files = np.column_stack([firsts[clips["source"]], clips["path"]])
    order = np.lexsort(files.T)
    same = (files[order[1:]] == files[order[:-1]]).all(axis=1)
    rows = defaultdict[tuple[AudioRoot, str], dict[int, Utterance]](dict)
    for row in order[np.append(same, False) | np.append(False, same)].tolist():
        layout, utterance = sources[int(clips["source"][row])].layout, examined.find(row)[1]
        rows[layout.audio, _plain(actual_path(layout.audio, utterance.audio_path))][row] = utterance
    shared = {row: Refusal(utterance, f"{len(several)} rows name this audio file; cut it, and give each a file")
              for several in rows.values() if len(several) > 1 for row, utterance in several.items()}  # fmt: skip
    clips["refused"][list(shared)] = True
    return replace(examined, refusals=examined.refusals | shared)
