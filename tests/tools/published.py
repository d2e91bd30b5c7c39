"""Tiny checkpoints as they are published: the key names, files and configurations of 2020 to 2022, not of today.

Names and files are those of facebook/wav2vec2-base, facebook/wav2vec2-large-960h, facebook/hubert-base-ls960,
facebook/hubert-large-ls960-ft, microsoft/wavlm-base and their fine-tuned forms; the weights are random.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

OLD_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
HEADS = {"wav2vec2": "ForPreTraining", "hubert": "Model", "wavlm": "Model"}  # what was published of the pretraining
CLASSES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}
LETTERS_960H = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK", "'", *"XJQZ"]
OLD_KEYS = {"gradient_checkpointing": False, "freeze_feat_extract_train": True, "no_mask_channel_overlap": False,
            "mask_channel_length": 10, "mask_channel_prob": 0.0, "transformers_version": "4.7.0.dev0"}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
        "proj_codevector_dim": 8, "codevector_dim": 8, "num_codevectors_per_group": 4}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@dataclass(frozen=True)
class Tokenizer:
    """The files of a published tokenizer, and the outputs of its model."""

    tokens: tuple[str, ...]
    config: dict[str, Any]  # tokenizer_config.json
    special: dict[str, Any] = field(default_factory=dict)  # special_tokens_map.json
    added: tuple[str, ...] = ()  # added_tokens.json: ids after those of vocab.json
    outputs: int | None = None  # None: as many as tokens in vocab.json
    pad: int = 0  # config.json's

    def write(self, folder: Path) -> None:
        ids = {token: number for number, token in enumerate(self.tokens)}
        write(folder / "vocab.json", ids)
        write(folder / "tokenizer_config.json", self.config)
        if self.special:
            write(folder / "special_tokens_map.json", self.special)
        if self.added:
            write(folder / "added_tokens.json", {token: number for number, token in enumerate(self.added, len(ids))})


LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
FAIRSEQ = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TUTORIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS = {
    "facebook/wav2vec2-base-960h": Tokenizer(
        tuple(LETTERS_960H), FAIRSEQ | {"do_lower_case": False, "return_attention_mask": False, "do_normalize": True},
        FAIRSEQ,
    ),
    "facebook/hubert-large-ls960-ft": Tokenizer(
        tuple(LETTERS_960H), FAIRSEQ | {"do_lower_case": False, "word_delimiter_token": "|", "return_attention_mask":
        True, "do_normalize": True, "special_tokens_map_file": None, "tokenizer_class": "Wav2Vec2CTCTokenizer"},
        FAIRSEQ,
    ),
    "jonatasgrosman/wav2vec2-large-xlsr-53-english": Tokenizer(
        ("<pad>", "<s>", "</s>", "<unk>", "|", "'", "-", *LETTERS),
        FAIRSEQ | {"do_lower_case": False, "word_delimiter_token": "|"},
        FAIRSEQ,
    ),
    "a tutorial's, <s> and </s> never output": Tokenizer(  # as run_speech_recognition_ctc.py of 2021 left it
        ("'", *LETTERS[:13], "|", *LETTERS[13:], "[UNK]", "[PAD]"), TUTORIAL | {"word_delimiter_token": "|"},
        TUTORIAL | {"additional_special_tokens": [{"content": "<s>", "single_word": False}]},
        ("<s>", "</s>"), pad=29,
    ),
    "a tutorial's, <s> and </s> in the head": Tokenizer(
        ("|", "'", *LETTERS, "[UNK]", "[PAD]"), TUTORIAL | {"pad_token": {"content": "[PAD]", "__type": "AddedToken"}},
        {}, ("<s>", "</s>"), outputs=32, pad=29,
    ),
    "a lower-casing one, its head wider than its tokens": Tokenizer(
        tuple(LETTERS_960H), FAIRSEQ | {"do_lower_case": True}, outputs=39,
    ),
}  # fmt: skip
ESPEAK = Tokenizer(  # facebook/wav2vec2-lv-60-espeak-cv-ft
    ("<pad>", "<s>", "</s>", "<unk>", "n", "s", "t", "ə", "l", "a", "i", "k", "d", "m", "ɛ", "aɪ", "tʃ", "ɑː", "oʊ"),
    FAIRSEQ | {"phone_delimiter_token": " ", "word_delimiter_token": None, "phonemizer_lang": "en-us",
               "phonemizer_backend": "espeak", "do_phonemize": True, "tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer"},
    FAIRSEQ,
)  # fmt: skip


def publish(
    folder: Path,
    family: str,
    fine_tuned: bool,
    file: str,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer = TOKENIZERS["facebook/wav2vec2-base-960h"],
    large: bool | None = None,
) -> Path:
    """Write FOLDER: of the pretraining, without a CTC head; or fine-tuned, with the vocabulary of wav2vec2-base-960h.

    `file` is "bin" for pytorch_model.bin alone, "safetensors" for model.safetensors alone. `large`: with layer norms,
    by default if fine-tuned.
    """
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    head = "ForCTC" if fine_tuned else HEADS[family]
    large = fine_tuned if large is None else large
    outputs = tokenizer.outputs or len(tokenizer.tokens)
    settings: dict[str, Any] = TINY | (LARGE if large else {}) | {"vocab_size": outputs, "pad_token_id": tokenizer.pad}
    network = getattr(transformers, f"{CLASSES[family]}{head}")(
        getattr(transformers, f"{CLASSES[family]}Config")(**settings, bos_token_id=1, eos_token_id=2)
    )
    weights = {name: weight.to(dtype).contiguous() for name, weight in network.state_dict().items()}
    for today, then in OLD_NAMES.items():
        weights = {name.replace(today, then): weight for name, weight in weights.items()}
    if file == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = network.config.to_dict() | OLD_KEYS | {"architectures": [f"{CLASSES[family]}{head}"]}
    config.pop("dtype", None)
    if dtype == torch.float16:
        config["torch_dtype"] = "float16"
    write(folder / "config.json", config)
    extractor = {"do_normalize": True, "feature_size": 1, "padding_side": "right", "padding_value": 0.0,
                 "sampling_rate": 16000}  # fmt: skip
    write(folder / "preprocessor_config.json", extractor)
    if fine_tuned or family == "wav2vec2":  # wav2vec2-base comes with the tokenizer of its fine-tuned form
        tokenizer.write(folder)
    return folder


def write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")
