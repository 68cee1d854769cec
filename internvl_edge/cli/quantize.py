"""`internvl-edge quantize CHECKPOINT -o DIR`: convert a checkpoint to a quantized checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras, requires
from internvl_edge.base.units import rounded, size
from internvl_edge.checkpoint.hub import resolve_checkpoint

from .checkpoint_options import revision_option
from .data_options import (
    GivenPath,
    calibration_options,
    compute_options,
    data_options,
    typed_samples,
    wait_politely,
)
from .output import (
    hint,
    print_json,
    quiet_option,
    say_missing_page,
    say_written,
    shown_progress,
    stoppable,
    typed_command,
)
from .recipe_options import recipe_of, recipe_options

if TYPE_CHECKING:
    from internvl_edge.checkpoint.record import QuantizationRecord
    from internvl_edge.publishing.programs import Program
    from internvl_edge.quantize import QuantizationReport, VisionReport
    from internvl_edge.quantize.learned import Learned


@click.command("quantize")
@click.argument("checkpoint", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to make.")
@revision_option
@recipe_options
@click.option(
    "--calibration",
    type=GivenPath(),
    help="Calibration folder that calibrate made, in place of --data. Any recipe can use it.",
)
@calibration_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
@stoppable("repeat the command to continue")
def command(checkpoint: str, output: Path, calibration: Path | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Quantize the decoder of CHECKPOINT (a folder or a hub id), its vision tower or both, into another checkpoint.

    The result is in the format of AutoAWQ or compressed-tensors, and export accepts it. To resume a stopped run, repeat
    the command.
    """
    started = time.perf_counter()
    recipe = recipe_of(values)
    wait_politely()
    draws = calibration is None and values["data"] is None and (recipe.needs_data or recipe.vision == "int8")
    require_extras("quantize", "quantize", *(("synthetic",) if draws else ()))
    with shown_progress(quiet) as progress, progress.waiting("loading torch"), requires("quantize", "quantize"):
        from internvl_edge.evaluation.report import checkpoint_report, write_report
        from internvl_edge.quantize import quantize_checkpoint
    if calibration is not None and (given := typed_samples()):
        raise EdgeError(f"{given} and --calibration cannot be combined; a calibration folder already holds its data")
    if (calibration or values["data"]) and not (recipe.needs_data or recipe.vision == "int8"):
        raise EdgeError("nothing in this recipe looks at data, it only rounds; leave out --data and --calibration")
    options, compute = data_options(values), compute_options(values)
    source = resolve_checkpoint(checkpoint, values["revision"])
    say_missing_page(quiet)
    with shown_progress(quiet) as progress:
        report = quantize_checkpoint(
            source,
            output,
            recipe,
            data=options if calibration is None else None,
            calibration=calibration,
            compute=compute,
            restart=values["restart"],
            force=values["force"],
            progress=progress,
        )
    seconds = time.perf_counter() - started
    record = report.record
    with stoppable(f"{report.folder} is complete, only its report is not"):
        say_written(write_report(checkpoint_report(report.folder, record, typed_command()), report.folder))
    if as_json:
        facts = {
            "checkpoint": str(report.folder),
            "recipe": recipe,
            "bytes": report.bytes,
            "samples": record.samples,
            "tokens": record.tokens,
            "image_tokens": record.image_tokens,
            "broken": record.broken,
            "bits_per_weight": record.bits_per_weight,
            "predicted_kl": record.predicted_kl,
            "linears": record.linears,
            "relative_output_errors": report.errors,
            "vision": report.vision,
            "learned": report.learned,
            "programs": _programs(report),
            "seconds": round(seconds, 2),
        }
        print_json(facts)
        return
    skipped = f", {len(record.broken)} broken items skipped" if record.broken else ""
    click.echo(f"{report.folder}: {size(report.bytes)} in {seconds:.1f} s{skipped}")
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        mean = sum(report.errors.values()) / len(report.errors)
        click.echo(f"relative output error: mean {mean:.3f}, worst {report.errors[worst]:.3f} ({worst})")
    if record.predicted_kl is not None:
        click.echo(_precisions(record))
    if report.learned:
        click.echo(_learning(report.learned))
    if report.vision:
        click.echo(_tower(report.vision))
    if not quiet:
        for program in _programs(report):
            click.echo(_loads(program))
        hint("export", report.folder, "-o", "BUNDLE")


def _programs(report: QuantizationReport) -> tuple[Program, ...]:
    from internvl_edge.checkpoint.config_reader import read_config
    from internvl_edge.publishing.programs import programs

    schemes = {linear.name: linear.scheme for linear in report.record.linears}
    return programs(schemes, read_config(report.folder).layout, str(report.folder))


def _loads(program: Program) -> str:
    if program.obstacles:
        return f"{program.name} does not load it: {'; '.join(program.obstacles)}"
    limits = [] if program.tried else ["not tried"]
    limits += [f"not on a CPU: {program.only_gpu}"] if program.only_gpu else []
    said = f" ({'; '.join(limits)})" if limits else ""
    return f"{program.name} loads it{said}: {program.command}"


def _precisions(record: QuantizationRecord) -> str:
    layers = [linear for linear in record.linears if linear.name.startswith("decoder.layers.")]
    counts = Counter(linear.stored for linear in layers)
    said = ", ".join(f"{count} {scheme}" for scheme, count in counts.most_common())
    return (
        f"decoder: {record.bits_per_weight:.2f} bits per weight, predicted KL divergence "
        f"{rounded(record.predicted_kl or 0)} nats; linears: {said}"
    )


def _learning(learned: Learned) -> str:
    return (
        f"learned rounding: the squared error of a layer's output went from {learned.before:.2e} to "
        f"{learned.after:.2e} of the output's square (calibration tokens, mean of the layers); {learned.changed:.1%} "
        f"of the integers changed; it took {learned.seconds:.1f} s"
    )


def _tower(vision: VisionReport) -> str:
    lines = [
        f"int8 vision tower: cosine between its image embeddings and those of the float tower: mean "
        f"{vision.cosine:.5f}, lowest of {vision.tiles} tiles {vision.lowest_cosine:.5f}; "
        f"{len(vision.layers) - len(vision.floats)} of {len(vision.layers)} linears are int8"
    ]
    return "\n".join(lines + [f"  {name} stays in float: {vision.layers[name]['reason']}" for name in vision.floats])
