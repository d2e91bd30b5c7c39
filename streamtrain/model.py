"""CTC models from Transformers, run so that a clip's log-probabilities do not depend on its companions.

Transformers computes the first GroupNorm of group-norm models (wav2vec2-base, HuBERT-base) over padding too, and gives
those models no attention mask. Here that norm takes its statistics over true frames, and the mask is always given.
Weights keep their names and values, so what is trained here loads in Transformers as it is.
"""

import difflib
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sharding.errors import StreamtrainError
from streamtrain.config import ModelConfig
from streamtrain.vocab import Vocab, load_vocab, vocab_of

FAMILIES = ("wav2vec2", "hubert", "wavlm")  # Transformers' model types that are run here as they are meant
PIECE_FRAMES = 8_192  # a norm over more loses digits
ACTIVE_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout")


class ModelError(StreamtrainError):
    """A model that cannot be had, or not trained as it is."""


class MaskedGroupNorm(nn.GroupNorm):
    """Instance norm over time whose statistics leave padding out. Shares its parameters' names with `nn.GroupNorm`."""

    def forward(self, hidden: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden` (B, C, T), `frames` (B,) true lengths, or None where no row is padded."""
        if frames is None:
            return super().forward(hidden)
        full = _zero_beyond(hidden.float(), frames)
        count = frames[:, None, None].to(torch.float32)
        mean = full.sum(-1, keepdim=True) / count  # (B, C, 1)
        square = _sum_of_squares(full) / count
        scale = self.weight[:, None].float() * torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        shift = self.bias[:, None].float() - mean * scale
        if full.requires_grad:
            return torch.addcmul(shift, full, scale).to(hidden.dtype)
        return full.mul_(scale).add_(shift).to(hidden.dtype)  # on CPU, fresh memory costs more than arithmetic


def _sum_of_squares(full: torch.Tensor) -> torch.Tensor:
    """Over time, (B, C, T) → (B, C, 1); where nothing learns in one pass, without memory for the squares."""
    if full.requires_grad:
        return full.square().sum(-1, keepdim=True)
    pieces = torch.split(full, PIECE_FRAMES, dim=-1)
    norms = torch.cat([torch.linalg.vector_norm(piece, dim=-1, keepdim=True) for piece in pieces], dim=-1)
    return norms.square().sum(-1, keepdim=True)


def _zero_beyond(hidden: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Zeros in place of what lies beyond each row's frames: (B, C, T), (B,)."""
    if hidden.device.type == "cpu" and not hidden.requires_grad:  # rather than to pass over all that stays
        for row, length in enumerate(frames.tolist()):
            hidden[row, :, length:] = 0
        return hidden
    outside = torch.arange(hidden.shape[-1], device=hidden.device) >= frames[:, None]
    return hidden.masked_fill_(outside[:, None], 0)


class CTCModel(nn.Module):
    """A Transformers CTC network (wav2vec2, HuBERT, WavLM) and the vocabulary it speaks."""

    def __init__(self, network: Any, vocab: Vocab, normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.vocab = vocab
        self.normalize = normalize  # whether inputs are brought to zero mean and unit variance
        self.encoder_frozen = False  # whether only the head gets gradients
        config = network.config
        if getattr(config, "add_adapter", False):
            raise ModelError(f"{config.model_type} with a convolutional adapter is not supported")
        self._geometry = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        first = self._base.feature_extractor.conv_layers[0]
        self._group_norm = isinstance(getattr(first, "layer_norm", None), nn.GroupNorm)
        if self._group_norm:
            first.layer_norm = _masked(first.layer_norm)

    def forward(
        self,
        inputs: torch.Tensor,
        input_lengths: torch.Tensor,
        time_mask: torch.Tensor | None = None,
        feature_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probabilities (B, T, V) in fp32 of `inputs` (B, S) with `input_lengths` (B,) in samples.

        `time_mask` (B, T) hides frames from the encoder, `feature_mask` (B, H) features, by zeros. What lies beyond a
        clip's frames is meaningless.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            hidden = self._encode(inputs, input_lengths, time_mask, feature_mask)  # (B, T, H)
        logits = self.network.lm_head(self.network.dropout(hidden))  # (B, T, V)
        return F.log_softmax(logits.float(), dim=-1)

    def _encode(
        self,
        inputs: torch.Tensor,
        input_lengths: torch.Tensor,
        time_mask: torch.Tensor | None,
        feature_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        padded = bool((input_lengths != inputs.shape[1]).any())
        features = self._features(inputs.to(self.dtype), input_lengths if padded else None)  # (B, C, T)
        hidden = self._base.feature_projection(features.transpose(1, 2))  # (B, T, H)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # wav2vec2 also gives the normed features
        hidden = self._hide(hidden, time_mask)
        if feature_mask is not None:
            hidden = hidden.masked_fill(feature_mask[:, None], 0)
        frames = self.frame_counts(input_lengths).to(hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        encoded: torch.Tensor = self._base.encoder(hidden, attention_mask=mask).last_hidden_state
        return encoded

    def _hide(self, hidden: torch.Tensor, time_mask: torch.Tensor | None) -> torch.Tensor:
        """Put the learnt embedding where the mask is set; where it learns it is always used, as ZeRO-3 must foresee."""
        embedding = getattr(self._base, "masked_spec_embed", None)
        if time_mask is None and self.training and embedding is not None and embedding.requires_grad:
            time_mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if time_mask is None:
            return hidden
        return torch.where(time_mask[..., None], self._base.masked_spec_embed.to(hidden.dtype), hidden)

    def frame_counts(self, samples: torch.Tensor) -> torch.Tensor:
        """Frames of so many samples, elementwise."""
        for kernel, stride in self._geometry:
            samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
        return samples

    @property
    def features(self) -> int:
        """H, of the encoder's input."""
        return int(self.network.config.hidden_size)

    @property
    def layers(self) -> int:
        """N, of the encoder."""
        return int(self.network.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.lm_head.weight.dtype
        return dtype

    @property
    def _base(self) -> Any:
        return getattr(self.network, self.network.base_model_prefix)

    def _features(self, inputs: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """The convolutional front end, (B, S) → (B, C, T); `lengths` only where rows are padded."""
        hidden = inputs[:, None]
        layers = list(self._base.feature_extractor.conv_layers)
        if self._group_norm:
            first = layers.pop(0)
            kernel, stride = self._geometry[0]
            frames = None if lengths is None else ((lengths - kernel) // stride + 1).to(inputs.device)
            hidden = first.activation(first.layer_norm(first.conv(hidden), frames))
        for layer in layers:
            hidden = layer(hidden)
        return hidden


def ctc_sum(
    log_probs: torch.Tensor,
    frames: torch.Tensor,
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
    weights: torch.Tensor,
    blank: int,
) -> torch.Tensor:
    """CTC loss in nats summed over the clips of weight 1: (B, T, V), (B,), (B, L), (B,), (B,) → ().

    Graves et al. 2006. In fp32, with true lengths; a silent row adds nothing and gets no gradient.
    """
    heard = weights > 0
    counted = torch.where(heard, target_lengths, 0)  # else 0 × ∞ where no path fits
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), targets, frames, counted, blank=blank, reduction="none", zero_infinity=False
    )
    return torch.where(heard.to(losses.device, non_blocking=True), losses, 0.0 * log_probs.sum()).sum()


def load_model(config: ModelConfig, track: str = "phonetic") -> CTCModel:
    """A pretrained encoder with a CTC head for the symbols of a track, or one from scratch.

    A model that was trained for them here keeps its vocabulary and its head; another gets new ones.
    """
    settings: dict[str, Any] = dict.fromkeys(ACTIVE_DROPOUTS, config.dropout)
    # A share above 0 makes Transformers create the embedding of masked frames; the masks themselves are ours
    settings |= {"layerdrop": 0.0, "apply_spec_augment": False, "mask_feature_prob": 0.0, "mask_time_prob": 0.05}
    if config.scratch is not None:
        vocab = vocab_of(track)
        network = _from_scratch(config.scratch, settings | _ctc_settings(vocab))
    else:
        vocab = _vocab_to_train(Path(str(config.pretrained)), track)
        network = _from_pretrained(str(config.pretrained), settings | _ctc_settings(vocab))
    if config.freeze_cnn:
        network.freeze_feature_encoder()
    if config.mask_time_prob == 0:
        getattr(network, network.base_model_prefix).masked_spec_embed.requires_grad_(False)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return CTCModel(network, vocab, normalize=_normalizes(config.pretrained)).train()


def load_trained(folder: str | Path) -> CTCModel:
    """A model saved by `save_model`, for evaluation."""
    folder = Path(folder)
    vocab = load_vocab(folder)
    model = CTCModel(_from_pretrained(str(folder), {}), vocab, normalize=_normalizes(str(folder)))
    return model.eval()


def save_model(model: CTCModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the Hugging Face layout: weights (of `model.network`), configuration, tokenizer, feature extractor."""
    from streamtrain.vocab import save_vocab

    model.network.save_pretrained(folder, state_dict=weights)
    save_vocab(model.vocab, folder, model.normalize, attention_mask=not model._group_norm)
    for path in folder.iterdir():
        give_usual_mode(path)


def give_usual_mode(path: Path) -> None:
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


def _vocab_to_train(folder: Path, track: str) -> Vocab:
    wanted = vocab_of(track)
    try:
        own = load_vocab(folder)
    except StreamtrainError:
        return wanted
    return own if set(wanted.tokens) <= set(own.tokens) else wanted


def _from_scratch(scratch: dict[str, Any], settings: dict[str, Any]) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    hint = "its keys are those of Transformers' Wav2Vec2Config"
    keys = Wav2Vec2Config().to_dict().keys()
    for key in scratch:  # Transformers would take any key, and ignore it
        if key in settings:
            raise ModelError(f"model.scratch: {key!r} is not set here", "dropouts are model.dropout, the rest follows")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            raise ModelError(f"model.scratch: unknown key {key!r}", f"did you mean {near[0]!r}?" if near else hint)
    try:
        return Wav2Vec2ForCTC(Wav2Vec2Config(**scratch, **settings))
    except Exception as error:  # Transformers and torch raise whatever they met
        raise ModelError(f"model.scratch: {error}", hint) from error


def _from_pretrained(name: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCTC

    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ModelError(f"model {name!r}: there is no such folder", "model.pretrained names a model, or a folder")
    try:
        family = AutoConfig.from_pretrained(name).model_type
        if family not in FAMILIES:
            raise ValueError(f"its type is {family!r}, not one of {', '.join(FAMILIES)}")
        return AutoModelForCTC.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=bool(settings), **settings
        )
    except Exception as error:  # Transformers, safetensors and torch raise whatever they met
        reason = str(error).strip().split("\n")[0]
        hint = (
            "the folder must hold config.json and model.safetensors, whole"
            if Path(name).is_dir()
            else "without a network, download it elsewhere and give its folder, --set model.pretrained=FOLDER; "
            "or train a small one from scratch with configs/demo.json"
        )
        raise ModelError(f"model {name!r} cannot be loaded: {reason}", hint) from error


def _normalizes(name: str | None) -> bool:
    """What the model's feature extractor does to its inputs; a model from scratch gets normalised ones."""
    if name is None:
        return True
    from transformers import AutoFeatureExtractor

    try:
        return bool(AutoFeatureExtractor.from_pretrained(name).do_normalize)
    except (OSError, ValueError, AttributeError):
        return True  # no preprocessor_config.json: wav2vec2's own default


def _masked(norm: nn.GroupNorm) -> MaskedGroupNorm:
    masked = MaskedGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    masked.weight, masked.bias = norm.weight, norm.bias
    return masked
