"""Wait for data in short slices, so that a rank notices a request to stop meanwhile, and only up to a deadline."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty
from typing import TypeVar

from sharding.errors import StreamtrainError
from streamtrain.distributed import LostStepError

STALL_SEC = 480.0  # for one batch: other ranks give up on this one after 600 s, and could not report the reason
GRACE_SEC = 10.0  # of waiting after a request to stop: launchers kill after 30 s
SLICE_SEC = 0.5  # between checks for a request to stop

Item = TypeVar("Item")


class StallError(StreamtrainError):
    """Report data that did not arrive in time."""


@dataclass
class Deadline:
    """Limit how long a rank waits: `seconds` for one batch, and `grace_sec` in total once `stopped()` is true."""

    seconds: float = STALL_SEC
    stopped: Callable[[], bool] = lambda: False
    grace_sec: float = GRACE_SEC
    stopped_at: float | None = field(default=None, init=False)

    def wait_for(self, take: Callable[[float], Item], what: str, pid: int) -> Item:
        """Return the result of `take(seconds)`, calling it again as long as it raises `queue.Empty`.

        Raises StallError or LostStepError at the deadline, naming the missing item `what` and its producer `pid`.
        """
        started = time.monotonic()
        while True:
            with suppress(Empty):
                return take(SLICE_SEC)
            now = time.monotonic()
            if self.stopped_at is None and self.stopped():
                self.stopped_at = now
            if self.stopped_at is None and now >= started + self.seconds:
                raise StallError(
                    f"{what} has not arrived within {now - started:.0f} s",
                    f"check for a hanging disk or server; `py-spy dump --pid {pid}` shows what process {pid} waits for",
                )
            if self.stopped_at is not None and now >= self.stopped_at + self.grace_sec:
                raise LostStepError(
                    f"stopped: {what} has not arrived within {now - started:.0f} s; the current step is lost",
                    "rerun the same command to resume from the latest checkpoint",
                )
