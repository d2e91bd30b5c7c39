"""Start the ranks of a training or an evaluation: on this machine itself, on several with the `deepspeed` command."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from sharding.command import WHOLE, Place
from sharding.errors import StreamtrainError, counted
from sharding.pool import die_with_parent

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, under Windows
ANNOUNCED = "STREAMTRAIN_ANNOUNCED"  # variable of ranks whose command is announced
POLL_SEC = 0.1
END_SEC = 30.0  # that ranks get to end, once one of them has failed
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of ranks that were asked to stop


@Parameter(name="*")
@dataclass(frozen=True)
class LaunchOptions:
    """Hold where the ranks run."""

    ranks: Annotated[int | None, Field(ge=1), WHOLE] = None
    """Processes on each machine, one per GPU (default: the GPUs that are visible, or 1; with --hostfile, its slots)."""
    hostfile: Place | None = None
    """Machines to use, a line for each: `host slots=8`. They need the same environment and paths, pdsh and ssh."""
    master_port: Annotated[int, Field(ge=1, le=65_535), WHOLE] = 29_500
    """With --hostfile: the port at which the ranks meet; on one machine, a free port is taken."""


def is_rank() -> bool:
    """Return whether a launcher (streamtrain, deepspeed or torchrun) started this process as one of its ranks."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def count_ranks(options: LaunchOptions) -> int | None:
    """Return the number of ranks on this machine, None if a hostfile tells. Raises StreamtrainError if it cannot be."""
    if options.hostfile is not None:
        if not Path(options.hostfile).is_file():
            raise StreamtrainError(f"--hostfile {options.hostfile}: there is no such file")
        return None
    gpus = 0
    if os.environ.get("DS_ACCELERATOR") != "cpu" and any(map(os.path.exists, GPU_DEVICES)):
        import torch

        gpus = torch.cuda.device_count()
    if gpus and options.ranks is not None and options.ranks > gpus:
        message = f"--ranks {options.ranks}: there {'is' if gpus == 1 else 'are'} {counted(gpus, 'GPU')}"
        raise StreamtrainError(message, "take fewer ranks, or compute on the CPU with DS_ACCELERATOR=cpu")
    return options.ranks or max(gpus, 1)


def launch(command: str, options: Any, where: LaunchOptions, ranks: int | None) -> int:
    """Run `streamtrain COMMAND` with its options as each rank and return the exit code once all ranks have ended."""
    environment = os.environ | {"PYTHONSAFEPATH": "1", ANNOUNCED: "1"}  # whatever packages the working folder has
    if (root := Path(__file__).parents[1]).name not in ("site-packages", "dist-packages"):  # not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    words = [command, *_to_words(options)]
    if ranks is not None:
        port = _free_port()
        return _wait([_start(rank, ranks, port, words, environment) for rank in range(ranks)])
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(where.hostfile)]
    deepspeed += ["--num_accelerators", str(where.ranks)] if where.ranks else []
    deepspeed += ["--master_port", str(where.master_port), "--module", "--no_local_rank", "streamtrain"]
    return os.execve(sys.executable, [*deepspeed, *words], environment)


def _to_words(options: Any) -> list[str]:
    """Return the arguments that give a dataclass of options its values."""
    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else value if isinstance(value, list) else [str(value)]
    return words


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    rank: int, ranks: int, port: int, words: Sequence[str], environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """Start a rank with the variables that DeepSpeed's launcher and torchrun set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "CROSS_RANK": 0}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = environment | {name: str(value) for name, value in (numbers | place).items()}
    command = [sys.executable, "-m", "streamtrain", *words]
    return subprocess.Popen(command, env=variables, preexec_fn=die_with_parent)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait for all ranks and return the code of the first that fails, after which the others are ended.

    SIGTERM is passed on to the ranks, which save and end; a terminal sends Ctrl-C to all of them by itself.
    """
    signal.signal(signal.SIGTERM, lambda *_: _end(ranks))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background job
        signal.signal(signal.SIGINT, lambda *_: None)
    code, deadline = 0, math.inf
    while any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_SEC)
        if code == 0 and (code := _first_failure(ranks)):
            _end(ranks)
            deadline = math.inf if code in STOPPED else time.monotonic() + END_SEC  # those who stop may still save
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
    return code or _first_failure(ranks)


def _first_failure(ranks: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Return the exit code of the first rank that has failed, as a shell has it; 0 if none has."""
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


def _end(ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
    for rank in ranks:
        rank.terminate()
