"""Where to cut a long recording, and which words belong to which piece.

The cuts are the cheapest set over the whole recording (dynamic programming): few, at good pauses, no tiny pieces,
none over the limit. Words are given to pieces by a duration model; a piece whose label is not nearly certain is kept
as audio, without a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharding.audio import SAMPLE_RATE, Waveform, frame_count
from sharding.ipa import ctc_frames_needed
from sharding.pauses import HOP, Listening, Pause, find_pauses, listen, quietest_cut

MIN_PIECE_SEC = 1.5
SHORT_PIECE_SEC = 5.0  # shorter pieces cost something
CUT_COST = 0.5  # every cut is a risk for the label
FORCED_COST = 20.0  # a cut where somebody may be speaking: only where there is no other way
TINY_COST = 1000.0  # a piece under MIN_PIECE_SEC: only where nothing else is possible
CERTAIN = 0.95  # a piece keeps its label when both its cuts are at least this sure
WORD_SPREAD = 0.056  # variance of spoken time, s² per s: words of 0.35 s vary by 40 %


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an utterance and the words said in it. Times in seconds are whole samples ÷ 16,000."""

    utterance_id: str
    start_sec: float
    end_sec: float
    text: str
    label_status: str  # labelled | quarantine | unlabelled | reference
    confidence: float
    forced: bool = False  # one of its ends was cut where there was no pause

    @property
    def samples(self) -> int:
        return round(self.end_sec * SAMPLE_RATE) - round(self.start_sec * SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class Cut:
    position: int  # sample
    quality: float
    forced: bool


def split_recording(
    utterance_id: str, waveform: Waveform, text: str, limit_sec: float = 25.0, heard: Listening | None = None
) -> list[Segment]:
    """Pieces of at most `limit_sec` that tile the recording to the sample, with their words where certain."""
    heard = heard or listen(waveform)
    pauses = find_pauses(heard)
    cuts = choose_cuts(len(waveform), candidates(heard, pauses, limit_sec), round(limit_sec * SAMPLE_RATE))
    labels = assign_words(text, cuts, pauses, len(waveform), heard.silent)
    ends = [0, *(cut.position for cut in cuts), len(waveform)]
    forced = [False, *(cut.forced for cut in cuts), False]
    return [
        _segment(utterance_id, start, end, label, confidence, forced[piece] or forced[piece + 1])
        for piece, (start, end, (label, confidence)) in enumerate(zip(ends, ends[1:], labels, strict=False))
    ]


def candidates(heard: Listening, pauses: Sequence[Pause], limit_sec: float) -> list[Cut]:
    """Every place worth cutting at: the pauses, and, as a last resort, the quietest moment of each half second."""
    cuts = {pause.cut: Cut(pause.cut, pause.quality, False) for pause in pauses}
    grid = max(1, min(50, int(limit_sec * 100 / 4)))
    for start in range(0, len(heard.level_db) - grid + 1, grid):
        position = quietest_cut(heard, start, start + grid)
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


def assign_words(
    text: str, cuts: Sequence[Cut], pauses: Sequence[Pause], samples: int, silent: bool
) -> list[tuple[str, float]]:
    """For each piece its words and how sure we are of them, in [0, 1].

    The word boundary at a cut is the one whose expected share of the speech (by its symbols) lies nearest to the
    share spoken before the cut. Its confidence is its posterior among all boundaries, and counts only where the
    structure agrees: as many stretches of speech as words. Otherwise it is 0.
    """
    words = text.split()
    if not words:
        return [("", 1.0 if silent else 0.0)] * (len(cuts) + 1)
    spoken = _spoken_before(np.array([cut.position for cut in cuts] + [samples]), pauses) / SAMPLE_RATE
    total = max(float(spoken[-1]), 1e-3)
    share = np.cumsum([0, *(len(word) + 1 for word in words)])  # a word takes its symbols and a gap
    expected = total * share / share[-1]
    spread = WORD_SPREAD * expected * (total - expected) / total + 0.05**2  # a bridge, pinned at both ends
    structured = len(_islands(pauses, samples)) == len(words)
    bounds, sure = [0], [1.0]
    for time in spoken[:-1]:
        likelihood = np.exp(-np.square(time - expected) / (2 * spread)) / np.sqrt(spread) + 1e-300
        boundary = max(int(likelihood.argmax()), bounds[-1])
        bounds.append(boundary)
        sure.append(float(likelihood[boundary] / likelihood.sum()) if structured else 0.0)
    bounds.append(len(words))
    sure.append(1.0)
    return [
        (" ".join(words[start:end]), min(before, after))
        for start, end, before, after in zip(bounds, bounds[1:], sure, sure[1:], strict=False)
    ]


def _segment(utterance_id: str, start: int, end: int, label: str, confidence: float, forced: bool) -> Segment:
    fits = frame_count(end - start) >= ctc_frames_needed(label)
    certain = confidence >= CERTAIN and fits and not forced
    return Segment(
        utterance_id,
        start / SAMPLE_RATE,
        end / SAMPLE_RATE,
        label if certain else "",
        "labelled" if certain else "unlabelled",
        round(confidence, 4),
        forced,
    )


def _islands(pauses: Sequence[Pause], samples: int) -> list[tuple[int, int]]:
    """Stretches of speech between pauses, in samples; edges shorter than 0.1 s are no speech."""
    edges = [0, *(edge for pause in pauses for edge in (pause.start, pause.end)), samples]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in pairs if end - start > 10 * HOP]


def _spoken_before(positions: np.ndarray, pauses: Sequence[Pause]) -> np.ndarray:
    """Samples of speech before each position."""
    silence = sum((np.clip(positions - pause.start, 0, pause.end - pause.start) for pause in pauses), np.int64(0))
    return positions - silence
