"""One block of the vision tower or of the decoder as a function of its tensors, in torch.

The residual stream is float32. Matrix products and attention run in the type of the weights. `observe(name, x)` gets
the input of every linear layer. The blocks follow the original code (InternViT, Qwen2, Qwen3, InternLM2). This module
knows the canonical tensor names below the block. It does not know files or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_edge.model.config import (
    PIXEL_MEAN,
    PIXEL_STD,
    PROJECTOR_NORM_EPS,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
)

Weights = Mapping[str, Tensor]
Observe = Callable[[str, Tensor], None]
# Gets keys before their rotation (after their norm, where there is one), and values, both [tokens, kv_heads, head_dim].
ObserveCache = Callable[[Tensor, Tensor], None]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return y = x W^T + b in the type of x.

    Where `weights` hold an `input_scale` (one number), the weights are int8 values with a `weight_scale` [out], and x
    is rounded to int8 as devices round it.
    """
    weight, bias, step = (weights.get(f"{name}.{part}") for part in ("weight", "bias", "input_scale"))
    assert weight is not None
    if step is None:
        return F.linear(x, weight, bias)
    # In place: a new tensor for each of these steps takes as long as the step.
    integers = (x.float() / step).round_().clamp_(-128, 127).to(weight.dtype)
    y = F.linear(integers, weight).float().mul_(step * weights[f"{name}.weight_scale"])
    return (y if bias is None else y.add_(bias.float())).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """Apply LayerNorm over the last axis, in float32."""
    weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def no_observer(name: str, x: Tensor) -> None:
    """An observer for passes that collect nothing."""


def unseen_cache(key: Tensor, value: Tensor) -> None:
    """A cache observer for passes that do not need the KV cache."""


# ---- vision ----


def embed_pixels(weights: Weights, tiles: Tensor, vision: VisionConfig) -> Tensor:
    """Embed uint8 tiles [tiles, S, S, 3] as float32 [tiles, 1 + patches, hidden], class token first."""
    grid, patch = vision.grid_size, vision.patch_size
    mean, std = (torch.tensor(values, device=tiles.device) for values in (PIXEL_MEAN, PIXEL_STD))
    pixels = (tiles.float() / 255 - mean) / std
    patches = pixels.reshape(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    kernel = weights["patch_embedding.weight"].float().flatten(1)
    x = F.linear(patches, kernel, weights["patch_embedding.bias"].float())
    token = weights["class_embedding"].float().expand(len(tiles), -1, -1)
    return torch.cat([token, x], dim=1) + weights["position_embedding"].float()


def vision_block(weights: Weights, x: Tensor, vision: VisionConfig, observe: Observe) -> Tensor:
    """Apply one InternViT block to x [tiles, tokens, hidden] float32. The result has the same shape and type."""
    dtype = weights["attn.qkv.weight"].dtype
    h = _vision_norm(x, weights, "norm1", vision).to(dtype)
    observe("attn.qkv", h)
    q, k, v = linear(weights, "attn.qkv", h).chunk(3, dim=-1)
    if vision.qk_normalization:
        q = rms_norm(q, weights["attn.q_norm.weight"], vision.qk_norm_eps).to(dtype)
        k = rms_norm(k, weights["attn.k_norm.weight"], vision.qk_norm_eps).to(dtype)
    q, k, v = (part.reshape(*part.shape[:2], vision.num_attention_heads, -1).transpose(1, 2) for part in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    observe("attn.proj", attended)
    x = x + weights["ls1"].float() * linear(weights, "attn.proj", attended)
    h = _vision_norm(x, weights, "norm2", vision).to(dtype)
    observe("mlp.fc1", h)
    h = F.gelu(linear(weights, "mlp.fc1", h))
    observe("mlp.fc2", h)
    return x + weights["ls2"].float() * linear(weights, "mlp.fc2", h)


def _vision_norm(x: Tensor, weights: Weights, name: str, vision: VisionConfig) -> Tensor:
    if vision.norm_type == "rms_norm":
        return rms_norm(x, weights[f"{name}.weight"], vision.layer_norm_eps)
    return layer_norm(x, weights, name, vision.layer_norm_eps)


def project(weights: Weights, x: Tensor, config: ModelConfig, observe: Observe) -> Tensor:
    """Turn the last block's output [tiles, 1 + patches, hidden] into image tokens.

    The image tokens are [tiles, tokens, decoder hidden] float32.
    """
    x = layer_norm(pixel_shuffle(x[:, 1:], config), weights, "norm", PROJECTOR_NORM_EPS)
    x = x.to(weights["fc1.weight"].dtype)
    observe("fc1", x)
    x = F.gelu(linear(weights, "fc1", x))
    observe("fc2", x)
    return linear(weights, "fc2", x).float()


def pixel_shuffle(x: Tensor, config: ModelConfig) -> Tensor:
    """Merge [tiles, grid * grid, c] to [tiles, tokens, c * r * r] in the order of the original's views (v1 or v2)."""
    r, grid = config.shuffle, config.vision.grid_size
    x = x.reshape(len(x), grid, grid // r, -1).transpose(1, 2)  # [tiles, column, grid, c * r]
    x = x.reshape(len(x), grid // r, grid // r, -1)  # [tiles, column, row, c * r * r]
    return (x if config.ps_version == "v1" else x.transpose(1, 2)).flatten(1, 2)


# ---- decoder ----


def decoder_block(
    weights: Weights,
    x: Tensor,
    lengths: Sequence[int],
    rotary: tuple[Tensor, Tensor],
    decoder: DecoderConfig,
    observe: Observe,
    output: bool = True,
    observe_cache: ObserveCache = unseen_cache,
) -> Tensor:
    """Apply one decoder layer to whole sequences that are concatenated.

    Args:
        weights: the layer's tensors.
        x: [tokens, hidden] float32.
        lengths: tokens of each sequence; they add up to `tokens`.
        rotary: cos and sin, [tokens, head_dim / 2] float32.
        decoder: the decoder's configuration.
        observe: gets the inputs of q_proj (for q, k, v), o_proj, gate_proj (for gate, up) and down_proj.
        output: False skips the last product and returns x, for passes that only observe.
        observe_cache: gets the keys and values of the KV cache.
    """
    dtype = weights["self_attn.q_proj.weight"].dtype
    h = rms_norm(x, weights["input_layernorm.weight"], decoder.rms_norm_eps).to(dtype)
    observe("self_attn.q_proj", h)
    q, k, v = (linear(weights, f"self_attn.{part}_proj", h).reshape(len(h), -1, decoder.head_dim) for part in "qkv")
    if decoder.qk_norm:
        q, k = (
            rms_norm(x, weights[f"self_attn.{part}_norm.weight"], decoder.rms_norm_eps).to(dtype)
            for part, x in (("q", q), ("k", k))
        )
    observe_cache(k, v)
    attended = _causal_attention(_rotate(q, *rotary), _rotate(k, *rotary), v, lengths)
    observe("self_attn.o_proj", attended)
    x = x + linear(weights, "self_attn.o_proj", attended)
    h = rms_norm(x, weights["post_attention_layernorm.weight"], decoder.rms_norm_eps).to(dtype)
    observe("mlp.gate_proj", h)
    h = F.silu(linear(weights, "mlp.gate_proj", h)) * linear(weights, "mlp.up_proj", h)
    observe("mlp.down_proj", h)
    return x + linear(weights, "mlp.down_proj", h) if output else x


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend within each sequence: q [tokens, heads, d], k and v [tokens, kv_heads, d] -> [tokens, heads * d]."""
    groups = q.shape[1] // k.shape[1]
    attended = []
    for part in zip(*(torch.split(tensor, list(lengths)) for tensor in (q, k, v)), strict=True):
        one_q, one_k, one_v = (tensor.transpose(0, 1)[None] for tensor in part)
        one_k, one_v = (tensor.repeat_interleave(groups, dim=1) for tensor in (one_k, one_v))
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True)
        attended.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(attended)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, d] in the rotate-half form: a head's first half pairs with its second half."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
