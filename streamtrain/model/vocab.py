"""Convert labels to ids and back. This file is copied unchanged into a submission, and needs no other library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from sharding.labels.units import Units, join_symbols, split_symbols

if TYPE_CHECKING:
    from sharding.labels.policy import LabelPolicy

BLANK, UNKNOWN, SPACE = "[PAD]", "[UNK]", "|"  # of our own vocabularies; CTC's blank is the tokenizer's padding token
Case = Literal["", "upper", "lower"]
CHANGE_CASE: dict[str, Callable[[str], str]] = {"": str, "upper": str.upper, "lower": str.lower}


@dataclass(frozen=True)
class Vocab:
    """Hold the tokens of a model; `tokens[i]` is the token of id i, "" of an output that has none.

    Example:
        >>> vocab = Vocab(("<pad>", "<s>", "<unk>", "|", "A", "B"), "<pad>", "<unk>", "|", ("<s>",), case="upper")
        >>> vocab.encode("a b")
        [4, 3, 5]
    """

    tokens: tuple[str, ...]
    blank_token: str = BLANK
    unknown_token: str | None = UNKNOWN
    delimiter: str | None = SPACE  # between words; None: of labels without words, such as blank-separated tokens
    unwritten: tuple[str, ...] = ()  # other special tokens, such as <s>
    units: Units = "characters"
    case: Case = ""  # that of the tokens, if symbols are folded to it
    writes: Case = ""  # that of decoded text, if it is not as in the tokens

    @property
    def blank(self) -> int:
        return self.tokens.index(self.blank_token)

    @property
    def blank_inside(self) -> int:
        """Return the blank within a word: to CTC all blanks are the same."""
        return self.blank

    @property
    def space(self) -> int | None:
        return None if self.delimiter is None else self.tokens.index(self.delimiter)

    @property
    def unknown(self) -> int:
        """Return the id of a symbol without a token; if there is none for these, that of silence."""
        return self.tokens.index(self.unknown_token or self.blank_token)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the id of each symbol that can be written, the blank between words included."""
        special = {"", self.blank_token, self.unknown_token, self.delimiter, *self.unwritten}
        ids = {token: number for number, token in enumerate(self.tokens) if token not in special}
        return ids if self.space is None else ids | {" ": self.space}

    @cached_property
    def written(self) -> dict[int, str]:
        """Return the symbol of each id that is written."""
        return {number: symbol for symbol, number in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        """Return one id for each symbol of a normalised label."""
        ids, unknown, fold = self.ids, self.unknown, CHANGE_CASE[self.case]
        return [ids.get(symbol, ids.get(fold(symbol), unknown)) for symbol in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of collapsed ids, without special tokens."""
        text = join_symbols([self.written[i] for i in ids if i in self.written], self.units)
        return CHANGE_CASE[self.writes](text)

    def split(self, text: str) -> Sequence[str]:
        """Return the symbols of a normalised label, in order."""
        return split_symbols(text, self.units)


def vocab_of(policy: "LabelPolicy") -> Vocab:
    """Return the symbols of a shard set's labels as a vocabulary: one alphabet, one vocabulary, in the same order."""
    blank, unknown, delimiter = (_unlike(name, policy.symbols) for name in (BLANK, UNKNOWN, SPACE))
    if policy.units == "tokens":
        return Vocab((blank, *policy.symbols, unknown), blank, unknown, None, units=policy.units)
    return Vocab((blank, delimiter, *policy.symbols, unknown), blank, unknown, delimiter, units=policy.units)


def _unlike(name: str, symbols: Sequence[str]) -> str:
    """Return a special token's name, in angle brackets if it is a symbol of the labels."""
    while name in symbols:
        name = f"<{name}>"
    return name
