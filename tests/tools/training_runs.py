"""The README's training command on a tiny corpus and a tiny model, in real ranks, to its end or to a bad one."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.tools.ports import free_port
from tests.tools.warm import run_warm

ROOT = Path(__file__).parents[2]
OF_LIBRARIES = "TORCHINDUCTOR_"  # variables that appear as torch is used in the tests' own process
AUGMENTED = ["data.speed_factors=[0.9,1,1.1]", "model.mask_feature_prob=0.2", "model.mask_feature_length=4"]
EXACT = ["model.dropout=0", "deepspeed.torch_autocast.enabled=false"]  # fp32 without dropout
PART_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"  # tiny weights are kept whole otherwise


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_LIBRARIES)} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def run(
    command: Sequence[object], expect: int | None = 0, folder: Path = ROOT, warm: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `warm`: by processes that have imported already what it imports, if it is one of ours.

    How it begins, and what DeepSpeed's launcher does, is seen without that.
    """
    words, usual = list(map(str, command)), environment()
    done = run_warm(words, folder, usual, variables) if warm else None
    done = done or subprocess.run(words, cwd=folder, env=usual | variables, capture_output=True, text=True, timeout=240)
    if expect is not None:
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def training(
    work: Path, name: str, *settings: str, ranks: int = 2, resume: str = "auto", config: str = "zero2"
) -> list[object]:
    """The literal command of the README, made tiny; one rank needs no launcher."""
    launcher = ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port()] if ranks > 1 else ["python"]
    return [
        *launcher, "launch/train.py",
        "--config", f"configs/{config}.json", "--resume", resume, "--set",
        f"data.shards={work / 'shards'}", f"model.pretrained={work / 'model'}", f"train.run_dir={work / name}",
        "data.batch_seconds=4", "train.micro_batches_per_step=4", "train.warmup_steps=2",
        "deepspeed.optimizer.params.lr=1e-3", *settings,
    ]  # fmt: skip


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path) -> list[float]:
    return [float(row["loss"]) for row in read_rows(run_dir)]


def steps_saved(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step-*/state.json"))


# --- runs that come to a bad end ------------------------------------------------------------------------------------


def start(command: Sequence[object], log: Path) -> "subprocess.Popen[bytes]":
    """The command in the background, in a session of its own; what it says goes to a file."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )


def processes(command: "subprocess.Popen[bytes]") -> dict[str, psutil.Process]:
    """The `deepspeed` command, its launcher, and the ranks."""
    everyone = {"command": psutil.Process(command.pid)}
    for child in everyone["command"].children(recursive=True):
        words: list[str] = []
        with suppress(psutil.Error):  # it has just ended
            words = child.cmdline()
        rank = [word for word in words if word.startswith("--local_rank=")]
        if rank and child.ppid() != command.pid:
            everyone[f"rank {rank[0].partition('=')[2]}"] = child
        elif "deepspeed.launcher.launch" in words:
            everyone["launcher"] = child
    return everyone


def wait_until(
    condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, seconds: float = 120
) -> None:
    """Wait for `condition()`; it is a failure if the command ends before, or if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def wait_for_all(everyone: dict[str, psutil.Process], seconds: float = 60) -> None:
    _, alive = psutil.wait_procs(everyone.values(), timeout=seconds)
    assert not alive, [process.cmdline() for process in alive]


def kill_after_steps(command: Sequence[object], run_dir: Path, steps: int, victim: str = "command") -> None:
    """Start a run and `kill -9` one of its processes once it has done so many more steps; `all`: the whole session."""
    log = run_dir.with_suffix(".out")
    before = len(read_rows(run_dir)) if (run_dir / "log.csv").is_file() else 0
    process = start(command, log)
    wait_until(lambda: (run_dir / "log.csv").is_file() and _fresh(run_dir, before, steps), process, log)
    kill(process, victim)


def _fresh(run_dir: Path, before: int, steps: int) -> bool:
    return len((run_dir / "log.csv").read_text().splitlines()) - 1 >= before + steps


def kill_at_a_random_moment(
    command: Sequence[object], run_dir: Path, moments: random.Random, victims: Sequence[str]
) -> str:
    """Start a run, let it begin to train, and `kill -9` one of its processes: at any time, or while it saves."""
    log = run_dir.with_suffix(".out")
    process = start(command, log)
    began = time.time()
    written = run_dir / "log.csv"
    wait_until(lambda: written.is_file() and written.stat().st_mtime > began, process, log)
    if moments.random() < 0.5:
        time.sleep(moments.uniform(0, 1.5))
    else:
        parts = run_dir / "checkpoints"
        wait_until(lambda: process.poll() is not None or any(parts.glob(".step-*.part")), process, log)
        time.sleep(moments.uniform(0, 0.02))
    victim = moments.choice(victims)
    kill(process, victim)
    return victim


def kill(process: "subprocess.Popen[bytes]", victim: str) -> None:
    everyone = processes(process)
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim in everyone:
        everyone[victim].kill()
    process.wait()
    wait_for_all(everyone)
