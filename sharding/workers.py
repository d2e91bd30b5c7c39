"""Processes that share a progress bar, and that end with the one that started them."""

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from sharding.errors import StreamtrainError

Job = TypeVar("Job")
Result = TypeVar("Result")
_done: Any = None  # clips finished by all workers, shared with the parent's progress bar


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    die_with_parent()


def count_done(clips: int = 1) -> None:
    """Called by a worker for the clips it has done with."""
    with _done.get_lock():
        _done.value += clips


def die_with_parent() -> None:
    """Ask Linux to end this process with the one that started it, so that a killed build leaves nobody behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Workers:
    """Processes that share a progress bar. Spawned rather than forked: the parent may hold threads."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._counter = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(count, context, _start_worker, (self._counter,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job], clips: int, label: str) -> list[Result]:
        """Run every job; results in the order of the jobs. A worker's exception is raised here."""
        if not jobs:
            return []
        self._counter.value = 0
        try:
            with _interrupts_ignored():  # by the workers that start here: Ctrl-C reaches all, the parent alone answers
                futures = [self._pool.submit(function, job) for job in jobs]
            pending = set(futures)
            with tqdm(total=clips, desc=f"{label:>10}", unit="clip", smoothing=0.05) as bar:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.update(min(self._counter.value, clips) - bar.n)
                    for future in done:
                        future.result()  # raises at once what a worker raised
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise StreamtrainError(
                f"a worker process died while {label}", "out of memory? try fewer: --workers 1"
            ) from error
