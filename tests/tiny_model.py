"""A pretrained model small enough for tests, in the format of facebook/wav2vec2-base: random weights, group norm."""

from pathlib import Path

import torch


def make_tiny_model(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """Write FOLDER as `from_pretrained` expects it: an encoder without a CTC head, and its feature extractor."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder
