"""`internvl-edge calibrate CHECKPOINT -o DIR`: write a calibration folder for `quantize --calibration`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.extras import require_extras, requires
from internvl_edge.checkpoint.hub import resolve_checkpoint

from .checkpoint_options import revision_option
from .data_options import calibration_options, compute_options, data_options, wait_politely
from .output import hint, print_json, quiet_option, shown_progress, stoppable


@click.command("calibrate")
@click.argument("checkpoint", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Calibration folder to make.")
@revision_option
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
@stoppable("repeat the command to continue")
def command(checkpoint: str, output: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Run calibration samples through CHECKPOINT, a folder or a hub id, and write a calibration folder.

    The folder holds the tokens and tiles of all samples, and the embeddings that the decoder receives. Any number of
    quantize commands, of any recipe, can use it with --calibration. To resume a stopped run, repeat the command.
    """
    started = time.perf_counter()
    wait_politely()
    require_extras("calibrate", "quantize", *(() if values["data"] else ("synthetic",)))
    with shown_progress(quiet) as progress, progress.waiting("loading torch"), requires("quantize", "calibrate"):
        from internvl_edge.calibration import calibrate
    options, compute = data_options(values), compute_options(values)
    source = resolve_checkpoint(checkpoint, values["revision"])
    with shown_progress(quiet) as progress:
        made = calibrate(
            source,
            output,
            options,
            compute,
            restart=values["restart"],
            force=values["force"],
            progress=progress,
        )
    facts = {
        "calibration": str(made.folder),
        "samples": len(made.names),
        "tokens": made.total,
        "image_tokens": int(made.is_image.sum()),
        "broken": made.broken,
        "computed_in": str(compute),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print_json(facts)
        return
    skipped = f", {len(made.broken)} broken items skipped" if made.broken else ""
    click.echo(
        f"{made.folder}: {facts['samples']} samples, {facts['tokens']} tokens ({facts['image_tokens']} of images) "
        f"in {facts['seconds']:.1f} s{skipped}"
    )
    if not quiet:
        version = ("--revision", values["revision"]) if values["revision"] else ()
        hint("quantize", checkpoint, *version, "--calibration", made.folder, "-o", "OUT")
