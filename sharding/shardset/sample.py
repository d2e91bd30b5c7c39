"""Convert a sample to and from its bytes in a tar.

`<key>.flac` and `<key>.json` are written with ustar headers without date and owner, so that the same samples always
give the same bytes. Samples of other WebDataset writers are read, too: audio in any supported format, and a label in a
`.txt` or a `.json`.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import Field, TypeAdapter

from sharding.audio.containers import AUDIO_SUFFIXES
from sharding.errors import ShardError
from sharding.files.document import Second, parse_row, validate
from sharding.files.names import canonical_name, canonical_speaker, name_of, nfc
from sharding.labels.policy import LabelPolicy

BLOCK = 512  # bytes of a tar block
AUDIO_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape it, UTF-8 cannot encode it
METADATA = ("utterance_id", "child_id", "session_id", "corpus", "age_bucket")  # optional in the JSON of other writers


@dataclass(frozen=True, slots=True)
class Sample:
    """Represent one clip, or one segment of a long recording, as stored in a shard.

    Example:
        >>> sample = open_shards("data/shards")["U_1"]
        >>> sample.text, sample.child_id, len(sample.audio)  # bytes of FLAC
    """

    key: str
    audio: bytes  # FLAC, 16 kHz, mono; any format in tars of other writers
    text: str
    label_status: str  # labelled | quarantine | unlabelled | reference
    utterance_id: str
    child_id: str = ""
    session_id: str = ""
    corpus: str = ""
    age_bucket: str = ""
    parent_id: str | None = None  # the recording that this segment was cut from
    parent_text: str | None = None  # label of the whole recording, if that of the segment is uncertain
    piece: int = 0
    pieces: int = 1
    start_sec: float | None = None  # in that recording, likewise the end
    end_sec: float | None = None
    written_text: str | None = None  # the label as it was written, if it is another than `text`
    words: tuple[tuple[str, float, float], ...] | None = None  # start and end in seconds, if the corpus has them
    remarks: tuple[str, ...] = ()  # on a label from another writer; not stored in a shard

    @property
    def recording_id(self) -> str:
        """Return the unit of scoring: the recording if its segments share one reference, else the sample itself."""
        shared = self.label_status == "reference" and self.parent_id is not None
        return str(self.parent_id) if shared else self.utterance_id


def escape_key(utterance_id: str) -> str:
    """Return a key valid in WebDataset and ustar: no dot or slash, at most 80 bytes, unique for each id."""
    key = quote(utterance_id, safe="").replace(".", "%2E")
    if len(key) > 80:
        key = f"{key[:60]}%{hashlib.sha256(utterance_id.encode()).hexdigest()[:16]}"
    return key


def piece_key(key: str, piece: int) -> str:
    return f"{key}+{piece:03d}"  # quote() escapes "+", so no utterance id can collide with a segment


def whole_key(key: str) -> str:
    """Return the key of the clip that a segment was cut from, or of a whole clip its own key."""
    return key.partition("+")[0]


_write_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
_NUMBERS = ("piece", "pieces", "start_sec", "end_sec")
_WORDS = TypeAdapter(tuple[tuple[Annotated[str, Field(strict=True)], Second, Second], ...])
_JSON_FIELDS = [field.name for field in fields(Sample) if field.name not in ("key", "audio", "remarks")]


def sample_to_bytes(sample: Sample) -> bytes:
    """Return the two tar members of a sample: headers, bodies and padding."""
    meta = {name: value for name in _JSON_FIELDS if (value := getattr(sample, name)) is not None}
    if sample.parent_id is None:
        del meta["piece"], meta["pieces"]
    document = _write_json(meta).encode()
    return b"".join([*_member(f"{sample.key}.flac", sample.audio), *_member(f"{sample.key}.json", document)])


def sample_from_bytes(raw: bytes, labels: LabelPolicy) -> Sample:
    """Parse the tar members of a sample; labels of other writers are normalised by the policy.

    Raises ShardError if the bytes are not a sample.
    """
    try:
        key, bodies = _bodies(raw)
        document = parse_row(bodies.get("json", b"{}"))
        if "label_status" in document:
            texts = [name for name in _JSON_FIELDS if name in document and name not in (*_NUMBERS, "words")]
            _check_strings(document, texts)
            _check_numbers(document)
            if "words" in document:
                document["words"] = validate(document["words"], _WORDS)
                for word, start, end in document["words"]:
                    _check_strings({"words": word}, ["words"])
                    if start > end:
                        raise ValueError(f"words: {word!a:.50} ends before it begins")
            if unknown := document.keys() - _JSON_FIELDS:
                raise TypeError(f"{key}.json: {min(unknown)!r} is unknown")
            return Sample(key=key, audio=bodies["flac"], **document)
        return _external_sample(key, bodies, document, labels)
    except (ValueError, TypeError, LookupError, RecursionError, tarfile.TarError) as error:
        raise ShardError(f"these bytes are not a sample: {error}") from error


def split_name(name: str) -> tuple[str, str]:
    """Return the key and extension of a member, split like WebDataset: at the first dot of the file's base name.

    Both are empty if WebDataset skips the file: it is hidden, has no dot, or is a note such as `__x__`. Bytes that are
    not UTF-8 are escaped.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or (name.startswith("__") and re.match("__[^/]*__($|/)", name)):
        return "", ""
    key = f"{folder}{slash}{stem}".encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return nfc(key), extension.lower()


def _bodies(raw: bytes) -> tuple[str, dict[str, bytes]]:
    """Return the key of a sample, and its members by extension. Raises ValueError if an extension occurs twice."""
    key, bodies = "", dict[str, bytes]()
    for name, body in _members(raw):
        member_key, extension = split_name(name)
        if extension in bodies:
            raise ValueError(f"{member_key}.{extension} occurs twice")
        if member_key:
            key, bodies[extension] = member_key, body
    return key, bodies


def _external_sample(key: str, bodies: Mapping[str, bytes], document: Mapping[str, Any], labels: LabelPolicy) -> Sample:
    audio = [extension for extension in AUDIO_EXTENSIONS if extension in bodies]
    if not audio:
        raise ValueError(f"{key} has no audio, only {', '.join(bodies)}")
    if len(audio) > 1:
        raise ValueError(f"{key} has {len(audio)} audio files, {', '.join(audio)}")
    if not {"txt", "json"} & bodies.keys():
        raise ValueError(f"{key} has no label, only {', '.join(bodies)}")
    values: dict[str, Any] = {name: document.get(name) for name in ("text", labels.field)}
    values |= {name: name_of(document.get(name)) for name in METADATA}
    values = {name: "" if value is None else value for name, value in values.items()}
    _check_strings(values, values)
    texts = values[labels.field] or values["text"], bodies.get("txt", b"").decode("utf-8-sig")
    label, *others = {label for text in texts if (label := labels.normalize(text))} or {""}
    if others:
        raise ValueError(f"{key} has two labels, {label!r} and {others[0]!r}")
    return Sample(
        key=escape_key(key),
        audio=bodies[audio[0]],
        text=label,
        label_status="labelled" if label else "unlabelled",
        utterance_id=values["utterance_id"] or key,
        child_id=canonical_speaker(values["child_id"]),
        session_id=canonical_speaker(values["session_id"]),
        corpus=canonical_name(values["corpus"]),
        age_bucket=canonical_name(values["age_bucket"]),
        remarks=labels.remarks("".join(texts)),
    )


def _check_numbers(document: Mapping[str, Any]) -> None:
    for name in _NUMBERS:
        value = document.get(name, 0)
        is_count = name in ("piece", "pieces")
        if type(value) not in ((int,) if is_count else (int, float)) or not 0 <= value < 2**32:
            raise ValueError(f"{name} is {value!r:.50}, {'a count' if is_count else 'a time in seconds'} is expected")


def _check_strings(document: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(document[name], str):
            raise TypeError(f"{name} is {document[name]!r:.50}, a string is expected")
        if not document[name].isascii() and LONE_SURROGATE.search(document[name]):
            raise ValueError(f"{name} is {document[name]!a:.50}, which has a lone surrogate")


# A ustar header without name, size and checksum: mtime, uid and gid are 0, so the same samples give the same bytes.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _member(name: str, body: bytes) -> tuple[bytes | bytearray, bytes, bytes]:
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")  # a key has at most 84 bytes, the field 100
    header[124:136] = b"%011o\0" % len(body)
    header[148:156] = b" " * 8  # the checksum counts its own field as blanks
    header[148:156] = b"%06o\0 " % sum(header)
    return header, body, bytes(-len(body) % BLOCK)


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each member's name and body. Plain ustar headers are not validated, as a checksum covers the bytes."""
    position = 0
    while position < len(raw):
        header = raw[position : position + BLOCK]
        if header[156:157] != tarfile.REGTYPE or header[257:263] != b"ustar\0" or header[345] or header[124] >= 128:
            yield from _members_of_any_tar(raw[position:])
            return
        name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        size = int(header[124:135], 8)
        body = raw[position + BLOCK : position + BLOCK + size]
        if len(body) != size:
            raise ValueError(f"{name} has {len(body)} of {size} bytes")
        yield name, body
        position += BLOCK + size + -size % BLOCK


def _members_of_any_tar(raw: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:", encoding="utf-8") as tar:
        for info in tar:
            check_member(info, len(raw))
            if info.isfile():
                yield info.name, raw[info.offset_data : info.offset_data + info.size]


def check_member(info: tarfile.TarInfo, end: int) -> None:
    """Raise ValueError if a member is sparse, or its size is negative or beyond the end of its tar."""
    if info.size < 0 or info.issparse() or info.offset_data + info.size > end:
        raise ValueError(f"{info.name} has a header with an impossible size of {info.size} bytes")
