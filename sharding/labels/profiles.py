"""Define the profiles: normal forms of written labels. What is trained and scored is the normal form of a profile.

Another profile is a function from text to text, named as `my_module:normalize`.
"""

import functools
import hashlib
import importlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sharding.errors import StreamtrainError, reason_of
from sharding.labels import pasketti, timit
from sharding.labels.units import Units

_INNER = "'·׳״\u200c\u200d"  # part of a word between letters: apostrophe, Catalan's dot, geresh, joiners
_APOSTROPHES = str.maketrans(dict.fromkeys("’ʼ‘＇", "'"))
_IPA_LETTERS = pasketti.SAME_PHONE | str.maketrans("ε∫:꞉∶：'’", "ɛʃːːːːˈʼ")  # by symbols that look like them
_BLOCKS = (  # of letters of many scripts, all of them assigned long ago
    *((0x21, 0x7F), (0xA1, 0x250), (0x250, 0x300), (0x3A3, 0x3CA), (0x400, 0x460), (0x5D0, 0x5EB), (0x621, 0x63B)),
    *((0x641, 0x653), (0x780, 0x7B2), (0x905, 0x93A), (0x93E, 0x94E), (0xE01, 0xE3B), (0xE40, 0xE4F)),
)
_PROBE = (  # by which a profile is recognised: letters, marks, numbers and punctuation of many scripts
    "It's “Don’t” — A.B. 3½ €5 [laughs] (uh) x_y\tß İI ﬁ ǅ é e\u0301",
    "Ο ΟΔΟΣ Ёлка їжа العَرَبِيَّة می\u200cخواهم שָׁלוֹם ދިވެހި हिन्दी ไทย ภาษา 中文，字 ｶﾞ 한국어",
    "ˈt͡ʃaɪ̯ ˌkʰæ:t ɡ g ǝ ã a˥˩ pʼ b.d tʃ dʒ αε ꭓ ʤ ẽ ɝ",
    "h# sh iy hv ae dcl d ax-h q pau epi ux",
    *(f"{' '.join(map(chr, range(first, last)))} {''.join(map(chr, range(first, last)))}" for first, last in _BLOCKS),
)


@dataclass(frozen=True)
class Profile:
    """Hold a normal form: how a written label becomes the trained one, and how texts are compared."""

    name: str
    normalize: Callable[[str], str]  # written label → the label that is trained on
    compare: Callable[[str], str]  # reference or hypothesis → the text whose symbols are counted
    symbols: tuple[str, ...] = ()  # the alphabet, without the blank between words; empty: found in the data
    units: Units = "characters"  # the usual ones
    field: str = "text"  # of a label in transcripts, and of a text in submissions
    remarks: Callable[[str], tuple[str, ...]] = lambda text: ()  # on what a written label loses

    @functools.cached_property
    def digest(self) -> str:
        """Return a fingerprint of what the profile does: a changed one gives other texts."""
        forms = [form(text) for text in _PROBE for form in (self.normalize, self.compare)]
        return hashlib.sha256("\n".join(forms).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def normalize_text(text: str) -> str:
    """Return written text of any language: NFKC, lower case, letters, marks and numbers, single blanks.

    Marks are letters: the vowels of Thaana, Devanagari and Arabic stay. An apostrophe, a Catalan dot and a joiner stay
    between letters; other punctuation and symbols separate words.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).replace("İ", "i").lower()
    text = unicodedata.normalize("NFKC", text)
    kept = []
    for place, symbol in enumerate(text):
        kind = unicodedata.category(symbol)
        inside = symbol in _INNER and _is_letter(text, place - 1) and _is_letter(text, place + 1)
        if kind[0] in "LMN" or inside:
            kept.append(symbol)
        elif kind != "Cf" and symbol != "\u00ad":  # formats, such as a soft hyphen, separate nothing
            kept.append(" ")
    return " ".join("".join(kept).split())


def _is_letter(text: str, place: int) -> bool:
    return 0 <= place < len(text) and unicodedata.category(text[place])[0] in "LM"


def normalize_narrow_ipa(text: str) -> str:
    """Return narrow IPA: NFC and single blanks; diacritics, length, tones, stress and ties stay as they are written.

    Symbols that look like a letter of the IPA are written as it: ":" as "ː", "'" as "ˈ"; and "ɡ" U+0261 as "g".
    """
    return _single_blanks(unicodedata.normalize("NFC", text.translate(_IPA_LETTERS)))


def _ipa_remarks(text: str) -> tuple[str, ...]:
    return tuple(f"{symbol!r} U+{ord(symbol):04X} is written as {chr(_IPA_LETTERS[ord(symbol)])!r}"
                 for symbol in sorted(set(text)) if ord(symbol) in _IPA_LETTERS)  # fmt: skip


def _single_blanks(text: str) -> str:
    return " ".join(text.split())


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "pasketti",
            pasketti.read_label,
            pasketti.normalize_ipa,
            tuple(pasketti.SYMBOLS),
            field="phonetic_text",
            remarks=pasketti.label_remarks,
        ),
        Profile(
            "english",
            pasketti.normalize_words,
            pasketti.normalize_words,
            tuple(sorted(pasketti.LETTERS)),
            field="orthographic_text",
        ),
        Profile("text", normalize_text, normalize_text),
        Profile("ipa", normalize_narrow_ipa, normalize_narrow_ipa, field="phonetic_text", remarks=_ipa_remarks),
        Profile("raw", _single_blanks, _single_blanks),
        Profile("timit39", timit.fold_to_48, timit.fold_to_39, timit.TRAINED, "tokens"),
    )
}
TRACKS = {"phonetic": "pasketti", "word": "english"}  # the challenge's names of two of them


ALLOWED = "STREAMTRAIN_PROFILES"  # in the environment: the functions that may be run as profiles, for all processes


def allow_profile(name: str) -> None:
    """Allow a profile that the user has named, in this process and those that it starts."""
    os.environ[ALLOWED] = ",".join({*filter(None, os.environ.get(ALLOWED, "").split(",")), name})


@functools.cache
def profile_of(name: str) -> Profile:
    """Return a profile by its name, or that of a function, as `my_module:normalize`. Raises StreamtrainError.

    A function must have been allowed by `allow_profile`: a shard set or a model of others may name any function.
    """
    if name in PROFILES:
        return PROFILES[name]
    module, colon, function = name.partition(":")
    if not (colon and re.fullmatch(r"[\w.]+", module) and function.isidentifier()):
        hint = f"profiles: {', '.join(PROFILES)}; or a function of yours, as my_module:normalize"
        raise StreamtrainError(f"profile {name!r} is unknown", hint)
    if name not in os.environ.get(ALLOWED, "").split(","):
        hint = f"if you trust it: {ALLOWED}={name} in the environment, or --profile where a command has it"
        raise StreamtrainError(f"profile {name!r} is a function that these labels name, not you: it is not run", hint)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is there; a command's is not
    try:
        normalize = getattr(importlib.import_module(module), function)
        if not isinstance(normalize("a"), str):
            raise TypeError(f"{function}('a') returns no text")
    except Exception as error:  # the user's code may raise anything
        hint = "a function that takes a text and returns one; its module must be importable from this folder"
        raise StreamtrainError(f"profile {name!r}: {reason_of(error)}", hint) from error

    def normal_form(text: str) -> str:
        return _single_blanks(normalize(text))

    return Profile(name, normal_form, normal_form)
