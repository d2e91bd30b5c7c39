"""What both command lines share: commands of one parser, numbers within bounds, errors told in one line."""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence

from sharding.errors import StreamtrainError

Run = Callable[[argparse.Namespace], int]  # a command; returns its exit code


class Commands:
    """A parser of `python -m NAME COMMAND …`."""

    def __init__(self, prog: str, description: str | None) -> None:
        self._parser = argparse.ArgumentParser(prog=prog, description=description)
        self._commands = self._parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, run: Run, summary: str) -> argparse.ArgumentParser:
        added = self._commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    def run(self, arguments: Sequence[str] | None) -> int:
        """Run what is asked for; returns the exit code."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no IPA
        options = self._parser.parse_args(arguments)
        try:
            code = int(options.run(options))
            sys.stdout.flush()
            return code
        except StreamtrainError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # whoever read this, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:  # a full disk, a folder that must not be written
            print(f"{error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


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
