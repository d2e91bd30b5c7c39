"""Normalise labels of the Pasketti challenge as its official scorer does: phones, and English words."""

import re
import string
import unicodedata

SYMBOLS = "æobcɑʔɛsjɹfʊəʁiɔvɟxʌŋχdhʝknlɐʤɪɚçzːmtɫʃʧwrpɾɬʒθugðe"  # every phone the challenge accepts; g is ASCII

# Composed ã and ñ stay as they are: the scorer does not rewrite them either.
_REWRITE = str.maketrans(
    dict.fromkeys("͜͡ˈˌ̃" + string.punctuation)  # tie bars, stress, nasality
    | dict(zip("ẽĩõũɝ", "eiouɚ", strict=True))
)
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz'")  # of English words
_PUNCTUATION = frozenset(string.punctuation)
_APOSTROPHES = str.maketrans(dict.fromkeys("’ʼ", "'"))
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_AFFRICATES = (("tʃ", "ʧ"), ("dʒ", "ʤ"))

# Other letters of the same phone: U+0261, as Phon writes it, U+01DD and U+AB53. The scorer maps none of them, so only
# labels are mapped, never a hypothesis.
SAME_PHONE = str.maketrans("ɡǝꭓ", "gəχ")
# Symbols that look like a phone, or were its letter once: rejected, because they may mean something else.
LOOK_ALIKES = dict(
    zip(
        "αειıɩηνορκυɷϑδ∂đΛ∧ᴐȝӡ∫łɂәеорсхіјѕһԁԝӕктм꞉∶：",
        "ɑɛɪɪɪŋvopkʊʊθðððʌʌɔʒʒʃɫʔəeopcxijshdwæktmːːː",
        strict=True,
    )
)


def normalize_ipa(text: str) -> str:
    """Return a label as the official scorer compares it: NFC, no stress, tie, nasality, punctuation or extra space."""
    text = unicodedata.normalize("NFC", text).translate(_REWRITE)
    for pair, symbol in _AFFRICATES:
        text = text.replace(pair, symbol)
    return re.sub(r"\s+", " ", text).strip()


def normalize_words(text: str) -> str:
    """Return the letters of a sentence: NFKC, lower case, no punctuation but the apostrophe, single spaces.

    Text in brackets, such as [laughs], was not spoken: the official scorer removes it too.
    """
    text = _BRACKETS.sub("", unicodedata.normalize("NFKC", text)).lower().translate(_APOSTROPHES)
    kinds = ((symbol, unicodedata.category(symbol)) for symbol in text)
    spoken = (symbol if symbol == "'" or kind[0] not in "PSC" else " " for symbol, kind in kinds if kind != "Cf")
    return re.sub(r"\s+", " ", "".join(spoken)).strip()


def read_label(text: str) -> str:
    """Return the normal form of phones in the user's spelling, in the letters of the alphabet."""
    return normalize_ipa(text.translate(SAME_PHONE))


def label_remarks(text: str) -> tuple[str, ...]:
    """Return remarks on punctuation that the normal form of phones drops: in SAMPA some of it is phones."""
    notes = {":": "; length is 'ː' U+02D0"}
    return tuple(f"{symbol!r} is left out of the label, as by the official scorer{notes.get(symbol, '')}"
                 for symbol in sorted(_PUNCTUATION.intersection(text)))  # fmt: skip
