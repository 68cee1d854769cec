"""The precision of what a user has or wants: a bundle's, a quantized checkpoint's, a recipe's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.kv_scales import KV_CACHE_SCALES
from internvl_edge.checkpoint.quantization import read_quantization
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.recipe.recipe import Recipe

from .footprint import INT8, Precision

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def bundle_precision(manifest: Manifest, dialect: str = "standard") -> Precision:
    """How a bundle stores its weights for one of its decoder graphs."""
    stored = Precision(BYTES[manifest.dtype], BYTES[manifest.activations], dialect=dialect)
    if manifest.kv_cache == "int8":
        stored = replace(stored, cache_bytes=1)
    if manifest.token_table == "int8":
        stored = replace(stored, table="int8")
    if tower := manifest.vision_quantization:
        stored = replace(stored, vision=W8A8, floats=tuple(tower["floats"]))
    quantization = manifest.quantization
    if quantization is None:
        return stored
    # Older bundles may have their weights rounded again without zero points: "requantize", once spelled with an s.
    requantized = str(quantization["asymmetric"]).startswith("requanti") and dialect == "standard"
    most = Scheme(quantization["bits"], quantization["group_size"], quantization["symmetric"] or requantized)
    head = {"int4": most, "int8": INT8}.get(str(quantization["lm_head"])[:4])
    layers = Counter(quantization["linears"])
    if head:
        layers.subtract([quantization["lm_head"]])
    scheme, count = layers.most_common(1)[0]
    body = W8A8 if scheme == str(W8A8) else most
    return replace(stored, body=body if count else None, head=head)


def recipe_precision(recipe: Recipe) -> Precision:
    """What a recipe will make of a model.

    Raises:
        EdgeError: its layers get precisions of their own, which only the quantized checkpoint can tell.
    """
    if recipe.layers or recipe.automatic:
        raise EdgeError("this recipe decides layer by layer; quantize with it, then plan what comes out")
    return Precision(
        body=recipe.base.scheme,
        head=recipe.head.scheme,
        vision=W8A8 if recipe.vision == "int8" else None,
        cache_bytes=1 if recipe.kv_cache == "int8" else 2,
    )


def checkpoint_precision(folder: Path, config: ModelConfig) -> Precision | None:
    """What config.json says of a quantized checkpoint; None for float weights, which any recipe can be made from.

    Where a part has several schemes, most of its linears' stands for all that are not floats.
    """
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = read_quantization(written, config.vision)
    if quantization is None:
        return None
    found = {linear: quantization.named_scheme(_names(config, linear)) for linear in _linears(config)}
    return Precision(
        body=_most(scheme for linear, scheme in found.items() if linear.startswith("decoder.layers.")),
        head=found["decoder.lm_head"],
        vision=_most(scheme for linear, scheme in found.items() if not linear.startswith("decoder.")),
        cache_bytes=1 if (folder / KV_CACHE_SCALES).is_file() else 2,
        floats=tuple(linear for linear, scheme in found.items() if scheme is None),
    )


def _linears(config: ModelConfig) -> list[str]:
    parts = ("decoder.layers.", "decoder.lm_head.", "vision.layers.", "projector.")
    shapes = layouts.tensor_shapes(config)
    return [name.removesuffix(".weight") for name in shapes if name.startswith(parts) and len(shapes[name]) == 2]


def _names(config: ModelConfig, linear: str) -> list[str]:
    """What configurations may call a linear: stored names with all prefixes and without, then its class.

    Only the decoder's layers have one: heads and towers of published checkpoints are floats unless they are named, and
    their `ignore`, which should say so, is often missing.
    """
    stored = layouts.tensor_source(config, f"{linear}.weight").names
    written = [
        prefix + name.removeprefix(table)
        for name in stored
        for prefix, table in layouts.NATIVE_PREFIXES
        if config.layout == "native" and name.startswith(table)
    ]
    alone = [name.removeprefix("language_model.") for name in stored]  # in the text model's own section
    names = [name.removesuffix(".weight") for name in (*stored, *written, *alone)]
    return [*names, "Linear"] if linear.startswith("decoder.layers.") else names


def _most(schemes: Iterable[Scheme | None]) -> Scheme | None:
    counted = Counter(scheme for scheme in schemes if scheme is not None)
    return counted.most_common(1)[0][0] if counted else None
