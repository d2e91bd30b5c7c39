"""Every recording scored once, the long ones as a whole; the scorecard's groups add up."""

import base64
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from sharding.errors import StreamtrainError
from sharding.labels.pasketti import SYMBOLS, normalize_ipa
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.store import open_store
from streamtrain.api import build
from streamtrain.config import ModelConfig
from streamtrain.distributed import World
from streamtrain.eval import html as page
from streamtrain.eval.compare import compare
from streamtrain.eval.evaluate import evaluate_model
from streamtrain.eval.metrics import EditCounts, TextEdits, count_edits
from streamtrain.eval.scorecard import ClipScore, Evaluation, count_confusions, scorecard
from streamtrain.model.pretrained import load_model, save_model
from tests.tools.commands import run_module
from tests.tools.corpus import PHONES, make_corpus, read_manifest, write_manifest
from tests.tools.page import Page
from tests.tools.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every child is a validation child; two recordings are long."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_corpus(folder / "raw", clips=14, children=4, long_clips=2)
    command = [sys.executable, "-m", "sharding", "build", folder / "raw", "--out", folder / "shards"]
    subprocess.run([*map(str, command), "--valid-fraction", "1"], cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder / "encoder")
    network = load_model(ModelConfig(pretrained=str(folder / "encoder")))
    save_model(network, folder / "model")
    return folder / "model"


def score(
    model: Path, shards: Path, out: Path, batch_seconds: float = 10
) -> tuple[dict[str, object], list[dict[str, object]]]:
    card = evaluate_model(str(model), str(shards), "valid", batch_seconds, out, World())
    return card, [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()]


def test_every_recording_is_scored_once_against_its_whole_label(shards: Path, model: Path, tmp_path: Path) -> None:
    store = open_store(shards)
    index = read_index(store)
    samples = [read_sample(store, index, row) for row in index.split("valid").tolist()]
    labels = {s.recording_id: s.parent_text if s.parent_id else s.text for s in samples if s.piece == 0}
    assert sum(sample.parent_id is not None for sample in samples) >= 4  # pieces of two recordings

    card, rows = score(model, shards, tmp_path)
    assert {row["utterance_id"]: row["reference"] for row in rows} == labels
    assert len(rows) == card["clips"] == 16
    counted = sum(
        (count_edits(normalize_ipa(str(row["reference"])), normalize_ipa(str(row["hypothesis"]))) for row in rows),
        EditCounts(),
    )
    assert (card["edits"], card["reference_length"]) == (counted.edits, counted.reference_length)
    assert card["cer"] == counted.edits / counted.reference_length


def test_the_test_split_is_scored_apart_and_by_the_command_as_well(model: Path, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "raw", clips=12, children=4, long_clips=3)
    splits = ("train", "dev", "test")
    rows = [row | {"split": splits[number % 3]} for number, row in enumerate(read_manifest(folder))]
    rows[2] |= {"filesize_bytes": 3}  # so that it is rejected
    out = build([write_manifest(folder, rows)], tmp_path / "shards").index
    assert out.notes["test"] == {"clips": 5, "rejected": 1}
    options = ("--shards", tmp_path / "shards", "--split", "test", "--out", tmp_path / "test")
    done = run_module("streamtrain", "evaluate", "--model", model, *options)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "test/scorecard.json").read_text())
    scored = [json.loads(line) for line in (tmp_path / "test/hypotheses.jsonl").read_text().splitlines()]
    wanted = {row["utterance_id"]: row["phonetic_text"] for row in rows[5::3]}
    assert {row["utterance_id"]: row["reference"] for row in scored} == wanted
    assert any(row["seconds"] > 25 for row in scored)  # of which only the whole label is known
    assert card["validation"]["rejected"] == 1
    assert "the build rejected 1 test clip: not in this score" in done.stdout


def test_the_groups_of_the_scorecard_add_up_to_its_total(shards: Path, model: Path, tmp_path: Path) -> None:
    card, _ = score(model, shards, tmp_path)
    groups = card["groups"]
    assert isinstance(groups, dict)
    for name in ("corpus", "age_bucket", "duration", "label_length"):
        for field in ("edits", "reference_length", "clips"):
            assert sum(row[field] for row in groups[name]) == card[field], (name, field)
    macro = card["macro"]
    assert isinstance(macro, dict)
    for name, group in [*groups.items(), ("speaker", card["by_speaker"])]:
        assert macro[name]["rate"] == pytest.approx(sum(row["rate"] for row in group) / len(group))
        if macro[name]["interval_95"] is not None:
            low, high = macro[name]["interval_95"]
            assert low <= high
            rates = [row["rate"] for row in group]
            assert name != "speaker" or min(rates) - 1e-9 <= low <= high <= max(rates) + 1e-9
        assert sum(row["edits"] for row in group) == card["edits"]
    assert sum(row["clips"] for row in card["calibration"]) == card["clips"]  # type: ignore[attr-defined]
    assert sum(int(card[kind]) for kind in ("substitutions", "deletions", "insertions")) == card["edits"]  # type: ignore[call-overload]


def test_what_is_heard_does_not_depend_on_the_size_of_batches(shards: Path, model: Path, tmp_path: Path) -> None:
    heard = []
    for batch_seconds in (1, 10, 100):
        _, rows = score(model, shards, tmp_path / str(batch_seconds), batch_seconds)
        heard.append([(row["utterance_id"], row["hypothesis"]) for row in rows])
    assert heard[0] == heard[1] == heard[2]


def test_the_page_opens_without_a_network_and_lets_the_worst_clips_be_heard(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    card, rows = score(model, shards, tmp_path)
    page = Page((tmp_path / "scorecard.html").read_text("utf-8"))
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources)
    sounds = [base64.b64decode(source.partition(",")[2]) for source in page.sources if source.startswith("data:audio")]
    assert len(sounds) >= len(rows) + 2  # two recordings in two pieces or more
    store = open_store(shards)
    index = read_index(store)
    assert set(sounds) == {read_sample(store, index, row).audio for row in index.split("valid").tolist()}
    (picture,) = (source for source in page.sources if source.startswith("data:image"))
    assert imread(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).shape[0] > 500
    for row in rows:
        assert str(row["utterance_id"]) in page.text
        assert str(row["reference"]) in page.text
    assert f"{card['cer']:.4f}" in page.text


def test_the_page_shows_names_as_they_are_written(shards: Path, tmp_path: Path) -> None:
    name = "<b>\"a\" & 'b'</b>"
    clip = ClipScore(name, name, "", name, name, 1.0, True, name, name, 0.5, count_edits(name, name), EditCounts())
    evaluation = Evaluation(TextEdits(clip.counts), (clip,), PHONES, {})
    card = scorecard(evaluation, read_index(open_store(shards)), model=name, shards=name, split="valid")
    page.write_page(card, [clip], {}, tmp_path / "page.html", compare([clip], [clip], name))
    shown = Page((tmp_path / "page.html").read_text("utf-8"))
    assert shown.open == []
    assert shown.text.count(name) == 14  # none of them is an element


def test_a_model_beside_itself_differs_in_nothing_and_beside_another_as_the_scores_say(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    other = load_model(ModelConfig(pretrained=str(model)))
    with torch.no_grad():
        other.network.lm_head.bias[other.vocab.encode("k")] += 3
    save_model(other, tmp_path / "other")
    before, _ = score(model, shards, tmp_path / "before")
    after, _ = score(tmp_path / "other", shards, tmp_path / "after")
    same = run_module("streamtrain", "compare", tmp_path / "before", tmp_path / "before", "--json")
    assert all(row["difference"] == 0 for row in json.loads(same.stdout)["rows"])
    assert json.loads(same.stdout)["rows"][0]["interval_95"] == [0, 0]
    assert json.loads(same.stdout)["changed"] == []
    done = run_module("streamtrain", "compare", tmp_path / "before", tmp_path / "after", "--json")
    found = json.loads(done.stdout)
    total = found["rows"][0]
    assert (total["before"], total["after"]) == (before["cer"], after["cer"])
    assert total["interval_95"][0] <= total["difference"] <= total["interval_95"][1]
    assert found["changed"]
    assert len(found["changed"]) <= 20
    shown = run_module("streamtrain", "compare", tmp_path / "before", tmp_path / "after").stdout
    assert f"{total['difference']:+.4f}" in shown
    evaluate_model(str(model), str(shards), "valid", 10, tmp_path / "back", World(), compare_to=tmp_path / "after")
    assert f"{-total['difference']:+.4f}" in (tmp_path / "back" / "scorecard.html").read_text("utf-8")


def test_scores_of_other_clips_are_not_compared(shards: Path, model: Path, tmp_path: Path) -> None:
    score(model, shards, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    lines = (tmp_path / "one" / "hypotheses.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "two" / "hypotheses.jsonl").write_text("".join(lines[1:]), "utf-8")
    done = run_module("streamtrain", "compare", tmp_path / "one", tmp_path / "two")
    assert done.returncode == 1
    assert "the two scores are not of the same clips: 1 are in only one" in done.stderr
    done = run_module("streamtrain", "compare", tmp_path / "one", tmp_path)
    assert f"{tmp_path}: no scorecard (No such file or directory)" in done.stderr
    done = run_module("streamtrain", "compare", tmp_path / "one", tmp_path / "one")
    assert done.stdout.endswith("no clear difference: the interval contains 0\n")


def test_the_mean_of_corpora_is_drawn_with_every_corpus_in_it(shards: Path) -> None:
    """Children of a corpus who are all alike leave nothing to chance, however few they are beside the others."""
    clips = [
        ClipScore(f"{corpus}{child}", f"{corpus}{child}", "", corpus, "5-7", 1.0, True, "a" * 10, "", 0.5,
                  EditCounts(deletions=edits, reference_length=10), EditCounts())
        for corpus, children, edits in (("many", 20, 1), ("few", 3, 5))
        for child in range(children)
    ]  # fmt: skip
    total = sum((clip.counts for clip in clips), EditCounts())
    index = read_index(open_store(shards))
    card = scorecard(Evaluation(TextEdits(total, total), tuple(clips), PHONES, {}), index)
    assert card["macro"]["corpus"]["rate"] == pytest.approx(0.3)
    assert card["macro"]["corpus"]["interval_95"] == pytest.approx((0.3, 0.3))
    low, high = card["interval_95"]
    assert low < card["cer"] < high  # how many of which corpus are drawn is left to chance there
    alone = Evaluation(TextEdits(total, total), tuple(clips[:21]), PHONES, {})  # one child of the other corpus
    assert scorecard(alone, index)["macro"]["corpus"]["interval_95"] is None


def test_ages_are_ordered_as_ages_wherever_they_are_shown(shards: Path) -> None:
    ages = ["3-4", "5-7", "8-11", "12+", ""]
    clips = [
        ClipScore(age, age, "", "kids", age, 1.0, True, "kæt", "kæt", 0.5, count_edits("kæt", "kæt"), EditCounts())
        for age in sorted(ages)
    ]  # fmt: skip
    total = EditCounts(reference_length=15)
    card = scorecard(Evaluation(TextEdits(total, total), tuple(clips), PHONES, {}), read_index(open_store(shards)))
    shown = [*ages[:4], "unknown"]
    assert [row["name"] for row in card["groups"]["age_bucket"]] == shown
    assert [row.name for row in compare(clips, clips, "").rows if row.group == "age_bucket"] == shown


def test_another_score_to_compare_with_is_looked_at_before_the_work(shards: Path, model: Path, tmp_path: Path) -> None:
    for beside, said in ((tmp_path / "nowhere", "no scorecard"), (tmp_path / "out", "is --out itself")):
        (tmp_path / "out").mkdir(exist_ok=True)
        if said.startswith("is"):
            score(model, shards, tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        with pytest.raises(StreamtrainError, match=said):
            evaluate_model(str(model), str(shards), "valid", 10, tmp_path / "out", World(), compare_to=beside)
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@given(st.lists(st.tuples(*[st.text(SYMBOLS[:5] + " ", max_size=9).map(normalize_ipa)] * 2), max_size=6))
def test_confusions_add_up_to_what_was_said_and_what_was_edited(texts: list[tuple[str, str]]) -> None:
    clips = [
        ClipScore(
            "", "", "", "", "", 1.0, True, reference, hypothesis, 0.5, count_edits(reference, hypothesis), EditCounts()
        )
        for reference, hypothesis in texts
    ]
    confusions = count_confusions(clips, PHONES)
    total = sum((clip.counts for clip in clips), EditCounts())
    assert sum(count for (said, _), count in confusions.items() if said) == total.reference_length
    assert sum(count for (said, heard), count in confusions.items() if said != heard) == total.edits
    assert sum(count for (said, _), count in confusions.items() if not said) == total.insertions
    assert ("", "") not in confusions


@pytest.mark.parametrize("shown", [2, 45])
def test_the_matrix_of_confusions_has_all_that_was_said_and_heard(shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a symbol that no label has: heard for another, or where nothing was said."""
    monkeypatch.setattr(page, "SHOWN_SYMBOLS", shown)
    confusions = Counter({("a", "a"): 5, ("a", "x"): 2, ("", "x"): 3, ("b", ""): 1, ("b", "b"): 4})
    said, heard, counts = page.confusion_matrix(confusions)
    assert counts.sum() == confusions.total()
    rows = dict(zip(said, counts.sum(axis=1), strict=True))
    assert (rows["a"], rows[""]) == (7, 3)
    if shown == 45:
        assert rows["b"] == 5
        assert counts[said.index("a"), heard.index("x")] == 2
        assert counts[said.index(""), heard.index("x")] == 3
        assert page._shown_symbols_note(said + heard) == "All 3 symbols."
    else:
        assert rows["others"] == 5
        assert page._shown_symbols_note(said + heard) == "The 2 most frequent symbols, and all others together."
