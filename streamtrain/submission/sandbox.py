"""Run a script as on a machine without network and with only some packages: `sandbox.py PACKAGE,… SCRIPT`.

It is a rehearsal, not a secure sandbox: modules of other packages are not found, and connections are refused. Needs the
standard library alone, so that any interpreter can run it.
"""

import importlib.machinery
import importlib.metadata
import os
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

EDITABLE = "__editable__"  # what setuptools calls the finders of packages that pip has installed with --editable


def needed_by(packages: Iterable[str]) -> set[str]:
    """Return the normalised names of the packages and of all that they require."""
    required: set[str] = set()
    pending = [_normalized(package) for package in packages]
    while pending:
        package = pending.pop()
        if package in required:
            continue
        required.add(package)
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        pending += [_normalized(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines if "extra ==" not in line]
    return required


def hide(modules: set[str], folder: str) -> None:
    """Hide these top-level modules from import, except below the script's own folder."""

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

    others = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith(EDITABLE)]
    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in others]


def rehearse(packages: Sequence[str], script: str) -> None:
    allowed = needed_by(packages)
    modules = importlib.metadata.packages_distributions()
    hidden = {name for name, owners in modules.items() if not allowed & {_normalized(owner) for owner in owners}}
    hide(hidden, os.path.join(os.path.realpath(os.path.dirname(script) or "."), ""))

    def refuse(event: str, _: object) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("there is no network on the challenge's machine")

    sys.addaudithook(refuse)
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


if __name__ == "__main__":
    rehearse(sys.argv[1].split(","), sys.argv[2])
