"""Share what all commands have: one way to parse and to help, checked names, errors in one line."""

import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PosixPath
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token
from pydantic import Field

from sharding.errors import StreamtrainError
from sharding.files.names import expand_home
from sharding.files.writing import STDOUT, file_to_replace, is_stdout
from sharding.pool import available_cores

PNG, JSONL, ZSTANDARD, ZIP = b"\x89PNG", b"{", b"\x28\xb5\x2f\xfd", b"PK"  # how files begin
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PYDANTIC = re.compile(r"\d+ validation error.*\n +(.*) \[type=[^\0]*")  # its message, and what it says of itself
NAMED = 3  # sources, in the first line of a command


class OutFile(PosixPath):
    """Name a file to write."""


def new_app(name: str, summary: str | None, **options: Any) -> App:
    """Return a command line without commands; called without arguments, it prints its help."""
    parameter = Parameter(negative=(), allow_repeating=True, show_default=_show_default)  # the last one counts
    return App(
        name=name, help=summary, version=_version, help_format="markdown", default_parameter=parameter, **options
    )


def run(app: App, arguments: Sequence[str] | None = None) -> int:
    """Run the command that is asked for and return the exit code: 1 for an error, 2 for arguments that do not fit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no IPA
    words = list(map(expand_home, sys.argv[1:] if arguments is None else arguments))
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        chain = [*app.name, *(error.command_chain or ())]
        text = PYDANTIC.sub(r"\1", str(error)).replace("Unused Tokens:", "too many arguments:")
        print(f"error: {text}\nhint: `{' '.join(chain)} --help` tells what it takes", file=sys.stderr)
        return 2
    values = list(_values(bound.arguments.values()))
    shared = any(isinstance(value, Path) and is_stdout(value) for value in values)
    try:
        _check_outputs(values)
        with redirect_stdout(sys.stderr) if shared else nullcontext():
            code = int(command(*bound.args, **bound.kwargs) or 0)
        print(end="", flush=True)  # also if it is closed
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


def announce(opening: str) -> None:
    """Print on standard error what begins, before libraries are imported that take seconds."""
    print(opening, file=sys.stderr, flush=True)


def shortened(values: Sequence[object]) -> str:
    """Return the first of many names, and how many more there are."""
    more = len(values) - NAMED
    return ", ".join(map(str, values[:NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("streamtrain")
    return "not installed"


def _show_default(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or None
    if value is None or value is False or value == "":
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(values: Iterable[Any]) -> Iterator[Any]:
    """Yield every single value of the arguments, those of lists and option groups too."""
    for value in values:
        if is_dataclass(value):
            yield from _values(getattr(value, field.name) for field in fields(value))
        elif isinstance(value, list | tuple):
            yield from _values(value)
        else:
            yield value


def _check_outputs(values: Sequence[Any]) -> None:
    """Raise StreamtrainError if a file to write is also one to read, through whatever links."""
    outputs = [value for value in values if isinstance(value, OutFile)]
    inputs = [value for value in values if isinstance(value, str | Path) and not isinstance(value, OutFile)]
    for out in outputs:
        for read in inputs:
            with suppress(OSError, ValueError):  # one of them does not exist, or is no path at all
                if os.path.isfile(out) and os.path.samefile(out, read):
                    raise StreamtrainError(f"{out}: is read, and would be replaced", "name another file to write")


def _drop_output() -> None:
    """Discard what is still to be printed: the interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# --- types of arguments -----------------------------------------------------------------------------------------


def _check_name(_: Any, value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        if name is not None and not name.strip():
            raise ValueError("a name is expected; is a variable of the shell not set?")


def _to_path(kind: Any, tokens: Sequence[Token]) -> Path:
    _check_name(kind, tokens[0].value)
    return Path(tokens[0].value)


def _check_no_option(text: str) -> None:
    if text.startswith("-") and text != "-":
        raise ValueError(f"a name is expected, and {text} is an option; ./{text} names such a file")


def _check_folder(kind: Any, value: Any) -> None:
    if value is not None:
        _check_no_option(value)
    if value == "-":
        raise ValueError("a folder is written, not a stream; its name is expected")
    _check_name(kind, value)


def out_file(beginning: bytes) -> Parameter:
    """Return the parameter of a file to write: `-` is standard output, and messages then go to standard error.

    It refuses an existing file that begins otherwise than those that the command writes.
    """

    def convert(kind: Any, tokens: Sequence[Token]) -> Path:
        text = tokens[0].value
        _check_name(kind, text)
        _check_no_option(text)
        path = STDOUT if text == "-" else OutFile(text)
        there = file_to_replace(path)
        if there is not None and there.is_file():
            with open(there, "rb") as file:
                if file.read(len(beginning)) not in (b"", beginning):
                    raise ValueError(f"{text} exists, and is no such file: name another one")
        return path

    return Parameter(converter=convert, allow_leading_hyphen=True, metavar="FILE")


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)  # cyclopts itself would take 2.5 for 2
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


def several(metavar: str) -> Parameter:
    """Return the parameter of an option that takes several values, and may be given more than once."""
    return Parameter(consume_multiple=(1, None), metavar=metavar, validator=_check_name)


Place = Annotated[str, Parameter(validator=_check_name, metavar="PLACE")]  # a file or folder, or a URL
Folder = Annotated[Path, Parameter(converter=_to_path, metavar="FOLDER")]  # to read
OutFolder = Annotated[str, Parameter(validator=_check_folder, metavar="FOLDER", allow_leading_hyphen=True)]
WHOLE = Parameter(converter=_whole)
Workers = Annotated[int, Field(ge=1, le=1024), WHOLE]  # processes
CORES = available_cores()
