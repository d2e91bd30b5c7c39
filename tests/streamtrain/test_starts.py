"""How a run starts: what is wrong is told at once and in words, and a failed start leaves nothing behind."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from sharding.errors import StreamtrainError
from sharding.labels.policy import policy_of
from streamtrain.config import load_config
from streamtrain.distributed import World
from streamtrain.infer.export import save_best
from streamtrain.model import hub
from streamtrain.model.ctc import CTCModel
from streamtrain.model.tokenizer import save_vocab
from streamtrain.model.vocab import vocab_of
from streamtrain.run_status import RunResult, discard_result, read_result, warn_unless_finished, write_result
from streamtrain.training.run import _check_best, _lock_run, train
from streamtrain.training.trainer import TrainError
from tests.tools.commands import run_module
from tests.tools.models import make_network
from tests.tools.ports import free_port
from tests.tools.training_runs import ROOT, environment, read_rows, run, start, steps_saved, training, wait_until


def test_a_run_does_not_go_on_beside_a_best_model_that_is_damaged(tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_best(
        CTCModel(make_network("wav2vec2, group norm"), vocab_of(policy_of("pasketti")), normalize=True).eval(), best
    )
    _check_best(tmp_path, has_checkpoint=True, resume="auto")
    with open(best / "model.safetensors", "r+b") as file:
        file.seek(-7, 2)
        file.write(b"\xff")
    with pytest.raises(TrainError, match=rf"model\.safetensors: damaged: .*\nhint: remove {best}"):
        _check_best(tmp_path, has_checkpoint=True, resume="auto")
    _check_best(tmp_path, has_checkpoint=True, resume="none")  # starts over, and overwrites it


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train.py --config configs/zero2.json --set data.batch_second=4", "did you mean 'data.batch_seconds'?"),
        ("train.py --config configs/zero2.json --set deepspeed.optimizer.params={}", "params.lr is missing"),
        (
            "train.py --config configs/zero2.json --set train.micro_batches_per_step=3",
            "2 ranks cannot share",
        ),
        ("evaluate.py --model nowhere --out out", "nowhere/vocab.json: no vocabulary"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(command: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    script, *arguments = command.split()
    path = f"{tmp_path}:{ROOT}"
    done = run([sys.executable, f"launch/{script}", *arguments], expect=1, PYTHONPATH=path, WORLD_SIZE="2")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("library", "command", "opening"),
    [
        ("numpy", "-m sharding build a --out b", ""),  # which all of its commands import, in half a second
        ("pandas", "-m sharding inspect SHARDS", "reading SHARDS"),
        ("numpy", "-m streamtrain plan SHARDS --config configs/zero2.json", ""),
        ("torch", "-m streamtrain transcribe MODEL a.wav b.wav --out -", "transcribing a.wav, b.wav with MODEL, into "),
        ("torch", "-m streamtrain align MODEL SHARDS --out -", "aligning the labels of SHARDS with MODEL, into "),
        ("torch", "-m streamtrain export MODEL --out copy", "copying MODEL to copy"),
        ("torch", "-m streamtrain package MODEL --out -", "packing MODEL into "),
        ("torch", "launch/train.py --config configs/zero2.json --set data.shards=SHARDS", "training as configs/zero2"),
        ("torch", "launch/evaluate.py --model MODEL --shards SHARDS --out o", "scoring MODEL on split valid of SHARDS"),
    ],
)
def test_a_command_tells_what_it_begins_before_long_imports_and_ctrl_c_ends_it_there(
    library: str, command: str, opening: str, small_shards: Path, tmp_path: Path
) -> None:
    """The library in whose import Ctrl-C is pressed makes an error of its own of it, as some do."""
    save_vocab(vocab_of(policy_of("pasketti")), tmp_path / "MODEL", do_normalize=True, attention_mask=False)
    (tmp_path / "SHARDS").symlink_to(small_shards)
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    slow = "import sys, time\nsys.stderr.write('importing\\n')\ntry:\n time.sleep(60)\nexcept BaseException:\n 1 / 0\n"
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / f"{library}.py").write_text(slow)
    variables = environment() | {"PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *command.split()], cwd=tmp_path, env=variables, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stderr is not None
        assert "".join(iter(process.stderr.readline, "importing\n")).startswith(opening)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == 130


def test_a_hub_that_cannot_be_reached_is_told_and_leaves_no_run_folder(work: Path) -> None:
    hub = f"http://127.0.0.1:{free_port()}"
    command = training(work, "unreached", "model.pretrained=nobody/no-such-model", ranks=1)
    done = run(command, expect=1, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub, HF_HOME=str(work / "hub"))
    assert f"the model hub cannot be reached ({hub}: [Errno 111] Connection refused)" in done.stderr
    assert done.stderr.count("model 'nobody/no-such-model' cannot be loaded") == 1
    assert "give its folder, --set model.pretrained=FOLDER" in done.stderr
    assert not (work / "unreached").exists()


def test_a_hub_that_never_answers_is_waited_for_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_SEC", 0.2)
        assert str(hub.why_unreachable()).endswith(" does not answer within 0.2 s")


def test_the_hub_is_asked_for_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert hub.needs_hub("facebook/wav2vec2-base")
    assert not hub.needs_hub(str(tmp_path))
    assert not hub.needs_hub(str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.needs_hub("facebook/wav2vec2-base")


def test_a_run_that_was_ended_is_told_from_one_that_finished(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C saves and ends with 130, and the launcher of a run that was killed may return 0: its folder tells."""
    folder = work / "ended"
    done = run(training(work, "ended", "train.max_steps=2", "data.workers=0", ranks=1), PYTHONPROFILEIMPORTTIME="1")
    assert "deepspeed.runtime.engine" in done.stderr
    assert "torch._inductor.compile_fx" not in done.stderr  # the compiler, two seconds long
    assert re.search(
        r"finished at step 2, by train\.max_steps=2; best CER", run_module("streamtrain", "summary", folder).stdout
    )
    samples = (folder / "samples.txt").read_text()
    process = start([*training(work, "ended", "train.max_steps=90", ranks=1), "--replan"], folder.with_suffix(".out"))
    wait_until(lambda: len(read_rows(folder)) > 4, process, folder.with_suffix(".out"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stopped_at = len(read_rows(folder))
    assert steps_saved(folder)[-1] == stopped_at > 4
    told = folder.with_suffix(".out").read_text()
    assert "stopping once this step is saved; press Ctrl-C again to end at once" in told
    assert f"stopped at step {stopped_at}; the same command resumes from there" in told
    assert samples.startswith("--- step 0, CER")
    assert (folder / "samples.txt").read_text().startswith(samples)
    done = run_module("streamtrain", "summary", folder)
    assert done.returncode == 1
    assert "CER" in done.stdout
    assert f"{folder}: this run has not finished (it has no finished.json)\nhint: run the same training" in done.stderr
    warn_unless_finished(folder / "best")
    assert "is the best model so far: its run has not finished" in caplog.text


def test_the_log_is_not_written_into_the_line_of_the_bar(work: Path) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = training(work, "in-a-terminal", "train.max_steps=1", "data.workers=0", ranks=1)
    subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the terminal's other end is closed
        while data := os.read(reader, 4096):
            shown += data
    os.close(reader)
    assert b"training:" in shown
    assert re.search(rb"[\r\n]Transformers computes the same from best/", shown)


@pytest.mark.parametrize("failure", [None, TrainError("eval.split is 'no'"), RuntimeError("lost"), KeyboardInterrupt()])
def test_a_finished_run_is_unfinished_from_its_next_start_on_unless_that_fails_in_words(
    failure: BaseException | None, tmp_path: Path
) -> None:
    """`deepspeed` may return 0 for a launcher that is killed: what follows must not take the old end for a new one."""
    write_result(tmp_path, RunResult(40, "train.epochs=3", 0.25, 20))
    with suppress(BaseException), _lock_run(tmp_path, World()):
        with pytest.raises(StreamtrainError, match="has not finished"):
            read_result(tmp_path)
        if failure is not None:
            raise failure
        discard_result(tmp_path)
        raise TrainError("too late to change nothing")
    assert (tmp_path / "finished.json").is_file() == isinstance(failure, TrainError)


def test_a_start_that_is_refused_leaves_a_finished_run_as_it_was(work: Path, tmp_path: Path) -> None:
    write_result(tmp_path, RunResult(40, "train.epochs=3", 0.25, 20))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = [f"data.shards={work / 'shards'}", f"train.run_dir={tmp_path}"]
    for wrong, said in (("eval.split=no", "eval.split is 'no'"), (f"data.shards={tmp_path}", "no shard set here")):
        with pytest.raises(StreamtrainError, match=said):
            train(load_config(ROOT / "configs" / "demo.json", [*places, wrong]), World())
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before


@pytest.mark.parametrize("content", ["", "{}", "[3]", '{"step": -1, "limit": "", "best_score": 0.1, "best_step": 0}'])
def test_a_finish_that_is_damaged_is_none(content: str, tmp_path: Path) -> None:
    write_result(tmp_path, RunResult(40, "train.epochs=3", 0.25, 20))
    assert str(read_result(tmp_path)) == "finished at step 40, by train.epochs=3; best CER 0.2500 at step 20"
    (tmp_path / "finished.json").write_text(content)
    with pytest.raises(StreamtrainError, match=r"finished\.json: damaged"):
        read_result(tmp_path)


@pytest.mark.parametrize(("chosen", "spins"), [({}, "10000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_idle_threads_give_their_core_away_soon_and_their_number_is_told(
    chosen: dict[str, str], spins: str, small_shards: Path, tmp_path: Path
) -> None:
    """libgomp tells at its start how often a thread looks for work before it sleeps."""
    save_vocab(vocab_of(policy_of("pasketti")), tmp_path, do_normalize=True, attention_mask=False)
    command = [sys.executable, "launch/evaluate.py", "--model", tmp_path, "--shards", small_shards, "--out", tmp_path]
    done = run(command, expect=1, OMP_DISPLAY_ENV="verbose", **chosen)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert "threads per rank: 1 (" in done.stderr
