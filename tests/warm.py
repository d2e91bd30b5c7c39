"""A process that has imported what a rank imports, and forks: in a short run, imports take most of the seconds.

`run_warm(["launch/train.py", …], folder, variables)` does what `python launch/train.py …` does, but imports nothing
again. Ranks that the launcher starts, and commands that a test kills, are always started cold.
"""

import atexit
import faulthandler
import json
import os
import pkgutil
import random
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
SECONDS = 240
READ_WHEN_USED = ("AWS_", "PYTEST_")  # variables that no import reads
LIBRARIES = ("torch.utils.tensorboard", "matplotlib.figure", "transformers.models.wav2vec2.modeling_wav2vec2",
             "transformers.models.hubert.modeling_hubert", "transformers.models.wavlm.modeling_wavlm")  # fmt: skip

_servers: dict[str, "subprocess.Popen[str]"] = {}  # one, by the variables that it was started with


def run_warm(
    arguments: Sequence[str], folder: Path, variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str] | None":
    """Return what `python ARGUMENTS` ends with, or None if a variable that imports may read is another than usual.

    A command that has not ended after 240 s tells where it is, and ends with 1.
    """
    read = {name: value for name, value in sorted(variables.items()) if not name.startswith(READ_WHEN_USED)}
    server = _server_for(json.dumps(read))
    if server is None:
        return None
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as told:
        streams = [Path(told) / name for name in ("stdout", "stderr")]
        asked = [list(arguments), str(folder), dict(variables), list(map(str, streams))]
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), code, *(path.read_text("utf-8") for path in streams))


def _server_for(read: str) -> "subprocess.Popen[str] | None":
    if not _servers:
        command = [sys.executable, "-m", "tests.warm"]
        pipe = subprocess.PIPE
        _servers[read] = subprocess.Popen(command, cwd=ROOT, env=json.loads(read), stdin=pipe, stdout=pipe, text=True)
    return _servers.get(read)


def _serve() -> None:
    for package in ("sharding", "streamtrain"):
        for module in pkgutil.iter_modules([str(ROOT / package)]):
            if module.name != "__main__":
                import_module(f"{package}.{module.name}")
    for name in LIBRARIES:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(arguments: list[str], folder: str, variables: dict[str, str], streams: list[str]) -> NoReturn:
    """Be `python ARGUMENTS`, to its end."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, *streams)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    random.seed()
    sys.argv = arguments
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(folder, arguments[0]).parent)
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
