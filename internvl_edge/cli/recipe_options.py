"""Options of `quantize` that make the recipe: a preset or a file, and options that replace single fields of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.recipe.files import combine, make_recipe, presets, read_recipe
from internvl_edge.recipe.recipe import (
    CALIBRATORS,
    DECODER_SCHEMES,
    KV_CACHES,
    LM_HEADS,
    ROUNDINGS,
    DecoderInt8,
    Recipe,
    VisionInt8,
)

from . import completion

Command = Callable[..., Any]

_OPTIONS = (
    click.option(
        "--recipe",
        shell_complete=completion.recipes,
        help=f"Recipe: a preset ({', '.join(presets())}) or a TOML file. The options below replace single fields "
        "of it.",
    ),
    click.option(
        "--scheme",
        shell_complete=completion.of(DECODER_SCHEMES),
        help=f"Scheme of the decoder's linears: {', '.join(DECODER_SCHEMES)}.  [default: {DECODER_SCHEMES[0]}; with "
        "--vision int8: fp]",
    ),
    click.option(
        "--group-size",
        shell_complete=completion.of(["32", "64", "128"]),
        type=int,
        help=f"Group size of 4-bit weights, in inputs per scale: 32, 64 or 128.  [default: {Recipe.group_size}]",
    ),
    click.option(
        "--symmetric/--zero-points",
        default=None,
        help="--symmetric stores 4-bit weights without zero points, as TensorRT needs; --zero-points stores them as "
        "AutoAWQ does.  [default: zero points]",
    ),
    click.option(
        "--negative-scales/--positive-scales",
        default=None,
        help="Whether scales of symmetric 4-bit weights may be negative, which rounds less. TensorRT takes positive "
        "ones alone.  [default: positive]",
    ),
    click.option(
        "--lm-head",
        type=click.Choice(LM_HEADS),
        help="Type of lm_head: fp keeps it, int8 has one scale per output, int4 is as the decoder's 4-bit weights.  "
        f"[default: {Recipe.lm_head}]",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(KV_CACHES),
        help=f"Type of the KV cache of exported bundles.  [default: {Recipe.kv_cache}]",
    ),
    click.option(
        "--compensate/--no-compensate",
        default=None,
        help="Error compensation (GPTQ) of w4a16-awq and w8a16: spread the rounding error of each column over the "
        "columns not yet rounded. It needs calibration data.  [default: compensate]",
    ),
    click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        help="How 4-bit weights become integers: computed, or learned, which brings each layer nearer to the float "
        "model and takes longer.  [default: computed]",
    ),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="PATTERN=SCHEME",
        help='Scheme of the linears that match a pattern: "layers.0.*=w8a16", "*.down_proj=w4a16-awq-g32" (repeatable; '
        "the last match applies).",
    ),
    click.option(
        "--target-bits",
        type=float,
        help="Choose the precision of each decoder linear so that the predicted divergence is lowest at this average "
        "number of bits per weight, scales and zero points included.",
    ),
    click.option(
        "--max-kl",
        type=float,
        help="Choose the precision of each decoder linear with the fewest bits that keep the predicted KL divergence "
        "(mean, in nats) at or below this value; 0 sets no limit.  "
        f"[default: none; with w8a8: {DecoderInt8.max_kl}]",
    ),
    click.option(
        "--vision",
        shell_complete=completion.of(["fp", "int8"]),
        help=f"Scheme of the vision tower and projector: fp, or int8 weights and inputs.  [default: {Recipe.vision}]",
    ),
    click.option(
        "--calibrator",
        type=click.Choice(CALIBRATORS),
        help="Method that finds the int8 range of the inputs of a linear; best tries all.  [default: best]",
    ),
    click.option(
        "--smooth/--no-smooth",
        default=None,
        help="Whether SmoothQuant is applied to the int8 vision tower and to w8a8.  [default: smooth]",
    ),
    click.option(
        "--vision-cosine",
        type=float,
        help="Keep vision layers in float, the most harmful first, until the predicted cosine between int8 and float "
        "image embeddings reaches this value; 0 keeps none and measures nothing, which is faster.  "
        f"[default: {VisionInt8.cosine}]",
    ),
    click.option(
        "--vision-float",
        multiple=True,
        help="Pattern (* and ?) of vision or projector linears that stay in float (repeatable).",
    ),
)
# Option -> the fields of a recipe that receive its value.
_FIELDS: dict[str, tuple[str, ...]] = {
    "scheme": ("decoder",),
    "group_size": ("group_size",),
    "symmetric": ("symmetric",),
    "negative_scales": ("negative_scales",),
    "lm_head": ("lm_head",),
    "kv_cache": ("kv_cache",),
    "compensate": ("error_compensation",),
    "rounding": ("rounding",),
    "vision": ("vision",),
    "calibrator": ("vision_int8.calibrator", "decoder_int8.calibrator"),
    "smooth": ("vision_int8.smoothing", "decoder_int8.smoothing"),
    "vision_cosine": ("vision_int8.cosine",),
}
# What options are for; the forms that only turn something off are for everything.
_FOUR_BITS, _COMPENSATED = "4-bit weights", "weights of w4a16-awq or w8a16"
_INT8_INPUTS, _INT8_TOWER = "int8 inputs (w8a8, or an int8 vision tower)", "an int8 vision tower"
_ONLY_FOR = {
    ("group_size", None): ("--group-size", _FOUR_BITS),
    ("symmetric", True): ("--symmetric", _FOUR_BITS),
    ("symmetric", False): ("--zero-points", _FOUR_BITS),
    ("negative_scales", True): ("--negative-scales", _FOUR_BITS),
    ("compensate", True): ("--compensate", _COMPENSATED),
    ("calibrator", None): ("--calibrator", _INT8_INPUTS),
    ("smooth", True): ("--smooth", _INT8_INPUTS),
    ("vision_cosine", None): ("--vision-cosine", _INT8_TOWER),
    ("vision_float", None): ("--vision-float", _INT8_TOWER),
}


def recipe_options(command: Command) -> Command:
    """Add --recipe, and the options that replace its fields, to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_of(values: dict[str, Any]) -> Recipe:
    """Return the recipe that the options describe. This removes these options from `values`.

    Raises:
        EdgeError: the recipe cannot be read, or the options do not fit together.
    """
    name = values.pop("recipe")
    typed = {option: values[option] for option, _ in _ONLY_FOR if values[option] not in (None, ())}
    fields: dict[str, Any] = {} if name is None else read_recipe(name)
    given = _given(values)
    if name is None and given.get("vision") == "int8":
        given.setdefault("decoder", "fp")
    if given.get("symmetric") is False:
        given.setdefault("negative_scales", False)
    if keep := values.pop("vision_float"):
        given.setdefault("vision_int8", {})["keep"] = list(keep)
    for text in values.pop("layers"):
        given = combine(given, {"layers": dict([_exception(text)])})
    limits = {option: value for option in ("target_bits", "max_kl") if (value := values.pop(option)) is not None}
    if limits.get("max_kl") == 0:
        del limits["max_kl"]
        fields = {name: value for name, value in fields.items() if name != "automatic"}
        given.setdefault("decoder_int8", {})["max_kl"] = 0.0
    if limits:  # these replace the recipe's own limit
        among = {"among": fields["automatic"]["among"]} if "among" in fields.get("automatic", {}) else {}
        fields = {**fields, "automatic": {**among, **limits}}
    recipe = make_recipe(combine(fields, given))
    _require_effect(typed, recipe)
    return recipe


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe that options with one value each set, and remove these from `values`."""
    given: dict[str, Any] = {}
    for option, places in _FIELDS.items():
        if (value := values.pop(option)) is not None:
            for place in places:
                table, _, field = place.rpartition(".")
                (given.setdefault(table, {}) if table else given)[field] = value
    return given


def _require_effect(typed: dict[str, Any], recipe: Recipe) -> None:
    """Raise EdgeError for an option that says something of what the recipe does not have."""
    methods = [precision.method for precision in (recipe.head, *recipe.possible)]
    tower = recipe.vision == "int8"
    present = {
        _FOUR_BITS: any(method.groups for method in methods),
        _COMPENSATED: any(method.compensates for method in methods),
        _INT8_INPUTS: tower or any(method.rounds_inputs for method in methods),
        _INT8_TOWER: tower,
    }
    for (option, value), (name, what) in _ONLY_FOR.items():
        if option in typed and value in (None, typed[option]) and not present[what]:
            raise EdgeError(f"{name} is for {what}, which this recipe does not have; change --scheme or --vision too")


def _exception(text: str) -> tuple[str, str]:
    pattern, separator, precision = text.partition("=")
    if not (pattern and separator and precision):
        raise EdgeError(f"--layer {text!r} is not PATTERN=SCHEME; an example: layers.0.*=w8a16")
    return pattern.strip(), precision.strip()
