"""Load CTC models from Transformers by name, by folder or from scratch; save them so that Transformers loads them."""

import copy
import difflib
import logging
import math
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sharding.errors import StreamtrainError
from sharding.files.document import DocumentError, parse_json, read_document
from sharding.labels.policy import LabelPolicy, policy_of
from streamtrain.config import ModelConfig
from streamtrain.model.checksums import check_sums, write_sums
from streamtrain.model.ctc import CTCModel
from streamtrain.model.labels import fit_vocab, read_labels, save_labels
from streamtrain.model.tokenizer import fit_to_head, load_vocab, read_vocab, save_vocab
from streamtrain.model.vocab import Vocab, vocab_of
from streamtrain.startup import collect_as_usual

log = logging.getLogger("streamtrain")

FAMILIES = ("wav2vec2", "hubert", "wavlm")  # Transformers' model types that run here as they were trained
NEVER_RUN = ("add_adapter", "conv_pos_batch_norm", "return_dict", "output_hidden_states", "output_attentions")
MASKED_ATTENTION = "sdpa_always_masked"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_LAYERS = 1_000
LACKING = ", but not"
NOT_FETCHED = "its vocabulary could not be fetched"
EXTRACTOR = ("processor_config.json", "preprocessor_config.json")  # Transformers 5 may write the first instead
DOCUMENTS = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json", *EXTRACTOR)
ENCODER = ("feature_extractor.", "feature_projection.", "encoder.")
ACTIVE_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout")


class ModelError(StreamtrainError):
    """Report a model that cannot be loaded, or not trained as it is."""


def load_model(config: ModelConfig, policy: LabelPolicy | None = None) -> CTCModel:
    """Return a pretrained encoder with a CTC head for the symbols of labels, or a model from scratch, for training.

    A model whose vocabulary has at least 95 % of these symbols keeps it, and its head, unless `model.vocab` is "new".
    Labels are by default the challenge's phones. Raises ModelError if weights of a pretrained model are missing, or if
    `model.vocab` is "own" and cannot be kept.
    """
    policy = policy or policy_of("pasketti")
    settings: dict[str, Any] = dict.fromkeys(ACTIVE_DROPOUTS, config.dropout)
    # A share above 0 makes Transformers create the embedding of masked frames; the masks are drawn in this package
    settings |= {"layerdrop": 0.0, "apply_spec_augment": False, "mask_feature_prob": 0.0, "mask_time_prob": 0.05}
    if config.scratch is not None:
        vocab, origin = vocab_of(policy), f"the {len(policy.symbols)} symbols of the labels"
        network = _from_scratch(config.scratch, settings | _ctc_settings(vocab))
    else:
        network, vocab, origin = _load_for_training(str(config.pretrained), settings, policy, config.vocab)
    if config.freeze_cnn:
        network.freeze_feature_encoder()
    if config.mask_time_prob == 0:
        getattr(network, network.base_model_prefix).masked_spec_embed.requires_grad_(False)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    make_graph_static(network)
    normalize = config.pretrained is None or _normalizes(config.pretrained) is not False  # wav2vec2's own default
    collect_as_usual()
    model = CTCModel(network, vocab, normalize, policy)
    model.vocab_origin = origin
    return model.train()


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
    return CTCModel(network, model.vocab, model.normalize, model.labels).eval()


def load_trained(folder: str | Path) -> CTCModel:
    """Return a model saved by `save_model`, for evaluation. Raises ModelError or ChecksumError if it is damaged."""
    folder = Path(folder)
    log.info("loading the model %s", folder)
    check_sums(folder)
    published, (network, untrained) = load_vocab(folder), _from_pretrained(str(folder), {})
    if untrained:
        raise ModelError(
            f"model {str(folder)!r} has no CTC head of its own: {', '.join(untrained.values())}",
            "give the complete folder of a trained model",
        )
    vocab = fit_to_head(published, network.lm_head.out_features)
    if vocab is None or vocab.blank != network.config.pad_token_id:
        reason = _why_unlike(published, network.lm_head.out_features, network.config.pad_token_id)
        raise ModelError(f"{folder}: {reason}", "take both from one folder")
    normalize = _normalizes(str(folder))
    if normalize is None:
        raise ModelError(
            f"model {str(folder)!r} has no {EXTRACTOR[1]}: whether its inputs are normalised is not known",
            "give the complete folder of a trained model",
        )
    labels = read_labels(folder, vocab)
    collect_as_usual()
    return CTCModel(network, fit_vocab(vocab, labels).vocab if labels else vocab, normalize, labels).eval()


def save_model(model: CTCModel, folder: Path) -> None:
    """Write the Hugging Face layout: weights (of `model.network`), configuration, tokenizer, feature extractor.

    Their checksums lie beside them, so that later damage is detected.
    """
    # With the weight names in memory: by default Transformers restores those of the file that it has read
    model.network.save_pretrained(folder, save_original_format=False)
    save_vocab(model.vocab, folder, model.normalize, attention_mask=model.uses_attention_mask)
    if model.labels is not None:
        save_labels(model.labels, folder)
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


def _load_for_training(name: str, settings: dict[str, Any], policy: LabelPolicy, choice: str) -> tuple[Any, Vocab, str]:
    """Return a pretrained network, its vocabulary, and where this is from.

    It is its own, with its head, or that of the labels, with a new head.
    """
    check_sums(Path(name))
    vocab, reason = (None, "model.vocab is new") if choice == "new" else _own_vocab(name, policy)
    random_state = torch.get_rng_state()
    if vocab is not None:
        network, random = _from_pretrained(name, settings | {"ctc_loss_reduction": "sum"})
        if not random or (choice == "own" and _is_headless(random)):
            level = logging.WARNING if LACKING in reason else logging.INFO
            origin = f"keeps its vocabulary of {len(vocab)} tokens: {reason}"
            log.log(level, "model %s %s", name, origin)
            return network, vocab, origin
        reason = "it has no head" if _is_headless(random) else ", ".join(random.values())
        del network  # its memory, before it is loaded again
    if choice == "own":
        raise ModelError(
            f"model {name!r}: its vocabulary cannot be kept: {reason}",
            "model.vocab=new trains its encoder with a new head; or build the shard set with another --profile",
        )
    torch.set_rng_state(random_state)  # the values of a new head do not depend on what was tried
    wanted = vocab_of(policy)
    network, random = _from_pretrained(name, settings | _ctc_settings(wanted))
    if reason == NOT_FETCHED and not _is_headless(random):
        raise ModelError(
            f"model {name!r}: it has a head, whose vocabulary cannot be fetched: vocab.json is not in the cache, and "
            "the hub does not answer, or is not asked (HF_HUB_OFFLINE)",
            "download all of the model where there is a network; model.vocab=new trains its encoder with a new head",
        )
    level = logging.INFO if _is_headless(random) or choice == "new" else logging.WARNING  # its own head is lost
    origin = f"gets a new head for the {len(policy.symbols)} symbols of the labels: {reason}"
    log.log(level, "model %s %s", name, origin)
    if not _is_headless(random):
        network.lm_head = torch.nn.Linear(network.lm_head.in_features, len(wanted))  # else its values count as loaded
        network._init_weights(network.lm_head)
    return network, wanted, origin


def _is_headless(random: dict[str, str]) -> bool:
    return all(f"lm_head.{part} is missing" in random.values() for part in ("weight", "bias"))


def _own_vocab(name: str, policy: LabelPolicy) -> tuple[Vocab | None, str]:
    """Return the vocabulary of a model in a folder or on the hub if it serves the labels, and how well or why not."""
    from transformers import AutoConfig

    try:
        if _is_unreachable(name, "vocab.json"):
            return None, NOT_FETCHED
        published = read_vocab(partial(_find, name), "vocab.json")
        _check_documents(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        vocab = fit_to_head(published, config.vocab_size)
    except StreamtrainError as error:
        return None, error.message
    except Exception as error:  # Transformers raises errors of any type
        return None, str(error).split("\n")[0]
    if vocab is None or vocab.blank != config.pad_token_id:
        return None, _why_unlike(published, config.vocab_size, config.pad_token_id)
    fit = fit_vocab(vocab, policy)
    if fit.reason:
        return None, f"its own vocabulary ({_shorten([token for token in vocab.tokens if token])}) does not serve: " + (
            fit.reason
        )
    case = f", in {fit.vocab.case} case" if fit.vocab.case else ""
    lacking = f"{LACKING} {policy.name(fit.lacking)}, which it will never write" if fit.lacking else ""
    return fit.vocab, f"it has {fit.share:.1%} of the labels' symbols{case}{lacking}"


def _why_unlike(vocab: Vocab, outputs: int, blank: int | None) -> str:
    return (
        f"vocab.json: {len(vocab)} symbols, blank {vocab.blank}; the model has {outputs} and {blank}: the vocabulary "
        "is another model's"
    )


def _find(name: str, file: str) -> Path | None:
    """Return a file of a model in a folder or on the hub; None if there is none, or none in the cache if offline."""
    from transformers.utils import cached_file

    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def _is_unreachable(name: str, file: str) -> bool:
    """Return whether a file of a model on the hub is not in the cache, and the hub has not said that there is none."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir() or name.startswith(("/", ".", "~")):
        return False
    return _find(name, file) is None and try_to_load_from_cache(name, file) is None


def _shorten(tokens: Sequence[str]) -> str:
    return " ".join(tokens[:12]) + (" …" if len(tokens) > 12 else "")


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
