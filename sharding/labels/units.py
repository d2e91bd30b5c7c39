"""Divide a normalised label into symbols: characters, IPA segments, or tokens separated by blanks."""

import itertools
import re
from collections.abc import Sequence
from typing import Literal

Units = Literal["characters", "segments", "tokens"]

_TIE = "\u035c\u0361\u0362\u0360"  # below, above, double rightwards arrow below, double tilde: each spans two letters
_MARK = r"\u0300-\u035b\u035d-\u035f\u0363-\u036f\u0483-\u0487\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20f0"
_MODIFIER = r"\u02b0-\u02c1\u02d0-\u02d1\u02de\u02e0-\u02e4\u02ee\u02fd\u1d2c-\u1d6a\u1d78\u1d9b-\u1dbf\u2071\u207f"
_TONE = r"\u02e5-\u02e9\ua700-\ua716\u00b9\u00b2\u00b3\u2070\u2074-\u2079"
_AROUND = rf"[{_MARK}{_MODIFIER}]*"
_SEGMENT = re.compile(
    rf"[{_TONE}]+"  # a tone, level or contour
    rf"|[{_MODIFIER}]*(?:[^\s{_TONE}{_MODIFIER}]{_AROUND}[{_TIE}])*[^\s{_TONE}]{_AROUND}"
    r"|\S|\s+"
)


def split_symbols(text: str, units: Units) -> Sequence[str]:
    """Return the symbols of a normalised label, in order.

    The blank between words is a symbol, but for tokens, which it separates. A segment is a base letter with its
    diacritics, length and modifiers, or letters joined by ties; stress and tones are segments of their own.

    Example:
        >>> split_symbols("t͡ʃaɪ̯ kʰ", "segments")
        ['t͡ʃ', 'a', 'ɪ̯', ' ', 'kʰ']
    """
    if units == "characters":
        return text
    if units == "tokens":
        return text.split()
    return [" " if part.isspace() else part for part in _SEGMENT.findall(text)]


def join_symbols(symbols: Sequence[str], units: Units) -> str:
    """Return the text of symbols, with single blanks between words."""
    return " ".join(symbols if units == "tokens" else "".join(symbols).split())


def ctc_frames_needed(symbols: Sequence[str]) -> int:
    """Return the fewest frames in which CTC can emit symbols: one for each, and a blank between equal neighbours."""
    return len(symbols) + sum(left == right for left, right in itertools.pairwise(symbols))
