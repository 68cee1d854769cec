"""Options of `calibrate`, `quantize` and `deploy`: the calibration data, and the device and dtype to compute in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from internvl_edge.base.errors import EdgeError
from internvl_edge.model.preprocess import MAX_TILES

from . import completion

if TYPE_CHECKING:
    from internvl_edge.calibration import DataOptions
    from internvl_edge.calibration.compute import Compute

# The built-in set is endless, and so would be a run that asks for it.
MOST_SAMPLES = 1_000_000
Command = Callable[..., Any]
# The names of the options in `_SAMPLES`.
_CHOOSING = ("data", "samples", "seed", "max_tiles", "max_broken")


class GivenPath(click.Path):
    """A path that is not empty: an empty one is a variable of a script that was not set, and no present folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail with one line."""
        if value == "":
            self.fail("it is empty, expected a path", param, ctx)
        return super().convert(value, param, ctx)


_SAMPLES = (
    click.option(
        "--data",
        type=GivenPath(),
        help='Calibration data: a folder of images, or a .jsonl file of {"images": [...], "prompt": ..., "answer": '
        '...}, of InternVL "conversations" or of ms-swift "messages".  [default: built-in documents, charts, signs, '
        "scenes and texts]",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1, max=MOST_SAMPLES),
        default=64,
        show_default=True,
        help="Maximum number of calibration samples.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed that chooses the samples and their order."
    ),
    click.option(
        "--max-tiles",
        type=click.IntRange(min=1, max=MAX_TILES),
        default=4,
        show_default=True,
        help="Maximum number of tiles per image, without its thumbnail; at most the checkpoint's own limit.",
    ),
    click.option(
        "--max-broken",
        type=click.IntRange(min=0),
        default=8,
        show_default=True,
        help="Number of broken items that are skipped; one more is an error.",
    ),
)
_RUN = (
    click.option(
        "--device",
        default="auto",
        show_default=True,
        shell_complete=completion.of(["auto", "cpu", "cuda"]),
        help="Where this command computes: cpu, cuda, or auto, which takes CUDA where it is present. The target device "
        "of the model is chosen by the recipe.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        show_default=True,
        help="Type of the matrix products. auto is bfloat16 where the device computes in it, otherwise float32.",
    ),
    click.option("--restart", is_flag=True, help="Discard an unfinished run instead of continuing it."),
    click.option(
        "--force", is_flag=True, help="Replace the result of an earlier run at --output, when this run is complete."
    ),
)


def wait_politely() -> None:
    """Make OpenMP threads sleep at barriers instead of spinning. Call this before torch is imported.

    Quantization runs many small operations, and each one ends at a barrier. When another program uses a core, threads
    that spin there make these operations take several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def calibration_options(command: Command) -> Command:
    """Add --data, --samples, --seed, --max-tiles, --max-broken, --device, --dtype, --restart, --force."""
    for option in reversed((*_SAMPLES, *_RUN)):
        command = option(command)
    return command


def sample_options(command: Command) -> Command:
    """Add --data, --samples, --seed, --max-tiles and --max-broken, which say what the calibration data are."""
    for option in reversed(_SAMPLES):
        command = option(command)
    return command


def typed_samples() -> str:
    """Return the first option of the present command that chooses samples and was typed; "" where none was."""
    context = click.get_current_context()
    typed = (name for name in _CHOOSING if context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    return next((f"--{name.replace('_', '-')}" for name in typed), "")


def data_options(values: dict[str, Any]) -> DataOptions:
    """Return the calibration data that the options describe. This removes these options from `values`.

    Raises:
        EdgeError: the data does not exist.
    """
    from internvl_edge.calibration import DataOptions

    source = values.pop("data")
    if source is not None and not source.exists():
        raise EdgeError(f"calibration data {source} does not exist; give a folder of images or a .jsonl file")
    return DataOptions(source, **{name: values.pop(name) for name in _CHOOSING if name != "data"})


def compute_options(values: dict[str, Any]) -> Compute:
    """Return the device and dtype that the options describe. This removes both options from `values`."""
    from internvl_edge.calibration import choose_compute

    return choose_compute(values.pop("device"), values.pop("dtype"))
