"""Read `config.json` of either published layout into a `ModelConfig`.

This is the only file that knows how configurations are spelled. No value is taken from class defaults, because the
published files and the class defaults of the original code disagree. A value that this project does not implement is an
error that names the field.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.model.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig

from .json_files import read_json

TEMPLATES = ("internvl2_5",)
NATIVE_TEMPLATE = "internvl_native"
# In transformers, InternVL's projector and tile limits are constants of its classes, not fields of its configuration.
NATIVE_TILES = (1, 12)
NATIVE_QK_NORM_EPS = 1e-6


class Fields:
    """One JSON object with its path for messages: "`llm_config.hidden_size` is missing" instead of a KeyError."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def section(self, name: str) -> Fields:
        """Return a nested object, which must exist."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {self.path}{name} is missing; is this an InternVL 2.5 checkpoint?")
        return Fields(value, f"{self.path}{name}.")

    def number(self, *names: str, default: float | None = None, positive: bool = True) -> Any:
        """Return the first present field as int or float. `names` are spellings of the same field."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), default)
        if value is None:
            raise CheckpointError(f"config.json: {self.path}{names[0]} is missing")
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # the native layout writes [448, 448]
        if isinstance(value, bool) or not isinstance(value, int | float) or (positive and value <= 0):
            raise CheckpointError(f"config.json: {self.path}{names[0]} is {value!r}, expected a positive number")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Return a field that must be true or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {self.path}{name} is {value!r}, expected true or false")
        return value

    def choice(self, name: str, allowed: Iterable[str], default: str | None = None) -> str:
        """Return a field that must be one of the supported values."""
        value = self.values.get(name, default)
        if value not in (options := tuple(allowed)):
            raise CheckpointError(f"config.json: {self.path}{name} is {value!r}, supported: {', '.join(options)}")
        return str(value)


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in a checkpoint folder.

    Raises:
        CheckpointError: no or broken `config.json`, or a field that is missing, contradictory or not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: no config.json in it; give a folder or hub id of InternVL 2.5"
        )
    fields = Fields(read_json(path))
    layout = fields.values.get("model_type")
    if layout == "internvl_chat":
        config = _remote(fields)
    elif layout == "internvl":
        config = _native(fields)
    else:
        raise CheckpointError(
            f"config.json: model_type is {layout!r}, expected internvl_chat or internvl (InternVL 2.5)"
        )
    _check(config)
    return config


def _remote(fields: Fields) -> ModelConfig:
    vision, text = fields.section("vision_config"), fields.section("llm_config")
    image_size = fields.number("force_image_size", default=vision.number("image_size"))
    return ModelConfig(
        layout="remote",
        vision=_vision(
            vision,
            image_size,
            qkv_bias=vision.flag("qkv_bias"),
            qk_normalization=vision.flag("qk_normalization"),
            qk_norm_eps=float(vision.number("layer_norm_eps")),
        ),
        decoder=_decoder(text, tie=False),  # the original forces both tie_word_embeddings to False
        downsample_ratio=fields.number("downsample_ratio"),
        ps_version=fields.choice("ps_version", ("v1", "v2")),
        select_layer=int(fields.number("select_layer", positive=False)),
        template=fields.choice("template", TEMPLATES),
        system_message=fields.values.get("system_message"),
        min_tiles=fields.number("min_dynamic_patch"),
        max_tiles=fields.number("max_dynamic_patch"),
        use_thumbnail=fields.flag("use_thumbnail"),
    )


def _native(fields: Fields) -> ModelConfig:
    vision, text = fields.section("vision_config"), fields.section("text_config")
    fields.choice("projector_hidden_act", ("gelu",), default="gelu")
    fields.choice("vision_feature_select_strategy", ("default",), default="default")
    tie = fields.flag("tie_word_embeddings", text.flag("tie_word_embeddings", default=True))
    return ModelConfig(
        layout="native",
        vision=_vision(
            vision,
            vision.number("image_size"),
            qkv_bias=vision.flag("attention_bias"),
            qk_normalization=vision.flag("use_qk_norm"),
            qk_norm_eps=NATIVE_QK_NORM_EPS,
        ),
        decoder=_decoder(text, tie),
        downsample_ratio=fields.number("downsample_ratio"),
        ps_version="v2",
        select_layer=int(fields.number("vision_feature_layer", positive=False)),
        template=NATIVE_TEMPLATE,
        system_message=None,
        min_tiles=NATIVE_TILES[0],
        max_tiles=NATIVE_TILES[1],
        use_thumbnail=True,
    )


def _vision(
    fields: Fields, image_size: int, qkv_bias: bool, qk_normalization: bool, qk_norm_eps: float
) -> VisionConfig:
    fields.choice("hidden_act", ("gelu",))
    if fields.number("num_channels", default=3) != 3:
        raise CheckpointError(f"config.json: {fields.path}num_channels is {fields.values['num_channels']}, expected 3")
    if "image_size" in fields and fields.number("image_size") != image_size:
        raise CheckpointError(
            f"config.json: force_image_size is {image_size} but {fields.path}image_size is "
            f"{fields.values['image_size']}; position embeddings are not resized, make them equal"
        )
    return VisionConfig(
        hidden_size=fields.number("hidden_size"),
        num_hidden_layers=fields.number("num_hidden_layers"),
        num_attention_heads=fields.number("num_attention_heads"),
        intermediate_size=fields.number("intermediate_size"),
        image_size=image_size,
        patch_size=fields.number("patch_size"),
        norm_type=fields.choice("norm_type", ("layer_norm", "rms_norm")),
        layer_norm_eps=float(fields.number("layer_norm_eps")),
        qkv_bias=qkv_bias,
        qk_normalization=qk_normalization,
        qk_norm_eps=qk_norm_eps,
    )


def _decoder(fields: Fields, tie: bool) -> DecoderConfig:
    architecture = fields.choice("model_type", ("qwen2", "internlm2", "llama"))
    fields.choice("hidden_act", ("silu",))
    if fields.flag("use_sliding_window", default=False):
        raise CheckpointError(f"config.json: {fields.path}use_sliding_window is true, which is not supported")
    heads = fields.number("num_attention_heads")
    # Qwen2 always has biases on q, k, v and never on o. The other models have one flag for all four.
    bias = fields.flag({"internlm2": "bias"}.get(architecture, "attention_bias"), default=False)
    return DecoderConfig(
        architecture=architecture,
        hidden_size=fields.number("hidden_size"),
        num_hidden_layers=fields.number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.number("num_key_value_heads", default=heads),
        head_dim=fields.number("head_dim", default=fields.number("hidden_size") // heads),
        intermediate_size=fields.number("intermediate_size"),
        vocab_size=fields.number("vocab_size"),
        rms_norm_eps=float(fields.number("rms_norm_eps")),
        max_position_embeddings=fields.number("max_position_embeddings"),
        rope=_rope(fields),
        qkv_bias=architecture == "qwen2" or bias,
        output_bias=architecture != "qwen2" and bias,
        tie_word_embeddings=tie,
    )


def _rope(fields: Fields) -> RopeConfig:
    """Read the rotary embedding.

    v4 files have `rope_theta` and `rope_scaling`, v5 files one object `rope_parameters`.
    """
    scaling = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    rope = Fields(scaling, f"{fields.path}{name}.")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise CheckpointError(f"config.json: {rope.path}type is {kind!r}, supported: default, linear, dynamic")
    theta = float(rope.number("rope_theta") if "rope_theta" in rope else fields.number("rope_theta"))
    if kind == "default":
        return RopeConfig(theta)
    return RopeConfig(theta, kind, float(rope.number("factor")))


def _check(config: ModelConfig) -> None:
    """Check for contradictions between fields, before any tensor is read."""
    vision, decoder = config.vision, config.decoder
    if abs(config.shuffle * config.downsample_ratio - 1) > 1e-9:
        raise CheckpointError(f"config.json: downsample_ratio {config.downsample_ratio} is not 1/n for a whole n")
    divisions = (
        ("vision hidden_size", vision.hidden_size, "its num_attention_heads", vision.num_attention_heads),
        ("image_size", vision.image_size, "patch_size", vision.patch_size),
        ("patches per side", vision.grid_size, "1 / downsample_ratio", config.shuffle),
        ("num_attention_heads", decoder.num_attention_heads, "num_key_value_heads", decoder.num_key_value_heads),
        ("head_dim", decoder.head_dim, "2 (rotary halves)", 2),
    )
    for name, value, other, divisor in divisions:
        if value % divisor:
            raise CheckpointError(f"config.json: {name} {value} is not a multiple of {other} {divisor}")
    if not 0 < config.vision_layers_used <= vision.num_hidden_layers:
        raise CheckpointError(
            f"config.json: select_layer {config.select_layer} lies outside the {vision.num_hidden_layers} vision layers"
        )
