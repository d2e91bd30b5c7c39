"""One command: what it says of itself, of a mistake, of this machine; and the ranks that it starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sharding.cli import app as sharding_app
from streamtrain.cli import app, main
from streamtrain.config import PACKAGED, Config, load_config
from streamtrain.launcher import _to_words
from streamtrain.ranks import TrainOptions
from tests.tools.training_runs import ROOT, environment, read_rows, steps_saved, wait_until

COMMANDS = [name for name in app if not name.startswith("-")]
TINY = ["data.batch_seconds=4", "train.micro_batches_per_step=4", "train.warmup_steps=2"]


def test_the_command_offers_all_that_there_is() -> None:
    promised = "build verify inspect split index demo-corpus plan train evaluate transcribe align score compare export"
    assert {*promised.split(), "package", "summary", "doctor", "config"} == set(COMMANDS)
    assert {name for name in sharding_app if not name.startswith("-")} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_and_all_its_options_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Example: streamtrain {name} " in told
    for argument in app[name].assemble_argument_collection(parse_docstring=True):
        assert not argument.show or argument.parameter.help, f"{name} {argument.name} is not explained"


def test_without_a_command_there_is_help_and_with_a_misspelt_one_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    assert main(["biuld"]) == 2
    assert 'Did you mean "build"?' in capsys.readouterr().err
    assert main(["build", "--max-durations", "9"]) == 2
    told = capsys.readouterr().err
    assert "Did you mean --max-duration?\nhint: `streamtrain build --help`" in told


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version
    assert capsys.readouterr().out.strip() in (version[1], "not installed")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_learns_the_commands(shell: str, tmp_path: Path) -> None:
    path = app.install_completion(shell=shell, output=tmp_path / "completion", add_to_startup=False)  # type: ignore[arg-type]
    assert all(word in path.read_text("utf-8") for word in ("demo-corpus", "transcribe", "max-duration"))


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGED)
def test_a_configuration_goes_by_its_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", name, "--set", "train.epochs=3"]) == 0
    Path("own.json").write_text(capsys.readouterr().out)
    assert load_config("own.json") == load_config(name, ["train.epochs=3"])
    assert load_config("own.json", ["train.epochs=20"]).train.epochs == 20


def test_a_file_goes_before_a_packaged_configuration_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text((ROOT / "configs" / "zero2.json").read_text())
    assert load_config("demo") == load_config("zero2")


def test_settings_without_a_configuration_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "train.epochs=3", "zero2"]) == 1
    assert "name one before it" in capsys.readouterr().err


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain"]) == 0
    told = capsys.readouterr().out
    for section, field in Config.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"^{section}\.{key}=.*\n    [A-Z].*\.$", told, re.MULTILINE), f"{section}.{key}"


# --- the machine ----------------------------------------------------------------------------------------------------


def test_the_doctor_examines_this_machine_and_the_places(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(small_shards)]) == 0
    told = capsys.readouterr().out
    assert f"{small_shards}: can be read, and holds a shard set" in told
    assert f"{len(os.sched_getaffinity(0))} may be used" in told
    assert main(["doctor", str(tmp_path / "none")]) == 1
    assert f"✗ place     {tmp_path / 'none'}: there is no such folder" in capsys.readouterr().out


# --- ranks ----------------------------------------------------------------------------------------------------------


def start(work: Path, name: str, *settings: str) -> "tuple[subprocess.Popen[bytes], Path]":
    log = work / f"{name}.out"
    command = [sys.executable, "-m", "streamtrain", "train", "--config", "zero2", "--ranks", "2", "--set",
               f"data.shards={work / 'shards'}", f"model.pretrained={work / 'model'}", f"train.run_dir={work / name}",
               *TINY, *settings]  # fmt: skip
    with open(log, "ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=work, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    return process, log


def test_train_starts_ranks_anywhere_and_evaluate_scores_as_they_did(work: Path) -> None:
    process, log = start(work, "by-command", "train.max_steps=3")
    assert process.wait(240) == 0, log.read_text()[-3000:]
    told = log.read_text()
    assert told.startswith("training as zero2 says\n")
    assert told.count("training as zero2 says") == told.count("threads per rank") == 1
    assert len(read_rows(work / "by-command")) == 3
    command = [sys.executable, "-m", "streamtrain", "evaluate", "--ranks", "2",
               "--model", work / "by-command" / "best", "--shards", work / "shards",
               "--out", work / "scored-by-command"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((work / name / "scorecard.json").read_text())["cer"] for name in ("by-command", "scored-by-command")
    )
    assert ours == theirs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_command_ends_all_after_a_save(number: signal.Signals, code: int, work: Path) -> None:
    name = f"ended-by-{number.name}"
    process, log = start(work, name, "train.epochs=200")
    wait_until(lambda: (work / name / "log.csv").is_file() and len(read_rows(work / name)) > 2, process, log)
    everyone = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(60) == code
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive
    if number != signal.SIGKILL:
        assert steps_saved(work / name)[-1] == len(read_rows(work / name)) > 2, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.5])
def test_a_signal_while_the_ranks_import_leaves_none(number: signal.Signals, seconds: float, work: Path) -> None:
    name = f"ended-early-{number.name}-{seconds}"
    process, log = start(work, name, "train.epochs=200")
    time.sleep(seconds)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(60) in (143, 130, -9, -15)  # -15: it had not begun to handle signals
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive, log.read_text()[-3000:]


def test_a_rank_that_dies_ends_the_others_and_the_command_fails(work: Path) -> None:
    process, log = start(work, "lost-rank", "train.epochs=200")
    wait_until(lambda: (work / "lost-rank/log.csv").is_file() and len(read_rows(work / "lost-rank")) > 2, process, log)
    ranks = [child for child in psutil.Process(process.pid).children() if "streamtrain" in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(90) not in (0, None)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_options_reach_the_ranks_as_they_were_given() -> None:
    options = TrainOptions("zero2", ["a.b=1", "c.d=[1,2]"], resume="none", replan=True)
    words = ["train", "--config", "zero2", "--set", "a.b=1", "c.d=[1,2]", "--resume", "none", "--replan"]
    assert ["train", *_to_words(options)] == words
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["options"] == options


def test_a_hostfile_that_is_not_there_and_an_option_for_a_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "zero2", "--hostfile", "hosts"]) == 1
    assert "--hostfile hosts: there is no such file" in capsys.readouterr().err
    for command in ("export M --out --help-me", "transcribe M a --out --beam 4", "build --out --workers 4",
                    "verify S --repair", "train --config zero2 --set", "index T --valid"):  # fmt: skip
        assert main(command.split()) == 2, command
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_told_before_any_rank_starts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, told in (("train.epoch=2", "did you mean 'train.epochs'?"), ("data.shards=none", "no shard set here")):
        assert main(["train", "--config", "zero2", "--ranks", "2", "--set", setting]) == 1
        assert told in capsys.readouterr().err
    assert main(["train", "--config", "zero2", "--ranks", "3", "--set", f"data.shards={work / 'shards'}"]) == 1
    assert "3 ranks cannot share 8 micro-batches" in capsys.readouterr().err
    assert main(["train", "--config", "zero4", "--ranks", "2"]) == 1
    assert "packaged configurations: common-voice, demo, pasketti, " in capsys.readouterr().err
