"""The configuration of one InternVL model: frozen numbers that all other parts read.

This module does not know files. `config_reader` builds these objects from a checkpoint's `config.json`, and `bundle`
stores them in a manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

# The default of torch.nn.LayerNorm, which the original `mlp1` uses. The towers' eps is in their configuration.
PROJECTOR_NORM_EPS = 1e-5
# ImageNet statistics of the original transform, in units of pixel / 255.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionConfig:
    """An InternViT tower. `norm_type` is "layer_norm" (with bias) or "rms_norm" (without)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_type: str
    layer_norm_eps: float
    qkv_bias: bool
    qk_normalization: bool
    qk_norm_eps: float

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """The number of patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `scaling` is "none", "linear" or "dynamic" (NTK) with its `factor`."""

    theta: float
    scaling: str = "none"
    factor: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen2, Qwen3, InternLM2 or Llama-style text model. `architecture` is used only to look up names in tables.

    `qk_norm` is an RMSNorm over each head of queries and keys before their rotation, with `rms_norm_eps`. `head_dim`
    times the number of heads may differ from `hidden_size`.
    """

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    tie_word_embeddings: bool
    qk_norm: bool = False

    @property
    def num_query_groups(self) -> int:
        """The number of query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: vision tower, pixel shuffle and projector, decoder, and the prompt template's name.

    `layout` is "remote" (the published `internvl_chat` files) or "native" (transformers' own `internvl`).
    `select_layer` counts as in the original: -1 is the output of the last block.
    """

    layout: str
    vision: VisionConfig
    decoder: DecoderConfig
    downsample_ratio: float
    ps_version: str
    select_layer: int
    template: str
    system_message: str | None
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool

    @property
    def shuffle(self) -> int:
        """The number of patches that the pixel shuffle merges along each side."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """The number of image tokens for one tile."""
        return (self.vision.grid_size // self.shuffle) ** 2

    @property
    def vision_layers_used(self) -> int:
        """The number of blocks that run: all for `select_layer` -1, fewer when an earlier hidden state is selected."""
        layers = self.vision.num_hidden_layers
        return layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer

    @property
    def projector_input_size(self) -> int:
        """The number of channels of one token after the pixel shuffle."""
        return self.vision.hidden_size * self.shuffle**2
