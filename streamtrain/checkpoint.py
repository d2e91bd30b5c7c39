"""Save and resume. A checkpoint is whole or absent: written under another name, synced, renamed, then pointed to."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.errors import StreamtrainError
from streamtrain.world import World

STATE_NAME = "state.json"


class CheckpointError(StreamtrainError):
    """A checkpoint that is not there, not whole, or of another run."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside weights and optimizer, which the engine keeps."""

    step: int  # optimizer steps done
    epoch: int
    step_in_epoch: int
    world_size: int
    config: dict[str, Any]  # its decisive part
    index_digest: str
    planner_version: int
    best_cer: float | None


def save_checkpoint(engine: Any, state: RunState, folder: Path, world: World, keep: int) -> Path:
    """Write `step-…` in `folder`; all ranks call it together. Keeps the newest `keep` checkpoints."""
    name = f"step-{state.step:07d}"
    partial, final = folder / f".{name}.part", folder / name
    if world.main:
        for left_behind in folder.glob(".step-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    engine.save_checkpoint(str(partial), tag="engine", client_state={}, save_latest=False)
    world.barrier()
    if world.main:
        (partial / STATE_NAME).write_text(json.dumps(asdict(state), indent=1))
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            _remove(old)
    world.barrier()
    return final


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """What `--resume` means: `auto` the newest in the run folder, if any; `none`; or the path of one."""
    if resume == "none":
        return None
    if resume == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / STATE_NAME).is_file():
        raise CheckpointError(
            f"{path}: not a checkpoint (it has no {STATE_NAME})", "name a folder RUN/checkpoints/step-…"
        )
    return path


def load_checkpoint(engine: Any, path: Path, expected: RunState) -> RunState:
    """Bring the engine to where the checkpoint stands. `expected` is the run's own state at step 0.

    Raises CheckpointError where the checkpoint belongs to another run, says what differs, and changes nothing.
    """
    state = _read_state(path)
    differ = _differences(asdict(state), asdict(expected), _MUST_AGREE)
    if differ:
        raise CheckpointError(f"{path}: belongs to another run: {'; '.join(differ)}", _OTHERWISE)
    try:
        loaded, _ = engine.load_checkpoint(str(path), tag="engine")
    except Exception as error:  # DeepSpeed and torch raise whatever they met
        raise CheckpointError(f"{path}: cannot be loaded: {error}", _OTHERWISE) from error
    if loaded is None:
        raise CheckpointError(f"{path}: holds no engine state", _OTHERWISE)
    return state


def index_digest_of(checkpoint: Path) -> str:
    """The digest of the shard index that a checkpoint's run began with."""
    return _read_state(checkpoint).index_digest


def _read_state(checkpoint: Path) -> RunState:
    try:
        return RunState(**json.loads((checkpoint / STATE_NAME).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_NAME}: damaged ({error})", _OTHERWISE) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_NAME).is_file())


_OTHERWISE = (
    "undo the change, resume another checkpoint with --resume PATH, or start over with --resume none; "
    "another train.run_dir with model.pretrained=RUN/best starts from this run's weights"
)
_MUST_AGREE = ("world_size", "config", "index_digest", "planner_version")


def _differences(saved: dict[str, Any], here: dict[str, Any], keys: Iterable[str], path: str = "") -> list[str]:
    """Each value that differs, named by its place: `train.epochs was 20, is 30`."""
    differ = []
    for key in keys:
        was, now = saved.get(key), here.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            differ += _differences(was, now, sorted(was.keys() | now.keys()), f"{path}{key}.")
        elif was != now:
            differ.append(f"{path.removeprefix('config.')}{key} was {was}, is {now}")
    return differ


def _remove(checkpoint: Path) -> None:
    """Out of sight first: one that is half removed must not look whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
