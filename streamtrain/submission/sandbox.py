"""Run a script as a machine would that has no network and only some packages: `offline.py PACKAGE,… SCRIPT`.

A rehearsal, not a prison: modules of other packages are not found, and connections are refused. Needs the standard
library alone, so that any interpreter can be asked.
"""

import importlib.machinery
import importlib.metadata
import os
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType


def needed_by(packages: Iterable[str]) -> set[str]:
    """The packages named, and all that they require, by their normal names."""
    found: set[str] = set()
    waiting = [_normal(package) for package in packages]
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        found.add(package)
        try:
            wanted = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [_normal(re.split(r"[^\w.-]", each, maxsplit=1)[0]) for each in wanted if "extra ==" not in each]
    return found


def hide(modules: set[str], folder: str) -> None:
    """Have these top-level modules not be found, but below the script's own folder."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(
            cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> importlib.machinery.ModuleSpec | None:
            spec = super().find_spec(name, path, target)
            if spec is None or name.partition(".")[0] not in modules:
                return spec
            places = [spec.origin or "", *(spec.submodule_search_locations or ())]
            return spec if any(os.path.realpath(place).startswith(folder) for place in places if place) else None

    sys.meta_path[:] = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]


def rehearse(packages: Sequence[str], script: str) -> None:
    allowed = needed_by(packages)
    modules = importlib.metadata.packages_distributions()
    hidden = {name for name, owners in modules.items() if not allowed & {_normal(owner) for owner in owners}}
    hide(hidden, os.path.join(os.path.realpath(os.path.dirname(script) or "."), ""))

    def refuse(event: str, _: object) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("there is no network where a submission runs")

    sys.addaudithook(refuse)
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


if __name__ == "__main__":
    rehearse(sys.argv[1].split(","), sys.argv[2])
