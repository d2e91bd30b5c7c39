"""Batches that another process loads are those of a stream, and it never outlives or outwaits the one that asked."""

import errno
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sharding.audio.codec import SAMPLE_RATE, encode
from sharding.errors import ShardError
from sharding.shardset.index import read_index
from sharding.shardset.store import FolderStore
from streamtrain.config import DataConfig
from streamtrain.data.collate import Batch
from streamtrain.data.dataset import StepBatch, open_stream
from streamtrain.data.loader import LoaderError, LoaderProcesses, _read_into, loader_memory
from streamtrain.data.patience import Deadline, StallError
from streamtrain.data.plan import PlanSettings, plan_epoch
from streamtrain.distributed import LostStepError, World
from streamtrain.training.noise import augment_batch
from streamtrain.training.spec_augment import Spans, SpecAugment
from tests.tools.stream_sets import VOCAB, plan_of, stream_of, write_set

GEOMETRY = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
MASKING = SpecAugment(3, Spans(0.3, 4), Spans(0.2, 8), features=64, geometry=GEOMETRY)


@pytest.fixture
def meadow(tmp_path: Path) -> Path:
    write_set(tmp_path / "meadow")
    return tmp_path / "meadow"


def processes_of(folder: Path, rank: int = 0, size: int = 1, workers: int = 2) -> LoaderProcesses:
    index, world = read_index(FolderStore(folder)), World(rank, size)
    settings = DataConfig(shards=str(folder), workers=workers)
    return LoaderProcesses(partial(open_stream, index, settings, VOCAB, True, world))


def child_of(loading: LoaderProcesses) -> psutil.Process:
    return psutil.Process(loading._processes[-1].pid)


def assert_alike(ours: list[StepBatch], theirs: list[StepBatch]) -> None:
    assert [(item.step, item.micro_batch_ids, item.last) for item in ours] == [
        (item.step, item.micro_batch_ids, item.last) for item in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for named in ("keys", "failed", "too_dense"):
            assert getattr(mine.batch, named) == getattr(other.batch, named)
        for name in ("inputs", "input_lengths", "targets", "target_lengths", "weights", "time_mask", "feature_mask"):
            one, another = getattr(mine.batch, name), getattr(other.batch, name)
            assert (one is None and another is None) or torch.equal(one, another), name


def _sum_received(theirs: Connection, answer: Connection) -> None:
    tensor = torch.zeros(1_000_000)
    answer.send("ready")
    _read_into(theirs, tensor)
    answer.send(float(tensor.sum()))


def test_a_batch_arrives_whole_though_the_receiver_is_stopped_in_its_middle() -> None:
    """As a scheduler that suspends jobs does."""
    context = multiprocessing.get_context("spawn")
    (ours, theirs), (answer, question) = context.Pipe(), context.Pipe()
    receiver = context.Process(target=_sum_received, args=(theirs, question), daemon=True)
    receiver.start()
    theirs.close()
    assert answer.recv() == "ready"
    whole = memoryview(torch.ones(1_000_000).numpy()).cast("B")  # type: ignore[arg-type]
    sent = 0
    for part in range(4):
        end = len(whole) * (part + 1) // 4 - (2 if part < 3 else 0)
        while sent < end:
            sent += os.write(ours.fileno(), whole[sent:end])
        psutil.Process(receiver.pid).suspend()
        psutil.Process(receiver.pid).resume()
    assert answer.poll(30)
    assert answer.recv() == 1_000_000
    receiver.join()


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


def test_a_label_too_long_for_its_frames_is_silenced_and_counted_there_too(meadow: Path) -> None:
    loading, stream, plan = processes_of(meadow, workers=1), stream_of(meadow), plan_of(meadow)
    slow = replace(MASKING, geometry=((400, 1600),))
    ours, theirs = (list(one.epoch(plan, finish=partial(augment_batch, slow, None, 0))) for one in (loading, stream))
    assert_alike(ours, theirs)
    silent = sum(len(item.batch.too_dense) for item in ours)
    assert 0 < silent == stream.take_counts().silent == loading.take_counts().silent < 60


def test_an_epoch_left_in_the_middle_ends_its_process_and_the_next_one_is_whole(meadow: Path) -> None:
    loading, plan = processes_of(meadow), plan_of(meadow)
    items = loading.epoch(plan)
    next(items)
    child = child_of(loading)
    items.close()  # type: ignore[attr-defined]
    child.wait(10)
    assert not loading._processes
    assert len(list(loading.epoch(plan))) == plan.steps * 8


def test_what_goes_wrong_there_is_raised_here_after_all_that_was_right(tmp_path: Path) -> None:
    index = write_set(tmp_path, 40)
    plan = plan_of(tmp_path)
    wrong = index.shards[index.samples["shard"][plan.rows[-1]]]
    tar = tmp_path / wrong.name
    tar.write_bytes(bytes(len(tar.read_bytes())))
    stream, loading = (items_until_an_error(of(tmp_path).epoch(plan)) for of in (stream_of, processes_of))
    assert isinstance(stream[1], ShardError)
    assert isinstance(loading[1], ShardError)
    assert str(stream[1]) == str(loading[1])
    assert_alike(loading[0], stream[0])


def items_until_an_error(items: Iterator[StepBatch]) -> tuple[list[StepBatch], Exception | None]:
    seen: list[StepBatch] = []
    try:
        seen.extend(items)
    except Exception as error:
        return seen, error
    return seen, None


def full(batch: Batch) -> Batch:
    raise OSError(errno.ENOSPC, "No space left on device", "/cache/x.lock")


def test_an_error_of_the_system_stays_what_it_is(meadow: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/cache/x\.lock'"):
        list(processes_of(meadow).epoch(plan_of(meadow), finish=full))


def test_nothing_is_left_behind_even_where_temporary_paths_are_long(
    meadow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long for the name of a socket; and sockets in /tmp stay when their process is killed."""
    folder = tmp_path / ("t" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    loading = processes_of(meadow)
    items = loading.epoch(plan_of(meadow))
    next(items)
    pids = [os.getpid(), *(process.pid for process in loading._processes)]
    items.close()  # type: ignore[attr-defined]
    assert not list(folder.iterdir())
    # torch names the memory in which tensors travel after the process that made it; others here have theirs
    assert not [path for pid in pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]


def test_a_process_that_is_killed_between_epochs_is_told(meadow: Path) -> None:
    loading, plan = processes_of(meadow), plan_of(meadow)
    list(loading.epoch(plan))
    child = child_of(loading)
    child.kill()
    child.wait()
    with pytest.raises(LoaderError, match="exited"):
        list(loading.epoch(plan))
    assert len(list(loading.epoch(plan))) == plan.steps * 8


def test_a_process_that_is_killed_is_told_and_sigterm_is_not_its_to_answer(meadow: Path) -> None:
    loading, plan = processes_of(meadow), plan_of(meadow)
    items = loading.epoch(plan)
    next(items)
    child = child_of(loading)
    os.kill(child.pid, signal.SIGTERM)
    next(items)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="exited"):
        list(items)


def stop_in(seconds: float) -> Callable[[], bool]:
    """Whether the rank is asked to stop: from so many seconds after the first look on."""
    since: list[float] = []

    def stopped() -> bool:
        since.append(time.monotonic())
        return since[-1] - since[0] >= seconds

    return stopped


def test_a_process_that_hangs_is_told_in_time_and_the_next_epoch_is_whole(meadow: Path) -> None:
    loading, plan = processes_of(meadow, workers=1), plan_of(meadow)
    step = r"rank 0's batch of step \d+ of this epoch .loading process 1 of 1. has not arrived within"

    def expect(items: Iterator[StepBatch], patience: Deadline, error: type[Exception], words: str) -> None:
        child = child_of(loading)
        child.suspend()
        loading.patience = patience
        with pytest.raises(error, match=words.replace("{pid}", str(child.pid))):
            list(items)
        child.wait(10)
        loading.patience = Deadline()

    next(items := loading.epoch(plan))
    expect(items, Deadline(1), StallError, step + r" 1 s(?s:.*)py-spy dump --pid {pid}")
    next(items := loading.epoch(plan))
    expect(items, Deadline(60, stop_in(1), 1), LostStepError, f"stopped: {step}(?s:.*)same command")
    assert len(list(loading.epoch(plan))) == plan.steps * 8
    more_than_a_pipe_holds = partial(weigh, bytes(8_000_000))
    expect(loading.epoch(plan, finish=more_than_a_pipe_holds), Deadline(1), StallError, step)


def weigh(_: bytes, batch: Batch) -> Batch:
    return batch


@pytest.mark.parametrize(("workers", "in_processes"), [(3, False), (1, True)])
def test_the_memory_that_is_foretold_is_about_what_a_full_look_ahead_takes(
    workers: int, in_processes: bool, tmp_path: Path
) -> None:
    tone = encode(np.sin(np.arange(10 * SAMPLE_RATE) / 9).astype(np.float32) / 2)
    write_set(tmp_path, 400, 40, spoilt=dict.fromkeys(range(400), tone), lengths=[10 * SAMPLE_RATE] * 400)
    # A fresh process: this one has freed memory to give away, which would not be seen as taken
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        foretold, taken = pool.submit(fill_look_ahead, tmp_path, workers, in_processes).result(120)
    assert 0.5 * foretold < taken < 1.2 * foretold


def fill_look_ahead(folder: Path, workers: int, in_processes: bool) -> tuple[float, float]:
    """Let the readers run ahead of a step that does not come: bytes foretold, bytes taken."""
    index = read_index(FolderStore(folder))
    plan = plan_epoch(index, PlanSettings(batch_seconds=160, micro_batches_per_step=1), 0)
    make = partial(open_stream, index, DataConfig(shards=str(folder), workers=workers), VOCAB, True, World())
    stream, me = LoaderProcesses(make) if in_processes else make(), psutil.Process()

    def taken() -> int:
        children = [psutil.Process(one.pid) for one in stream._processes] if in_processes else []
        return sum(int(process.memory_full_info().uss) for process in (me, *children))

    seen = [taken()]
    items = stream.epoch(plan)
    next(items)
    while len(seen) < 10 or seen[-1] > seen[-9] + 1e6:
        time.sleep(0.2)
        seen.append(taken())
    items.close()  # type: ignore[attr-defined]
    largest = int(plan.padded.max()) / SAMPLE_RATE
    foretold = loader_memory(index, workers, in_processes).at(largest)
    if in_processes:  # an evaluation's, beside, is not under way
        foretold -= loader_memory(index, workers, False).at(largest)
    return foretold, seen[-1] - seen[0]


def test_masks_are_a_clips_own_and_never_hide_its_end(meadow: Path) -> None:
    """Whoever computes a clip and beside whichever: the network's frames and features, no others."""
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
