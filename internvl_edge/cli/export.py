"""`internvl-edge export CHECKPOINT -o DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..errors import EdgeError
from ..hub import resolve_checkpoint
from .output import print_json, size

_TYPES = click.Choice(["float32", "float16", "bfloat16"])


@click.command("export")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--dtype", type=_TYPES, default="float16", show_default=True, help="How weights are stored.")
@click.option(
    "--activations",
    type=_TYPES,
    default="float32",
    show_default=True,
    help="What graphs compute in; CPUs want float32.",
)
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(checkpoint: str, output: Path, dtype: str, activations: str, force: bool, as_json: bool) -> None:
    """Turn CHECKPOINT, a folder or a hub id, into a bundle of ONNX graphs."""
    started = time.perf_counter()
    try:
        from internvl_edge.export import export_bundle
    except ImportError as error:
        raise EdgeError(f"export needs the package {error.name}: pip install 'internvl-edge[export]'") from None
    folder = export_bundle(
        resolve_checkpoint(checkpoint), output, dtype, activations, force=force, progress=sys.stderr.isatty()
    )
    seconds = time.perf_counter() - started
    total = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        print_json({"bundle": str(folder), "bytes": total, "seconds": round(seconds, 2)})
    else:
        click.echo(f"{folder}: {size(total)} in {seconds:.1f} s")
        click.echo(f'Try: internvl-edge run {folder} --image PHOTO.jpg "What is this?"')
