"""What the beam finds is what summing over every path finds."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.model.decode import (
    Alternative,
    best_alignment,
    decode_log_probs,
    greedy,
    join_nbest,
    prefix_beam,
    word_timestamps,
)
from streamtrain.model.vocab import BLANK, SPACE, UNKNOWN, Vocab

VOCAB = Vocab((BLANK, SPACE, "a", "b", UNKNOWN))
FRAMES = 5


def log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def every_labelling(log_probs: npt.NDArray[np.float64]) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of ids, by summing over all V^T paths."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = tuple(one for one, _ in itertools.groupby(path) if one != VOCAB.blank)
        found[merged] += float(np.exp(sum(frame[one] for frame, one in zip(log_probs, path, strict=True))))
    return found


@st.composite
def scores(draw: st.DrawFn) -> npt.NDArray[np.float64]:
    frames = draw(st.integers(0, FRAMES))
    peaked = draw(st.sampled_from([0.5, 2.0, 6.0]))
    return log_softmax(peaked * np.random.default_rng(draw(st.integers(0, 9999))).normal(size=(frames, len(VOCAB))))


@settings(max_examples=60, deadline=None)
@given(scores())
def test_a_beam_that_holds_all_prefixes_finds_every_labelling_with_its_probability(
    log_probs: npt.NDArray[np.float64],
) -> None:
    texts: dict[str, float] = {}
    for ids, probability in every_labelling(log_probs).items():
        text = VOCAB.decode(ids)
        texts[text] = max(texts.get(text, 0.0), probability)
    found = prefix_beam(log_probs, VOCAB, width=10_000)
    assert {one.text: one.log_prob for one in found} == pytest.approx(
        {text: np.log(probability) for text, probability in texts.items()}, abs=1e-9
    )
    assert [one.log_prob for one in found] == sorted((one.log_prob for one in found), reverse=True)


@given(scores(), st.integers(1, 40))
def test_a_narrower_beam_finds_fewer_and_never_more_probable_ones(
    log_probs: npt.NDArray[np.float64], width: int
) -> None:
    narrow, wide = prefix_beam(log_probs, VOCAB, width), prefix_beam(log_probs, VOCAB, 10_000)
    assert 1 <= len(narrow) <= width
    best = {one.text: one.log_prob for one in wide}
    assert all(one.log_prob <= best[one.text] + 1e-9 for one in narrow)


def test_what_many_paths_spell_wins_over_the_single_best_path() -> None:
    """Blank, blank has 0.36 and is the best path; a, in three ways, has 0.64."""
    log_probs = np.log(np.array([[0.6, 1e-9, 0.4, 1e-9, 1e-9]] * 2))
    said = greedy(torch.from_numpy(log_probs)[None], torch.tensor([2]), VOCAB)
    assert said[0].text == ""
    best, second, *_ = prefix_beam(log_probs, VOCAB, 8)
    assert (best.text, second.text) == ("a", "")
    assert best.log_prob == pytest.approx(np.log(0.64), abs=1e-6)


def test_a_certain_clip_is_what_greedy_decoding_says() -> None:
    ids = [2, 2, 0, 2, 1, 3, 3, 0]
    log_probs = np.log(np.full((len(ids), len(VOCAB)), 1e-4) + np.eye(len(VOCAB))[ids])
    said = greedy(torch.from_numpy(log_probs)[None], torch.tensor([len(ids)]), VOCAB)
    assert said[0].text == prefix_beam(log_probs, VOCAB, 4)[0].text == "aa b"


def test_a_batch_is_decoded_row_by_row_over_its_true_frames() -> None:
    log_probs = torch.randn(3, 9, len(VOCAB), generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    frames = torch.tensor([9, 4, 0])
    for row, hypothesis in enumerate(decode_log_probs(log_probs, frames, VOCAB, beam=5)):
        alone = prefix_beam(log_probs[row, : frames[row]].numpy(), VOCAB, 5)
        assert hypothesis.nbest == tuple(alone)
        assert hypothesis.text == alone[0].text
        assert hypothesis.confidence == greedy(log_probs, frames, VOCAB)[row].confidence


def test_alternatives_of_pieces_join_into_those_of_the_recording() -> None:
    pieces = [[Alternative("a", -1.0), Alternative("b", -1.5)], [Alternative("c", -2.0), Alternative("", -2.2)]]
    joined = [(one.text, round(one.log_prob, 6)) for one in join_nbest(pieces)]
    assert joined == [("a c", -3.0), ("a", -3.2)]


@given(scores(), st.lists(st.integers(1, 3), max_size=4))
def test_the_best_alignment_is_the_best_of_all_paths(log_probs: npt.NDArray[np.float64], ids: list[int]) -> None:
    def score(path: Sequence[int]) -> float:
        return float(sum(frame[one] for frame, one in zip(log_probs, path, strict=True)))

    paths = [path for path in itertools.product(range(len(VOCAB)), repeat=len(log_probs))
             if [one for one, _ in itertools.groupby(path) if one != VOCAB.blank] == ids]  # fmt: skip
    if paths:
        found = best_alignment(log_probs, ids, VOCAB.blank).tolist()
        assert tuple(found) in paths
        assert score(found) == pytest.approx(max(map(score, paths)))
    elif len(log_probs):
        with pytest.raises(ValueError, match=f"{len(log_probs)} frames cannot spell {len(ids)} symbols"):
            best_alignment(log_probs, ids, VOCAB.blank)


def test_a_word_lasts_from_its_first_symbol_to_its_last() -> None:
    blank, space, a, b = VOCAB.blank, VOCAB.space, *VOCAB.encode("ab")
    path = [blank, a, a, blank, a, b, blank, space, space, blank, b, blank]
    log_probs = np.full((len(path), len(VOCAB)), -9.0)
    log_probs[np.arange(len(path)), path] = np.log(0.9)
    log_probs[10, b] = np.log(0.5)
    found = [
        (one.text, one.start, one.end, round(one.confidence, 6))
        for one in word_timestamps(log_probs, "aab b", VOCAB, 0.5)
    ]
    assert found == [("aab", 0.5, 3, 0.9), ("b", 5, 5.5, 0.5)]
    assert [one.text for one in word_timestamps(log_probs, "ab", VOCAB, 0.5)] == ["ab"]  # a beam's
    assert word_timestamps(log_probs[:1], "", VOCAB, 0.5) == []


def test_a_word_of_tokens_is_a_token_and_one_of_segments_has_several() -> None:
    tokens = Vocab((BLANK, "aa", "h#", UNKNOWN), delimiter=None, units="tokens")
    path = [1, 1, 0, 1, 2, 2, 3, 2, 0]
    log_probs = np.full((len(path), len(tokens)), -9.0)
    log_probs[np.arange(len(path)), path] = np.log(0.9)
    found = [(word.text, word.start, word.end) for word in word_timestamps(log_probs, "aa aa h# h#", tokens, 1.0)]
    assert found == [("aa", 0, 2), ("aa", 3, 4), ("h#", 4, 6), ("h#", 7, 8)]
    (hypothesis,) = greedy(torch.from_numpy(log_probs)[None], torch.tensor([len(path)]), tokens)
    assert hypothesis.text == prefix_beam(log_probs, tokens, 4)[0].text == "aa aa h# h#"
    shouted = Vocab((BLANK, SPACE, "A", "T͡S", UNKNOWN), units="segments", case="upper", writes="lower")
    path = [3, 2, 1, 0, 3]
    log_probs = np.full((len(path), len(shouted)), -9.0)
    log_probs[np.arange(len(path)), path] = np.log(0.9)
    found = [(word.text, word.start, word.end) for word in word_timestamps(log_probs, "t͡sa t͡s", shouted, 1.0)]
    assert found == [("t͡sa", 0, 2), ("t͡s", 4, 5)]
    beam = [word.text for word in word_timestamps(log_probs, "t͡s a", shouted, 1.0)]  # not the best path
    assert beam == ["t͡s", "a"]


def test_a_text_that_pieces_spell_in_two_ways_is_listed_once() -> None:
    pieces = [[Alternative("a", -1.0), Alternative("", -1.5)], [Alternative("a", -2.0), Alternative("", -2.6)]]
    joined = [(one.text, round(one.log_prob, 6)) for one in join_nbest(pieces)]
    assert joined == [("a a", -3.0), ("a", -3.5)]


def test_no_frames_say_nothing_for_certain() -> None:
    assert prefix_beam(np.zeros((0, len(VOCAB))), VOCAB, 3) == [Alternative("", 0.0)]
    with pytest.raises(ValueError, match="beam of 0"):
        prefix_beam(np.zeros((0, len(VOCAB))), VOCAB, 0)
