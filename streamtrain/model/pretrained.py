"""CTC models from Transformers: by name, by folder or from scratch, and saved so that Transformers loads them."""

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

FAMILIES = ("wav2vec2", "hubert", "wavlm")  # Transformers' model types that are run here as they are meant
NEVER_RUN = ("add_adapter", "conv_pos_batch_norm", "return_dict", "output_hidden_states", "output_attentions")
MASKED_ATTENTION = "sdpa_always_masked"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_LAYERS = 1_000
EXTRACTOR = ("processor_config.json", "preprocessor_config.json")  # today's name, and that of earlier models
DOCUMENTS = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json", *EXTRACTOR)
ENCODER = ("feature_extractor.", "feature_projection.", "encoder.")
ACTIVE_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout")


class ModelError(StreamtrainError):
    """A model that cannot be had, or not trained as it is."""


def load_model(config: ModelConfig, track: str = "phonetic") -> CTCModel:
    """Return a pretrained encoder with a CTC head for the symbols of a track, or a model from scratch, to be trained.

    A model whose vocabulary holds all of these symbols keeps it, and its head. Raise ModelError if the weights of a
    pretrained model are not all there, or if it has a head that cannot be kept and `model.vocab` does not let it go.
    """
    settings: dict[str, Any] = dict.fromkeys(ACTIVE_DROPOUTS, config.dropout)
    # A share above 0 makes Transformers create the embedding of masked frames; the masks themselves are ours
    settings |= {"layerdrop": 0.0, "apply_spec_augment": False, "mask_feature_prob": 0.0, "mask_time_prob": 0.05}
    if config.scratch is not None:
        vocab = vocab_of(track)
        network = _from_scratch(config.scratch, settings | _ctc_settings(vocab))
    else:
        network, vocab = _to_train(str(config.pretrained), settings, vocab_of(track), config.vocab)
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
    """Have attention masked also where no frame is padded, so that the autograd graph is the same for every batch.

    Transformers leaves out a mask that hides nothing, and looks for that at the values on the device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def always(**arguments: Any) -> torch.Tensor | None:
        return sdpa_mask(**arguments | {"allow_is_bidirectional_skip": False})  # type: ignore[no-any-return]

    if network.config._attn_implementation == "sdpa":  # WavLM has attention of its own, which is always masked
        AttentionInterface.register(MASKED_ATTENTION, sdpa_attention_forward)
        AttentionMaskInterface.register(MASKED_ATTENTION, always)
        network.set_attn_implementation(MASKED_ATTENTION)


def copy_of(model: CTCModel, weights: dict[str, torch.Tensor]) -> CTCModel:
    """Return a model of the same kind with other weights, to be scored; it takes up the tensors themselves."""
    config = copy.deepcopy(model.network.config)
    if config._attn_implementation == MASKED_ATTENTION:
        config._attn_implementation = "sdpa"  # as a model that is loaded has it
    with torch.device("meta"):
        network = type(model.network)(config)
    network.load_state_dict(weights, assign=True)
    return CTCModel(network, model.vocab, model.normalize).eval()


def load_trained(folder: str | Path) -> CTCModel:
    """Return a model saved by `save_model`, for evaluation. Raise ModelError or ChecksumError if it is not whole."""
    folder = Path(folder)
    log.info("reading the model %s", folder)
    check_sums(folder)
    vocab, (network, random) = load_vocab(folder), _from_pretrained(str(folder), {})
    if random:
        raise ModelError(
            f"model {str(folder)!r} has no CTC head of its own: {', '.join(random.values())}",
            "give the folder of a trained model, whole",
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
            "give the folder of a trained model, whole",
        )
    collect_as_usual()
    return CTCModel(network, vocab, normalize).eval()


def save_model(model: CTCModel, folder: Path) -> None:
    """Write the Hugging Face layout: weights (of `model.network`), configuration, tokenizer, feature extractor.

    Their checksums lie beside them, so that a model that was damaged later is not taken for what was trained.
    """
    # In today's names, as they are in memory: by itself Transformers gives back those of the file it has read
    model.network.save_pretrained(folder, save_original_format=False)
    save_vocab(model.vocab, folder, model.normalize, attention_mask=model.wants_mask)
    write_sums(folder)
    for path in folder.iterdir():
        set_default_mode(path)


def set_default_mode(path: Path) -> None:
    """What safetensors writes, its owner alone could read."""
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


def _to_train(name: str, settings: dict[str, Any], wanted: Vocab, choice: str) -> tuple[Any, Vocab]:
    """Return a pretrained network and its vocabulary: its own if it holds all `wanted`, else those, with a new head."""
    check_sums(Path(name))
    tokens, own = _vocab_of_pretrained(name)
    kept = choice == "auto" and own is not None and set(wanted.tokens) <= set(own.tokens)
    vocab = own if own is not None and kept else wanted
    network, random = _from_pretrained(name, settings | _ctc_settings(vocab))
    if all(f"lm_head.{part} is missing" in random.values() for part in ("weight", "bias")):
        return network, vocab  # of its pretraining: the head is new
    if choice == "auto" and (random or not kept):
        why = ", ".join(random.values()) if kept else f"the shard set's symbols are {_shorten(wanted.tokens)}"
        raise ModelError(
            f"model {name!r} is a CTC model: its head is for symbols of its own "
            f"({_shorten(tokens) or 'which are not told'}) and cannot be kept: {why}",
            "to train its encoder with a new head, --set model.vocab=new; or build the shard set for the track that "
            "the model writes",
        )
    if choice == "new":
        network.lm_head = torch.nn.Linear(network.lm_head.in_features, len(vocab))  # else its values count as loaded
        network._init_weights(network.lm_head)
    return network, vocab


def _shorten(tokens: Sequence[str]) -> str:
    return " ".join(tokens[:12]) + (" …" if len(tokens) > 12 else "")


def _vocab_of_pretrained(name: str) -> tuple[list[str], Vocab | None]:
    """Return the tokens of a model, in a folder or on a hub, and its vocabulary if it can be kept here as it is."""
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
    for key in scratch:  # Transformers would take any key, and ignore it
        if key in NEVER_RUN:
            raise ModelError(f"model.scratch: {key!r} is not supported", hint)
        if key in settings:
            raise ModelError(f"model.scratch: {key!r} is not set here", "dropouts are model.dropout, the rest follows")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            raise ModelError(f"model.scratch: unknown key {key!r}", f"did you mean {near[0]!r}?" if near else hint)
    try:
        return Wav2Vec2ForCTC(Wav2Vec2Config(**scratch, **settings))
    except Exception as error:  # Transformers and torch raise whatever they met
        raise ModelError(f"model.scratch: {error}", hint) from error


def _from_pretrained(name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return a network in fp32 with all weights of its encoder, and which of its head have random values, and why.

    Raise ModelError if a weight of the encoder is missing or has another shape.
    """
    from transformers import AutoConfig, AutoModelForCTC
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weights that are read, in a second
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ModelError(f"model {name!r}: there is no such folder", "model.pretrained names a model, or a folder")
    try:
        _check_documents(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ValueError(f"its type is {config.model_type!r}, not one of {', '.join(FAMILIES)}")
        if getattr(config, "add_adapter", False):
            raise ValueError(f"{config.model_type} with a convolutional adapter is not supported")
        if getattr(config, "conv_pos_batch_norm", False):
            raise ValueError("its batch norm over positions counts padding, and other ranks' clips not at all")
        _check_size(config, settings.get("vocab_size", config.vocab_size), Path(name))
        _check_files(Path(name))
        network, seen = AutoModelForCTC.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False,
            **settings,
        )  # fmt: skip
    except Exception as error:  # Transformers, safetensors and torch raise whatever they met
        reason = str(error).strip().split("\n")[0]
        hint = (
            "the folder must hold config.json and model.safetensors, whole"
            if Path(name).is_dir()
            else "without a network, download it elsewhere and give its folder, --set model.pretrained=FOLDER; "
            "or train a small one from scratch with configs/demo.json"
        )
        raise ModelError(f"model {name!r} cannot be loaded: {reason}", hint) from error
    random = {key: f"{key} is missing" for key in seen["missing_keys"]}
    for key, theirs, ours in seen["mismatched_keys"]:
        random[key] = f"{key} is {tuple(theirs)} in the file, {tuple(ours)} in the model"
    _check_weights(name, network, random)
    _check_unused(name, network, seen["unexpected_keys"])
    if unused := sorted(seen["unexpected_keys"]):
        log.info("model %s: %d weights of its file are not used: %s, …", name, len(unused), ", ".join(unused[:3]))
    return network, {key: why for key, why in random.items() if key.startswith("lm_head.")}


def _check_weights(name: str, network: Any, random: dict[str, str]) -> None:
    """Raise ModelError if a weight of the encoder has random values, or any is not a number."""
    weights = dict(network.named_parameters())
    learnt_anew = ("lm_head.weight", "lm_head.bias", f"{network.base_model_prefix}.masked_spec_embed")
    encoder = {key: weight.numel() for key, weight in weights.items() if key not in learnt_anew}
    lost = [key for key in encoder if key in random]
    if lost:
        found = 1 - sum(encoder[key] for key in lost) / sum(encoder.values())
        raise ModelError(
            f"model {name!r}: its file lacks {len(lost)} weights of its encoder: "
            f"{', '.join(random[key] for key in lost[:3])}{', …' if len(lost) > 3 else ''}; "
            f"{found:.1%} of the encoder was found",
            f"the names must be those of Transformers' {type(network).__name__}, and config.json that of these weights",
        )
    broken = [key for key, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise ModelError(
            f"model {name!r}: {len(broken)} weights are not finite: {', '.join(broken[:3])}", "is it whole?"
        )


def _check_unused(name: str, network: Any, unused: Sequence[str]) -> None:
    """Raise ModelError if a weight of the file belongs to the encoder, but is not in it."""
    prefix = f"{network.base_model_prefix}."
    left = sorted(key for key in unused if key.removeprefix(prefix).startswith(ENCODER))
    if left:
        raise ModelError(
            f"model {name!r}: {len(left)} weights of its file are in no layer that config.json names: "
            f"{', '.join(left[:3])}{', …' if len(left) > 3 else ''}",
            "config.json must be that of these weights: num_hidden_layers, conv_dim, …",
        )


def _check_documents(folder: Path) -> None:
    """Raise ValueError if a document of a model's folder is not JSON, or too large or deep for Transformers to read."""
    for path in (folder / name for name in DOCUMENTS):
        if path.exists():
            try:
                parse_json(read_document(path), finite=False)
            except DocumentError as error:
                raise ValueError(f"{path.name}: {error}") from error


def _check_size(config: Any, symbols: int, folder: Path) -> None:
    """Raise ValueError if a configuration names more weights than a folder's files can hold, a byte for each.

    Memory for what is missing would be taken, before it is told.
    """
    width, layers, channels = config.hidden_size, config.num_hidden_layers, config.conv_dim
    if layers > MOST_LAYERS:
        raise ValueError(f"config.json names {layers:,} layers, at most {MOST_LAYERS:,} are run")
    weights = layers * width * (4 * width + 2 * config.intermediate_size) + width * (channels[-1] + symbols)
    weights += width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    weights += sum(map(math.prod, zip((1, *channels), channels, config.conv_kernel)))  # noqa: B905  # first of all: 1
    stored = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    if stored and weights > stored:
        raise ValueError(f"config.json names {weights:,} weights, its files hold {stored:,} bytes")


def _check_files(folder: Path) -> None:
    """Raise ValueError if the folder has two files of weights, unless the same weights have the same values in both."""
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if len(found) < 2:
        return
    if found != ["model.safetensors", "pytorch_model.bin"]:
        raise ValueError(f"it holds {' and '.join(found)}: move away what is not meant")
    one, pickled = load_file(folder / found[0]), folder / found[1]
    other = torch.load(pickled, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickled))
    shared = one.keys() & other.keys()
    differ = sorted(key for key in shared if not torch.equal(one[key].float(), other[key].float()))
    if differ or not shared:
        raise ValueError(
            f"{' and '.join(found)} hold other weights ({differ[0] if differ else 'none has the same name'}): "
            "move away the one that is not meant"
        )


def _normalizes(name: str) -> bool | None:
    """Return what the model's feature extractor does to its inputs; None if there is none.

    Raise ModelError if its file cannot be read.
    """
    from transformers import AutoFeatureExtractor
    from transformers.utils import cached_file

    try:
        if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in EXTRACTOR):
            return None
        return bool(AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False).do_normalize)
    except Exception as error:  # Transformers raises whatever it met
        raise ModelError(
            f"model {name!r}: its feature extractor cannot be read: {str(error).splitlines()[0]}",
            f"{' or '.join(EXTRACTOR)} must be whole",
        ) from error
