"""Profiles, units and alphabets: what a written label becomes, and that nothing of it is lost unseen."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import StreamtrainError
from sharding.labels.policy import LabelPolicy, policy_from, policy_of
from sharding.labels.profiles import ALLOWED, PROFILES, allow_profile, profile_of
from sharding.labels.timit import PHONES, SCORED, TRAINED, fold_to_39, fold_to_48
from sharding.labels.units import ctc_frames_needed, join_symbols, split_symbols

# Lee & Hon's folding: phones of the disc, those of training, those of scoring; "q" is in none of the latter
FOLDING = """
    aa aa aa; ae ae ae; ah ah ah; ao ao aa; aw aw aw; ax ax ah; ax-h ax ah; axr er er; ay ay ay; b b b; bcl vcl sil;
    ch ch ch; d d d; dcl vcl sil; dh dh dh; dx dx dx; eh eh eh; el el l; em m m; en en n; eng ng ng; epi epi sil;
    er er er; ey ey ey; f f f; g g g; gcl vcl sil; h# sil sil; hh hh hh; hv hh hh; ih ih ih; ix ix ih; iy iy iy;
    jh jh jh; k k k; kcl cl sil; l l l; m m m; n n n; ng ng ng; nx n n; ow ow ow; oy oy oy; p p p; pau sil sil;
    pcl cl sil; q; r r r; s s s; sh sh sh; t t t; tcl cl sil; th th th; uh uh uh; uw uw uw; ux uw uw; v v v; w w w;
    y y y; z z z; zh zh sh
"""


def test_timit_is_folded_as_the_published_table_folds_it() -> None:
    rows = [row.split() for row in FOLDING.split(";")]
    assert sorted(row[0] for row in rows) == sorted(PHONES)
    assert (len(PHONES), len(TRAINED), len(SCORED)) == (61, 48, 39)
    for phone, *folded in rows:
        assert [fold_to_48(phone), fold_to_39(phone)] == (folded or ["", ""])
        assert fold_to_39(fold_to_48(phone)) == fold_to_39(phone)
    assert fold_to_39("h# SH ix q pau pau") == "sil sh ih sil sil"  # repeats are not merged


@pytest.mark.parametrize(("profile", "written", "label"), [
    ("text", "  L'eau, d’Été!\n", "l'eau d'été"),
    ("text", "İstanbul ΨΥΧΗ ΟΔΟΣ", "istanbul ψυχη οδος"),
    ("text", "ދިވެހި ބަސް.", "ދިވެހި ބަސް"),
    ("text", "हिन्दी ।", "हिन्दी"),
    ("text", "paral·lel rock 'n' roll", "paral·lel rock n roll"),
    ("text", "soft\u00adhyphen well-known ﬁx Ａ", "softhyphen well known fix a"),
    ("text", "Straße 3 €", "straße 3"),
    ("ipa", "'kʰæ:t  ɡa", "ˈkʰæːt ga"),
    ("ipa", "t͡ʃaɪ̯ ma˥˩", "t͡ʃaɪ̯ ma˥˩"),
    ("raw", " As  Written! ", "As Written!"),
    ("english", "[laughs] It’s OK—fine", "it's ok fine"),
    ("timit39", "h# SH ix HV eh dcl", "sil sh ix hh eh vcl"),
])  # fmt: skip
def test_a_written_label_becomes_its_normal_form(profile: str, written: str, label: str) -> None:
    assert policy_of(profile).normalize(written) == label


@given(st.sampled_from(sorted(PROFILES)), st.text())
def test_a_normal_form_is_its_own_and_has_single_blanks(profile: str, text: str) -> None:
    policy = policy_of(profile)
    once = policy.normalize(text)
    assert once == " ".join(once.split())
    assert policy.normalize(once) == once
    assert policy.compare(once) == policy.compare(text) or profile == "pasketti"  # whose scorer maps no other letters


@pytest.mark.parametrize(("text", "symbols"), [
    ("t͡ʃaɪ̯ kʰæt", ["t͡ʃ", "a", "ɪ̯", " ", "kʰ", "æ", "t"]),
    ("ˈmaː ma˥˩", ["ˈ", "m", "aː", " ", "m", "a", "˥˩"]),
    ("ⁿdã pʼ", ["ⁿd", "ã", " ", "pʼ"]),
    ("d̪͡z̪", ["d̪͡z̪"]),
])  # fmt: skip
def test_a_segment_is_a_letter_with_all_that_belongs_to_it(text: str, symbols: list[str]) -> None:
    assert split_symbols(text, "segments") == symbols


@given(st.text(st.sampled_from("tʃaɪæ ̯͡ʰːˈ˥˩̃"), max_size=12))
def test_segments_joined_are_the_text(text: str) -> None:
    text = " ".join(text.split())
    assert "".join(split_symbols(text, "segments")) == text
    assert join_symbols(split_symbols(text, "segments"), "segments") == text


def test_tokens_have_no_blank_between_them() -> None:
    policy = policy_of("timit39")
    assert policy.symbols_of("sil sh ix") == ["sil", "sh", "ix"]
    assert policy.foreign("sil sh xx") == ("xx",)
    assert ctc_frames_needed(policy.symbols_of("sh sh ix")) == 4


def test_a_policy_travels_as_a_document_and_to_a_worker() -> None:
    policy = replace(policy_of("text", "segments"), symbols=("a", "b"), counts=(7, 5))
    assert policy_from(policy.document()) == policy == pickle.loads(pickle.dumps(policy))
    assert policy_from(policy.document()).counts == (7, 5)


def test_a_function_runs_as_a_profile_only_if_the_user_has_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard set or a model that was downloaded might name os:system."""
    monkeypatch.delenv(ALLOWED, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shouting.py").write_text("def normalize(text):\n    return text.upper()\n")
    forged = LabelPolicy("shouting:normalize")
    with pytest.raises(StreamtrainError, match="is a function that these labels name, not you: it is not run"):
        forged.normalize("touch this")
    monkeypatch.setenv(ALLOWED, "")  # so that it is restored
    allow_profile("shouting:normalize")
    assert forged.normalize("  a  b ") == "A B"
    with pytest.raises(StreamtrainError, match="profile 'shouting' is unknown"):
        profile_of("shouting")


def test_a_profile_that_has_changed_is_refused() -> None:
    replace(policy_of("text"), digest="").check_digest("here")
    policy_of("text").check_digest("here")
    with pytest.raises(StreamtrainError, match="gives other texts than when these labels were made"):
        replace(policy_of("text"), digest="0" * 16).check_digest("here")
