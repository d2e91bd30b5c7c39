"""The labels of a shard set: their profile, units and alphabet, named or found, and what is told of them."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from sharding.cli import main
from sharding.labels.profiles import ALLOWED, profile_of
from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from tests.tools.corpus import make_corpus, read_manifest, write_manifest
from tests.tools.shard_sets import assert_balanced, digest_of, read_all, read_ledger, read_summary

SENTENCES = ["Über die Straße!", "Größe, bitte.", "Äpfel öffnen", "Das ist Übung", "Süße Öfen üben äußerst"]


def relabel(folder: Path, labels: list[str], column: str = "text", **corpus: int) -> Path:
    """A corpus whose clips have these labels in turn, in this column; its sound is of other labels."""
    make_corpus(folder, **({"clips": 40, "children": 8} | corpus))
    rows = [{name: value for name, value in row.items() if name != "phonetic_text"} for row in read_manifest(folder)]
    return write_manifest(folder, [row | {column: labels[i % len(labels)]} for i, row in enumerate(rows)])


def build(*arguments: object) -> int:
    return main(["build", *map(str, arguments), "--workers", "1"])


def test_an_alphabet_is_that_of_the_training_labels_with_counts(tmp_path: Path) -> None:
    corpus, out = relabel(tmp_path / "de", SENTENCES), tmp_path / "out"
    assert build(corpus, "--out", out) == 0
    assert_balanced(out)
    labels = read_index(open_store(out)).labels
    assert (labels.profile, labels.units) == ("text", "characters")
    trained = [sample for split, sample in read_all(out).values() if split == "train"]
    counts = {symbol: sum(sample.text.count(symbol) for sample in trained) for symbol in labels.symbols}
    assert list(labels.symbols) == sorted(set("".join(sample.text for sample in trained)) - {" "})
    assert counts == dict(zip(labels.symbols, labels.counts, strict=True))
    assert set("äöüß") <= set(labels.symbols)
    for _, sample in read_all(out).values():
        assert sample.text == labels.normalize(str(sample.written_text))
        assert sample.written_text in SENTENCES
    assert read_summary(out)["labels"] == labels.document()


def test_clips_with_rare_symbols_are_told_and_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = relabel(tmp_path / "de", SENTENCES)
    rows = read_manifest(corpus)
    rows[0]["text"] += " ñ"
    write_manifest(corpus, rows)
    first = read_manifest(corpus)[0]["utterance_id"]
    assert build(corpus, "--out", tmp_path / "out", "--valid-fraction", 0, "--max-reject-rate", 1) == 0
    [rejected] = [row for row in read_ledger(tmp_path / "out") if row["fate"] == "rejected"]
    assert rejected["utterance_id"] == first
    assert rejected["reason"] == "label has symbols that occur fewer than 5 times: 'ñ' U+00F1 (1)"
    assert "ñ" not in read_index(open_store(tmp_path / "out")).labels.symbols
    assert "rarest symbols: " in capsys.readouterr().out
    arguments = (corpus, "--out", tmp_path / "all", "--valid-fraction", 0, "--min-symbol-count", 1)
    assert build(*arguments) == 0
    assert "ñ" in read_index(open_store(tmp_path / "all")).labels.symbols


def test_validation_is_not_filtered_by_an_alphabet_that_lacks_its_symbols(tmp_path: Path) -> None:
    corpus = relabel(tmp_path / "de", SENTENCES)
    assert build(corpus, "--out", tmp_path / "first") == 0
    valid = {name for name, (split, _) in read_all(tmp_path / "first").items() if split == "valid"}
    rows = read_manifest(corpus)
    one = next(row for row in rows if row["utterance_id"] in valid)
    one["text"] += " ñ"
    write_manifest(corpus, rows)
    assert build(corpus, "--out", tmp_path / "out") == 0
    assert read_all(tmp_path / "out")[one["utterance_id"]][0] == "valid"
    assert "ñ" not in read_index(open_store(tmp_path / "out")).labels.symbols


def test_what_is_appended_keeps_the_alphabet_and_a_repair_finds_it_again(tmp_path: Path) -> None:
    first, out = relabel(tmp_path / "de", SENTENCES), tmp_path / "out"
    more = relabel(tmp_path / "more", [*SENTENCES, "Ça da"], clips=12, children=4)
    assert build(first, "--out", out) == 0
    labels = read_index(open_store(out)).labels
    assert build(more, "--out", out, "--append", "--max-reject-rate", 1) == 0
    index = read_index(open_store(out))
    assert (index.labels, index.labels.counts) == (labels, labels.counts)
    assert {row["reason"] for row in read_ledger(out) if row["fate"] == "rejected"} <= {
        "label has symbols outside the alphabet: 'ç' U+00E7"
    }
    before = digest_of(out)
    shard = next(iter(sorted(out.glob("train/*.tar"))))
    shard.write_bytes(shard.read_bytes()[:-2000])
    assert main(["verify", str(out), "--repair", str(first), str(more), "--workers", "1"]) == 0
    assert digest_of(out) == before


def test_segments_and_tokens_count_as_symbols(tmp_path: Path) -> None:
    narrow = relabel(tmp_path / "narrow", ["t͡ʃaɪ̯ kʰæt", "ˈmaː tʰa", "ɲa kʰa t͡ʃaː"], "phonetic_text")
    assert build(narrow, "--out", tmp_path / "segments", "--profile", "ipa", "--units", "segments") == 0
    index = read_index(open_store(tmp_path / "segments"))
    assert {"t͡ʃ", "ɪ̯", "kʰ", "aː", "ɲ", "ˈ"} <= set(index.labels.symbols)
    lengths = {name: len(index.labels.symbols_of(sample.text)) for name, (_, sample) in
               read_all(tmp_path / "segments").items()}  # fmt: skip
    assert sorted(index.samples["label_length"].tolist()) == sorted(lengths.values())
    phones = relabel(tmp_path / "phones", ["h# sh iy h#", "h# hv ae dcl d h#", "h# q aa r h#"])
    assert build(phones, "--out", tmp_path / "tokens", "--profile", "timit39") == 0
    index = read_index(open_store(tmp_path / "tokens"))
    assert (index.labels.units, len(index.labels.symbols)) == ("tokens", 48)
    assert {sample.text for _, sample in read_all(tmp_path / "tokens").values()} == {
        "sil sh iy sil", "sil hh ae vcl d sil", "sil aa r sil"
    }  # fmt: skip


def test_an_alphabet_may_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, file = relabel(tmp_path / "de", SENTENCES), tmp_path / "alphabet.txt"
    file.write_text("\n".join("abdefgiklnoprstuzäöüßn") + "\n")
    assert build(corpus, "--out", tmp_path / "out", "--alphabet", file) == 1
    assert f"{file}: 'n' is listed twice" in capsys.readouterr().err
    file.write_text("a\nbc\n")
    assert build(corpus, "--out", tmp_path / "out", "--alphabet", file) == 1
    assert f"{file}:2: 'bc' is not one symbol of characters" in capsys.readouterr().err
    file.write_text("\n".join("abdefgiklnoprstuzäöüß") + "\n")
    assert build(corpus, "--out", tmp_path / "out", "--alphabet", file) == 0
    assert "".join(read_index(open_store(tmp_path / "out")).labels.symbols) == "abdefgiklnoprstuzäöüß"
    file.write_text("a\n")
    assert build(corpus, "--out", tmp_path / "out", "--alphabet", file) == 1
    said = capsys.readouterr().err
    assert re.search(
        "alphabet is file of 21 symbols, [0-9a-f]{16} there, requested file of 1 symbols, [0-9a-f]{16}", said
    )


@pytest.mark.parametrize(("labels", "arguments", "told"), [
    ([chr(0x4E00 + i) * 9 for i in range(1200)], ["--min-symbol-count", "1"], "at most 1,000 are expected"),
    ([f"sentence{i} word{i}" for i in range(40)], ["--units", "tokens"], "that occur fewer than 5 times"),
    (["kæt dɔg"], ["--profile", "english"], "has symbols outside the alphabet of profile english"),
    (["kæt"], ["--profile", "nonsense"], "profile 'nonsense' is unknown"),
    (["kæt"], ["--profile", "no_such_module:normalize"], "profile 'no_such_module:normalize': No module named"),
    (["kæt"], ["--alphabet", "profile"], "profile 'text' has no alphabet of characters"),
    (["kæt"], ["--track", "word", "--profile", "text"], "--track word is profile 'english', --profile is 'text'"),
])  # fmt: skip
def test_labels_of_another_kind_end_the_build_and_are_told(
    labels: list[str], arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = relabel(tmp_path / "odd", labels, clips=max(40, len(labels)) if len(labels) < 100 else 1200)
    assert build(corpus, "--out", tmp_path / "out", *arguments) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "hint: " in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_sources_of_two_profiles_are_not_built_together_unless_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, phones = relabel(tmp_path / "words", SENTENCES), make_corpus(tmp_path / "phones")
    assert build(words, phones, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"text in {words}/" in said
    assert f"pasketti in {phones}/" in said


def test_a_function_of_the_user_is_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ALLOWED, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud_form.py").write_text("def normalize(text):\n    return text.upper().strip('!')\n")
    corpus = relabel(tmp_path / "de", ["Hallo Welt!", "Welt, hallo"])
    assert build(corpus, "--out", "out", "--profile", "loud_form:normalize") == 0
    assert {sample.text for _, sample in read_all(tmp_path / "out").values()} == {"HALLO WELT", "WELT, HALLO"}
    assert os.environ[ALLOWED] == "loud_form:normalize"


def test_a_label_that_is_written_as_it_is_trained_is_kept_once(tmp_path: Path) -> None:
    """So that a tar of labels in the normal form has the same bytes as before the written ones were kept."""
    corpus = make_corpus(tmp_path / "plain", clips=6)
    assert build(corpus, "--out", tmp_path / "out") == 0
    assert all(sample.written_text is None for _, sample in read_all(tmp_path / "out").values())
    assert json.loads((tmp_path / "out/index.json").read_bytes())["labels"]["profile"] == "pasketti"


def test_symbols_that_are_rare_in_what_is_left_are_rare_too(tmp_path: Path) -> None:
    """The clip with the one 'ñ' is left out, and without its two 'x' there are four of them."""
    corpus = relabel(tmp_path / "de", SENTENCES)
    rows = read_manifest(corpus)
    for number, more in enumerate((" ñ xx", " x", " x", " xx")):
        rows[number]["text"] += more
    write_manifest(corpus, rows)
    assert build(corpus, "--out", tmp_path / "out", "--valid-fraction", 0, "--max-reject-rate", 1) == 0
    labels = read_index(open_store(tmp_path / "out")).labels
    trained = [sample.text for _, sample in read_all(tmp_path / "out").values()]
    assert not {"x", "ñ"} & set(labels.symbols)
    assert len(trained) == len(rows) - 4
    assert labels.counts == tuple(sum(text.count(symbol) for text in trained) for symbol in labels.symbols)


def test_a_function_that_has_changed_stops_an_append_and_the_same_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ALLOWED, "")
    monkeypatch.chdir(tmp_path)
    corpus, more = relabel(tmp_path / "de", SENTENCES), relabel(tmp_path / "more", SENTENCES)
    (tmp_path / "changing_form.py").write_text("def normalize(text):\n    return text.lower()\n")
    arguments = ("--out", "out", "--profile", "changing_form:normalize")
    assert build(corpus, *arguments) == 0
    (tmp_path / "changing_form.py").write_text("def normalize(text):\n    return text.upper()  # now otherwise\n")
    profile_of.cache_clear()
    del sys.modules["changing_form"]
    for command in ((corpus, *arguments), (more, *arguments, "--append")):
        assert build(*command) == 1
        assert "gives other texts than when these labels were made" in capsys.readouterr().err
