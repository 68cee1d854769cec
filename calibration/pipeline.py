"""`calibrate`: turn a checkpoint and data into a folder with the embedded calibration set, for any recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.field_types import require_type
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.folders import writing
from internvl_edge.base.progress import SILENT, Advance, Progress, as_progress
from internvl_edge.base.replaceable import require_replaceable
from internvl_edge.checkpoint.reader import Checkpoint

from .compute import Compute, choose_compute
from .dataset import EMBEDDINGS, CalibrationSet, DataOptions, calibration_files, embed_tokens, finish, prepare
from .models import Tower, ranges_of
from .statistics import Observer, StatisticsRequest
from .work import CONTINUES, WorkFolder, checkpoint_identity

# Tiles go through the tower in waves whose hidden states fit in so much memory.
_WAVE_BYTES = 128 << 20
# Returns the tensors of a quantized tower that replace those of a block ("vision.layers.0", "projector"), by their name
# in the block.
Replacements = Callable[[str], Mapping[str, Tensor]]


def no_replacements(block: str) -> Mapping[str, Tensor]:
    """Replace no tensors: the tower stays as in the checkpoint."""
    return {}


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
    """Make a calibration set: tokens, tiles, and what the decoder receives. Every recipe can use it.

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
        EdgeError: the checkpoint is quantized already, it or the data is not usable, `out` exists, another process
            makes it, or activations are not finite.
    """
    options, compute = options or DataOptions(), compute or choose_compute()
    require_type("options", options, DataOptions, "DataOptions(PATH)")
    require_type("compute", compute, Compute, 'choose_compute("cpu")')
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    source.require_unquantized()
    permit = partial(require_replaceable, target, force, "a calibration set", calibration_files)
    permit()
    with readable_disk_errors(target, CONTINUES), writing(target) as place:
        permit()
        identity = checkpoint_identity(source.folder)
        with WorkFolder(partial_path(place), run_description(identity, options, compute), restart) as work:
            shown = as_progress(progress)
            shown.expect(2)
            embedded_set(work, source, identity, options, compute, shown)
            finish(work, place, permit)
    return CalibrationSet.open(target)


def embedded_set(
    work: WorkFolder,
    checkpoint: Checkpoint,
    identity: str,
    options: DataOptions,
    compute: Compute,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Return the calibration set with its embeddings. A killed run continues."""
    calibration = prepare(work, checkpoint, identity, options, progress)
    embed(work, checkpoint, calibration, compute, progress)
    return calibration


def embed(
    work: WorkFolder,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    compute: Compute,
    progress: Progress,
    replaced: Replacements = no_replacements,
) -> None:
    """Make the embeddings file: the table's rows of text tokens, and the image tokens that come out of the tower.

    Tiles go through the tower in waves, with one block in memory at a time. A killed run continues with the wave it was
    in: what came out of each waits in a file of its own until all have.

    Args:
        work, checkpoint, calibration, compute, progress: those of the run.
        replaced: the tensors of a quantized tower.

    Raises:
        EdgeError: NaN or infinity; the message names block, tensor and sample.
    """
    vision, count = checkpoint.config.vision, sum(calibration.tiles)
    size = max(1, _WAVE_BYTES // (4 * vision.hidden_size * (vision.grid_size**2 + 1)))
    waves = {f"wave-{wave.start}.npz": wave for wave in ranges_of(range(count), size)}
    if work.has(EMBEDDINGS):
        progress.skip(1)
    else:
        tower = Tower(checkpoint, compute, calibration.pixels(vision.image_size), calibration.tile_owners)
        with progress.phase("encoding the images", count * len(tower.names), "tiles", count) as advance:
            for name, wave in waves.items():
                if work.read_arrays(name) is None:
                    work.write_arrays(name, {"embeds": _encode(tower, wave, replaced, advance).cpu().numpy()})
                else:
                    advance(len(wave) * len(tower.names))
        with work.writing(EMBEDDINGS) as new:
            embed_tokens(new, checkpoint, calibration)
            table = np.memmap(new, np.float32, "r+", shape=(calibration.total, calibration.hidden_size))
            places = np.flatnonzero(calibration.is_image)
            for name in waves:  # image tokens of all samples follow one another in the order of the tiles
                embeds = work.need_arrays(name)["embeds"]
                table[places[: len(embeds)]] = embeds
                places = places[len(embeds) :]
            table.flush()
    for name in waves:
        work.remove(name)


@torch.no_grad()
def _encode(tower: Tower, tiles: range, replaced: Replacements, advance: Advance) -> Tensor:
    """Return the image tokens of some tiles, [tiles * tokens, hidden] float32."""
    chunks = [tiles[chunk.start : chunk.stop] for chunk in ranges_of(range(len(tiles)), len(tower.chunks[0]))]
    hidden = [tower.first(chunk) for chunk in chunks]
    for index, name in enumerate(tower.names):
        weights = tower.load(index) | dict(replaced(name))
        observer, rows = Observer(name, 0, StatisticsRequest()), tower.lengths(index + 1)
        for place, chunk in enumerate(chunks):
            hidden[place] = tower.run(index, weights, hidden[place], chunk)
            observer.begin(0, [(tower.owners[tile], rows[tile]) for tile in chunk])
            observer.check("the output", hidden[place])
            advance(len(chunk))
    return torch.cat(hidden)


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
