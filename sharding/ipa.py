"""The alphabet and the normal form of phonetic labels, equal to the challenge's official scorer."""

import itertools
import re
import string
import unicodedata

SYMBOLS = "æobcɑʔɛsjɹfʊəʁiɔvɟxʌŋχdhʝknlɐʤɪɚçzːmtɫʃʧwrpɾɬʒθugðe"  # every phone the challenge accepts; g is ASCII
ALPHABET = frozenset(SYMBOLS + " ")

# Composed ã and ñ stay as they are: the scorer does not rewrite them either.
_REWRITE = str.maketrans(
    dict.fromkeys("͜͡ˈˌ̃" + string.punctuation)  # tie bars, stress, nasality
    | dict(zip("ẽĩõũɝ", "eiouɚ", strict=True))
)
_AFFRICATES = (("tʃ", "ʧ"), ("dʒ", "ʤ"))


def normalize_ipa(text: str) -> str:
    """The label as the official scorer compares it: NFC, no stress, ties, nasality or punctuation, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_REWRITE)
    for pair, symbol in _AFFRICATES:
        text = text.replace(pair, symbol)
    return re.sub(r"\s+", " ", text).strip()


def foreign_symbols(text: str) -> str:
    """The symbols of a normalised label that the challenge does not accept, each once, in order of appearance."""
    return "".join(dict.fromkeys(symbol for symbol in text if symbol not in ALPHABET))


def ctc_frames_needed(text: str) -> int:
    """The fewest frames CTC can emit this label in: a frame per symbol and a blank between equal neighbours."""
    return len(text) + sum(a == b for a, b in itertools.pairwise(text))
