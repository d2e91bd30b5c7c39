"""When each word of a recording is said, and which words lie before a cut: CTC forward–backward over its whole label.

The probability of every place in the label is summed over all paths that spell it (Graves et al. 2006), so a time comes
with how sure it is. Memory grows with the root of the length: a stretch of frames is computed anew, from states kept on
the way, when its turn comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from streamtrain.vocab import Vocab

Floats = npt.NDArray[np.float64]

NEVER = -1e30  # a log-probability that no sum makes likely; infinities would become NaN
TAIL = 1e-3  # of a boundary's distribution: what lies below is taken for 0, and above its complement for 1
NEAR_FRAMES = 3  # 60 ms: how far a boundary may lie from its time and still count as there


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

    def __init__(self, ids: Sequence[int], blank: int, device: torch.device) -> None:
        self.labels = torch.full((2 * len(ids) + 1,), blank, device=device)
        self.labels[1::2] = torch.as_tensor(ids, dtype=torch.int64, device=device)
        skips = torch.zeros(len(self.labels), dtype=torch.bool, device=device)  # from two states before, over a blank
        skips[2:] = (self.labels[2:] != blank) & (self.labels[2:] != self.labels[:-2])
        self._no_skip = torch.where(skips, 0.0, NEVER)

    def start(self, emitted: torch.Tensor) -> torch.Tensor:
        """Log-probability of each state at the first frame, which emits `emitted` (S,)."""
        here = torch.full_like(emitted, NEVER)
        here[:2] = emitted[:2]
        return here

    def end(self) -> torch.Tensor:
        """Log-probability of what follows the last frame, from each state: a path ends in the last two."""
        after = torch.full_like(self._no_skip, NEVER)
        after[-2:] = 0.0
        return after

    def forward(self, before: torch.Tensor, emitted: torch.Tensor) -> torch.Tensor:
        """From the states of a frame to those of the next, (S,)."""
        one, two = (F.pad(before, (step, 0), value=NEVER)[:-step] for step in (1, 2))
        two = two + self._no_skip
        return torch.logaddexp(torch.logaddexp(before, one), two) + emitted

    def backward(self, after: torch.Tensor, emitted: torch.Tensor) -> torch.Tensor:
        """From what follows a frame to what follows the one before it, (S,)."""
        onward = after + emitted
        one = F.pad(onward, (0, 1), value=NEVER)[1:]
        two = F.pad(onward + self._no_skip, (0, 2), value=NEVER)[2:]
        return torch.logaddexp(torch.logaddexp(onward, one), two)


def align(log_probs: torch.Tensor, text: str, vocab: Vocab, cuts: Sequence[int] = ()) -> Alignment:
    """Align a label with the frames (T, V) of its recording; `cuts` are frames, each of which begins a new piece.

    Raises AlignError where the label does not fit into the frames.
    """
    lattice = Lattice(vocab.encode(text), vocab.blank, log_probs.device)
    words, ends = _words_of(text)
    if not len(log_probs):
        raise AlignError("there are no frames")
    firsts, lasts = (torch.as_tensor(each, dtype=torch.int64, device=log_probs.device) for each in ends)
    found = _Boundaries(2 * len(words), len(log_probs))
    before = np.zeros((len(cuts), len(words) + 1))
    best = log_probs.max(dim=1).values
    gap = np.zeros(len(log_probs))
    log_prob, blocks = _posteriors(log_probs, lattice)
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
    times, sure = found.read()
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


def _words_of(text: str) -> tuple[list[str], tuple[list[int], list[int]]]:
    """The words, and for each the states of its first and its last symbol."""
    spaces = [-1, *(place for place, symbol in enumerate(text) if symbol == " "), len(text)]
    spans = [(start + 1, end) for start, end in pairwise(spaces) if end > start + 1]
    return [text[start:end] for start, end in spans], (
        [2 * start + 1 for start, _ in spans],
        [2 * end - 1 for _, end in spans],
    )


def _posteriors(log_probs: torch.Tensor, lattice: Lattice) -> tuple[float, Iterator[tuple[int, torch.Tensor]]]:
    """The log-probability of the label; and given it the probability of each state at each frame.

    In blocks (frames, S), each with its first frame, the last block first.
    """
    frames = len(log_probs)
    size = max(int(frames**0.5), 1)
    kept: list[torch.Tensor] = []
    total = 0.0
    here = lattice.start(log_probs[0, lattice.labels])
    for frame in range(frames):
        if frame:
            here = lattice.forward(here, log_probs[frame, lattice.labels])
        if frame % size == 0:  # often enough that a float holds it
            total += float(highest := here.max())
            here = here - highest
            kept.append(here)
    total += float(torch.logsumexp(here[-2:], 0))
    if total < NEVER / 2:
        raise AlignError(f"{frames} frames cannot spell {len(lattice.labels) // 2} symbols")
    return total, _backward(log_probs, lattice, kept, size)


def _backward(
    log_probs: torch.Tensor, lattice: Lattice, kept: Sequence[torch.Tensor], size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """From the forward pass at the first frame of each block of `size` frames."""
    frames = len(log_probs)
    after = lattice.end()
    for block in range(len(kept) - 1, -1, -1):
        first, last = block * size, min((block + 1) * size, frames)
        forward = [kept[block]]
        for frame in range(first + 1, last):
            forward.append(lattice.forward(forward[-1], log_probs[frame, lattice.labels]))
        backward = []
        for frame in range(last - 1, first - 1, -1):
            if frame < frames - 1:
                after = lattice.backward(after, log_probs[frame + 1, lattice.labels])
            backward.append(after)
        yield first, torch.softmax(torch.stack(forward) + torch.stack(backward[::-1]), dim=1)
        after = after - after.max()


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

    def read(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """The median of each boundary's time, and how much of its distribution lies near there."""
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

        near = passed_at(self._times + NEAR_FRAMES, 1.0) - passed_at(self._times - NEAR_FRAMES - 1, 0.0)
        return self._times, np.clip(near, 0, 1)
