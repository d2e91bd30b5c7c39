"""Tell a rank whether the `deepspeed` command that started it is still there. Imports no torch, so that it is early."""

import os
from contextlib import suppress
from functools import cache
from itertools import takewhile

import psutil

LAUNCHER = "deepspeed.launcher.launch"
OF_LAUNCHER = "CROSS_SIZE"  # a variable that it alone gives to its ranks
ENDED = -1  # the PID of no process


class DeepSpeedCommand:
    """Watch the `deepspeed` command above this rank's launcher, if there is one; `ended` tells of its end.

    SIGTERM ends that command without any notice to its child, the launcher, which would train on as a child of init or
    of another process that adopts orphans. Of a launcher that ssh, mpirun or a user started, the parent may end.
    """

    def __init__(self) -> None:
        self.launcher_pid = os.getppid()
        self._pid: int | None = None
        with suppress(psutil.Error):
            self._launcher = psutil.Process(self.launcher_pid)
            self._pid = ENDED if _is_orphan() else _find_command(self._launcher)

    @property
    def ended(self) -> bool:
        try:
            return self._pid is not None and self._launcher.ppid() != self._pid
        except psutil.Error:  # the launcher has ended too
            return True


@cache
def deepspeed_command() -> DeepSpeedCommand:
    """Return the command as it is found at the first call: a rank calls this before the imports that take seconds."""
    return DeepSpeedCommand()


def _is_orphan() -> bool:
    """Return whether the launcher that gave this rank its variables has ended: no process above this one is it."""
    return OF_LAUNCHER in os.environ and not any(LAUNCHER in above.cmdline() for above in psutil.Process().parents())


def _find_command(launcher: psutil.Process) -> int | None:
    """Return the PID of the `deepspeed` command that waits for this launcher, or ENDED; None if none is known to."""
    words = launcher.cmdline()
    if LAUNCHER not in words:
        return None
    parent: int = launcher.ppid()
    if _is_started_locally(words):
        return ENDED if _is_adopted(launcher.pid, parent) else parent
    return parent if any("deepspeed" in part for part in psutil.Process(parent).cmdline()) else None


def _is_started_locally(words: list[str]) -> bool:
    """Return whether the command itself started this launcher, as its child: only then does it give a log level."""
    options = takewhile(lambda word: word.startswith("-") or word.isdigit(), words[words.index(LAUNCHER) + 1 :])
    return any(option.startswith("--log_level=") for option in options)


def _is_adopted(pid: int, parent: int) -> bool:
    """Return whether `parent` cannot have started the launcher: that has the command's process group and interpreter.

    In a container, PID 1 may be a shell that waits for the command, in the same process group.
    """
    try:
        return os.getpgid(pid) != os.getpgid(parent) or _program(pid) != _program(parent)
    except ProcessLookupError:  # the command has just ended
        return True
    except OSError:  # /proc shows only one's own processes
        return False


def _program(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/exe")
