"""What both command lines share: commands of one parser, numbers within bounds, errors told in one line."""

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path, PosixPath

from sharding.errors import StreamtrainError
from sharding.files.names import expand_home
from sharding.files.writing import STDOUT, file_to_replace, is_stdout

PNG, JSONL, ZSTANDARD, ZIP = b"\x89PNG", b"{", b"\x28\xb5\x2f\xfd", b"PK"  # how files begin
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NAMED = 3  # sources, in the first line of a command
Run = Callable[[argparse.Namespace], int]  # a command; returns its exit code


class Commands:
    """A parser of `python -m NAME COMMAND …`."""

    def __init__(self, prog: str, description: str | None) -> None:
        self._parser = argparse.ArgumentParser(prog=prog, description=description)
        self._commands = self._parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, run: Run, summary: str, opening: str) -> argparse.ArgumentParser:
        """Add a command; `opening` is told as it starts, with the values of the options that it names in braces."""
        added = self._commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run, opening=opening)
        return added

    def run(self, arguments: Sequence[str] | None) -> int:
        """Run what is asked for; returns the exit code."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no IPA
        options = self._parser.parse_args(list(map(expand_home, sys.argv[1:] if arguments is None else arguments)))
        shared = any(isinstance(value, Path) and is_stdout(value) for value in vars(options).values())
        announce(options.opening, options)
        try:
            _check_outputs(options)
            with redirect_stdout(sys.stderr) if shared else nullcontext():
                code = int(options.run(options))
            print(end="", flush=True)  # also where it is closed
            return code
        except StreamtrainError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # whoever read this, such as head, has enough
            _drop_output()
            return 1
        except OSError as error:  # a file that cannot be read, or what is printed
            if error.filename is None and error.errno in FULL:
                _drop_output()
                error = OSError(error.errno, error.strerror, "standard output")
            print(f"{error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
            return 1


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise StreamtrainError if a file that it is to write is one that it is to read, through whatever links."""
    values = [one for value in vars(options).values() for one in (value if isinstance(value, list) else [value])]
    outputs = [value for value in values if isinstance(value, OutFile)]
    inputs = [value for value in values if isinstance(value, str | Path) and not isinstance(value, OutFile)]
    for out in outputs:
        for read in inputs:
            with suppress(OSError, ValueError):  # one of them is not there, or no path at all
                if os.path.isfile(out) and os.path.samefile(out, read):
                    raise StreamtrainError(f"{out}: is read, and would be replaced", "name another file to write")


def announce(opening: str, options: argparse.Namespace) -> None:
    """Tell on the standard error what is begun, before libraries are imported that take seconds."""
    named = {name: _shortened(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    print(opening.format_map(named), file=sys.stderr, flush=True)


def _shortened(values: Sequence[object]) -> str:
    more = len(values) - NAMED
    return ", ".join(map(str, values[:NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _drop_output() -> None:
    """Have nothing of what was printed left to write: the interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class OutFile(PosixPath):
    """The name of a file to write."""


def out_file(beginning: bytes) -> Callable[[str], Path]:
    """Return a parser of names of files to write: `-` is the standard output, and then messages go elsewhere.

    It refuses a file that is there and begins otherwise than those that the command writes.
    """

    def parse(text: str) -> Path:
        path = STDOUT if text == "-" else OutFile(place(text))
        there = file_to_replace(path)
        if there is not None and there.is_file():
            with open(there, "rb") as file:
                if file.read(len(beginning)) not in (b"", beginning):
                    raise argparse.ArgumentTypeError(f"{text} is there already, and is no such file: name another one")
        return path

    return parse


def out_folder(text: str) -> str:
    """Parse the name of a folder to write."""
    if text == "-":
        raise argparse.ArgumentTypeError(f"{text!r}: a folder is written, not a stream; its name is expected")
    return place(text)


def place(text: str) -> str:
    """Parse the name of a file or folder, or a URL; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: a name is expected; is a variable of the shell not set?")
    return text


def folder(text: str) -> Path:
    """Parse the name of a folder to read."""
    return Path(place(text))


def number(low: float, high: float = math.inf, kind: type[float] = float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high` that says so when it is given something else."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            wanted = f"from {low:,} to {high:,}" if high < math.inf else f"of {low:,} or more"
            raise argparse.ArgumentTypeError(f"{text!r}: a number {wanted} is expected")
        return value

    return parse
