"""Choose where to cut a long recording: the cheapest set of cuts over the whole of it (dynamic programming).

The cuts are few, at good pauses, with no tiny segment between them and none over the limit. A submission has a copy
of this file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sharding.audio.codec import SAMPLE_RATE, Waveform
from sharding.audio.vad import Pause, SpeechActivity, detect_speech, find_pauses, quietest_cut

MAX_DURATION_SEC = 25.0  # longest segment that a model gets
MIN_PIECE_SEC = 1.5
SHORT_PIECE_SEC = 5.0  # shorter segments have a cost
CUT_COST = 0.5  # every cut is a risk for the label
FORCED_COST = 20.0  # of a cut that may be in speech: only if there is no other way
TINY_COST = 1000.0  # of a segment under MIN_PIECE_SEC: only if nothing else is possible


@dataclass(frozen=True, slots=True)
class Cut:
    position: int  # sample
    quality: float
    forced: bool  # not in a pause


def split_at_pauses(waveform: Waveform) -> Iterator[tuple[int, Waveform]]:
    """Yield the first sample and the waveform of each segment; the whole recording if it is within the limit."""
    ends = [0, len(waveform)]
    if len(waveform) > MAX_DURATION_SEC * SAMPLE_RATE:
        activity = detect_speech(waveform)
        cuts = find_cuts(activity, find_pauses(activity), len(waveform), MAX_DURATION_SEC)
        ends[1:1] = [cut.position for cut in cuts]
    return ((start, waveform[start:end]) for start, end in pairwise(ends))


def find_cuts(activity: SpeechActivity, pauses: Sequence[Pause], samples: int, max_duration: float) -> list[Cut]:
    """Return the cuts of a recording of `samples` samples; no segment is longer than `max_duration` seconds."""
    return choose_cuts(samples, candidates(activity, pauses, max_duration), round(max_duration * SAMPLE_RATE))


def candidates(activity: SpeechActivity, pauses: Sequence[Pause], max_duration: float) -> list[Cut]:
    """Return all possible cuts: in the pauses and, as a last resort, at the quietest moment of each half second."""
    cuts = {pause.cut: Cut(pause.cut, pause.quality, False) for pause in pauses}
    grid = max(1, min(50, int(max_duration * 100 / 4)))
    for start in range(0, len(activity.level_db) - grid + 1, grid):
        position = quietest_cut(activity, start, start + grid)
        cuts.setdefault(position, Cut(position, 0.0, True))
    return sorted(cuts.values(), key=lambda cut: cut.position)


def choose_cuts(samples: int, cuts: Sequence[Cut], limit: int) -> list[Cut]:
    """Return the cheapest set of cuts that leaves no segment over `limit` samples; O(candidates²) within the limit."""
    positions = np.array([0, *(cut.position for cut in cuts), samples])
    price = np.array([0.0, *(CUT_COST + 1 - cut.quality + FORCED_COST * cut.forced for cut in cuts), 0.0])
    best = np.full(len(positions), np.inf)
    best[0] = 0.0
    previous = np.zeros(len(positions), np.int64)
    for end in range(1, len(positions)):
        starts = np.arange(np.searchsorted(positions, positions[end] - limit), end)
        seconds = (positions[end] - positions[starts]) / SAMPLE_RATE
        short = np.maximum(0, (SHORT_PIECE_SEC - seconds) / SHORT_PIECE_SEC) + TINY_COST * (seconds < MIN_PIECE_SEC)
        total = best[starts] + short + price[end]
        previous[end] = starts[total.argmin()]
        best[end] = total.min()
    chosen = []
    place = int(previous[-1])
    while place > 0:
        chosen.append(cuts[place - 1])
        place = int(previous[place])
    return chosen[::-1]
