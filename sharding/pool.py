"""Run jobs in worker processes that share a progress bar and end with their parent process."""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from sharding.errors import StreamtrainError

Job = TypeVar("Job")
Result = TypeVar("Result")
JOBS_AHEAD = 4  # queued jobs per worker: more would fill the parent's memory
_done: Any = None  # number of clips finished by all workers, shared with the parent's progress bar


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    die_with_parent()


def count_done(clips: int = 1) -> None:
    """Count clips that a worker has finished; a worker on another machine has no shared counter, and counts nothing."""
    if _done is not None:
        _done.value += clips


def die_with_parent() -> None:
    """Make Linux kill this process when its parent ends, so that a killed build leaves no process behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent died before prctl
        os._exit(1)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Block Ctrl-C, which a terminal sends to all, in processes started inside; the parent handles it afterwards."""
    pressed: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # child processes inherit it
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))  # another thread may receive it
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if pressed:
            signal.raise_signal(signal.SIGINT)


class Workers:
    """Represent an executor of `concurrent.futures` with a progress bar: by default, processes of this machine.

    `count` jobs run at once; each must be safe to run twice.
    """

    def __init__(self, count: int, executor: Executor | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # rather than fork: the parent may have threads
        self.count = count
        self._others = {process.pid for process in multiprocessing.active_children()}  # the caller's own
        self._counter = context.RawValue("q", 0)  # without a lock, which a killed worker would leave locked
        self._executor = executor or ProcessPoolExecutor(count, context, _start_worker, (self._counter,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:  # their results are lost anyway, and an unresponsive server may delay them
            for process in multiprocessing.active_children():
                if process.pid not in self._others:
                    process.kill()
        self._executor.shutdown(cancel_futures=True)

    def check_health(self) -> None:
        """Check the workers several times a second. Raises StreamtrainError if their jobs would never end."""

    def describe_failure(self, error: Exception, label: str) -> StreamtrainError | None:
        """Return a readable error if workers have died, or None if `error` has another cause."""
        if not isinstance(error, BrokenProcessPool):
            return None
        hint = (
            "out of memory? try fewer: --workers 1; a Python script needs `if __name__ == '__main__':` around its calls"
        )
        return StreamtrainError(f"a worker process died while {label}", hint)

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        clips: Sequence[int],
        label: str,
        unit: str = "clip",
    ) -> list[Result]:
        """Run every job. Return the results in the order of the jobs; job i has `clips[i]` clips (or other units).

        An exception in a worker is raised at once.
        """
        return list(self.stream(function, jobs, clips, label, unit))

    def stream(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        clips: Sequence[int],
        label: str,
        unit: str = "clip",
    ) -> Iterator[Result]:
        """Run every job, as `map` does. Yield the results in the order of the jobs, each as soon as it can be."""
        self._counter.value = 0
        results: dict[int, Result] = {}
        running: dict[Future[Result], int] = {}
        pending = enumerate(jobs)
        finished = yielded = 0
        with tqdm(total=sum(clips), desc=f"{label:>10}", unit=unit, smoothing=0.05, disable=not sum(clips)) as bar:
            while yielded < len(clips):
                try:
                    self.check_health()
                    with _interrupts_deferred():
                        for number, job in islice(pending, max(0, self.count * JOBS_AHEAD - len(running))):
                            running[self._executor.submit(function, job)] = number
                    if not running:  # no worker is available at the moment
                        time.sleep(0.2)
                    done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=running.__getitem__):
                        number = running.pop(future)
                        results[number] = future.result()
                        finished += clips[number]
                except StreamtrainError:
                    raise
                except Exception as error:
                    if failure := self.describe_failure(error, label):
                        raise failure from error
                    raise
                bar.update(max(finished, min(self._counter.value, bar.total)) - bar.n)
                while yielded in results:
                    yield results.pop(yielded)
                    yielded += 1
