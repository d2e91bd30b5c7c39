"""Describe the index documents of a shard set as types that validate them when they are read."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired

from pydantic import FailFast, Field, TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.files.document import STRICT, Count, DocumentError, Hash, Number, Size, validate
from sharding.labels.units import Units
from sharding.shardset.build_config import BUILD_CONFIG

EXTERNAL = "written by others"  # key in the settings of a set whose tars another program wrote
SPLITS = ("train", "valid", "test", "unlabelled")
HELD_OUT = ("valid", "test")  # never trained on, nor filtered by their labels
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # xxh3-64, hexadecimal
Digest = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]  # SHA-256, hexadecimal; empty: none


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Describe one row of index.json: the expected size, counts and checksums of a shard."""

    __pydantic_config__ = STRICT

    name: str  # train/b03-00017.tar
    split: Annotated[str, Field(pattern=f"^({'|'.join(SPLITS)})$")]
    bucket: Count
    count: Count
    bytes: Size
    samples: Size  # audio samples at 16 kHz, summed over all clips
    checksum: Checksum  # of the whole tar
    idx_checksum: Checksum | Literal[""] = ""  # of its .idx.zst

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE


_SpeakerHash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


_ExternalDuration = Annotated[Number, Field(ge=0.01, le=86_400)]
_ExternalSettings = TypedDict(
    "_ExternalSettings",
    {
        "profile": str,
        "max_duration": _ExternalDuration,
        "valid": list[str],
        "test": list[str],
        "written by others": Literal[True],
    },
    total=False,
)
_ExternalSettings.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
_EXTERNAL = TypeAdapter(_ExternalSettings)


class _Validation(TypedDict):
    disjoint_by_speaker: Annotated[bool, Field(strict=True)]
    fallback_speaker: _SpeakerHash | None
    kept_in_training: list[_SpeakerHash]
    clips: Size
    rejected: Size


class _Test(TypedDict):
    clips: Size
    rejected: Size


class _SharedSpeakers(TypedDict):
    count: Size
    examples: list[str]


class _Notes(TypedDict):
    clips: Size
    rejected: Size
    validation: _Validation
    test: NotRequired[_Test]  # older sets have none of these
    layouts: NotRequired[dict[str, str]]
    shared_speakers: NotRequired[_SharedSpeakers]


class _Labels(TypedDict):
    """Describe the fields of `LabelPolicy`."""

    profile: str
    units: Units
    symbols: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast()]
    counts: Annotated[list[Size], FailFast()]
    digest: Checksum


class _AcousticModel(TypedDict):
    alphabet: str | list[str]  # a list unless the units are characters
    max_gap: Number
    values: str
    units: NotRequired[Units]


class _SamplesDocument(TypedDict):
    name: str
    count: Size
    checksum: Checksum


class IndexHeader(TypedDict):
    """Describe the fields that an index of any version has."""

    version: int
    digest: Digest


@dataclass(frozen=True)
class IndexDocument:
    """Describe index.json as it is written."""

    __pydantic_config__ = STRICT

    version: int
    sample_rate: Literal[16_000]
    duration_bins: Annotated[tuple[Annotated[Number, Field(gt=0)], ...], FailFast(), Field(min_length=1)]
    settings: dict[str, Any]  # of a build, or of tars of others
    settings_hash: Digest
    sources_hash: str
    labels: _Labels
    notes: _Notes
    samples: _SamplesDocument
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]
    digest: Digest
    base: Digest = ""
    acoustic_model: _AcousticModel | None = None


class _Columns(TypedDict):
    """Describe the columns of SAMPLE_DTYPE without the shard's number."""

    offset: Annotated[list[Size], FailFast()]
    bytes: Annotated[list[Count], FailFast()]
    samples: Annotated[list[Count], FailFast()]
    label_length: Annotated[list[Count], FailFast()]
    checksum: Annotated[list[Hash], FailFast()]


class _SpeakerColumns(TypedDict):
    """Describe the fields of `SpeakerInfo` as columns."""

    corpus: Annotated[list[str], FailFast()]
    age_bucket: Annotated[list[str], FailFast()]
    child_id: Annotated[list[str], FailFast()]


@dataclass(frozen=True)
class ShardDocument:
    """Describe `<shard>.idx.zst` as it is written."""

    __pydantic_config__ = STRICT

    shard: ShardEntry
    inputs_digest: str
    refused: dict[str, str]
    keys: Annotated[list[str], FailFast()]
    speakers: _SpeakerColumns
    columns: _Columns
    remarks: dict[str, list[str]] = field(default_factory=dict)


class _ChildColumn(TypedDict):
    child_id: Annotated[list[str], FailFast()]


class _ChildrenDocument(TypedDict):
    """Describe the fields of `ShardDocument` that tell whose each clip is."""

    keys: Annotated[list[str], FailFast()]
    speakers: _ChildColumn


HEADER, INDEX, SHARD = TypeAdapter(IndexHeader), TypeAdapter(IndexDocument), TypeAdapter(ShardDocument)
CHILDREN = TypeAdapter(_ChildrenDocument)


def check_document(document: IndexDocument) -> None:
    """Raise DocumentError if one part of an index contradicts another."""
    bins, shards, count = document.duration_bins, document.shards, document.samples["count"]
    if list(bins) != sorted(bins):
        raise DocumentError(f"'duration_bins' are {list(bins)}, but must increase")
    schema: TypeAdapter[Any] = _EXTERNAL if EXTERNAL in document.settings else BUILD_CONFIG
    try:
        validate(document.settings, schema)
    except DocumentError as error:
        raise DocumentError(f"'settings.{str(error).removeprefix(chr(39))}") from error
    symbols, counts = document.labels["symbols"], document.labels["counts"]
    if len(counts) not in (0, len(symbols)) or len(set(symbols)) != len(symbols):
        different = len(set(symbols))
        raise DocumentError(f"'labels' has {different} different symbols of {len(symbols)}, {len(counts)} counts")
    for number, shard in enumerate(shards):
        if shard.bucket >= len(bins):
            raise DocumentError(f"'shards.{number}.bucket' is {shard.bucket}, there are {len(bins)} buckets")
    if len({shard.name for shard in shards}) != len(shards):
        raise DocumentError("a shard is listed twice")
    if (total := sum(shard.count for shard in shards)) != count:
        raise DocumentError(f"'samples.count' is {count}, the shards have {total}")
