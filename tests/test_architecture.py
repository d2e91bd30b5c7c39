"""Who may import whom, read from the sources: everything points down, and nothing in a circle."""

import re
import sys

import pytest

from streamtrain.submission.package import TAKEN_ALONG
from tests.tools.modules import GRAPH, MODULES, PACKAGES, imports_of

HOUSE = """
launch streamtrain.__main__ sharding.__main__
streamtrain.cli
streamtrain.api streamtrain.ranks sharding.cli
streamtrain.submission
streamtrain.training
streamtrain.infer
streamtrain.eval
streamtrain.data
streamtrain.model
streamtrain.config streamtrain.precision streamtrain.run_status streamtrain.atomic
streamtrain.distributed streamtrain.startup streamtrain.launcher streamtrain.doctor streamtrain.deepspeed_command
sharding.build
sharding.report
sharding.shardset sharding.sources
sharding.segment
sharding.labels sharding.audio sharding.command
sharding.files
sharding.pool sharding.interrupt sharding.errors
""".strip().splitlines()  # floors, from the top down: a room knows its own files and the floors below
FLOORS = {room: number for number, floor in enumerate(HOUSE) for room in floor.split()}
SHARED = {"shardset", "segment", "sources", "labels", "audio", "files", "command", "pool", "interrupt", "errors"}

ENTRIES = {"streamtrain.api", "streamtrain.cli"}  # which offer all of sharding

WRITES = re.compile(
    r"""\.write_(text|bytes)\(|os\.replace\(|\bopen\([^)]*"[a-z]*[wax+]b?\"|savefig\((?!picture|buffer)"""
)
WRITE_OTHERWISE = {  # than through sharding.files.writing
    "sharding.files.writing": "it is that",
    "sharding.build.lock": "a lock file, held while it is open",
    "sharding.files.exclusive": "likewise",
    "sharding.sources.parquet": "row groups, unpacked into a temporary folder",
    "sharding.sources.synthetic": "clips by the thousand, which count once their manifest is there",
    "streamtrain.atomic": "whole folders",
    "streamtrain.training.checkpoint": "into a folder of that, and links",
    "streamtrain.infer.export": "likewise",
    "streamtrain.model.tokenizer": "likewise",
    "streamtrain.data.cache": "shards, range by range",
    "streamtrain.training.mirror": "a run folder, by renaming what was fetched whole",
    "streamtrain.infer.transcribe": "rows, which a kill does not undo",
    "streamtrain.training.run": "a lock file",
    "streamtrain.training.memory": "to the kernel",
    "streamtrain.submission.package": "into a temporary folder",
    "streamtrain.submission.main": "where there is nothing of this",
}


def room_of(name: str) -> str:
    return name if name in FLOORS else name.rpartition(".")[0]


def test_no_import_goes_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("sharding")])
def test_sharding_knows_nothing_of_training(name: str) -> None:
    assert not any(other.split(".")[0] in ("streamtrain", "launch") for other in imports_of(MODULES[name]))


def test_sharding_starts_without_torch() -> None:
    """Which takes longer to import than a small build takes."""
    started, waiting = set[str](), ["sharding.cli"]
    while waiting:
        name = waiting.pop()
        started.add(name)
        brought = imports_of(MODULES[name], True)
        assert not any(other.split(".")[0] in ("torch", "silero_vad") for other in brought), name
        waiting += sorted(brought & MODULES.keys() - started)
    assert "sharding.segment.acoustic_model" in started
    assert "sharding.segment.ctc_align" not in started


@pytest.mark.parametrize("name", [name for name in MODULES if name not in PACKAGES])
def test_a_room_knows_only_the_floors_below(name: str) -> None:
    for other in GRAPH[name] - set(PACKAGES):
        room, below = room_of(name), room_of(other)
        beside = {room, below} <= MODULES.keys() and FLOORS[room] == FLOORS[below]  # two files that are no rooms
        assert room == below or beside or FLOORS[room] < FLOORS[below], f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("streamtrain.") and name not in ENTRIES])
def test_streamtrain_stands_on_the_lower_rooms_of_sharding(name: str) -> None:
    below = {other.split(".")[1] for other in GRAPH[name] if other.startswith("sharding.")}
    assert below <= SHARED


def test_planning_and_scoring_start_without_torch() -> None:
    for name in (
        "streamtrain.data.plan",
        "streamtrain.model.batches",
        "streamtrain.eval.metrics",
        "streamtrain.eval.score",
        "streamtrain.cli",
    ):
        assert not any(other.split(".")[0] == "torch" for other in imports_of(MODULES[name], True)), name


def test_the_network_needs_torch_alone() -> None:
    """A submission takes it and its decoding along to a machine where nothing else of this is installed."""
    packages = {name.split(".")[0] for name in imports_of(MODULES["streamtrain.model.ctc"], True)}
    assert packages - sys.stdlib_module_names == {"torch"}
    for name in ("batches", "decode", "inference", "vocab"):
        packages = {name.split(".")[0] for name in imports_of(MODULES[f"streamtrain.model.{name}"], True)}
        assert packages - sys.stdlib_module_names <= {"torch", "numpy", "sharding", "streamtrain"}, name


def test_files_are_written_in_one_way() -> None:
    found = {name for name, path in MODULES.items() if WRITES.search(path.read_text(encoding="utf-8"))}
    assert found == WRITE_OTHERWISE.keys(), "sharding.files.writing has write, written, replacing and append"


def test_what_a_submission_takes_along_needs_nothing_else_of_this() -> None:
    files = [f"{folder}/{name}" for folder, names in TAKEN_ALONG.items() for name in names]
    taken = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    for name in [*sorted(taken & MODULES.keys()), "streamtrain.submission.main"]:
        brought = imports_of(MODULES[name], True) & MODULES.keys() - {"sharding", "streamtrain"}
        assert brought <= taken, name
