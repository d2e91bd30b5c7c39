"""The CTC network, run so that a clip's log-probabilities do not depend on its companions. Needs torch alone.

Transformers computes the first GroupNorm of group-norm models (wav2vec2-base, HuBERT-base) over padding too, and gives
those models no attention mask. Here that norm takes its statistics over true frames, and the mask is always given.
Weights keep their names and values, so what is trained here loads in Transformers as it is.

While a model learns, the autograd graph of a forward does not depend on its data, because ZeRO-2 and -3 sum gradients
across ranks in the order in which they arrive: the first norm is masked and masked frames are replaced whether or not a
batch has any (`model.fix_graph` does the same for attention).

This file travels as it is into a submission, where neither the rest of this package nor its libraries are at hand.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from streamtrain.model.vocab import Vocab

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape: 8 ms of each layer
PIECE_FRAMES = 8_192  # a norm over more loses digits
BLOCK_FRAMES = 8  # that one product of the positional convolution makes; larger ones multiply more zeros


class MaskedGroupNorm(nn.GroupNorm):
    """Instance norm over time whose statistics leave padding out. Shares its parameters' names with `nn.GroupNorm`."""

    def forward(self, hidden: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden` (B, C, T), `frames` (B,) true lengths, or None where no row is padded."""
        if frames is None:
            return super().forward(hidden)
        if half_precision(hidden) and not hidden.requires_grad:
            with torch.autocast("cuda", enabled=False):
                return self.of_frames(hidden.transpose(1, 2), frames).transpose(1, 2)
        full = _zero_beyond(hidden.float(), frames)
        count = frames[:, None, None].to(torch.float32)
        mean = full.sum(-1, keepdim=True) / count  # (B, C, 1)
        square = _sum_of_squares(full) / count
        scale = self.weight[:, None].float() * torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        shift = self.bias[:, None].float() - mean * scale
        if full.requires_grad:
            return torch.addcmul(shift, full, scale).to(hidden.dtype)
        return full.mul_(scale).add_(shift).to(hidden.dtype)  # on CPU, fresh memory costs more than arithmetic

    def of_frames(self, hidden: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """As `forward`, of `hidden` (B, T, C), which it overwrites, without a copy in fp32; it gives no gradients."""
        outside = torch.arange(hidden.shape[1], device=hidden.device) >= frames[:, None]
        hidden.masked_fill_(outside[..., None], 0)
        count = frames[:, None].to(torch.float32)
        mean = hidden.sum(1, dtype=torch.float32) / count  # (B, C)
        square = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).square() / count
        scale = self.weight.float() * torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift[:, None].to(hidden.dtype), hidden, scale[:, None].to(hidden.dtype))


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

    def __init__(self, network: Any, vocab: "Vocab", normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.vocab = vocab
        self.normalize = normalize  # whether inputs are brought to zero mean and unit variance
        self.encoder_frozen = False  # whether only the head gets gradients
        config = network.config
        self.geometry = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
        first = self._base.feature_extractor.conv_layers[0]
        self._group_norm = isinstance(getattr(first, "layer_norm", None), nn.GroupNorm)
        if self._group_norm:
            first.layer_norm = _masked(first.layer_norm)
        for layer in self._base.feature_extractor.conv_layers:
            layer.conv._conv_forward = partial(_convolve_features, layer.conv)
        positions = self._base.encoder.pos_conv_embed.conv
        positions._conv_forward = partial(_convolve_positions, positions)

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
        padded = self._front_end_learns or bool((input_lengths != inputs.shape[1]).any())
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
        return count_frames(samples, self.geometry)

    @property
    def frame_samples(self) -> int:
        """Return the samples from one frame to the next."""
        return math.prod(stride for _, stride in self.geometry)

    @property
    def wants_mask(self) -> bool:
        """Whether Transformers' own code is given the attention mask; it ignores it in models with a group norm."""
        return not self._group_norm

    @property
    def features(self) -> int:
        """H, of the encoder's input."""
        return int(self.network.config.hidden_size)

    @property
    def layers(self) -> int:
        """N, of the encoder."""
        return int(self.network.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.lm_head.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.lm_head.weight.dtype
        return dtype

    @property
    def _base(self) -> Any:
        return getattr(self.network, self.network.base_model_prefix)

    @property
    def _front_end_learns(self) -> bool:
        """Tell if gradients reach the first norm: it is then always masked, so that every batch has one graph."""
        return torch.is_grad_enabled() and any(
            weight.requires_grad for weight in self._base.feature_extractor.conv_layers[0].parameters()
        )

    def _features(self, inputs: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """The convolutional front end, (B, S) → (B, C, T); `lengths` only where rows are padded."""
        layers = list(self._base.feature_extractor.conv_layers)
        hidden = inputs[:, None]
        if self._group_norm:
            first = layers.pop(0)
            kernel, stride = self.geometry[0]
            frames = None if lengths is None else ((lengths - kernel) // stride + 1).to(inputs.device)
            hidden = first.activation(first.layer_norm(first.conv(hidden), frames))
        for layer in layers:
            hidden = layer(hidden)
        return hidden


def half_precision(hidden: torch.Tensor) -> torch.dtype | None:
    """The type that a GPU computes with where that is a half one; None elsewhere."""
    if not hidden.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _convolve_positions(
    conv: nn.Conv1d, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """On a GPU in half precision, cuDNN's is five times slower than a product of blocks."""
    half = half_precision(hidden)
    if half is None:
        return F.conv1d(hidden, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    convolved = convolve_blocks(hidden.to(half), weight.to(half), conv.groups, int(conv.padding[0]))
    return convolved if bias is None else convolved + bias.to(half)[:, None]


def _convolve_features(
    conv: nn.Conv1d, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """On a GPU in half precision, a front end that does not learn runs time-major: cuDNN turns each layer around."""
    half = half_precision(hidden)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    if half is None or learns or not stride <= kernel <= 2 * stride:
        return F.conv1d(hidden, weight, bias, conv.stride)
    with torch.autocast("cuda", enabled=False):
        convolved = convolve_frames(hidden.to(half).transpose(1, 2), weight.to(half), stride)
        return (convolved if bias is None else convolved.add_(bias.to(half))).transpose(1, 2)


def convolve_blocks(hidden: torch.Tensor, weight: torch.Tensor, groups: int, padding: int) -> torch.Tensor:
    """`F.conv1d` with stride 1 as one batched matrix product: (B, C, T), (C', C ÷ groups, K) → (B, C', T').

    Every block of frames is a linear map of what the kernel reaches from it, in a matrix that repeats the kernel
    along its diagonal.
    """
    (rows, _, length), (channels, inner, kernel) = hidden.shape, weight.shape
    made, outer = length + 2 * padding - kernel + 1, channels // groups
    blocks = -(-made // BLOCK_FRAMES)
    reach = BLOCK_FRAMES + kernel - 1  # frames that a block hears
    padded = F.pad(hidden, (padding, blocks * BLOCK_FRAMES + kernel - 1 - padding - length))
    heard = padded.view(rows, groups, inner, -1).unfold(-1, reach, BLOCK_FRAMES)  # (B, G, I, N, R)
    heard = heard.permute(1, 0, 3, 2, 4).reshape(groups, rows * blocks, inner * reach)
    # The kernel and zeros, repeated, and cut into rows one shorter: in each it stands one frame further on
    repeated = F.pad(weight, (0, BLOCK_FRAMES)).unsqueeze(-2).expand(-1, -1, BLOCK_FRAMES, -1)
    diagonal = repeated.reshape(channels, inner, -1)[..., : BLOCK_FRAMES * reach]
    diagonal = diagonal.view(groups, outer, inner, BLOCK_FRAMES, reach).permute(0, 2, 4, 1, 3)
    product = torch.bmm(heard, diagonal.reshape(groups, inner * reach, outer * BLOCK_FRAMES))
    product = product.view(groups, rows, blocks, outer, BLOCK_FRAMES).permute(1, 0, 3, 2, 4)
    return product.reshape(rows, channels, blocks * BLOCK_FRAMES)[..., :made]


def convolve_frames(hidden: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """`F.conv1d` of time-major frames as products of matrices, with a stride from K ÷ 2 to K.

    (B, T, C), (C', C, K) → (B, T', C')
    """
    rows, length, channels = hidden.shape
    made, _, kernel = weight.shape
    taps = weight.permute(2, 1, 0).reshape(kernel * channels, made)
    blocks = -(-length // stride)  # that begin at a multiple of the stride, some of them too short for a kernel
    own, whole = stride * channels, F.pad(hidden, (0, 0, 0, blocks * stride - length))
    if channels == 1:  # such narrow products are slow: the whole kernel at once, in eights
        reach = F.pad(whole.flatten(), (0, kernel - stride)).unfold(0, kernel, stride)
        product = F.pad(reach, (0, -kernel % 8)) @ F.pad(taps, (0, 0, 0, -kernel % 8))
    else:
        flat = whole.reshape(-1, own)  # (B · blocks, stride · C)
        product = flat @ taps[:own]
        product[:-1].addmm_(flat[1:, : (kernel - stride) * channels], taps[own:])
    return product.view(rows, blocks, made)[:, : (length - kernel) // stride + 1]


def count_frames(samples: torch.Tensor, geometry: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Frames that convolutions of these kernels and strides make of so many samples, elementwise."""
    for kernel, stride in geometry:
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples


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


def _masked(norm: nn.GroupNorm) -> MaskedGroupNorm:
    masked = MaskedGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    masked.weight, masked.bias = norm.weight, norm.bias
    return masked
