"""Read a model's alignments of long recordings with their labels, written by `streamtrain align` (pass 2).

Pass 1 of a build assigns words to segments by an acoustic model of its own labels. Pass 2 does not move the cuts.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import xxhash
from pydantic import FailFast, TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError
from sharding.files.document import Count, DocumentError, Fraction, Number, Second, open_regular, parse, unpack_lines
from sharding.files.names import canonical_name

MAX_FALSE_ACCEPT = 0.02  # share of the labels with a word left out whose gap may pass as that of a correct label
USUAL_QUANTILE = 0.99  # share of the segments whose gap counts as usual
MIN_PASSING = 0.1  # share of the segments; if fewer pass, deletion trials are not informative
NO_LIMIT = 1e6  # nats
FALLBACK_SHARE = 0.4  # share of the segments accepted if trials are not informative: most labels are right


@dataclass(frozen=True, slots=True)
class Evidence:
    """Hold the number of words before each cut of a recording, and the fit of each segment and word to the audio."""

    label: int  # xxh3-64 of the label that was aligned
    cuts: tuple[int, ...]  # samples
    words_before: tuple[int, ...]  # the most probable number, for each cut
    probability: tuple[float, ...]  # of that number
    inside: tuple[float, ...]  # probability that the cut falls inside a word
    gaps: tuple[float, ...]  # nats; lead of the best path over the label in each segment's worst half second
    words: tuple[float, ...]  # nats; log-likelihood ratio of each word of the label
    order: tuple[float, ...]  # nats; log-likelihood ratio of each word before the next to the reverse order
    starts: tuple[int, ...]  # of the words, samples
    ends: tuple[int, ...]
    error: str | None  # why the recording could not be aligned

    def why_unusable(self, text: str, cuts: tuple[int, ...]) -> str | None:
        """Return why it does not apply to a recording with this label and these cuts, or None if it does."""
        if self.error is not None:
            return f"not aligned: {self.error}"
        if self.label != hash_label(text):
            return "a different label was aligned"
        return None if self.cuts == cuts else "different cuts were aligned"

    def has_word(self, start: int, end: int) -> bool:
        """Return whether a word overlaps the samples from `start` to `end`."""
        return bisect_left(self.starts, end) > bisect_right(self.ends, start)

    def word_across(self, start: int, end: int) -> int | None:
        """Return the word that begins before `start` and ends after `end`, if there is one."""
        word = bisect_left(self.starts, start) - 1
        return word if word >= 0 and self.ends[word] > end else None


@dataclass(frozen=True, eq=False)
class Alignments:
    """Hold evidence by canonical utterance id, with a digest of the whole file."""

    by_id: dict[str, Evidence]
    digest: str
    deletion_gaps: tuple[float, ...] = ()  # nats; of labels with a word left out, as a trial

    def of(self, utterance_id: str) -> Evidence | None:
        """Return the evidence for a recording, or None if it was not aligned."""
        return self.by_id.get(canonical_name(utterance_id))

    def bound(self, max_false_accept: float) -> float:
        """Return the gap above which a label is refused, nats."""
        gaps = [gap for evidence in self.by_id.values() if evidence.cuts for gap in evidence.gaps]
        return choose_max_gap(gaps, self.deletion_gaps, max_false_accept)


def choose_max_gap(gaps: Sequence[float], wrong_gaps: Sequence[float], max_false_accept: float) -> float:
    """Return the largest gap of an accepted label: within the usual, below all but a share of the wrong labels' gaps.

    If labels with a word left out look as right as the others, so that hardly any would pass, the best-scoring pass.
    """
    if max_false_accept >= 1:
        return NO_LIMIT
    if not gaps or not wrong_gaps:
        return 0.0
    fallback, usual = np.quantile(gaps, (FALLBACK_SHARE, USUAL_QUANTILE))
    bound = min(usual, np.quantile(wrong_gaps, max_false_accept))
    blind = max_false_accept > 0 and np.mean(gaps <= bound) < MIN_PASSING
    return float(fallback if blind else bound)


NO_ALIGNMENTS = Alignments({}, "")


class _Cut(TypedDict):
    at: Second
    words_before: Count
    probability: Fraction
    inside: Fraction


class _Segment(TypedDict):
    gap: Number


class _Word(TypedDict):
    start: Second
    end: Second
    evidence: Number
    order: Number


class _AlignmentRow(TypedDict):
    """Describe the fields that are read from a row of `streamtrain align`."""

    utterance_id: str
    text: str
    cuts: Annotated[list[_Cut], FailFast()]
    pieces: Annotated[list[_Segment], FailFast()]
    words: Annotated[list[_Word], FailFast()]
    without: Annotated[list[Number], FailFast()]
    error: str | None


_ROW = TypeAdapter(_AlignmentRow)


def read_alignments(path: Path) -> Alignments:
    """Read a file of `streamtrain align`. Raises StreamtrainError if it is not one."""
    hint = "write it with `streamtrain align MODEL SHARDS --out FILE`"
    by_id, wrong_gaps = dict[str, Evidence](), list[float]()
    digest = xxhash.xxh3_128()
    try:
        with open_regular(path) as file:
            for number, line in enumerate(unpack_lines(file), start=1):
                digest.update(line)
                try:
                    row = parse(line, _ROW)
                    by_id[canonical_name(row["utterance_id"])] = _evidence(row)
                except DocumentError as error:
                    raise StreamtrainError(
                        f"{path}:{number}: not an alignment row, or one of an older version ({error})", hint
                    ) from error
                wrong_gaps += row["without"]
    except OSError as error:
        raise StreamtrainError(f"{path}: {error.strerror}", hint) from error
    except DocumentError as error:
        raise StreamtrainError(f"{path}: damaged, or not a file of alignments ({error})", hint) from error
    return Alignments(by_id, digest.hexdigest(), tuple(wrong_gaps))


def hash_label(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _evidence(row: _AlignmentRow) -> Evidence:
    cuts, words = row["cuts"], row["words"]
    if row["error"] is None and len(words) != len(row["text"].split()):
        raise DocumentError(f"it has {len(words)} 'words' and {len(row['text'].split())} in its 'text'")
    if cuts and len(row["pieces"]) != len(cuts) + 1:
        raise DocumentError(f"it has {len(cuts)} 'cuts' and {len(row['pieces'])} 'pieces'")
    if any(cut["words_before"] > len(words) for cut in cuts):
        raise DocumentError(f"the 'words_before' of a cut exceed its {len(words)} 'words'")
    if any(end < start for start, end in pairwise(time for word in words for time in (word["start"], word["end"]))):
        raise DocumentError("its 'words' do not follow one another")
    return Evidence(
        label=hash_label(row["text"]),
        cuts=tuple(round(cut["at"] * SAMPLE_RATE) for cut in cuts),
        words_before=tuple(cut["words_before"] for cut in cuts),
        probability=tuple(cut["probability"] for cut in cuts),
        inside=tuple(cut["inside"] for cut in cuts),
        gaps=tuple(segment["gap"] for segment in row["pieces"]),
        words=tuple(word["evidence"] for word in words),
        order=tuple(word["order"] for word in words),
        starts=tuple(round(word["start"] * SAMPLE_RATE) for word in words),
        ends=tuple(round(word["end"] * SAMPLE_RATE) for word in words),
        error=row["error"],
    )
