"""SHA-256 of the files of a saved model, in the form that `sha256sum --check SHA256SUMS` reads."""

import hashlib
import re
from pathlib import Path

from sharding.errors import StreamtrainError
from sharding.files.document import DocumentError, open_regular, read_document
from sharding.files.writing import write_inside

SUMS_NAME = "SHA256SUMS"
HEX_DIGITS = 64  # before two blanks and the name
DECISIVE = re.compile(  # names of files that decide what a model computes, or says
    r"[^.].*\.(safetensors|bin)|([^.].*\.index|([^.].*)?config|vocab|tokenizer|added_tokens|special_tokens_map)\.json"
)


class ChecksumError(StreamtrainError):
    """A model's file that is not as it was saved."""


def write_sums(folder: Path) -> None:
    """Write the sums of all files that lie in the folder."""
    lines = [_line(path) for path in sorted(folder.iterdir())]
    write_inside(folder / SUMS_NAME, "\n".join([*lines, ""]))


def check_sums(folder: Path, must_have: bool = False) -> None:
    """Raise ChecksumError if a file is not as it was saved; a folder without sums, as a published model's, passes.

    Not so if it `must_have` them, as one of ours.
    """
    sums = folder / SUMS_NAME
    hint = "take the model from where it is whole, or save it again"
    try:
        *lines, end = read_document(sums).decode(errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError) as error:  # of a hub's model, too
        if must_have:
            raise ChecksumError(f"{sums}: is gone", hint) from error
        return
    except (OSError, DocumentError) as error:
        raise ChecksumError(f"{sums}: {getattr(error, 'strerror', error)}", hint) from error
    if end or not lines:
        raise ChecksumError(f"{sums}: is cut off", hint)
    names = [Path(line[HEX_DIGITS + 2 :]).name for line in lines]
    unnamed = sorted(name for name in {path.name for path in folder.iterdir()} - set(names) if DECISIVE.fullmatch(name))
    if unnamed:
        raise ChecksumError(
            f"{sums}: is cut off, or {unnamed[0]}, which it does not name, is no file of this model",
            f"{hint}; or move {unnamed[0]} away",
        )
    for name, line in zip(names, lines, strict=True):
        path = folder / name
        try:
            seen = _line(path)
        except (OSError, ValueError) as error:
            raise ChecksumError(f"{path}: {getattr(error, 'strerror', error)}; {SUMS_NAME} names it", hint) from error
        if seen != line:
            raise ChecksumError(
                f"{path}: damaged: its checksum is {seen[:8]}…, {SUMS_NAME} has {line[:8]}…",
                hint,
            )


def _line(path: Path) -> str:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # a BufferedReader
    return f"{digest.hexdigest()}  {path.name}"
