"""Record what a run runs on: machines, processors, GPUs, versions of the libraries. A run may start more than once."""

import json
import os
import platform
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import TypeAdapter

from sharding.files.document import STRICT, Count, DocumentError, Size, parse, read_document
from sharding.files.writing import write_inside
from streamtrain.distributed import World
from streamtrain.model.ctc import CTCModel

ENVIRONMENT = "environment.json"
LIBRARIES = ("streamtrain", "torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Start:
    """Describe one start of a run."""

    __pydantic_config__ = STRICT

    time: str  # ISO 8601, UTC
    step: Count  # after which it went on
    ranks: Count
    machines: dict[str, Count]  # their processors, and how many machines have these
    gpus: dict[str, Count]
    versions: dict[str, str]
    parameters: Size = 0  # of the model; 0: not known
    trained: Size = 0  # of these, those that get gradients
    vocabulary: str = ""  # of the model, and where it is from


_STARTS = TypeAdapter(list[Start])


def describe_start(world: World, step: int, model: CTCModel) -> Start:
    """Return what this start of a run trains and runs on; all ranks must call it together."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    machine = f"{_processor()}, {os.cpu_count()} cores" if world.local_rank == 0 else None
    gathered = world.gather((machine, gpu))
    machines, gpus = (dict(Counter(names[i] for names in gathered if names[i])) for i in (0, 1))
    versions = {"python": platform.python_version()} | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # used from its folder
            versions[name] = version(name)
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    return Start(
        datetime.now(UTC).isoformat(timespec="seconds"),
        step,
        world.size,
        machines,
        gpus,
        versions,
        parameters=sum(size for size, _ in sizes),  # of ZeRO-3's partitions, DeepSpeed notes the whole size
        trained=sum(size for size, trained in sizes if trained),
        vocabulary=model.vocab_origin,
    )


def add_start(run: Path, start: Start) -> None:
    """Write a start behind those before it; at step 0 the run begins anew."""
    starts = [*read_starts(run), start] if start.step else [start]
    write_inside(run / ENVIRONMENT, json.dumps([asdict(one) for one in starts], ensure_ascii=False, indent=1))


def read_starts(run: Path) -> list[Start]:
    """Return the starts of a run, oldest first; none if they were not recorded or cannot be read."""
    try:
        return parse(read_document(run / ENVIRONMENT), _STARTS)
    except (OSError, DocumentError):
        return []


def _processor() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
