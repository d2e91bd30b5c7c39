"""The normal form is the official scorer's."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.labels.pasketti import LOOK_ALIKES, SAME_PHONE, SYMBOLS, normalize_ipa, normalize_words, read_label
from sharding.labels.units import ctc_frames_needed
from tests.tools.corpus import PHONES, WORDS

VECTORS = Path(__file__).parents[3] / "shared" / "scoring_vectors.jsonl"


@pytest.mark.skipif(not VECTORS.exists(), reason="the official scorer's answers are not part of the repository")
def test_every_answer_of_the_official_scorer_is_reproduced() -> None:
    rows = [json.loads(line) for line in VECTORS.read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "normalize_ipa"]
    assert len(rows) > 100
    assert [normalize_ipa(row["text"]) for row in rows] == [row["expected"] for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n ", ""),
        ("  hɛ\u00a0 loʊ\t", "hɛ loʊ"),
        ("ˈbʌˌtɚ", "bʌtɚ"),
        ("t͡ʃɪn", "ʧɪn"),
        ("tʃɪn", "ʧɪn"),
        ("d͜ʒæm dʒæm", "ʤæm ʤæm"),
        ("wɛ̃t", "wɛt"),
        ("wẽt wõt wũt wĩt", "wet wot wut wit"),
        ("e\u0303", "e"),  # composed or not, the same
        ("stɑp! (wɛɪt), \"noʊ\"...", "stɑp wɛɪt noʊ"),
        ("ʤ", "ʤ"),
    ],
)  # fmt: skip
def test_stress_ties_nasality_punctuation_and_spacing_go(text: str, expected: str) -> None:
    assert normalize_ipa(text) == expected


@given(st.text(st.sampled_from(SYMBOLS + "  ˈˌ͜͡.,\u0303ãñẽ\t"), max_size=20))
def test_the_normal_form_has_single_spaces_and_is_its_own(text: str) -> None:
    once = normalize_ipa(text)
    assert once == " ".join(once.split())
    assert normalize_ipa(once) == once


@given(st.text(st.sampled_from(SYMBOLS + " ")))
def test_the_alphabet_survives_and_is_never_foreign(text: str) -> None:
    assert PHONES.foreign(normalize_ipa(text)) == ()


def test_foreign_symbols_are_named_once_in_order() -> None:
    assert PHONES.foreign("kqt qXa") == ("q", "X", "a")


@given(st.text())
def test_a_label_is_read_as_it_is_scored_but_for_other_letters_of_its_phones(text: str) -> None:
    assert PHONES.normalize(text) == normalize_ipa(text.translate(SAME_PHONE))
    assert WORDS.normalize(text) == normalize_words(text)


def test_other_letters_of_a_phone_and_look_alikes_are_foreign_to_the_score_and_stand_for_phones() -> None:
    same = {chr(letter): chr(phone) for letter, phone in SAME_PHONE.items()}
    for letter, phone in (same | LOOK_ALIKES).items():
        assert normalize_ipa(letter) == letter  # as the official scorer leaves it
        assert letter not in PHONES.alphabet
        assert phone in PHONES.alphabet
    assert all(read_label(letter) == phone for letter, phone in same.items())


def test_symbols_are_named_by_code_point_and_look_alike() -> None:
    assert PHONES.name("q∫") == "'q' U+0071, '∫' U+222B (looks like 'ʃ' U+0283)"
    assert WORDS.name("∫") == "'∫' U+222B"
    assert PHONES.name("".join(map(chr, range(0x4E00, 0x4F00)))).endswith("U+4E13 and 236 more")


@given(st.text(st.sampled_from("ab "), min_size=1, max_size=8))
def test_ctc_needs_a_frame_per_symbol_and_a_blank_between_equal_ones(text: str) -> None:
    path = text[0]
    for before, here in itertools.pairwise(text):
        path += ("_" if before == here else "") + here
    assert ctc_frames_needed(text) == len(path)
