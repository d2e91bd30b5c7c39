"""What a model has heard of the labels of long recordings: what `streamtrain align` wrote, as a build reads it.

Pass 1 of a build gives words to pieces by the sounds of its own labels; this is pass 2. The cuts stay where they are.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from sharding.audio import SAMPLE_RATE
from sharding.errors import StreamtrainError

WRONG_SHARE = 0.02  # of labels that lack a word, those that may pass for how little differs from what is heard
USUAL = 0.99  # share of the pieces whose label differs from what is heard by no more than is usual
HARDLY_ANY = 0.1  # share of the pieces: where no more would pass, trials tell nothing
ANY_GAP = 1e6  # nats
BELIEVED = 0.4  # share of the pieces that are believed where trials tell nothing: labels are right, as a rule


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

    def useless(self, text: str, cuts: tuple[int, ...]) -> str | None:
        """Why it says nothing of a recording with that label and these cuts, if it does not."""
        if self.error is not None:
            return f"not aligned: {self.error}"
        if self.label != hash_label(text):
            return "another label was aligned"
        return None if self.cuts == cuts else "other cuts were aligned"

    def has_word(self, start: int, end: int) -> bool:
        """Whether a word is said, at least partly, between two samples."""
        return bisect_left(self.starts, end) > bisect_right(self.ends, start)

    def word_over(self, start: int, end: int) -> int | None:
        """The word that begins before one sample and ends after another, if there is one."""
        word = bisect_left(self.starts, start) - 1
        return word if word >= 0 and self.ends[word] > end else None


@dataclass(frozen=True, eq=False)
class Alignments:
    """By utterance id, with a digest of all that they say."""

    by_id: dict[str, Evidence]
    digest: str
    wrong_gaps: tuple[float, ...] = ()  # where a label had a word left out, as a trial

    def bound(self, wrong_share: float) -> float:
        """The gap above which a label is refused."""
        gaps = [gap for evidence in self.by_id.values() if evidence.cuts for gap in evidence.gaps]
        return largest_gap(gaps, self.wrong_gaps, wrong_share)


def largest_gap(gaps: Sequence[float], wrong_gaps: Sequence[float], wrong_share: float) -> float:
    """That a label may have: no more than the usual, and than all but a share of the labels with a word left out.

    Where these look as right as the others, so that hardly any label would pass, those that are heard best pass.
    """
    if wrong_share >= 1:
        return ANY_GAP
    if not gaps or not wrong_gaps:
        return 0.0
    believed, usual = np.quantile(gaps, (BELIEVED, USUAL))
    bound = min(usual, np.quantile(wrong_gaps, wrong_share))
    blind = wrong_share > 0 and np.mean(gaps <= bound) < HARDLY_ANY
    return float(believed if blind else bound)


NOTHING_ALIGNED = Alignments({}, "")


def read_alignments(path: Path) -> Alignments:
    """Raises StreamtrainError where the file is not what `streamtrain align` writes."""
    hint = "it is written by `python -m streamtrain align MODEL SHARDS --out FILE`"
    by_id, wrong_gaps = dict[str, Evidence](), list[float]()
    digest = xxhash.xxh3_128()
    try:
        for number, line in enumerate(_lines(path), start=1):
            digest.update(line)
            row = json.loads(line)
            try:
                by_id[row["utterance_id"]] = _evidence(row)
                wrong_gaps += map(float, row["without"])
            except (KeyError, TypeError, AttributeError) as error:
                raise StreamtrainError(
                    f"{path}:{number}: no row of an alignment, or one of an older version ({error!r})", hint
                ) from error
    except OSError as error:
        raise StreamtrainError(f"{path}: {error.strerror}", hint) from error
    except (ValueError, zstandard.ZstdError, EOFError) as error:
        raise StreamtrainError(f"{path}: damaged, or no file of alignments ({error})", hint) from error
    return Alignments(by_id, digest.hexdigest(), tuple(wrong_gaps))


def hash_label(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _lines(path: Path) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    left = b""
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            *lines, left = (left + unpacker.decompress(chunk)).split(b"\n")
            yield from lines
    if left or not unpacker.eof:
        raise EOFError("it ends in the middle")


def _evidence(row: dict[str, Any]) -> Evidence:
    cuts = row["cuts"]
    return Evidence(
        label=hash_label(row["text"]),
        cuts=tuple(round(cut["at"] * SAMPLE_RATE) for cut in cuts),
        words_before=tuple(int(cut["words_before"]) for cut in cuts),
        probability=tuple(float(cut["probability"]) for cut in cuts),
        inside=tuple(float(cut["inside"]) for cut in cuts),
        gaps=tuple(float(piece["gap"]) for piece in row["pieces"]),
        words=tuple(float(word["evidence"]) for word in row["words"]),
        order=tuple(float(word["order"]) for word in row["words"]),
        starts=tuple(round(word["start"] * SAMPLE_RATE) for word in row["words"]),
        ends=tuple(round(word["end"] * SAMPLE_RATE) for word in row["words"]),
        error=row["error"],
    )
