"""Hold what the labels of a shard set or of a model are made of: their profile, their units, their alphabet."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sharding.errors import ManifestError, StreamtrainError
from sharding.labels.pasketti import LOOK_ALIKES
from sharding.labels.profiles import Profile, profile_of
from sharding.labels.units import Units, ctc_frames_needed, split_symbols

MAX_SYMBOLS = 1_000  # of an alphabet that is found
MAX_FOREIGN = 0.05  # share of symbols: if more are foreign, the labels are in another alphabet
METRICS = {"characters": ("cer", "wer"), "segments": ("per", "cer", "wer"), "tokens": ("per",)}  # tokens have no words
OTHER_PROFILES = {
    "pasketti": "--profile english if the labels are English words, text if they are words of any language, ipa if "
    "they are other IPA",
    "english": "--profile text if the labels are of any other language, pasketti or ipa if they are phones",
}
RARE_HINT = "--min-symbol-count N keeps the symbols that occur N times in the training labels"
_SHOWN = 20  # symbols in a message
_SHOWN_LABEL = 80  # characters of a label in a message


@dataclass(frozen=True)
class LabelPolicy:
    """Hold how written labels become symbols; it travels with a shard set and with a model.

    Example:
        >>> policy = open_shards("data/shards").labels
        >>> policy.normalize("Ça va ?"), policy.symbols_of("ça")
        ('ça va', 'ça')
    """

    profile: str = "pasketti"
    units: Units = "characters"
    symbols: tuple[str, ...] = ()  # the alphabet, without the blank between words; empty: not known yet
    counts: tuple[int, ...] = field(default=(), compare=False)  # of each in the training labels, if they made it
    digest: str = field(default="", compare=False)  # of the profile when the labels were made

    @property
    def _profile(self) -> Profile:
        return profile_of(self.profile)

    @cached_property
    def alphabet(self) -> frozenset[str]:
        """Return all symbols that a label may have, the blank between words included."""
        return frozenset(self.symbols) | (frozenset() if self.units == "tokens" else {" "})

    @property
    def metric(self) -> str:
        """Return the name of the error rate over symbols: "cer" of characters, "per" of phones and other tokens."""
        return "cer" if self.units == "characters" else "per"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the error rates that say something of such labels, `metric` first."""
        return METRICS[self.units]

    @property
    def field(self) -> str:
        """Return the field of the label in transcripts, and of the text in submissions."""
        return self._profile.field

    def normalize(self, written: str) -> str:
        """Return the label to train on of a written one."""
        return self._profile.normalize(written)

    def compare(self, text: str) -> str:
        """Return a reference or a hypothesis as it is compared."""
        return self._profile.compare(text)

    def remarks(self, written: str) -> tuple[str, ...]:
        """Return remarks on what the normal form of a written label loses."""
        return self._profile.remarks(written)

    def symbols_of(self, text: str) -> Sequence[str]:
        """Return the symbols of a normalised label, in order."""
        return split_symbols(text, self.units)

    def scored_symbols(self, text: str) -> Sequence[str]:
        """Return the symbols of a text that an error rate counts: a blank is a character, but no phone."""
        if self.units == "characters":
            return text
        return [symbol for symbol in self.symbols_of(text) if symbol != " "]

    def frames_needed(self, text: str) -> int:
        """Return the fewest frames in which CTC can emit a normalised label."""
        return ctc_frames_needed(self.symbols_of(text))

    def foreign(self, text: str) -> tuple[str, ...]:
        """Return the symbols of a normalised label that are not in the alphabet, each once, in order of appearance."""
        symbols = self.symbols_of(text)
        if self.alphabet.issuperset(symbols):
            return ()
        return tuple(dict.fromkeys(symbol for symbol in symbols if symbol not in self.alphabet))

    def count_foreign(self, symbols: Sequence[str]) -> int:
        """Return how many symbols of a normalised label are not in the alphabet."""
        alphabet = self.alphabet
        return 0 if alphabet.issuperset(symbols) else sum(symbol not in alphabet for symbol in symbols)

    def name(self, symbols: Sequence[str]) -> str:
        """Return symbols with their code points, and with the symbols of the alphabet that they look like."""
        names = []
        for symbol in symbols[:_SHOWN]:
            look_alike = LOOK_ALIKES.get(symbol, "")
            note = f" (looks like {look_alike!r} {_code_points(look_alike)})" if look_alike in self.symbols else ""
            names.append(f"{symbol!r} {_code_points(symbol)}{note}")
        return ", ".join(names) + (f" and {len(symbols) - _SHOWN:,} more" if len(symbols) > _SHOWN else "")

    def why_foreign(self, text: str) -> str | None:
        """Return why a normalised label cannot be trained on; None if all its symbols are in the alphabet."""
        foreign = self.foreign(text)
        return f"label has symbols outside the alphabet: {self.name(foreign)}" if foreign else None

    def check_digest(self, place: str) -> None:
        """Raise StreamtrainError if the profile gives other texts now than when the labels were made."""
        if self.digest not in ("", self._profile.digest):
            raise StreamtrainError(
                f"{place}: profile {self.profile!r} gives other texts than when these labels were made",
                "use the function that they were made with, or build them again under another name",
            )

    def with_symbols_of(self, text: str) -> "LabelPolicy":
        """Return the policy with the alphabet of a normalised label, if it has none."""
        return self if self.symbols else replace(self, symbols=tuple(sorted({*self.symbols_of(text)} - {" "})))

    def stamped(self) -> "LabelPolicy":
        """Return the policy with the digest of its profile."""
        return replace(self, digest=self._profile.digest)

    def document(self) -> dict[str, Any]:
        """Return the policy as it is written to JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def policy_of(profile: str, units: Units | None = None) -> LabelPolicy:
    """Return the policy of a profile, with its alphabet if it has one. Raises StreamtrainError if it is unknown."""
    known = profile_of(profile)
    units = units or known.units
    return LabelPolicy(profile, units, known.symbols if units == known.units else ()).stamped()


def policy_from(document: Mapping[str, Any]) -> LabelPolicy:
    """Return the policy that `LabelPolicy.document` wrote."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
    }
    return LabelPolicy(**values)


def _code_points(symbol: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in symbol)


@dataclass(frozen=True, slots=True)
class SymbolCounts:
    """Hold the number of symbols in labels, the foreign ones among them, and the label that has most of these."""

    symbols: int = 0
    foreign: int = 0
    worst: tuple[int, str, str] = (0, "", "")  # its foreign symbols, its place, the normalised label

    def __add__(self, other: "SymbolCounts") -> "SymbolCounts":
        worst = max(self.worst, other.worst, key=lambda label: label[0])
        return SymbolCounts(self.symbols + other.symbols, self.foreign + other.foreign, worst)


def check_size(symbols: Collection[str], policy: LabelPolicy, asked: str) -> None:
    """Raise ManifestError if an alphabet that was found is larger than those of sounds: the column may be another one.

    An alphabet that the user has `asked` for, as "data", may have any size.
    """
    if asked != "data" and len(symbols) > MAX_SYMBOLS:
        raise ManifestError(
            f"the training labels have {len(symbols):,} symbols of {policy.units}, such as "
            f"{', '.join(map(repr, list(symbols)[-3:]))}; at most {MAX_SYMBOLS:,} are expected",
            "is it the right column? --columns text=COLUMN; if it is, as for Chinese, --alphabet data takes any number",
        )


def count_foreign(text: str, place: str, policy: LabelPolicy) -> SymbolCounts:
    """Count the symbols of a normalised label; `place` names its position for a message."""
    symbols = policy.symbols_of(text)
    foreign = policy.count_foreign(symbols)
    return SymbolCounts(len(symbols), foreign, (foreign, place, text))


def check_alphabet(counts: SymbolCounts, side: str, policy: LabelPolicy) -> None:
    """Raise ManifestError if more than 5 % of the symbols of the training or the validation labels are foreign.

    Such labels are of another kind; a single label with a wrong symbol is only left out of training.
    """
    if counts.foreign <= MAX_FOREIGN * counts.symbols:
        return
    _, place, text = counts.worst
    sign = "" if policy.units == "characters" else " "
    other = RARE_HINT if policy.counts else OTHER_PROFILES.get(policy.profile, "--alphabet data takes the labels' own")
    raise ManifestError(
        f"{place}: {text[:_SHOWN_LABEL]!r} has symbols outside the alphabet of profile {policy.profile}: "
        f"{policy.name(policy.foreign(text))}; {counts.foreign / counts.symbols:.1%} of all symbols in the labels for "
        f"{side} are foreign, at most {MAX_FOREIGN:.0%} are accepted",
        f"{other}; the alphabet is {sign.join(policy.symbols)}",
    )
