"""What there is to transcribe: files, folders, zips, manifests, shard sets and buckets, as one list of recordings."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from sharding.archive import AUDIO_SUFFIXES, AudioRoot, find_audio, list_audio, open_audio
from sharding.errors import ManifestError, StreamtrainError
from sharding.format import INDEX_NAME, ShardIndex, read_index, read_keys, read_samples
from sharding.sample import whole_key
from sharding.store import Reader, Store, open_store
from sharding.tables import read_lines

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


def find_recordings(sources: Sequence[str]) -> list[Recording]:
    """All that the sources hold, in their order. Raises StreamtrainError where one holds nothing."""
    found: list[Recording] = []
    for source in sources:
        here = list(_find(source))
        if not here:
            raise StreamtrainError(f"no audio in {source}", f"looked for {', '.join(AUDIO_SUFFIXES)}")
        found += here
    return found


def _find(source: str) -> Iterator[Recording]:
    path = Path(source)
    if "://" in source and not _is_audio(source):
        yield from _in_store(open_store(source))
    elif "://" in source:
        folder, _, name = source.rpartition("/")
        yield _object(open_store(folder), name)
    elif path.is_dir() and (path / INDEX_NAME).is_file():
        yield from _in_shards(open_store(path))
    elif path.is_dir():
        yield from (_file(each) for each in sorted(path.rglob("*")) if _is_audio(each.name) and each.is_file())
    elif not path.is_file():
        raise StreamtrainError(f"{source}: there is no such file or folder")
    elif MANIFEST.search(path.name):
        yield from _in_manifest(path)
    elif path.suffix.lower() == ".zip":
        root = AudioRoot(str(path), "")
        yield from (_member(root, name, Path(name).stem) for name in list_audio(root))
    else:
        yield _file(path)


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _file(path: Path) -> Recording:
    return Recording(path.stem, str(path), lambda: [Piece(path.read_bytes())])


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
                f"{path}:{number}: not a row with an audio_path ({error})", "one JSON object per line, in UTF-8"
            ) from error
    if not rows:
        return
    chosen = np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))
    root = find_audio(path.parent, [rows[row][0] for row in chosen])
    yield from (_member(root, audio_path, utterance_id) for audio_path, utterance_id in rows)


def _in_shards(store: Reader) -> Iterator[Recording]:
    """Every recording of a shard set once, whole: the pieces that the build cut it into are put together again."""
    index = read_index(store)
    keys = read_keys(store, index).tolist()
    named = sorted((key if index.foreign else whole_key(key), key, row) for row, key in enumerate(keys))
    for name, group in groupby(named, key=lambda one: one[0]):
        rows = [row for _, _, row in group]
        yield Recording(unquote(name), f"{store.url}/{index.shards[index.samples['shard'][rows[0]]].name}/{name}",
                        partial(_load_rows, store, index, rows))  # fmt: skip


def _load_rows(store: Reader, index: ShardIndex, rows: Sequence[int]) -> list[Piece]:
    pieces = []
    for row in rows:
        shard = index.shards[index.samples["shard"][row]]
        (sample,) = read_samples(store, index, shard, index.samples[row : row + 1])
        pieces.append(Piece(sample.audio, sample.start_sec or 0.0, sample.parent_id or sample.utterance_id))
    return pieces
