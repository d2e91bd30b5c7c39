"""Save and resume. A checkpoint is whole or absent: written under another name, synced, renamed, then pointed to.

It holds whole tensors in fp32, so it fits any world size and any ZeRO stage. `state.json` lists every file with its
checksum, and is written last.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from sharding.errors import StreamtrainError
from sharding.files.document import STRICT, Count, Number, Size, parse_json, read_document, validate
from streamtrain.atomic import new_folder, recover_replaced
from streamtrain.config import Config
from streamtrain.data.plan import PLANNER_VERSION, PlanPrefix, PlanSettings
from streamtrain.model.pretrained import set_default_mode
from streamtrain.training.zero_engine import FullState

log = logging.getLogger("streamtrain")

STATE_NAME = "state.json"
NAMES = "step-*"
NEWEST, BEST = "newest", "best"  # links in the folder of checkpoints
FILES: Mapping[str, "FileName"] = {
    "params": "model.safetensors",
    "optim": "optimizer.safetensors",
    "ema": "average.safetensors",
}
FULL_HINT = "the checkpoints before it are whole; make room, and the same command resumes from the newest"
REPLANNED = frozenset(  # settings that may change during a run: they decide how the remaining clips are batched
    [
        "data.batch_seconds",
        "data.shuffle_shards",
        "data.length_jitter",
        "data.speed_factors",
        "data.gain_db",
        "train.micro_batches_per_step",
        "train.epochs",
        "train.max_steps",
    ]
)


class CheckpointError(StreamtrainError):
    """Report a checkpoint that is missing, damaged, or of another run."""


@dataclass(frozen=True)
class RunState:
    """Hold the progress of a run, beside its tensors. No random state is needed: seed, epoch and step determine it."""

    __pydantic_config__ = STRICT

    config: dict[str, Any]  # the settings of `Config.resume_key`
    index_digest: str
    planner_version: int
    step: Count = 0  # optimizer steps done
    epoch: Count = 0
    step_in_epoch: Count = 0
    completed: tuple[PlanPrefix, ...] = ()  # plans by which this epoch was trained before it was re-planned
    split: str = ""  # of the scores below
    select: str = "cer"  # what they are
    evaluated: Annotated[int, Field(strict=True, ge=-1)] = -1  # step of the last evaluation
    best_score: Number | None = None
    best_step: Count | None = None
    evaluations_since_best: Count = 0
    skipped: Count = 0  # steps with a gradient that was not finite


FileName = Literal["model.safetensors", "optimizer.safetensors", "average.safetensors"]


class _Numbers(TypedDict):
    optimizer_steps: Annotated[Number, Field(ge=0)]
    loss_scaler: dict[str, bool | int | Number]


class _File(TypedDict):
    bytes: Size
    checksum: str


class _Document(TypedDict):
    """Describe state.json as it is written."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    state: RunState
    scalars: _Numbers
    files: dict[FileName, _File]
    digest: str


_DOCUMENT = TypeAdapter(_Document)


@dataclass(frozen=True)
class Checkpoint:
    """Hold a checkpoint's state and the description of its files."""

    path: Path
    state: RunState
    scalars: dict[str, Any]
    files: Mapping[FileName, _File]


def save_checkpoint(full_state: FullState, state: RunState, folder: Path, keep: int) -> Path:
    """Write `step-…` in `folder`, by one rank. Keep the newest `keep` checkpoints, and that of the best score."""
    name = f"step-{state.step:07d}"
    final = folder / name
    recover_replaced(folder, NAMES)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors_by_file = {file: tensors for field, file in FILES.items() if (tensors := getattr(full_state, field))}
    needed = sum(tensor.nbytes for tensors in tensors_by_file.values() for tensor in tensors.values())
    with new_folder(final, needed, FULL_HINT) as temporary:
        for file, tensors in tensors_by_file.items():
            save_file(tensors, temporary / file)
            set_default_mode(temporary / file)
        files = {file: _describe(temporary / file) for file in tensors_by_file}
        document = {"state": asdict(state), "scalars": full_state.scalars, "files": files}
        (temporary / STATE_NAME).write_text(json.dumps(document | {"digest": _digest(document)}, indent=1))
    _set_link(folder / NEWEST, name)
    if state.best_step is not None and (folder / f"step-{state.best_step:07d}").is_dir():
        _set_link(folder / BEST, f"step-{state.best_step:07d}")
    best = (folder / BEST).resolve()
    for old in list_checkpoints(folder)[:-keep]:
        if old.resolve() != best:
            _remove(old)
    return final


def delete_later_checkpoints(chosen: Path) -> None:
    """Delete the checkpoints after the one that the run resumes from: training continues differently from there."""
    for later in list_checkpoints(chosen.parent):
        if later.name > chosen.name:
            _remove(later)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint that `--resume` names: `auto`, the newest in `folder`, if any; `none`; or a path."""
    if resume == "none":
        return None
    if resume == "auto":
        found = next(reversed(list_checkpoints(folder)), None)
        for other in sorted(folder.glob(NAMES)):
            if found is None or other.name > found.name:
                log.info("%s: skipped, because it is incomplete (it has no %s)", other, STATE_NAME)
        return found
    path = Path(resume)
    if not (path / STATE_NAME).is_file():
        raise CheckpointError(
            f"{path}: not a checkpoint (it has no {STATE_NAME})", "name a folder RUN/checkpoints/step-…"
        )
    return path


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state, and check that each of its files is whole."""
    checkpoint = read_checkpoint(path)
    path = checkpoint.path
    for name, expected in checkpoint.files.items():
        try:
            actual = _describe(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}", _earlier_hint(path)) from error
        if actual != expected:
            raise CheckpointError(
                f"{path / name}: damaged: it has {actual['bytes']:,} bytes with checksum {actual['checksum']}, "
                f"{STATE_NAME} has {expected['bytes']:,} with {expected['checksum']}",
                _earlier_hint(path),
            )
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state, without checking its files."""
    path = path.resolve()
    try:
        content = parse_json(read_document(path / STATE_NAME))
        document = validate(content, _DOCUMENT)
        if content.pop("digest") != _digest(content):
            raise ValueError("its digest does not match")
        return Checkpoint(path, document["state"], {**document["scalars"]}, document["files"])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_NAME}: damaged ({error})", _earlier_hint(path)) from error


def load_state(checkpoint: Checkpoint) -> FullState:
    """Load the tensors of a checkpoint, mapped into memory."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for part, file in FILES.items():
        try:
            tensors[part] = load_file(checkpoint.path / file) if file in checkpoint.files else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.path / file}: {error}", _earlier_hint(checkpoint.path)) from error
    return FullState(**tensors, scalars=checkpoint.scalars)


def resume_state(checkpoint: Checkpoint, config: Config, index_digest: str, replan: bool) -> RunState:
    """Return the state to resume from. Raise CheckpointError, with the differences, if it is of another run.

    With `replan`, batching settings may differ: the rest of the epoch is then planned by those of `config`.
    """
    state = checkpoint.state
    current = {"config": config.resume_key, "index_digest": index_digest, "planner_version": PLANNER_VERSION}
    saved = {name: getattr(state, name) for name in current}
    with suppress(ValidationError):  # settings newer than the checkpoint had their defaults
        saved["config"] = Config.model_validate(state.config).resume_key
    differ = dict(_differences(saved, current))
    if not differ:
        return state
    if not differ.keys() <= REPLANNED or not replan:
        message = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in differ.items())
        message = message.replace("index_digest was", "the index of data.shards was")
        hint = REPLAN_HINT if differ.keys() <= REPLANNED else OTHER_RUN_HINT
        raise CheckpointError(f"{checkpoint.path}: belongs to another run: {message}", hint)
    try:
        prefix = PlanPrefix(PlanSettings.of(Config.model_validate(state.config)), state.step_in_epoch)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its settings are invalid: {error.errors()[0]['msg']}", OTHER_RUN_HINT
        ) from error
    if prefix.steps == 0 or prefix.settings == PlanSettings.of(config):
        return replace(state, config=config.resume_key)
    return replace(state, config=config.resume_key, step_in_epoch=0, completed=(*state.completed, prefix))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(NAMES) if (path / STATE_NAME).is_file())


REPLAN_HINT = (
    "undo the change, or add --replan: the rest of this epoch is then planned by the new settings, each clip once"
)
OTHER_RUN_HINT = (
    "undo the change, resume another checkpoint with --resume PATH, or start over with --resume none; "
    "another train.run_dir with model.pretrained=RUN/best starts from this run's weights"
)


def _earlier_hint(path: Path) -> str:
    """Return the hint of an error about a checkpoint: which earlier one the run can resume from."""
    earlier = [other for other in list_checkpoints(path.parent) if other.name < path.name]
    return f"--resume {earlier[-1]} uses the one before it" if earlier else "start over with --resume none"


def _differences(
    saved: dict[str, Any], current: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Yield each value that differs: its key, such as train.epochs, and what it was and is."""
    for key in sorted(saved.keys() | current.keys()):
        was, now = saved.get(key), current.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{path}{key}.")
        elif was != now:
            yield f"{path.removeprefix('config.')}{key}", (was, now)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
        return {"bytes": file.tell(), "checksum": checksum}


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


def _set_link(link: Path, name: str) -> None:
    """Make a link point to a checkpoint. At no time is there no link."""
    temporary = link.with_name(f".{link.name}.link")
    with suppress(OSError):  # the link is a convenience, and not every file system has links
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        os.replace(temporary, link)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. Rename it first: one that is half deleted must not look whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.gone")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
