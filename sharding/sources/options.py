"""Name the fields of a row of a source, and hold the user's options for reading sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field

REQUIRED_FIELDS = ("utterance_id", "audio_path", "text")
OPTIONAL_FIELDS = (
    *("child_id", "session_id", "audio_duration_sec", "age_bucket", "md5_hash", "filesize_bytes"),
    *("split", "offset_sec", "duration_sec"),  # the last two: a range of a longer recording
)
NAME_FIELDS = ("utterance_id", "child_id", "session_id", "age_bucket", "split")  # which may also be numbers
NUMBER_FIELDS = ("audio_duration_sec", "filesize_bytes", "offset_sec", "duration_sec")


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """Hold the user's options for reading transcripts."""

    profile: str = ""  # of the labels; empty: the usual one of the layout
    columns: Mapping[str, str] = field(default_factory=dict)  # our field → their column, if the names differ
    group_by: str = ""  # a column; clips with the same value in it go to the same split
    follow_links: bool = False  # even to audio outside the source's folder
    audio_root: str = ""  # a folder with all audio, if audio paths are absolute or relative to it
    splits: str = "auto"  # official | hash | auto: official where a source has them
    labels: str = "text"  # or "phones", of a layout that has both
    include_sa: bool = False  # TIMIT's two sentences that everybody reads
    fields: tuple[str, ...] = REQUIRED_FIELDS + OPTIONAL_FIELDS  # the fields to read
