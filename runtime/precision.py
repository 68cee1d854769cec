"""The precision of what a user has or wants: a bundle's, a quantised checkpoint's, a recipe's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from internvl_edge.bundle import Manifest
from internvl_edge.config import ModelConfig
from internvl_edge.errors import EdgeError
from internvl_edge.kv_cache import KV_CACHE_SCALES
from internvl_edge.linear import W8A8, Scheme
from internvl_edge.quantization import read_quantization
from internvl_edge.recipe import Recipe

from .footprint import INT8, Precision

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def bundle_precision(manifest: Manifest) -> Precision:
    """How a bundle stores its weights."""
    stored = Precision(dtype_bytes=_BYTES[manifest.dtype], vector_bytes=_BYTES[manifest.activations])
    if manifest.kv_cache == "int8":
        stored = replace(stored, cache_bytes=1)
    if manifest.token_table == "int8":
        stored = replace(stored, table="int8")
    if tower := manifest.vision_quantization:
        stored = replace(stored, vision=W8A8, floats=tuple(tower["floats"]))
    quantization = manifest.quantization
    if quantization is None:
        return stored
    zeros = not quantization["symmetric"] and quantization["asymmetric"] != "requantise"
    body = Scheme(quantization["bits"], quantization["group_size"], not zeros)
    head = {"int4": body, "int8": INT8}.get(str(quantization["lm_head"])[:4])
    return replace(stored, body=body, head=head)


def recipe_precision(recipe: Recipe) -> Precision:
    """What a recipe will make of a model.

    Raises:
        EdgeError: its layers get precisions of their own, which only the quantised checkpoint can tell.
    """
    if recipe.layers or recipe.automatic:
        raise EdgeError("this recipe decides layer by layer; quantise with it, then plan what comes out")
    return Precision(
        body=recipe.base.scheme,
        head=recipe.head.scheme,
        vision=W8A8 if recipe.vision == "int8" else None,
        cache_bytes=1 if recipe.kv_cache == "int8" else 2,
    )


def checkpoint_precision(folder: Path, config: ModelConfig) -> Precision | None:
    """How a quantised checkpoint's decoder is packed; None for float weights, which any recipe can be made from."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = read_quantization(written, config.vision)
    if quantization is None:
        return None
    fewest_first = sorted(quantization.schemes, key=lambda scheme: scheme.bits)
    head = fewest_first[-1] if len(fewest_first) > 1 else None
    return Precision(body=fewest_first[0], head=head, cache_bytes=1 if (folder / KV_CACHE_SCALES).is_file() else 2)
