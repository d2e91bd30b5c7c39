"""Log-probabilities to text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamtrain.vocab import Vocab


@dataclass(frozen=True, slots=True)
class Hypothesis:
    text: str
    confidence: float  # geometric mean, over the frames that say something, of the probability of what they say


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


def join_pieces(texts: Sequence[str]) -> str:
    """The text of a recording from its pieces', in order."""
    return " ".join(text for text in texts if text)
