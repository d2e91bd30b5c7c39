"""A run that is killed, preempted, damaged or moved goes on as if nothing had been; real ranks, real kills."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from sharding.shardset.index import read_index
from sharding.shardset.store import open_store
from streamtrain.atomic import recover_replaced
from streamtrain.config import load_config
from streamtrain.data.plan import PlanPrefix, PlanSettings, plan_remaining
from streamtrain.eval.metrics import EditCounts, TextEdits
from streamtrain.eval.scorecard import Evaluation
from streamtrain.training.checkpoint import (
    CheckpointError,
    RunState,
    _digest,
    delete_later_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_state,
    open_checkpoint,
    save_checkpoint,
)
from streamtrain.training.run_log import RunLog
from streamtrain.training.zero_engine import FullState
from tests.tools.commands import own_mounts
from tests.tools.corpus import PHONES, make_corpus
from tests.tools.seaweed import Seaweed
from tests.tools.training_runs import (
    AUGMENTED,
    PART_ALL,
    ROOT,
    kill,
    kill_after_steps,
    kill_at_a_random_moment,
    losses,
    processes,
    read_rows,
    run,
    start,
    steps_saved,
    training,
    wait_for_all,
    wait_until,
)

# With dropout, masks, speeds and an average of the weights: all that a resume could get wrong
SETTINGS = (
    "train.max_steps=30",
    "train.checkpoint_every=2",
    "eval.every_steps=10",
    "train.ema_decay=0.9",
    "deepspeed.torch_autocast.enabled=false",
    *AUGMENTED,
)


TWO_STEPS = ("train.max_steps=2", "train.checkpoint_every=1", "eval.every_steps=5")


@pytest.fixture(scope="module")
def whole(work: Path) -> list[float]:
    """The losses of the run that nobody disturbs."""
    run(training(work, "whole", *SETTINGS))
    assert len({row["epoch"] for row in read_rows(work / "whole")}) > 1  # over the border of an epoch too
    return losses(work / "whole")


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """The folder of a run that has done its two steps, for tests to copy."""
    run(training(work, "finished", *TWO_STEPS, ranks=1))
    return work / "finished"


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_repeats_the_undisturbed_losses_to_the_bit(
    kills: int, work: Path, whole: list[float]
) -> None:
    """A rank, the launcher, the command, or all of them at once; within a step or within a save."""
    moments, folder = random.Random(kills), work / f"killed-{kills}"
    victims = ["rank 0", "rank 1", "launcher", "command", "all"]
    for _ in range(kills):
        kill_at_a_random_moment(training(work, folder.name, *SETTINGS), folder, moments, victims)
        for path in list_checkpoints(folder / "checkpoints"):
            open_checkpoint(path)  # what is there is whole
        if folder.joinpath("log.csv").is_file() and len(read_rows(folder)) > 22:
            shutil.rmtree(folder)  # begin anew, rather than kill a run that has ended
    run(training(work, folder.name, *SETTINGS))
    assert losses(folder) == whole
    average, undisturbed = (average_of(work / name) for name in (folder.name, "whole"))
    assert average.keys() == undisturbed.keys()
    assert all(torch.equal(average[name], weight) for name, weight in undisturbed.items())


def average_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_state(open_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])).ema


def test_a_run_goes_on_at_other_numbers_of_ranks_and_under_other_zero_stages(work: Path, whole: list[float]) -> None:
    folder = work / "moved"
    for ranks, config in ((1, "zero3"), (4, "zero1")):
        settings = (*SETTINGS, *([PART_ALL] if config == "zero3" else []))
        kill_after_steps(training(work, folder.name, *settings, ranks=ranks, config=config), folder, 4)
    run(training(work, folder.name, *SETTINGS, PART_ALL, config="zero3"))
    assert losses(folder) == pytest.approx(whole, rel=1e-5)


def test_a_run_killed_before_its_first_step_goes_on_with_the_same_command(work: Path) -> None:
    settings, folder = ("train.max_steps=2", "eval.every_steps=1"), work / "early"
    process = start(training(work, "early", *settings), folder.with_suffix(".out"))
    wait_until(lambda: bool(steps_saved(folder)), process, folder.with_suffix(".out"))
    kill(process, "all")
    run(training(work, "early", *settings))
    assert len(losses(work / "early")) == 2


# --- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["rank 1", pytest.param("launcher", marks=pytest.mark.long), "command"])
def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at(asked: str, work: Path, whole: list[float]) -> None:
    """Asked often, so that what repeats the question does no harm."""
    folder = work / f"asked-{asked.replace(' ', '-')}"
    settings, log = (*SETTINGS, "train.checkpoint_every=1000"), folder.with_suffix(".out")
    process = start(training(work, folder.name, *settings), log)
    wait_until(lambda: (folder / "log.csv").is_file() and len(read_rows(folder)) >= 4, process, log)
    everyone = processes(process)
    for _ in range(5):
        if everyone[asked].is_running():
            everyone[asked].send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.wait()
    wait_for_all(everyone)  # the launcher would kill after 30 s
    (stopped_at,) = (step for step in steps_saved(folder) if step % 10)
    assert stopped_at == len(read_rows(folder)) >= 4
    assert f"stopped at step {stopped_at}; the same command resumes from there" in log.read_text()
    assert "Traceback" not in log.read_text()
    run(training(work, folder.name, *SETTINGS))
    assert losses(folder) == whole


@pytest.mark.parametrize(
    ("asked", "how", "moment"),
    [
        ("command", signal.SIGTERM, "rank 1"),
        ("command", signal.SIGTERM, "launcher"),
        ("launcher", signal.SIGKILL, "rank 1"),
    ],
)
def test_no_rank_goes_on_without_what_started_it_if_that_ends_while_the_ranks_import(
    asked: str, how: signal.Signals, moment: str, work: Path
) -> None:
    """The ranks take seconds to import; what is asked to stop before is asked while the launcher imports."""
    folder = work / f"orphans-{asked}-{moment.replace(' ', '-')}"
    log, settings = folder.with_suffix(".out"), ("train.epochs=100000", "eval.every_steps=100000")
    process = start(training(work, folder.name, *settings), log)
    try:
        wait_until(lambda: moment in processes(process), process, log)
        everyone = processes(process)
        everyone[asked].send_signal(how)
        process.wait(60)
        wait_until_none(str(folder), 40)
        assert not folder.exists()
        assert "Traceback" not in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_none(word: str, seconds: float) -> None:
    """Wait until no process has the word in its command line; one that has just started may not have it yet."""
    deadline = time.monotonic() + seconds
    while left := [each for each in psutil.process_iter(["cmdline"]) if word in " ".join(each.info["cmdline"] or ())]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_run_that_was_asked_to_stop_says_so_to_its_scheduler_and_may_go_on_by_another_plan(work: Path) -> None:
    """Stopped within its first epoch, which then is planned anew for larger batches."""
    folder, log = work / "replanned", work / "replanned.out"
    one_epoch = ("train.epochs=1", "eval.every_steps=100", "data.batch_seconds=2.1", "train.micro_batches_per_step=1")
    process = start(training(work, folder.name, *one_epoch, ranks=1), log)
    wait_until(lambda: (folder / "log.csv").is_file() and len(read_rows(folder)) >= 3, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    (stopped_at,) = (step for step in steps_saved(folder) if step)
    larger = (*one_epoch, "data.batch_seconds=6", "train.micro_batches_per_step=2")
    refused = run(training(work, folder.name, *larger, ranks=1), expect=1).stderr
    assert "data.batch_seconds was 2.1, is 6.0; train.micro_batches_per_step was 1, is 2" in refused
    assert "add --replan: the rest of this epoch is then planned by the new settings, each clip once" in refused
    command = [*training(work, folder.name, *larger, ranks=2), "--replan"]
    kill_after_steps(command, folder, 2)
    run(training(work, folder.name, *larger, ranks=2))  # the other plan is its own now
    index, small, large = (
        read_index(open_store(work / "shards")),
        *(settings_of(each) for each in (one_epoch, larger)),
    )
    rest = plan_remaining(index, large, 0, [PlanPrefix(small, stopped_at)])
    assert len(losses(folder)) == stopped_at + rest.steps
    last = open_checkpoint(list_checkpoints(folder / "checkpoints")[-1]).state
    assert (last.step, last.epoch, last.step_in_epoch, last.completed) == (stopped_at + rest.steps, 1, 0, ())


def settings_of(overrides: Sequence[str]) -> PlanSettings:
    return PlanSettings.of(load_config("configs/zero2.json", overrides))


def test_a_run_that_is_asked_to_stop_while_it_evaluates_evaluates_again(work: Path) -> None:
    folder, settings = work / "asked-early", ("train.max_steps=2", "eval.every_steps=1", "data.batch_seconds=2.1")
    process = start(training(work, folder.name, *settings), folder.with_suffix(".out"))
    wait_until(lambda: bool(steps_saved(folder)), process, folder.with_suffix(".out"))
    everyone = processes(process)
    everyone["rank 0"].send_signal(signal.SIGTERM)  # its first evaluation is under way
    process.wait()
    wait_for_all(everyone)
    run(training(work, folder.name, *settings))
    assert [bool(row["eval_cer"]) for row in read_rows(folder)] == [True, True]
    assert json.loads((folder / "before.json").read_text())["cer"] > 0


# --- what is on the disk --------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def state(step: int, **values: object) -> RunState:
    return RunState({"train": {"seed": 0}}, "digest", 1, step=step, **values)  # type: ignore[arg-type]


def parts(step: int) -> FullState:
    return FullState(
        {"weight": torch.full((5,), float(step))},
        {"exp_avg.weight": torch.zeros(5)},
        {},
        {"optimizer_steps": step, "loss_scaler": {}},
    )


@pytest.mark.parametrize("damage", [flip, cut_off, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_offered(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(parts(step), state(step), tmp_path, keep=2)
    damage(tmp_path / "step-0000002" / name)
    if (name, damage) == ("state.json", Path.unlink):  # it is not whole, and so is none
        with caplog.at_level("INFO", "streamtrain"):
            assert find_checkpoint("auto", tmp_path) == tmp_path / "step-0000001"
        assert f"{tmp_path / 'step-0000002'}: skipped, because it is incomplete (it has no state.json)" in caplog.text
        return
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path / "step-0000002")
    assert str(tmp_path / "step-0000002" / name) in refused.value.message
    assert f"--resume {tmp_path / 'step-0000001'}" in str(refused.value.hint)
    assert load_state(open_checkpoint(tmp_path / "step-0000001")).params["weight"].tolist() == [1.0] * 5


def test_what_comes_after_the_chosen_checkpoint_is_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(parts(step), state(step), tmp_path, keep=9)
    delete_later_checkpoints(tmp_path / "step-0000002")
    assert steps_saved_in(tmp_path) == [1, 2]


def test_any_byte_of_a_state_matters(tmp_path: Path) -> None:
    path = save_checkpoint(parts(1), state(1), tmp_path, keep=1) / "state.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"state\.json: damaged"):
            open_checkpoint(tmp_path / "step-0000001")


def test_a_checkpoint_that_a_kill_caught_while_it_was_replaced_is_put_back(tmp_path: Path) -> None:
    only = save_checkpoint(parts(1), state(1), tmp_path, keep=1)
    only.rename(tmp_path / ".step-0000001.old")
    recover_replaced(tmp_path, "step-*")
    assert find_checkpoint("auto", tmp_path) == only
    save_checkpoint(parts(1), state(1, best_score=0.5), tmp_path, keep=1)
    assert open_checkpoint(only).state.best_score == 0.5
    assert not list(tmp_path.glob(".step-*"))


def test_the_last_checkpoints_are_kept_and_that_of_the_best_score(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(parts(step), state(step, best_step=min(step, 3)), tmp_path, keep=2)
    assert steps_saved_in(tmp_path) == [3, 6, 7]
    assert (tmp_path / "newest").resolve() == tmp_path / "step-0000007"
    assert open_checkpoint(tmp_path / "best").state.step == 3
    assert open_checkpoint(tmp_path / "best").scalars == {"optimizer_steps": 3, "loss_scaler": {}}


def steps_saved_in(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


def test_a_damaged_checkpoint_stops_the_run_in_words(work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / "damaged", symlinks=True)
    newest, before = (folder / "checkpoints" / name for name in ("step-0000002", "step-0000001"))
    flip(newest / "optimizer.safetensors")
    done = run(training(work, "damaged", *TWO_STEPS, ranks=1), expect=1)
    assert f"CheckpointError: {newest / 'optimizer.safetensors'}: damaged" in done.stderr
    assert f"--resume {before} uses the one before it" in done.stderr
    assert "Traceback" not in done.stderr
    run(training(work, "damaged", *TWO_STEPS, ranks=1, resume=str(before)))
    open_checkpoint(newest)
    assert losses(folder) == losses(finished)


def test_a_full_disk_costs_no_older_checkpoint(work: Path, tmp_path: Path) -> None:
    """A disk that holds two checkpoints and a half; then there is room again."""
    run_dir, settings = tmp_path / "run", ("train.max_steps=4", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    command = training(work, "unused", *settings, f"train.run_dir={run_dir}", "eval.every_steps=10", ranks=1)
    words = " ".join(f"'{word}'" for word in command)
    script = f"""
        mkdir -p {run_dir}/checkpoints && mount -t tmpfs -o size=1000k tmpfs {run_dir}/checkpoints
        {words}; echo "ended with $?"; ls {run_dir}/checkpoints
        mount -o remount,size=9000k {run_dir}/checkpoints
        {words}; echo "ended with $?"; ls {run_dir}/checkpoints"""
    done = run([*own_mounts(), "bash", "-c", script])
    first, second = done.stdout.split("ended with ")[1:]
    assert first.split()[0] == "1"
    assert f"StoreError: {run_dir}/checkpoints/step-" in done.stderr
    assert "No space left on device" in done.stderr
    assert "make room" in done.stderr
    kept = [name for name in first.split() if name.startswith("step-")]
    assert 2 <= len(kept) < 5
    assert second.split()[0] == "0"
    assert f"resumed at step {int(kept[-1][5:])} from" in done.stderr  # so it is whole
    assert second.count("step-") == 5


def test_a_disk_that_is_full_when_the_best_model_is_written_is_told_in_words(work: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = training(work, "unused", "train.max_steps=1", "train.probe=false", f"train.run_dir={run_dir}", ranks=1)
    words = " ".join(f"'{word}'" for word in command)
    script = f"""
        mkdir -p {run_dir} && mount -t tmpfs -o size=250k tmpfs {run_dir}
        {words}; echo "ended with $?"; ls -A {run_dir}
        mount -o remount,size=9000k {run_dir}
        {words}; echo "ended with $?"; ls {run_dir}"""
    done = run([*own_mounts(), "bash", "-c", script])
    first, second = (text.split() for text in done.stdout.split("ended with ")[1:])
    assert first[0] == "1"
    assert "best" not in first
    assert f"StoreError: {run_dir}/best: No space left on device (" in done.stderr
    assert "Traceback" not in done.stderr
    assert second[0] == "0"
    assert "best" in second


# --- a mirror in a bucket -------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_mirror_on_an_empty_machine(
    work: Path, whole: list[float], seaweed: Seaweed, url: str
) -> None:
    settings, folder = (*SETTINGS, f"train.mirror={url}/run"), work / "mirrored"
    log = folder.with_suffix(".out")
    process = start(training(work, folder.name, *settings), log)
    store = open_store(f"{url}/run")
    wait_until(lambda: store.exists("newest.json") and len(read_rows(folder)) >= 12, process, log)
    kill(process, "all")
    shutil.rmtree(folder)
    mirrored = json.loads(store.read("newest.json"))
    done = run(training(work, folder.name, *settings), **seaweed.environment)
    assert f"copying {mirrored['checkpoint']} from the mirror" in done.stderr
    assert f"resumed at step {int(mirrored['checkpoint'][5:])} " in done.stderr
    assert losses(folder) == whole
    newest = json.loads(store.read("newest.json"))
    assert newest["checkpoint"] == "step-0000030"
    needed = {piece for pointer in (mirrored, newest) for pieces in pointer["files"].values() for piece in pieces}
    assert {piece for pieces in newest["files"].values() for piece in pieces} <= set(store.names())
    assert len(set(store.names()) - needed) < 40  # what older copies alone needed is gone


def test_a_run_whose_mirror_lacks_its_end_trains_on_fails_and_is_copied_by_the_same_command(work: Path) -> None:
    folder, mirror = work / "unmirrored", work / "broken-mirror"
    (mirror / "previous.json").mkdir(parents=True)  # in the way of the second pointer
    settings = ("train.max_steps=3", "train.checkpoint_every=1", f"train.mirror={mirror}")
    done = run(training(work, folder.name, *settings, ranks=1), expect=1)
    assert len(read_rows(folder)) == 3
    assert "has not reached the mirror (the newest copy is step-" in done.stderr
    lacking = f"{folder}: train.mirror lacks the newest checkpoint and best/, which this disk alone holds: {mirror}/"
    assert f"StreamtrainError: {lacking}" in done.stderr
    summary = [sys.executable, "-m", "streamtrain", "summary", folder]
    told = run(summary, expect=1)
    assert "finished at step 3, by train.max_steps=3" in told.stdout
    assert f"\nStreamtrainError: {lacking}" in told.stderr
    assert "\nhint: keep the run folder; the same training command copies what is missing" in told.stderr
    (mirror / "previous.json").rmdir()
    run(training(work, folder.name, *settings, ranks=1))
    assert len(read_rows(folder)) == 3
    assert json.loads((mirror / "newest.json").read_text())["checkpoint"] == "step-0000003"
    run(summary)


def test_a_mirror_that_spoilt_is_refused(work: Path, seaweed: Seaweed, url: str) -> None:
    settings, folder = ("train.max_steps=1", f"train.mirror={url}/spoilt"), work / "spoilt"
    open_store(f"{url}/spoilt").write("mine", b"mine")
    run(training(work, folder.name, *settings, ranks=1), **seaweed.environment)
    store = open_store(f"{url}/spoilt")
    assert store.read("mine") == b"mine"  # what else lies there is left alone
    pointer = json.loads(store.read("newest.json"))
    (piece,) = pointer["files"]["checkpoints/step-0000001/model.safetensors"]
    whole = store.read(piece)
    store.write(piece, whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(folder)
    done = run(training(work, folder.name, *settings, ranks=1), expect=1, **seaweed.environment)
    assert f"{piece}: read back as" in done.stderr
    assert not list_checkpoints(folder / "checkpoints")


def test_a_rewind_reaches_the_mirror(work: Path, seaweed: Seaweed, url: str) -> None:
    """Else a machine that starts empty would go on from what was given up."""
    folder, mirror = work / "rewound", f"train.mirror={url}/rewound"
    settings = ("train.checkpoint_every=1", "train.keep_checkpoints=9", "eval.every_steps=1", mirror)
    run(training(work, folder.name, *settings, "train.max_steps=3", ranks=1), **seaweed.environment)
    store = open_store(f"{url}/rewound")
    assert json.loads(store.read("newest.json"))["checkpoint"] == "step-0000003"
    first = os.path.relpath(folder / "checkpoints" / "step-0000001", ROOT)  # the run's folder is named otherwise
    command = training(work, folder.name, *settings, "train.max_steps=1", ranks=1, resume=first)
    run([*command, "--replan"], **seaweed.environment)
    assert json.loads(store.read("newest.json"))["checkpoint"] == "step-0000001"
    assert steps_saved(folder) == [0, 1]


@pytest.mark.parametrize("steps", [1, 3])  # the run here has done 2: a mirror behind it is as little its own
def test_a_mirror_of_another_run_is_refused_before_it_touches_the_run(
    steps: int, work: Path, finished: Path, seaweed: Seaweed, url: str
) -> None:
    name = f"another-{steps}"
    mirror, theirs = f"train.mirror={url}/{name}", (f"train.max_steps={steps}", "train.seed=7")
    run(training(work, f"mirrors-{steps}", *theirs, mirror, ranks=1), **seaweed.environment)
    folder = shutil.copytree(finished, work / f"mirrors-not-{steps}", symlinks=True)
    store = open_store(f"{url}/{name}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pointer = store.read("newest.json")
    for longer in ((), ("train.max_steps=9", "--replan")):
        settings, options = (*TWO_STEPS, mirror, *longer[:1]), longer[1:]
        done = run([*training(work, folder.name, *settings, ranks=1), *options], expect=1, **seaweed.environment)
        assert f"{url}/{name}: step-000000{steps} belongs to another run: " in done.stderr
        assert "train.seed was 7, is 0" in done.stderr
        assert "name another train.mirror" in done.stderr
    with_seed_7 = (*theirs, mirror)  # this time it is the folder that is another's
    done = run(training(work, folder.name, *with_seed_7, ranks=1), expect=1, **seaweed.environment)
    assert "train.seed was 0, is 7" in done.stderr
    nowhere = training(work, folder.name, *with_seed_7, "model.pretrained=nowhere", ranks=1, resume="none")
    run(nowhere, expect=1, **seaweed.environment)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert store.read("newest.json") == pointer


# --- which run a checkpoint belongs to ------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_clips_it_began_with_while_its_shard_set_grows(work: Path, finished: Path) -> None:
    shards = shutil.copytree(work / "shards", work / "growing")
    folder = shutil.copytree(finished, work / "over-growth", symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "step-0000002")
    more = make_corpus(work / "raw" / "more", clips=12, symbols="ɑeiostkm", seed=1)
    run([sys.executable, "-m", "sharding", "build", more, "--out", shards, "--append"])
    done = run(training(work, "over-growth", *TWO_STEPS, f"data.shards={shards}", ranks=1))
    assert "has grown by 12 samples" in done.stderr + done.stdout
    assert "resumed at step 1 " in done.stderr
    assert losses(folder) == losses(finished)


def test_a_setting_that_is_younger_than_a_checkpoint_had_its_default(work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / "older", symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "step-0000002")
    path = folder / "checkpoints" / "step-0000001" / "state.json"
    document = json.loads(path.read_text())
    del document["state"]["config"]["model"]["vocab"], document["state"]["split"], document["digest"]
    path.write_text(json.dumps(document | {"digest": _digest(document)}))
    assert "resumed at step 1" in run(training(work, "older", *TWO_STEPS, ranks=1)).stderr
    refused = run(training(work, "older", *TWO_STEPS, "eval.split=unlabelled", ranks=1), expect=1).stderr
    assert "TrainError: eval.split is 'unlabelled': its clips have no labels to score" in refused


def test_the_best_score_of_one_split_is_never_that_of_another(work: Path, finished: Path) -> None:
    """The score on what is trained on, which is far from that on the validation clips."""
    folder = shutil.copytree(finished, work / "resplit", symlinks=True)
    done = run(training(work, "resplit", *TWO_STEPS, "eval.split=train", ranks=1))
    assert "eval.split was 'valid', is 'train': the best score is reset" in done.stderr
    card, before = (json.loads((each / "scorecard.json").read_text()) for each in (folder, finished))
    assert (card["split"], before["split"]) == ("train", "valid")
    state = open_checkpoint(list_checkpoints(folder / "checkpoints")[-1]).state
    assert (state.split, state.best_score) == ("train", card["cer"])


def test_a_model_is_not_overwritten_by_a_run_that_lost_its_checkpoints(work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / "lost", symlinks=True)
    before = (folder / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    done = run(training(work, "lost", *TWO_STEPS, ranks=1), expect=1)
    assert "holds a model in best/" in done.stderr
    done = run(training(work, "lost", "model.pretrained=nowhere", ranks=1, resume="none"), expect=1)
    assert "nowhere" in done.stderr
    assert (folder / "best" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused_by_name(work: Path, finished: Path) -> None:
    shutil.copytree(finished, work / "other", symlinks=True)
    done = run(training(work, "other", *TWO_STEPS, "train.seed=7", ranks=1), expect=1)
    assert "CheckpointError" in done.stderr
    assert "train.seed was 0, is 7" in done.stderr
    assert "--resume none" in done.stderr
    assert "RUN/best" in done.stderr
    assert "Traceback" not in done.stderr
    nowhere = training(work, "second", *TWO_STEPS, ranks=1, resume=str(work / "nothing"))
    assert "not a checkpoint" in run(nowhere, expect=1).stderr


def test_a_best_model_that_a_kill_caught_while_it_was_replaced_is_put_back(work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / "caught", symlinks=True)
    (folder / "best").rename(folder / ".best.old")
    run(training(work, folder.name, *TWO_STEPS, ranks=1))
    assert (folder / "best" / "model.safetensors").read_bytes() == (
        finished / "best" / "model.safetensors"
    ).read_bytes()
    assert not (folder / ".best.old").exists()


@pytest.mark.parametrize("name", ["log.csv", "ranks.csv", "samples.txt"])
def test_a_damaged_log_stops_the_run_in_words(name: str, work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / f"damaged-{name}", symlinks=True)
    text = (folder / name).read_text()
    (folder / name).write_text(
        text.replace("\n1,", "\none,").replace("step 0,", "step zero,").replace("\n2,", "\ntwo,")
    )
    assert (folder / name).read_text() != text
    done = run(training(work, folder.name, *TWO_STEPS, ranks=1), expect=1)
    assert f"{folder / name}: is not the log of a run" in done.stderr
    assert "move it away" in done.stderr


def test_each_evaluation_stands_in_the_samples_once_wherever_a_run_is_resumed(tmp_path: Path) -> None:
    nothing = Evaluation(TextEdits(EditCounts(reference_length=1)), (), PHONES, {})

    def go_on(done: int, scored: list[int]) -> list[int]:
        monitor = RunLog(tmp_path, 9, done)
        for step in scored:
            monitor.evaluated(step, nothing, 0.5, 0.1)
        monitor.close()
        told = (tmp_path / "samples.txt").read_text()
        return [int(step) for step in re.findall(r"--- step (\d+), CER", told)]

    assert go_on(0, [0, 2, 4]) == [0, 2, 4]
    assert go_on(2, []) == [0, 2]
    assert go_on(2, [2, 4, 6]) == [0, 2, 4, 6]  # as if best/ was gone: it is sought anew
    assert go_on(0, [0]) == [0]


def test_a_finished_run_says_so_and_starts_over_only_when_told(work: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, work / "again", symlinks=True)
    done = run(training(work, "again", *TWO_STEPS, ranks=1))
    assert "all 2 steps are done, by train.max_steps=2; raise that with --replan, or use --resume none" in done.stderr
    assert (folder / "log.csv").read_text() == (finished / "log.csv").read_text()
    run(training(work, "again", *TWO_STEPS, ranks=1, resume="none"))
    assert losses(folder) == losses(finished)
    elsewhere = training(work, "elsewhere", *TWO_STEPS, ranks=1, resume=str(finished / "checkpoints" / "step-0000002"))
    run(elsewhere)
    for name in ("best/model.safetensors", "scorecard.json", "checkpoints/step-0000002/state.json"):
        assert (work / "elsewhere" / name).is_file()
