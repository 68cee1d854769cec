"""The vision half of a calibration run: compute the image tokens of all tiles, with one layer in memory at a time.

Tiles go through the tower in waves whose hidden states fit in memory; a killed run continues with the wave it was in.
What came out of each waits in a file of its own until all have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import Advance
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.config import ModelConfig

from .block_weights import load_block, load_vision_embedding
from .blocks import embed_pixels, no_observer, project, vision_block
from .compute import Compute
from .dataset import EMBEDDINGS, TILES, CalibrationSet, embed_tokens
from .statistics import InputStatistics, Observer, StatisticsRequest
from .work import WorkFolder

_STATE = "vision.npz"
_WAVE_BYTES = 128 << 20
_BATCH = 4
Replacements = Callable[[str], Mapping[str, Tensor]]


def no_replacements(block: str) -> Mapping[str, Tensor]:
    """Replace no tensors: the tower stays as in the checkpoint."""
    return {}


def tower_steps(calibration: CalibrationSet, config: ModelConfig) -> int:
    """Return the total number of progress steps that `embed` reports: tiles x layers."""
    return sum(calibration.tiles) * config.vision_layers_used


@torch.no_grad()
def embed(
    work: WorkFolder,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    compute: Compute,
    progress: Advance,
    replaced: Replacements = no_replacements,
    gather: bool = True,
) -> dict[str, NDArray[Any]]:
    """Make the embeddings file: the table's rows of text tokens, and the image tokens that come out of the tower.

    Args:
        work, checkpoint, calibration, compute, progress: those of the run.
        replaced: returns the tensors of a quantized tower that replace those of a block ("vision.layers.0",
            "projector"), by their name in the block.
        gather: False skips the statistics, which take a seventh of the time.

    Returns:
        Statistics of the inputs of the tower's and the projector's linears, named as by `dataset.read_statistics`.

    Raises:
        EdgeError: NaN or infinity; the message names layer, tensor and sample.
    """
    run = _Tower(work, checkpoint, calibration, compute, progress, replaced, gather)
    return run.all_waves()


class _Tower:
    def __init__(
        self,
        work: WorkFolder,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        compute: Compute,
        progress: Advance,
        replaced: Replacements,
        gather: bool,
    ) -> None:
        self._gather = gather
        self._replaced = replaced
        self._work = work
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._calibration = calibration
        self._compute = compute
        self._progress = progress
        self._owners = [
            name for name, count in zip(calibration.names, calibration.tiles, strict=True) for _ in range(count)
        ]
        self._observers: dict[str, Observer] = {}

    def all_waves(self) -> dict[str, NDArray[Any]]:
        total = len(self._owners)
        done = self._restore()
        self._progress(done * self._config.vision_layers_used)
        if total:
            size = self._config.vision.image_size
            tiles = np.memmap(self._work.need(TILES), np.uint8, "r", shape=(total, size, size, 3))
            for start in range(done, total, wave := self._wave_size()):
                self._one_wave(tiles[start : start + wave], start)
                self._save(min(start + wave, total))
        self._write_embeddings()
        return {
            f"{observer.block}.{name}.{figure}": array
            for observer in self._observers.values()
            for name, statistics in observer.inputs.items()
            for figure, array in statistics.arrays().items()
        }

    def _wave_size(self) -> int:
        vision = self._config.vision
        return max(1, _WAVE_BYTES // (4 * vision.hidden_size * (vision.grid_size**2 + 1)))

    def _one_wave(self, tiles: NDArray[np.uint8], start: int) -> None:
        vision, compute = self._config.vision, self._compute
        weights = load_vision_embedding(self._checkpoint, compute)
        x = torch.cat([embed_pixels(weights, self._to_device(batch), vision) for batch in _batches(tiles)])
        for n in range(self._config.vision_layers_used):
            weights = self._load(f"vision.layers.{n}")
            observer = self._observer(f"vision.layers.{n}")
            for first in range(0, len(x), _BATCH):
                rows = slice(first, first + _BATCH)
                self._announce(observer, start + first, len(x[rows]), x.shape[1])
                x[rows] = vision_block(weights, x[rows], vision, observer if self._gather else no_observer)
                observer.check("the output", x[rows].flatten(0, 1))
                self._progress(len(x[rows]))
        embeds = self._project(x, start).flatten(0, 1).cpu().numpy()
        self._work.write_arrays(_wave_name(start), {"embeds": embeds})

    def _project(self, x: Tensor, start: int) -> Tensor:
        weights = self._load("projector")
        observer = self._observer("projector")
        self._announce(observer, start, len(x), self._config.tokens_per_tile)
        embeds = project(weights, x, self._config, observer if self._gather else no_observer)
        observer.check("the output", embeds.flatten(0, 1))
        return embeds

    def _load(self, block: str) -> dict[str, Tensor]:
        return load_block(self._checkpoint, f"{block}.", self._compute) | dict(self._replaced(block))

    def _write_embeddings(self) -> None:
        """Image tokens of all samples follow one another in the order of the tiles."""
        waves = [_wave_name(start) for start in range(0, len(self._owners), self._wave_size())]
        if not self._work.has(EMBEDDINGS):
            with self._work.writing(EMBEDDINGS) as new:
                embed_tokens(new, self._checkpoint, self._calibration)
                shape = (self._calibration.total, self._calibration.hidden_size)
                table = np.memmap(new, np.float32, "r+", shape=shape)
                places = np.flatnonzero(self._calibration.is_image)
                for wave in waves:
                    embeds = self._work.need_arrays(wave)["embeds"]
                    table[places[: len(embeds)]] = embeds
                    places = places[len(embeds) :]
                table.flush()
        for wave in waves:
            self._work.remove(wave)

    def _observer(self, block: str) -> Observer:
        return self._observers.setdefault(block, Observer(block, len(self._owners), StatisticsRequest()))

    def _announce(self, observer: Observer, first: int, tiles: int, tokens: int) -> None:
        observer.begin(first, [(name, tokens) for name in self._owners[first : first + tiles]])

    def _to_device(self, tiles: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.array(tiles)).to(self._compute.device)

    def _save(self, done: int) -> None:
        arrays: dict[str, NDArray[Any]] = {"done": np.array(done)}
        for block, observer in self._observers.items():
            for name, statistics in observer.inputs.items():
                arrays[f"{block}/{name}/count"] = np.array(statistics.count)
                arrays[f"{block}/{name}/sum_abs"] = statistics.sum_abs.cpu().numpy()
                arrays[f"{block}/{name}/max_abs"] = statistics.max_abs.cpu().numpy()
        self._work.write_arrays(_STATE, arrays)

    def _restore(self) -> int:
        arrays = self._work.read_arrays(_STATE)
        if arrays is None:
            return 0
        device = self._compute.device
        for key in [key for key in arrays if key.endswith("/count")]:
            block, name, _ = key.split("/")
            self._observer(block).inputs[name] = InputStatistics(
                int(arrays[key]),
                torch.from_numpy(arrays[f"{block}/{name}/sum_abs"]).to(device),
                torch.from_numpy(arrays[f"{block}/{name}/max_abs"]).to(device),
            )
        return int(arrays["done"])


def _wave_name(start: int) -> str:
    return f"wave-{start}.npz"


def _batches(tiles: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [tiles[start : start + _BATCH] for start in range(0, len(tiles), _BATCH)]
