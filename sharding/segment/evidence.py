"""What a model has heard of the labels of long recordings: what `streamtrain align` wrote, as a build reads it.

Pass 1 of a build gives words to pieces by the sounds of its own labels; this is pass 2. The cuts stay where they are.
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

MAX_FALSE_ACCEPT = 0.02  # of labels that lack a word, those that may pass for how little differs from what is heard
USUAL_QUANTILE = 0.99  # share of the pieces whose label differs from what is heard by no more than is usual
MIN_PASSING = 0.1  # share of the pieces: where no more would pass, trials tell nothing
NO_LIMIT = 1e6  # nats
FALLBACK_SHARE = 0.4  # share of the pieces that are believed where trials tell nothing: labels are right, as a rule


@dataclass(frozen=True, slots=True)
class Evidence:
    """How many words of a label lie before each cut of its recording; how well each piece and each word is heard."""

    label: int  # xxh3-64 of the label that was aligned
    cuts: tuple[int, ...]  # samples
    words_before: tuple[int, ...]
    probability: tuple[float, ...]
    inside: tuple[float, ...]  # probability that the cut falls inside a word
    gaps: tuple[float, ...]  # of each piece, in nats
    words: tuple[float, ...]  # for each word of the label, in nats
    order: tuple[float, ...]  # for each word to come before the next, in nats
    starts: tuple[int, ...]  # of the words, samples
    ends: tuple[int, ...]
    error: str | None

    def why_unusable(self, text: str, cuts: tuple[int, ...]) -> str | None:
        """Why it says nothing of a recording with that label and these cuts, if it does not."""
        if self.error is not None:
            return f"not aligned: {self.error}"
        if self.label != hash_label(text):
            return "another label was aligned"
        return None if self.cuts == cuts else "other cuts were aligned"

    def has_word(self, start: int, end: int) -> bool:
        """Whether a word is said, at least partly, between two samples."""
        return bisect_left(self.starts, end) > bisect_right(self.ends, start)

    def word_across(self, start: int, end: int) -> int | None:
        """The word that begins before one sample and ends after another, if there is one."""
        word = bisect_left(self.starts, start) - 1
        return word if word >= 0 and self.ends[word] > end else None


@dataclass(frozen=True, eq=False)
class Alignments:
    """By utterance id, in the form in which names are compared, with a digest of all that they say."""

    by_id: dict[str, Evidence]
    digest: str
    deletion_gaps: tuple[float, ...] = ()  # where a label had a word left out, as a trial

    def of(self, utterance_id: str) -> Evidence | None:
        """Return what was heard of a recording, if it was aligned."""
        return self.by_id.get(canonical_name(utterance_id))

    def bound(self, max_false_accept: float) -> float:
        """The gap above which a label is refused."""
        gaps = [gap for evidence in self.by_id.values() if evidence.cuts for gap in evidence.gaps]
        return choose_max_gap(gaps, self.deletion_gaps, max_false_accept)


def choose_max_gap(gaps: Sequence[float], wrong_gaps: Sequence[float], max_false_accept: float) -> float:
    """That a label may have: no more than the usual, and than all but a share of the labels with a word left out.

    Where these look as right as the others, so that hardly any label would pass, those that are heard best pass.
    """
    if max_false_accept >= 1:
        return NO_LIMIT
    if not gaps or not wrong_gaps:
        return 0.0
    believed, usual = np.quantile(gaps, (FALLBACK_SHARE, USUAL_QUANTILE))
    bound = min(usual, np.quantile(wrong_gaps, max_false_accept))
    blind = max_false_accept > 0 and np.mean(gaps <= bound) < MIN_PASSING
    return float(believed if blind else bound)


NO_ALIGNMENTS = Alignments({}, "")


class _Cut(TypedDict):
    at: Second
    words_before: Count
    probability: Fraction
    inside: Fraction


class _Piece(TypedDict):
    gap: Number


class _Word(TypedDict):
    start: Second
    end: Second
    evidence: Number
    order: Number


class _Row(TypedDict):
    """What is read of a row of `streamtrain align`."""

    utterance_id: str
    text: str
    cuts: Annotated[list[_Cut], FailFast()]
    pieces: Annotated[list[_Piece], FailFast()]
    words: Annotated[list[_Word], FailFast()]
    without: Annotated[list[Number], FailFast()]
    error: str | None


_ROW = TypeAdapter(_Row)


def read_alignments(path: Path) -> Alignments:
    """Raises StreamtrainError where the file is not what `streamtrain align` writes."""
    hint = "it is written by `python -m streamtrain align MODEL SHARDS --out FILE`"
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
                        f"{path}:{number}: no row of an alignment, or one of an older version ({error})", hint
                    ) from error
                wrong_gaps += row["without"]
    except OSError as error:
        raise StreamtrainError(f"{path}: {error.strerror}", hint) from error
    except DocumentError as error:
        raise StreamtrainError(f"{path}: damaged, or no file of alignments ({error})", hint) from error
    return Alignments(by_id, digest.hexdigest(), tuple(wrong_gaps))


def hash_label(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _evidence(row: _Row) -> Evidence:
    cuts, words = row["cuts"], row["words"]
    if row["error"] is None and len(words) != len(row["text"].split()):
        raise DocumentError(f"it has {len(words)} 'words' and {len(row['text'].split())} in its 'text'")
    if cuts and len(row["pieces"]) != len(cuts) + 1:
        raise DocumentError(f"it has {len(cuts)} 'cuts' and {len(row['pieces'])} 'pieces'")
    if any(cut["words_before"] > len(words) for cut in cuts):
        raise DocumentError(f"it has more 'words_before' a cut than its {len(words)} 'words'")
    if any(b < a for a, b in pairwise(second for word in words for second in (word["start"], word["end"]))):
        raise DocumentError("its 'words' do not follow one another")
    return Evidence(
        label=hash_label(row["text"]),
        cuts=tuple(round(cut["at"] * SAMPLE_RATE) for cut in cuts),
        words_before=tuple(cut["words_before"] for cut in cuts),
        probability=tuple(cut["probability"] for cut in cuts),
        inside=tuple(cut["inside"] for cut in cuts),
        gaps=tuple(piece["gap"] for piece in row["pieces"]),
        words=tuple(word["evidence"] for word in words),
        order=tuple(word["order"] for word in words),
        starts=tuple(round(word["start"] * SAMPLE_RATE) for word in words),
        ends=tuple(round(word["end"] * SAMPLE_RATE) for word in words),
        error=row["error"],
    )
