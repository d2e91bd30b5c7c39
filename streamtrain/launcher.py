"""Start the ranks of a training or an evaluation, on this machine or on several, with DeepSpeed's launcher."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from sharding.command import WHOLE, Place
from sharding.pool import die_with_parent
from streamtrain.deepspeed_command import ADOPTER

PR_SET_CHILD_SUBREAPER = 36
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, under Windows


@Parameter(name="*")
@dataclass(frozen=True)
class LaunchOptions:
    """Hold where the ranks run."""

    ranks: Annotated[int | None, Field(ge=1), WHOLE] = None
    """Processes on each machine, one per GPU (default: the GPUs that are visible, or 1)."""
    hostfile: Place | None = None
    """Machines to use, a line for each: `host slots=8`. They need the same environment and the same paths, and ssh."""
    master_port: Annotated[int, Field(ge=1, le=65_535), WHOLE] = 29_500
    """Port at which the ranks meet; another one for a second run on the same machine."""


def is_rank() -> bool:
    """Return whether a launcher (deepspeed or torchrun) started this process as one of its ranks."""
    return "RANK" in os.environ


def count_ranks(options: LaunchOptions) -> int:
    """Return the number of ranks of each machine."""
    if options.ranks is not None:
        return options.ranks
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not any(map(os.path.exists, GPU_DEVICES)):
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def launch(ranks: int, options: LaunchOptions, arguments: Sequence[str]) -> int:
    """Run `streamtrain ARGUMENTS` as each rank and return the exit code once all of them have ended.

    SIGTERM and Ctrl-C end the launcher; its ranks notice that, or get Ctrl-C too, save, and end.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(options.master_port)]
    command += ["--hostfile", options.hostfile] if options.hostfile else []
    command += ["--module", "--no_local_rank", "streamtrain", *arguments]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # to wait for ranks whose launcher has ended
    launcher = subprocess.Popen(command, env=os.environ | {ADOPTER: str(os.getpid())}, preexec_fn=die_with_parent)
    stopped_by: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped_by.append(number)
        launcher.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    code = launcher.wait()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return 128 + stopped_by[0] if stopped_by else code
