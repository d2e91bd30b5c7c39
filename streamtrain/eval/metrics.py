"""Count edits between references and hypotheses and estimate intervals. Counts add up; the ratio is taken once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from whisper_normalizer.english import EnglishTextNormalizer

from sharding.files.document import STRICT, Size
from sharding.labels.pasketti import normalize_ipa
from sharding.labels.policy import LabelPolicy

Floats = npt.NDArray[np.float64]

_normalize_words = EnglishTextNormalizer()


@dataclass(frozen=True, slots=True)
class EditCounts:
    """Hold the edits that turn hypotheses into references, by kind, and the references' length in symbols or words."""

    __pydantic_config__ = STRICT

    substitutions: Size = 0
    deletions: Size = 0
    insertions: Size = 0
    reference_length: Size = 0

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
        """Return edits ÷ reference length (CER or WER), or just the edits if all references are empty."""
        return self.edits / self.reference_length if self.reference_length else float(self.edits)


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    """Count the fewest edits between reference and hypothesis: over symbols of strings, or over words of lists."""
    substitutions = deletions = insertions = 0
    for operation in Levenshtein.editops(reference, hypothesis):
        substitutions += operation.tag == "replace"
        deletions += operation.tag == "delete"
        insertions += operation.tag == "insert"
    return EditCounts(substitutions, deletions, insertions, len(reference))


@dataclass(frozen=True, slots=True)
class TextEdits:
    """Hold the edits of texts, over each kind of unit. Like `EditCounts` they add up."""

    symbols: EditCounts = EditCounts()  # of the policy: characters, or phones without the blanks between words
    characters: EditCounts = EditCounts()
    words: EditCounts = EditCounts()  # as the profile compares them
    plain_words: EditCounts = EditCounts()  # separated by blanks

    def __add__(self, other: "TextEdits") -> "TextEdits":
        return TextEdits(
            self.symbols + other.symbols,
            self.characters + other.characters,
            self.words + other.words,
            self.plain_words + other.plain_words,
        )

    @classmethod
    def of(cls, reference: str, hypothesis: str, policy: LabelPolicy) -> "TextEdits":
        """Count the edits between two texts, in the normal form of a policy's profile."""
        texts = policy.compare(reference), policy.compare(hypothesis)
        characters = count_edits(*texts)
        symbols = count_edits(*map(policy.scored_symbols, texts))
        plain = count_edits(*(text.split() for text in texts))
        spoken = policy.profile == "english"  # of the texts as they are: the scorer's own normal form reads numbers
        words = count_edits(spoken_words(reference), spoken_words(hypothesis)) if spoken else plain
        return cls(symbols, characters, words, plain)


def sum_edits(
    references: Iterable[str], hypotheses: Iterable[str], symbols_of: Callable[[str], Sequence[str]]
) -> EditCounts:
    """Sum the edits of all pairs, over what `symbols_of` makes of each text.

    Raises ValueError if there are not equally many references and hypotheses.
    """
    pairs = zip(map(symbols_of, references), map(symbols_of, hypotheses), strict=True)
    return sum((count_edits(*pair) for pair in pairs), EditCounts())


def spoken_words(text: str) -> list[str]:
    """Return a text's words as the challenge compares them: by Whisper's English normaliser (Radford et al. 2022).

    It unifies case, spelling, contractions and numbers, and removes fillers and text in brackets.
    """
    words: list[str] = _normalize_words(text).split()
    return words


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the corpus-level character error rate of IPA labels, in the challenge's normal form.

    Raises:
        ValueError: If there are not equally many of both.

    Example:
        >>> cer(["kæt", "dɔg"], ["kæp", "dɔg"])
        0.16666666666666666
    """
    return sum_edits(references, hypotheses, normalize_ipa).rate


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the corpus-level word error rate of English text, over words as `spoken_words` returns them.

    Raises:
        ValueError: If there are not equally many of both.

    Example:
        >>> wer(["the cat"], ["a cat"])
        0.5
    """
    return sum_edits(references, hypotheses, spoken_words).rate


class Resampling:
    """Resample speakers with replacement (bootstrap). Clips of one speaker are alike, so they stay together."""

    def __init__(self, speakers: Iterable[str], draws: int = 2000, seed: int = 0) -> None:
        self.speakers = sorted(set(speakers))
        count = len(self.speakers)
        chosen = np.random.default_rng(seed).integers(max(count, 1), size=(draws, count))
        # (draws, speakers): how often each is drawn
        self.times = np.array([np.bincount(row, minlength=count) for row in chosen], np.float32)

    def rates(self, edits: Floats, lengths: Floats) -> Floats:
        """Return pooled rates (draws, groups) of sums (speakers, groups); NaN if no speaker of a group was drawn."""
        drawn = self.times @ (lengths + edits > 0)
        return np.where(drawn > 0, (self.times @ edits) / np.maximum(self.times @ lengths, 1), np.nan)

    def interval(self, values: Floats, level: float = 0.95) -> tuple[float, float] | None:
        """Return the percentile interval (Efron 1979) of values (draws,); None if there are fewer than two speakers,
        as one does not show how speakers differ."""
        known = values[~np.isnan(values)]
        if len(self.speakers) < 2 or not len(known):
            return None
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return (float(low), float(high))
