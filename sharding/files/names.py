"""Normalise, sort and check names as people write them: of speakers, corpora, ages, folders and files."""

import math
import os
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any

from sharding.errors import StoreError

UNKNOWN = "unknown"  # a corpus or an age that is not given
DECADES = {"teens": 13, "twenties": 20, "thirties": 30, "forties": 40, "fourties": 40, "fifties": 50, "sixties": 60,
           "seventies": 70, "eighties": 80, "nineties": 90}  # Common Voice writes "fourties"  # fmt: skip


def nfc(text: str) -> str:
    """Return Unicode's composed form (NFC), which is the same for all canonically equal texts."""
    return unicodedata.normalize("NFC", text)


def canonical_name(name: str) -> str:
    """Return the form in which names are compared: Unicode's NFC, without surrounding whitespace."""
    return nfc(name).strip()


def canonical_speaker(name: str) -> str:
    """Return the form in which speakers and sessions are compared: 4.0 is 4, as pandas adds .0 beside empty cells."""
    return re.sub(r"^(\d+)\.0$", r"\1", canonical_name(name))


def name_of(value: Any) -> Any:
    """Return a number as the name that it stands for, 7 and 7.0 as "7"; return anything else unchanged."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if value.is_integer() else str(value)  # pandas writes 7.0 if other rows lack the value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def age_order(age: str) -> tuple[bool, tuple[float, ...], str]:
    """Return a key that sorts ages by their numbers, 3-4 before 5-7 before 12+; unknown ages come last."""
    numbers = tuple(map(float, re.findall(r"\d+(?:\.\d+)?", age))) or (DECADES.get(age.lower(), math.inf),)
    return age == UNKNOWN, numbers, age


def expand_home(text: str) -> str:
    """Expand `~/x` to the user's home, also as the value of `--option=~/x`, which shells do not expand."""
    option, path = re.fullmatch(r"(--[a-z-]+=)?(.*)", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    return option + os.path.expanduser(path) if path == "~" or path.startswith("~/") else text


def check_name(url: str, name: str) -> None:
    """Raise StoreError if a name, which may come from a file, is not a path within the folder or prefix `url`."""
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise StoreError(
            f"{url}: {name!a:.200} is not a name within it",
            "a name is relative, without '..'; was this set made by somebody you do not trust?",
        )
