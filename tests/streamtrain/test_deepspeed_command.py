"""Whether the `deepspeed` command above a rank has ended, in trees of real processes."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from streamtrain.deepspeed_command import LAUNCHER, _is_started_locally
from tests.tools.commands import ROOT

LAUNCH = "import subprocess, sys\nsubprocess.Popen([sys.executable, *sys.argv[2:]]).wait()\n"  # without its one option
RANK = """
import sys, time
from pathlib import Path
from streamtrain.deepspeed_command import deepspeed_command

def wait_for(name):
    while not Path(name).exists():
        time.sleep(0.01)

Path("started").touch()
if sys.argv[1] == "late":
    wait_for("killed")
first = deepspeed_command().ended
Path("noted").touch()
wait_for("killed")
Path(f"{first} {deepspeed_command().ended}").touch()
"""
COMMAND = "import subprocess\nsubprocess.Popen({launch}).wait()\n"  # as the main of the `deepspeed` command does
ADOPT = """
import ctypes, os
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
os.execlp("bash", "bash", "wait.sh")
"""


@pytest.mark.parametrize(
    ("above", "killed", "option", "moment", "told"),
    [
        ("command.py", "command.py", "--log_level=info", "soon", "False True"),
        ("command.py", "command.py", "--log_level=info", "late", "True True"),
        ("adopt.py", "command.py", "--log_level=info", "soon", "False True"),
        ("adopt.py", "command.py", "--log_level=info", "late", "True True"),
        ("shell.sh", "shell.sh", "--node_rank=0", "soon", "False False"),
        ("shell.sh", "shell.sh", "--node_rank=0", "late", "False False"),
    ],
)
def test_the_end_of_the_command_is_noticed_and_that_of_a_shell_is_none(
    above: str, killed: str, option: str, moment: str, told: str, tmp_path: Path
) -> None:
    """Killed after the rank has looked for the command (`soon`), or before (`late`)."""
    launch = [sys.executable, "-u", "-m", LAUNCHER, option, "rank.py", moment]
    package = tmp_path / "stub" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for module in (package.parent / "__init__.py", package / "__init__.py"):
        module.touch()
    (package / "launch.py").write_text(LAUNCH)
    files = {
        "rank.py": RANK,
        "command.py": COMMAND.format(launch=launch),
        "adopt.py": ADOPT,
        "wait.sh": f"{sys.executable} command.py &\nwait\nsleep 60\n",  # in a container, this may be PID 1
        "shell.sh": f"{' '.join(launch)}\n:\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    process = subprocess.Popen(
        ["bash" if above.endswith(".sh") else sys.executable, above], cwd=tmp_path, start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}"},
    )  # fmt: skip
    try:
        wait_for(tmp_path / ("noted" if moment == "soon" else "started"))
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        (victim,) = (each for each in tree if each.cmdline()[-1] == killed)
        victim.kill()
        psutil.wait_procs([victim], timeout=0.5)  # an orphan's parent changes as it ends
        (tmp_path / "killed").touch()
        wait_for(tmp_path / told)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_launcher_that_pdsh_starts_is_not_taken_for_a_child_of_the_command() -> None:
    options = {"launcher_args": "", "venv_script": None, "ssh_port": None, "save_pid": True, "module": False}
    options |= {"no_python": False, "no_local_rank": False, "enable_each_rank_log": "None", "master_port": 29500}
    script = {"user_script": "train.py", "user_args": ["--log_level=info"], "master_addr": "node-1"}
    command, _, _ = PDSHRunner(Namespace(**options, **script), "e30=").get_cmd({}, {"node-1": [0], "node-2": [0]})
    assert not _is_started_locally(command)
    assert _is_started_locally([sys.executable, "-m", LAUNCHER, "--save_pid", "7", "--log_level=info", "train.py"])
