"""The command line: `internvl-edge COMMAND`.

Each command is one file in this folder. This file finds the command, and prints an error as one line on standard
error.

Exit status: 0 for success, 1 when a bundle fails a condition of `evaluate --fail-if` or `doctor` finds a problem, 2 for
an error that the user can correct, 130 when the user interrupts the command.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from internvl_edge.base.errors import EdgeError, QualityWarning

# Command -> one-line help. A command is imported only when it is called: `run` must not load what `export` needs.
COMMANDS = {
    "inspect": "Show the configuration and size of a checkpoint or a bundle.",
    "calibrate": "Collect calibration data from a checkpoint, for quantize.",
    "quantize": "Convert a checkpoint to a quantized one (4 or 8 bits).",
    "export": "Convert a checkpoint to a bundle of ONNX graphs.",
    "devices": "List the devices that plan and build support.",
    "plan": "Predict whether a model fits a device, and its speed there.",
    "build": "Build TensorRT engines from a bundle, for a device.",
    "run": "Ask a bundle one question about images or a video.",
    "chat": "Chat with a bundle in the terminal.",
    "evaluate": "Measure the quality of a bundle's answers.",
    "bench": "Measure the speed and memory of a bundle on this machine.",
    "demo": "Export the shipped demo model and ask it about shipped images.",
    "doctor": "Check the installation on this machine.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="internvl-edge")
@click.pass_context
def cli(context: click.Context) -> None:
    """Export, calibrate, quantize and run InternVL 2.5 on edge devices."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the `internvl-edge` program and exit with its status."""
    warnings.showwarning = _one_line(warnings.showwarning)
    try:
        status = cli.main(prog_name="internvl-edge", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except EdgeError as error:
        _fail(str(error))
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(error.format_message().rstrip(".") + hint)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # the system refused an operation: an unreadable file, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _one_line(others: Callable[..., None]) -> Callable[..., None]:
    """Return a warning handler that prints quality warnings as one line and passes all others to `others`."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, QualityWarning):
            click.echo(f"internvl-edge: warning: {' '.join(str(message).split())}", err=True)
        else:
            others(message, category, *rest)

    return show


def _fail(message: str) -> None:
    click.echo(f"internvl-edge: error: {' '.join(message.split())}", err=True)
    sys.exit(2)
