"""List the recordings to transcribe: from files, folders, zips, manifests, shard sets and buckets."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np

from sharding.audio.codec import decode_range, encode
from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.errors import AudioError, StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, read_document
from sharding.files.names import canonical_name
from sharding.shardset.index import INDEX_NAME, ShardIndex, read_index, read_keys
from sharding.shardset.sample import Sample, whole_key
from sharding.shardset.store import Reader, Store, open_store
from sharding.sources.archive import AudioRoot, is_audio, list_files, open_audio, walk_files
from sharding.sources.manifest import read_source
from sharding.sources.options import ManifestOptions
from streamtrain.data.cache import read_verified

MANIFEST = re.compile(r"(?i)\.(jsonl|csv|tsv)(\.gz|\.zst)?$")
SHOWN_KINDS = 5  # suffixes of files without audio, in a message
FIELDS = ("utterance_id", "audio_path", "audio_duration_sec", "offset_sec", "duration_sec")  # read from a manifest


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Hold encoded audio and its start in the recording."""

    audio: bytes
    start_sec: float = 0.0
    utterance_id: str = ""  # of the recording, if known only after loading


@dataclass(frozen=True, slots=True)
class Recording:
    """Describe a recording to transcribe: one row of the result."""

    utterance_id: str
    audio_path: str  # as the user can find it
    load: Callable[[], list[AudioChunk]]  # raises AudioError, StoreError, ShardError or OSError
    stamp: str = ""  # size and mtime of a file, to detect a change


def find_recordings(
    sources: Sequence[str], audio_root: str = "", columns: Mapping[str, str] | None = None
) -> list[Recording]:
    """Return all recordings in the sources, in order; `audio_root` and `columns` apply to manifests, as in a build.

    Raises StreamtrainError if a source has no audio or two recordings would have the same name.
    """
    chosen = {name: column for name, column in (columns or {}).items() if name in FIELDS}
    options = ManifestOptions(columns=chosen, follow_links=True, audio_root=audio_root, fields=FIELDS)
    if (audio_root or columns) and not any(map(MANIFEST.search, sources)):
        raise StreamtrainError("no source is a transcripts file", "--audio-root and --columns apply to these only")
    recordings: list[Recording] = []
    for source in sources:
        additions = list(_find(source, options))
        if not additions:
            raise StreamtrainError(f"no audio in {source}", f"looked for {', '.join(AUDIO_SUFFIXES)}, and zips of them")
        recordings += additions
    names = Counter(canonical_name(recording.utterance_id) for recording in recordings)
    duplicates = [name for name, count in names.items() if count > 1]
    if duplicates:
        raise StreamtrainError(
            f"{len(duplicates):,} names are shared by several recordings, such as {duplicates[0]!r}",
            "give their common folder, a transcripts file with unique utterance_ids, or one source at a time",
        )
    return recordings


def _find(source: str, options: ManifestOptions) -> Iterator[Recording]:
    path = Path(source)
    if "://" in source and (MANIFEST.search(source) or source.lower().endswith(".zip")):
        raise StreamtrainError(f"{source}: cannot be read from a bucket", "copy it to this machine first")
    if "://" in source and not is_audio(source):
        yield from _in_store(open_store(source))
    elif "://" in source:
        folder, _, name = source.rpartition("/")
        yield _object(open_store(folder), name, Path(name).stem)
    elif path.is_dir() and (path / INDEX_NAME).is_file():
        yield from _in_shards(open_store(path))
    elif path.is_dir():
        yield from _in_folder(path)
    elif not path.is_file():
        raise StreamtrainError(f"{source}: there is no such file or folder")
    elif MANIFEST.search(path.name):
        yield from _in_manifest(path, options)
    elif path.suffix.lower() == ".zip":
        yield from _in_zip(path)
    else:
        yield _file(path, path.stem)


def _printable(path: str) -> str:
    """Return a path as valid UTF-8, since Linux allows any bytes in a name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _in_folder(folder: Path) -> Iterator[Recording]:
    """Return the audio files in a folder and in its zips, following links."""
    paths = {os.path.relpath(path, folder): Path(path) for path in walk_files(str(folder), follow_links=True)}
    zips = {name: AudioRoot(str(path), "") for name, path in paths.items() if name.lower().endswith(".zip")}
    make = {name: partial(_file, path) for name, path in paths.items() if name not in zips}
    for name, root in zips.items():
        make |= {f"{name}/{member}": partial(_member, root, member) for member in list_files(root)}
    return (make[name](utterance_id) for name, utterance_id in _choose_audio(str(folder), make))


def _in_zip(path: Path) -> Iterator[Recording]:
    root = AudioRoot(str(path), "")
    return (_member(root, name, utterance_id) for name, utterance_id in _choose_audio(str(path), list_files(root)))


def _choose_audio(source: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the audio files, each with an id: its stem if all differ, else its path, with the suffix if needed.

    Other files are counted on stderr, except hidden ones.
    """
    names = sorted(names)
    audio = list(filter(is_audio, names))
    others = [name for name in names if not is_audio(name) and "/." not in f"/{name}"]
    if others:
        kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in others).most_common()
        more = ", …" if len(kinds) > SHOWN_KINDS else ""
        summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:SHOWN_KINDS]) + more
        skipped = f"{counted(len(others), 'file')} ({_printable(summary)})"
        print(f"{_printable(source)}: skipped {skipped}", file=sys.stderr)
    paths = list(map(PurePosixPath, audio))
    ids = [path.stem for path in paths]
    for longer in ([str(path.with_suffix("")) for path in paths], audio):
        ids = ids if len(set(map(canonical_name, ids))) == len(ids) else longer
    return list(zip(audio, ids, strict=True))


def _file(path: Path, utterance_id: str) -> Recording:
    stamp = ""
    with suppress(OSError):  # such as a broken link: loading it reports the error in its row
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    return Recording(_printable(utterance_id), _printable(str(path)), partial(_read_file, path), stamp)


def _read_file(path: Path) -> list[AudioChunk]:
    try:
        return [AudioChunk(read_document(path, LARGE_BYTES))]
    except DocumentError as error:
        raise AudioError(f"cannot be read as audio: {error}") from error


def _object(store: Reader, name: str, utterance_id: str) -> Recording:
    return Recording(utterance_id, f"{store.url}/{name}", lambda: [AudioChunk(store.read(name, LARGE_BYTES))])


def _member(
    root: AudioRoot, name: str, utterance_id: str, offset_sec: float | None = None, duration_sec: float | None = None
) -> Recording:
    def load() -> list[AudioChunk]:
        with open_audio(root, name) as (file, size):
            if offset_sec is not None:
                return [AudioChunk(encode(decode_range(file, offset_sec, duration_sec).sound))]
            return [AudioChunk(file.read(size))]

    return Recording(_printable(utterance_id), _printable(f"{root.path}/{name}"), load)


def _in_store(store: Store) -> Iterator[Recording]:
    if store.exists(INDEX_NAME):
        return _in_shards(store)
    return (_object(store, name, utterance_id) for name, utterance_id in _choose_audio(store.url, store.names()))


def _in_manifest(path: Path, options: ManifestOptions) -> Iterator[Recording]:
    """Yield the recordings of a transcripts file with the ids and paths of a build; no label is needed."""
    source = read_source(path, options)
    for row in range(len(source)):
        clip = source.layout.locate(source.line(row), source.place(row))
        yield _member(source.layout.audio, clip.audio_path, clip.utterance_id, clip.offset_sec, clip.duration_sec)


def _in_shards(store: Reader) -> Iterator[Recording]:
    """Yield each recording of a shard set once, whole."""
    index = read_index(store)
    for name, rows in rows_of_recordings(store, index):
        shard = index.shards[index.samples["shard"][rows[0]]]
        yield Recording(unquote(name), f"{store.url}/{shard.name}/{name}", partial(_load_rows, store, index, rows))


def rows_of_recordings(store: Reader, index: ShardIndex) -> Iterator[tuple[str, list[int]]]:
    """Yield each recording's key and index rows: several, unordered, if the build cut it into pieces."""
    keys = read_keys(store, index).tolist()
    named = sorted((key if index.external else whole_key(key), row) for row, key in enumerate(keys))
    for name, group in groupby(named, key=lambda pair: pair[0]):
        yield name, [row for _, row in group]


def read_pieces(store: Reader, index: ShardIndex, rows: Sequence[int]) -> list[Sample]:
    """Return the samples of a recording in order. Raises ShardError if one is damaged."""
    samples = [
        sample
        for row in rows
        for sample in read_verified(store, index, index.shards[index.samples["shard"][row]], np.array([row]))
    ]
    return sorted(samples, key=lambda sample: sample.start_sec or 0.0)


def _load_rows(store: Reader, index: ShardIndex, rows: Sequence[int]) -> list[AudioChunk]:
    return [
        AudioChunk(sample.audio, sample.start_sec or 0.0, sample.parent_id or sample.utterance_id)
        for sample in read_pieces(store, index, rows)
    ]
