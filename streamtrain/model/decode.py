"""Decode log-probabilities to text: best path, prefix beam search, word timestamps."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamtrain.model.vocab import Vocab

END = -1  # of a path, in place of an id


@dataclass(frozen=True, slots=True)
class Alternative:
    """Hold a possible text of a clip and its log-probability, summed over all alignments with its frames."""

    text: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class Word:
    """Hold a word with its start and end, s, and its confidence in [0, 1]."""

    text: str
    start: float
    end: float
    confidence: float  # geometric mean of its symbols' probabilities over its frames


@dataclass(frozen=True, slots=True)
class Hypothesis:
    text: str
    confidence: float  # geometric mean of the best path's probabilities over its non-blank frames
    nbest: tuple[Alternative, ...] = ()  # of a beam, best first; `text` is that of the first


def decode_log_probs(log_probs: torch.Tensor, frames: torch.Tensor, vocab: Vocab, beam: int = 0) -> list[Hypothesis]:
    """Return a hypothesis for each row of (B, T, V): its best path, or with a `beam` its most probable text."""
    hypotheses = greedy(log_probs, frames, vocab)
    if beam == 0:
        return hypotheses
    rows = log_probs.cpu().numpy()
    nbest_lists = [prefix_beam(row[:length], vocab, beam) for row, length in zip(rows, frames.tolist(), strict=True)]
    return [
        Hypothesis(nbest[0].text, best_path.confidence, tuple(nbest))
        for best_path, nbest in zip(hypotheses, nbest_lists, strict=True)
    ]


def greedy(log_probs: torch.Tensor, frames: torch.Tensor, vocab: Vocab) -> list[Hypothesis]:
    """Return the best path of each row of (B, T, V), repeats merged and blanks dropped; `frames` is (B,)."""
    best, ids = (tensor.cpu() for tensor in log_probs.max(dim=-1))  # (B, T) each
    return [
        _collapse(ids[row, :length], best[row, :length], vocab)
        for row, length in enumerate(frames.tolist())
    ]  # fmt: skip


def _collapse(ids: torch.Tensor, best: torch.Tensor, vocab: Vocab) -> Hypothesis:
    scores = best[ids != vocab.blank]
    scores = scores if len(scores) else best
    return Hypothesis(_spell(ids.numpy(), vocab), float(scores.mean().exp()) if len(scores) else 0.0)


def word_timestamps(log_probs: npt.NDArray[np.floating], text: str, vocab: Vocab, frame_sec: float) -> list[Word]:
    """Return the words of `text` with their times, by the most probable path of (T, V) that spells it."""
    path = log_probs.argmax(-1)
    if _spell(path, vocab) != text:  # the text is from a beam, not from the best path
        path = best_alignment(log_probs, vocab.encode(text), vocab.blank)
    scores = np.take_along_axis(log_probs, path[:, None], axis=-1)[:, 0]
    space, tokens = vocab.space, vocab.units == "tokens"
    words: list[Word] = []
    symbols: list[int] = []  # of the current word
    frames: list[int] = []
    for frame, symbol in enumerate([*path.tolist(), END]):
        begins = frame == 0 or symbol != path[frame - 1]  # and does not last
        if symbols and (symbol in (space, END) or (tokens and begins and symbol in vocab.written)):
            start, end = frames[0] * frame_sec, (frames[-1] + 1) * frame_sec
            words.append(Word(vocab.decode(symbols), start, end, float(np.exp(scores[frames].mean()))))
            symbols, frames = [], []
        if symbol in vocab.written and symbol != space:
            if begins:
                symbols.append(symbol)
            frames.append(frame)
    return words


def _spell(path: npt.NDArray[np.integer], vocab: Vocab) -> str:
    changes = np.flatnonzero(np.diff(path, prepend=-1))
    return vocab.decode([symbol for symbol in path[changes].tolist() if symbol != vocab.blank])


def best_alignment(log_probs: npt.NDArray[np.floating], ids: Sequence[int], blank: int) -> npt.NDArray[np.int64]:
    """Return the most probable path (T,) of (T, V) that spells `ids`: Viterbi over symbols and blanks between them.

    Raises ValueError if there are too few frames.
    """
    states = np.full(2 * len(ids) + 1, blank)
    states[1::2] = ids
    may_skip = np.zeros(len(states), bool)  # a blank is needed only between equal symbols
    may_skip[2:] = (states[2:] != blank) & (states[2:] != states[:-2])
    score = np.full(len(states), -np.inf)
    score[:2] = 0.0
    steps_back = np.zeros((len(log_probs), len(states)), np.int64)  # from how many states back each state was reached
    for frame, emissions in enumerate(log_probs):
        if frame:
            from_previous, from_second = np.roll(score, 1), np.roll(score, 2)
            from_previous[0] = -np.inf
            from_second[~may_skip] = -np.inf
            options = np.stack([score, from_previous, from_second])
            steps_back[frame] = options.argmax(axis=0)
            score = options.max(axis=0)
        score = score + emissions[states]
    state = len(states) - 1 if len(states) == 1 or score[-1] >= score[-2] else len(states) - 2
    if len(log_probs) and not np.isfinite(score[state]):
        raise ValueError(f"{len(log_probs)} frames cannot spell {len(ids)} symbols")
    path = np.zeros(len(log_probs), np.int64)
    for frame in range(len(log_probs) - 1, -1, -1):
        path[frame] = states[state]
        state -= steps_back[frame, state]
    return path


def prefix_beam(log_probs: npt.NDArray[np.floating], vocab: Vocab, width: int) -> list[Alternative]:
    """Return the most probable texts of one clip, best first, from its log-probabilities (T, V).

    Prefix beam search (Graves & Jaitly 2014): paths that spell the same prefix are summed. Exact if the beam holds
    every prefix; labellings that decode to the same text are listed once, with the log-probability of the best.
    """
    if width < 1:
        raise ValueError(f"a beam of {width}, at least 1 is expected")
    tree = _Prefixes()
    nodes = [tree.root]
    ends_in_blank, ends_in_symbol = np.zeros(1), np.full(1, -np.inf)  # log-probability of each prefix, (beam,)
    for frame in np.asarray(log_probs, np.float64):
        last = np.array([tree.symbol[node] for node in nodes])  # -1 for the empty prefix
        ends_in_either = np.logaddexp(ends_in_blank, ends_in_symbol)
        extended = ends_in_either[:, None] + frame  # (beam, V): each prefix and one more symbol
        nonempty = np.flatnonzero(last >= 0)
        extended[nonempty, last[nonempty]] = ends_in_blank[nonempty] + frame[last[nonempty]]  # repeats need a blank
        extended[:, vocab.blank] = -np.inf
        same_blank = ends_in_either + frame[vocab.blank]
        same_symbol = np.where(last >= 0, ends_in_symbol + frame[last], -np.inf)
        positions = {node: i for i, node in enumerate(nodes)}
        for i, node in enumerate(nodes):  # merge a prefix with the extension that equals it
            parent = positions.get(tree.parent[node])
            if parent is not None:
                same_symbol[i] = np.logaddexp(same_symbol[i], extended[parent, last[i]])
                extended[parent, last[i]] = -np.inf
        scores = np.concatenate([np.logaddexp(same_blank, same_symbol), extended.ravel()])
        best = np.argsort(-scores, kind="stable")[:width]
        best = best[scores[best] > -np.inf]
        same = best[best < len(nodes)]
        parents, symbols = np.divmod(best[best >= len(nodes)] - len(nodes), len(frame))
        nodes = [nodes[i] for i in same] + [tree.child(nodes[i], int(c)) for i, c in zip(parents, symbols, strict=True)]
        ends_in_blank = np.concatenate([same_blank[same], np.full(len(parents), -np.inf)])
        ends_in_symbol = np.concatenate([same_symbol[same], extended[parents, symbols]])
    total = np.logaddexp(ends_in_blank, ends_in_symbol)
    best_by_text: dict[str, float] = {}
    for i in np.argsort(-total, kind="stable"):
        best_by_text.setdefault(vocab.decode(tree.spell(nodes[i])), float(total[i]))
    return [Alternative(text, log_prob) for text, log_prob in best_by_text.items()]


class _Prefixes:
    """Hold every prefix visited so far as a tree, in which each node adds one symbol to its parent."""

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
    """Return the text of a recording from its segments' texts, in order."""
    return " ".join(text for text in texts if text)


def join_nbest(segments: Sequence[Sequence[Alternative]]) -> tuple[Alternative, ...]:
    """Return a recording's n-best list from its segments': best first, each text once, as long as the longest."""
    joined: list[Alternative] = [Alternative("", 0.0)]
    for options in segments:
        combined: dict[str, float] = {}
        for before, after in itertools.product(joined, options):
            text, log_prob = join_texts([before.text, after.text]), before.log_prob + after.log_prob
            combined[text] = max(log_prob, combined.get(text, -math.inf))
        best = heapq.nlargest(max(map(len, segments)), combined.items(), key=lambda entry: entry[1])
        joined = [Alternative(text, log_prob) for text, log_prob in best]
    return tuple(joined)
