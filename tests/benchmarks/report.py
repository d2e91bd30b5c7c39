"""What a bench has found: a table in a terminal, and the same as JSON."""

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile

from tests.benchmarks.timing import read_text

PACKAGES = ("soundfile", "soxr", "numpy", "webdataset", "lhotse", "torch")


@dataclass(frozen=True)
class Quoted:
    """What is said of several runs of one thing."""

    median: float
    minimum: float
    clear: bool = True  # False where the start-up that was taken off outweighs what is left


@dataclass(frozen=True)
class Line:
    """A row of the table. Its ratio is ours ÷ reference or, of `at_least`, reference ÷ ours."""

    what: str
    ours: Quoted
    reference: Quoted | None = None
    goal: float | None = None
    at_least: bool = False
    unit: str = "s"

    @property
    def ratio(self) -> Quoted | None:
        if self.reference is None:
            return None
        above, below = (self.reference, self.ours) if self.at_least else (self.ours, self.reference)
        return Quoted(above.median / below.median, above.minimum / below.minimum)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        if not self.ours.clear or (self.reference and not self.reference.clear):
            return "too short to say"
        value = (self.ratio or self.ours).median
        return "ok" if (value >= self.goal if self.at_least else value <= self.goal) else "MISSED"


def say(facts: dict[str, str], lines: Sequence[Line], notes: Sequence[str], out: Path, **more: object) -> None:
    """Print the table with its notes, and write all of it to a file."""
    print("  ".join(f"{name} {value}" for name, value in facts.items()), table(lines), sep="\n\n", end="\n\n")
    print("\n".join(notes))
    rows = [asdict(line) | {"ratio": line.ratio and asdict(line.ratio), "verdict": line.verdict} for line in lines]
    result = {"machine": facts, "lines": rows, "notes": notes} | more
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(f"\nall runs: {os.path.relpath(out)}")


def table(lines: Sequence[Line]) -> str:
    rows = [("median (minimum)", "ours", "reference", "ratio", "goal", "")]
    for line in lines:
        unit, sign = "×" if line.reference else line.unit, "≥" if line.at_least else "≤"
        goal = "" if line.goal is None else f"{sign} {line.goal:g} {unit}"
        said = show(line.ours, line.unit), show(line.reference, line.unit), show(line.ratio, "×")
        rows.append((line.what, *said, goal, line.verdict))
    what, *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = f"{{:<{what}}}" + "".join(f"  {{:>{width}}}" for width in widths) + "  {}"
    return "\n".join(form.format(*row).rstrip() for row in rows)


def show(quoted: Quoted | None, unit: str) -> str:
    if quoted is None:
        return ""
    median, minimum = (f"{value:,.{2 if value < 100 else 0}f}" for value in (quoted.median, quoted.minimum))
    return f"{median} {unit}" if quoted.median == quoted.minimum else f"{median} ({minimum}) {unit}"


def machine() -> dict[str, str]:
    cpus = [line.split(": ")[1] for line in read_text(Path("/proc/cpuinfo")).splitlines() if "model name" in line]
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{cpus[0] if cpus else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "libsndfile": soundfile.__libsndfile_version__,
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts
