"""IPA to ids and back, and the vocabulary that travels with a model."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import StreamtrainError
from sharding.labels.pasketti import SYMBOLS, normalize_ipa
from streamtrain.model.vocab import BLANK, SPACE, UNKNOWN, Vocab, load_vocab, save_vocab, vocab_of

VOCAB = vocab_of(PHONES)


@given(st.text(st.sampled_from(SYMBOLS + "   ˈ͡.")).map(normalize_ipa))
def test_a_normalised_label_comes_back_as_it_was_with_an_id_per_symbol(text: str) -> None:
    ids = VOCAB.encode(text)
    assert VOCAB.decode(ids) == text
    assert len(ids) == len(text)
    assert VOCAB.blank not in ids


@given(st.text().map(normalize_ipa))
def test_any_label_has_an_id_per_symbol_and_loses_only_what_is_foreign(text: str) -> None:
    ids = VOCAB.encode(text)
    assert len(ids) == len(text)
    assert VOCAB.decode(ids) == " ".join("".join(symbol for symbol in text if symbol in SYMBOLS + " ").split())


def test_every_symbol_has_an_id_of_its_own_and_blank_is_the_first() -> None:
    assert VOCAB.blank == 0
    assert len(set(VOCAB.tokens)) == len(VOCAB) == len(SYMBOLS) + 3
    assert {BLANK, SPACE, UNKNOWN} < set(VOCAB.tokens)


def test_blank_and_unknown_say_nothing_and_spaces_do_not_pile_up() -> None:
    unknown = VOCAB.tokens.index(UNKNOWN)
    space, k, t = VOCAB.encode(" kt")
    assert VOCAB.decode([space, VOCAB.blank, k, space, unknown, space, t, space]) == "k t"


def test_a_saved_vocabulary_is_read_back_in_its_own_order(tmp_path: Path) -> None:
    odd = Vocab((SPACE, "k", UNKNOWN, "æ", BLANK))
    save_vocab(odd, tmp_path / "model", do_normalize=True, attention_mask=False)
    assert load_vocab(tmp_path / "model") == odd
    assert load_vocab(tmp_path / "model").blank == 4


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        json.dumps({BLANK: 0, UNKNOWN: 1, "k": 2}),
        json.dumps({BLANK: 0, UNKNOWN: 1, SPACE: 3}),
        json.dumps({BLANK: 0, UNKNOWN: 1, SPACE: 1}),
        json.dumps({BLANK: 0, UNKNOWN: "1", SPACE: 2}),
        json.dumps([BLANK, UNKNOWN, SPACE]),
        json.dumps("k"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(StreamtrainError, match=r"vocab\.json: "):
        load_vocab(tmp_path)


def test_a_folder_without_a_vocabulary_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(StreamtrainError, match=r"no vocabulary \(No such file or directory\)\nhint: .*RUN/best"):
        load_vocab(tmp_path)
