"""What a run leaves for people: one page that needs nothing else, and the closing screen."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCTC

from sharding.errors import StreamtrainError
from streamtrain.config import load_config
from streamtrain.eval.scorecard import read_scorecard
from streamtrain.training.environment import Start, add_start, read_starts
from streamtrain.training.report import write_report
from streamtrain.training.run_log import read_log, render_run
from tests.tools.page import Page
from tests.tools.training_runs import read_rows, run, training

STEPS = ("train.max_steps=9", "train.epochs=3", "eval.every_steps=3", "data.noise_snr_db=[5,40]")


@pytest.fixture(scope="module")
def reported(work: Path) -> Path:
    """The folder of a run of two ranks, which was resumed by one."""
    run(training(work, "reported", *STEPS, "train.max_steps=4", "train.checkpoint_every=4"))
    run([*training(work, "reported", *STEPS, ranks=1), "--replan"])
    return work / "reported"


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_the_report_of_a_run_is_one_page_that_opens_without_a_network(reported: Path) -> None:
    done = run([sys.executable, "-m", "streamtrain", "summary", reported, "--html"])
    assert done.stdout.startswith(f"{reported / 'report.html'}: written")
    page = report_of(reported)
    assert page.open == []
    assert len(page.sources) == 4
    for source in page.sources:
        kind, _, picture = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"http" not in base64.b64decode(picture).replace(b"http://www.w3.org/", b"").replace(
            b"http://purl.org/", b""
        ).replace(b"http://creativecommons.org/", b"").replace(b"https://matplotlib.org/", b"")
    assert (reported / "report.html").stat().st_size < 2e6


def test_the_report_says_what_people_write_down_after_a_run(reported: Path) -> None:
    page, rows = report_of(reported), read_log(reported / "log.csv")
    card, clips = read_scorecard(reported)
    told = json.loads((reported / "trained_on.json").read_text())
    for text in (
        "finished at step 9, by train.max_steps=9",
        f"{card['cer']:.4f}",
        "data.noise_snr_db", "[5.0, 40.0]", "model.pretrained", "deepspeed.gradient_clipping",
        told["index"], f"{told['hours']:,}",
        "started", "at step 4", "torch", "deepspeed", "2",
        clips[0].reference, clips[0].utterance_id,
        f"{rows[-1].loss:.4f}",
    ):  # fmt: skip
        assert text in page.text, text
    assert "train.keep_checkpoints" not in page.text  # as by default
    for epoch in {row.epoch for row in rows}:
        losses = [row.loss for row in rows if row.epoch == epoch]
        assert f"{sum(losses) / len(losses):.4f}" in page.text
    size = sum(weight.numel() for weight in AutoModelForCTC.from_pretrained(reported / "best").parameters())
    assert {(start.parameters, start.trained <= size) for start in read_starts(reported)} == {(size, True)}
    assert f"{size:,}, {read_starts(reported)[-1].trained:,} of them trained" in page.text
    assert read_starts(reported)[-1].vocabulary.startswith("gets a new head for the ")
    assert [start.ranks for start in read_starts(reported)] == [2, 1]
    assert [start.step for start in read_starts(reported)] == [0, 4]


def test_the_report_lists_the_evaluations_below_the_folder_of_the_run(reported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reported, tmp_path / "run", symlinks=True)
    assert "Evaluations in this folder" not in report_of(folder).text
    (folder / "on-test").mkdir()
    for name in ("scorecard.json", "hypotheses.jsonl"):
        shutil.copy(folder / name, folder / "on-test" / name)
    (folder / "damaged").mkdir()
    (folder / "damaged/scorecard.json").write_text("{")
    page = report_of(folder)
    assert "Evaluations in this folder" in page.text
    assert "on-test" in page.text
    assert re.search(r"damaged\s*cannot be read", page.text)


def test_the_report_shows_names_as_they_are_written(reported: Path, tmp_path: Path) -> None:
    name = "<b>\"a\" & 'b'</b>"
    folder = shutil.copytree(reported, tmp_path / name.replace("/", ""), symlinks=True)
    settings = json.loads((folder / "config.json").read_text())
    settings["data"]["cache_dir"] = name
    (folder / "config.json").write_text(json.dumps(settings))
    add_start(folder, Start(name, 9, 1, {name: 2}, {name: 1}, {name: name}))
    page = report_of(folder)
    assert page.open == []
    assert page.text.count(name) == 5
    assert json.dumps(name) in page.text


def test_a_run_that_was_never_scored_or_has_lost_files_is_reported_too(reported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reported, tmp_path / "poor", symlinks=True)
    for name in (
        "scorecard.json",
        "before.json",
        "config.json",
        "trained_on.json",
        "environment.json",
        "finished.json",
    ):
        (folder / name).unlink()
    page = report_of(folder)
    assert "has not finished" in page.text
    assert "Not recorded." in page.text
    for name in ("config.json", "trained_on.json", "environment.json"):
        (folder / name).write_text("[")
    assert report_of(folder).text == page.text
    (folder / "log.csv").unlink()
    with pytest.raises(StreamtrainError, match=r"has no steps in log\.csv"):
        write_report(folder)


def test_a_long_log_makes_no_long_page(reported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reported, tmp_path / "long", symlinks=True)
    head, *_ = read_rows(folder)
    lines = [",".join(head)]
    lines += [
        ",".join(str({"step": step, "epoch": step // 5000, "loss": 3 / step}.get(name, head[name])) for name in head)
        for step in range(1, 50_001)
    ]
    (folder / "log.csv").write_text("\n".join([*lines, ""]))
    assert write_report(folder).stat().st_size < 3e6


def test_the_closing_screen_names_the_next_corpus_after_the_demo_alone(reported: Path, tmp_path: Path) -> None:
    assert "corpus of your own" not in render_run(reported)
    folder = shutil.copytree(reported, tmp_path / "demo", symlinks=True)
    settings = load_config("demo", ["train.run_dir=elsewhere", "train.max_steps=7"]).model_dump()
    (folder / "config.json").write_text(json.dumps(settings))
    assert "Next, with a corpus of your own" in render_run(folder)
