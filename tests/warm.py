"""A process that has imported what a rank imports, and forks: in a short run, imports take most of the seconds.

`run_warm(["python", "launch/train.py", …], folder, variables)` does what the command does, but imports nothing again.
Of a `deepspeed` command it forks the ranks, with the arguments and variables that DeepSpeed's launcher gives them, and
ends all with the first that fails. What tests kill or ask to stop, they start by the launcher itself.
"""

import atexit
import faulthandler
import gc
import json
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
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
SECONDS = 240  # for a command
GRACE_SEC = 30  # for ranks that are ended, as the launcher has it
READ_WHEN_USED = ("AWS_", "PYTEST_", "UNLIKE_")  # variables that no import reads
LIBRARIES = ("torch.utils.tensorboard", "matplotlib.figure", "transformers.models.wav2vec2.modeling_wav2vec2",
             "transformers.models.hubert.modeling_hubert", "transformers.models.wavlm.modeling_wavlm")  # fmt: skip
Program = tuple[list[str], dict[str, str]]  # the arguments of Python, and variables

_servers: dict[str, "subprocess.Popen[str]"] = {}  # one, by the variables that it was started with


def run_warm(
    command: Sequence[str], folder: Path, variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str] | None":
    """Return what the command ends with, or None if it is not one of ours, or if imports might read its variables.

    A process that has not ended after 240 s tells where it is, and ends with 1.
    """
    programs = [(words, dict(variables) | rank) for words, rank in _programs_of(command)]
    read = {name: value for name, value in sorted(variables.items()) if not name.startswith(READ_WHEN_USED)}
    server = _server_for(json.dumps(read)) if programs else None
    if server is None:
        return None
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as told:
        streams = [Path(told) / name for name in ("stdout", "stderr")]
        server.stdin.write(json.dumps([programs, str(folder), list(map(str, streams))]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(command), code, *(path.read_text("utf-8") for path in streams))


def _programs_of(command: Sequence[str]) -> list[Program]:
    """Return what each process of the command runs; nothing if it is not for here."""
    match command:
        case "deepspeed", "--num_accelerators", number, "--master_port", port, script, *arguments:
            line = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_SIZE": number,
                    "CROSS_RANK": "0", "CROSS_SIZE": "1"}  # fmt: skip
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
        command, pipe = [sys.executable, "-m", "tests.warm"], subprocess.PIPE
        _servers[read] = subprocess.Popen(command, cwd=ROOT, env=json.loads(read), stdin=pipe, stdout=pipe, text=True)
    return _servers.get(read)


def _serve() -> None:
    for package in ("sharding", "streamtrain"):
        for module in pkgutil.iter_modules([str(ROOT / package)]):
            if module.name != "__main__":
                import_module(f"{package}.{module.name}")
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # else each child would copy the memory of what it looks through for garbage
    for line in sys.stdin:
        programs, folder, streams = json.loads(line)
        children = []
        for words, variables in programs:
            if not (child := os.fork()):
                _become(words, variables, folder, streams)
            children.append(child)
        print(_end_of(children), flush=True)


def _end_of(children: list[int]) -> int:
    """Wait for all, and end all others with the first that fails; returns its exit code, or 0."""
    alive, code, deadline = set(children), 0, float("inf")
    while alive:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if not ended:
            if time.monotonic() > deadline:
                _send(signal.SIGKILL, alive)
            time.sleep(0.005)
            continue
        alive -= {ended}
        if status and not code:
            code, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE_SEC
            _send(signal.SIGTERM, alive)
    return code


def _send(what: signal.Signals, processes: set[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, what)


def _become(arguments: list[str], variables: dict[str, str], folder: str, streams: list[str]) -> NoReturn:
    """Be `python ARGUMENTS`, to its end."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, *streams)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
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
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
