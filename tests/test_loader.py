"""Batches that another process loads are those of a stream, and it never outlives or outwaits the one that asked."""

import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from sharding.audio import SAMPLE_RATE
from sharding.errors import ShardError
from sharding.format import read_index
from sharding.store import FolderStore
from streamtrain.config import ModelConfig
from streamtrain.loader import LoaderError, LoadingProcesses
from streamtrain.mask import Masking, Spans
from streamtrain.stream import StepBatch, open_stream
from streamtrain.world import World
from tests.stream_sets import VOCAB, plan_of, stream_of, write_set

GEOMETRY = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
MASKING = Masking(3, Spans(0.3, 4), Spans(0.2, 8), features=64, geometry=GEOMETRY)


@pytest.fixture
def meadow(tmp_path: Path) -> Path:
    write_set(tmp_path / "meadow")
    return tmp_path / "meadow"


def processes_of(folder: Path, rank: int = 0, size: int = 1) -> LoadingProcesses:
    index = read_index(FolderStore(folder))
    return LoadingProcesses(partial(open_stream, index, str(folder), None, 1.0, VOCAB, True, World(rank, size), 2))


def child_of(loading: LoadingProcesses) -> psutil.Process:
    return psutil.Process(loading._processes[-1].pid)


def assert_alike(ours: list[StepBatch], theirs: list[StepBatch]) -> None:
    assert [(item.step, item.numbers, item.last) for item in ours] == [
        (item.step, item.numbers, item.last) for item in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.batch.keys, mine.batch.failed) == (other.batch.keys, other.batch.failed)
        for name in ("inputs", "input_lengths", "targets", "target_lengths", "weights", "time_mask", "feature_mask"):
            assert torch.equal(getattr(mine.batch, name), getattr(other.batch, name)), name


@pytest.mark.parametrize("merged", [None, 8.0])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 4)])
def test_its_epochs_are_those_of_a_stream(rank: int, size: int, merged: float | None, meadow: Path) -> None:
    loading, stream = processes_of(meadow, rank, size), stream_of(meadow, rank, size)
    for epoch, first_step in ((0, 0), (1, 2)):
        hide = partial(MASKING.hide, epoch)
        plan = plan_of(meadow, epoch)
        theirs = list(stream.epoch(plan, first_step, merged, hide))
        assert_alike(list(loading.epoch(plan, first_step, merged, hide)), theirs)
        assert loading.take_counts().clips == stream.take_counts().clips == sum(len(item.batch.keys) for item in theirs)


def test_an_epoch_left_in_the_middle_ends_its_process_and_the_next_one_is_whole(meadow: Path) -> None:
    loading, plan = processes_of(meadow), plan_of(meadow)
    items = loading.epoch(plan)
    next(items)
    child = child_of(loading)
    items.close()  # type: ignore[attr-defined]
    child.wait(10)
    assert not loading._processes
    assert len(list(loading.epoch(plan))) == plan.steps * 8


def test_what_goes_wrong_there_is_raised_here(tmp_path: Path) -> None:
    write_set(tmp_path, 20)
    plan = plan_of(tmp_path)
    for shard in tmp_path.rglob("*.tar"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(ShardError, match="checksum of the sample"):
        list(processes_of(tmp_path).epoch(plan))


def test_a_process_that_is_killed_is_told_and_sigterm_is_not_its_to_answer(meadow: Path) -> None:
    loading, plan = processes_of(meadow), plan_of(meadow)
    items = loading.epoch(plan)
    next(items)
    child = child_of(loading)
    os.kill(child.pid, signal.SIGTERM)
    next(items)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="is gone"):
        list(items)


def test_masks_are_a_clips_own_and_never_hide_its_end(meadow: Path) -> None:
    """Whoever computes a clip and beside whichever: the network's frames and features, no others."""
    assert ModelConfig(scratch={}).mask_time_length == 10
    plan = plan_of(meadow)
    alone, merged = (
        {
            key: (item.batch.time_mask[row], item.batch.feature_mask[row])
            for item in stream_of(meadow).epoch(plan, 0, seconds, partial(MASKING.hide, 5))
            if item.batch.time_mask is not None and item.batch.feature_mask is not None
            for row, key in enumerate(item.batch.keys)
        }
        for seconds in (None, 30.0)
    )
    assert alone.keys() == merged.keys()
    for key, (frames, features) in alone.items():
        wide = merged[key][0]
        assert torch.equal(wide[: len(frames)], frames[: len(wide)])
        assert not wide[len(frames) :].any()
        assert torch.equal(features, merged[key][1])
        assert len(wide) <= 30 * SAMPLE_RATE / 320
    assert any(frames.any() for frames, _ in alone.values())
