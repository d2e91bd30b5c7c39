"""Where to cut a long recording, and which words belong to which piece.

The cuts are the cheapest set over the whole recording (dynamic programming): few, at good pauses, no tiny pieces,
none over the limit. Words are given to pieces by a duration model (pass 1) or, where a model has aligned the label, by
what it heard (pass 2). A piece whose label is not nearly certain is kept as audio, without a label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sharding.aligned import Evidence
from sharding.audio import SAMPLE_RATE, Waveform, frame_count
from sharding.ipa import ctc_frames_needed
from sharding.pauses import HOP, Listening, Pause, find_pauses, listen, quietest_cut

MIN_PIECE_SEC = 1.5
SHORT_PIECE_SEC = 5.0  # shorter pieces cost something
CUT_COST = 0.5  # every cut is a risk for the label
FORCED_COST = 20.0  # a cut where somebody may be speaking: only where there is no other way
TINY_COST = 1000.0  # a piece under MIN_PIECE_SEC: only where nothing else is possible
LEAST_BETWEEN = 0.01  # probability that a cut in a pause falls between words, below which a model is not believed
RATE_FACTOR = 2.0  # a piece says at most so many times as many symbols a second as its recording, and at least 1 / that
WORD_SPREAD = 0.056  # variance of spoken time, s² per s: words of 0.35 s vary by 40 %
STRETCH_SPREAD = 0.1**2  # s²: of where a stretch is seen to begin and end
HELD = (0.01, 0.98, 0.01)  # how often a stretch of speech in a list of words holds none, one or two of them


@dataclass(frozen=True, slots=True)
class Guess:
    """What pass 1 said of a piece that pass 2 has labelled: a check on how sure it may be."""

    confidence: float
    right: bool  # it would have given the same words


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an utterance and the words said in it. Times in seconds are whole samples ÷ 16,000."""

    utterance_id: str
    start_sec: float
    end_sec: float
    text: str
    label_status: str  # labelled | unlabelled | reference
    confidence: float  # the probability that both its cuts fall between the words that they should
    forced: bool = False  # one of its ends was cut where there was no pause
    by: str = "durations"  # or "alignment": how its words were found
    reason: str | None = None  # why it has no label
    guess: Guess | None = None  # where a model has labelled it

    @property
    def samples(self) -> int:
        return round(self.end_sec * SAMPLE_RATE) - round(self.start_sec * SAMPLE_RATE)


@dataclass(frozen=True)
class Gates:
    """What a piece's label must pass."""

    min_confidence: float = 0.95  # probability, of each of its cuts
    max_swap: float = 0.35  # nats, by which two neighbouring words may fit better the other way round (pass 1)
    max_gap: float = 0.0  # nats, how much likelier what is heard may be than the label, in half a second (pass 2)
    min_evidence: float = 0.0  # nats, by which the label is likelier with a word than without it, each (pass 2)


@dataclass(frozen=True, slots=True)
class Given:
    """The words that one piece is given, how sure we are of them, in [0, 1], and why they are refused, if they are."""

    text: str
    confidence: float
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Between two pauses; in samples."""

    start: int
    end: int
    voiced: bool  # the detector hears speech in it


@dataclass(frozen=True, slots=True)
class Cut:
    position: int  # sample
    quality: float
    forced: bool


def split_recording(
    utterance_id: str,
    waveform: Waveform,
    text: str,
    limit_sec: float = 25.0,
    heard: Listening | None = None,
    evidence: Evidence | None = None,
    gates: Gates = Gates(),
) -> list[Segment]:
    """Pieces of at most `limit_sec` that tile the recording to the sample, with their words where certain.

    With the `evidence` of a model, which must be of this label and these cuts to count, pass 2 says which words.
    """
    heard = heard or listen(waveform)
    pauses = find_pauses(heard)
    cuts = choose_cuts(len(waveform), candidates(heard, pauses, limit_sec), round(limit_sec * SAMPLE_RATE))
    positions = tuple(cut.position for cut in cuts)
    stretches = list(_between(pauses, heard, len(waveform)))
    guessed = given = assign_words(text, cuts, stretches, heard.silent, gates)
    useless = evidence.useless(text, positions) if evidence else None
    by = "alignment" if evidence and not useless else "durations"
    if evidence and not useless:
        given = words_by_evidence(text, evidence, cuts, stretches, len(waveform), gates)
    elif useless:
        given = [replace(words, refused=words.refused and f"{words.refused} ({useless})") for words in given]
    ends = [0, *positions, len(waveform)]
    forced = [False, *(cut.forced for cut in cuts), False]
    segments = [
        _segment(utterance_id, start, end, words, forced[piece] or forced[piece + 1], by)
        for piece, (start, end, words) in enumerate(zip(ends, ends[1:], given, strict=False))
    ]
    return segments if by == "durations" else [_beside_guess(*pair) for pair in zip(segments, guessed, strict=True)]


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
    text: str, cuts: Sequence[Cut], stretches: Sequence[Stretch], silent: bool, gates: Gates = Gates()
) -> list[Given]:
    """For each piece its words, told by pauses and durations alone (pass 1).

    Where there are as many stretches of speech as words, each holds one, unless a word was heard as two or two as one:
    the confidence of a cut is the probability that no such mistakes move it, given how long each stretch lasts.
    Otherwise the words of a piece cannot be told. Nor can they where two neighbours fit better the other way round: a
    label may have them in the wrong order.
    """
    words = text.split()
    if not words:
        return [Given("", float(silent), None if silent else "speech without a label")] * (len(cuts) + 1)
    if len(stretches) != len(words):
        why = f"{len(words)} words in {len(stretches)} stretches of speech: only a model can tell which is where"
        return [Given("", 0.0, why)] * (len(cuts) + 1)
    lasting = np.array([stretch.end - stretch.start for stretch in stretches]) / SAMPLE_RATE
    sizes = np.array([len(word) + 1.0 for word in words])
    before, swap = words_after_stretches(lasting, sizes), gain_by_swapping(lasting, sizes)
    passed = np.searchsorted([stretch.end for stretch in stretches], [cut.position for cut in cuts], side="right")
    bounds = [0, *passed.tolist(), len(words)]
    sure = [1.0, *before[passed, passed].tolist(), 1.0]
    given = []
    for (start, end), confidence in zip(pairwise(bounds), map(min, pairwise(sure)), strict=True):
        refused = None
        if confidence < gates.min_confidence:
            refused = f"the cut is only {confidence:.2f} sure"
        elif (gain := max(swap[start : end - 1], default=0.0)) > gates.max_swap:
            first = start + int(swap[start : end - 1].argmax())
            refused = f"'{words[first]} {words[first + 1]}' fits better the other way round, by {gain:.2f} nats"
        given.append(Given(" ".join(words[start:end]), confidence, refused))
    return given


def words_after_stretches(lasting: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The probability that after each stretch of speech so many words have been said, shape (stretches + 1, words + 1).

    A stretch `lasting` so many seconds holds one word of so many `sizes`, seldom none or two; how long they last is
    normal around what their sizes promise. Summed over all ways to give words to stretches.
    """
    count = len(sizes)
    said = np.cumsum(np.concatenate([[0.0], sizes * lasting.sum() / sizes.sum()]))
    likely = np.full((3, len(lasting), count + 1), -np.inf)  # of a stretch with so many words, the last of them given
    for held in range(3):
        promise = said[held:] - said[: count + 1 - held]  # seconds, by words said in the end
        likely[held, :, held:] = np.log(HELD[held]) + _fit(lasting[:, None], promise)
    forward = np.full((len(lasting) + 1, count + 1), -np.inf)
    backward = np.full_like(forward, -np.inf)
    forward[0, 0], backward[-1, -1] = 0.0, 0.0
    for stretch in range(len(lasting)):
        ways = [_shift(forward[stretch], held) + likely[held, stretch] for held in range(3)]
        forward[stretch + 1] = np.logaddexp.reduce(ways)
    for stretch in range(len(lasting) - 1, -1, -1):
        ways = [_shift(backward[stretch + 1] + likely[held, stretch], -held) for held in range(3)]
        backward[stretch] = np.logaddexp.reduce(ways)
    probability: np.ndarray = np.exp(forward + backward - np.logaddexp.reduce(forward[-1] + backward[-1]))
    return probability


def gain_by_swapping(lasting: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """By how many nats each word and the next, one in each stretch, fit better the other way round, (words − 1,)."""
    promise = sizes * lasting.sum() / sizes.sum()
    swapped = _fit(lasting[:-1], promise[1:]) + _fit(lasting[1:], promise[:-1])
    gain: np.ndarray = swapped - _fit(lasting[:-1], promise[:-1]) - _fit(lasting[1:], promise[1:])
    return gain


def _fit(lasting: np.ndarray, promise: np.ndarray) -> np.ndarray:
    """Log-density, up to a constant, of so many seconds where so many are promised."""
    spread = WORD_SPREAD * promise + STRETCH_SPREAD
    density: np.ndarray = -np.square(lasting - promise) / (2 * spread) - 0.5 * np.log(spread)
    return density


def _shift(values: np.ndarray, places: int) -> np.ndarray:
    """Moved up or down, with what cannot be beyond the end."""
    if places == 0:
        return values
    moved = np.full_like(values, -np.inf)
    if places > 0:
        moved[places:] = values[:-places]
    else:
        moved[:places] = values[-places:]
    return moved


def words_by_evidence(
    text: str,
    evidence: Evidence,
    cuts: Sequence[Cut],
    stretches: Sequence[Stretch],
    samples: int,
    gates: Gates = Gates(),
) -> list[Given]:
    """For each piece its words, as a model heard them (pass 2).

    Refused where a cut is not sure, where what is heard is something else than the label, where a word is not heard,
    where somebody speaks and the label has no word, or where words come much faster or slower than in the rest of the
    recording. A cut in a pause lies between words, whatever the model takes the room's noise for: what it says of the
    cut is taken under that condition.
    """
    words = text.split()
    bounds = np.maximum.accumulate([0, *evidence.words_before, len(words)]).tolist()
    forced = [cut.forced for cut in cuts]
    between = np.where(forced, 1.0, np.maximum(1 - np.array(evidence.inside), LEAST_BETWEEN))
    sure = [1.0, *np.minimum(evidence.probability / between, 1.0).tolist(), 1.0]
    wordless = [each for each in stretches if each.voiced and not evidence.has_word(each.start, each.end)]
    ends = [0, *(cut.position for cut in cuts), samples]
    spoken = [max(_in_common(stretches, start, end) / SAMPLE_RATE, 0.1) for start, end in pairwise(ends)]  # seconds
    rate = sum(map(len, words)) / sum(spoken)  # symbols a second
    given = []
    for piece, (start, end) in enumerate(pairwise(bounds)):
        said = words[start:end]
        confidence = min(sure[piece], sure[piece + 1])
        own = sum(map(len, said)) / spoken[piece]
        unsaid = [each for each in wordless if _in_common([each], ends[piece], ends[piece + 1])]
        refused = None
        if confidence < gates.min_confidence:
            refused = f"the cut is only {confidence:.2f} sure"
        elif evidence.gaps[piece] > gates.max_gap:
            refused = (
                f"something else is heard than the label says, by {evidence.gaps[piece]:.1f} nats "
                f"where {gates.max_gap:.1f} may be"
            )
        elif said and min(evidence.words[start:end]) < gates.min_evidence:
            worst = min(range(start, end), key=evidence.words.__getitem__)
            refused = f"'{words[worst]}' is not heard: {evidence.words[worst]:.1f} nats speak for it"
        elif unsaid:
            first, last = unsaid[0].start / SAMPLE_RATE, unsaid[0].end / SAMPLE_RATE
            refused = f"somebody speaks at {first:.1f} – {last:.1f} s, where no word of the label is heard"
        elif said and not rate / RATE_FACTOR <= own <= rate * RATE_FACTOR:
            refused = f"{own:.1f} symbols a second of speech, where the recording has {rate:.1f}"
        given.append(Given(" ".join(said), confidence, refused))
    return given


def _segment(utterance_id: str, start: int, end: int, given: Given, forced: bool, by: str) -> Segment:
    refused = given.refused
    if refused is None and forced and by == "durations":
        refused = "cut where there is no pause"
    if refused is None and frame_count(end - start) < ctc_frames_needed(given.text):
        refused = "its words need more frames than it has"
    return Segment(
        utterance_id,
        start / SAMPLE_RATE,
        end / SAMPLE_RATE,
        "" if refused else given.text,
        "unlabelled" if refused else "labelled",
        round(given.confidence, 4),
        forced,
        by,
        refused,
    )


def _beside_guess(segment: Segment, guess: Given) -> Segment:
    """With what pass 1 says, where both say something."""
    if segment.label_status != "labelled" or not guess.confidence:
        return segment
    return replace(segment, guess=Guess(round(guess.confidence, 4), guess.text == segment.text))


def _between(pauses: Sequence[Pause], heard: Listening, samples: int) -> Iterator[Stretch]:
    """What lies between pauses; edges shorter than 0.1 s are no speech."""
    edges = [0, *(edge for pause in pauses for edge in (pause.start, pause.end)), samples]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start > 10 * HOP:
            yield Stretch(start, end, heard.speaks(start, end))


def _in_common(stretches: Sequence[Stretch], start: int, end: int) -> int:
    """Samples that they have in common with those from `start` to `end`."""
    return sum(max(min(stretch.end, end) - max(stretch.start, start), 0) for stretch in stretches)
