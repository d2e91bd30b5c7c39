"""Large shard sets: one table and one plan a machine, made beside the ranks."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import StoreError
from sharding.files.spool import SharedArray, share_array
from streamtrain.data.plan import PlanError, PlanSettings, count_steps, plan_epoch
from streamtrain.data.planner import VARIABLE, Apart, Planner, PlannerError, _share
from streamtrain.distributed import World
from tests.tools.commands import ROOT
from tests.tools.shard_sets import make_index
from tests.tools.training_runs import read_rows, run, training

SETTINGS = PlanSettings(batch_seconds=9, micro_batches_per_step=2, speed_factors=(0.9, 1.0), gain_db=3)
EPOCHS = ("train.epochs=3", "train.max_steps=1000", "eval.every_steps=1000", "train.checkpoint_every=4")
COMPARED = ("step", "epoch", "loss", "lr", "grad_norm", "padding")
SUM = "import pickle, sys; array = pickle.load(sys.stdin.buffer); print(type(array).__name__, array['a'].sum())"


def table() -> np.ndarray:
    values = np.zeros(1_000, [("a", "<u4"), ("b", "<f8")])
    values["a"] = np.arange(1_000)
    return values


def sum_elsewhere(pickled: bytes) -> "subprocess.CompletedProcess[bytes]":
    command, environment = [sys.executable, "-c", SUM], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, input=pickled, env=environment, capture_output=True, timeout=60, check=False)


def test_a_shared_array_is_mapped_by_another_process_and_changed_by_none() -> None:
    shared = share_array(table())
    pickled = pickle.dumps(shared)
    assert len(pickled) < 1_000  # of 12,000 bytes
    assert sum_elsewhere(pickled).stdout == b"SharedArray 499500\n"
    assert isinstance(shared, SharedArray)
    with pytest.raises(ValueError, match="read-only"):
        shared["a"][0] = 1
    assert (pickle.loads(pickle.dumps(shared[10:20])) == table()[10:20]).all()  # of a part, its values
    assert (pickle.loads(pickle.dumps(pickle.loads(pickled))) == table()).all()  # a process passes it on


def test_a_shared_array_that_is_gone_is_told() -> None:
    shared = share_array(table())
    pickled = pickle.dumps(shared)
    del shared
    with pytest.raises(StoreError, match=r"cannot be shared|another file"):
        pickle.loads(pickled)
    assert b"StoreError" in sum_elsewhere(pickled).stderr


@pytest.mark.parametrize("empty", [np.zeros(0, np.int64), np.zeros((0, 3))])
def test_an_array_of_nothing_needs_no_file(empty: np.ndarray) -> None:
    assert pickle.loads(pickle.dumps(share_array(empty))).shape == empty.shape


def test_a_plan_made_apart_is_the_plan_and_its_steps_are_counted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    others = set(multiprocessing.active_children())  # of other tests in this process
    index = make_index([1.5, 2.0, 2.5] * 30 + [4.0, 5.0] * 20)
    planner = Planner(index, SETTINGS, World())
    planner.begin(1)
    for epoch in (0, 1, 2):
        plan, expected = planner.plan(epoch), plan_epoch(index, SETTINGS, epoch)
        assert plan.hash == expected.hash
        assert isinstance(plan.rows, SharedArray)
        assert (plan.lengths == expected.lengths).all()
        assert (plan.true == expected.true).all()
        planner.begin(epoch + 1 if epoch == 0 else 7)  # another one than the next is given up
    assert planner.count([0, 1, 5]) == [count_steps(index, SETTINGS, epoch) for epoch in (0, 1, 5)]
    assert planner.counted.keys() == {0, 1, 5}
    planner.counted[5] = 77  # as an earlier start of the run has counted
    assert planner.count([5]) == [77]
    planner.close()
    assert set(multiprocessing.active_children()) <= others


def test_a_rank_that_cannot_see_the_files_of_another_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two ranks in a container each: what the first one shares has no file here."""
    shared = share_array(table())
    pickled = pickle.dumps(shared)
    del shared

    class Second(World):
        def gather(self, value: object) -> list[object]:
            return [pickled, value]

        def barrier(self) -> None:
            """There is no other rank here."""

    made = _share(table, Second(rank=1, size=2, neighbours=frozenset((0, 1))))
    assert (made == table()).all()


def test_an_error_of_a_plan_made_apart_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    with pytest.raises(PlanError, match=r"lasts 5.00 s, data.batch_seconds is 2"):
        Planner(make_index([5.0]), PlanSettings(2, 1), World()).plan(0)


def test_a_planning_process_that_exits_is_told() -> None:
    with pytest.raises(PlannerError, match="a planning process exited"):
        Apart(os._exit, 9).result()


def test_runs_that_share_their_table_and_plans_take_the_same_steps_and_count_once(work: Path) -> None:
    """Also over the borders of epochs, whose first batches are loaded before."""
    run(training(work, "alone", *EPOCHS))
    run(training(work, "shared", *EPOCHS), **{VARIABLE: "0"})
    alone, shared = (read_rows(work / name) for name in ("alone", "shared"))
    assert [[row[name] for name in COMPARED] for row in shared] == [[row[name] for name in COMPARED] for row in alone]
    counted = json.loads((work / "shared/steps.json").read_text())["steps"]
    assert counted == [[epoch, sum(row["epoch"] == str(epoch) for row in shared)] for epoch in (1, 2)]
    assert not (work / "alone/steps.json").exists()
