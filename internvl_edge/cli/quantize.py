"""`internvl-edge quantize CHECKPOINT --scheme w4a16-awq -o DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from ..errors import EdgeError
from ..hub import resolve_checkpoint
from ..recipe import DECODER_SCHEMES, LM_HEADS, Recipe
from .data_options import calibration_options, compute_options, data_options, missing_package
from .output import print_json, size


@click.command("quantize")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--scheme", default=DECODER_SCHEMES[0], show_default=True, help=f"One of {', '.join(DECODER_SCHEMES)}.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs per scale: 32, 64 or 128.")
@click.option("--symmetric", is_flag=True, help="No zero points, as TensorRT needs; otherwise AutoAWQ's format.")
@click.option("--lm-head", type=click.Choice(LM_HEADS), default="fp", show_default=True)
@click.option(
    "--compensate/--no-compensate",
    default=Recipe.error_compensation,
    show_default=True,
    help="Spread rounding errors over later columns (GPTQ), w4a16-awq only.",
)
@click.option("--stats", type=click.Path(path_type=Path), help="What calibrate made, instead of --data.")
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(checkpoint: str, output: Path, stats: Path | None, as_json: bool, **values: Any) -> None:
    """Quantise the decoder of CHECKPOINT into another checkpoint.

    The result loads wherever AutoAWQ or compressed-tensors checkpoints do, and is what export takes. A killed run
    continues when the command is repeated.
    """
    started = time.perf_counter()
    recipe = Recipe(
        decoder=values.pop("scheme"),
        group_size=values.pop("group_size"),
        symmetric=values.pop("symmetric"),
        lm_head=values.pop("lm_head"),
        error_compensation=values.pop("compensate"),
    )
    try:
        from internvl_edge.quantize import quantize_checkpoint
    except ImportError as error:
        raise missing_package(error) from None
    if stats is not None and values["data"] is not None:
        raise EdgeError("--data and --stats cannot be combined; statistics already hold their data")
    options, compute = data_options(values), compute_options(values)
    report = quantize_checkpoint(
        resolve_checkpoint(checkpoint),
        output,
        recipe,
        data=options if recipe.needs_data and stats is None else None,
        stats=stats,
        compute=compute,
        restart=values["restart"],
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    if as_json:
        facts = {
            "checkpoint": str(report.folder),
            "recipe": recipe.to_dict(),
            "bytes": report.bytes,
            "samples": report.samples,
            "tokens": report.tokens,
            "image_tokens": report.image_tokens,
            "broken": list(report.broken),
            "relative_output_errors": report.errors,
            "seconds": round(seconds, 2),
        }
        print_json(facts)
        return
    click.echo(f"{report.folder}: {size(report.bytes)} in {seconds:.1f} s")
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        mean = sum(report.errors.values()) / len(report.errors)
        click.echo(f"relative output error: mean {mean:.3f}, worst {report.errors[worst]:.3f} ({worst})")
    click.echo(f"Next: internvl-edge export {report.folder} -o BUNDLE")
