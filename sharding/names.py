"""Names as people write them: which spellings are the same name. Imports nothing of ours."""

import math
import unicodedata
from typing import Any


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
