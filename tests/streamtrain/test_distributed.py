"""What ranks tell one another, by real ranks."""

import signal
import subprocess
import sys

import pytest
import torch

from streamtrain.distributed import Preemption, own_device
from tests.tools.ports import free_port
from tests.tools.training_runs import ROOT, environment


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("slow", "rank 1 goes on"),
        ("collective", "a peer rank exited or hangs"),  # so it would give up
        (
            "fails",
            "rank 1: StreamtrainError: rank 0 could not fetch the copy: StoreError: s3://bucket/run: no such bucket",
        ),
        ("frozen", "rank 1: StreamtrainError: rank 0 has been silent for "),
    ],
)
def test_a_rank_waits_for_rank_0_as_long_as_that_lives_and_learns_how_it_ended(mode: str, told: str) -> None:
    """Started without a launcher, which would wait for half a minute until it kills a frozen rank."""
    place = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "tests/tools/alone_rank.py", mode], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said, _ = ranks[1].communicate(timeout=60)
    finally:
        ranks[0].kill()
    assert told in said
    assert "Traceback" not in said
    assert ranks[1].returncode == (0 if mode == "slow" else 1)


def test_ctrl_c_asks_a_run_to_stop_and_a_second_one_ends_it() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        preemption = Preemption()
        assert not preemption.asked
        signal.raise_signal(signal.SIGINT)
        assert preemption.asked
        assert preemption.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("local_rank", "visible", "number"), [(None, 2, 0), (1, 2, 1), (1, 1, 0)])
def test_a_model_is_loaded_onto_the_gpu_of_its_rank(
    local_rank: int | None, visible: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the launcher shows each rank its own GPU alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert own_device() == torch.device("cuda", number)
