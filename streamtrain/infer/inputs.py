"""What there is to transcribe: files, folders, zips, manifests, shard sets and buckets, as one list of recordings."""

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

from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.errors import AudioError, StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, read_document
from sharding.files.names import canonical_name
from sharding.shardset.index import INDEX_NAME, ShardIndex, read_index, read_keys
from sharding.shardset.sample import Sample, whole_key
from sharding.shardset.store import Reader, Store, open_store
from sharding.sources.archive import AudioRoot, is_audio, list_files, open_audio, walk_files
from sharding.sources.manifest import ManifestOptions, read_source
from streamtrain.data.cache import read_verified

MANIFEST = re.compile(r"(?i)\.(jsonl|csv|tsv)(\.gz|\.zst)?$")
SHOWN_KINDS = 5  # of files that are no audio, by their suffixes
FIELDS = ("utterance_id", "audio_path")  # of a manifest


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Bytes of audio, and where in the recording they begin."""

    audio: bytes
    start_sec: float = 0.0
    utterance_id: str = ""  # of the recording, where it is known only now


@dataclass(frozen=True, slots=True)
class Recording:
    """One row of the result."""

    utterance_id: str
    audio_path: str  # as a person finds it
    load: Callable[[], list[AudioChunk]]  # raises AudioError, StoreError, ShardError or OSError
    stamp: str = ""  # of a file: another one, another file


def find_recordings(
    sources: Sequence[str], audio_root: str = "", columns: Mapping[str, str] | None = None
) -> list[Recording]:
    """All that the sources hold, in their order; of manifests, the audio root and the columns are as for a build.

    Raises StreamtrainError where one holds nothing, or where two recordings would have one name.
    """
    chosen = {name: column for name, column in (columns or {}).items() if name in FIELDS}
    reading = ManifestOptions(columns=chosen, follow_links=True, audio_root=audio_root, fields=FIELDS)
    if (audio_root or columns) and not any(map(MANIFEST.search, sources)):
        raise StreamtrainError("no source is a transcripts file", "--audio-root and --columns tell how these are read")
    found: list[Recording] = []
    for source in sources:
        here = list(_find(source, reading))
        if not here:
            raise StreamtrainError(f"no audio in {source}", f"looked for {', '.join(AUDIO_SUFFIXES)}, and zips of them")
        found += here
    names = Counter(canonical_name(one.utterance_id) for one in found)
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise StreamtrainError(
            f"{len(double):,} names stand for several recordings, such as {double[0]!r}",
            "give the folder that holds them all, a transcripts file with an utterance_id of its own for each, or one "
            "source at a time",
        )
    return found


def _find(source: str, reading: ManifestOptions) -> Iterator[Recording]:
    path = Path(source)
    if "://" in source and (MANIFEST.search(source) or source.lower().endswith(".zip")):
        raise StreamtrainError(f"{source}: is not read from a bucket", "copy it here first")
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
        yield from _in_manifest(path, reading)
    elif path.suffix.lower() == ".zip":
        yield from _in_zip(path)
    else:
        yield _file(path, path.stem)


def _printable(path: str) -> str:
    """Linux allows any bytes in a name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _in_folder(folder: Path) -> Iterator[Recording]:
    """Its audio files and those of its zips, links followed."""
    paths = {os.path.relpath(path, folder): Path(path) for path in walk_files(str(folder), follow_links=True)}
    zips = {name: AudioRoot(str(path), "") for name, path in paths.items() if name.lower().endswith(".zip")}
    make = {name: partial(_file, path) for name, path in paths.items() if name not in zips}
    for name, root in zips.items():
        make |= {f"{name}/{member}": partial(_member, root, member) for member in list_files(root)}
    return (make[name](utterance_id) for name, utterance_id in _choose_audio(str(folder), make))


def _in_zip(path: Path) -> Iterator[Recording]:
    root = AudioRoot(str(path), "")
    return (_member(root, name, utterance_id) for name, utterance_id in _choose_audio(str(path), list_files(root)))


def _choose_audio(where: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """The audio among files, each with an id: its stem if all differ, else its path, with the suffix if needed.

    Others are counted for the user, but for hidden ones.
    """
    names = sorted(names)
    audio = list(filter(is_audio, names))
    others = [name for name in names if not is_audio(name) and "/." not in f"/{name}"]
    if others:
        kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in others).most_common()
        told = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:SHOWN_KINDS]) + ", …" * (
            len(kinds) > SHOWN_KINDS
        )
        said = f"{counted(len(others), 'file')} ({_printable(told)})"
        print(f"{_printable(where)}: not looked at: {said}", file=sys.stderr)
    paths = list(map(PurePosixPath, audio))
    ids = [path.stem for path in paths]
    for longer in ([str(path.with_suffix("")) for path in paths], audio):
        ids = ids if len(set(map(canonical_name, ids))) == len(ids) else longer
    return list(zip(audio, ids, strict=True))


def _file(path: Path, utterance_id: str) -> Recording:
    stamp = ""
    with suppress(OSError):  # such as a link that leads nowhere, which is told in its row
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    return Recording(_printable(utterance_id), _printable(str(path)), partial(_read_file, path), stamp)


def _read_file(path: Path) -> list[AudioChunk]:
    try:
        return [AudioChunk(read_document(path, LARGE_BYTES))]
    except DocumentError as error:
        raise AudioError(f"not audio that can be read: {error}") from error


def _object(store: Reader, name: str, utterance_id: str) -> Recording:
    return Recording(utterance_id, f"{store.url}/{name}", lambda: [AudioChunk(store.read(name, LARGE_BYTES))])


def _member(root: AudioRoot, name: str, utterance_id: str) -> Recording:
    def load() -> list[AudioChunk]:
        with open_audio(root, name) as (file, size):
            return [AudioChunk(file.read(size))]

    return Recording(_printable(utterance_id), _printable(f"{root.path}/{name}"), load)


def _in_store(store: Store) -> Iterator[Recording]:
    if store.exists(INDEX_NAME):
        return _in_shards(store)
    return (_object(store, name, utterance_id) for name, utterance_id in _choose_audio(store.url, store.names()))


def _in_manifest(path: Path, reading: ManifestOptions) -> Iterator[Recording]:
    """The rows of a transcripts file, as a build names and finds them; no label is needed."""
    source = read_source(path, reading)
    for row, number in enumerate(source.numbers.tolist()):
        utterance_id, audio_path = source.layout.locate(source.line(row), number)
        yield _member(source.layout.audio, audio_path, utterance_id)


def _in_shards(store: Reader) -> Iterator[Recording]:
    """Every recording of a shard set once, whole."""
    index = read_index(store)
    for name, rows in rows_of_recordings(store, index):
        shard = index.shards[index.samples["shard"][rows[0]]]
        yield Recording(unquote(name), f"{store.url}/{shard.name}/{name}", partial(_load_rows, store, index, rows))


def rows_of_recordings(store: Reader, index: ShardIndex) -> Iterator[tuple[str, list[int]]]:
    """The rows of each recording, by its key: several where the build cut it into pieces, in no order."""
    keys = read_keys(store, index).tolist()
    named = sorted((key if index.external else whole_key(key), row) for row, key in enumerate(keys))
    for name, group in groupby(named, key=lambda one: one[0]):
        yield name, [row for _, row in group]


def read_pieces(store: Reader, index: ShardIndex, rows: Sequence[int]) -> list[Sample]:
    """The samples of a recording, in order. Raises ShardError where one is damaged."""
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
