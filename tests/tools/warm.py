"""A process that has imported what a rank imports, and forks: in a short run, imports take most of the seconds.

`run_warm(["python", "launch/train.py", …], folder, usual, others)`, with variables of all commands and of this one,
does what the command does, but imports nothing again.
Of a `deepspeed` command it forks the ranks, with the arguments and variables that DeepSpeed's launcher gives them, and
ends all with the first that fails. What tests kill or ask to stop, they start by the launcher itself.
"""

import atexit
import ctypes
import faulthandler
import gc
import json
import multiprocessing.process
import os
import pkgutil
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).parents[2]
SECONDS = 240  # for a command
GRACE_SEC = 30  # for ranks that are ended, as the launcher has it
READ_WHEN_USED = ("AWS_", "PYTEST_", "UNLIKE_")  # variables that no import reads
LIBRARIES = ("torch.utils.tensorboard", "matplotlib.figure", "transformers.models.wav2vec2.modeling_wav2vec2",
             "transformers.models.hubert.modeling_hubert", "transformers.models.wavlm.modeling_wavlm")  # fmt: skip
Program = tuple[list[str], dict[str, str]]  # the arguments of Python, and variables

_servers: dict[str, "subprocess.Popen[str]"] = {}  # one, by the variables that it was started with


def run_warm(
    command: Sequence[str], folder: Path, usual: Mapping[str, str], others: Mapping[str, str]
) -> "subprocess.CompletedProcess[str] | None":
    """Return what the command ends with, or None if it is not one of ours, or if imports might read its variables.

    As with a pipe, it has ended when all that it started has. A process that takes longer than 240 s tells where it is,
    and is killed.
    """
    programs = [(words, {**usual, **others, **rank}) for words, rank in _programs_of(command)]
    if not programs or not all(name.startswith(READ_WHEN_USED) for name in others):
        return None
    read = {name: value for name, value in sorted(usual.items()) if not name.startswith(READ_WHEN_USED)}
    server = _server_for(json.dumps(read))
    if server is None:
        return None
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as told:
        streams = [Path(told) / name for name in ("stdout", "stderr")]
        server.stdin.write(json.dumps([programs, str(folder), list(map(str, streams))]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the process that forks has died: look above"
        return subprocess.CompletedProcess(list(command), int(code), *(path.read_text("utf-8") for path in streams))


def _programs_of(command: Sequence[str]) -> list[Program]:
    """Return what each process of the command runs; nothing if it is not for here."""
    match command:
        case "deepspeed", "--num_accelerators", number, "--master_port", port, script, *arguments:
            line = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_SIZE": number,
                    "CROSS_RANK": "0"}  # fmt: skip
            ranks = map(str, range(int(number)))
            return [
                ([script, f"--local_rank={rank}", *arguments], line | {"RANK": rank, "LOCAL_RANK": rank})
                for rank in ranks
            ]
        case python, "-m", "sharding" | "streamtrain", *_ if python == sys.executable:
            return [(list(command[1:]), {})]
        case python, "launch/train.py" | "launch/evaluate.py", *_ if python in ("python", sys.executable):
            return [(list(command[1:]), {})]
    return []


def _server_for(read: str) -> "subprocess.Popen[str] | None":
    if not _servers:
        command, pipe = [sys.executable, "-m", "tests.tools.warm"], subprocess.PIPE
        _servers[read] = subprocess.Popen(command, cwd=ROOT, env=json.loads(read), stdin=pipe, stdout=pipe, text=True)
    return _servers.get(read)


def _serve() -> None:
    for package in ("sharding", "streamtrain"):
        for module in pkgutil.iter_modules([str(ROOT / package)]):
            if module.name != "__main__":
                import_module(f"{package}.{module.name}")
    for name in LIBRARIES:
        import_module(name)
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a command leaves behind becomes a child of this process
    gc.freeze()  # else each child would copy the memory of what it looks through for garbage
    for line in sys.stdin:
        programs, folder, streams = json.loads(line)
        children = []
        for words, variables in programs:
            if not (child := os.fork()):
                _become(words, variables, folder, streams)
            children.append(child)
        print(_end_of(children), flush=True)


def _end_of(ranks: list[int]) -> int:
    """Wait for all, and for what they leave behind, and end all with the first rank that fails; returns its exit code.

    Whoever is still there when time is up is killed, and is the one that failed.
    """
    code, deadline = 0, time.monotonic() + SECONDS + 5
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there is nobody left
            return code
        if ended in ranks and status and not code:
            code, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE_SEC
            _send(signal.SIGTERM)
        if not ended:
            if time.monotonic() > deadline:
                code = -signal.SIGKILL
                _send(signal.SIGKILL)
            time.sleep(0.005)


def _send(what: signal.Signals) -> None:
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def _become(arguments: list[str], variables: dict[str, str], folder: str, streams: list[str]) -> NoReturn:
    """Be `python ARGUMENTS`, to its end."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, *streams)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]
    faulthandler.dump_traceback_later(SECONDS)
    random.seed()
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(folder, arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
