"""Which model is the best one: by which score, of a loss that is exact, printed as other tools read it."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharding.build.scan import speaker_hash
from sharding.labels.policy import LabelPolicy, policy_of
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.store import open_store
from streamtrain.config import GROUPS, METRICS, SELECTIONS, ConfigError, load_config, name_score
from streamtrain.data.collate import collate
from streamtrain.data.dataset import ShardStream
from streamtrain.data.plan import Perturbation
from streamtrain.distributed import World
from streamtrain.eval.evaluate import evaluate
from streamtrain.eval.metrics import EditCounts, TextEdits
from streamtrain.eval.scorecard import ClipScore, Evaluation, groupings, scorecard
from streamtrain.model.inference import scoring_mode
from streamtrain.run_status import read_result
from streamtrain.training.checkpoint import list_checkpoints, open_checkpoint
from streamtrain.training.run_log import read_before, read_log
from tests.tools.corpus import PHONES, make_corpus, read_manifest, write_manifest
from tests.tools.models import VOCAB, talkative
from tests.tools.ports import free_port
from tests.tools.training_runs import losses, read_rows, run, training

SCRAPED = r"'{}': ([0-9]+(.|e-)[0-9]+),?"  # SageMaker's metric definitions
SCORED = ("train.max_steps=3", "train.checkpoint_every=1", "eval.every_steps=1")


def scored(errors: dict[str, tuple[int, int]], labels: LabelPolicy = PHONES, loss: float | None = 1.5) -> Evaluation:
    """Clips of ten symbols and two words by corpus: how many clips, and the edits in each."""
    clips = tuple(
        ClipScore(f"{corpus}-{number}", f"{corpus}-child-{number % 3}", "", corpus, "5-7", 1.0, True, "a", "b", 0.5,
                  EditCounts(edits, 0, 0, 10), EditCounts(edits % 3, 0, 0, 2), EditCounts(2 * edits, 0, 0, 30))
        for corpus, (count, edits) in errors.items()
        for number in range(count)
    )  # fmt: skip
    total = sum((clip.counts for clip in clips), EditCounts())
    words = sum((clip.words for clip in clips), EditCounts())
    characters = sum((clip.characters for clip in clips if clip.characters), EditCounts())
    return Evaluation(TextEdits(total, characters, words, words), clips, labels, {}, loss, len(clips))


def test_pooled_and_mean_scores_of_unequal_corpora_may_rank_two_models_differently() -> None:
    """The pooled score hides the small corpus."""
    for_many = scored({"large": (90, 1), "small": (10, 9)})
    for_all = scored({"large": (90, 2), "small": (10, 3)})
    assert [each.score("cer") for each in (for_many, for_all)] == pytest.approx([0.12, 0.14])
    assert [each.score("cer/corpus") for each in (for_many, for_all)] == pytest.approx([1 / 3, 1 / 6])


def test_each_score_that_a_configuration_may_name_is_computed_where_its_metric_is(tmp_path: Path) -> None:
    evaluation = scored({"large": (9, 1), "small": (4, 9)})
    assert set(GROUPS) == {"speaker", *groupings(evaluation.clips)}
    phones, tokens = (replace(evaluation, labels=LabelPolicy("ipa", units, ("a",))) for units in ("segments", "tokens"))
    for select in SELECTIONS:
        assert (evaluation.score(select) is None) == select.startswith("per")
        assert phones.score(select) is not None
        assert (tokens.score(select) is None) == select.startswith(("cer", "wer"))
        assert load_config("zero2", [f"eval.select={select}"]).eval.select == select
    assert replace(evaluation, loss=None).score("loss") is None
    assert [each.score("auto") for each in (evaluation, phones)] == [evaluation.cer, phones.per]
    assert phones.score("per/corpus") == pytest.approx(0.5)
    assert phones.score("cer/corpus") == pytest.approx(1 / 3)
    assert (name_score("wer/age_bucket"), name_score("cer"), name_score("loss")) == (
        "mean WER by age bucket",
        "CER",
        "loss",
    )
    for wrong in ("cer/corpora", "loss/corpus", "wers", ""):
        with pytest.raises(ConfigError, match=r"give auto, cer, wer, per or loss, or a mean over groups"):
            load_config("zero2", [f"eval.select={wrong}"])
    assert set(METRICS) >= evaluation.metrics.keys() - {"loss"}


def test_the_mean_that_selects_is_that_of_the_scorecard(work: Path) -> None:
    evaluation = scored({"large": (9, 1), "small": (4, 9)}, policy_of("ipa", "segments"))
    card = scorecard(evaluation, read_index(open_store(work / "shards")))
    assert card["metric"] == "per"
    assert {name: macro["rate"] for name, macro in card["macro"].items()} == {
        name: evaluation.score(f"per/{name}") for name in GROUPS
    }


def test_the_loss_is_that_of_each_clip_alone_by_the_symbols_and_leaves_split_recordings_out(work: Path) -> None:
    model, store = talkative("wav2vec2, group norm"), open_store(work / "shards")
    index = read_index(store)
    nats, symbols, clips, split = [], 0, 0, set()
    for row in index.split("valid").tolist():
        sample = read_sample(store, index, row)
        if sample.recording_id != sample.utterance_id:
            split.add(sample.recording_id)
            continue
        recorded = Perturbation.as_recorded(index.samples["samples"][[row]].astype("int64"))
        batch = collate([sample], recorded, VOCAB, True)
        with scoring_mode():
            logits = model.network(batch.inputs).logits
        loss = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), batch.targets, model.frame_counts(batch.input_lengths),
            batch.target_lengths, blank=VOCAB.blank, reduction="sum",
        )  # fmt: skip
        nats.append(float(loss))
        symbols, clips = symbols + len(sample.text), clips + 1
    evaluation = evaluate(model, ShardStream(index, store, VOCAB, True, World()), "valid", 8, World())
    assert evaluation.loss == pytest.approx(math.fsum(nats) / symbols, rel=1e-5)
    assert evaluation.loss_clips == clips == len(evaluation.clips) - len(split)


def test_the_loss_is_the_same_at_any_number_of_ranks(work: Path) -> None:
    run(training(work, "loss", "train.max_steps=1", ranks=1))
    found = []
    for ranks in (1, 2, 3):
        out = work / f"loss-by-{ranks}"
        launcher = ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port()] if ranks > 1 else ["python"]
        run([*launcher, "launch/evaluate.py", "--model", work / "loss" / "best", "--shards", work / "shards",
             "--out", out])  # fmt: skip
        card = json.loads((out / "scorecard.json").read_text())
        found.append((card["loss"], card["loss_clips"]))
    assert found[0] == found[1] == found[2]
    assert 0 < found[0][1] <= card["clips"]


def test_each_evaluation_is_printed_as_transformers_trainer_prints_it_and_logged(work: Path) -> None:
    done = run(training(work, "printed", "train.epochs=1", "eval.every_steps=2"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{'eval_")]
    rows = [row for row in read_rows(work / "printed") if row["eval_cer"]]
    assert len(lines) == len(rows) + 1  # before training, too
    for line, row in zip(lines[1:], rows, strict=True):
        values = {name: float(match[0]) for name in ("eval_loss", "eval_wer", "eval_cer", "eval_runtime",
                  "eval_samples_per_second", "epoch") for match in re.findall(SCRAPED.format(name), line)}  # fmt: skip
        assert list(json.loads(line.replace("'", '"'))) == list(values)
        for name in ("eval_loss", "eval_wer", "eval_cer", "eval_runtime"):
            assert values[name] == pytest.approx(float(row[name]), abs=5e-5)
        assert row["eval_score"] == row["eval_cer"]
        assert row["eval_per"] == ""  # of characters
    assert values["epoch"] == 1
    last = read_log(work / "printed" / "log.csv")[-1]
    assert json.loads((work / "printed" / "before.json").read_text()).keys() == {"loss", "wer", "cer"}
    card = json.loads((work / "printed" / "scorecard.json").read_text())
    if card["step"] == last.step:
        assert (card["loss"], card["cer"]) == (last.eval_loss, last.eval_cer)


def test_the_best_model_is_that_of_the_chosen_score_and_another_choice_seeks_it_anew(work: Path) -> None:
    folder = work / "chosen"
    run(training(work, "chosen", *SCORED, "eval.select=loss", ranks=1))
    rows = read_log(folder / "log.csv")
    tried = [read_before(folder)["loss"], *(row.eval_loss for row in rows)]
    result = read_result(folder)
    assert (result.select, result.best_score) == ("loss", min(tried))
    assert tried[result.best_step or 0] == min(tried)
    assert f"best loss {min(tried):.4f} at step {result.best_step}" in str(result)
    assert json.loads((folder / "scorecard.json").read_text())["loss"] == min(tried)
    done = run(training(work, "chosen", *SCORED, "eval.select=cer/speaker", ranks=1))
    assert "eval.select was 'loss', is 'cer/speaker': the best score is reset" in done.stderr
    state = open_checkpoint(list_checkpoints(folder / "checkpoints")[-1]).state
    card = json.loads((folder / "scorecard.json").read_text())
    assert (state.select, state.best_score) == ("cer/speaker", card["macro"]["speaker"]["rate"])
    assert [row.eval_score for row in read_log(folder / "log.csv")] == [None, None, state.best_score]
    assert "best mean CER by speaker" in run([sys.executable, "-m", "streamtrain", "summary", folder]).stdout


@pytest.mark.parametrize("select", ["per", "per/corpus"])
def test_a_score_that_the_labels_do_not_have_stops_the_run_before_its_first_step(select: str, work: Path) -> None:
    done = run(training(work, "unscorable", f"eval.select={select}", ranks=1), expect=1)
    assert f"eval.select is '{select}', but the labels of {work / 'shards'} have no {select[:3].upper()}" in done.stderr
    assert "choose another score: cer, wer, loss, or a mean over groups" in done.stderr
    assert not (work / "unscorable").exists()


def test_a_run_without_a_loss_never_gets_to_its_first_step_if_that_selects(work: Path) -> None:
    """The only validation recording was split."""
    corpus = make_corpus(work / "raw" / "long", clips=9, children=3, long_clips=1)
    rows = read_manifest(corpus)
    rows[-1]["child_id"] = min((f"child {number}" for number in range(99)), key=speaker_hash)  # it validates
    write_manifest(corpus, rows)
    run([sys.executable, "-m", "sharding", "build", corpus, "--out", work / "long", "--valid-fraction", "0.0001"])
    settings = [f"data.shards={work / 'long'}", "data.batch_seconds=26", "eval.select=loss", "train.max_steps=1"]
    done = run(training(work, "lossless", *settings, ranks=1), expect=1)
    assert "TrainError: eval.select is 'loss', but no clip of split 'valid' has such a score" in done.stderr
    assert losses(work / "lossless") == []
