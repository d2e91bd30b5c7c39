"""Wait for data in slices, so that a rank sees when it is asked to stop meanwhile; and not for ever."""

import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import TypeVar

from sharding.errors import StreamtrainError
from streamtrain.distributed import LostStepError

STALL_SEC = 480.0  # with one batch: other ranks give up on this one after 600 s, and could not tell why
GRACE_SEC = 10.0  # of waiting once the rank is asked to stop: launchers kill after 30 s
SLICE_SEC = 0.5  # between looks whether it is

Item = TypeVar("Item")


class StallError(StreamtrainError):
    """Raised where data do not come in time."""


class Deadline:
    """Bound how long a rank waits: for one batch `seconds`, and `grace_sec` in all from when `stopped()` is true."""

    def __init__(
        self,
        seconds: float = STALL_SEC,
        stopped: Callable[[], bool] = lambda: False,
        grace_sec: float = GRACE_SEC,
    ) -> None:
        self._seconds, self._stopped, self._grace_sec = seconds, stopped, grace_sec
        self._asked_at: float | None = None

    def wait_for(self, take: Callable[[float], Item], what: str, pid: int) -> Item:
        """Return what `take(seconds)` returns as soon as it does not raise `queue.Empty`.

        Raises StallError or LostStepError, which name `what` was waited for and the process `pid` that makes it.
        """
        started = time.monotonic()
        while True:
            with suppress(Empty):
                return take(SLICE_SEC)
            now = time.monotonic()
            if self._asked_at is None and self._stopped():
                self._asked_at = now
            if self._asked_at is None and now >= started + self._seconds:
                raise StallError(
                    f"{what} has not come in {now - started:.0f} s",
                    f"does a disk or a server hang? `py-spy dump --pid {pid}` shows what process {pid} waits for",
                )
            if self._asked_at is not None and now >= self._asked_at + self._grace_sec:
                raise LostStepError(
                    f"stopped, though {what} has not come in {now - started:.0f} s: the step under way is lost",
                    "the same command goes on from the newest checkpoint",
                )
