"""Options that say how `quantize` quantizes: a recipe by name or file, and single choices that replace its fields."""

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
    DecoderInt8,
    Recipe,
    VisionInt8,
)

Command = Callable[..., Any]

_OPTIONS = (
    click.option(
        "--recipe", help=f"One of {', '.join(presets())}, or a file; the options below replace single fields of it."
    ),
    click.option(
        "--scheme",
        help=f"One of {', '.join(DECODER_SCHEMES)}.  [default: {DECODER_SCHEMES[0]}; with --vision int8: fp]",
    ),
    click.option("--group-size", type=int, help=f"Inputs per scale: 32, 64 or 128.  [default: {Recipe.group_size}]"),
    click.option(
        "--symmetric/--zero-points",
        default=None,
        help="No zero points, as TensorRT needs, or AutoAWQ's format.  [default: zero points]",
    ),
    click.option("--lm-head", type=click.Choice(LM_HEADS), help=f"[default: {Recipe.lm_head}]"),
    click.option("--kv-cache", type=click.Choice(KV_CACHES), help=f"[default: {Recipe.kv_cache}]"),
    click.option(
        "--compensate/--no-compensate",
        default=None,
        help="Spread rounding errors over later columns (GPTQ), 4 and 8 bits; with data.  [default: compensate]",
    ),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="PATTERN=SCHEME",
        help='An exception: "layers.0.*=w8a16", "*.down_proj=w4a16-awq-g32" (repeatable, the last that matches holds).',
    ),
    click.option(
        "--target-bits",
        type=float,
        help="Choose the precision of each layer: least divergence for so many bits per decoder weight.",
    ),
    click.option(
        "--max-kl",
        type=float,
        help="Choose the precision of each layer: fewest bits for so much predicted divergence (nats); 0: none.  "
        f"[default: none; with w8a8: {DecoderInt8.max_kl}]",
    ),
    click.option("--vision", help=f"int8: weights and inputs of tower and projector.  [default: {Recipe.vision}]"),
    click.option(
        "--calibrator",
        type=click.Choice(CALIBRATORS),
        help="How int8 finds the range of a linear's input; best tries all.  [default: best]",
    ),
    click.option("--smooth/--no-smooth", default=None, help="SmoothQuant, of tower and w8a8.  [default: smooth]"),
    click.option(
        "--vision-cosine",
        type=float,
        help="Layers of the tower keep floats until its embeddings are to come this near; 0 for none.  "
        f"[default: {VisionInt8.cosine}]",
    ),
    click.option(
        "--vision-float", multiple=True, help="A layer of the tower that keeps floats, * and ? allowed (repeatable)."
    ),
)
# Option -> where its value goes in a recipe.
_FIELDS: dict[str, tuple[str, ...]] = {
    "scheme": ("decoder",),
    "group_size": ("group_size",),
    "symmetric": ("symmetric",),
    "lm_head": ("lm_head",),
    "kv_cache": ("kv_cache",),
    "compensate": ("error_compensation",),
    "vision": ("vision",),
    "calibrator": ("vision_int8.calibrator", "decoder_int8.calibrator"),
    "smooth": ("vision_int8.smoothing", "decoder_int8.smoothing"),
    "vision_cosine": ("vision_int8.cosine",),
}


def recipe_options(command: Command) -> Command:
    """Adds --recipe and the options that replace its fields."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe that the options describe; takes them out of `values`.

    Raises:
        EdgeError: from reading or combining them.
    """
    name = values.pop("recipe")
    fields: dict[str, Any] = read_recipe(name) if name else {}
    given: dict[str, Any] = {}
    for option, places in _FIELDS.items():
        if (value := values.pop(option)) is not None:
            for place in places:
                table, _, field = place.rpartition(".")
                (given.setdefault(table, {}) if table else given)[field] = value
    if not name and given.get("vision") == "int8":
        given.setdefault("decoder", "fp")
    if keep := values.pop("vision_float"):
        given.setdefault("vision_int8", {})["keep"] = list(keep)
    for text in values.pop("layers"):
        given = combine(given, {"layers": dict([_exception(text)])})
    limits = {option: value for option in ("target_bits", "max_kl") if (value := values.pop(option)) is not None}
    if limits.get("max_kl") == 0:
        del limits["max_kl"]
        fields = {name: value for name, value in fields.items() if name != "automatic"}
        given.setdefault("decoder_int8", {})["max_kl"] = 0.0
    if limits:  # in place of the recipe's own limit
        among = {"among": fields["automatic"]["among"]} if "among" in fields.get("automatic", {}) else {}
        fields = {**fields, "automatic": {**among, **limits}}
    return make_recipe(combine(fields, given))


def _exception(text: str) -> tuple[str, str]:
    pattern, separator, precision = text.partition("=")
    if not (pattern and separator and precision):
        raise EdgeError(f"--layer {text!r} is not PATTERN=SCHEME; an example: layers.0.*=w8a16")
    return pattern.strip(), precision.strip()
