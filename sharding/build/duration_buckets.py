"""Fit duration bins to the histogram of clips, with the edges that need the least padding."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESOLUTION_SEC = 0.1


def fit_bins(seconds: npt.ArrayLike, num_buckets: int) -> tuple[float, ...]:
    """Return upper edges (seconds) of at most `num_buckets` bins that minimise padding of clips to their bin's edge.

    Finds the optimum over a histogram of 0.1 s cells by dynamic programming; O(buckets × cells²). Empty cells never
    become an edge, so a corpus with few distinct lengths gets fewer bins.
    """
    cells = np.maximum(np.ceil(np.asarray(seconds, float) / RESOLUTION_SEC - 1e-9).astype(np.int64), 1)
    if not len(cells):
        return (RESOLUTION_SEC,)
    edges, counts = np.unique(cells, return_counts=True)  # (C,) ascending
    clips_before = np.concatenate([[0], np.cumsum(counts)])
    # cost[j] after k bins: padded area, in clips × cells, of the first j distinct lengths
    cost = np.concatenate([[0.0], edges * clips_before[1:]])
    choices = []
    for _ in range(min(num_buckets, len(edges)) - 1):
        area = np.full((len(edges) + 1, len(edges) + 1), np.inf)  # [j, i]: bins cover i lengths, the next reaches j
        rows, columns = np.tril_indices(len(edges) + 1, -1)
        area[rows, columns] = cost[columns] + edges[rows - 1] * (clips_before[rows] - clips_before[columns])
        area[0, 0] = 0.0
        choices.append(area.argmin(axis=1))
        cost = area.min(axis=1)
    bins, end = [], len(edges)
    for choice in [*reversed(choices), None]:
        if end == 0:
            break
        bins.append(round(float(edges[end - 1] * RESOLUTION_SEC), 1))
        end = 0 if choice is None else int(choice[end])
    return tuple(reversed(bins))


def bucket_of(seconds: npt.ArrayLike, bins: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the first bin whose upper edge is not exceeded, else the last. The shape is that of `seconds`."""
    return np.minimum(np.searchsorted(bins, np.asarray(seconds, float) - 1e-9), len(bins) - 1)
