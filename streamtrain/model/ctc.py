"""Run a CTC network so that a clip's log-probabilities do not depend on its batch. Needs torch alone.

Transformers computes the first GroupNorm of group-norm models (wav2vec2-base, HuBERT-base) over padding too, and gives
those models no attention mask. Here that norm takes its statistics over true frames, and the mask is always given.
Weights keep their names and values, so a model trained here loads in Transformers unchanged.

During training, the autograd graph of a forward does not depend on its data, because ZeRO-2 and -3 all-reduce gradients
in the order of their arrival: the first norm is masked and masked frames are replaced whether or not a batch has any
(`pretrained.make_graph_static` does the same for attention).

This file is copied unchanged into a submission, which has neither the rest of this package nor its libraries.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from sharding.labels.policy import LabelPolicy
    from streamtrain.model.vocab import Vocab

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every shape: 8 ms per layer
PIECE_FRAMES = 8_192  # a norm over more frames loses precision
BLOCK_FRAMES = 8  # per matrix product of the positional convolution; larger blocks multiply more zeros


class MaskedGroupNorm(nn.GroupNorm):
    """Normalise each channel over time without padding. Parameters have the names of `nn.GroupNorm`."""

    def forward(self, hidden: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `hidden` (B, C, T); `frames` (B,) are true lengths, or None if no row is padded."""
        if frames is None:
            return super().forward(hidden)
        if half_precision(hidden) and not hidden.requires_grad:
            with torch.autocast("cuda", enabled=False):
                return self.of_frames(hidden.transpose(1, 2), frames).transpose(1, 2)
        full = _zero_padding(hidden.float(), frames)
        count = frames[:, None, None].to(torch.float32)
        mean = full.sum(-1, keepdim=True) / count  # (B, C, 1)
        square = _sum_of_squares(full) / count
        scale = self.weight[:, None].float() * torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        shift = self.bias[:, None].float() - mean * scale
        if full.requires_grad:
            return torch.addcmul(shift, full, scale).to(hidden.dtype)
        return full.mul_(scale).add_(shift).to(hidden.dtype)  # on CPU, new memory costs more than arithmetic

    def of_frames(self, hidden: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Normalise `hidden` (B, T, C) as `forward` does, without an fp32 copy or gradients; overwrites its padding."""
        outside = torch.arange(hidden.shape[1], device=hidden.device) >= frames[:, None]
        hidden.masked_fill_(outside[..., None], 0)
        count = frames[:, None].to(torch.float32)
        mean = hidden.sum(1, dtype=torch.float32) / count  # (B, C)
        square = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).square() / count
        scale = self.weight.float() * torch.rsqrt((square - mean.square()).clamp_min(0) + self.eps)
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift[:, None].to(hidden.dtype), hidden, scale[:, None].to(hidden.dtype))


def _sum_of_squares(full: torch.Tensor) -> torch.Tensor:
    """Sum squares over time, (B, C, T) → (B, C, 1); without gradients, in one pass and no memory for the squares."""
    if full.requires_grad:
        return full.square().sum(-1, keepdim=True)
    pieces = torch.split(full, PIECE_FRAMES, dim=-1)
    norms = torch.cat([torch.linalg.vector_norm(piece, dim=-1, keepdim=True) for piece in pieces], dim=-1)
    return norms.square().sum(-1, keepdim=True)


def _zero_padding(hidden: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Return `hidden` (B, C, T) with zeros beyond each row's `frames` (B,)."""
    if hidden.device.type == "cpu" and not hidden.requires_grad:  # touches only the padding
        for row, length in enumerate(frames.tolist()):
            hidden[row, :, length:] = 0
        return hidden
    outside = torch.arange(hidden.shape[-1], device=hidden.device) >= frames[:, None]
    return hidden.masked_fill_(outside[:, None], 0)


class CTCModel(nn.Module):
    """Wrap a Transformers CTC network (wav2vec2, HuBERT, WavLM) with its output vocabulary."""

    def __init__(self, network: Any, vocab: "Vocab", normalize: bool, labels: "LabelPolicy | None" = None) -> None:
        super().__init__()
        self.network = network
        self.vocab = vocab
        self.labels = labels  # what its outputs are, None: not known
        self.normalize = normalize  # whether inputs are scaled to zero mean and unit variance
        self.encoder_frozen = False  # whether only the head gets gradients
        self.vocab_origin = ""  # of a model to train: whether it keeps its own vocabulary, and why
        config = network.config
        self.geometry = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
        first = self._base.feature_extractor.conv_layers[0]
        self._group_norm = isinstance(getattr(first, "layer_norm", None), nn.GroupNorm)
        if self._group_norm:
            first.layer_norm = _masked_norm(first.layer_norm)
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
        """Return log-probabilities (B, T, V) in fp32 of `inputs` (B, S) with `input_lengths` (B,) in samples.

        `time_mask` (B, T) hides frames from the encoder, `feature_mask` (B, H) zeroes features. Values beyond a clip's
        frames are meaningless.
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
        padded = self._trains_front_end or bool((input_lengths != inputs.shape[1]).any())
        features = self._features(inputs.to(self.dtype), input_lengths if padded else None)  # (B, C, T)
        hidden = self._base.feature_projection(features.transpose(1, 2))  # (B, T, H)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # wav2vec2 also returns the normed features
        hidden = self._mask_frames(hidden, time_mask)
        if feature_mask is not None:
            hidden = hidden.masked_fill(feature_mask[:, None], 0)
        frames = self.frame_counts(input_lengths).to(hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        encoded: torch.Tensor = self._base.encoder(hidden, attention_mask=mask).last_hidden_state
        return encoded

    def _mask_frames(self, hidden: torch.Tensor, time_mask: torch.Tensor | None) -> torch.Tensor:
        """Replace masked frames by the learnt embedding; while it is trained it is always used, as ZeRO-3 requires."""
        embedding = getattr(self._base, "masked_spec_embed", None)
        if time_mask is None and self.training and embedding is not None and embedding.requires_grad:
            time_mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if time_mask is None:
            return hidden
        return torch.where(time_mask[..., None], self._base.masked_spec_embed.to(hidden.dtype), hidden)

    def frame_counts(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the number of frames for each number of samples, elementwise."""
        return count_frames(samples, self.geometry)

    @property
    def frame_samples(self) -> int:
        """Return the number of samples from one frame to the next."""
        return math.prod(stride for _, stride in self.geometry)

    @property
    def uses_attention_mask(self) -> bool:
        """Return whether Transformers itself uses an attention mask; it ignores it in models with a group norm."""
        return not self._group_norm

    @property
    def features(self) -> int:
        """Return H, the size of the encoder's input."""
        return int(self.network.config.hidden_size)

    @property
    def layers(self) -> int:
        """Return N, the number of encoder layers."""
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
    def _trains_front_end(self) -> bool:
        """Return whether gradients reach the first norm: it is then always masked, to keep the graph the same."""
        return torch.is_grad_enabled() and any(
            weight.requires_grad for weight in self._base.feature_extractor.conv_layers[0].parameters()
        )

    def _features(self, inputs: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Run the convolutional front end, (B, S) → (B, C, T); `lengths` is None if no row is padded."""
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
    """Return the half-precision type that a GPU computes with; None on CPU and in full precision."""
    if not hidden.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _convolve_positions(
    conv: nn.Conv1d, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Convolve positions: on a GPU in half precision, cuDNN is five times slower than a product of blocks."""
    half = half_precision(hidden)
    if half is None:
        return F.conv1d(hidden, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    convolved = convolve_blocks(hidden.to(half), weight.to(half), conv.groups, int(conv.padding[0]))
    return convolved if bias is None else convolved + bias.to(half)[:, None]


def _convolve_features(
    conv: nn.Conv1d, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Convolve features; on a GPU in half precision without gradients time-major, as cuDNN transposes each layer."""
    half = half_precision(hidden)
    has_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    if half is None or has_gradients or not stride <= kernel <= 2 * stride:
        return F.conv1d(hidden, weight, bias, conv.stride)
    with torch.autocast("cuda", enabled=False):
        convolved = convolve_frames(hidden.to(half).transpose(1, 2), weight.to(half), stride)
        return (convolved if bias is None else convolved.add_(bias.to(half))).transpose(1, 2)


def convolve_blocks(hidden: torch.Tensor, weight: torch.Tensor, groups: int, padding: int) -> torch.Tensor:
    """Compute `F.conv1d` with stride 1 as a batched matrix product: (B, C, T), (C', C ÷ groups, K) → (B, C', T').

    Each block of output frames is a linear map of the input frames in its reach, by a matrix that repeats the kernel
    along its diagonal.
    """
    (rows, _, length), (channels, in_channels, kernel) = hidden.shape, weight.shape
    out_length, out_channels = length + 2 * padding - kernel + 1, channels // groups
    blocks = -(-out_length // BLOCK_FRAMES)
    reach = BLOCK_FRAMES + kernel - 1  # input frames of a block
    padded = F.pad(hidden, (padding, blocks * BLOCK_FRAMES + kernel - 1 - padding - length))
    windows = padded.view(rows, groups, in_channels, -1).unfold(-1, reach, BLOCK_FRAMES)  # (B, G, I, N, R)
    windows = windows.permute(1, 0, 3, 2, 4).reshape(groups, rows * blocks, in_channels * reach)
    # Repeat kernel and zeros, and cut into rows one shorter: each row holds the kernel one frame further on
    repeated = F.pad(weight, (0, BLOCK_FRAMES)).unsqueeze(-2).expand(-1, -1, BLOCK_FRAMES, -1)
    diagonal = repeated.reshape(channels, in_channels, -1)[..., : BLOCK_FRAMES * reach]
    diagonal = diagonal.view(groups, out_channels, in_channels, BLOCK_FRAMES, reach).permute(0, 2, 4, 1, 3)
    product = torch.bmm(windows, diagonal.reshape(groups, in_channels * reach, out_channels * BLOCK_FRAMES))
    product = product.view(groups, rows, blocks, out_channels, BLOCK_FRAMES).permute(1, 0, 3, 2, 4)
    return product.reshape(rows, channels, blocks * BLOCK_FRAMES)[..., :out_length]


def convolve_frames(hidden: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Compute `F.conv1d` as matrix products, for strides from K ÷ 2 to K: (B, T, C), (C', C, K) → (B, T', C')."""
    rows, length, channels = hidden.shape
    out_channels, _, kernel = weight.shape
    taps = weight.permute(2, 1, 0).reshape(kernel * channels, out_channels)
    blocks = -(-length // stride)  # one per multiple of the stride; the last may be too short for a kernel
    width, padded = stride * channels, F.pad(hidden, (0, 0, 0, blocks * stride - length))
    if channels == 1:  # narrow products are slow: take the whole kernel at once, padded to a multiple of 8
        windows = F.pad(padded.flatten(), (0, kernel - stride)).unfold(0, kernel, stride)
        product = F.pad(windows, (0, -kernel % 8)) @ F.pad(taps, (0, 0, 0, -kernel % 8))
    else:
        flat = padded.reshape(-1, width)  # (B · blocks, stride · C)
        product = flat @ taps[:width]
        product[:-1].addmm_(flat[1:, : (kernel - stride) * channels], taps[width:])
    return product.view(rows, blocks, out_channels)[:, : (length - kernel) // stride + 1]


def count_frames(samples: torch.Tensor, geometry: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the number of frames that convolutions (kernel, stride) make of each number of samples, elementwise."""
    for kernel, stride in geometry:
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples


def ctc_losses(
    log_probs: torch.Tensor,
    frames: torch.Tensor,
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
    weights: torch.Tensor,
    blank: int,
) -> torch.Tensor:
    """Return the CTC loss of each clip in nats, 0 at weight 0: (B, T, V), (B,), (B, L), (B,), (B,) → (B,).

    Graves et al. 2006. In fp32, with true lengths; a silent row (weight 0) adds nothing and gets no gradient.
    """
    active = weights > 0
    active_lengths = torch.where(active, target_lengths, 0)  # else 0 × ∞ if no path fits
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), targets, frames, active_lengths, blank=blank, reduction="none", zero_infinity=False
    )
    return torch.where(active.to(losses.device, non_blocking=True), losses, 0.0 * log_probs.sum())


def ctc_sum(
    log_probs: torch.Tensor,
    frames: torch.Tensor,
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
    weights: torch.Tensor,
    blank: int,
) -> torch.Tensor:
    """Return the sum of `ctc_losses`: (B, T, V), (B,), (B, L), (B,), (B,) → ()."""
    return ctc_losses(log_probs, frames, targets, target_lengths, weights, blank).sum()


def _masked_norm(norm: nn.GroupNorm) -> MaskedGroupNorm:
    masked = MaskedGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    masked.weight, masked.bias = norm.weight, norm.bias
    return masked
