"""Run the real commands."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.training_runs import run

ROOT = Path(__file__).parents[2]


Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_module(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `python -m MODULE ARGUMENTS`. Whatever happens, a user never sees a traceback."""
    done = run([sys.executable, "-m", module, *arguments], expect=None, folder=Path.cwd())
    assert "Traceback" not in done.stderr, done.stderr
    return done


def own_mounts() -> list[str]:
    """The beginning of a command that may mount what nobody else sees; skips the test where that is not permitted."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts of one's own are not permitted here")
    return namespace
