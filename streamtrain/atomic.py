"""Folders that are whole or absent: a kill loses neither what was there nor what takes its place."""

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
    """Yield a folder to fill, of which nothing is left if that fails, and which takes the place of `final` when whole.

    Raise StoreError, with the `hint` if there is one, if it cannot be written; `needed` are the bytes to come.
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
    """Give a finished folder its name; what had that name before stays at hand until then."""
    aside = aside_of(final)
    remove(aside)
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def move_aside(final: Path) -> None:
    """Take the name of a file or folder, if there is one, until `put_back` gives it back."""
    with suppress(FileNotFoundError):
        os.replace(final, aside_of(final))


def recover_replaced(folder: Path, pattern: str) -> None:
    """Give what lies aside its name again, such as folders that a kill caught while they were replaced."""
    for aside in folder.glob(aside_of(Path(pattern)).name):
        final = folder / aside.name[1:].removesuffix(ASIDE)
        if final.exists():  # the kill came later: what is aside may be half removed
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)


def _system_error(error: OSError | SafetensorError) -> OSError:
    """Return the error of the system; safetensors tells it in words alone."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def aside_of(final: Path) -> Path:
    """Return where a file or folder lies that has lost its name for the moment."""
    return final.with_name(f".{final.name}{ASIDE}")
