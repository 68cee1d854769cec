"""What a configuration can be at all: checked where one is read, before anything is built from its numbers.

The bounds are far above every published model. They keep a few bytes of a file from asking for hours or gigabytes.
"""

from __future__ import annotations

import math
from dataclasses import fields

from .config import ModelConfig
from .preprocess import MAX_TILES

# Field of a configuration -> its largest value; the smallest is 1.
LARGEST = {
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 24,
    "image_size": 4096,
    "patch_size": 1024,
    "min_tiles": MAX_TILES,
    "max_tiles": MAX_TILES,
}
# The most patches that the pixel shuffle merges along a side.
_LARGEST_SHUFFLE = 64
# Eps of norms, base and factor of rotary angles: between these, float32 holds them and what is computed from them.
SMALLEST_EPS, LARGEST_EPS = 1e-30, 1.0
SMALLEST_THETA, LARGEST_THETA = 1.0, 1e15
SMALLEST_FACTOR, LARGEST_FACTOR = 1.0, 1e6


def require_possible(config: ModelConfig) -> None:
    """Refuse numbers out of bounds and contradictions between fields.

    Raises:
        ValueError: the field and its value are named.
    """
    for part in (config, config.vision, config.decoder):
        for field in fields(part):
            if field.name in LARGEST:
                value = getattr(part, field.name)
                _require(field.name, value, 1 <= value <= LARGEST[field.name], f"from 1 to {LARGEST[field.name]}")
    vision, decoder, rope = config.vision, config.decoder, config.decoder.rope
    for name, eps in (
        ("layer_norm_eps", vision.layer_norm_eps),
        ("qk_norm_eps", vision.qk_norm_eps),
        ("rms_norm_eps", decoder.rms_norm_eps),
    ):
        _require(name, eps, SMALLEST_EPS <= eps <= LARGEST_EPS, f"from {SMALLEST_EPS:g} to {LARGEST_EPS:g}")
    _require("rope_theta", rope.theta, SMALLEST_THETA < rope.theta <= LARGEST_THETA, f"from 1 to {LARGEST_THETA:g}")
    _require("factor", rope.factor, SMALLEST_FACTOR <= rope.factor <= LARGEST_FACTOR, f"from 1 to {LARGEST_FACTOR:g}")
    _check_tiles(config)
    _check_divisions(config)
    if rope.scaling == "dynamic" and decoder.head_dim < 4:
        raise ValueError(f"head_dim {decoder.head_dim} is too small for dynamic rotary scaling")
    if abs(config.select_layer) > LARGEST["num_hidden_layers"] or not (
        0 < config.vision_layers_used <= vision.num_hidden_layers
    ):
        raise ValueError(
            f"select_layer {config.select_layer} lies outside the {vision.num_hidden_layers} vision layers"
        )


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {expected}")


def _check_tiles(config: ModelConfig) -> None:
    if config.min_tiles > config.max_tiles:
        raise ValueError(f"the least number of tiles is {config.min_tiles}, but the most {config.max_tiles}")


def _check_divisions(config: ModelConfig) -> None:
    vision, decoder, ratio = config.vision, config.decoder, config.downsample_ratio
    possible = math.isfinite(ratio) and 1 / _LARGEST_SHUFFLE <= ratio <= 1
    if not possible or abs(config.shuffle * ratio - 1) > 1e-9:
        raise ValueError(f"downsample_ratio {ratio:g} is not 1/n for a whole n up to {_LARGEST_SHUFFLE}")
    divisions = (
        ("vision hidden_size", vision.hidden_size, "its num_attention_heads", vision.num_attention_heads),
        ("image_size", vision.image_size, "patch_size", vision.patch_size),
        ("patches per side", vision.grid_size, "1 / downsample_ratio", config.shuffle),
        ("num_attention_heads", decoder.num_attention_heads, "num_key_value_heads", decoder.num_key_value_heads),
        ("head_dim", decoder.head_dim, "2 (rotary halves)", 2),
    )
    for name, value, other, divisor in divisions:
        if value % divisor:
            raise ValueError(f"{name} {value} is not a multiple of {other} {divisor}")
