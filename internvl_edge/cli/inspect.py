"""`internvl-edge inspect PATH`: show the configuration and size of a checkpoint or a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.extras import requires
from internvl_edge.base.units import size
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest, is_bundle
from internvl_edge.bundle.quality import figure_rows
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.checkpoint.hub import resolve_checkpoint
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.description import describe
from internvl_edge.model.linear import count_schemes
from internvl_edge.runtime.engines.tensorrt.record import describe_engines

from .output import print_json, print_table


@click.command("inspect")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: str, as_json: bool) -> None:
    """Show what PATH is: a checkpoint folder, a hub id or a bundle. Everything in it is checked."""
    if is_bundle(Path(path)):
        facts, config, cache = _bundle_facts(Path(path))
    else:
        facts, config, cache = _checkpoint_facts(resolve_checkpoint(path))
    if as_json:
        print_json({**facts, "config": asdict(config)})
    else:
        print_table([*facts.items(), *describe(config, cache)])


def _bundle_facts(folder: Path) -> tuple[dict[str, Any], ModelConfig, str]:
    """Return the facts to print, the model's configuration, and the type of its KV cache."""
    opened = Bundle.open(folder)
    manifest = opened.manifest
    total = sum(entry.bytes for entry in manifest.files.values())
    facts = {
        "kind": "bundle",
        "made from": manifest.source,
        "made by": manifest.producer,
        "weights": manifest.dtype,
        "computes in": manifest.activations,
        "size": size(total),
    }
    if manifest.linears:
        facts["quantized"] = count_schemes(manifest.linears.values())
    if engines := describe_engines(opened):
        facts["engines"] = "; ".join(engines)
    return facts | _quality(manifest), manifest.model, manifest.kv_cache or manifest.activations


def _quality(manifest: Manifest) -> dict[str, Any]:
    quality, facts = quality_of(manifest), {}
    if quality.figures:
        facts["quality"] = ", ".join(f"{metric} {value}" for metric, value in figure_rows(quality.figures))
        facts["measured"] = "; ".join(f"{kind}: {how}" for kind, how in quality.measured.items())
    if quality.gate or manifest.is_quantized:
        conditions = "; ".join(map(str, quality.failed or quality.gate))
        facts["gate"] = f"{quality.state}: {conditions}" if conditions else quality.state
    if quality.accepted:
        facts["accepted"] = quality.accepted
    return facts


def _checkpoint_facts(folder: Path) -> tuple[dict[str, Any], ModelConfig, str]:
    with requires("export", "reading a checkpoint"):
        from internvl_edge.checkpoint.reader import Checkpoint
    checkpoint = Checkpoint(folder)
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in checkpoint.stored_dtypes().items())
    facts = {
        "kind": "checkpoint",
        "layout": checkpoint.config.layout,
        "parameters": f"{checkpoint.parameters / 1e9:.3f} billion",
        "tensors": dtypes,
    }
    if checkpoint.quantization:
        facts["quantized"] = f"{checkpoint.quantization.method}: {count_schemes(checkpoint.schemes.values())}"
    return facts, checkpoint.config, "int8" if checkpoint.kv_scales else "float32"
