"""`internvl-edge quantize CHECKPOINT --scheme w4a16-awq -o DIR`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EdgeError
from ..hub import resolve_checkpoint
from ..recipe import CALIBRATORS, DECODER_SCHEMES, LM_HEADS, Recipe, VisionInt8
from .data_options import calibration_options, compute_options, data_options, missing_package, wait_politely
from .output import print_json, size

if TYPE_CHECKING:
    from internvl_edge.quantize import VisionReport


@click.command("quantize")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--scheme",
    help=f"One of {', '.join(DECODER_SCHEMES)}.  [default: {DECODER_SCHEMES[0]}; with --vision int8: fp]",
)
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs per scale: 32, 64 or 128.")
@click.option("--symmetric", is_flag=True, help="No zero points, as TensorRT needs; otherwise AutoAWQ's format.")
@click.option("--lm-head", type=click.Choice(LM_HEADS), default="fp", show_default=True)
@click.option(
    "--compensate/--no-compensate",
    default=Recipe.error_compensation,
    show_default=True,
    help="Spread rounding errors over later columns (GPTQ), w4a16-awq only.",
)
@click.option("--vision", default="fp", show_default=True, help="int8: weights and inputs of tower and projector.")
@click.option(
    "--calibrator",
    type=click.Choice(CALIBRATORS),
    default=VisionInt8.calibrator,
    show_default=True,
    help="How --vision int8 finds the range of a linear's input; best tries all.",
)
@click.option("--smooth/--no-smooth", default=VisionInt8.smoothing, show_default=True, help="SmoothQuant in the tower.")
@click.option(
    "--vision-cosine",
    type=float,
    default=VisionInt8.cosine,
    show_default=True,
    help="Layers of the tower keep floats until its embeddings are to come this near; 0 for none.",
)
@click.option(
    "--vision-float", multiple=True, help="A layer of the tower that keeps floats, * and ? allowed (repeatable)."
)
@click.option("--stats", type=click.Path(path_type=Path), help="What calibrate made, instead of --data.")
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(checkpoint: str, output: Path, stats: Path | None, as_json: bool, **values: Any) -> None:
    """Quantise the decoder of CHECKPOINT, its vision tower or both into another checkpoint.

    The result loads wherever AutoAWQ or compressed-tensors checkpoints do, and is what export takes. A killed run
    continues when the command is repeated.
    """
    started = time.perf_counter()
    vision = values.pop("vision")
    recipe = Recipe(
        decoder=values.pop("scheme") or (DECODER_SCHEMES[0] if vision == "fp" else "fp"),
        group_size=values.pop("group_size"),
        symmetric=values.pop("symmetric"),
        lm_head=values.pop("lm_head"),
        error_compensation=values.pop("compensate"),
        vision=vision,
        vision_int8=VisionInt8(
            calibrator=values.pop("calibrator"),
            smoothing=values.pop("smooth"),
            cosine=values.pop("vision_cosine"),
            keep=values.pop("vision_float"),
        ),
    )
    wait_politely()
    try:
        from internvl_edge.quantize import quantize_checkpoint
    except ImportError as error:
        raise missing_package(error) from None
    if stats is not None and values["data"] is not None:
        raise EdgeError("--data and --stats cannot be combined; statistics already hold their data")
    options, compute = data_options(values), compute_options(values)
    needs_data = recipe.needs_data or recipe.vision == "int8"
    report = quantize_checkpoint(
        resolve_checkpoint(checkpoint),
        output,
        recipe,
        data=options if needs_data and stats is None else None,
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
            "vision": asdict(report.vision) if report.vision else None,
            "seconds": round(seconds, 2),
        }
        print_json(facts)
        return
    click.echo(f"{report.folder}: {size(report.bytes)} in {seconds:.1f} s")
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        mean = sum(report.errors.values()) / len(report.errors)
        click.echo(f"relative output error: mean {mean:.3f}, worst {report.errors[worst]:.3f} ({worst})")
    if report.vision:
        click.echo(_tower(report.vision))
    click.echo(f"Next: internvl-edge export {report.folder} -o BUNDLE")


def _tower(vision: VisionReport) -> str:
    lines = [
        f"int8 vision: cosine of the image embeddings to the float tower's {vision.cosine:.5f}, worst of "
        f"{vision.tiles} tiles {vision.lowest_cosine:.5f}; {len(vision.layers) - len(vision.floats)} of "
        f"{len(vision.layers)} linears are int8"
    ]
    return "\n".join(lines + [f"  {name} keeps floats: {vision.layers[name]['reason']}" for name in vision.floats])
