"""Processes that share a progress bar, and that end with the one that started them."""

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
JOBS_AHEAD = 4  # jobs per worker that are handed out before their turn: more would fill the parent's memory
_done: Any = None  # clips finished by all workers, shared with the parent's progress bar


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    die_with_parent()


def count_done(clips: int = 1) -> None:
    """Called by a worker for the clips it has done with; a worker on another machine has no counter to share."""
    if _done is not None:
        _done.value += clips


def die_with_parent() -> None:
    """Ask Linux to end this process with the one that started it, so that a killed build leaves nobody behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before it could be asked
        os._exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which a terminal sends to all: the parent answers it, a moment later."""
    pressed: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited by processes
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))  # another thread may receive it
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if pressed:
            signal.raise_signal(signal.SIGINT)


class Workers:
    """An executor of `concurrent.futures` with a progress bar: by default, processes of this machine.

    `count` jobs can run at once; each must be one that may run twice.
    """

    def __init__(self, count: int, executor: Executor | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # rather than forked: the parent may hold threads
        self.count = count
        self._counter = context.RawValue("q", 0)  # a lock would stay locked with a worker that is killed
        self._executor = executor or ProcessPoolExecutor(count, context, _start_worker, (self._counter,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:  # nobody waits for what they are at, and a mute server may take its time
            for process in multiprocessing.active_children():
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def check_health(self) -> None:
        """Called every moment while jobs run; raises StreamtrainError where they never would end."""

    def describe_failure(self, error: Exception, label: str) -> StreamtrainError | None:
        """What has become of the workers, if that is what the error says."""
        if not isinstance(error, BrokenProcessPool):
            return None
        return StreamtrainError(f"a worker process died while {label}", "out of memory? try fewer: --workers 1")

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        clips: Sequence[int],
        label: str,
        unit: str = "clip",
    ) -> list[Result]:
        """Run every job; results in the order of the jobs, `clips[i]` (or other units) of them in job i.

        What a worker raised is raised here at once.
        """
        self._counter.value = 0
        results: dict[int, Result] = {}
        running: dict[Future[Result], int] = {}
        waiting = enumerate(jobs)
        finished = 0
        with tqdm(total=sum(clips), desc=f"{label:>10}", unit=unit, smoothing=0.05, disable=not sum(clips)) as bar:
            while len(results) < len(clips):
                try:
                    self.check_health()
                    with _interrupts_held():
                        for number, job in islice(waiting, max(0, self.count * JOBS_AHEAD - len(running))):
                            running[self._executor.submit(function, job)] = number
                    if not running:  # there is nobody to work, for the moment
                        time.sleep(0.2)
                    done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=running.__getitem__):
                        number = running.pop(future)
                        results[number] = future.result()
                        finished += clips[number]
                except StreamtrainError:
                    raise
                except Exception as error:
                    if told := self.describe_failure(error, label):
                        raise told from error
                    raise
                bar.update(max(finished, min(self._counter.value, bar.total)) - bar.n)
        return [results[number] for number in range(len(clips))]
