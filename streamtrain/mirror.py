"""A copy of the run in a bucket, for machines that vanish with their disks: made in the background, pointed to last.

`newest.json` says of which pieces each file of the newest copy is made. A piece is named by its checksum: what has not
changed is not sent again, what is read back is checked, and nothing that a pointer names is ever overwritten.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from sharding.errors import MissingError, StoreError
from sharding.store import Store
from streamtrain.checkpoint import REPLAN_HINT, STATE_NAME, CheckpointError, list_checkpoints

log = logging.getLogger("streamtrain")

POINTER, PIECES = "newest.json", "pieces/"
PIECE_BYTES = 32 * 2**20
NO_MIRROR = "is the server's disk or line faulty? name another train.mirror to go on without this copy"
PART = ".mirrored.part"  # in the run folder: what is being fetched
STAGING = ".mirror"  # in the run folder: what is on its way, whatever becomes of the originals meanwhile
FILES = (
    "log.csv",
    "ranks.csv",
    "samples.txt",
    "before.json",
    "config.json",
    "trained_on.json",
    "curves.png",
    "scorecard.json",
    "hypotheses.jsonl",
)  # written in place: copied, where others are linked
FOLDERS = ("best",)


class Mirror:
    """Copies each checkpoint that it is offered, with the run's other files; the newest where it falls behind."""

    def __init__(self, store: Store, run: Path) -> None:
        self._store, self._run = store, run
        self._staging = run / STAGING
        shutil.rmtree(self._staging, ignore_errors=True)
        self._waiting: Path | None = None
        self._changed = threading.Condition()
        self._busy = self._closing = False
        self._failed: StoreError | None = None  # the last copy, if it failed
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def check(self, check: Callable[[Path], None]) -> bool:
        """Whether the copy is ahead of the run folder, once it is known to be of this run, by its state alone.

        `check` looks at a checkpoint's state, and raises CheckpointError where it is not of this run; so nothing of
        another run is overwritten, neither here nor there. Raises StoreError where the copy is not of this run.
        """
        pointer = _read_pointer(self._store)
        if pointer is None:
            return False
        part, checkpoint = self._run / PART, f"checkpoints/{pointer['checkpoint']}"
        try:
            self._fetch(f"{checkpoint}/{STATE_NAME}", pointer, part)
            self._check(check, part / checkpoint)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        here = list_checkpoints(self._run / "checkpoints")
        ahead = not here or here[-1].name < pointer["checkpoint"]
        if here and ahead:
            check(here[-1])
        return ahead

    def fetch(self) -> None:
        """Bring the copy into the run folder, over what is there. Raises StoreError where the copy is not whole."""
        pointer = _read_pointer(self._store)
        if pointer is None:
            return
        part, checkpoint = self._run / PART, f"checkpoints/{pointer['checkpoint']}"
        log.info("%s: copying %s from the mirror", self._run, pointer["checkpoint"])
        try:
            for name in pointer["files"]:
                self._fetch(name, pointer, part)
            (self._run / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in (*FOLDERS, *FILES, checkpoint):  # the checkpoint last: what has it is whole
                if (part / name).exists():
                    if (self._run / name).is_dir():
                        shutil.rmtree(self._run / name)
                    os.replace(part / name, self._run / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch(self, name: str, pointer: dict[str, Any], part: Path) -> None:
        """One file of the copy, into the folder `part`."""
        path = part / name
        if not path.resolve().is_relative_to(part.resolve()):
            raise StoreError(f"{self._store.url}/{POINTER}: names a file outside of the run: {name}")
        if name not in pointer["files"]:
            raise StoreError(f"{self._store.url}/{POINTER}: lacks {name}", NO_MIRROR)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for piece in pointer["files"][name]:
                file.write(_read_piece(self._store, piece))
            file.flush()
            os.fsync(file.fileno())

    def _check(self, check: Callable[[Path], None], fetched: Path) -> None:
        try:
            check(fetched)
        except CheckpointError as error:
            said = error.message.removeprefix(f"{fetched.resolve()}").lstrip(":/ ")
            hint = error.hint if error.hint == REPLAN_HINT else "another run's? name another train.mirror"
            raise StoreError(f"{self._store.url}: {fetched.name} {said}", hint) from error

    def forget(self) -> None:
        """No machine goes on from what is there: the run starts over."""
        self._store.delete(POINTER)

    def offer(self, checkpoint: Path) -> None:
        """Have a checkpoint copied, unless a newer one is offered before its turn comes."""
        staged = self._staging / checkpoint.name
        shutil.rmtree(staged, ignore_errors=True)
        for name in self._files_of(checkpoint):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            if name in FILES:
                shutil.copyfile(self._run / name, staged / name)
            else:
                _link(self._run / name, staged / name)
        with self._changed:
            if self._waiting is not None and self._waiting != staged:
                shutil.rmtree(self._waiting, ignore_errors=True)
            self._waiting = staged
            self._changed.notify_all()

    def close(self, wait_sec: float | None = None) -> None:
        """Wait for the last copy, at most so long. Raises StoreError where it failed or is not there by then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._busy and self._waiting is None, wait_sec)
        if not done:
            raise StoreError(f"{self._store.url}: the last checkpoint has not reached the mirror in {wait_sec:g} s")
        if self._failed is not None:
            raise self._failed
        shutil.rmtree(self._staging, ignore_errors=True)

    def _files_of(self, checkpoint: Path) -> list[str]:
        folders = [checkpoint, *(self._run / name for name in FOLDERS)]
        inside = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [path.relative_to(self._run).as_posix() for path in inside]
        return files + [name for name in FILES if (self._run / name).is_file()]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                staged, self._waiting = self._waiting, None
                if staged is None:
                    return
                self._busy = True
            try:
                self._copy(staged)
                self._failed = None
            except Exception as error:  # whatever it is, training goes on, and does not wait for a dead thread
                self._failed = error if isinstance(error, StoreError) else StoreError(str(error))
                log.warning("%s has not reached the mirror; the next one is tried: %s", staged.name, error)
            shutil.rmtree(staged, ignore_errors=True)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _copy(self, staged: Path) -> None:
        """Send what is not there yet, read it back, point to it, and delete what nothing needs any longer."""
        there = {name for name in self._store.names() if name.startswith(PIECES)}  # what else lies there is not ours
        before = _read_pointer(self._store)
        files: dict[str, list[str]] = {}
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            pieces = files[path.relative_to(staged).as_posix()] = []
            for data in _pieces(path):
                pieces.append(name := _name(data))
                if name not in there:
                    self._store.write(name, data)
                    _read_piece(self._store, name)
                    there.add(name)
        self._store.write(POINTER, json.dumps({"checkpoint": staged.name, "files": files}, indent=1).encode())
        needed = {piece for pieces in files.values() for piece in pieces}
        needed |= {piece for pieces in (before or {"files": {}})["files"].values() for piece in pieces}
        for name in there - needed:
            self._store.delete(name)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # not every file system has links
        shutil.copyfile(path, to)


def _read_pointer(store: Store) -> dict[str, Any] | None:
    try:
        pointer = json.loads(store.read(POINTER))
        files = {str(name): [str(piece) for piece in list(pieces)] for name, pieces in pointer["files"].items()}
        return {"checkpoint": str(pointer["checkpoint"]), "files": files}
    except MissingError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{store.url}/{POINTER}: is no mirror of a run ({error})", NO_MIRROR) from error


def _read_piece(store: Store, name: str) -> bytes:
    data = store.read(name)
    if _name(data) != name:
        raise StoreError(f"{store.url}/{name}: came back as {_name(data)}", NO_MIRROR)
    return data


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(PIECE_BYTES):
            yield data


def _name(data: bytes) -> str:
    return f"{PIECES}{xxhash.xxh3_128_hexdigest(data)}"
