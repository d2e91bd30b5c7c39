"""Write folders that are complete or absent: a kill loses neither the old folder nor the one that replaces it."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sharding.files.writing import remove, sync, write_error

ASIDE = ".old"


@contextmanager
def new_folder(final: Path, needed: int | None = None, hint: str | None = None) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `final` once it is complete, and is deleted if that fails.

    Raises StoreError, with the `hint` if there is one, if it cannot be written; `needed` is the number of bytes.
    """
    partial = final.with_name(f".{final.name}.part")
    try:
        try:
            remove(partial)
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
            replace_dir(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise write_error(final, _system_error(error), needed, hint) from error


def replace_dir(partial: Path, final: Path) -> None:
    """Rename a finished folder to `final`; a folder that had this name is available until then."""
    aside = aside_of(final)
    remove(aside)
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def move_aside(final: Path) -> None:
    """Set a file or folder aside under a hidden name, if it exists, until `recover_replaced` restores it."""
    with suppress(FileNotFoundError):
        os.replace(final, aside_of(final))


def recover_replaced(folder: Path, pattern: str) -> None:
    """Restore the names of what was set aside, such as folders that a kill interrupted while they were replaced."""
    for aside in folder.glob(aside_of(Path(pattern)).name):
        final = folder / aside.name[1:].removesuffix(ASIDE)
        if final.exists():  # the kill came later: the old one may be half removed
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)


def _system_error(error: OSError | SafetensorError) -> OSError:
    """Return the system's error, which safetensors reports in text alone."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def aside_of(final: Path) -> Path:
    """Return the path at which a file or folder is set aside."""
    return final.with_name(f".{final.name}{ASIDE}")
