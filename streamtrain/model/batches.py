"""Cut clips into batches of bounded padded length. Imports no torch."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sharding.audio.codec import SAMPLE_RATE

Rows = npt.NDArray[np.int64]  # numbers of clips, such as rows of ShardIndex.samples


def batch_by_length(lengths: Sequence[int] | npt.NDArray[np.integer], batch_seconds: float) -> list[Rows]:
    """Return batches with every clip once, of similar lengths, longest first; the same for every world size.

    A clip longer than the cap forms a batch of its own.
    """
    values = np.asarray(lengths, np.int64)
    order = np.argsort(values, kind="stable")
    return list(cut_batches(order, values[order], round(batch_seconds * SAMPLE_RATE)))[::-1]


def cut_batches(rows: Rows, lengths: Rows, cap: int, first_cap: int | None = None) -> Iterator[Rows]:
    """Cut consecutive rows into batches with clips × longest ≤ `cap` samples; a longer clip forms a batch alone.

    `first_cap` bounds the first batch instead, so that the cuts fall elsewhere in each epoch.
    """
    start, limit = 0, first_cap or cap
    while start < len(rows):
        reach = start + limit // max(int(lengths[start]), 1) + 1  # the first clip alone bounds their number
        running = np.maximum.accumulate(lengths[start:reach])
        fits = int(np.searchsorted(running * np.arange(1, len(running) + 1), limit, "right"))
        size = max(fits, 1)
        yield rows[start : start + size]
        start, limit = start + size, cap
