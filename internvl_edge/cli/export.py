"""`internvl-edge export CHECKPOINT -o DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.extras import requires
from internvl_edge.base.units import size
from internvl_edge.bundle.manifest import DECODERS, Manifest
from internvl_edge.bundle.token_table import TYPES
from internvl_edge.checkpoint.hub import resolve_checkpoint

from .output import print_json


@click.command("export")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="How weights are stored.",
)
@click.option(
    "--activations",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="What graphs compute in; CPUs want float32.",
)
@click.option(
    "--dialect",
    "dialects",
    type=click.Choice(list(DECODERS)),
    multiple=True,
    help="Only this decoder (repeatable); quantized weights are stored once for each.  [default: both]",
)
@click.option(
    "--token-table",
    type=click.Choice(TYPES),
    default="float",
    show_default=True,
    help="int8: half its size on disk, one scale per token.",
)
@click.option(
    "--int8-prompts",
    is_flag=True,
    help="Add a graph that computes long prompts in int8: faster on CPUs, 8 more bits for each 4-bit weight.",
)
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: str,
    output: Path,
    dtype: str,
    activations: str,
    dialects: tuple[str, ...],
    token_table: str,
    int8_prompts: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder or a hub id, into a bundle of ONNX graphs."""
    started = time.perf_counter()
    with requires("export", "export"):
        from internvl_edge.export import export_bundle
    folder = export_bundle(
        resolve_checkpoint(checkpoint),
        output,
        dtype,
        activations,
        dialects=dialects or tuple(DECODERS),
        token_table=token_table,
        int8_prompts=int8_prompts,
        force=force,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    total = sum(path.stat().st_size for path in folder.iterdir())
    manifest = Manifest.read(folder)
    quantization, vision = manifest.quantization, manifest.vision_quantization
    if as_json:
        facts = {"bundle": str(folder), "bytes": total, "seconds": round(seconds, 2)}
        facts |= {"quantization": quantization} if quantization else {}
        print_json(facts | ({"vision_quantization": vision} if vision else {}))
    else:
        click.echo(f"{folder}: {size(total)} in {seconds:.1f} s")
        if quantization:
            click.echo(_quantized(quantization))
        if vision:
            floats = f"; floats in {', '.join(vision['floats'])}" if vision["floats"] else ""
            click.echo(f"{vision['method']}: {vision['int8']} linears of the tower in int8{floats}")
        click.echo(f'Try: internvl-edge run {folder} --image PHOTO.jpg "What is this?"')


def _quantized(facts: dict[str, Any]) -> str:
    groups = f"groups of {facts['group_size']}" if facts["group_size"] else "one scale per output"
    text = f"{facts['method']}: int{facts['bits']}, {groups}, {facts['bits_per_weight']:.2f} bits per decoder weight"
    if facts["asymmetric"]:
        error = f"off by {facts['weight_error']:.1e}" if facts["weight_error"] else "unchanged"
        text += f"; zero points for TensorRT as an exact second term, weights {error}"
    return text
