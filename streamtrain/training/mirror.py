"""Copy a run to a bucket in the background, for machines that lose their disks. The pointer to a copy is written last.

`newest.json` lists the pieces of each file in the newest copy. A piece is named by its checksum, so that unchanged data
is not sent again, data that is read back can be checked, and nothing that a pointer names is ever overwritten.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated

import xxhash
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from sharding.errors import MissingError, StoreError
from sharding.files.document import SMALL_BYTES, STRICT, parse
from sharding.files.names import check_name
from sharding.files.writing import explaining, remove
from sharding.shardset.store import FolderStore, Store
from streamtrain.data.dataset import read_ahead
from streamtrain.training.checkpoint import REPLAN_HINT, STATE_NAME, CheckpointError, list_checkpoints, open_checkpoint

log = logging.getLogger("streamtrain")

POINTER, PIECES = "newest.json", "pieces/"
PREVIOUS = "previous.json"  # the pointer before it, whose pieces stay: copied over newest.json, it takes a run back
PIECE_BYTES = 32 * 2**20  # so that a broken transfer costs little, and a copy takes little memory
FETCHED_AT_ONCE = 4  # pieces; some more wait in memory until they are written
NO_MIRROR = "is the server's disk or network faulty? name another train.mirror to continue without this copy"
PART = ".mirrored.part"  # in the run folder: files being fetched, or fetched by an aborted attempt
STAGING = ".mirror"  # in the run folder: files to send, even if the originals change in the meantime
FILES = (
    "log.csv",
    "ranks.csv",
    "samples.txt",
    "before.json",
    "config.json",
    "trained_on.json",
    "environment.json",
    "curves.png",
    "scorecard.json",
    "hypotheses.jsonl",
)  # overwritten in place, so they are copied; other files are linked
BEST = "best"


class _Pointer(TypedDict):
    """Describe newest.json as it is written."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    checkpoint: Annotated[str, Field(pattern=r"^step-\d+$")]
    files: dict[str, list[str]]  # the pieces of each file


_POINTER = TypeAdapter(_Pointer)


class Mirror:
    """Copy each enqueued checkpoint with the run's other files; only the newest one if the copying falls behind."""

    def __init__(self, store: Store, run: Path) -> None:
        self._store, self._run = store, run
        self._staging = run / STAGING
        remove(self._staging)
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._newest: tuple[Path, Future[None]] | None = None  # the staged files enqueued last, and their copying
        self._failed: tuple[Path, StoreError] | None = None  # the staged files of the last copy, if it failed, and why
        self._copied: tuple[str, float] | None = None  # the newest complete copy, and its time

    def check_writable(self) -> None:
        """Write, read and delete an unused piece. Raise StoreError if that fails, before there is any work to lose."""
        name = _piece_name(b"")
        try:
            self._store.write(name, b"")
            _read_piece(self._store, name)
            self._store.delete(name)
        except StoreError as error:
            raise StoreError(f"train.mirror cannot be used: {error.message}", error.hint) from error

    def check(self, check: Callable[[Path], object]) -> bool:
        """Return whether the copy is ahead of the run folder. Raise StoreError if it is not a copy of this run.

        `check` reads the state of a checkpoint, and raises CheckpointError if it is not of this run. So nothing of
        another run is overwritten, neither locally nor in the mirror.
        """
        pointer = _read_pointer(self._store)
        if pointer is None:
            return False
        checkpoint = f"checkpoints/{pointer['checkpoint']}"
        with TemporaryDirectory() as folder:
            self._fetch([f"{checkpoint}/{STATE_NAME}"], pointer, Path(folder))
            self._check(check, Path(folder) / checkpoint, "another run's? name another train.mirror")
        local = list_checkpoints(self._run / "checkpoints")
        ahead = not local or local[-1].name < pointer["checkpoint"]
        if local and ahead:
            check(local[-1])
        return ahead

    def fetch(self) -> None:
        """Restore the run folder from the copy, overwriting files. Raise StoreError if the copy is not whole.

        Files that an earlier attempt has fetched are checked and not fetched again.
        """
        pointer = _read_pointer(self._store)
        if pointer is None:
            return
        part, checkpoint = self._run / PART, f"checkpoints/{pointer['checkpoint']}"
        log.info("%s: copying %s from the mirror", self._run, pointer["checkpoint"])
        if part.is_symlink():  # it may lead outside of the run folder
            remove(part)
        for path in [path for path in part.rglob("*") if path.is_file()]:
            if path.relative_to(part).as_posix() not in pointer["files"]:
                path.unlink()  # an earlier attempt fetched it from an older copy
        self._fetch(pointer["files"], pointer, part)
        self._check(open_checkpoint, part / checkpoint, NO_MIRROR)
        (self._run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in (BEST, *FILES, checkpoint):  # the checkpoint last: it marks the folder as complete
            if (part / name).exists():
                if (self._run / name).is_dir():
                    shutil.rmtree(self._run / name)
                os.replace(part / name, self._run / name)
        shutil.rmtree(part)

    def _fetch(self, names: Collection[str], pointer: _Pointer, folder: Path) -> None:
        """Fetch files of the copy into a folder, each of which appears there when it is complete."""
        for name in names:
            check_name(f"{self._store.url}/{POINTER}", name)
            if not (folder / name).resolve().is_relative_to(folder.resolve()):  # a link in it leads elsewhere
                raise StoreError(f"{self._store.url}/{POINTER}: names a file outside of the run: {name}")
            if name not in pointer["files"]:
                raise StoreError(f"{self._store.url}/{POINTER}: lacks {name}", NO_MIRROR)
            pieces, path = pointer["files"][name], folder / name
            if not path.is_file() or [_piece_name(data) for data in _read_pieces(path)] != pieces:
                fetched = read_ahead(partial(_read_piece, self._store), iter(pieces), FETCHED_AT_ONCE)
                FolderStore(folder).write(name, fetched)

    def _check(self, check: Callable[[Path], object], checkpoint: Path, hint: str) -> None:
        """Check a checkpoint outside of its run. Raise StoreError if `check` raises CheckpointError."""
        try:
            check(checkpoint)
        except CheckpointError as error:
            message = error.message.removeprefix(f"{checkpoint.resolve()}").lstrip(":/ ")
            hint = error.hint if error.hint == REPLAN_HINT else hint
            raise StoreError(f"{self._store.url}: {checkpoint.name} {message}", hint) from error

    def clear(self) -> None:
        """Delete the pointers, after any copy in progress, so that no machine resumes from them: the run restarts."""
        self._drop_waiting()
        self._pool.submit(lambda: None).result()
        self._failed = None
        for name in (POINTER, PREVIOUS):
            self._store.delete(name)

    def enqueue(self, checkpoint: Path) -> None:
        """Stage a checkpoint to be copied, replacing one that is still waiting.

        The caller is the thread that writes the run's files, so none of them changes while it is staged.
        """
        shutil.rmtree(self._run / PART, ignore_errors=True)  # the run did not resume from the mirror
        with explaining(self._staging):
            self._staging.mkdir(exist_ok=True)
            staged = Path(mkdtemp(prefix=f"{checkpoint.name}.", dir=self._staging))  # unique: a step may come twice
            for folder in (checkpoint, self._run / BEST):
                if folder.is_dir():
                    shutil.copytree(folder, staged / folder.relative_to(self._run), copy_function=_link)
            for name in FILES:
                if (self._run / name).is_file():
                    shutil.copyfile(self._run / name, staged / name)
        self._drop_waiting()
        self._newest = staged, self._pool.submit(self._copy_or_warn, staged)

    def _drop_waiting(self) -> None:
        if self._newest is not None and self._newest[1].cancel():
            shutil.rmtree(self._newest[0], ignore_errors=True)

    def close(self, wait_sec: float | None = None) -> None:
        """Wait at most `wait_sec` for the last copy. Raise StoreError if it failed or is not complete by then.

        Without a limit, retry a failed copy once.
        """
        self._pool.shutdown(wait=False)
        if self._newest is not None and wait([self._newest[1]], wait_sec).not_done:
            raise StoreError(f"{self._store.url}: the last checkpoint has not reached the mirror in {wait_sec:g} s")
        if self._failed is not None and wait_sec is None:
            self._try_copy(self._failed[0])
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._failed is not None:
            error = self._failed[1]
            raise StoreError(f"{error.message} ({self._age()})", error.hint) from error

    def _age(self) -> str:
        if self._copied is None:
            return "no copy was made since the command began"
        name, at = self._copied
        return f"the newest copy is {name}, of {(time.monotonic() - at) / 60:.0f} min ago"

    def _copy_or_warn(self, staged: Path) -> None:
        if self._failed is not None:
            shutil.rmtree(self._failed[0], ignore_errors=True)
        self._try_copy(staged)
        if self._failed is not None:
            log.warning("%s has not reached the mirror (%s); the next one is tried: %s",
                        staged.stem, self._age(), self._failed[1].message)  # fmt: skip

    def _try_copy(self, staged: Path) -> None:
        """Copy the staged files, or record why that failed: training continues."""
        try:
            self._copy(staged)
        except Exception as error:  # of any kind
            self._failed = staged, error if isinstance(error, StoreError) else StoreError(str(error))
        else:
            self._failed = None
            self._copied = (staged.stem, time.monotonic())
            shutil.rmtree(staged, ignore_errors=True)

    def _copy(self, staged: Path) -> None:
        """Send new pieces and read them back, write the pointer, and delete pieces that neither pointer needs.

        Of the pieces in the store, only those that the pointer names are known to be whole: they were read back.
        """
        previous = _read_pointer(self._store)
        previous_pieces = _all_pieces(previous["files"]) if previous else set()
        sent = previous_pieces.intersection(self._store.names())
        files: dict[str, list[str]] = {}
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            pieces = files[path.relative_to(staged).as_posix()] = []
            for data in _read_pieces(path):
                pieces.append(name := _piece_name(data))
                if name not in sent:
                    self._store.write(name, data)
                    _read_piece(self._store, name)
                    sent.add(name)
        self._check(open_checkpoint, staged / "checkpoints" / staged.stem, "is this machine's disk faulty?")
        stored = {name for name in self._store.names() if name.startswith(PIECES)}  # leave other objects alone
        if missing := _all_pieces(files) - stored:
            raise StoreError(f"{self._store.url}: pieces are missing, such as {min(missing)}", NO_MIRROR)
        if previous is not None:
            self._store.write(PREVIOUS, json.dumps(previous, indent=1).encode())
        self._store.write(POINTER, json.dumps({"checkpoint": staged.stem, "files": files}, indent=1).encode())
        for name in stored - _all_pieces(files) - previous_pieces:
            self._store.delete(name)


def _link(path: str, target: str) -> None:
    try:
        os.link(path, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(path, target)


def _read_pointer(store: Store) -> _Pointer | None:
    try:
        return parse(store.read(POINTER, SMALL_BYTES), _POINTER)
    except MissingError:
        return None
    except ValueError as error:
        raise StoreError(f"{store.url}/{POINTER}: is not the mirror of a run ({error})", NO_MIRROR) from error


def _all_pieces(files: dict[str, list[str]]) -> set[str]:
    return {piece for pieces in files.values() for piece in pieces}


def _read_piece(store: Store, name: str) -> bytes:
    data = store.read(name, PIECE_BYTES)
    if _piece_name(data) != name:
        raise StoreError(f"{store.url}/{name}: read back as {_piece_name(data)}", NO_MIRROR)
    return data


def _read_pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(PIECE_BYTES):
            yield data


def _piece_name(data: bytes) -> str:
    return f"{PIECES}{xxhash.xxh3_128_hexdigest(data)}"
