"""Write and check the SHA-256 sums of a saved model's files, in the format of `sha256sum --check SHA256SUMS`."""

import hashlib
import re
from pathlib import Path

from sharding.errors import StreamtrainError
from sharding.files.document import DocumentError, open_regular, read_document
from sharding.files.writing import write_inside

SUMS_NAME = "SHA256SUMS"
HEX_DIGITS = 64  # followed by two blanks and the name
DECISIVE = re.compile(  # names of files that decide what a model computes or outputs
    r"[^.].*\.(safetensors|bin)|([^.].*\.index|([^.].*)?config|vocab|labels|tokenizer|added_tokens|special_tokens_map)\.json"
)


class ChecksumError(StreamtrainError):
    """Report a model file that differs from what was saved."""


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in the folder."""
    lines = [_checksum_line(path) for path in sorted(folder.iterdir())]
    write_inside(folder / SUMS_NAME, "\n".join([*lines, ""]))


def check_sums(folder: Path, must_have: bool = False) -> None:
    """Raise ChecksumError if a file differs from its checksum.

    A folder without checksums, such as a published model's, passes unless it `must_have` them, as a model saved here.
    """
    sums = folder / SUMS_NAME
    hint = "copy the model again from an intact source, or save it again"
    try:
        *lines, rest = read_document(sums).decode(errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError) as error:  # also for the name of a model on the hub
        if must_have:
            raise ChecksumError(f"{sums}: is missing", hint) from error
        return
    except (OSError, DocumentError) as error:
        raise ChecksumError(f"{sums}: {getattr(error, 'strerror', error)}", hint) from error
    if rest or not lines:
        raise ChecksumError(f"{sums}: is cut off", hint)
    listed = [Path(line[HEX_DIGITS + 2 :]).name for line in lines]
    extra = sorted(name for name in {path.name for path in folder.iterdir()} - set(listed) if DECISIVE.fullmatch(name))
    if extra:
        raise ChecksumError(
            f"{sums}: is cut off, or {extra[0]}, which it does not list, is not a file of this model",
            f"{hint}; or move {extra[0]} away",
        )
    for name, line in zip(listed, lines, strict=True):
        path = folder / name
        try:
            actual = _checksum_line(path)
        except (OSError, ValueError) as error:
            raise ChecksumError(f"{path}: {getattr(error, 'strerror', error)}; {SUMS_NAME} lists it", hint) from error
        if actual != line:
            raise ChecksumError(
                f"{path}: damaged: its checksum is {actual[:8]}…, {SUMS_NAME} has {line[:8]}…",
                hint,
            )


def _checksum_line(path: Path) -> str:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # a BufferedReader
    return f"{digest.hexdigest()}  {path.name}"
