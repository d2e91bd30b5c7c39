"""Log-probabilities to text."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamtrain.model.vocab import Vocab


@dataclass(frozen=True, slots=True)
class Alternative:
    """A labelling of a clip, and the probability that its frames spell it, over all the ways to align them."""

    text: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class Word:
    """One word, from its first frame to the end of its last."""

    text: str
    first_frame: int
    end_frame: int
    confidence: float  # geometric mean of the probability of its symbols over those frames


@dataclass(frozen=True, slots=True)
class Hypothesis:
    text: str
    confidence: float  # geometric mean, over the frames that say something, of the probability of what they say
    nbest: tuple[Alternative, ...] = ()  # of a beam, best first: the text is the first one's


def decode_log_probs(log_probs: torch.Tensor, frames: torch.Tensor, vocab: Vocab, beam: int = 0) -> list[Hypothesis]:
    """What each row of (B, T, V) says; by its best path, or with a `beam` by what most of its paths spell."""
    hypotheses = greedy(log_probs, frames, vocab)
    if beam == 0:
        return hypotheses
    rows = log_probs.cpu().numpy()
    found = [prefix_beam(row[:length], vocab, beam) for row, length in zip(rows, frames.tolist(), strict=True)]
    return [
        Hypothesis(alternatives[0].text, best_path.confidence, tuple(alternatives))
        for best_path, alternatives in zip(hypotheses, found, strict=True)
    ]


def greedy(log_probs: torch.Tensor, frames: torch.Tensor, vocab: Vocab) -> list[Hypothesis]:
    """The best path of each row of (B, T, V), its repeats merged and its blanks dropped; `frames` is (B,)."""
    best, ids = (tensor.cpu() for tensor in log_probs.max(dim=-1))  # (B, T) each
    return [
        _collapse(ids[row, :length], best[row, :length], vocab)
        for row, length in enumerate(frames.tolist())
    ]  # fmt: skip


def _collapse(ids: torch.Tensor, best: torch.Tensor, vocab: Vocab) -> Hypothesis:
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[1:] = ids[1:] != ids[:-1]
    spoken = ids != vocab.blank
    text = vocab.decode(ids[kept & spoken].tolist())
    heard = best[spoken] if bool(spoken.any()) else best
    return Hypothesis(text, float(heard.mean().exp()) if len(heard) else 0.0)


def word_timestamps(log_probs: npt.NDArray[np.floating], text: str, vocab: Vocab) -> list[Word]:
    """When the words of a text are said, by the most probable path of the frames (T, V) that spells it."""
    path = log_probs.argmax(-1)
    if _spell(path, vocab) != text:  # it is not the best path's, but a beam's
        path = best_alignment(log_probs, vocab.encode(text), vocab.blank)
    heard = np.take_along_axis(log_probs, path[:, None], axis=-1)[:, 0]
    silent, space = (vocab.blank, vocab.unknown), vocab.space
    words: list[Word] = []
    symbols: list[str] = []
    frames: list[int] = []
    for frame, symbol in enumerate([*path.tolist(), space]):
        if symbol == space and symbols:
            words.append(Word("".join(symbols), frames[0], frames[-1] + 1, float(np.exp(heard[frames].mean()))))
            symbols, frames = [], []
        elif symbol not in (*silent, space):
            if not frames or frame == 0 or symbol != path[frame - 1]:
                symbols.append(vocab.tokens[symbol])
            frames.append(frame)
    return words


def _spell(path: npt.NDArray[np.integer], vocab: Vocab) -> str:
    kept = np.flatnonzero(np.diff(path, prepend=-1))
    return vocab.decode([symbol for symbol in path[kept].tolist() if symbol != vocab.blank])


def best_alignment(log_probs: npt.NDArray[np.floating], ids: Sequence[int], blank: int) -> npt.NDArray[np.int64]:
    """The most probable path (T,) of the frames (T, V) that spells `ids`: Viterbi over symbols and blanks between them.

    Raises ValueError where there are too few frames.
    """
    states = np.full(2 * len(ids) + 1, blank)
    states[1::2] = ids
    may_skip = np.zeros(len(states), bool)  # a blank is needed only between equal symbols
    may_skip[2:] = (states[2:] != blank) & (states[2:] != states[:-2])
    score = np.full(len(states), -np.inf)
    score[:2] = 0.0
    came = np.zeros((len(log_probs), len(states)), np.int64)  # how many states back
    for frame, emitted in enumerate(log_probs):
        if frame:
            one, two = np.roll(score, 1), np.roll(score, 2)
            one[0] = -np.inf
            two[~may_skip] = -np.inf
            options = np.stack([score, one, two])
            came[frame] = options.argmax(axis=0)
            score = options.max(axis=0)
        score = score + emitted[states]
    state = len(states) - 1 if len(states) == 1 or score[-1] >= score[-2] else len(states) - 2
    if len(log_probs) and not np.isfinite(score[state]):
        raise ValueError(f"{len(log_probs)} frames cannot spell {len(ids)} symbols")
    path = np.zeros(len(log_probs), np.int64)
    for frame in range(len(log_probs) - 1, -1, -1):
        path[frame] = states[state]
        state -= came[frame, state]
    return path


def prefix_beam(log_probs: npt.NDArray[np.floating], vocab: Vocab, width: int) -> list[Alternative]:
    """The most probable labellings of one clip, best first, from its log-probabilities (T, V).

    Prefix beam search (Graves & Jaitly 2014): paths that spell the same are summed, not merely the best one kept.
    Exact where the beam holds every prefix; labellings that decode to one text are listed once, by the best of them.
    """
    if width < 1:
        raise ValueError(f"a beam of {width} holds nothing")
    tree = _Prefixes()
    nodes = [tree.root]
    ends_in_blank, ends_in_symbol = np.zeros(1), np.full(1, -np.inf)  # log-probability of each prefix, (beam,)
    for frame in np.asarray(log_probs, np.float64):
        last = np.array([tree.symbol[node] for node in nodes])  # -1: of the empty prefix
        either = np.logaddexp(ends_in_blank, ends_in_symbol)
        longer = either[:, None] + frame  # (beam, V): each prefix with one symbol more
        spoken = np.flatnonzero(last >= 0)
        longer[spoken, last[spoken]] = ends_in_blank[spoken] + frame[last[spoken]]  # a repeat needs a blank between
        longer[:, vocab.blank] = -np.inf
        same_blank = either + frame[vocab.blank]
        same_symbol = np.where(last >= 0, ends_in_symbol + frame[last], -np.inf)
        place = {node: i for i, node in enumerate(nodes)}
        for i, node in enumerate(nodes):  # a prefix that another one of the beam grows into is that one
            parent = place.get(tree.parent[node])
            if parent is not None:
                same_symbol[i] = np.logaddexp(same_symbol[i], longer[parent, last[i]])
                longer[parent, last[i]] = -np.inf
        scores = np.concatenate([np.logaddexp(same_blank, same_symbol), longer.ravel()])
        kept = np.argsort(-scores, kind="stable")[:width]
        kept = kept[scores[kept] > -np.inf]
        stay = kept[kept < len(nodes)]
        grown, symbols = np.divmod(kept[kept >= len(nodes)] - len(nodes), len(frame))
        nodes = [nodes[i] for i in stay] + [tree.child(nodes[i], int(c)) for i, c in zip(grown, symbols, strict=True)]
        ends_in_blank = np.concatenate([same_blank[stay], np.full(len(grown), -np.inf)])
        ends_in_symbol = np.concatenate([same_symbol[stay], longer[grown, symbols]])
    total = np.logaddexp(ends_in_blank, ends_in_symbol)
    found: dict[str, float] = {}
    for i in np.argsort(-total, kind="stable"):
        found.setdefault(vocab.decode(tree.spell(nodes[i])), float(total[i]))
    return [Alternative(text, log_prob) for text, log_prob in found.items()]


class _Prefixes:
    """Every prefix that was ever looked at, each as a symbol more than its parent."""

    root = 0

    def __init__(self) -> None:
        self.parent, self.symbol = [-1], [-1]
        self._children: dict[tuple[int, int], int] = {}

    def child(self, node: int, symbol: int) -> int:
        number = self._children.setdefault((node, symbol), len(self.parent))
        if number == len(self.parent):
            self.parent.append(node)
            self.symbol.append(symbol)
        return number

    def spell(self, node: int) -> list[int]:
        symbols = []
        while node != self.root:
            symbols.append(self.symbol[node])
            node = self.parent[node]
        return symbols[::-1]


def join_texts(texts: Sequence[str]) -> str:
    """The text of a recording from its pieces', in order."""
    return " ".join(text for text in texts if text)


def join_nbest(pieces: Sequence[Sequence[Alternative]]) -> tuple[Alternative, ...]:
    """Those of a recording, best first, as many as a piece has at most; each text once, by its best pieces."""
    joined: list[Alternative] = [Alternative("", 0.0)]
    for options in pieces:
        both: dict[str, float] = {}
        for before, after in itertools.product(joined, options):
            text, log_prob = join_texts([before.text, after.text]), before.log_prob + after.log_prob
            both[text] = max(log_prob, both.get(text, -math.inf))
        best = heapq.nlargest(max(map(len, pieces)), both.items(), key=lambda one: one[1])
        joined = [Alternative(text, log_prob) for text, log_prob in best]
    return tuple(joined)
