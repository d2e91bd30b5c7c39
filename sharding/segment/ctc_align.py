"""Align a label with its recording by CTC forward–backward: word times, and the words that lie before each cut.

The probability of each state is summed over all paths that spell the label (Graves et al. 2006), so each time has a
confidence. Memory grows with the square root of the length: the backward pass recomputes the forward states of a block
of frames from a checkpoint at its start. This module imports torch, so import it only when needed.
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

LOG_ZERO = -1e30  # a log-probability that stays negligible in every sum; infinities would become NaN
TAIL = 1e-3  # of a boundary's distribution: lower probabilities count as 0, those above the complement as 1
NEAR_FRAMES = 3  # 60 ms: largest distance of a boundary from its time that still counts as correct
BLOCK_VALUES = 2**23  # states × frames in memory at once
STEADY_FRAMES = 64  # frames between subtractions of the largest log-probability, which keep float precision
GAP_FRAMES = 25  # half a second: about one word
TRIAL_EVERY = 6  # one of this many words of a long recording is left out in a trial
EVIDENCE_FRAMES = 65_000  # padded frames in one batch of excerpts around words
CERTAIN_NATS = 999.0  # evidence for or against a word is clipped to this


class Spelling(Protocol):
    """Map symbols to ids: one id per symbol of the labels' units, and one or none for the space between words."""

    @property
    def blank(self) -> int: ...

    @property
    def blank_inside(self) -> int:
        """Return the id of the blank within a word, which may differ from that between words."""
        ...

    def encode(self, text: str) -> list[int]: ...


class AlignError(ValueError):
    """Report a label that the frames cannot spell."""


@dataclass(frozen=True, slots=True)
class AlignedWord:
    """Hold a word's frames, and as its confidence the lower probability of its two boundaries to lie near them."""

    text: str
    first_frame: int
    end_frame: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Alignment:
    words: tuple[AlignedWord, ...]
    log_prob: float  # of the label, summed over its paths
    best_log_prob: float  # of the best path, whatever it spells
    gap: Floats  # (T,): nats, log-probability of the best path minus the expected one of the label, at each frame
    before: Floats  # (cuts, words + 1): probability of each number of whole words before each cut


class Lattice:
    """Hold a label as states 0 … 2 L: its symbols at odd places; a blank before, between and after them."""

    def __init__(self, text: str, spelling: Spelling, device: torch.device) -> None:
        ids = spelling.encode(text)
        self.words = text.split()
        space = len(spelling.encode(" "))  # symbols between two words
        sizes = [len(spelling.encode(word)) for word in self.words]
        starts = np.cumsum([0, *(size + space for size in sizes)])[:-1]
        self.firsts = torch.as_tensor(2 * starts + 1, device=device)  # states of the words' first symbols …
        lengths = [2 * size - 2 for size in sizes]
        self.lasts = self.firsts + torch.as_tensor(lengths, dtype=torch.int64, device=device)  # … and of their last
        self.labels = torch.full((2 * len(ids) + 1,), spelling.blank_inside, device=device)
        self.labels[0] = self.labels[-1] = spelling.blank
        self.labels[self.lasts + 1] = self.labels[self.firsts - 1] = spelling.blank
        self.labels[1::2] = torch.as_tensor(ids, dtype=torch.int64, device=device)
        skips = torch.zeros(len(self.labels), dtype=torch.bool, device=device)  # from two states before, over a blank
        skips[3::2] = self.labels[3::2] != self.labels[1:-2:2]
        self._no_skip = torch.where(skips, 0.0, LOG_ZERO)

    def start(self, emitted: torch.Tensor) -> torch.Tensor:
        """Return the forward log-probability of each state at the first frame, which emits `emitted` (S,)."""
        states = torch.full_like(emitted, LOG_ZERO)
        states[:2] = emitted[:2]
        return states

    def end(self) -> torch.Tensor:
        """Return the backward log-probability of each state at the last frame: a path ends in the last two states."""
        after = torch.full_like(self._no_skip, LOG_ZERO)
        after[-2:] = 0.0
        return after

    def forward(self, first: torch.Tensor, emitted: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return alpha (T, S) of frames that emit `emitted`, given `first`, that of the first; and its log scale."""
        states = torch.full((len(emitted), len(first) + 2), LOG_ZERO, device=first.device)
        states[0, 2:] = first
        stay, step, skip = (states[:, start : len(first) + start].unbind() for start in (2, 1, 0))
        skipped, subtracted = torch.empty_like(first), 0.0
        for frame, emits in enumerate(emitted.unbind()[1:], start=1):
            current = stay[frame]
            torch.add(skip[frame - 1], self._no_skip, out=skipped)
            torch.logaddexp(stay[frame - 1], step[frame - 1], out=current)
            torch.logaddexp(current, skipped, out=current).add_(emits)
            if frame % STEADY_FRAMES == 0:
                subtracted += float(highest := current.max())
                current -= highest
        return states[:, 2:], subtracted

    def backward(self, last: torch.Tensor, emitted: torch.Tensor) -> torch.Tensor:
        """Return beta (T, S) of frames, given `last`, that of the last; all but the first emit `emitted` (T − 1, S)."""
        count = len(last)
        after = last.new_empty(len(emitted) + 1, count)
        after[-1] = last
        onward = torch.full((2, count + 2), LOG_ZERO, device=last.device)  # nothing is likely beyond the end
        stay, step, skip = onward[0, :count], onward[0, 1 : count + 1], onward[1, 2:]
        rows = after.unbind()
        for frame, emits in zip(range(len(emitted) - 1, -1, -1), reversed(emitted.unbind()), strict=True):
            current = rows[frame]
            torch.add(rows[frame + 1], emits, out=stay)
            torch.add(stay, self._no_skip, out=onward[1, :count])
            torch.logaddexp(stay, step, out=current)
            torch.logaddexp(current, skip, out=current)
            if frame % STEADY_FRAMES == 0:
                current -= current.max()
        return after


def align(
    log_probs: torch.Tensor, text: str, spelling: Spelling, cuts: Sequence[int] = (), near: int = NEAR_FRAMES
) -> Alignment:
    """Align a label with log-probabilities (T, V) of its recording; each of `cuts` is the first frame of a segment.

    A word's confidence is the lower probability of its two boundaries to lie within `near` frames of their times.
    Raises AlignError if the label does not fit into the frames.
    """
    if not len(log_probs):
        raise AlignError("there are no frames")
    lattice = Lattice(text, spelling, log_probs.device)
    words, firsts, lasts = lattice.words, lattice.firsts, lattice.lasts
    boundaries = _Boundaries(2 * len(words), len(log_probs))
    before = np.zeros((len(cuts), len(words) + 1))
    best = log_probs.max(dim=1).values
    gap = np.zeros(len(log_probs))
    log_prob, blocks = posteriors(log_probs, lattice)
    for first, posterior in blocks:
        below = torch.cat([posterior.new_zeros(len(posterior), 1), posterior.cumsum(1)], dim=1)  # (frames, S + 1)
        begun, ended = 1 - below[:, firsts], 1 - below[:, lasts + 1]  # (frames, words) each
        boundaries.add(first, torch.cat([begun, ended], dim=1).double().cpu().numpy())
        frames = slice(first, first + len(posterior))
        gap[frames] = (best[frames] - (posterior * log_probs[frames, lattice.labels]).sum(1)).double().cpu().numpy()
        for number, cut in enumerate(cuts):
            if first <= cut < first + len(posterior):
                at = below[cut - first]
                edges = torch.cat([at[firsts], at[-1:]]) - torch.cat([at[:1], at[lasts + 1]])
                before[number] = edges.double().cpu().numpy()
    times, mass = boundaries.read(near)
    return Alignment(
        words=tuple(
            AlignedWord(word, int(start), max(int(end), int(start) + 1), float(min(start_mass, end_mass)))
            for word, start, end, start_mass, end_mass in zip(
                words, times[: len(words)], times[len(words) :], mass[: len(words)], mass[len(words) :], strict=True
            )
        ),
        log_prob=log_prob,
        best_log_prob=float(best.double().sum()),
        gap=gap,
        before=before,
    )


def posteriors(log_probs: torch.Tensor, lattice: Lattice) -> tuple[float, Iterator[tuple[int, torch.Tensor]]]:
    """Return the label's log-probability, and the posterior probability of each state at each frame, given the label.

    The posteriors come in blocks (frames, S), each with its first frame, the last block first. Raises AlignError if no
    path spells the label.
    """
    frames = len(log_probs)
    size = min(max(isqrt(frames), BLOCK_VALUES // len(lattice.labels)), frames)
    checkpoints: list[torch.Tensor] = []  # the first states of each block
    state, total = lattice.start(log_probs[0, lattice.labels]), 0.0
    for first in range(0, frames, size):
        total += float(highest := state.max())
        checkpoints.append(state - highest)
        last = min(first + size + 1, frames)  # includes the first frame of the next block
        states, subtracted = lattice.forward(checkpoints[-1], log_probs[first:last, lattice.labels])
        state, total = states[-1], total + subtracted
    total += float(torch.logsumexp(state[-2:], 0))
    if not total >= LOG_ZERO / 2:  # also if it is NaN
        raise AlignError(f"{frames} frames cannot spell {len(lattice.labels) // 2} symbols")
    return total, _backward(log_probs, lattice, checkpoints, size, states if len(checkpoints) == 1 else None)


def _backward(
    log_probs: torch.Tensor, lattice: Lattice, starts: Sequence[torch.Tensor], size: int, whole: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the posteriors of each block of `size` frames, last first, from checkpoints `starts` or `whole` alpha."""
    after = lattice.end()
    for block in range(len(starts) - 1, -1, -1):
        first = block * size
        emitted = log_probs[first : first + size + 1, lattice.labels]
        forward = lattice.forward(starts[block], emitted[:size])[0] if whole is None else whole
        backward = lattice.backward(after, emitted[1:])
        after = backward[0] - backward[0].max()
        yield first, torch.softmax(forward + backward[: len(forward)], dim=1)


class _Boundaries:
    """Collect the probability that each boundary has been passed, per frame, from blocks that come last first."""

    def __init__(self, boundaries: int, frames: int) -> None:
        self._frames = frames
        self._times = np.full(boundaries, frames)  # the first frame with a probability of at least 0.5
        self._keys: list[npt.NDArray[np.int64]] = []  # boundary × frames + frame …
        self._values: list[Floats] = []  # … and its probability, if that is neither 0 nor 1

    def add(self, first: int, passed: Floats) -> None:
        """Add a block of probabilities (frames, boundaries) that begins at frame `first`."""
        likely = passed >= 0.5
        reached = likely.any(axis=0)
        self._times[reached] = first + likely.argmax(axis=0)[reached]
        frame, boundary = np.nonzero((passed > TAIL) & (passed < 1 - TAIL))
        self._keys.append(boundary * self._frames + first + frame)
        self._values.append(passed[frame, boundary])

    def read(self, near: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return the median time of each boundary, and the probability that it lies within `near` frames of that."""
        keys = np.concatenate([*self._keys, np.zeros(0, np.int64)])
        order = np.argsort(keys)
        keys, values = keys[order], np.concatenate([*self._values, np.zeros(0)])[order]

        def passed_at(times: npt.NDArray[np.int64], default: float) -> Floats:
            wanted = np.arange(len(times)) * self._frames + np.clip(times, 0, self._frames - 1)
            place = np.searchsorted(keys, wanted)
            known = (place < len(keys)) & (times >= 0) & (times < self._frames)
            known[known] = keys[place[known]] == wanted[known]
            result = np.full(len(times), default)
            result[known] = values[place[known]]
            return result

        within = passed_at(self._times + near, 1.0) - passed_at(self._times - near - 1, 0.0)
        return self._times, np.clip(within, 0, 1)


# --- how well a label fits --------------------------------------------------------------------------------------


def word_llrs(
    log_probs: torch.Tensor, words: Sequence[AlignedWord], spelling: Spelling
) -> tuple[list[float], list[float]]:
    """Return the log-likelihood ratio, in nats, of each word, and of its order with the next, given frames (T, V).

    A word's ratio is log P(the word and its neighbours) − log P(the neighbours alone), over the frames from the start
    of the word before it to the end of the word after it. That of the order is log P(it, the next and their neighbours)
    − log P(the same with the two swapped); it is certain for the last word, and for two equal words.
    """
    texts = [word.text for word in words]
    trials = [_trial(words, place, 1, texts[place : place + 1], []) for place in range(len(words))]
    pairs = [place for place in range(len(words) - 1) if texts[place] != texts[place + 1]]
    trials += [_trial(words, place, 2, texts[place : place + 2], texts[place : place + 2][::-1]) for place in pairs]
    excerpts, labels = [], []
    for frames, *alternatives in trials:
        for text in alternatives:
            excerpts.append(log_probs[frames])
            labels.append(torch.tensor(spelling.encode(text), dtype=torch.int64, device=log_probs.device))
    losses = torch.zeros(len(labels))
    for chosen in _batches([len(excerpt) for excerpt in excerpts]):
        losses[chosen] = F.ctc_loss(
            torch.nn.utils.rnn.pad_sequence([excerpts[i] for i in chosen]),  # (T, B, V)
            torch.nn.utils.rnn.pad_sequence([labels[i] for i in chosen], batch_first=True),
            torch.tensor([len(excerpts[i]) for i in chosen]),
            torch.tensor([len(labels[i]) for i in chosen]),
            blank=spelling.blank,
            reduction="none",
        ).cpu()
    ratios = torch.nan_to_num(losses[1::2] - losses[::2], nan=-CERTAIN_NATS).clamp(-CERTAIN_NATS, CERTAIN_NATS).tolist()
    order = [CERTAIN_NATS] * len(words)
    for place, nats in zip(pairs, ratios[len(words) :], strict=True):
        order[place] = nats
    return ratios[: len(words)], order


def _trial(
    words: Sequence[AlignedWord], place: int, count: int, spoken: Sequence[str], instead: Sequence[str]
) -> tuple[slice, str, str]:
    """Return the frames of `count` words and their neighbours, and their text before and after the replacement."""
    first = words[place - 1].first_frame if place else None
    end = words[place + count].end_frame if place + count < len(words) else None
    before, after = ([word.text for word in words[max(at, 0) : at + 1]] for at in (place - 1, place + count))
    return slice(first, end), " ".join([*before, *spoken, *after]), " ".join([*before, *instead, *after])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of indices of similar lengths, each of EVIDENCE_FRAMES padded frames at most, or one index."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        count = max(EVIDENCE_FRAMES // max(lengths[order[start]], 1), 1)
        yield order[start : start + count]
        start += count


def deletion_gaps(
    log_probs: torch.Tensor, words: Sequence[AlignedWord], name: str, spelling: Spelling, width: int = GAP_FRAMES
) -> list[float]:
    """Return the gaps around a word left out, for every sixth word; the recording's name selects the first."""
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
    """Return each segment's largest sum over `width` frames, by default half a second, or over all if it has fewer."""
    gaps = []
    for start, end in pairwise([0, *cuts, len(gap)]):
        totals = np.concatenate([[0.0], np.cumsum(gap[start:end])])
        span = min(width, end - start)
        gaps.append(float((totals[span:] - totals[: len(totals) - span]).max()) if span else 0.0)
    return gaps
