"""Find the storage of a model's parts: in a bundle, in a quantized checkpoint, or as a recipe will make them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.json_files import read_json
from internvl_edge.checkpoint.kv_scales import KV_CACHE_SCALES
from internvl_edge.checkpoint.quantization import read_quantization
from internvl_edge.model.components import DTYPE_BYTES
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.recipe.recipe import Recipe

from .footprint import Storage, is_int8_weight_only


def bundle_storage(manifest: Manifest, dialect: str = "standard") -> Storage:
    """Return how a bundle stores its weights for one of its decoder graphs.

    Where a part has several schemes, its most frequent scheme counts for all its linears that are not floats.
    """
    tower = _most(manifest.schemes("vision.").values()) or _most(manifest.schemes("projector.").values())
    return Storage(
        dtype_bytes=DTYPE_BYTES[manifest.dtype],
        vector_bytes=DTYPE_BYTES[manifest.activations],
        body=_most(manifest.schemes("decoder.layers.").values()),
        head=manifest.linears.get("decoder.lm_head"),
        vision=tower,
        cache_bytes=1 if manifest.kv_cache == "int8" else 2,
        floats=tuple(manifest.floats("vision.", "projector.")) if tower else (),
        table="int8" if manifest.token_table == "int8" else "float",
        dialect=dialect,
        some_int8=any(map(is_int8_weight_only, manifest.schemes("decoder.layers.").values())),
    )


def recipe_storage(recipe: Recipe) -> Storage:
    """Return the storage that a recipe will give to a model.

    Raises:
        EdgeError: the recipe chooses the precision layer by layer, so that only the quantized checkpoint has it.
    """
    if recipe.layers or recipe.automatic:
        raise EdgeError("this recipe decides layer by layer; quantize with it, then plan what comes out")
    return Storage(
        body=recipe.base.scheme,
        head=recipe.head.scheme,
        vision=W8A8 if recipe.vision == "int8" else None,
        cache_bytes=1 if recipe.kv_cache == "int8" else 2,
    )


def checkpoint_storage(folder: Path, config: ModelConfig) -> Storage | None:
    """Return the storage of a quantized checkpoint from its config.json, or None for float weights.

    Where a part has several schemes, its most frequent scheme counts for all its linears that are not floats.
    """
    quantization = read_quantization(read_json(folder / "config.json"), config.vision)
    if quantization is None:
        return None
    found = {linear: quantization.named_scheme(_names(config, linear)) for linear in layouts.linear_names(config)}
    return Storage(
        body=_most(scheme for linear, scheme in found.items() if linear.startswith("decoder.layers.")),
        head=found["decoder.lm_head"],
        vision=_most(scheme for linear, scheme in found.items() if not linear.startswith("decoder.")),
        cache_bytes=1 if (folder / KV_CACHE_SCALES).is_file() else 2,
        floats=tuple(linear for linear, scheme in found.items() if scheme is None),
        some_int8=any(is_int8_weight_only(found[linear]) for linear in found if linear.startswith("decoder.layers.")),
    )


def _names(config: ModelConfig, linear: str) -> list[str]:
    """Return the names that a configuration may use for a linear: stored names with and without prefixes, its class.

    Only linears of the decoder's layers get the class "Linear". In published checkpoints, heads and towers are floats
    unless the configuration names them, and the `ignore` list that should say so is often missing.
    """
    stored = layouts.tensor_source(config, f"{linear}.weight").names
    written = [
        prefix + name.removeprefix(table)
        for name in stored
        for prefix, table in layouts.NATIVE_PREFIXES
        if config.layout == "native" and name.startswith(table)
    ]
    alone = [name.removeprefix("language_model.") for name in stored]  # as in the text model's section
    names = [name.removesuffix(".weight") for name in (*stored, *written, *alone)]
    return [*names, "Linear"] if linear.startswith("decoder.layers.") else names


def _most(schemes: Iterable[Scheme | None]) -> Scheme | None:
    counted = Counter(scheme for scheme in schemes if scheme is not None)
    return counted.most_common(1)[0][0] if counted else None
