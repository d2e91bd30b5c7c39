"""Edit counts equal what others count, and add up."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.labels.pasketti import SYMBOLS, normalize_ipa, normalize_words
from sharding.labels.policy import policy_of
from sharding.labels.timit import PHONES as PHONES_OF_THE_DISC
from sharding.labels.timit import fold_to_39
from streamtrain.eval.metrics import EditCounts, Resampling, TextEdits, count_edits, spoken_words

VECTORS = Path(__file__).parents[3] / "shared" / "scoring_vectors.jsonl"

short_texts = st.text("ab ", max_size=9)
ipa_texts = st.text(st.sampled_from(SYMBOLS + "   "), max_size=30).map(normalize_ipa)
counts = st.builds(EditCounts, *[st.integers(0, 1000)] * 4)


def fewest_edits(reference: str, hypothesis: str) -> int:
    """Levenshtein's distance by the textbook recurrence."""
    row = list(range(len(hypothesis) + 1))
    for i, spoken in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (spoken != heard))
    return row[-1]


@settings(max_examples=300)
@given(short_texts, short_texts)
def test_no_fewer_edits_turn_one_text_into_the_other(reference: str, hypothesis: str) -> None:
    counted = count_edits(reference, hypothesis)
    assert counted.edits == fewest_edits(reference, hypothesis)
    assert counted.reference_length == len(reference)
    assert counted.insertions - counted.deletions == len(hypothesis) - len(reference)
    assert counted.substitutions + counted.deletions <= len(reference)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("", "", EditCounts(0, 0, 0, 0)),
        ("kæt", "", EditCounts(0, 3, 0, 3)),
        ("", "kæt", EditCounts(0, 0, 3, 0)),
        ("kæt", "kɑt", EditCounts(1, 0, 0, 3)),
        ("kæt", "kt", EditCounts(0, 1, 0, 3)),
        ("kæt", "kæts", EditCounts(0, 0, 1, 3)),
    ],
)
def test_what_is_missing_is_a_deletion_and_what_is_added_an_insertion(
    reference: str, hypothesis: str, expected: EditCounts
) -> None:
    assert count_edits(reference, hypothesis) == expected


def test_words_are_counted_as_symbols_are() -> None:
    assert count_edits(["ðə", "kæt", "sæt"], ["ðə", "kɑt"]) == EditCounts(1, 1, 0, 3)


@given(st.lists(st.tuples(ipa_texts.filter(bool), ipa_texts), min_size=1, max_size=5))
def test_the_pooled_rate_is_jiwers(pairs: list[tuple[str, str]]) -> None:
    total = sum((count_edits(reference, hypothesis) for reference, hypothesis in pairs), EditCounts())
    references, hypotheses = zip(*pairs, strict=True)
    assert total.rate == pytest.approx(jiwer.cer(list(references), list(hypotheses)), abs=1e-12)


@pytest.mark.skipif(not VECTORS.exists(), reason="the official scorer's answers are not part of the repository")
@pytest.mark.parametrize(("kind", "compared"), [("cer", normalize_ipa), ("wer", spoken_words)])
def test_every_rate_of_the_official_scorer_is_reproduced(kind: str, compared: Callable[[str], Sequence[str]]) -> None:
    rows = [json.loads(line) for line in VECTORS.read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == kind]
    assert len(rows) >= 20
    for row in rows:
        pairs = zip(map(compared, row["references"]), map(compared, row["hypotheses"]), strict=True)
        total = sum((count_edits(reference, hypothesis) for reference, hypothesis in pairs), EditCounts())
        assert total.rate == pytest.approx(row["expected"], abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The colour of my neighbour's aluminium aeroplane", "the color of my neighbor's aluminum airplane"),
        ("Mother realised the theatre was grey", "mother realized the theater was gray"),
        ("I'm gonna, uh, eat twenty-one apples!", "i am going to eat 21 apples"),
        ("Mr. Fox (laughs) can't swim", "mister fox can not swim"),
        ("one two [noise] three", "123"),
    ],
)
def test_what_sounds_alike_is_one_to_the_word_track(one: str, other: str) -> None:
    assert count_edits(spoken_words(one), spoken_words(other)).edits == 0


@given(counts, counts, counts)
def test_counts_add_up_in_any_order(a: EditCounts, b: EditCounts, c: EditCounts) -> None:
    assert (a + b) + c == a + (b + c) == (c + a) + b
    assert a + EditCounts() == a
    assert (a + b).edits == a.edits + b.edits


def test_without_any_reference_every_symbol_said_counts_whole() -> None:
    assert EditCounts().rate == 0.0
    assert count_edits("", "kæt").rate == 3.0


def interval_of(groups: Mapping[str, EditCounts], draws: int = 2000, level: float = 0.95) -> tuple[float, float] | None:
    """Return the interval of the pooled rate under resampling of whole groups, as a scorecard has it."""
    drawn = Resampling(groups, draws)
    totals = [groups[name] for name in drawn.speakers]
    edits, lengths = (
        np.array([[getattr(counts, name)] for counts in totals], np.float64).reshape(-1, 1)
        for name in ("edits", "reference_length")
    )
    return drawn.interval(drawn.rates(edits, lengths)[:, 0], level)


@given(st.integers(2, 30), st.integers(0, 20), st.integers(1, 40))
def test_equal_children_leave_no_room_for_chance(children: int, edits: int, length: int) -> None:
    groups = {f"child-{number}": EditCounts(substitutions=edits, reference_length=length) for number in range(children)}
    low, high = interval_of(groups, draws=100)
    assert low == high == edits / length


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(50, 100)), min_size=2, max_size=20))
def test_the_interval_is_reproducible_and_lies_among_the_childrens_rates(children: list[tuple[int, int]]) -> None:
    groups = {str(number): EditCounts(0, edits, 0, length) for number, (edits, length) in enumerate(children)}
    low, high = interval = interval_of(groups, draws=200)
    assert interval == interval_of(groups, draws=200)
    rates = [edits / length for edits, length in children]
    assert min(rates) - 1e-12 <= low <= high <= max(rates) + 1e-12


def test_the_interval_holds_the_pooled_rate_and_narrows_as_children_are_added() -> None:
    def interval(children: int) -> tuple[float, float]:
        groups = {str(n): EditCounts(substitutions=10 + n % 11, reference_length=100) for n in range(children)}
        total = sum(groups.values(), EditCounts())
        low, high = interval_of(groups)
        assert low < total.rate < high
        return low, high

    (few_low, few_high), (many_low, many_high) = interval(11), interval(1100)
    assert many_high - many_low < (few_high - few_low) / 5
    wide = interval_of({str(n): EditCounts(10 + n, 0, 0, 100) for n in range(11)}, level=0.99)
    assert wide[0] <= few_low < few_high <= wide[1]


@pytest.mark.parametrize("groups", [{}, {"a": EditCounts(insertions=3, reference_length=9)}])
def test_fewer_than_two_children_give_no_interval(groups: dict[str, EditCounts]) -> None:
    assert interval_of(groups) is None


def test_every_draw_pools_whole_speakers_and_a_group_none_of_whom_is_drawn_has_no_rate() -> None:
    drawn = Resampling(["b", "a", "b", "c"], draws=50)
    assert drawn.speakers == ["a", "b", "c"]
    assert (drawn.times.sum(axis=1) == 3).all()
    edits, lengths = np.array([[1.0, 0], [2, 0], [3, 9]]), np.array([[10.0, 0], [10, 0], [10, 20]])
    rates = drawn.rates(edits, lengths)
    for times, (pooled, of_c) in zip(drawn.times, rates, strict=True):
        assert pooled == pytest.approx((times @ [1, 2, 3]) / 30)
        assert of_c == pytest.approx(9 / 20) if times[2] else np.isnan(of_c)


TOKENS = [
    "the",
    "cat",
    "don't",
    "[laughs]",
    "<noise>",
    "(uh huh)",
    "ice-cream",
    "Hello,",
    "what?",
    "colour",
    "TWENTY",
    "um",
]


@given(st.lists(st.sampled_from(TOKENS), max_size=9))
def test_a_label_as_it_is_stored_is_scored_as_the_one_that_was_written(tokens: list[str]) -> None:
    written = " ".join(tokens)
    assert spoken_words(normalize_words(written)) == spoken_words(written)


PHONE_LABELS = st.lists(st.sampled_from(PHONES_OF_THE_DISC), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.tuples(PHONE_LABELS, PHONE_LABELS), min_size=1, max_size=5))
def test_the_phone_error_rate_is_that_of_jiwer_on_folded_tokens(pairs: list[tuple[str, str]]) -> None:
    """Of a reference in the 61 phones of the disc, and of a hypothesis in the 48 that a model writes."""
    policy = policy_of("timit39")
    pairs = [(said, policy.normalize(heard)) for said, heard in pairs if fold_to_39(said)]
    edits = sum((TextEdits.of(*pair, policy) for pair in pairs), TextEdits())
    folded = [(fold_to_39(said), fold_to_39(heard)) for said, heard in pairs]
    wanted = jiwer.process_words([said for said, _ in folded], [heard for _, heard in folded]) if folded else None
    assert edits.symbols.reference_length == sum(len(said.split()) for said, _ in folded)
    assert edits.symbols.edits == (wanted.substitutions + wanted.deletions + wanted.insertions if wanted else 0)
    assert edits.symbols == edits.words


@given(st.lists(st.tuples(*[st.text("aäbß' ,.!", min_size=1, max_size=12)] * 2), min_size=1, max_size=5))
def test_word_and_character_error_rates_are_those_of_jiwer_on_the_normal_form(pairs: list[tuple[str, str]]) -> None:
    policy = policy_of("text")
    pairs = [pair for pair in pairs if policy.compare(pair[0])]
    edits = sum((TextEdits.of(*pair, policy) for pair in pairs), TextEdits())
    if pairs:
        said, heard = zip(*[tuple(map(policy.compare, pair)) for pair in pairs], strict=True)
        assert edits.words.rate == pytest.approx(jiwer.wer(list(said), list(heard)), abs=1e-12)
        assert edits.characters.rate == pytest.approx(jiwer.cer(list(said), list(heard)), abs=1e-12)
    assert edits.symbols == edits.characters


def test_a_phone_error_rate_counts_segments_and_no_blanks_between_words() -> None:
    policy = policy_of("ipa", "segments")
    edits = TextEdits.of("t͡ʃaɪ̯ kʰæt", "taɪ̯ kʰæ", policy)
    assert (edits.symbols.edits, edits.symbols.reference_length) == (2, 6)
    assert edits.characters.reference_length == len("t͡ʃaɪ̯ kʰæt")
    assert (edits.words.edits, edits.words.reference_length) == (2, 2)
