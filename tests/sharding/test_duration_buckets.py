"""The bins are the best there are."""

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sharding.build.duration_buckets import RESOLUTION_SEC, bucket_of, fit_bins

tenths = st.lists(st.integers(1, 12), min_size=1, max_size=25)


def padded_tenths(clips: Sequence[int], edges: Sequence[int]) -> int:
    """What all clips last together when each is padded to its bin's edge."""
    return sum(min(edge for edge in edges if edge >= clip) for clip in clips)


@given(tenths, st.integers(1, 5))
def test_no_other_bins_pad_less(clips: list[int], num_buckets: int) -> None:
    bins = fit_bins([clip * RESOLUTION_SEC for clip in clips], num_buckets)
    lengths = sorted(set(clips))
    best = min(
        padded_tenths(clips, [*edges, lengths[-1]])
        for count in range(num_buckets)
        for edges in itertools.combinations(lengths[:-1], count)
    )
    assert len(bins) <= num_buckets
    assert padded_tenths(clips, [round(edge / RESOLUTION_SEC) for edge in bins]) == best


@given(st.lists(st.integers(1, 480_000), min_size=1, max_size=60), st.integers(1, 8))
def test_each_clip_lies_between_the_edges_of_its_bucket(samples: list[int], num_buckets: int) -> None:
    seconds = [count / 16_000 for count in samples]
    bins = fit_bins(seconds, num_buckets)
    assert list(bins) == sorted(set(bins))
    for clip in seconds:
        bucket = bucket_of(clip, bins)
        assert clip <= bins[bucket] + 1e-6
        assert bucket == 0 or clip > bins[bucket - 1]


def test_what_is_longer_than_every_edge_goes_to_the_last_bucket() -> None:
    assert bucket_of(99.0, (1.0, 2.0)) == 1


def test_a_corpus_without_clips_has_one_bucket() -> None:
    assert fit_bins([], 8) == (RESOLUTION_SEC,)
