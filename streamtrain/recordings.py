"""What there is to transcribe: files, folders, zips, manifests, shard sets and buckets, as one list of recordings."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from sharding.archive import AUDIO_SUFFIXES, AudioRoot, find_audio, list_audio, open_audio, walk_files
from sharding.errors import ManifestError, StreamtrainError
from sharding.format import INDEX_NAME, ShardIndex, read_index, read_keys
from sharding.sample import Sample, whole_key
from sharding.store import Reader, Store, open_store
from sharding.tables import read_lines
from streamtrain.stream import read_verified

MANIFEST = re.compile(r"\.(jsonl|csv|tsv)(\.gz|\.zst)?$")
LOOKED_AT = 256  # audio paths of a manifest, to see what they are relative to


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of audio, and where in the recording they begin."""

    audio: bytes
    start_sec: float = 0.0
    utterance_id: str = ""  # of the recording, where it is known only now


@dataclass(frozen=True, slots=True)
class Recording:
    """One row of the result."""

    utterance_id: str
    audio_path: str  # as a person finds it
    load: Callable[[], list[Piece]]  # raises AudioError, StoreError, ShardError or OSError
    stamp: str = ""  # of a file: another one, another file


def find_recordings(sources: Sequence[str]) -> list[Recording]:
    """All that the sources hold, in their order.

    Raises StreamtrainError where one holds nothing, or where two recordings would have one name.
    """
    found: list[Recording] = []
    for source in sources:
        here = list(_find(source))
        if not here:
            raise StreamtrainError(f"no audio in {source}", f"looked for {', '.join(AUDIO_SUFFIXES)}, and zips of them")
        found += here
    names = Counter(one.utterance_id for one in found)
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise StreamtrainError(
            f"{len(double):,} names stand for several recordings, such as {double[0]!r}",
            "give them in a transcripts file with an utterance_id of its own for each, or one source at a time",
        )
    return found


def _find(source: str) -> Iterator[Recording]:
    path = Path(source)
    if "://" in source and (MANIFEST.search(source) or source.lower().endswith(".zip")):
        raise StreamtrainError(f"{source}: is not read from a bucket", "copy it here first")
    if "://" in source and not _is_audio(source):
        yield from _in_store(open_store(source))
    elif "://" in source:
        folder, _, name = source.rpartition("/")
        yield _object(open_store(folder), name)
    elif path.is_dir() and (path / INDEX_NAME).is_file():
        yield from _in_shards(open_store(path))
    elif path.is_dir():
        yield from _in_folder(path)
    elif not path.is_file():
        raise StreamtrainError(f"{source}: there is no such file or folder")
    elif MANIFEST.search(path.name):
        yield from _in_manifest(path)
    elif path.suffix.lower() == ".zip":
        yield from _in_zip(path)
    else:
        yield _file(path, path.stem)


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _printable(path: str) -> str:
    """Linux allows any bytes in a name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _in_folder(folder: Path) -> Iterator[Recording]:
    """Its audio files and those of its zips, links followed, under their own names where these differ, else by path."""
    paths = [Path(path) for path in walk_files(str(folder), follow_links=True)
             if path.lower().endswith((*AUDIO_SUFFIXES, ".zip"))]  # fmt: skip
    audio = sorted(path for path in paths if path.suffix.lower() != ".zip")
    differ = len({path.stem for path in audio}) == len(audio)
    for path in audio:
        yield _file(path, path.stem if differ else path.relative_to(folder).with_suffix("").as_posix())
    for path in sorted(set(paths).difference(audio)):
        yield from _in_zip(path)


def _in_zip(path: Path) -> Iterator[Recording]:
    root = AudioRoot(str(path), "")
    return (_member(root, name, Path(name).stem) for name in list_audio(root))


def _file(path: Path, utterance_id: str) -> Recording:
    stamp = ""
    with suppress(OSError):  # such as a link that leads nowhere, which is told in its row
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    return Recording(_printable(utterance_id), _printable(str(path)), lambda: [Piece(path.read_bytes())], stamp)


def _object(store: Reader, name: str) -> Recording:
    return Recording(Path(name).stem, f"{store.url}/{name}", lambda: [Piece(store.read(name))])


def _member(root: AudioRoot, name: str, utterance_id: str) -> Recording:
    def load() -> list[Piece]:
        with open_audio(root, name) as (file, size):
            return [Piece(file.read(size))]

    return Recording(utterance_id, f"{root.path}/{name}", load)


def _in_store(store: Store) -> Iterator[Recording]:
    if store.exists(INDEX_NAME):
        return _in_shards(store)
    return (_object(store, name) for name in sorted(filter(_is_audio, store.names())))


def _in_manifest(path: Path) -> Iterator[Recording]:
    """Rows with an audio_path, and a utterance_id unless the file's name is to stand for it; no label is needed."""
    lines = read_lines(path, ())
    rows = []
    for start, end, number in zip(lines.starts.tolist(), lines.ends.tolist(), lines.numbers.tolist(), strict=True):
        try:
            row = json.loads(lines.text[start:end].decode())
            audio_path = row["audio_path"]
            rows.append((str(audio_path), str(row.get("utterance_id") or Path(audio_path).stem)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ManifestError(
                f"{path}:{number}: not a row with an audio_path ({error})",
                "a column of that name, or one JSON object per line, in UTF-8",
            ) from error
    if not rows:
        return
    chosen = np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))
    root = find_audio(path.parent, [rows[row][0] for row in chosen], follow_links=True)
    yield from (_member(root, audio_path, utterance_id) for audio_path, utterance_id in rows)


def _in_shards(store: Reader) -> Iterator[Recording]:
    """Every recording of a shard set once, whole."""
    index = read_index(store)
    for name, rows in rows_of_recordings(store, index):
        shard = index.shards[index.samples["shard"][rows[0]]]
        yield Recording(unquote(name), f"{store.url}/{shard.name}/{name}", partial(_load_rows, store, index, rows))


def rows_of_recordings(store: Reader, index: ShardIndex) -> Iterator[tuple[str, list[int]]]:
    """The rows of each recording, by its key: several where the build cut it into pieces, in no order."""
    keys = read_keys(store, index).tolist()
    named = sorted((key if index.foreign else whole_key(key), row) for row, key in enumerate(keys))
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


def _load_rows(store: Reader, index: ShardIndex, rows: Sequence[int]) -> list[Piece]:
    return [
        Piece(sample.audio, sample.start_sec or 0.0, sample.parent_id or sample.utterance_id)
        for sample in read_pieces(store, index, rows)
    ]
