"""Plan, stream, train, evaluate: from archives of speech to a model and its error rate.

The names in `__all__` are the public API; everything else may change between versions. They are imported when they are
first used, so that `import streamtrain` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.errors import StreamtrainError
    from sharding.shardset.sample import Sample
    from streamtrain.api import build, evaluate, plan, train
    from streamtrain.config import Config, load_config
    from streamtrain.data.collate import Batch
    from streamtrain.data.shard_set import ShardSet, open_shards
    from streamtrain.data.torch_dataset import ShardDataset
    from streamtrain.eval.metrics import cer, wer
    from streamtrain.infer.recogniser import Recogniser, Transcription, load_model

__all__ = [
    "Batch",
    "Config",
    "Recogniser",
    "Sample",
    "ShardDataset",
    "ShardSet",
    "StreamtrainError",
    "Transcription",
    "build",
    "cer",
    "evaluate",
    "load_config",
    "load_model",
    "open_shards",
    "plan",
    "train",
    "wer",
]
_HOMES = {
    "sharding.errors": ("StreamtrainError",),
    "sharding.shardset.sample": ("Sample",),
    "streamtrain.api": ("build", "evaluate", "plan", "train"),
    "streamtrain.config": ("Config", "load_config"),
    "streamtrain.data.collate": ("Batch",),
    "streamtrain.data.shard_set": ("ShardSet", "open_shards"),
    "streamtrain.data.torch_dataset": ("ShardDataset",),
    "streamtrain.eval.metrics": ("cer", "wer"),
    "streamtrain.infer.recogniser": ("Recogniser", "Transcription", "load_model"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
