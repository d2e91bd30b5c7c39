"""Save and resume. A checkpoint is whole or absent: written under another name, synced, renamed, then pointed to.

It holds whole tensors in fp32, so it belongs to no world size and to no ZeRO stage. `state.json` names every file with
its checksum, and is written last.
"""

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
CHUNK_BYTES = 8 * 2**20
FULL_HINT = "the checkpoints before it are whole; make room, and the same command goes on from the newest"
REPLANNED = frozenset(  # settings that may change on the way: they decide how the clips that are left come
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
    """A checkpoint that is not there, not whole, or of another run."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors. Nothing random needs to be kept: all is drawn by seed, epoch and step."""

    __pydantic_config__ = STRICT

    config: dict[str, Any]  # its decisive part
    index_digest: str
    planner_version: int
    step: Count = 0  # optimizer steps done
    epoch: Count = 0
    step_in_epoch: Count = 0
    completed: tuple[PlanPrefix, ...] = ()  # how this epoch was planned before it was planned anew
    split: str = ""  # that the scores below are of
    evaluated: Annotated[int, Field(strict=True, ge=-1)] = -1  # step of the last evaluation
    best_cer: Number | None = None
    best_step: Count | None = None
    evaluations_since_best: Count = 0
    skipped: Count = 0  # steps whose gradient was not finite


FileName = Literal["model.safetensors", "optimizer.safetensors", "average.safetensors"]


class _Numbers(TypedDict):
    optimizer_steps: Annotated[Number, Field(ge=0)]
    loss_scaler: dict[str, bool | int | Number]


class _File(TypedDict):
    bytes: Size
    checksum: str


class _Document(TypedDict):
    """state.json as it is written."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    state: RunState
    scalars: _Numbers
    files: dict[FileName, _File]
    digest: str


_DOCUMENT = TypeAdapter(_Document)


@dataclass(frozen=True)
class Checkpoint:
    """One whose files were checked when it was opened."""

    path: Path
    state: RunState
    scalars: dict[str, Any]
    files: Mapping[FileName, _File]

    @property
    def name(self) -> str:
        return self.path.name


def save_checkpoint(parts: FullState, state: RunState, folder: Path, keep: int) -> Path:
    """Write `step-…` in `folder`, by one rank. Keeps the newest `keep` checkpoints, and that of the best score."""
    name = f"step-{state.step:07d}"
    final = folder / name
    recover_replaced(folder, NAMES)
    for left_behind in folder.glob(".step-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    saved = {file: tensors for part, file in FILES.items() if (tensors := getattr(parts, part))}
    needed = sum(tensor.nbytes for tensors in saved.values() for tensor in tensors.values())
    with new_folder(final, needed, FULL_HINT) as partial:
        for file, tensors in saved.items():
            save_file(tensors, partial / file)
            set_default_mode(partial / file)
        files = {file: _describe(partial / file) for file in saved}
        document = {"state": asdict(state), "scalars": parts.scalars, "files": files}
        (partial / STATE_NAME).write_text(json.dumps(document | {"digest": _digest(document)}, indent=1))
    _point(folder / NEWEST, name)
    if state.best_step is not None and (folder / f"step-{state.best_step:07d}").is_dir():
        _point(folder / BEST, f"step-{state.best_step:07d}")
    best = (folder / BEST).resolve()
    for old in list_checkpoints(folder)[:-keep]:
        if old.resolve() != best:
            _remove(old)
    return final


def delete_later_checkpoints(chosen: Path) -> None:
    """Remove the checkpoints after the one that the run goes on from: they are of another future."""
    for later in list_checkpoints(chosen.parent):
        if later.name > chosen.name:
            _remove(later)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """What `--resume` means: `auto` the newest in the run folder, if any; `none`; or the path of one."""
    if resume == "none":
        return None
    if resume == "auto":
        found = next(reversed(list_checkpoints(folder)), None)
        for other in sorted(folder.glob(NAMES)):
            if found is None or other.name > found.name:
                log.info("%s: has no %s, so it is not whole: passed over", other, STATE_NAME)
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
    for name, described in checkpoint.files.items():
        try:
            seen = _describe(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}", _earlier_hint(path)) from error
        if seen != described:
            raise CheckpointError(
                f"{path / name}: damaged: it has {seen['bytes']:,} bytes with checksum {seen['checksum']}, "
                f"{STATE_NAME} says {described['bytes']:,} with {described['checksum']}",
                _earlier_hint(path),
            )
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its state alone."""
    path = path.resolve()
    try:
        said = parse_json(read_document(path / STATE_NAME))
        document = validate(said, _DOCUMENT)
        if said.pop("digest") != _digest(said):
            raise ValueError("its digest is another")
        return Checkpoint(path, document["state"], {**document["scalars"]}, document["files"])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_NAME}: damaged ({error})", _earlier_hint(path)) from error


def load_state(checkpoint: Checkpoint) -> FullState:
    """The tensors of a checkpoint, mapped into memory."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for part, file in FILES.items():
        try:
            tensors[part] = load_file(checkpoint.path / file) if file in checkpoint.files else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.path / file}: {error}", _earlier_hint(checkpoint.path)) from error
    return FullState(**tensors, scalars=checkpoint.scalars)


def resume_state(checkpoint: Checkpoint, config: Config, index_digest: str, replan: bool) -> RunState:
    """The state to go on with. Raises CheckpointError, and says what differs, where a checkpoint is of another run.

    With `replan` the settings of the plan may differ: what is left of the epoch is then planned by those of `config`.
    """
    state = checkpoint.state
    here = {"config": config.resume_key, "index_digest": index_digest, "planner_version": PLANNER_VERSION}
    saved = {name: getattr(state, name) for name in here}
    with suppress(ValidationError):  # settings that are younger than the checkpoint had their defaults
        saved["config"] = Config.model_validate(state.config).resume_key
    differ = dict(_differences(saved, here))
    if not differ:
        return state
    if not differ.keys() <= REPLANNED or not replan:
        said = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in differ.items())
        said = said.replace("index_digest was", "the index of data.shards was")
        hint = REPLAN_HINT if differ.keys() <= REPLANNED else OTHER_RUN_HINT
        raise CheckpointError(f"{checkpoint.path}: belongs to another run: {said}", hint)
    try:
        before = PlanPrefix(PlanSettings.of(Config.model_validate(state.config)), state.step_in_epoch)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its settings are none: {error.errors()[0]['msg']}", OTHER_RUN_HINT
        ) from error
    if before.steps == 0 or before.settings == PlanSettings.of(config):
        return replace(state, config=config.resume_key)
    return replace(state, config=config.resume_key, step_in_epoch=0, completed=(*state.completed, before))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(NAMES) if (path / STATE_NAME).is_file())


REPLAN_HINT = (
    "undo the change, or add --replan: what this epoch has left is then planned by the new settings, each clip once"
)
OTHER_RUN_HINT = (
    "undo the change, resume another checkpoint with --resume PATH, or start over with --resume none; "
    "another train.run_dir with model.pretrained=RUN/best starts from this run's weights"
)


def _earlier_hint(path: Path) -> str:
    """The hint of an error about a checkpoint: where else the run can go on from."""
    earlier = [other for other in list_checkpoints(path.parent) if other.name < path.name]
    return f"--resume {earlier[-1]} goes on from the one before it" if earlier else "start over with --resume none"


def _differences(
    saved: dict[str, Any], here: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Each value that differs, by its place, such as train.epochs: what it was, and is."""
    for key in sorted(saved.keys() | here.keys()):
        was, now = saved.get(key), here.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{path}{key}.")
        elif was != now:
            yield f"{path.removeprefix('config.')}{key}", (was, now)


def _describe(path: Path) -> dict[str, Any]:
    state, size = xxhash.xxh3_64(), 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            state.update(data)
            size += len(data)
    return {"bytes": size, "checksum": state.hexdigest()}


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


def _point(link: Path, name: str) -> None:
    """Make a link point to a checkpoint, without a moment at which there is none."""
    fresh = link.with_name(f".{link.name}.link")
    with suppress(OSError):  # a convenience, and not every file system has links
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, link)


def _remove(checkpoint: Path) -> None:
    """Out of sight first: one that is half removed must not look whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.gone")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
