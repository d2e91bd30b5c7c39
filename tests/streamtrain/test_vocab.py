"""IPA to ids and back, and the vocabulary that travels with a model."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from sharding.errors import StreamtrainError
from sharding.labels.pasketti import SYMBOLS, normalize_ipa
from sharding.labels.policy import LabelPolicy, policy_of
from sharding.labels.units import join_symbols
from streamtrain.model.labels import check_symbols, field_of, fit_vocab, read_labels, save_labels
from streamtrain.model.tokenizer import load_vocab, save_vocab
from streamtrain.model.vocab import BLANK, SPACE, UNKNOWN, Vocab, vocab_of

VOCAB = vocab_of(policy_of("pasketti"))


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


def test_the_vocabularies_of_the_challenge_stay_as_they_are() -> None:
    phones = "æobcɑʔɛsjɹfʊəʁiɔvɟxʌŋχdhʝknlɐʤɪɚçzːmtɫʃʧwrpɾɬʒθugðe"
    assert Vocab(("[PAD]", "|", *phones, "[UNK]")) == VOCAB
    assert vocab_of(policy_of("english")) == Vocab(("[PAD]", "|", *"'abcdefghijklmnopqrstuvwxyz", "[UNK]"))


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
        json.dumps({UNKNOWN: 0, SPACE: 1, "k": 2}),
        json.dumps({BLANK: 0, UNKNOWN: 1, SPACE: 99}),
        json.dumps({BLANK: 0, UNKNOWN: 1, SPACE: 2**32 - 1}),
        json.dumps({"eng": {BLANK: 0, "a": 1}, "fra": {BLANK: 0, "é": 1}}),
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


POLICIES = {
    "segments": LabelPolicy("ipa", "segments", ("a", "kʰ", "t͡ʃ", "ɪ̯", "ˈ")),
    "tokens": LabelPolicy("raw", "tokens", ("[PAD]", "[UNK]", "aa", "h#", "t", "tʃ", "|")),
    "characters": LabelPolicy("raw", "characters", ("A", "a", "|", "ß", "ދި"[0], "ދި"[1])),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@given(data=st.data())
def test_labels_of_all_units_come_back_with_an_id_per_symbol(policy: LabelPolicy, data: st.DataObject) -> None:
    vocab = vocab_of(policy)
    words = st.lists(st.sampled_from(policy.symbols), min_size=1)
    text = " ".join(policy.normalize(join_symbols(word, policy.units)) for word in data.draw(st.lists(words)))
    ids = vocab.encode(text)
    assert len(ids) == len(policy.symbols_of(text))
    assert vocab.decode(ids) == text
    assert not {vocab.blank, vocab.unknown} & set(ids)
    assert sum(len(vocab.encode(word)) for word in text.split()) + ids.count(vocab.space or -1) == len(ids)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_transformers_decodes_a_saved_vocabulary_of_all_units_as_we_do(policy: LabelPolicy, tmp_path: Path) -> None:
    """But Transformers 5 reads no word delimiter other than "|", which is taken if the labels have a "|"."""
    vocab, random = vocab_of(replace(policy, symbols=tuple(each for each in policy.symbols if each != "|"))), Random(2)
    save_vocab(vocab, tmp_path, do_normalize=True, attention_mask=False)
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.feature_extractor.do_normalize
    assert not (tmp_path / "processor_config.json").exists()  # Transformers 4 cannot read it
    silent = {vocab.unknown}  # which the pipeline would write
    for _ in range(50):
        path = random.choices([number for number in range(len(vocab)) if number not in silent], k=40)
        merged = [one for one, before in zip(path, [-1, *path], strict=False) if one not in (before, vocab.blank)]
        assert " ".join(processor.tokenizer.decode(path).split()) == vocab.decode(merged)
    loaded = load_vocab(tmp_path)
    assert replace(loaded, units=policy.units) == vocab
    assert (loaded.units == "tokens") == (policy.units == "tokens")


UPPER = Vocab(("<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "Σ", "", "I"), "<pad>", "<unk>", "|", ("<s>", "</s>"))


def test_labels_are_folded_to_the_case_of_a_vocabulary_and_text_to_theirs() -> None:
    lower = LabelPolicy("text", "characters", ("e", "i", "t", "σ"))
    fitted = fit_vocab(UPPER, lower)
    assert (fitted.share, fitted.lacking, fitted.reason, fitted.vocab.case) == (1.0, (), "", "upper")
    assert fitted.vocab.encode("et σ") == UPPER.encode("ET Σ") == [5, 6, 4, 7]
    assert fitted.vocab.decode([1, 5, 6, 4, 7, 3, 8, 2]) == "et σ"
    upper = fit_vocab(UPPER, LabelPolicy("raw", "characters", ("E", "T"))).vocab
    assert (upper.case, upper.decode([5, 6])) == ("", "ET")
    mixed = fit_vocab(UPPER, LabelPolicy("raw", "characters", ("E", "t")))
    assert (mixed.lacking, mixed.vocab.encode("Ett")) == (("t",), [5, 3, 3])  # it would be written as T
    small = replace(UPPER, tokens=tuple(token.lower() for token in UPPER.tokens))
    shouted = fit_vocab(small, LabelPolicy("raw", "characters", ("E", "T"))).vocab
    assert (shouted.encode("TE"), shouted.decode([6, 5])) == ([6, 5], "TE")
    assert UPPER.encode("ß<pad>|")[0] == UPPER.unknown
    assert set(UPPER.encode("<s>|")) == {UPPER.unknown}  # written tokens alone have ids
    final = fit_vocab(UPPER, LabelPolicy("text", "characters", tuple("eitσς")))
    assert final.lacking == ("ς",)  # it would be written as σ
    cased = fit_vocab(UPPER, LabelPolicy("raw", "characters", ("E", "T", "e", "t")))
    assert cased.lacking == ("e", "t")  # which would be written as E and T
    dotless = LabelPolicy("text", "characters", tuple("eitσßŉ"))  # whose upper case has two letters
    assert len(fit_vocab(UPPER, dotless).vocab.encode("ßŉe")) == 3


def test_a_vocabulary_is_measured_by_how_often_symbols_occur() -> None:
    symbols = ("E", "T", "Ä")
    rare = fit_vocab(UPPER, LabelPolicy("raw", "characters", symbols, (900, 99, 1)))
    assert (rare.reason, rare.lacking, rare.share) == ("", ("Ä",), 0.999)
    often = fit_vocab(UPPER, LabelPolicy("raw", "characters", symbols, (900, 98, 2))).reason
    assert often == "it lacks 'Ä' U+00C4, which the labels have often"  # a letter that the model could never write
    many = tuple(map(chr, range(0x400, 0x450)))  # each of them rare
    all_rare = fit_vocab(UPPER, LabelPolicy("raw", "characters", ("E", *many), (1200, *(1 for _ in many)))).reason
    assert all_rare.startswith("it has 93.8% of the labels' symbols, at least 95% are needed; it lacks 'Ѐ' U+0400")
    assert "66.7%" in fit_vocab(UPPER, LabelPolicy("raw", "characters", symbols)).reason
    wordless = replace(UPPER, delimiter=None)
    assert fit_vocab(wordless, LabelPolicy("raw", "characters", ("E",))).reason == "it has no token between words"
    assert fit_vocab(UPPER, LabelPolicy("raw", "tokens", ("E", "T"))).vocab.encode("T E") == [6, 5]
    both = replace(UPPER, tokens=(*UPPER.tokens, "x"))  # of no one case
    assert fit_vocab(both, LabelPolicy("raw", "characters", ("e", "t"))).reason.endswith(
        "it lacks 'e' U+0065, 't' U+0074; it has E T, in the other case"
    )
    told = check_symbols(UPPER, ["eT", "T T"])
    assert told is not None
    assert told.startswith("25.0% of the labels' symbols have no token in the model's vocabulary: 'e' U+0065; it has E")
    assert check_symbols(UPPER, ["e" + "T" * 19]) is None


def test_labels_travel_with_a_model_and_are_never_run(tmp_path: Path) -> None:
    policy = LabelPolicy("os:getcwd", "segments", ("a", "kʰ"), (7, 3), "digest")
    save_labels(policy, tmp_path)
    read = read_labels(tmp_path, VOCAB)
    assert read == policy
    assert read is not None
    assert (read.counts, read.digest) == (policy.counts, policy.digest)
    assert field_of(read) == "text"
    assert field_of(policy_of("english")) == "orthographic_text"
    (tmp_path / "labels.json").unlink()
    assert read_labels(tmp_path, VOCAB) == policy_of("pasketti")  # saved before there were others
    assert read_labels(tmp_path, UPPER) is None
    for damaged in ("[]", '{"profile": "raw"}', json.dumps(policy.document() | {"counts": [1]}), "{"):
        (tmp_path / "labels.json").write_text(damaged)
        with pytest.raises(StreamtrainError, match=r"labels\.json: "):
            read_labels(tmp_path, VOCAB)


def test_a_folder_without_a_vocabulary_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(StreamtrainError, match=r"no vocabulary \(No such file or directory\)\nhint: .*RUN/best"):
        load_vocab(tmp_path)
