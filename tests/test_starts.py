"""How a run starts: what is wrong is told at once and in words, and a failed start leaves nothing behind."""

from pathlib import Path

import pytest
from test_model import make_network

from streamtrain.export import save_best
from streamtrain.network import CTCModel
from streamtrain.start import _check_best
from streamtrain.train import TrainError
from streamtrain.vocab import vocab_of


def test_a_run_does_not_go_on_beside_a_best_model_that_is_damaged(tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_best(CTCModel(make_network("wav2vec2, group norm"), vocab_of("phonetic"), normalize=True).eval(), best)
    _check_best(tmp_path, has_checkpoint=True, resume="auto")
    with open(best / "model.safetensors", "r+b") as file:
        file.seek(-7, 2)
        file.write(b"\xff")
    with pytest.raises(TrainError, match=rf"model\.safetensors: damaged: .*\nhint: remove {best}"):
        _check_best(tmp_path, has_checkpoint=True, resume="auto")
    _check_best(tmp_path, has_checkpoint=True, resume="none")  # starts over, and overwrites it
