"""Run jobs on the workers of a Dask cluster, which need this package and access to the same sources and OUT."""

import logging
import time
from concurrent.futures import CancelledError
from contextlib import suppress

from sharding.errors import StreamtrainError
from sharding.pool import Workers

CONNECT_SEC = 10.0  # waits for a scheduler that is just starting
NO_WORKER_SEC = 45.0  # time without any worker before the build fails
POLL_SEC = 2.0  # between two queries for the workers
START = "dask worker {} --nthreads 1 --nworkers N"
RERUN_HINT = "rerun the same build: it resumes from the finished shards"


class ClusterWorkers(Workers):
    """Run jobs on the workers of a Dask cluster, which may come and go: Dask reassigns the jobs of a lost worker.

    A job may therefore run twice, even at once; each time it writes the same bytes, a file at a time.
    """

    def __init__(self, scheduler: str) -> None:
        try:
            from distributed import Client, Security
        except ImportError as error:
            raise StreamtrainError("--scheduler: distributed is not installed", "pip install distributed") from error
        for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # shutdown tracebacks; real errors are raised
        if scheduler.startswith("tls:") and not Security().get_connection_args("client").get("ssl_context"):
            raise StreamtrainError(
                f"--scheduler {scheduler}: Dask has no client certificate",
                "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, __TLS__CLIENT__CERT and __TLS__CLIENT__KEY",
            )
        self._scheduler = scheduler
        self._last_worker, self._next_check = time.monotonic(), 0.0
        try:
            self._client = Client(scheduler, timeout=CONNECT_SEC, set_as_default=False)
        except OSError as error:
            raise StreamtrainError(
                f"--scheduler {scheduler}: {error}", "start one with `dask scheduler`; it prints its address"
            ) from error
        try:
            super().__init__(0, self._client.get_executor(pure=False))  # pure calls with equal arguments would run once
            while not self.count:
                self.check_health()
                time.sleep(0.1)
        except BaseException:
            self._client.close()
            raise

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the scheduler may be gone
            self._client.close()  # running jobs end at their next check of OUT's lock

    def check_health(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + POLL_SEC
        try:
            threads = self._client.nthreads(callback_timeout=NO_WORKER_SEC)
        except OSError as error:
            raise self._unreachable() from error
        for worker, count in threads.items():
            if count > 1:  # a process shares its voice-activity detector and open zips
                raise StreamtrainError(
                    f"--scheduler {self._scheduler}: worker {worker} runs {count} threads, must run one",
                    f"start workers with `{START.format(self._scheduler)}`",
                )
        self.count = len(threads)
        if threads:
            self._last_worker = now
        elif now - self._last_worker > NO_WORKER_SEC:
            raise StreamtrainError(
                f"--scheduler {self._scheduler}: no worker for {NO_WORKER_SEC:.0f} s",
                f"start workers with `{START.format(self._scheduler)}`; {RERUN_HINT}",
            )

    def describe_failure(self, error: Exception, label: str) -> StreamtrainError | None:
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return StreamtrainError(
                f"{error.allowed_failures + 1} workers died one after another on the same job while {label}",
                "out of memory? start fewer workers on each machine; if machines are often preempted, start the "
                "scheduler with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=100",
            )
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            return StreamtrainError(
                f"--scheduler {self._scheduler}: {error.__cause__ or error}",
                "install this package and its dependencies for the scheduler and the workers",
            )
        if self._client.status != "running" or isinstance(error, CancelledError):
            return self._unreachable()
        return None

    def _unreachable(self) -> StreamtrainError:
        return StreamtrainError(f"--scheduler {self._scheduler}: no longer responds", RERUN_HINT)
