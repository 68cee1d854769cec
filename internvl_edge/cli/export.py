"""`internvl-edge export CHECKPOINT -o DIR`: convert a checkpoint to a bundle."""

from __future__ import annotations

import time
from pathlib import Path

import click

from internvl_edge.base.extras import require_extras, requires
from internvl_edge.base.units import size
from internvl_edge.bundle.manifest import DecoderQuantization, Manifest
from internvl_edge.bundle.names import DECODERS
from internvl_edge.bundle.token_table import TYPES
from internvl_edge.checkpoint.hub import resolve_checkpoint
from internvl_edge.model.linear import count_schemes

from .checkpoint_options import revision_option
from .output import hint, print_json, quiet_option, shown_progress, tower_text


@click.command("export")
@click.argument("checkpoint", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder to make.")
@revision_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="Type that float weights are stored in.",
)
@click.option(
    "--activations",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type that the graphs compute in. CPUs need float32 to be fast.",
)
@click.option(
    "--dialect",
    "dialects",
    type=click.Choice(list(DECODERS)),
    multiple=True,
    help="Decoder graph to write (repeatable). Each one stores its own copy of quantized weights.  [default: both]",
)
@click.option(
    "--token-table",
    type=click.Choice(TYPES),
    default="auto",
    show_default=True,
    help="Type of the token table. float is --dtype; int8 takes half the space of float16, with one scale per token; "
    "auto is int8 where the layers of the decoder are quantized.",
)
@click.option(
    "--int8-prompts",
    is_flag=True,
    help="Add a graph that computes long prompts in int8. It is faster on CPUs and stores 8 more bits for each 4-bit "
    "weight.",
)
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
def command(
    checkpoint: str,
    output: Path,
    revision: str | None,
    dtype: str,
    activations: str,
    dialects: tuple[str, ...],
    token_table: str,
    int8_prompts: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert CHECKPOINT, a folder or a hub id, to a bundle.

    A bundle is one folder with ONNX graphs, weights, tokenizer and a manifest. CHECKPOINT may be quantized.
    """
    started = time.perf_counter()
    require_extras("export", "export")
    with requires("export", "export"):
        from internvl_edge.export import export_bundle
    source = resolve_checkpoint(checkpoint, revision)
    with shown_progress(quiet) as progress:
        folder = export_bundle(
            source,
            output,
            dtype,
            activations,
            dialects=dialects or tuple(DECODERS),
            token_table=token_table,
            int8_prompts=int8_prompts,
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    total = sum(path.stat().st_size for path in folder.iterdir())
    manifest = Manifest.read(folder)
    if as_json:
        facts = {"bundle": str(folder), "bytes": total, "seconds": round(seconds, 2)}
        if manifest.linears:
            facts |= {"linears": manifest.linears, "quantization": manifest.quantization}
        print_json(facts)
        return
    click.echo(f"{folder}: {size(total)} in {seconds:.1f} s")
    if manifest.linears:
        click.echo(f"quantized: {count_schemes(manifest.linears.values())}")
    if manifest.schemes("vision."):
        click.echo(tower_text(manifest))
    if manifest.quantization:
        click.echo(_decoder(manifest.quantization))
    if not quiet:
        hint("run", folder, "--image", "PHOTO.jpg", "What is this?", after="Try")


def _decoder(quantization: DecoderQuantization) -> str:
    error = quantization.weight_error
    lost = f"RMS weight error {error:.1e} in the standard dialect" if error else "weights equal to the checkpoint's"
    return f"decoder: {quantization.bits_per_weight:.2f} bits per weight, {lost}"
