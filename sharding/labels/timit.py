"""Fold TIMIT's 61 phones to the 48 that models are trained on, and these to the 39 that are scored.

Lee & Hon, "Speaker-independent phone recognition using hidden Markov models", 1989; the closures, the glottal stop and
the silences as in Kaldi's recipe, so that phone error rates are comparable. Repeated silences are not merged.
"""

_DISC = """
    aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy jh k kcl l m
    n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh
"""
PHONES = tuple(_DISC.split())  # 61

_TO_48 = {"ax-h": "ax", "axr": "er", "em": "m", "eng": "ng", "hv": "hh", "nx": "n", "ux": "uw", "q": ""}
_TO_48 |= dict.fromkeys(("bcl", "dcl", "gcl"), "vcl") | dict.fromkeys(("pcl", "tcl", "kcl"), "cl")
_TO_48 |= dict.fromkeys(("h#", "pau"), "sil")
_TO_39 = {"ao": "aa", "ax": "ah", "el": "l", "en": "n", "ix": "ih", "zh": "sh"}
_TO_39 |= dict.fromkeys(("cl", "vcl", "epi"), "sil")

TRAINED = tuple(sorted({_TO_48.get(phone, phone) for phone in PHONES} - {""}))  # 48
SCORED = tuple(sorted({_TO_39.get(phone, phone) for phone in TRAINED}))  # 39


def fold_to_48(label: str) -> str:
    """Return the phones of a label, any of the 61, as those that are trained on; "q" is left out."""
    return _fold(label.lower(), _TO_48)


def fold_to_39(label: str) -> str:
    """Return the phones of a label, any of the 61 or the 48, as those that are scored."""
    return _fold(_fold(label.lower(), _TO_48), _TO_39)


def _fold(label: str, folding: dict[str, str]) -> str:
    return " ".join(filter(None, (folding.get(phone, phone) for phone in label.split())))
