"""A sample and its bytes in a tar.

We write `<key>.flac` and `<key>.json` in ustar headers that carry no date and no owner, so that the same samples always
make the same bytes. We read what other WebDataset writers make, too: sound of any kind, and a label in a `.txt` or a
`.json`.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.errors import ShardError
from sharding.files.document import parse_row
from sharding.files.names import canonical_name, canonical_speaker, name_of, nfc
from sharding.labels.ipa import TRACKS, label_remarks, read_label

BLOCK = 512  # a tar is made of blocks of this many bytes
AUDIO_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, and UTF-8 cannot
META = ("utterance_id", "child_id", "session_id", "corpus", "age_bucket")  # what another writer's JSON may say beside


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip, or one piece of a long recording, as it lies in a shard."""

    key: str
    audio: bytes  # FLAC, 16 kHz, mono; of another writer whatever it wrote
    text: str
    label_status: str  # labelled | quarantine | unlabelled | reference
    utterance_id: str
    child_id: str = ""
    session_id: str = ""
    corpus: str = ""
    age_bucket: str = ""
    parent_id: str | None = None  # the recording that this piece was cut from
    parent_text: str | None = None  # its whole label, where the piece's own is not certain
    piece: int = 0
    pieces: int = 1
    start_sec: float | None = None
    end_sec: float | None = None
    remarks: tuple[str, ...] = ()  # on the label that another writer gave it; not in a shard

    @property
    def recording_id(self) -> str:
        """What is scored as one: the sample itself, or the recording whose whole label the pieces share."""
        shared = self.label_status == "reference" and self.parent_id is not None
        return str(self.parent_id) if shared else self.utterance_id


def escape_key(utterance_id: str) -> str:
    """A key WebDataset and ustar can carry: no dot, no slash, at most 80 bytes; different ids stay different."""
    key = quote(utterance_id, safe="").replace(".", "%2E")
    if len(key) > 80:
        key = f"{key[:60]}%{hashlib.sha256(utterance_id.encode()).hexdigest()[:16]}"
    return key


def piece_key(key: str, piece: int) -> str:
    return f"{key}+{piece:03d}"  # quote() escapes "+", so no utterance id can collide with a piece


def whole_key(key: str) -> str:
    """The key of the clip that a piece was cut from; of a whole clip, its own."""
    return key.partition("+")[0]


_write_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
_NUMBERS = ("piece", "pieces", "start_sec", "end_sec")
_META = [field.name for field in fields(Sample) if field.name not in ("key", "audio", "remarks")]


def sample_to_bytes(sample: Sample) -> bytes:
    """The two members of a sample as they stand in a tar: headers, bodies and padding."""
    meta = {name: value for name in _META if (value := getattr(sample, name)) is not None}
    if sample.parent_id is None:
        del meta["piece"], meta["pieces"]
    document = _write_json(meta).encode()
    return b"".join([*_member(f"{sample.key}.flac", sample.audio), *_member(f"{sample.key}.json", document)])


def sample_from_bytes(raw: bytes, track: str = "phonetic") -> Sample:
    """The inverse of `sample_to_bytes`; of another writer's members a sample with its label normalised for the track.

    Raises ShardError where the bytes are not a sample.
    """
    try:
        key, bodies = _bodies(raw)
        document = parse_row(bodies.get("json", b"{}"))
        if "label_status" in document:
            _check_strings(document, [name for name in _META if name in document and name not in _NUMBERS])
            _check_numbers(document)
            if unknown := document.keys() - _META:
                raise TypeError(f"{key}.json: {min(unknown)!r} is unknown")
            return Sample(key=key, audio=bodies["flac"], **document)
        return _sample_of_another(key, bodies, document, track)
    except (ValueError, TypeError, LookupError, RecursionError, tarfile.TarError) as error:
        raise ShardError(f"these bytes are not a sample: {error}") from error


def split_name(name: str) -> tuple[str, str]:
    """The key of a member and its kind, as WebDataset tells them: at the first dot of the file's own name.

    Both are empty where WebDataset passes over a file: a hidden one, one without a dot, a note such as `__x__`. Bytes
    that are no UTF-8 are spelt out.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, kind = file.partition(".")
    if not stem or not dot or (name.startswith("__") and re.match("__[^/]*__($|/)", name)):
        return "", ""
    key = f"{folder}{slash}{stem}".encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return nfc(key), kind.lower()


def _bodies(raw: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of a sample, and its members by their kind."""
    key, bodies = "", dict[str, bytes]()
    for name, body in _members(raw):
        its, kind = split_name(name)
        if kind in bodies:
            raise ValueError(f"{its}.{kind} is there twice")
        if its:
            key, bodies[kind] = its, body
    return key, bodies


def _sample_of_another(key: str, bodies: Mapping[str, bytes], document: Mapping[str, Any], track: str) -> Sample:
    sounds = [kind for kind in AUDIO_EXTENSIONS if kind in bodies]
    if not sounds:
        raise ValueError(f"{key} has no sound, only {', '.join(bodies)}")
    if len(sounds) > 1:
        raise ValueError(f"{key} has {len(sounds)} sounds, {', '.join(sounds)}")
    if not {"txt", "json"} & bodies.keys():
        raise ValueError(f"{key} has no label, only {', '.join(bodies)}")
    said: dict[str, Any] = {name: document.get(name) for name in ("text", TRACKS[track])}
    said |= {name: name_of(document.get(name)) for name in META}
    said = {name: "" if value is None else value for name, value in said.items()}
    _check_strings(said, said)
    texts = said[TRACKS[track]] or said["text"], bodies.get("txt", b"").decode("utf-8-sig")
    label, *others = {label for text in texts if (label := read_label(text, track))} or {""}
    if others:
        raise ValueError(f"{key} has two labels, {label!r} and {others[0]!r}")
    return Sample(
        key=escape_key(key),
        audio=bodies[sounds[0]],
        text=label,
        label_status="labelled" if label else "unlabelled",
        utterance_id=said["utterance_id"] or key,
        child_id=canonical_speaker(said["child_id"]),
        session_id=canonical_speaker(said["session_id"]),
        corpus=canonical_name(said["corpus"]),
        age_bucket=canonical_name(said["age_bucket"]),
        remarks=label_remarks("".join(texts), track),
    )


def _check_numbers(document: Mapping[str, Any]) -> None:
    for name in _NUMBERS:
        seen = document.get(name, 0)
        whole = name in ("piece", "pieces")
        if type(seen) not in ((int,) if whole else (int, float)) or not 0 <= seen < 2**32:
            raise ValueError(f"{name} is {seen!r:.50}, {'a count' if whole else 'a second'} is expected")


def _check_strings(document: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(document[name], str):
            raise TypeError(f"{name} is {document[name]!r:.50}, a string is expected")
        if not document[name].isascii() and HALF_CHARACTER.search(document[name]):
            raise ValueError(f"{name} is {document[name]!a:.50}, which holds half a character")


# A ustar header without name, size and checksum: mtime, uid and gid are 0, so the same samples make the same bytes.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _member(name: str, body: bytes) -> tuple[bytes | bytearray, bytes, bytes]:
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")  # a key has at most 84 bytes, the field 100
    header[124:136] = b"%011o\0" % len(body)
    header[148:156] = b" " * 8  # as which the checksum counts itself
    header[148:156] = b"%06o\0 " % sum(header)
    return header, body, bytes(-len(body) % BLOCK)


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Of plain ustar headers, such as ours, no more is read than needed: a checksum has vouched for them."""
    position = 0
    while position < len(raw):
        header = raw[position : position + BLOCK]
        if header[156:157] != tarfile.REGTYPE or header[257:263] != b"ustar\0" or header[345] or header[124] >= 128:
            yield from _members_of_any_kind(raw[position:])
            return
        name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        size = int(header[124:135], 8)
        body = raw[position + BLOCK : position + BLOCK + size]
        if len(body) != size:
            raise ValueError(f"{name} has {len(body)} of {size} bytes")
        yield name, body
        position += BLOCK + size + -size % BLOCK


def _members_of_any_kind(raw: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:", encoding="utf-8") as tar:
        for info in tar:
            check_member(info, len(raw))
            if info.isfile():
                yield info.name, raw[info.offset_data : info.offset_data + info.size]


def check_member(info: tarfile.TarInfo, end: int) -> None:
    """Raises ValueError for a member that is not as long as it says: one with a hole, or beyond the end of its tar."""
    if info.size < 0 or info.issparse() or info.offset_data + info.size > end:
        raise ValueError(f"{info.name} says that it has {info.size} bytes")
