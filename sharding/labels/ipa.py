"""Normalise labels and check their alphabet: phones, as in the challenge's official scorer, and words."""

import itertools
import re
import string
import unicodedata
from dataclasses import dataclass

from sharding.errors import ManifestError

SYMBOLS = "æobcɑʔɛsjɹfʊəʁiɔvɟxʌŋχdhʝknlɐʤɪɚçzːmtɫʃʧwrpɾɬʒθugðe"  # every phone the challenge accepts; g is ASCII
ALPHABET = frozenset(SYMBOLS + " ")

# Composed ã and ñ stay as they are: the scorer does not rewrite them either.
_REWRITE = str.maketrans(
    dict.fromkeys("͜͡ˈˌ̃" + string.punctuation)  # tie bars, stress, nasality
    | dict(zip("ẽĩõũɝ", "eiouɚ", strict=True))
)
TRACKS = {"phonetic": "phonetic_text", "word": "orthographic_text"}  # each with the field of its label
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz' ")  # of the word track
_PUNCTUATION = frozenset(string.punctuation)
_APOSTROPHES = str.maketrans(dict.fromkeys("’ʼ", "'"))
MAX_FOREIGN = 0.05  # share of symbols: if more are foreign, the labels are in another alphabet
_SHOWN = 20  # symbols in a message
_SHOWN_LABEL = 80  # characters of a label in a message
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_AFFRICATES = (("tʃ", "ʧ"), ("dʒ", "ʤ"))

# Other letters of the same phone: U+0261, as Phon writes it, U+01DD and U+AB53. The scorer maps none of them, so only
# labels are mapped, never a hypothesis.
_SAME_PHONE = str.maketrans("ɡǝꭓ", "gəχ")
# Symbols that look like a phone, or were its letter once: rejected, because they may mean something else.
_LOOK_ALIKES = dict(
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


def normalize(text: str, track: str) -> str:
    """Return the normal form of a label of the phonetic or the word track."""
    return normalize_words(text) if track == "word" else normalize_ipa(text)


def read_label(text: str, track: str) -> str:
    """Return the normal form of a label in the user's spelling, with its phones in the letters of the alphabet."""
    return normalize(text.translate(_SAME_PHONE) if track == "phonetic" else text, track)


def label_remarks(text: str, track: str) -> tuple[str, ...]:
    """Return remarks on punctuation that the normal form of a phonetic label drops: in SAMPA some of it is phones."""
    dropped = sorted(_PUNCTUATION.intersection(text)) if track == "phonetic" else []
    notes = {":": "; length is 'ː' U+02D0"}
    return tuple(f"{symbol!r} is left out of the label, as by the official scorer{notes.get(symbol, '')}"
                 for symbol in dropped)  # fmt: skip


def alphabet_of(track: str) -> frozenset[str]:
    """Return the symbols that labels of the phonetic or the word track consist of."""
    return LETTERS if track == "word" else ALPHABET


def foreign_symbols(text: str, alphabet: frozenset[str] = ALPHABET) -> str:
    """Return the symbols of a normalised label that are not in the alphabet, each once, in order of appearance."""
    if alphabet.issuperset(text):
        return ""
    return "".join(dict.fromkeys(symbol for symbol in text if symbol not in alphabet))


def name_symbols(symbols: str, alphabet: frozenset[str] = ALPHABET) -> str:
    """Return each symbol with its code point, and with the symbol of the alphabet that it looks like."""
    names = []
    for symbol in symbols[:_SHOWN]:
        look_alike = _LOOK_ALIKES.get(symbol, "")
        note = f" (looks like {look_alike!r} U+{ord(look_alike):04X})" if look_alike in alphabet else ""
        names.append(f"{symbol!r} U+{ord(symbol):04X}{note}")
    return ", ".join(names) + (f" and {len(symbols) - _SHOWN:,} more" if len(symbols) > _SHOWN else "")


@dataclass(frozen=True, slots=True)
class SymbolCounts:
    """Hold the number of symbols in labels, the foreign ones among them, and the label that has most of these."""

    symbols: int = 0
    foreign: int = 0
    worst: tuple[int, str, str] = (0, "", "")  # its foreign symbols, its place, the normalised label

    def __add__(self, other: "SymbolCounts") -> "SymbolCounts":
        worst = max(self.worst, other.worst, key=lambda label: label[0])
        return SymbolCounts(self.symbols + other.symbols, self.foreign + other.foreign, worst)


def count_symbols(text: str, place: str, alphabet: frozenset[str]) -> SymbolCounts:
    """Count the symbols of a normalised label; `place` names its position for a message."""
    foreign = 0 if alphabet.issuperset(text) else sum(symbol not in alphabet for symbol in text)
    return SymbolCounts(len(text), foreign, (foreign, place, text))


def check_alphabet(counts: SymbolCounts, side: str, track: str) -> None:
    """Raise ManifestError if more than 5 % of the symbols of the training or the validation labels are foreign.

    Such labels are of another kind; a single label with a wrong symbol is only left out of training.
    """
    if counts.foreign <= MAX_FOREIGN * counts.symbols:
        return
    (_, place, text), alphabet = counts.worst, alphabet_of(track)
    symbols = "".join(sorted(alphabet - set(" '"))) + (" and the apostrophe" if "'" in alphabet else "")
    other_track, kind = ("word", "written words") if track == "phonetic" else ("phonetic", "phones")
    raise ManifestError(
        f"{place}: {text[:_SHOWN_LABEL]!r} has symbols outside the alphabet of the {track} track: "
        f"{name_symbols(foreign_symbols(text, alphabet), alphabet)}; {counts.foreign / counts.symbols:.1%} of all "
        f"symbols in the labels for {side} are foreign, at most {MAX_FOREIGN:.0%} are accepted",
        f"--track {other_track} if the labels are {kind}; otherwise they must be written in "
        f"{symbols}: other alphabets are not supported yet",
    )


def ctc_frames_needed(text: str) -> int:
    """Return the fewest frames in which CTC can emit a label: one per symbol, and a blank between equal neighbours."""
    return len(text) + sum(left == right for left, right in itertools.pairwise(text))
