"""Options that `calibrate` and `quantize` share: which data, and what computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.signals import terminating_as_interrupt

if TYPE_CHECKING:
    from internvl_edge.calibration import DataOptions
    from internvl_edge.calibration.compute import Compute

Command = Callable[..., Any]

_OPTIONS = (
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help='A folder of images, or a .jsonl file of {"images": [...], "prompt": ..., "answer": ...} [default: '
        "built-in documents, charts, signs, scenes and texts].",
    ),
    click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Most samples."),
    click.option("--seed", type=int, default=0, show_default=True, help="Which samples, in which order."),
    click.option(
        "--max-tiles",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="Most tiles of an image, thumbnail not counted.",
    ),
    click.option(
        "--max-broken",
        type=click.IntRange(min=0),
        default=8,
        show_default=True,
        help="Broken items that are skipped; one more is an error.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        show_default=True,
        help="What activations are computed in.",
    ),
    click.option("--restart", is_flag=True, help="Discard an unfinished run instead of continuing it."),
    click.option("--force", is_flag=True, help="Replace what an earlier run made at --output, at the end."),
)


@contextmanager
def resumable() -> Iterator[None]:
    """Around a command that continues where it was when it is repeated: Ctrl-C and SIGTERM say so."""
    with terminating_as_interrupt():
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt("repeat the command to continue") from None


def wait_politely() -> None:
    """Before torch is imported: its threads sleep at barriers instead of spinning.

    A quantizer's many small operations meet a barrier each; with spinning threads they cost a multiple of their work
    as soon as another program uses a core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def calibration_options(command: Command) -> Command:
    """Adds --data, --samples, --seed, --max-tiles, --max-broken, --device, --dtype, --restart, --force."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def data_options(values: dict[str, Any]) -> DataOptions:
    """The data that the options describe; takes them out of `values`."""
    from internvl_edge.calibration import DataOptions

    source = values.pop("data")
    if source is not None and not source.exists():
        raise EdgeError(f"calibration data {source} does not exist; give a folder of images or a .jsonl file")
    return DataOptions(source, **{name: values.pop(name) for name in ("samples", "seed", "max_tiles", "max_broken")})


def compute_options(values: dict[str, Any]) -> Compute:
    """Device and type; takes them out of `values`."""
    from internvl_edge.calibration import choose_compute

    return choose_compute(values.pop("device"), values.pop("dtype"))
