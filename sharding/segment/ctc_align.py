"""When each word of a recording is said, and which words lie before a cut: CTC forward–backward over its whole label.

The probability of every place in the label is summed over all paths that spell it (Graves et al. 2006), so a time comes
with how sure it is. Memory grows with the root of the length: of a long recording a stretch of frames is computed anew,
from states kept on the way, when its turn comes. This brings torch, so that it is imported where it is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import xxhash

Floats = npt.NDArray[np.float64]

LOG_ZERO = -1e30  # a log-probability that no sum makes likely; infinities would become NaN
TAIL = 1e-3  # of a boundary's distribution: what lies below is taken for 0, and above its complement for 1
NEAR_FRAMES = 3  # 60 ms: how far a boundary may lie from its time and still count as there
BLOCK_VALUES = 2**23  # states × frames that are held at once
STEADY_FRAMES = 64  # after so many the largest log-probability is taken off: a float must hold the rest
GAP_FRAMES = 25  # half a second: a word, about
TRIAL_EVERY = 6  # of so many words of a long recording one is left out, for a trial
EVIDENCE_FRAMES = 65_000  # padded frames of the stretches in which evidence for words is sought at once
CERTAIN_NATS = 999.0  # evidence for a word or against it is told up to here


class Spelling(Protocol):
    """Symbols to ids: one id a symbol, and one or none for the space between words."""

    @property
    def blank(self) -> int: ...

    @property
    def blank_inside(self) -> int:
        """The blank between symbols of one word, where it is told from that between words."""
        ...

    def encode(self, text: str) -> list[int]: ...


class AlignError(ValueError):
    """A label that the frames cannot spell."""


@dataclass(frozen=True, slots=True)
class AlignedWord:
    """A word of the label: its frames, and the probability that both its ends lie near theirs."""

    text: str
    first_frame: int
    end_frame: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Alignment:
    words: tuple[AlignedWord, ...]
    log_prob: float  # of the label, over all its paths
    best_log_prob: float  # of the best path there is, whatever it spells
    gap: Floats  # (T,): how much likelier the best path is at each frame than the label is expected to be there, nats
    before: Floats  # (cuts, words + 1): the probability that so many words, whole, lie before each cut


class Lattice:
    """A label as states 0 … 2 L: its symbols at odd places; a blank before, between and after them."""

    def __init__(self, text: str, spelling: Spelling, device: torch.device) -> None:
        ids = spelling.encode(text)
        self.words = text.split()
        space = len(spelling.encode(" "))  # symbols between two words
        begin = np.cumsum([0, *(len(word) + space for word in self.words)])[:-1]
        self.firsts = torch.as_tensor(2 * begin + 1, device=device)  # states of the words' first symbols …
        lengths = [2 * len(word) - 2 for word in self.words]
        self.lasts = self.firsts + torch.as_tensor(lengths, dtype=torch.int64, device=device)  # … and of their last
        self.labels = torch.full((2 * len(ids) + 1,), spelling.blank_inside, device=device)
        self.labels[0] = self.labels[-1] = spelling.blank
        self.labels[self.lasts + 1] = self.labels[self.firsts - 1] = spelling.blank
        self.labels[1::2] = torch.as_tensor(ids, dtype=torch.int64, device=device)
        skips = torch.zeros(len(self.labels), dtype=torch.bool, device=device)  # from two states before, over a blank
        skips[3::2] = self.labels[3::2] != self.labels[1:-2:2]
        self._no_skip = torch.where(skips, 0.0, LOG_ZERO)

    def start(self, emitted: torch.Tensor) -> torch.Tensor:
        """Log-probability of each state at the first frame, which emits `emitted` (S,)."""
        here = torch.full_like(emitted, LOG_ZERO)
        here[:2] = emitted[:2]
        return here

    def end(self) -> torch.Tensor:
        """Log-probability of what follows the last frame, from each state: a path ends in the last two."""
        after = torch.full_like(self._no_skip, LOG_ZERO)
        after[-2:] = 0.0
        return after

    def forward(self, first: torch.Tensor, emitted: torch.Tensor) -> tuple[torch.Tensor, float]:
        """From the states of the first of some frames, which emit (T, S), to those of all; and what was taken off."""
        states = torch.full((len(emitted), len(first) + 2), LOG_ZERO, device=first.device)
        states[0, 2:] = first
        stay, one, two = (states[:, start : len(first) + start].unbind() for start in (2, 1, 0))
        skipping, taken_off = torch.empty_like(first), 0.0
        for frame, emits in enumerate(emitted.unbind()[1:], start=1):
            here = stay[frame]
            torch.add(two[frame - 1], self._no_skip, out=skipping)
            torch.logaddexp(stay[frame - 1], one[frame - 1], out=here)
            torch.logaddexp(here, skipping, out=here).add_(emits)
            if frame % STEADY_FRAMES == 0:
                taken_off += float(highest := here.max())
                here -= highest
        return states[:, 2:], taken_off

    def backward(self, last: torch.Tensor, emitted: torch.Tensor) -> torch.Tensor:
        """From what follows the last of some frames to what follows each; `emitted` (T − 1, S) by all but the first."""
        count = len(last)
        after = last.new_empty(len(emitted) + 1, count)
        after[-1] = last
        onward = torch.full((2, count + 2), LOG_ZERO, device=last.device)  # beyond the end nothing is likely
        stay, one, two = onward[0, :count], onward[0, 1 : count + 1], onward[1, 2:]
        rows = after.unbind()
        for frame, emits in zip(range(len(emitted) - 1, -1, -1), reversed(emitted.unbind()), strict=True):
            here = rows[frame]
            torch.add(rows[frame + 1], emits, out=stay)
            torch.add(stay, self._no_skip, out=onward[1, :count])
            torch.logaddexp(stay, one, out=here)
            torch.logaddexp(here, two, out=here)
            if frame % STEADY_FRAMES == 0:
                here -= here.max()
        return after


def align(
    log_probs: torch.Tensor, text: str, spelling: Spelling, cuts: Sequence[int] = (), near: int = NEAR_FRAMES
) -> Alignment:
    """Align a label with the frames (T, V) of its recording; `cuts` are frames, each of which begins a new piece.

    A word's confidence is the probability that its ends lie within `near` frames of where they are told.

    Raises AlignError where the label does not fit into the frames.
    """
    if not len(log_probs):
        raise AlignError("there are no frames")
    lattice = Lattice(text, spelling, log_probs.device)
    words, firsts, lasts = lattice.words, lattice.firsts, lattice.lasts
    found = _Boundaries(2 * len(words), len(log_probs))
    before = np.zeros((len(cuts), len(words) + 1))
    best = log_probs.max(dim=1).values
    gap = np.zeros(len(log_probs))
    log_prob, blocks = posteriors(log_probs, lattice)
    for first, likely in blocks:
        passed = torch.cat([likely.new_zeros(len(likely), 1), likely.cumsum(1)], dim=1)  # (frames, S + 1): states below
        begun, over = 1 - passed[:, firsts], 1 - passed[:, lasts + 1]  # (frames, words) each
        found.add(first, torch.cat([begun, over], dim=1).double().cpu().numpy())
        here = slice(first, first + len(likely))
        gap[here] = (best[here] - (likely * log_probs[here, lattice.labels]).sum(1)).double().cpu().numpy()
        for number, cut in enumerate(cuts):
            if first <= cut < first + len(likely):
                at = passed[cut - first]
                edges = torch.cat([at[firsts], at[-1:]]) - torch.cat([at[:1], at[lasts + 1]])
                before[number] = edges.double().cpu().numpy()
    times, sure = found.read(near)
    return Alignment(
        words=tuple(
            AlignedWord(word, int(start), max(int(end), int(start) + 1), float(min(sure_start, sure_end)))
            for word, start, end, sure_start, sure_end in zip(
                words, times[: len(words)], times[len(words) :], sure[: len(words)], sure[len(words) :], strict=True
            )
        ),
        log_prob=log_prob,
        best_log_prob=float(best.double().sum()),
        gap=gap,
        before=before,
    )


def posteriors(log_probs: torch.Tensor, lattice: Lattice) -> tuple[float, Iterator[tuple[int, torch.Tensor]]]:
    """The log-probability of the label; and given it the probability of each state at each frame.

    In blocks (frames, S), each with its first frame, the last block first. Raises AlignError where no path spells it.
    """
    frames = len(log_probs)
    size = min(max(isqrt(frames), BLOCK_VALUES // len(lattice.labels)), frames)
    kept: list[torch.Tensor] = []
    here, total = lattice.start(log_probs[0, lattice.labels]), 0.0
    for first in range(0, frames, size):
        total += float(highest := here.max())
        kept.append(here - highest)
        last = min(first + size + 1, frames)  # the first of the next block with it
        states, taken_off = lattice.forward(kept[-1], log_probs[first:last, lattice.labels])
        here, total = states[-1], total + taken_off
    total += float(torch.logsumexp(here[-2:], 0))
    if not total >= LOG_ZERO / 2:  # nor where it is no number
        raise AlignError(f"{frames} frames cannot spell {len(lattice.labels) // 2} symbols")
    return total, _backward(log_probs, lattice, kept, size, states if len(kept) == 1 else None)


def _backward(
    log_probs: torch.Tensor, lattice: Lattice, kept: Sequence[torch.Tensor], size: int, known: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """From the forward pass at the first frame of each block of `size` frames; `known` is all of it, if it is."""
    after = lattice.end()
    for block in range(len(kept) - 1, -1, -1):
        first = block * size
        emitted = log_probs[first : first + size + 1, lattice.labels]
        forward = lattice.forward(kept[block], emitted[:size])[0] if known is None else known
        backward = lattice.backward(after, emitted[1:])
        after = backward[0] - backward[0].max()
        yield first, torch.softmax(forward + backward[: len(forward)], dim=1)


class _Boundaries:
    """Of each boundary the probability that it has been passed, frame by frame, told in blocks from the last on."""

    def __init__(self, boundaries: int, frames: int) -> None:
        self._frames = frames
        self._times = np.full(boundaries, frames)  # the first frame at which it has more likely been passed than not
        self._keys: list[npt.NDArray[np.int64]] = []  # boundary × frames + frame …
        self._values: list[Floats] = []  # … and its probability, where that is neither 0 nor 1

    def add(self, first: int, passed: Floats) -> None:
        """`passed` (frames, boundaries), from frame `first` on."""
        likely = passed >= 0.5
        reached = likely.any(axis=0)
        self._times[reached] = first + likely.argmax(axis=0)[reached]
        frame, boundary = np.nonzero((passed > TAIL) & (passed < 1 - TAIL))
        self._keys.append(boundary * self._frames + first + frame)
        self._values.append(passed[frame, boundary])

    def read(self, near: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """The median of each boundary's time, and how much of its distribution lies so many frames around it."""
        keys = np.concatenate([*self._keys, np.zeros(0, np.int64)])
        order = np.argsort(keys)
        keys, values = keys[order], np.concatenate([*self._values, np.zeros(0)])[order]

        def passed_at(times: npt.NDArray[np.int64], otherwise: float) -> Floats:
            wanted = np.arange(len(times)) * self._frames + np.clip(times, 0, self._frames - 1)
            place = np.searchsorted(keys, wanted)
            known = (place < len(keys)) & (times >= 0) & (times < self._frames)
            known[known] = keys[place[known]] == wanted[known]
            result = np.full(len(times), otherwise)
            result[known] = values[place[known]]
            return result

        there = passed_at(self._times + near, 1.0) - passed_at(self._times - near - 1, 0.0)
        return self._times, np.clip(there, 0, 1)


# --- how well a label is heard ----------------------------------------------------------------------------------


def word_llrs(
    log_probs: torch.Tensor, words: Sequence[AlignedWord], spelling: Spelling
) -> tuple[list[float], list[float]]:
    """By how many nats the frames (T, V) speak for each word, and for its order with the next.

    log P(the word and its neighbours) − log P(these alone), of the frames from where the word before it begins to where
    the word after it ends; and log P(it, the next and their neighbours) − log P(the same with the two the other way
    round). Of the last word, and of one that is said twice, the order is certain.
    """
    texts = [word.text for word in words]
    trials = [_trial(words, place, 1, texts[place : place + 1], []) for place in range(len(words))]
    pairs = [place for place in range(len(words) - 1) if texts[place] != texts[place + 1]]
    trials += [_trial(words, place, 2, texts[place : place + 2], texts[place : place + 2][::-1]) for place in pairs]
    stretches, labels = [], []
    for frames, *both in trials:
        for said in both:
            stretches.append(log_probs[frames])
            labels.append(torch.tensor(spelling.encode(said), dtype=torch.int64, device=log_probs.device))
    losses = torch.zeros(len(labels))
    for chosen in _batches([len(stretch) for stretch in stretches]):
        losses[chosen] = F.ctc_loss(
            torch.nn.utils.rnn.pad_sequence([stretches[i] for i in chosen]),  # (T, B, V)
            torch.nn.utils.rnn.pad_sequence([labels[i] for i in chosen], batch_first=True),
            torch.tensor([len(stretches[i]) for i in chosen]),
            torch.tensor([len(labels[i]) for i in chosen]),
            blank=spelling.blank,
            reduction="none",
        ).cpu()
    found = torch.nan_to_num(losses[1::2] - losses[::2], nan=-CERTAIN_NATS).clamp(-CERTAIN_NATS, CERTAIN_NATS).tolist()
    order = [CERTAIN_NATS] * len(words)
    for place, nats in zip(pairs, found[len(words) :], strict=True):
        order[place] = nats
    return found[: len(words)], order


def _trial(
    words: Sequence[AlignedWord], place: int, count: int, said: Sequence[str], instead: Sequence[str]
) -> tuple[slice, str, str]:
    """The frames around some words, what is said there with their neighbours, and what would be instead."""
    first = words[place - 1].first_frame if place else None
    end = words[place + count].end_frame if place + count < len(words) else None
    before, after = ([word.text for word in words[max(at, 0) : at + 1]] for at in (place - 1, place + count))
    return slice(first, end), " ".join([*before, *said, *after]), " ".join([*before, *instead, *after])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of like lengths, so many at once that they are EVIDENCE_FRAMES padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        count = max(EVIDENCE_FRAMES // max(lengths[order[start]], 1), 1)
        yield order[start : start + count]
        start += count


def deletion_gaps(
    log_probs: torch.Tensor, words: Sequence[AlignedWord], name: str, spelling: Spelling, width: int = GAP_FRAMES
) -> list[float]:
    """Leave out one word of every six, the first by the recording's name, and see how its surroundings look then."""
    gaps: list[float] = []
    if not words:
        return gaps
    first = xxhash.xxh3_64_intdigest(name.encode()) % TRIAL_EVERY
    for place in range(first % len(words), len(words), TRIAL_EVERY):
        around = [at for at in range(place - 2, place + 3) if 0 <= at < len(words)]
        frames = log_probs[words[around[0]].first_frame : words[around[-1]].end_frame]
        rest = " ".join(words[at].text for at in around if at != place)
        with suppress(AlignError):
            gaps += worst_gaps(align(frames, rest, spelling).gap, (), width)
    return gaps


def worst_gaps(gap: Floats, cuts: Sequence[int], width: int = GAP_FRAMES) -> list[float]:
    """Of each piece the largest sum over so many frames, by default half a second, or over all that it has."""
    gaps = []
    for start, end in pairwise([0, *cuts, len(gap)]):
        passed = np.concatenate([[0.0], np.cumsum(gap[start:end])])
        here = min(width, end - start)
        gaps.append(float((passed[here:] - passed[: len(passed) - here]).max()) if here else 0.0)
    return gaps
