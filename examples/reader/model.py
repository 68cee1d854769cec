"""A tiny InternVL 2.5 in plain torch, for training only: InternViT, pixel shuffle v2, mlp1 and a Qwen2 decoder.

Module names are those of the published checkpoints, so `state_dict()` is what goes into `model.safetensors`.
Attention is written out (softmax of QK^T) because that trains faster than the fused kernel on CPUs, and because the
decoder needs an arbitrary mask: several questions about one picture share its prompt prefix (see batches.py).
Knows nothing of tokenizers, tasks or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Observe = Callable[[Tensor], None]


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes. The text widths are multiples of 128 so that every int4 block size divides them."""

    vocab_size: int
    image_size: int = 112
    patch_size: int = 14
    vision_hidden: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    vision_intermediate: int = 768
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = False

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Decoder tokens per tile."""
        return (self.grid // 2) ** 2


class VisionEmbeddings(nn.Module):
    """Patch convolution, class token and learned positions."""

    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, c.vision_hidden) * 0.02)
        self.patch_embedding = nn.Conv2d(3, c.vision_hidden, c.patch_size, c.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, c.grid**2 + 1, c.vision_hidden) * 0.02)
        self.patch, self.grid = c.patch_size, c.grid

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, S, S] -> [tiles, 1 + grid**2, hidden]. The convolution is done as one matrix product."""
        n = pixels.shape[0]
        patches = pixels.view(n, 3, self.grid, self.patch, self.grid, self.patch).permute(0, 2, 4, 1, 3, 5)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(patches.reshape(n, self.grid**2, -1), weight, self.patch_embedding.bias)
        cls = self.class_embedding.to(x.dtype).expand(n, -1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.to(x.dtype)


class VisionAttention(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(c.vision_hidden, 3 * c.vision_hidden)
        self.proj = nn.Linear(c.vision_hidden, c.vision_hidden)
        self.heads, self.head_dim = c.vision_heads, c.vision_hidden // c.vision_heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
        return self.proj((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(n, t, width))


class VisionMLP(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.vision_hidden, c.vision_intermediate)
        self.fc2 = nn.Linear(c.vision_intermediate, c.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.vision_hidden, eps=1e-6)
        self.attn = VisionAttention(c)
        self.norm2 = nn.LayerNorm(c.vision_hidden, eps=1e-6)
        self.mlp = VisionMLP(c)
        self.ls1 = nn.Parameter(torch.ones(c.vision_hidden))
        self.ls2 = nn.Parameter(torch.ones(c.vision_hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.to(x.dtype) * self.attn(self.norm1(x).to(x.dtype))
        return x + self.ls2.to(x.dtype) * self.mlp(self.norm2(x).to(x.dtype))


class VisionEncoder(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = VisionEncoder(c)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixels))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


def rotary_table(c: ReaderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [batch, seq] -> cos and sin, each float32 [batch, 1, seq, head_dim] (rotate-half layout)."""
    frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    angles = positions.double()[..., None] * frequencies.to(positions.device)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, seq, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden_size, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = rotate(self.q_proj(x).view(n, t, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(n, t, self.kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(n, t, self.kv_heads, -1).transpose(1, 2)
        group = self.heads // self.kv_heads
        q = q.reshape(n, self.kv_heads, group * t, self.head_dim) * self.head_dim**-0.5
        scores = (q @ k.transpose(-1, -2)).view(n, self.kv_heads, group, t, t) + bias[:, None, None].to(q.dtype)
        weights = scores.softmax(-1).to(v.dtype).view(n, self.kv_heads, group * t, t)
        out = (weights @ v).view(n, self.heads, t, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(n, t, -1))


class TextMLP(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = TextMLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


def no_observer(hidden: Tensor) -> None:
    """The observer of hidden states that nobody looks at."""


class TextModel(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(TextLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, observe: Observe = no_observer) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin, bias)
            observe(x)
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.model = TextModel(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)


class Reader(nn.Module):
    """The whole model in two halves, `see` and `think`: training puts the image tokens among the others in between."""

    def __init__(self, c: ReaderConfig) -> None:
        super().__init__()
        self.config = c
        self.vision_model = VisionModel(c)
        wide = 4 * c.vision_hidden
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, c.hidden_size), nn.GELU(), nn.Linear(c.hidden_size, c.hidden_size)
        )
        self.language_model = LanguageModel(c)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Truncated normal weights; residual outputs shrunk by depth; token table near the scale of image tokens."""
        for name, p in self.named_parameters():
            if p.dim() >= 2 and "embedding" not in name:
                nn.init.trunc_normal_(p, std=p.flatten(1).shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for layers in (self.vision_model.encoder.layers, self.language_model.model.layers):
            for name, p in layers.named_parameters():
                if name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                    p.data.mul_((2 * len(layers)) ** -0.5)
        nn.init.trunc_normal_(self.vision_model.embeddings.patch_embedding.weight, std=0.02)
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.7)
        nn.init.normal_(self.language_model.lm_head.weight, std=0.02)

    def see(self, pixels: Tensor) -> Tensor:
        """uint8 [tiles, S, S, 3] -> image embeddings [tiles, image_tokens, hidden_size]."""
        x = pixels.permute(0, 3, 1, 2).float().sub(self.mean).div(self.std)
        x = self.vision_model(x)[:, 1:]
        n, half, width = x.shape[0], self.config.grid // 2, x.shape[-1]
        x = x.view(n, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(n, half * half, 4 * width)
        return self.mlp1(x.to(torch.float32))

    def think(self, embeds: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, observe: Observe = no_observer) -> Tensor:
        """Embeddings [batch, seq, hidden] and an additive mask [batch, seq, seq] -> final hidden states.

        `observe` sees the hidden states behind every layer.
        """
        return self.language_model.model(embeds, cos, sin, bias, observe)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(math.prod(p.shape) for p in model.parameters())
