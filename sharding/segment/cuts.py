"""Choose where to cut a long recording: the cheapest set of cuts over the whole of it (dynamic programming).

They are few, at good pauses, with no tiny pieces between them and none over the limit. This file travels as it is into
a submission.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sharding.audio.codec import SAMPLE_RATE, Waveform
from sharding.audio.vad import Pause, SpeechActivity, detect_speech, find_pauses, quietest_cut

MAX_DURATION_SEC = 25.0  # of a piece that a model hears
MIN_PIECE_SEC = 1.5
SHORT_PIECE_SEC = 5.0  # shorter pieces cost something
CUT_COST = 0.5  # every cut is a risk for the label
FORCED_COST = 20.0  # a cut where somebody may be speaking: only where there is no other way
TINY_COST = 1000.0  # a piece under MIN_PIECE_SEC: only where nothing else is possible


@dataclass(frozen=True, slots=True)
class Cut:
    position: int  # sample
    quality: float
    forced: bool


def split_at_pauses(waveform: Waveform) -> Iterator[tuple[int, Waveform]]:
    """Yield each piece of a recording, and the sample at which it begins; the whole of it if it is within the limit."""
    ends = [0, len(waveform)]
    if len(waveform) > MAX_DURATION_SEC * SAMPLE_RATE:
        activity = detect_speech(waveform)
        cuts = find_cuts(activity, find_pauses(activity), len(waveform), MAX_DURATION_SEC)
        ends[1:1] = [cut.position for cut in cuts]
    return ((start, waveform[start:end]) for start, end in pairwise(ends))


def find_cuts(activity: SpeechActivity, pauses: Sequence[Pause], samples: int, max_duration: float) -> list[Cut]:
    """Return the cuts of a recording of so many samples that leave no piece over the limit."""
    return choose_cuts(samples, candidates(activity, pauses, max_duration), round(max_duration * SAMPLE_RATE))


def candidates(activity: SpeechActivity, pauses: Sequence[Pause], max_duration: float) -> list[Cut]:
    """Every place worth cutting at: the pauses, and, as a last resort, the quietest moment of each half second."""
    cuts = {pause.cut: Cut(pause.cut, pause.quality, False) for pause in pauses}
    grid = max(1, min(50, int(max_duration * 100 / 4)))
    for start in range(0, len(activity.level_db) - grid + 1, grid):
        position = quietest_cut(activity, start, start + grid)
        cuts.setdefault(position, Cut(position, 0.0, True))
    return sorted(cuts.values(), key=lambda cut: cut.position)


def choose_cuts(samples: int, cuts: Sequence[Cut], limit: int) -> list[Cut]:
    """The cheapest set of cuts that leaves no piece over `limit` samples; O(candidates²) within the limit."""
    positions = np.array([0, *(cut.position for cut in cuts), samples])
    price = np.array([0.0, *(CUT_COST + 1 - cut.quality + FORCED_COST * cut.forced for cut in cuts), 0.0])
    best = np.full(len(positions), np.inf)
    best[0] = 0.0
    previous = np.zeros(len(positions), np.int64)
    for here in range(1, len(positions)):
        reach = np.arange(np.searchsorted(positions, positions[here] - limit), here)
        seconds = (positions[here] - positions[reach]) / SAMPLE_RATE
        short = np.maximum(0, (SHORT_PIECE_SEC - seconds) / SHORT_PIECE_SEC) + TINY_COST * (seconds < MIN_PIECE_SEC)
        total = best[reach] + short + price[here]
        previous[here] = reach[total.argmin()]
        best[here] = total.min()
    chosen = []
    here = int(previous[-1])
    while here > 0:
        chosen.append(cuts[here - 1])
        here = int(previous[here])
    return chosen[::-1]
