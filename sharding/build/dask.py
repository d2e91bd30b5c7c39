"""Workers on other machines: those of a Dask cluster, which see the same sources and OUT and have this package."""

import logging
import time
from concurrent.futures import CancelledError
from contextlib import suppress

from sharding.errors import StreamtrainError
from sharding.pool import Workers

CONNECT_SEC = 10.0  # a scheduler that was started a moment ago is waited for
NO_WORKER_SEC = 45.0  # without any worker, until the build gives up
POLL_SEC = 2.0  # between two looks at who is there
START = "dask worker {} --nthreads 1 --nworkers N"
RERUN_HINT = "the same build goes on from the shards that are whole"


class ClusterWorkers(Workers):
    """The workers of a Dask cluster, who come and go: what one leaves undone, Dask gives to another.

    So a job may run twice, even at once; each time it writes the same bytes, a file at a time.
    """

    def __init__(self, scheduler: str) -> None:
        try:
            from distributed import Client, Security
        except ImportError as error:
            raise StreamtrainError(
                "--executor dask: distributed is not installed", "pip install distributed"
            ) from error
        for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # tracebacks of an end; what matters is raised
        if scheduler.startswith("tls:") and not Security().get_connection_args("client").get("ssl_context"):
            raise StreamtrainError(
                f"--scheduler {scheduler}: Dask has no certificate to show there",
                "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, __TLS__CLIENT__CERT and __TLS__CLIENT__KEY",
            )
        self._scheduler = scheduler
        self._seen, self._next_look = time.monotonic(), 0.0
        try:
            self._client = Client(scheduler, timeout=CONNECT_SEC, set_as_default=False)
        except OSError as error:
            raise StreamtrainError(
                f"--scheduler {scheduler}: {error}", "start one with `dask scheduler`; it says its address"
            ) from error
        try:
            super().__init__(0, self._client.get_executor(pure=False))  # else equal calls would be one
            while not self.count:
                self.check_health()
                time.sleep(0.1)
        except BaseException:
            self._client.close()
            raise

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the scheduler may be gone
            self._client.close()  # nobody wants the jobs any more; one that runs ends when it next looks at OUT's lock

    def check_health(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + POLL_SEC
        try:
            threads = self._client.nthreads(callback_timeout=NO_WORKER_SEC)
        except OSError as error:
            raise self._lost() from error
        for worker, number in threads.items():
            if number > 1:  # the voice detector and open zips are shared in a process
                raise StreamtrainError(
                    f"--scheduler {self._scheduler}: worker {worker} runs {number} threads, and must run one",
                    f"start workers with `{START.format(self._scheduler)}`",
                )
        self.count = len(threads)
        if threads:
            self._seen = now
        elif now - self._seen > NO_WORKER_SEC:
            raise StreamtrainError(
                f"--scheduler {self._scheduler}: no worker for {NO_WORKER_SEC:.0f} s",
                f"start workers with `{START.format(self._scheduler)}`; {RERUN_HINT}",
            )

    def describe_failure(self, error: Exception, label: str) -> StreamtrainError | None:
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return StreamtrainError(
                f"{error.allowed_failures + 1} workers died, one after another, with the same job while {label}",
                "out of memory? start fewer workers on each machine; if machines are taken away often, start the "
                "scheduler with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=100",
            )
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            return StreamtrainError(
                f"--scheduler {self._scheduler}: {error.__cause__ or error}",
                "install this package and its libraries where the scheduler and the workers run",
            )
        if self._client.status != "running" or isinstance(error, CancelledError):
            return self._lost()
        return None

    def _lost(self) -> StreamtrainError:
        return StreamtrainError(f"--scheduler {self._scheduler}: does not answer any more", RERUN_HINT)
