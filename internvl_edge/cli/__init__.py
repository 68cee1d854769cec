"""The command line: `internvl-edge COMMAND`.

Exit status: 0 done, 1 a bundle failed a condition of `evaluate --fail-if` or rows of `batch` have errors, 2 a mistake
of the user's (one line on standard error), 130 interrupted by Ctrl-C or SIGTERM, 141 nobody reads the output any more
(a closed pipe).
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

import click

from internvl_edge.base.errors import ContextWarning, EdgeError, QualityWarning, RestoredWarning
from internvl_edge.base.progress import note
from internvl_edge.base.text import shown

# Command -> one-line help. A command is imported only when it is called: `run` must not load what `export` needs.
COMMANDS = {
    "inspect": "Show the configuration and size of a checkpoint or a bundle.",
    "calibrate": "Collect calibration data from a checkpoint, for quantize.",
    "quantize": "Convert a checkpoint to a quantized one (4 or 8 bits).",
    "export": "Convert a checkpoint to a bundle of ONNX graphs.",
    "devices": "List the devices that plan and build support.",
    "plan": "Predict whether a model fits a device, and its speed there.",
    "build": "Build TensorRT engines from a bundle, for a device.",
    "deploy": "Go from a checkpoint to a device in one resumable run.",
    "run": "Ask a bundle one question about images or a video.",
    "chat": "Chat with a bundle in the terminal.",
    "batch": "Ask a bundle about every image of a folder or row of a table.",
    "serve": "Answer over HTTP, in the form of OpenAI's interface.",
    "evaluate": "Measure the quality of a bundle's answers.",
    "report": "Show bundles beside each other: size, quality, speed.",
    "bench": "Measure the speed and memory of a bundle on this machine.",
    "push": "Put a bundle or a quantized checkpoint on the hub.",
    "demo": "Export the shipped demo model and ask it about shipped images.",
    "native": "Compile the attention operators for this machine's CPU.",
    "doctor": "Check the installation on this machine.",
}


INTERRUPTED = 130
# What a shell shows for a program that SIGPIPE ended, as it does most.
UNHEARD = 141


class _Stopped(Exception):  # noqa: N818
    """What click would answer itself, with lines and a status of its own."""

    def __init__(self, status: int, line: str = "") -> None:
        super().__init__(line)
        self.status = status


@contextmanager
def _stops() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _Stopped(UNHEARD) from None
    except KeyboardInterrupt as stop:
        raise _Stopped(INTERRUPTED, f"interrupted{f'; {stop}' if str(stop) else ''}") from None


class _Commands(click.Group):
    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _stops():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _stops():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(args[0], COMMANDS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {shown(args[0])}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="internvl-edge")
@click.pass_context
def cli(context: click.Context) -> None:
    """Export, calibrate, quantize and run InternVL on edge devices."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the `internvl-edge` program and exit with its status."""
    warnings.showwarning = _one_line(warnings.showwarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about images that are damaged and yet have all their pixels
    try:
        status = _status()
    except BrokenPipeError:  # nobody reads the line about a mistake either
        status = UNHEARD
    _drop_unwritten()
    sys.exit(status)


def _status() -> int:
    """Run the command; mistakes are one line each."""
    try:
        status = cli.main(prog_name="internvl-edge", standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except EdgeError as error:
        return _fail(str(error))
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(error.format_message().rstrip(".") + hint)
    except click.Abort:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except _Stopped as stop:
        if str(stop):
            click.echo(str(stop), err=True)
        return stop.status
    except BrokenPipeError:
        return UNHEARD
    except OSError as error:  # what the system refuses: a file that cannot be read, a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")


def _drop_unwritten() -> None:
    """Send what a broken stream still holds nowhere: the interpreter writes it once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(others: Callable[..., None]) -> Callable[..., None]:
    """Return a warning handler that prints our own warnings as one line and passes all others to `others`."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, (ContextWarning, QualityWarning, RestoredWarning)):
            note(f"internvl-edge: warning: {' '.join(str(message).split())}")
        else:
            others(message, category, *rest)

    return show


def _fail(message: str) -> int:
    click.echo(f"internvl-edge: error: {' '.join(message.split())}", err=True)
    return 2
