"""What ranks tell one another, by real ranks."""

import pytest
from training_runs import free_port, run


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("slow", "rank 1 goes on"),
        ("collective", "another rank is gone, or hangs"),  # so the others would give up
        ("fails", "StoreError: s3://bucket/run: no such bucket"),
        ("frozen", "rank 1: StreamtrainError: rank 0 has been silent for "),
        ("silent", " s, it was to fetch the copy"),
    ],
)
def test_ranks_wait_for_rank_0_as_long_as_it_lives_and_learn_how_it_ended(mode: str, told: str) -> None:
    command = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "tests/alone_rank.py", mode]
    done = run(command, expect=0 if mode == "slow" else 1)
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
