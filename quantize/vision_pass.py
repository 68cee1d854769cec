"""A resumable pass of tiles through the vision tower and projector, with one block in memory at a time.

Hidden states are memory-mapped files. The state is saved after each block, so a killed run continues with the block
that it was in. The hidden states of a few probe tiles are kept for all blocks, for the backward pass (`sensitivity`).
This module does not know rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import Advance
from internvl_edge.calibration.block_weights import load_block, load_vision_embedding
from internvl_edge.calibration.blocks import Observe, Weights, embed_pixels, no_observer, project, vision_block
from internvl_edge.calibration.compute import Compute
from internvl_edge.calibration.dataset import TILES, CalibrationSet
from internvl_edge.calibration.statistics import InputStatistics, Observer, StatisticsRequest
from internvl_edge.calibration.tower import Replacements, no_replacements
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.config import ModelConfig

PROJECTOR = "projector"
_BATCH = 4

# Takes a block and the statistics of its inputs, and stores its own results. It can be called again for a block that it
# has stored already.
BlockHandler = Callable[[str, Mapping[str, InputStatistics]], None]


def blocks_of(config: ModelConfig) -> list[str]:
    """Return the canonical names of the tower's blocks that are used, in order, and the projector."""
    return [*(f"vision.layers.{n}" for n in range(config.vision_layers_used)), PROJECTOR]


def run_block(config: ModelConfig, block: str, weights: Weights, x: Tensor, observe: Observe) -> Tensor:
    """Run x [tiles, 1 + patches, hidden] float32 through one block.

    The projector's output is [tiles, tokens, decoder hidden].
    """
    if block == PROJECTOR:
        return project(weights, x, config, observe)
    return vision_block(weights, x, config.vision, observe)


@dataclass(frozen=True)
class TileSample:
    """A sample of the tiles of a calibration set.

    Attributes:
        pixels: uint8 [tiles, S, S, 3].
        owners: the calibration sample that each tile comes from.
        probes: indices of the few tiles whose hidden states are kept for all blocks.
    """

    pixels: NDArray[np.uint8]
    owners: list[str]
    probes: NDArray[np.intp]

    @staticmethod
    def of(calibration: CalibrationSet, config: ModelConfig, most: int, probes: int) -> TileSample:
        """Choose at most `most` evenly spaced tiles, and `probes` of these.

        The tiles must still be in the set's folder.
        """
        owners = [name for name, count in zip(calibration.names, calibration.tiles, strict=True) for _ in range(count)]
        size = config.vision.image_size
        chosen = _evenly(len(owners), most)
        shape = (len(owners), size, size, 3)
        pixels = np.memmap(calibration.folder / TILES, np.uint8, "r", shape=shape)[chosen] if owners else _none(size)
        return TileSample(pixels, [owners[index] for index in chosen], _evenly(len(chosen), probes))


def _none(size: int) -> NDArray[np.uint8]:
    return np.empty((0, size, size, 3), np.uint8)


def _evenly(count: int, most: int) -> NDArray[np.intp]:
    kept = min(count, most)
    return (np.arange(kept) * count // max(kept, 1)).astype(np.intp)


class VisionPass:
    """One pass. The `label` separates the files of several passes in one work folder."""

    def __init__(
        self,
        work: WorkFolder,
        label: str,
        checkpoint: Checkpoint,
        tiles: TileSample,
        compute: Compute,
        progress: Advance,
        replaced: Replacements = no_replacements,
    ) -> None:
        self._work = work
        self._label = label
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._tiles = tiles
        self._compute = compute
        self._progress = progress
        self._replaced = replaced
        self._blocks = blocks_of(self._config)

    @torch.no_grad()
    def run(self, wanted: StatisticsRequest | None, handle: BlockHandler) -> None:
        """Run all blocks. For each, collect the statistics in `wanted` (None for no statistics) and call `handle`.

        Raises:
            EdgeError: NaN or infinity; the message names block, tensor and sample.
        """
        state = f"vision-{self._label}.json"
        done = int((self._work.read_json(state) or {"blocks": 0})["blocks"])
        if not self._work.has(self._name(0)) and not done:
            self._embed()
        self._progress(done * len(self._tiles.pixels))
        for index in range(done, len(self._blocks)):
            handle(self._blocks[index], self._forward(index, wanted))
            self._work.write_json(state, {"blocks": index + 1})
            self._work.remove(self._name(index))

    def embeddings(self) -> NDArray[np.float32]:
        """What came out, [tiles, tokens, decoder hidden]; after `run`."""
        return self._open(len(self._blocks), self._work.need(self._name(len(self._blocks))))

    def probes(self, index: int) -> NDArray[np.float32]:
        """Input of block `index` for the probes, [probes, tokens, width]; behind the last, what came out."""
        return np.asarray(np.load(self._work.need(self._probe_name(index))), np.float32)

    def remove_probes(self) -> None:
        """Delete the hidden states of the probe tiles."""
        for index in range(len(self._blocks) + 1):
            self._work.remove(self._probe_name(index))

    def _embed(self) -> None:
        weights = load_vision_embedding(self._checkpoint, self._compute)
        with self._output(0) as out:
            for rows in self._batches():
                pixels = torch.from_numpy(np.array(self._tiles.pixels[rows])).to(self._compute.device)
                out[rows] = embed_pixels(weights, pixels, self._config.vision).cpu().numpy()

    def _forward(self, index: int, wanted: StatisticsRequest | None) -> Mapping[str, InputStatistics]:
        block = self._blocks[index]
        weights = load_block(self._checkpoint, f"{block}.", self._compute) | dict(self._replaced(block))
        tokens = self._config.tokens_per_tile if block == PROJECTOR else self._config.vision.grid_size**2 + 1
        observer = Observer(block, len(self._tiles.pixels) * tokens, wanted or StatisticsRequest())
        source = self._open(index, self._work.need(self._name(index)))
        with self._output(index + 1) as out:
            for rows in self._batches():
                x = torch.from_numpy(np.array(source[rows])).to(self._compute.device)
                observer.begin(rows.start * tokens, [(name, tokens) for name in self._tiles.owners[rows]])
                x = run_block(self._config, block, weights, x, observer if wanted else no_observer)
                observer.check("the output", x.flatten(0, 1))
                out[rows] = x.cpu().numpy()
                self._progress(len(x))
        return observer.inputs

    def _batches(self) -> list[slice]:
        count = len(self._tiles.pixels)
        return [slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]

    def _open(self, index: int, path: Path, mode: str = "r") -> NDArray[np.float32]:
        vision, config = self._config.vision, self._config
        shape = (len(self._tiles.pixels), vision.grid_size**2 + 1, vision.hidden_size)
        if index == len(self._blocks):
            shape = (len(self._tiles.pixels), config.tokens_per_tile, config.decoder.hidden_size)
        opened: NDArray[np.float32] = np.memmap(path, np.float32, mode, shape=shape)  # type: ignore[call-overload]
        return opened

    @contextmanager
    def _output(self, index: int) -> Iterator[NDArray[np.float32]]:
        """What goes into block `index`, to be filled. Probes first: where the file of all tiles is whole, theirs is."""
        with self._work.writing(self._name(index)) as new:
            out = self._open(index, new, "w+")
            yield out
            with self._work.writing(self._probe_name(index)) as probes, probes.open("wb") as file:
                np.save(file, out[self._tiles.probes])
            out.flush()  # type: ignore[attr-defined]  # a memmap

    def _name(self, index: int) -> str:
        return f"vision-{self._label}-{index}.f32"

    def _probe_name(self, index: int) -> str:
        return f"vision-{self._label}-probes-{index}.npy"
