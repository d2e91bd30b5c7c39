"""Load CTC models from Transformers by name, by folder or from scratch; save them so that Transformers loads them."""

import copy
import difflib
import logging
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from sharding.errors import StreamtrainError
from sharding.files.document import DocumentError, parse, parse_json, read_document
from streamtrain.config import ModelConfig
from streamtrain.model.checksums import check_sums, write_sums
from streamtrain.model.ctc import CTCModel
from streamtrain.model.vocab import Vocab, load_vocab, save_vocab, vocab_of
from streamtrain.startup import collect_as_usual

log = logging.getLogger("streamtrain")

FAMILIES = ("wav2vec2", "hubert", "wavlm")  # Transformers' model types that run here as they were trained
NEVER_RUN = ("add_adapter", "conv_pos_batch_norm", "return_dict", "output_hidden_states", "output_attentions")
MASKED_ATTENTION = "sdpa_always_masked"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_LAYERS = 1_000
EXTRACTOR = ("processor_config.json", "preprocessor_config.json")  # the current name, and that of older models
DOCUMENTS = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json", *EXTRACTOR)
ENCODER = ("feature_extractor.", "feature_projection.", "encoder.")
ACTIVE_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout")


class ModelError(StreamtrainError):
    """Report a model that cannot be loaded, or not trained as it is."""


def load_model(config: ModelConfig, track: str = "phonetic") -> CTCModel:
    """Return a pretrained encoder with a CTC head for the symbols of a track, or a model from scratch, for training.

    A model with all of these symbols in its vocabulary keeps it, and its head. Raises ModelError if weights of a
    pretrained model are missing, or if it has a head that cannot be kept and `model.vocab` is not "new".
    """
    settings: dict[str, Any] = dict.fromkeys(ACTIVE_DROPOUTS, config.dropout)
    # A share above 0 makes Transformers create the embedding of masked frames; the masks are drawn in this package
    settings |= {"layerdrop": 0.0, "apply_spec_augment": False, "mask_feature_prob": 0.0, "mask_time_prob": 0.05}
    if config.scratch is not None:
        vocab = vocab_of(track)
        network = _from_scratch(config.scratch, settings | _ctc_settings(vocab))
    else:
        network, vocab = _load_for_training(str(config.pretrained), settings, vocab_of(track), config.vocab)
    if config.freeze_cnn:
        network.freeze_feature_encoder()
    if config.mask_time_prob == 0:
        getattr(network, network.base_model_prefix).masked_spec_embed.requires_grad_(False)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    make_graph_static(network)
    normalize = config.pretrained is None or _normalizes(config.pretrained) is not False  # wav2vec2's own default
    collect_as_usual()
    return CTCModel(network, vocab, normalize).train()


def make_graph_static(network: Any) -> None:
    """Mask attention even if no frame is padded, so that the autograd graph is the same for every batch.

    Transformers omits a mask that hides nothing, and reads the mask's values on the device to find out.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def always_masked(**arguments: Any) -> torch.Tensor | None:
        return sdpa_mask(**arguments | {"allow_is_bidirectional_skip": False})  # type: ignore[no-any-return]

    if network.config._attn_implementation == "sdpa":  # WavLM has its own attention, which is always masked
        AttentionInterface.register(MASKED_ATTENTION, sdpa_attention_forward)
        AttentionMaskInterface.register(MASKED_ATTENTION, always_masked)
        network.set_attn_implementation(MASKED_ATTENTION)


def copy_of(model: CTCModel, weights: dict[str, torch.Tensor]) -> CTCModel:
    """Return a model of the same architecture with other weights, for scoring; it uses the given tensors themselves."""
    config = copy.deepcopy(model.network.config)
    if config._attn_implementation == MASKED_ATTENTION:
        config._attn_implementation = "sdpa"  # as in a model that was loaded
    with torch.device("meta"):
        network = type(model.network)(config)
    network.load_state_dict(weights, assign=True)
    return CTCModel(network, model.vocab, model.normalize).eval()


def load_trained(folder: str | Path) -> CTCModel:
    """Return a model saved by `save_model`, for evaluation. Raises ModelError or ChecksumError if it is damaged."""
    folder = Path(folder)
    log.info("loading the model %s", folder)
    check_sums(folder)
    vocab, (network, untrained) = load_vocab(folder), _from_pretrained(str(folder), {})
    if untrained:
        raise ModelError(
            f"model {str(folder)!r} has no CTC head of its own: {', '.join(untrained.values())}",
            "give the complete folder of a trained model",
        )
    if len(vocab) != network.lm_head.out_features or vocab.blank != network.config.pad_token_id:
        raise ModelError(
            f"{folder / 'vocab.json'}: {len(vocab)} symbols, blank {vocab.blank}; the model has "
            f"{network.lm_head.out_features} and {network.config.pad_token_id}",
            "the vocabulary is another model's: take both from one folder",
        )
    normalize = _normalizes(str(folder))
    if normalize is None:
        raise ModelError(
            f"model {str(folder)!r} has no {EXTRACTOR[0]}: whether its inputs are normalised is not known",
            "give the complete folder of a trained model",
        )
    collect_as_usual()
    return CTCModel(network, vocab, normalize).eval()


def save_model(model: CTCModel, folder: Path) -> None:
    """Write the Hugging Face layout: weights (of `model.network`), configuration, tokenizer, feature extractor.

    Their checksums lie beside them, so that later damage is detected.
    """
    # With the weight names in memory: by default Transformers restores those of the file that it has read
    model.network.save_pretrained(folder, save_original_format=False)
    save_vocab(model.vocab, folder, model.normalize, attention_mask=model.uses_attention_mask)
    write_sums(folder)
    for path in folder.iterdir():
        set_default_mode(path)


def set_default_mode(path: Path) -> None:
    """Set the default permissions of a new file: safetensors writes files that only their owner can read."""
    os.umask(umask := os.umask(0))
    path.chmod(0o666 & ~umask)


def _ctc_settings(vocab: Vocab) -> dict[str, Any]:
    return {
        "vocab_size": len(vocab),
        "pad_token_id": vocab.blank,
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_loss_reduction": "sum",
    }


def _load_for_training(name: str, settings: dict[str, Any], wanted: Vocab, choice: str) -> tuple[Any, Vocab]:
    """Return a pretrained network and its vocabulary: its own if it holds all `wanted`, else those with a new head."""
    check_sums(Path(name))
    tokens, own_vocab = _vocab_of_pretrained(name)
    keep_head = choice == "auto" and own_vocab is not None and set(wanted.tokens) <= set(own_vocab.tokens)
    vocab = own_vocab if own_vocab is not None and keep_head else wanted
    network, random = _from_pretrained(name, settings | _ctc_settings(vocab))
    if all(f"lm_head.{part} is missing" in random.values() for part in ("weight", "bias")):
        return network, vocab  # an encoder without a head: the head is new
    if choice == "auto" and (random or not keep_head):
        cause = ", ".join(random.values()) if keep_head else f"the shard set's symbols are {_shorten(wanted.tokens)}"
        raise ModelError(
            f"model {name!r} is a CTC model: its head outputs its own symbols "
            f"({_shorten(tokens) or 'not listed'}) and cannot be kept: {cause}",
            "to train its encoder with a new head, --set model.vocab=new; or build the shard set for the track that "
            "the model outputs",
        )
    if choice == "new":
        network.lm_head = torch.nn.Linear(network.lm_head.in_features, len(vocab))  # else its values count as loaded
        network._init_weights(network.lm_head)
    return network, vocab


def _shorten(tokens: Sequence[str]) -> str:
    return " ".join(tokens[:12]) + (" …" if len(tokens) > 12 else "")


def _vocab_of_pretrained(name: str) -> tuple[list[str], Vocab | None]:
    """Return the tokens of a model, in a folder or on the hub, and its vocabulary if it can be used unchanged."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        path = Path(cached_file(name, "vocab.json"))
        tokens = list(parse(read_document(path), TypeAdapter(dict[str, Any])))
        blank = AutoConfig.from_pretrained(name, trust_remote_code=False).pad_token_id
    except (OSError, ValueError, TypeError):
        return [], None
    try:
        vocab = load_vocab(path.parent)
    except StreamtrainError:
        return tokens, None
    return tokens, vocab if vocab.blank == blank else None


def _from_scratch(scratch: dict[str, Any], settings: dict[str, Any]) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    hint = "its keys are those of Transformers' Wav2Vec2Config"
    keys = Wav2Vec2Config().to_dict().keys()
    for key in scratch:  # Transformers would accept any key and ignore it
        if key in NEVER_RUN:
            raise ModelError(f"model.scratch: {key!r} is not supported", hint)
        if key in settings:
            raise ModelError(f"model.scratch: {key!r} is not set here", "dropouts are model.dropout, the rest follows")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            raise ModelError(f"model.scratch: unknown key {key!r}", f"did you mean {near[0]!r}?" if near else hint)
    try:
        return Wav2Vec2ForCTC(Wav2Vec2Config(**scratch, **settings))
    except Exception as error:  # Transformers and torch raise errors of any type
        raise ModelError(f"model.scratch: {error}", hint) from error


def _from_pretrained(name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return a network in fp32 with its whole encoder, and the weights of its head that are random, with reasons.

    Raises ModelError if a weight of the encoder is missing or has another shape.
    """
    from transformers import AutoConfig, AutoModelForCTC
    from transformers.utils import logging

    logging.disable_progress_bar()  # weights are read within a second
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ModelError(f"model {name!r}: there is no such folder", "model.pretrained is a model's name or a folder")
    try:
        _check_documents(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ValueError(f"its type is {config.model_type!r}, not one of {', '.join(FAMILIES)}")
        if getattr(config, "add_adapter", False):
            raise ValueError(f"{config.model_type} with a convolutional adapter is not supported")
        if getattr(config, "conv_pos_batch_norm", False):
            raise ValueError("its batch norm over positions includes padding, but no clips of other ranks")
        _check_size(config, settings.get("vocab_size", config.vocab_size), Path(name))
        _check_files(Path(name))
        network, loading = AutoModelForCTC.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False,
            **settings,
        )  # fmt: skip
    except Exception as error:  # Transformers, safetensors and torch raise errors of any type
        reason = str(error).strip().split("\n")[0]
        hint = (
            "the folder must hold complete config.json and model.safetensors"
            if Path(name).is_dir()
            else "without a network, download it elsewhere and give its folder, --set model.pretrained=FOLDER; "
            "or train a small one from scratch with configs/demo.json"
        )
        raise ModelError(f"model {name!r} cannot be loaded: {reason}", hint) from error
    untrained = {key: f"{key} is missing" for key in loading["missing_keys"]}
    for key, in_file, in_model in loading["mismatched_keys"]:
        untrained[key] = f"{key} is {tuple(in_file)} in the file, {tuple(in_model)} in the model"
    _check_weights(name, network, untrained)
    _check_unused(name, network, loading["unexpected_keys"])
    if unused := sorted(loading["unexpected_keys"]):
        log.info("model %s: %d weights of its file are not used: %s, …", name, len(unused), ", ".join(unused[:3]))
    return network, {key: cause for key, cause in untrained.items() if key.startswith("lm_head.")}


def _check_weights(name: str, network: Any, untrained: dict[str, str]) -> None:
    """Raise ModelError if a weight of the encoder has random values, or if any weight is not finite."""
    weights = dict(network.named_parameters())
    may_be_new = ("lm_head.weight", "lm_head.bias", f"{network.base_model_prefix}.masked_spec_embed")
    encoder = {key: weight.numel() for key, weight in weights.items() if key not in may_be_new}
    missing = [key for key in encoder if key in untrained]
    if missing:
        share = 1 - sum(encoder[key] for key in missing) / sum(encoder.values())
        raise ModelError(
            f"model {name!r}: its file lacks {len(missing)} weights of its encoder: "
            f"{', '.join(untrained[key] for key in missing[:3])}{', …' if len(missing) > 3 else ''}; "
            f"{share:.1%} of the encoder was found",
            f"weight names must be those of Transformers' {type(network).__name__}, and config.json must match them",
        )
    invalid = [key for key, weight in weights.items() if not bool(weight.isfinite().all())]
    if invalid:
        raise ModelError(
            f"model {name!r}: {len(invalid)} weights are not finite: {', '.join(invalid[:3])}", "copy the file again"
        )


def _check_unused(name: str, network: Any, unused: Sequence[str]) -> None:
    """Raise ModelError if the file has weights of the encoder that the network lacks."""
    prefix = f"{network.base_model_prefix}."
    unplaced = sorted(key for key in unused if key.removeprefix(prefix).startswith(ENCODER))
    if unplaced:
        raise ModelError(
            f"model {name!r}: {len(unplaced)} weights of its file are in no layer that config.json names: "
            f"{', '.join(unplaced[:3])}{', …' if len(unplaced) > 3 else ''}",
            "use the config.json of these weights: num_hidden_layers, conv_dim, …",
        )


def _check_documents(folder: Path) -> None:
    """Raise ValueError if a JSON file of a model's folder is invalid, or too large or deep for Transformers to read."""
    for path in (folder / name for name in DOCUMENTS):
        if path.exists():
            try:
                parse_json(read_document(path), finite=False)
            except DocumentError as error:
                raise ValueError(f"{path.name}: {error}") from error


def _check_size(config: Any, symbols: int, folder: Path) -> None:
    """Raise ValueError if a configuration names more weights than a folder's files can hold, at one byte each.

    Otherwise memory for the missing ones would be allocated before the error is reported.
    """
    width, layers, channels = config.hidden_size, config.num_hidden_layers, config.conv_dim
    if layers > MAX_LAYERS:
        raise ValueError(f"config.json names {layers:,} layers, at most {MAX_LAYERS:,} are supported")
    weights = layers * width * (4 * width + 2 * config.intermediate_size) + width * (channels[-1] + symbols)
    weights += width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    weights += sum(map(math.prod, zip((1, *channels), channels, config.conv_kernel)))  # noqa: B905  # first input: 1
    stored = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    if stored and weights > stored:
        raise ValueError(f"config.json names {weights:,} weights, its files hold {stored:,} bytes")


def _check_files(folder: Path) -> None:
    """Raise ValueError if the folder has two files of weights, unless the weights they share have the same values."""
    names = [candidate for candidate in WEIGHTS if (folder / candidate).is_file()]
    if len(names) < 2:
        return
    if names != ["model.safetensors", "pytorch_model.bin"]:
        raise ValueError(f"it holds {' and '.join(names)}: move away those that are not meant")
    tensors, pickled = load_file(folder / names[0]), folder / names[1]
    pickled_tensors = torch.load(pickled, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickled))
    shared = tensors.keys() & pickled_tensors.keys()
    differ = sorted(key for key in shared if not torch.equal(tensors[key].float(), pickled_tensors[key].float()))
    if differ or not shared:
        raise ValueError(
            f"{' and '.join(names)} hold different weights ({differ[0] if differ else 'none has the same name'}): "
            "move away the one that is not meant"
        )


def _normalizes(name: str) -> bool | None:
    """Return whether the model's feature extractor normalises its inputs; None if there is no extractor.

    Raises ModelError if its file cannot be read.
    """
    from transformers import AutoFeatureExtractor
    from transformers.utils import cached_file

    try:
        if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in EXTRACTOR):
            return None
        return bool(AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False).do_normalize)
    except Exception as error:  # Transformers raises errors of any type
        raise ModelError(
            f"model {name!r}: its feature extractor cannot be read: {str(error).splitlines()[0]}",
            f"{' or '.join(EXTRACTOR)} must be complete: copy it again",
        ) from error
