"""Define the settings that determine the bytes of a shard set: options of `build`, and the `settings` of index.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field, TypeAdapter

from sharding.command import WHOLE
from sharding.errors import StreamtrainError
from sharding.files.document import STRICT, Count, DocumentError, Fraction, Number, validate
from sharding.labels.units import Units
from sharding.segment.cuts import MAX_DURATION_SEC, MIN_PIECE_SEC
from sharding.segment.evidence import MAX_FALSE_ACCEPT
from sharding.segment.split import LabelThresholds

Splits = Literal["auto", "official", "hash"]
WordLLR = Annotated[Number, Field(ge=-1_000, le=1_000)]
MaxDuration = Annotated[Number, Field(ge=2 * MIN_PIECE_SEC, le=86_400)]  # s; below, maybe no way but tiny segments


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class BuildConfig:
    """Hold every setting that determines the bytes of a shard set, besides its sources."""

    __pydantic_config__ = STRICT

    max_duration: MaxDuration = MAX_DURATION_SEC
    """Longer clips are split at pauses, s; lower saves GPU memory."""
    valid_fraction: Fraction = 0.1
    """Share of the speakers whose clips are kept for validation."""
    num_buckets: Annotated[Count, Field(ge=1, le=100), WHOLE] = 8  # a shard's name has two digits for its bucket
    """Duration buckets; more pad less, fewer mix lengths more."""
    shard_mb: Annotated[Number, Field(ge=0.01, le=65_536)] = 64.0
    """Size of a shard, MiB; larger suits object stores."""
    min_shards_per_bucket: Annotated[Count, Field(ge=1, le=100_000), WHOLE] = 1
    """Shards in each bucket at least, as far as it has clips: ranks × workers feeds them all."""
    profile: Annotated[str, Parameter(metavar="NAME")] = ""
    """Normal form of the labels, which is trained and scored: pasketti (the challenge's phones), english (letters),
    text (words of any language), ipa (narrow IPA), raw (as written), timit39, or a function of yours, as
    my_module:normalize. If none is given: the usual one of the corpus's layout."""
    units: Units | None = None
    """Symbols of a label: characters, segments (an IPA letter with its diacritics and ties), or tokens separated by
    blanks. If none is given: the profile's."""
    alphabet: Annotated[str, Parameter(metavar="profile|data|FILE")] = ""
    """Symbols that may be trained on: those of the profile; those of the training labels; or those of a file, one a
    line. If none is given: the profile's if it has an alphabet, else the data's."""
    min_symbol_count: Annotated[Count, Field(ge=1), WHOLE] = 5
    """Times that a symbol must occur in the training labels to be in the alphabet of the data; clips with rarer ones
    are left out, and listed."""
    splits: Splits = "auto"
    """official: each clip's split as its corpus publishes it; hash: by speaker, see --valid-fraction; auto: official
    where a source has splits. Sources without any are split by speaker."""
    group_by: Annotated[str, Parameter(metavar="COLUMN")] = ""
    """Keep all clips of one value of this column on one side, training or validation. If none is given: of one
    child_id, else of one session_id, else each clip by itself."""
    min_confidence: Fraction = LabelThresholds.min_confidence
    """A segment keeps its words if each of its cuts falls where it should with this probability."""
    max_false_accept: Fraction = MAX_FALSE_ACCEPT
    """A segment keeps its words if what is heard in it is hardly likelier than they are: by so little that only this
    share of labels with a word left out would pass, as trials show. If hardly any would, those that are heard best do,
    unless this is 0; all do if it is 1."""
    min_word_llr: WordLLR = LabelThresholds.min_word_llr
    """A segment keeps its words if each of them is heard: the label is likelier with it than without it, by at least so
    many nats. Whatever the thresholds, it loses them if two words are likelier the other way round, if one goes on
    after a pause, or if somebody speaks where no word is heard."""
    alignments: Annotated[str, Parameter(parse=False)] = ""
    """Digest of the model's alignments."""

    @property
    def hash(self) -> str:
        """Return the SHA-256 of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


BUILD_CONFIG = TypeAdapter(BuildConfig)


def checked(values: Mapping[str, Any]) -> BuildConfig:
    """Return the settings of a build. Raises StreamtrainError, which names the first unknown or unsuitable one."""
    try:
        return validate(dict(values), BUILD_CONFIG)
    except DocumentError as error:
        names = ", ".join(field.name for field in fields(BuildConfig) if field.name != "alignments")
        raise StreamtrainError(f"setting {error}", f"settings: {names}") from error
