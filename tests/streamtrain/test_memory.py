"""What the memory does not hold is named before the first step, with what it would hold."""

import numpy as np
import psutil
import pytest
import torch

from sharding.audio.codec import SAMPLE_RATE
from streamtrain.data.collate import Batch
from streamtrain.data.loader import SECOND_BYTES, LoaderMemory
from streamtrain.data.plan import EpochPlan
from streamtrain.distributed import World
from streamtrain.training.memory import GIB, Memory, ProbeError, Shape, largest_shapes, probe, render

MANY = Shape("the longest micro-batch (number 1 of step 1)", 37, 2 * SAMPLE_RATE, 5)


def test_an_allocation_that_fails_names_the_batch() -> None:
    """A real one, of more than any machine has, once there are eight clips."""

    def run(batch: Batch) -> None:
        torch.empty(2**50 if len(batch.inputs) >= 8 else len(batch.inputs) * 4_000_000).fill_(1)

    with pytest.raises(ProbeError, match=r"the longest micro-batch .number 1 of step 1.: 8 clips of up to 2\.0 s"):
        probe(run, [MANY], World())


def test_every_shape_is_run_by_doubling_up_to_its_size() -> None:
    seen = []
    memory = probe(lambda batch: seen.append(tuple(batch.inputs.shape)), [MANY], World())
    assert [clips for clips, _ in seen] == [1, 1, 2, 4, 8, 16, 32, 37]
    assert {samples for _, samples in seen} == {2 * SAMPLE_RATE}
    assert "for the longest micro-batch (number 1 of step 1): 37 clips of up to 2.0 s" in render(memory, [MANY])


def test_batches_loaded_ahead_are_counted_and_refused_where_the_memory_does_not_hold_them() -> None:
    free = psutil.virtual_memory().available
    many = LoaderMemory(free / MANY.seconds / SECOND_BYTES, beside=2**20)
    with pytest.raises(
        ProbeError, match=r"loaded ahead take up to [\d.]+ GiB, [\d.]+ GiB of this.*\nhint: lower data.w"
    ):
        probe(lambda _: None, [MANY], World(), many)
    loader = LoaderMemory(batches=64)
    alone, beside = (probe(lambda _: None, [MANY], World(), one) for one in (LoaderMemory(), loader))
    assert beside.at(MANY.seconds) - alone.at(MANY.seconds) == pytest.approx(loader.at(MANY.seconds), rel=0.1)
    assert beside.largest < alone.largest
    assert f"loaded ahead take up to {loader.at(MANY.seconds) / GIB:.2f} GiB of the host's" in render(
        beside, [MANY], loader
    )


def test_what_fits_lies_on_the_line_through_what_was_seen() -> None:
    memory = Memory(limit=1000, base=100.0, per_second=2.0)
    assert memory.at(50) == 200
    assert memory.at(memory.largest) == pytest.approx(0.92 * 1000)


def test_the_largest_forwards_are_those_of_the_plan_and_no_larger_than_a_step() -> None:
    lengths = np.array([3, 1, 1, 1, 1, 2]) * SAMPLE_RATE
    plan = EpochPlan(np.arange(6), np.array([0, 1, 5, 6, 6]), 2, np.array([9, 9]), lengths)
    longest, densest = largest_shapes(plan, 7, None)
    assert (longest.clips, longest.seconds, densest.clips, densest.seconds) == (1, 3.0, 4, 4.0)
    assert "number 1 of step 1" in longest.name
    assert "number 2 of step 1" in densest.name
    assert [shape.clips for shape in largest_shapes(plan, 7, 1000.0)] == [5, 5]  # a whole step merged
