"""`calibrate`: turn a checkpoint and data into a folder with the embedded calibration set and activation statistics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.folders import writing
from internvl_edge.base.progress import SILENT, Progress, as_progress
from internvl_edge.base.replaceable import require_replaceable
from internvl_edge.checkpoint.reader import Checkpoint

from .compute import Compute, choose_compute
from .dataset import CalibrationSet, DataOptions, calibration_files, finish, prepare
from .decoder_pass import DecoderPass, Statistics
from .statistics import StatisticsRequest
from .tower import Replacements, embed, no_replacements, tower_steps
from .work import CONTINUES, WorkFolder, checkpoint_identity

Figures = dict[str, NDArray[Any]]


def calibrate(
    checkpoint: str | Path,
    out: str | Path,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    *,
    restart: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> CalibrationSet:
    """Embed a calibration set and collect the activation statistics of a checkpoint.

    The state of an unfinished run is in `OUT.partial`. The same call continues it, with the same result.

    Args:
        checkpoint: local folder.
        out: the folder to make.
        options: the data to use; default: the built-in set.
        compute: device and type; default: the best of this machine.
        restart: discard an unfinished run.
        force: replace an existing calibration set at `out`, if nothing else lies in it; at the end, in one step.
        progress: show the progress on standard error.

    Raises:
        EdgeError: the checkpoint or the data is not usable, `out` exists, another process makes it, or activations are
            not finite.
    """
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    options, compute = options or DataOptions(), compute or choose_compute()
    permit = partial(require_replaceable, target, force, "a calibration set", calibration_files)
    permit()
    with readable_disk_errors(target, CONTINUES), writing(target) as place:
        permit()
        identity = checkpoint_identity(source.folder)
        with WorkFolder(partial_path(place), run_description(identity, options, compute), restart) as work:
            figures = _gather(work, source, identity, options, compute, as_progress(progress))
            finish(work, figures, place, permit)
    return CalibrationSet.open(target)


def _gather(
    work: WorkFolder, source: Checkpoint, identity: str, options: DataOptions, compute: Compute, progress: Progress
) -> Figures:
    """The statistics of all linears; the work folder then holds the set."""
    progress.expect(3)
    calibration, figures = embedded_set(work, source, identity, options, compute, progress, gather=True)
    handler = _Gatherer(work)
    layers = source.config.decoder.num_hidden_layers
    steps = DecoderPass.steps(calibration, layers)
    with progress.phase("measuring the decoder", steps, "layers", layers) as advance:
        DecoderPass(work, source, calibration, compute, advance).run(StatisticsRequest(), handler)
    return figures | handler.all_layers(layers)


def embedded_set(
    work: WorkFolder,
    checkpoint: Checkpoint,
    identity: str,
    options: DataOptions,
    compute: Compute,
    progress: Progress = SILENT,
    replaced: Replacements = no_replacements,
    gather: bool = False,
) -> tuple[CalibrationSet, Figures]:
    """Return the calibration set with its embeddings and, with `gather`, the statistics of tower and projector.

    A killed run continues. For `replaced`, see `tower.embed`.
    """
    calibration = prepare(work, checkpoint, identity, options, progress)
    return calibration, embed_images(work, checkpoint, calibration, compute, progress, replaced, gather)


def embed_images(
    work: WorkFolder,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    compute: Compute,
    progress: Progress,
    replaced: Replacements = no_replacements,
    gather: bool = False,
) -> Figures:
    """Run `tower.embed` as one phase of the progress."""
    steps, tiles = tower_steps(calibration, checkpoint.config), sum(calibration.tiles)
    with progress.phase("encoding the images", steps, "tiles", tiles) as advance:
        return embed(work, checkpoint, calibration, compute, advance, replaced, gather)


def partial_path(target: Path) -> Path:
    """Return the folder for the state of an unfinished run: beside the output folder."""
    return target.with_name(f"{target.name}.partial")


def run_description(identity: str, options: DataOptions | None, compute: Compute | None) -> dict[str, Any]:
    """Return the values, in addition to the recipe, that decide the result of a run, as JSON values."""
    return {
        "version": version("internvl-edge"),
        "checkpoint": identity,
        "data": options.describe() if options else None,
        "compute": str(compute) if compute else None,
    }


def require_same_checkpoint(calibration: CalibrationSet, identity: str) -> None:
    """Raise EdgeError where a calibration set was made with another checkpoint."""
    if calibration.checkpoint != identity:
        raise EdgeError(
            f"{calibration.folder} was made with another checkpoint; make it again with internvl-edge calibrate"
        )


class _Gatherer:
    """Stores the per-channel statistics of each layer, and replaces no tensors."""

    def __init__(self, work: WorkFolder) -> None:
        self._work = work

    def __call__(self, layer: int, statistics: Statistics) -> Mapping[str, Tensor] | None:
        prefix = f"decoder.layers.{layer}."
        arrays = {
            f"{prefix}{name}.{figure}": array
            for name, inputs in statistics.items()
            for figure, array in inputs.arrays().items()
        }
        self._work.write_arrays(f"layer-{layer}.npz", arrays)
        return None

    def all_layers(self, count: int) -> Figures:
        figures: Figures = {}
        for layer in range(count):
            figures |= self._work.need_arrays(f"layer-{layer}.npz")
        return figures
