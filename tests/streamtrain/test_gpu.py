"""On a machine with a GPU: what is heard and learnt there is what a CPU hears and learns, up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamtrain.model.ctc import CTCModel
from streamtrain.training.run_log import read_log
from streamtrain.training.step_row import StepRow
from tests.benchmarks.timing import ROOT
from tests.tools.models import FAMILIES, VOCAB, make_network
from tests.tools.stream_sets import write_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SECOND = 16_000


def heard(model: CTCModel, inputs: torch.Tensor, lengths: torch.Tensor, half: bool) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        return model(inputs.to(model.device), lengths).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_cpu(family: str) -> None:
    inputs, lengths = torch.randn(5, 3 * SECOND), torch.tensor([3 * SECOND, 2 * SECOND, SECOND, 4_000, 700])
    model = CTCModel(make_network(family), VOCAB, normalize=True)
    expected = heard(model, inputs, lengths, half=False)
    model.cuda()
    for half, close in ((False, 5e-3), (True, 5e-2)):
        on_gpu = heard(model, inputs, lengths, half)
        for row, frames in enumerate(model.frame_counts(lengths).tolist()):
            torch.testing.assert_close(on_gpu[row, :frames], expected[row, :frames], rtol=close, atol=close)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["wav2vec2, group norm", "wav2vec2, layer norm"])
def test_companions_change_nothing_but_the_rounding(family: str, half: bool) -> None:
    model = CTCModel(make_network(family), VOCAB, normalize=True).cuda()
    inputs, lengths = torch.randn(4, 2 * SECOND), torch.tensor([2 * SECOND, SECOND, 5_000, 700])
    together = heard(model, inputs, lengths, half)
    for row, (samples, frames) in enumerate(zip(lengths.tolist(), model.frame_counts(lengths).tolist(), strict=True)):
        alone = heard(model, inputs[row : row + 1, :samples], lengths[row : row + 1], half)[0]
        torch.testing.assert_close(alone, together[row, :frames], rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "shards"
    write_set(folder, 120)
    return folder


def train(
    shards: Path, run: Path, steps: int, on: str = "gpu", resume: Path | str = "auto", **deepspeed: Any
) -> list[StepRow]:
    scratch = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
               "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
    config = {
        "data": {"shards": str(shards), "batch_seconds": 8, "device_batch_seconds": 16},
        "model": {"scratch": scratch, "dropout": 0.0, "mask_time_prob": 0.1},
        "train": {"run_dir": str(run), "epochs": 20, "max_steps": steps, "warmup_steps": 2, "checkpoint_every": 6},
        "eval": {"every_steps": 1_000},
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "gradient_clipping": 1.0,
            **deepspeed,
        },
    }
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config))
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {}
    command = [sys.executable, "launch/train.py", "--config", str(path), "--resume", str(resume)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_log(run / "log.csv")


def test_a_gpu_learns_what_a_cpu_learns(shards: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = (train(shards, tmp_path / on, 12, on) for on in ("cpu", "gpu"))
    assert [row.loss for row in on_gpu] == pytest.approx([row.loss for row in on_cpu], rel=5e-3)


def test_a_resume_goes_on_as_if_uninterrupted(shards: Path, tmp_path: Path) -> None:
    whole = train(shards, tmp_path / "whole", 12)
    resumed = train(shards, tmp_path / "resumed", 12, resume=tmp_path / "whole/checkpoints/step-0000006")
    assert [row.step for row in resumed] == [7, 8, 9, 10, 11, 12]
    assert [row.loss for row in resumed] == pytest.approx([row.loss for row in whole[6:]], rel=1e-4)


HALVES = {
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12}},
    "ZeRO-3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_learns(precision: str, shards: Path, tmp_path: Path) -> None:
    rows = train(shards, tmp_path / "run", 30, **HALVES[precision])
    assert len(rows) == 30
    assert rows[-1].loss < rows[0].loss
    assert sum(row.skipped for row in rows) <= 2
