"""`internvl-edge inspect PATH`: show the configuration and size of a checkpoint or a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from internvl_edge.base.errors import EngineError
from internvl_edge.base.hub import hub_source
from internvl_edge.base.units import size
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.hub import bundle_description, resolve_bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.quality import figure_rows
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.checkpoint.hub import resolve_checkpoint
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import read_record
from internvl_edge.model.components import weights_text
from internvl_edge.model.description import describe, family
from internvl_edge.model.linear import Scheme, count_schemes
from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, engine_folders, graph_inputs

from .checkpoint_options import revision_option
from .output import Row, print_json, print_table, tower_text

_TOWER = ("vision.", "projector.")


@click.command("inspect")
@click.argument("path", type=click.Path())
@revision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: str, revision: str | None, as_json: bool) -> None:
    """Show what PATH is: a checkpoint or a bundle, a folder or a hub id. Everything in it is checked."""
    if bundle_description(path, revision):
        opened = Bundle.open(resolve_bundle(path, revision))
        values, rows = _bundle_values(opened), _bundle_rows(opened)
        config, cache = opened.manifest.model, opened.manifest.kv_cache or opened.manifest.activations
    else:
        checkpoint = Checkpoint(resolve_checkpoint(path, revision))
        values, rows = _checkpoint_values(checkpoint), _checkpoint_rows(checkpoint)
        config, cache = checkpoint.config, "int8" if checkpoint.kv_scales else "float32"
    if as_json:
        print_json({**values, "family": family(config), "kv_cache_dtype": cache, "config": asdict(config)})
    else:
        print_table([*rows, *describe(config, cache)])


def _checkpoint_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect what `--json` prints of a checkpoint: numbers, with their unit in the name, and plain names."""
    quantization = checkpoint.quantization
    return {
        "kind": "checkpoint",
        "layout": checkpoint.config.layout,
        "hub": _hub(checkpoint),
        "parameters": checkpoint.parameters,
        "bytes": sum(path.stat().st_size for path in checkpoint.folder.iterdir() if path.is_file()),
        "tensors": checkpoint.stored_dtypes(),
        "components": checkpoint.components(),
        "quantization_method": quantization.method if quantization else None,
        "quantized_linears": _counted(checkpoint.schemes.values()),
    }


def _checkpoint_rows(checkpoint: Checkpoint) -> list[Row]:
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in checkpoint.stored_dtypes().items())
    rows: list[Row] = [
        ("kind", "checkpoint"),
        ("layout", checkpoint.config.layout),
        ("parameters", _parameters(checkpoint.parameters)),
        ("tensors", dtypes),
    ]
    if checkpoint.quantization:
        rows.append(("quantized", f"{checkpoint.quantization.method}: {count_schemes(checkpoint.schemes.values())}"))
    if hub := _hub(checkpoint):
        rows.append(("hub", hub))
    return rows


def _hub(checkpoint: Checkpoint) -> str | None:
    """Return the hub id and commit that a checkpoint, or the one that it was quantized from, was downloaded from."""
    record = read_record(checkpoint.folder)
    source = hub_source(checkpoint.folder) or (record.hub if record else None)
    return str(source) if source else None


def _bundle_values(opened: Bundle) -> dict[str, Any]:
    """Collect what `--json` prints of a bundle: numbers, with their unit in the name, and plain names."""
    manifest, quality = opened.manifest, quality_of(opened.manifest)
    tower = {**manifest.schemes("vision."), **manifest.schemes("projector.")}
    return {
        "kind": "bundle",
        "source": manifest.source,
        "hub": str(manifest.hub) if manifest.hub else None,
        "producer": manifest.producer,
        "parameters": sum(part.parameters for part in manifest.components) or None,
        "bytes": _bytes(manifest),
        "weights_dtype": manifest.dtype,
        "activations_dtype": manifest.activations,
        "components": manifest.components,
        "quantized_linears": _counted(manifest.linears.values()),
        "int8_tower": {"int8_linears": len(tower), "float_linears": manifest.floats(*_TOWER)} if tower else None,
        "engines": _engines(opened),
        "quality": {
            "state": quality.state,
            "figures": quality.figures,
            "measured": quality.measured,
            "gate": quality.gate,
            "accepted": quality.accepted or None,
        },
    }


def _bundle_rows(opened: Bundle) -> list[Row]:
    manifest = opened.manifest
    parameters = sum(part.parameters for part in manifest.components)
    rows: list[Row] = [
        ("kind", "bundle"),
        ("made from", manifest.source),
        *([("hub", str(manifest.hub))] if manifest.hub else []),
        ("made by", manifest.producer),
        ("parameters", _parameters(parameters) if parameters else "unknown"),
        ("weights", manifest.dtype),
        ("computes in", manifest.activations),
        ("size", f"{size(_bytes(manifest))}, all files"),
    ]
    if manifest.components:
        rows.append(("weights alone", weights_text(manifest.components)))
    if manifest.linears:
        rows.append(("quantized", count_schemes(manifest.linears.values())))
    if manifest.schemes("vision."):
        rows.append(("int8 tower", tower_text(manifest)))
    for engine in _engines(opened):
        rows.append((f"engine {engine['name']}", _engine_text(engine)))
    return rows + _quality_rows(manifest)


def _quality_rows(manifest: Manifest) -> list[Row]:
    quality = quality_of(manifest)
    rows: list[Row] = []
    if quality.figures:
        rows.append(("quality", ", ".join(f"{metric} {value}" for metric, value in figure_rows(quality.figures))))
        rows.append(("measured", "; ".join(f"{kind}: {how}" for kind, how in quality.measured.items())))
    if quality.gate or manifest.is_quantized:
        conditions = "; ".join(map(str, quality.failed or quality.gate))
        rows.append(("gate", f"{quality.state}: {conditions}" if conditions else quality.state))
    if quality.accepted:
        rows.append(("accepted", quality.accepted))
    return rows


def _engines(opened: Bundle) -> list[dict[str, Any]]:
    """List the TensorRT engines of a bundle: for which device, in which types, and whether they are of its files."""
    found: list[dict[str, Any]] = []
    for folder in engine_folders(opened):
        try:
            record = EngineRecord.read(folder)
        except EngineError as error:
            found.append({"name": folder.name, "state": "unreadable", "problem": str(error)})
            continue
        found.append(
            {
                "name": folder.name,
                "state": "fresh" if record.inputs == graph_inputs(opened) else "stale",
                "compute_capabilities": [capability / 10 for capability in record.compute_capabilities],
                "flavour": record.flavour,
                "version": record.version,
                "dtype": record.options.dtype,
                "context_tokens": record.options.capacity,
                "rows": record.options.rows,
                "bytes": sum(entry["bytes"] for entry in record.files.values()),
            }
        )
    return found


def _engine_text(engine: dict[str, Any]) -> str:
    if engine["state"] == "unreadable":
        return f"unreadable: {engine['problem']}"
    capabilities = ", ".join(f"{capability:.1f}" for capability in engine["compute_capabilities"])
    state = "" if engine["state"] == "fresh" else "; stale: built from other files, build it again"
    rows = f" in {engine['rows']} rows" if engine["rows"] > 1 else ""
    return (
        f"{engine['flavour']} {engine['version']} for compute capability {capabilities}, {engine['dtype']}, context "
        f"{engine['context_tokens']}{rows}, {size(engine['bytes'])}{state}"
    )


def _counted(schemes: Iterable[Scheme]) -> dict[str, int]:
    return {str(scheme): count for scheme, count in Counter(schemes).most_common()}


def _bytes(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files.values())


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e8 else f"{count / 1e6:.3g} million"
