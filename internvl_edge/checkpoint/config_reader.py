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
from internvl_edge.base.text import shown
from internvl_edge.model.config import PIXEL_MEAN, PIXEL_STD, DecoderConfig, ModelConfig, RopeConfig, VisionConfig
from internvl_edge.model.limits import LARGEST, require_possible
from internvl_edge.model.preprocess import MAX_TILES

from .json_files import read_json
from .lora import refuse_adapter_files
from .training import missing_model_advice

TEMPLATES = ("internvl2_5", "Hermes-2", "internlm2-chat")
NATIVE_TEMPLATE = "internvl_native"
_TEXT_MODELS = ("qwen2", "qwen3", "internlm2", "llama")
# Text models of published InternVL checkpoints that are not supported, and what they are.
_REFUSED_TEXT_MODELS = {
    "qwen3_moe": "a mixture of experts (InternVL3.5-30B-A3B and 241B-A28B)",
    "gpt_oss": "GPT-OSS, a mixture of experts (InternVL3.5-GPT-OSS-20B-A4B)",
    "phi3": "Phi-3 (InternVL2-4B)",
    "internlm3": "InternLM3",
}
_ROPE_KINDS = ("default", "linear", "dynamic")
# What the checkpoints with a router and a second projector (InternVL3.5-Flash) have at the top level.
_FLASH = ("flash_mode", "is_flash_model", "flash_relative_threshold", "flash_absolute_threshold")
# What transformers' image processor does where its file does not say; the projector is a constant of its classes.
NATIVE_TILES = (1, 12)
NATIVE_QK_NORM_EPS = 1e-6
# Settings of transformers' image processor that make other pixels than the tiles here; 3 is Pillow's BICUBIC.
_PIXELS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
}


class Fields:
    """One JSON object with its path for messages: "`llm_config.hidden_size` is missing" instead of a KeyError."""

    def __init__(self, values: dict[str, Any], path: str = "", file: str = "config.json") -> None:
        self.values = values
        self.path = path
        self.file = file

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def section(self, name: str) -> Fields:
        """Return a nested object, which must exist."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.file}: {self.path}{name} is missing; is this an InternVL checkpoint?")
        return Fields(value, f"{self.path}{name}.", self.file)

    def optional_section(self, name: str) -> Fields:
        """A nested object; empty where the field is absent or null."""
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self.refusal(name, value, "an object")
        return Fields(value or {}, f"{self.path}{name}.", self.file)

    def count(self, *names: str, default: int | None = None, largest: int | None = None) -> int:
        """The first present field as a whole number from 1 on; `names` are spellings of the same thing.

        256.0 is 256. The bound is that of the name in `limits.LARGEST`, or `largest`.
        """
        name, value = self._first(names, default)
        largest = largest or LARGEST[names[0]]
        whole = _whole(value)
        if whole is None or not 1 <= whole <= largest:
            raise self.refusal(name, value, f"a whole number from 1 to {largest}")
        return whole

    def side(self, *names: str, default: int | None = None) -> int:
        """As `count`; the native layout writes both sides of a square, [448, 448]."""
        name, value = self._first(names, default)
        square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return Fields({name: value[0] if square else value}, self.path, self.file).count(
            name, largest=LARGEST.get(name, LARGEST["image_size"])
        )

    def index(self, name: str) -> int:
        """A field that must be a whole number of any sign, such as that of a layer."""
        _, value = self._first((name,), None)
        if (whole := _whole(value)) is None:
            raise self.refusal(name, value, "a whole number")
        return whole

    def real(self, *names: str, default: float | None = None) -> float:
        """The first present field as a finite, positive number."""
        name, value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A field that must be true or false; null stands for one that is absent."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """A text; None where the field is absent or null."""
        value = self.values.get(name)
        if not isinstance(value, str | None):
            raise self.refusal(name, value, "a text")
        return value

    def choice(self, name: str, allowed: Iterable[str], default: str | None = None) -> str:
        """Return a field that must be one of the supported values."""
        value = self.values.get(name, default)
        options = tuple(allowed)
        if not isinstance(value, str) or value not in options:
            raise CheckpointError(f"{self.file}: {self.path}{name} is {shown(value)}, supported: {', '.join(options)}")
        return value

    def _first(self, names: Iterable[str], default: Any) -> tuple[str, Any]:
        """The first spelling that is there, and its value."""
        names = tuple(names)
        name = next((name for name in names if name in self), names[0])
        value = self.values[name] if name in self else default
        if value is None:
            raise CheckpointError(f"{self.file}: {self.path}{names[0]} is missing")
        return name, value

    def refusal(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error for a field of the wrong kind."""
        return CheckpointError(f"{self.file}: {self.path}{name} is {shown(value)}, expected {expected}")


def _whole(value: Any) -> int | None:
    """A whole number that may be written as a float; None for everything else, true and false included."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in a checkpoint folder.

    Raises:
        CheckpointError: no or broken `config.json`, or a field that is missing, contradictory or not supported.
    """
    refuse_adapter_files(folder)
    path = folder / "config.json"
    if not path.is_file():
        advice = missing_model_advice(folder) or "give a folder or hub id of InternVL"
        raise CheckpointError(f"{folder} is not a checkpoint: no config.json in it; {advice}")
    fields = Fields(read_json(path))
    layout = fields.values.get("model_type")
    _refuse_flash(fields)
    if layout == "internvl_chat":
        config = _remote(fields)
    elif layout == "internvl":
        config = _native(fields, folder)
    else:
        raise CheckpointError(
            f"config.json: model_type is {shown(layout)}, expected internvl_chat or internvl (InternVL)"
        )
    try:
        require_possible(config)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None
    return config


def may_tie(layout: str, architecture: str) -> bool:
    """Whether `config.json` decides if the head is the token table; elsewhere it never is.

    The code of remote checkpoints up to InternVL3 forces `tie_word_embeddings` to False. That of InternVL3.5, the only
    one with Qwen3, takes it from `llm_config`.
    """
    return layout == "native" or architecture == "qwen3"


def _refuse_flash(fields: Fields) -> None:
    """Refuse checkpoints that choose by an image's content how many tokens its tiles have."""
    for name in ("model_type", *_FLASH):
        value = fields.values.get(name)
        if (name != "model_type" and value not in (None, False)) or str(value).startswith("internvl_flash"):
            raise CheckpointError(
                f"config.json: {name} is {shown(value)}: this is an InternVL3.5-Flash checkpoint, whose router is not "
                "supported; give the checkpoint of the same size without Flash"
            )


def _remote(fields: Fields) -> ModelConfig:
    vision, text = fields.section("vision_config"), fields.section("llm_config")
    image_size = fields.side("force_image_size") if "force_image_size" in fields else vision.side("image_size")
    if fields.flag("pad2square", default=False):
        raise CheckpointError(
            "config.json: pad2square is true, which is not supported: images are cut into tiles, not padded to squares"
        )
    # Without dynamic sizes an image is one tile: there is nothing that a thumbnail would add.
    dynamic = fields.flag("dynamic_image_size")
    least, most = _tile_limits(fields, "min_dynamic_patch", "max_dynamic_patch")
    thumbnail = fields.flag("use_thumbnail")
    return ModelConfig(
        layout="remote",
        vision=_vision(
            vision,
            image_size,
            qkv_bias=vision.flag("qkv_bias"),
            qk_normalization=vision.flag("qk_normalization"),
            qk_norm_eps=vision.real("layer_norm_eps"),
        ),
        decoder=_decoder(text, "remote", text.flag("tie_word_embeddings", default=False)),
        downsample_ratio=fields.real("downsample_ratio"),
        ps_version=fields.choice("ps_version", ("v1", "v2")),
        select_layer=fields.index("select_layer"),
        template=fields.choice("template", TEMPLATES),
        system_message=fields.text("system_message"),
        min_tiles=least if dynamic else 1,
        max_tiles=most if dynamic else 1,
        use_thumbnail=thumbnail and dynamic,
    )


def _native(fields: Fields, folder: Path) -> ModelConfig:
    vision, text = fields.section("vision_config"), fields.section("text_config")
    fields.choice("projector_hidden_act", ("gelu",), default="gelu")
    fields.choice("vision_feature_select_strategy", ("default",), default="default")
    tie = fields.flag("tie_word_embeddings", text.flag("tie_word_embeddings", default=True))
    least, most = _native_tiles(folder, vision.side("image_size"))
    return ModelConfig(
        layout="native",
        vision=_vision(
            vision,
            vision.side("image_size"),
            qkv_bias=vision.flag("attention_bias"),
            qk_normalization=vision.flag("use_qk_norm"),
            qk_norm_eps=NATIVE_QK_NORM_EPS,
        ),
        decoder=_decoder(text, "native", tie),
        downsample_ratio=fields.real("downsample_ratio"),
        ps_version="v2",
        select_layer=fields.index("vision_feature_layer"),
        template=NATIVE_TEMPLATE,
        system_message=None,
        min_tiles=least,
        max_tiles=most,
        use_thumbnail=True,
    )


def _tile_limits(fields: Fields, least: str, most: str, default: tuple[int | None, int | None] = (None, None)) -> Any:
    """The least and the most tiles of an image."""
    limits = (
        fields.count(least, default=default[0], largest=MAX_TILES),
        fields.count(most, default=default[1], largest=MAX_TILES),
    )
    if limits[0] > limits[1]:
        raise CheckpointError(
            f"{fields.file}: {fields.path}{least} is {limits[0]}, more than {most}, which is {limits[1]}"
        )
    return limits


def _native_tiles(folder: Path, image_size: int) -> tuple[int, int]:
    """The tile limits of the native layout's image processor, whose other settings must be those of the tiles here.

    transformers takes the object `image_processor` of `processor_config.json`, where version 5 writes it, otherwise
    `preprocessor_config.json`. `crop_to_patches` has no effect: `InternVLProcessor` always passes True over the file's
    value, which in published checkpoints is false.
    """
    settings = _image_processor(folder)
    limits: tuple[int, int] = _tile_limits(settings, "min_patches", "max_patches", NATIVE_TILES)
    settings.flag("crop_to_patches", default=False)
    for name, expected in _PIXELS.items():
        value = settings.values.get(name)
        if value is not None and not _close(value, expected):
            raise settings.refusal(name, value, f"{expected}, which is what {NATIVE_TEMPLATE} tiles are made with")
    size = settings.values.get("size")
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        sides = Fields(size, f"{settings.path}size.", settings.file)
        if (sides.side("height"), sides.side("width")) != (image_size, image_size):
            raise settings.refusal("size", size, f"that of config.json's vision_config.image_size, {image_size}")
    return limits


def _image_processor(folder: Path) -> Fields:
    newer, older = "processor_config.json", "preprocessor_config.json"
    processor = Fields(read_json(folder / newer, default={}), "", newer)
    if "image_processor" in processor:
        return processor.section("image_processor")
    if not (folder / older).exists():
        return processor
    return Fields(read_json(folder / older), "", older)


def _close(value: Any, expected: Any) -> bool:
    """Whether a setting is the expected one, numbers up to the rounding of their text."""
    if isinstance(expected, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(expected)
            and all(_close(each, other) for each, other in zip(value, expected, strict=True))
        )
    if isinstance(expected, bool) or isinstance(value, bool) or not isinstance(value, int | float):
        return bool(value is expected)
    return abs(value - float(expected)) <= 1e-6


def _vision(
    fields: Fields, image_size: int, qkv_bias: bool, qk_normalization: bool, qk_norm_eps: float
) -> VisionConfig:
    fields.choice("hidden_act", ("gelu",))
    if fields.flag("use_moe", default=False):
        raise fields.refusal("use_moe", True, "false: a mixture of experts is not supported")
    if fields.count("num_channels", default=3, largest=3) != 3:
        raise CheckpointError(f"config.json: {fields.path}num_channels is {fields.values['num_channels']}, expected 3")
    if "image_size" in fields and fields.side("image_size") != image_size:
        raise CheckpointError(
            f"config.json: force_image_size is {image_size} but {fields.path}image_size is "
            f"{fields.side('image_size')}; position embeddings are not resized, make them equal"
        )
    return VisionConfig(
        hidden_size=fields.count("hidden_size"),
        num_hidden_layers=fields.count("num_hidden_layers"),
        num_attention_heads=fields.count("num_attention_heads"),
        intermediate_size=fields.count("intermediate_size"),
        image_size=image_size,
        patch_size=fields.side("patch_size"),
        norm_type=fields.choice("norm_type", ("layer_norm", "rms_norm")),
        layer_norm_eps=fields.real("layer_norm_eps"),
        qkv_bias=qkv_bias,
        qk_normalization=qk_normalization,
        qk_norm_eps=qk_norm_eps,
    )


def _decoder(fields: Fields, layout: str, tie: bool) -> DecoderConfig:
    architecture = _text_model(fields)
    fields.choice("hidden_act", ("silu",))
    if fields.flag("use_sliding_window", default=False):
        raise CheckpointError(f"config.json: {fields.path}use_sliding_window is true, which is not supported")
    _refuse_other_layers(fields)
    heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    # transformers takes 128 where a Qwen3 file does not say it, and the quotient elsewhere: no value is guessed.
    quotient = None if architecture == "qwen3" else hidden_size // heads
    if quotient is not None and "head_dim" not in fields and hidden_size % heads:
        raise CheckpointError(
            f"config.json: {fields.path}hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    # Qwen2 always has biases on q, k, v and never on o; the others say it in one flag for all four.
    bias = fields.flag({"internlm2": "bias"}.get(architecture, "attention_bias"), default=False)
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_hidden_layers=fields.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.count("num_key_value_heads", default=heads),
        head_dim=fields.count("head_dim", default=quotient),
        intermediate_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        rms_norm_eps=fields.real("rms_norm_eps"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        rope=_rope(fields),
        qkv_bias=architecture == "qwen2" or bias,
        output_bias=architecture != "qwen2" and bias,
        tie_word_embeddings=tie and may_tie(layout, architecture),
        qk_norm=architecture == "qwen3",
    )


def _text_model(fields: Fields) -> str:
    kind = fields.values.get("model_type")
    if isinstance(kind, str) and kind in _REFUSED_TEXT_MODELS:
        raise CheckpointError(
            f"config.json: {fields.path}model_type is {kind}: {_REFUSED_TEXT_MODELS[kind]} is not supported; "
            f"supported: {', '.join(_TEXT_MODELS)}"
        )
    return fields.choice("model_type", _TEXT_MODELS)


def _refuse_other_layers(fields: Fields) -> None:
    """Refuse settings that change which tokens a layer sees, or which weights a token meets."""
    if (experts := fields.values.get("moe_config")) is not None:
        raise fields.refusal("moe_config", experts, "null: a mixture of experts is not supported")
    kinds = fields.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise fields.refusal("layer_types", kinds, "full_attention everywhere")


def _rope(fields: Fields) -> RopeConfig:
    """v4 files write `rope_theta` and `rope_scaling`, v5 files one object `rope_parameters`."""
    rope = fields.optional_section("rope_parameters" if "rope_parameters" in fields else "rope_scaling")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        advice = "; without it the model has the context that it was trained with" if kind == "yarn" else ""
        raise CheckpointError(
            f"config.json: {rope.path}type is {shown(kind)}, which is not supported{advice}; supported: "
            f"{', '.join(_ROPE_KINDS)}"
        )
    for each in (rope, fields):
        if each.real("partial_rotary_factor", default=1.0) != 1:
            raise each.refusal("partial_rotary_factor", each.values["partial_rotary_factor"], "1")
    theta = (rope if "rope_theta" in rope else fields).real("rope_theta")
    if kind == "default":
        return RopeConfig(theta)
    return RopeConfig(theta, kind, rope.real("factor"))
