"""Names as people write them: which spellings are the same name, and which are a place to read or write."""

import math
import unicodedata
from pathlib import PurePosixPath
from typing import Any

from sharding.errors import StoreError


def nfc(text: str) -> str:
    """Return Unicode's composed form, which is the same for all canonically equal texts."""
    return unicodedata.normalize("NFC", text)


def same_name(name: str) -> str:
    """Return the form in which names are compared: Unicode's NFC, without outer blanks."""
    return nfc(name).strip()


def name_of(value: Any) -> Any:
    """Return a number as the name that it stands for, 7 and 7.0 as "7"; anything else as it is."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if value.is_integer() else str(value)  # pandas writes 7.0 where other rows lack theirs
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def check_name(url: str, name: str) -> None:
    """Raise StoreError if a name, which a file may have given, is not a place within the folder or prefix `url`."""
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise StoreError(
            f"{url}: {name!a:.200} is no name within it",
            "a name is relative, without '..'; was this set made by somebody whom you do not trust?",
        )
