"""A rank whose model skips layers as it likes, which streamtrain forbids: what then happens must be seen and said.

Run by the launcher with the arguments of `launch/train.py`; UNLIKE_AFTER says after how many forwards it begins. With
UNLIKE_ORDER it skips nothing: unpadded batches then have a graph of their own, in which gradients arrive otherwise.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.train import main
from streamtrain.model.ctc import CTCModel
from streamtrain.model.pretrained import load_model
from streamtrain.training import run as start


def load_unlike_model(*arguments: Any) -> CTCModel:
    """From the start layers are skipped at random; later each rank skips another: gradients of one size get mixed."""
    model = load_model(*arguments)
    after = int(os.environ["UNLIKE_AFTER"])
    forwards = iter(range(after))

    def begin(*_: object) -> None:
        if next(forwards, None) is not None:
            return
        if "UNLIKE_ORDER" in os.environ:
            CTCModel._trains_front_end = False  # type: ignore[assignment,method-assign]
            return
        if after:
            layer = model.network.base_model.encoder.layers[int(os.environ["RANK"])]
            layer.forward = lambda hidden, **_: hidden
        else:
            model.network.config.layerdrop = 0.5

    model.register_forward_pre_hook(begin)
    return model


start.load_model = load_unlike_model

if __name__ == "__main__":
    main()
