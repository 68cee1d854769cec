"""`internvl-edge deploy CHECKPOINT --device NAME -o DIR`: plan, quantize, export, evaluate and build in one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras, requires
from internvl_edge.base.jsonable import encode
from internvl_edge.base.text import command_line
from internvl_edge.base.units import duration
from internvl_edge.planning.devices import Devices

from . import completion
from .checkpoint_options import revision_option
from .data_options import data_options, sample_options, wait_politely
from .output import hint, print_json, quiet_option, say_missing_page, shown_progress, stoppable, typed_command
from .recipe_options import recipe_of, recipe_options

if TYPE_CHECKING:
    from internvl_edge.deployment import Deployed, Stage

# The names of the options that make a recipe.
_RECIPE = [option.name for option in recipe_options(lambda: None).__click_params__]  # type: ignore[attr-defined]


@click.command("deploy")
@click.argument("checkpoint", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the deployment.")
@click.option(
    "--device",
    "name",
    required=True,
    shell_complete=completion.deployment_targets,
    help="Device to deploy on: a name from `internvl-edge devices`, rtx for any RTX card, or cpu for a CPU with the "
    "memory of this machine.",
)
@click.option("--devices", "table", type=click.Path(path_type=Path), help="A TOML file with more devices.")
@revision_option
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Maximum number of tokens of prompt and answer together.  [default: 4096, or less if only less fits]",
)
@recipe_options
@sample_options
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    show_default=True,
    help="Compare the bundle with the float checkpoint, and record the figures in it.",
)
@click.option("--force", is_flag=True, help="Make again what an earlier deployment in DIR made with other choices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
@stoppable("repeat the command to continue")
def command(
    checkpoint: str,
    output: Path,
    name: str,
    table: Path | None,
    revision: str | None,
    context: int | None,
    evaluate: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Deploy CHECKPOINT (a folder or a hub id) on a device: plan, quantize, export, evaluate, build.

    The plan chooses recipe, context and dialect. DIR/bundle is what goes to the device. Engines are built where the
    TensorRT of the device is here; otherwise the commands for the device are printed. To resume a stopped run, repeat
    the command: stages that are done are not repeated.
    """
    wait_politely()
    extras = ("quantize", "cpu", *(("synthetic",) if evaluate or values["data"] is None else ()))
    require_extras("deploy", *extras)
    with shown_progress(quiet) as progress, progress.waiting("loading torch"), requires("quantize", "deploy"):
        from internvl_edge.deployment import Request, deploy, find_target
    target = find_target(name, Devices(table))
    given = any(values[option] not in (None, ()) for option in _RECIPE)
    if given and values["recipe"] is None:
        values["recipe"] = target.presets[0]  # single options replace fields of what the device would get
    recipe_name = values["recipe"] or ""
    recipe = recipe_of(values) if given else None
    for option in () if given else _RECIPE:
        del values[option]
    if recipe and values["data"] is not None and not (recipe.needs_data or recipe.vision == "int8"):
        raise EdgeError("nothing in this recipe looks at data: it rounds to the nearest; leave out --data")
    request = Request(
        checkpoint,
        output,
        name,
        revision=revision,
        table=table,
        recipe=recipe,
        recipe_name=recipe_name,
        context=context,
        data=data_options(values),
        evaluate=evaluate,
        force=force,
        command=typed_command(),
    )
    say_missing_page(quiet)
    with shown_progress(quiet) as progress:
        done = deploy(request, progress, _silent if as_json else _say)
    if as_json:
        print_json({**encode(done), "folder": str(done.folder), "bundle": str(done.bundle)})
        return
    click.echo(f"{done.folder}: done in {duration(done.seconds)}")
    _say_next(done)


def _silent(number: int, stage: Stage) -> None:
    """Say nothing: one JSON object says everything in the end."""


def _say(number: int, stage: Stage) -> None:
    from internvl_edge.deployment import DEPLOY_PHASES

    took = "done before" if stage.kept else duration(stage.seconds) if stage.seconds >= 0.01 else "at once"
    click.echo(f"[{number} of {DEPLOY_PHASES}] {stage.name}: {stage.text} ({took})")
    sys.stdout.flush()


def _say_next(done: Deployed) -> None:
    if not done.on_device:
        hint(*done.run)
        hint(*done.serve, after="Or over HTTP")
        return
    click.echo(f"Next, on the device, beside a copy of {done.bundle}:")
    for words in done.on_device:
        click.echo(f"  {command_line(*words)}")
