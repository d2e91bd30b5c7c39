"""Edit counts between references and hypotheses, and what is said of them. Counts add up; the ratio is taken once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from whisper_normalizer.english import EnglishTextNormalizer

_words_alike = EnglishTextNormalizer()


@dataclass(frozen=True, slots=True)
class EditCounts:
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    def __add__(self, other: "EditCounts") -> "EditCounts":
        return EditCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_length + other.reference_length,
        )

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits ÷ reference length: CER of symbols, WER of words. Without any reference there is nothing to divide by:
        0 if nothing was said, else 1 per symbol."""
        return self.edits / self.reference_length if self.reference_length else float(self.edits)


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    """The fewest edits that turn the hypothesis into the reference: over symbols of strings, or words of lists."""
    substitutions = deletions = insertions = 0
    for operation in Levenshtein.editops(reference, hypothesis):
        substitutions += operation.tag == "replace"
        deletions += operation.tag == "delete"
        insertions += operation.tag == "insert"
    return EditCounts(substitutions, deletions, insertions, len(reference))


def spoken_words(text: str) -> list[str]:
    """The words of a sentence as the challenge compares them: by Whisper's English normaliser (Radford et al. 2022).

    Cases, spellings, contractions, numbers and fillers count no longer; what stands in brackets is left out.
    """
    words: list[str] = _words_alike(text).split()
    return words


def bootstrap_interval(
    groups: Mapping[str, EditCounts], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the pooled CER under resampling of whole groups (children), as clips of one correlate.

    None where there are fewer than two groups: one child says nothing of how children differ.
    """
    edits = np.array([counts.edits for counts in groups.values()])
    lengths = np.array([counts.reference_length for counts in groups.values()])
    if len(groups) < 2:
        return None
    chosen = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    cers = edits[chosen].sum(axis=1) / np.maximum(lengths[chosen].sum(axis=1), 1)
    low, high = np.quantile(cers, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))
