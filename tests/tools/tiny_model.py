"""A pretrained model small enough for tests, in the format of facebook/wav2vec2-base: random weights, group norm."""

from pathlib import Path
from typing import Any

import torch


def make_tiny_model(folder: Path, hidden: int = 32, layers: int = 2, family: str = "Wav2Vec2", **settings: Any) -> Path:
    """Write FOLDER as `from_pretrained` expects it: an encoder without a CTC head, and its feature extractor."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        **settings,
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder
