"""A rank whose model skips layers as it likes, which streamtrain forbids: what then happens must be seen and said.

Run by the launcher with the arguments of `launch/train.py`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch.train import main
from streamtrain import start
from streamtrain.model import CTCModel, load_model


def load_unlike_model(*arguments: Any) -> CTCModel:
    model = load_model(*arguments)
    model.network.config.layerdrop = 0.5
    return model


start.load_model = load_unlike_model

if __name__ == "__main__":
    main()
