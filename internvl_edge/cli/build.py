"""`internvl-edge build BUNDLE --device NAME`: build TensorRT engines into the bundle's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from internvl_edge.base.units import size
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.hub import resolve_bundle
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.programs import MOST_ROWS
from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, engine_folder

from . import completion
from .checkpoint_options import revision_option
from .output import print_json, quiet_option, shown_progress


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--device",
    "name",
    default="rtx",
    show_default=True,
    shell_complete=completion.targets,
    help="Device to build engines for: a name from `internvl-edge devices`, or rtx, which builds one file for RTX "
    "cards.",
)
@revision_option
@click.option("--devices", "table", type=click.Path(path_type=Path), help="A TOML file with more devices.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Type that the engines compute in.  [default: bfloat16 where the device supports it]",
)
@click.option(
    "--context",
    "capacity",
    type=click.IntRange(min=2),
    help="Capacity of the KV cache: maximum number of tokens of prompt and answer together.  [default: 4096]",
)
@click.option(
    "--chunk", type=click.IntRange(min=1), help="Maximum number of prompt tokens per prefill step.  [default: 512]"
)
@click.option(
    "--tiles", type=click.IntRange(min=1), help="Maximum number of tiles that are encoded together.  [default: 4]"
)
@click.option(
    "--profiles",
    type=click.IntRange(1, 3),
    help="Programs of the decoder, each with its own optimization profile: 1 for prompts and single tokens together; "
    "2 for each of them, which holds 16-bit weights twice; 3 with one more for single tokens after long prompts.  "
    "[default: the most that the memory holds]",
)
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    help="Answers that are decoded together, each with a KV cache of its own. A step always computes all of them.  "
    "[default: 1]",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Compare the engines with ONNX Runtime on the CPU, where this machine has the GPU that they are for. Wrong "
    "engines are not kept.",
)
@click.option("--force", is_flag=True, help="Build again even if nothing changed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
def command(
    bundle: Path,
    name: str,
    revision: str | None,
    table: Path | None,
    dtype: str | None,
    check: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **sizes: int | None,
) -> None:
    """Build TensorRT engines from BUNDLE (a folder or a hub id) for a device, into BUNDLE/engines/DEVICE.

    Engines for RTX cards can be built on a machine without a GPU. Engines for a Jetson must be built on that device.
    """
    target = Devices(table).target(name)
    from internvl_edge.compiler.bundle_engines import build_engines, notes, options_for

    opened = Bundle.open(resolve_bundle(bundle, revision))
    options = options_for(target, dtype, opened=opened, **sizes)
    with shown_progress(quiet) as progress:
        record, built = build_engines(opened, target, options, force=force, progress=progress, check=check)
    folder = engine_folder(opened, name)
    said = notes(opened, target, options)
    if as_json:
        print_json({"engines": str(folder), "built": built, **asdict(record), "notes": said})
        return
    click.echo(f"{folder}: {'built' if built else 'nothing changed'}, {_summary(record)}")
    click.echo(_checked(record))
    for note in said:
        click.echo(f"Note: {note}")


def _summary(record: EngineRecord) -> str:
    total = sum(entry["bytes"] for entry in record.files.values())
    seconds = sum(figures["seconds"] for figures in record.figures.values())
    peak = max(figures["peak_rss"] for figures in record.figures.values())
    rows = f"{record.options.rows} rows, " if record.options.rows > 1 else ""
    devices = ", ".join(f"{capability / 10:.1f}" for capability in record.compute_capabilities)
    return (
        f"{size(total)} for compute capability {devices} ({record.flavour} {record.version}, {record.options.dtype}), "
        f"{rows}{seconds:.0f} s, at most {size(peak)} of memory; programs of the decoder: {record.options.profiles}"
    )


def _checked(record: EngineRecord) -> str:
    """Say what the comparison with ONNX Runtime found."""
    found = record.check
    if "logits_cosine" not in found:
        return f"not compared with ONNX Runtime: {found.get('skipped', 'not asked for')}"
    return (
        f"compared with ONNX Runtime on {found['tokens']} tokens: cosine of image tokens {found['vision_cosine']:.4f}, "
        f"of logits {found['logits_cosine']:.4f}"
    )
