"""Tiny networks with random weights, and what they write."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from sharding.labels.pasketti import SYMBOLS
from sharding.labels.policy import policy_of
from streamtrain.model.ctc import CTCModel
from streamtrain.model.decode import greedy
from streamtrain.model.inference import zero_mean_unit_variance
from streamtrain.model.pretrained import save_model
from streamtrain.model.vocab import vocab_of

VOCAB = vocab_of(policy_of("pasketti"))


TINY: dict[str, Any] = {
    "conv_dim": [32] * 7,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


SLOW = {"conv_stride": [5, 2, 2, 2, 2, 2, 4]}  # a frame every 40 ms


LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2, group norm": ("Wav2Vec2", {}),
    "wav2vec2, layer norm": ("Wav2Vec2", LAYER_NORM),
    "HuBERT, group norm": ("Hubert", {}),
    "HuBERT, layer norm": ("Hubert", LAYER_NORM),
    "WavLM, group norm": ("WavLM", {}),
    "WavLM, layer norm": ("WavLM", LAYER_NORM),
}


def make_network(family: str, head: str = "ForCTC", **more: Any) -> Any:
    """A tiny network of a family with random weights, in evaluation."""
    prefix, settings = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{prefix}Config")(**TINY, **settings, **more, vocab_size=len(VOCAB), pad_token_id=0)
    return getattr(transformers, f"{prefix}{head}")(config).eval()


def talkative(family: str, **more: Any) -> CTCModel:
    """A model whose head says something other than blank: another symbol every few frames."""
    network = make_network(family, **more)
    with torch.no_grad():
        network.lm_head.weight.mul_(6)
        network.lm_head.bias.fill_(0.0)
        network.lm_head.bias[VOCAB.blank] = 0.5
        network.lm_head.bias[VOCAB.encode(" ")] = 1.5
        network.lm_head.bias[len(SYMBOLS) + 2] = -50.0  # never [UNK], which the pipeline would spell out
    return CTCModel(network, VOCAB, normalize=True).eval()


def save(model: CTCModel, folder: Path) -> Path:
    save_model(model, folder)
    return folder


def decode(model: CTCModel, waveform: np.ndarray) -> str:
    inputs = torch.from_numpy(zero_mean_unit_variance(waveform))[None]
    lengths = torch.tensor([inputs.shape[1]])
    with torch.inference_mode():
        return greedy(model(inputs, lengths), model.frame_counts(lengths), model.vocab)[0].text
