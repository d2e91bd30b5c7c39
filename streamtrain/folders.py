"""Folders that are whole or absent: a kill loses neither what was there nor what takes its place."""

import os
import shutil
from pathlib import Path

ASIDE = ".old"


def put_in_place(partial: Path, final: Path) -> None:
    """Give a finished folder its name; what had that name before stays at hand until then."""
    aside = _aside(final)
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def put_back(folder: Path, pattern: str) -> None:
    """Folders of such names that a kill caught while they were replaced get their names again."""
    for aside in folder.glob(_aside(Path(pattern)).name):
        final = folder / aside.name[1:].removesuffix(ASIDE)
        if final.exists():  # the kill came later: what is aside may be half removed
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}{ASIDE}")
