"""The models as rows of blocks: the vision tower with its projector, and the decoder.

A row says what the blocks are called, what enters the first one, and how one of them computes. `stream` passes data
through any of them. This module does not know files but the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.rope import RotaryAngles

from .block_weights import load_block, load_tensor, load_vision_embedding
from .blocks import (
    Observe,
    Weights,
    decoder_block,
    embed_pixels,
    no_observer,
    project,
    rms_norm,
    unseen_cache,
    vision_block,
)
from .cache_ranges import CacheRanges
from .compute import Compute
from .dataset import CalibrationSet

# Enough for efficient matrix products in little memory: the tiles, or the tokens, that go through a block together.
_CHUNK_TILES = 4
_CHUNK_TOKENS = 2048
PROJECTOR = "projector"


class Blocks(ABC):
    """Blocks that follow one another, and the items (tiles or samples) that pass through them.

    Attributes:
        checkpoint, compute: where weights come from, and how products are computed.
        names: canonical names of the blocks, in order.
        unit: what progress calls a block.
        owners: the calibration sample of each item, for messages.
        chunks: the items that go through a block together.
    """

    names: list[str]
    unit: str
    owners: Sequence[str]
    chunks: Sequence[range]

    def __init__(self, checkpoint: Checkpoint, compute: Compute) -> None:
        self.checkpoint = checkpoint
        self.compute = compute

    @abstractmethod
    def lengths(self, index: int) -> Sequence[int]:
        """Return the rows of each item at the input of block `index`; one past the last, in what comes out."""

    @abstractmethod
    def width(self, index: int) -> int:
        """Return the width of these rows."""

    @abstractmethod
    def first(self, items: range) -> Tensor:
        """Return what enters the first block, [rows, width] float32."""

    @abstractmethod
    def run(
        self,
        index: int,
        weights: Weights,
        x: Tensor,
        items: Sequence[int],
        observe: Observe = no_observer,
        output: bool = True,
        ranges: CacheRanges | None = None,
    ) -> Tensor:
        """Run the rows x [rows, width] float32 of some items through a block.

        `ranges` sees the KV cache. Without `output`, the result has no meaning, and the last product can be left out.
        """

    def cache_ranges(self) -> CacheRanges | None:
        """Return an empty measurement of a block's KV cache, or None where blocks have none."""
        return None

    def load(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return a block's tensors by their names in the block, multiplied ones in the compute type or in `dtype`."""
        compute = replace(self.compute, dtype=dtype) if dtype else self.compute
        return load_block(self.checkpoint, f"{self.names[index]}.", compute)


class Tower(Blocks):
    """The blocks of the vision tower that are used, and the projector. Items are tiles, uint8 [tiles, S, S, 3]."""

    unit = "blocks"

    def __init__(
        self, checkpoint: Checkpoint, compute: Compute, tiles: NDArray[np.uint8], owners: Sequence[str]
    ) -> None:
        super().__init__(checkpoint, compute)
        self.config = checkpoint.config
        self.names = [*(f"vision.layers.{n}" for n in range(self.config.vision_layers_used)), PROJECTOR]
        self.owners = owners
        self.chunks = ranges_of(range(len(tiles)), _CHUNK_TILES)
        self._tiles = tiles

    def lengths(self, index: int) -> Sequence[int]:
        """Return the rows of each tile: its patches with the class token, or its image tokens behind the projector."""
        end = index == len(self.names)
        return [self.config.tokens_per_tile if end else self.config.vision.grid_size**2 + 1] * len(self._tiles)

    def width(self, index: int) -> int:
        """Return the width of the tower, or of the decoder behind the projector."""
        end = index == len(self.names)
        return self.config.decoder.hidden_size if end else self.config.vision.hidden_size

    @cached_property
    def _embedding(self) -> dict[str, Tensor]:
        return load_vision_embedding(self.checkpoint, self.compute)

    def first(self, items: range) -> Tensor:
        """Return the embedded patches."""
        pixels = torch.from_numpy(np.array(self._tiles[items.start : items.stop])).to(self.compute.device)
        return embed_pixels(self._embedding, pixels, self.config.vision).flatten(0, 1)

    def run(
        self,
        index: int,
        weights: Weights,
        x: Tensor,
        items: Sequence[int],
        observe: Observe = no_observer,
        output: bool = True,
        ranges: CacheRanges | None = None,
    ) -> Tensor:
        """Run some tiles through a block or the projector."""
        x = x.reshape(len(items), -1, x.shape[-1])
        if self.names[index] == PROJECTOR:
            return project(weights, x, self.config, observe).flatten(0, 1)
        return vision_block(weights, x, self.config.vision, observe).flatten(0, 1)


class Decoder(Blocks):
    """The layers of the decoder. Items are the samples of a calibration set."""

    unit = "layers"

    def __init__(self, checkpoint: Checkpoint, compute: Compute, calibration: CalibrationSet) -> None:
        super().__init__(checkpoint, compute)
        self.config = checkpoint.config.decoder
        self.names = [f"decoder.layers.{n}" for n in range(self.config.num_hidden_layers)]
        self.calibration = calibration
        self.owners = calibration.names
        self.chunks = calibration.chunks(_CHUNK_TOKENS)
        self._starts = np.cumsum([0, *calibration.lengths])
        self._angles = RotaryAngles(self.config)

    def lengths(self, index: int) -> Sequence[int]:
        """Return the tokens of each sample."""
        return self.calibration.lengths

    def width(self, index: int) -> int:
        """Return the width of the decoder."""
        return self.config.hidden_size

    def first(self, items: range) -> Tensor:
        """Return the embeddings of the tokens, those of images included."""
        rows = self.calibration.embeddings()[self._starts[items.start] : self._starts[items.stop]]
        return torch.from_numpy(np.array(rows)).to(self.compute.device)

    def run(
        self,
        index: int,
        weights: Weights,
        x: Tensor,
        items: Sequence[int],
        observe: Observe = no_observer,
        output: bool = True,
        ranges: CacheRanges | None = None,
    ) -> Tensor:
        """Run some samples through a layer."""
        lengths = [self.calibration.lengths[item] for item in items]
        cache = ranges.add if ranges else unseen_cache
        return decoder_block(weights, x, lengths, self._rotary(lengths), self.config, observe, output, cache)

    def cache_ranges(self) -> CacheRanges:
        """Return an empty measurement of a layer's KV cache."""
        return CacheRanges(self.config, self.compute.device)

    def normed(self, x: Tensor) -> Tensor:
        """Return lm_head's input for the last layer's output, in the compute type."""
        weight = load_tensor(self.checkpoint, "decoder.norm.weight", self.compute)
        return rms_norm(x, weight, self.config.rms_norm_eps).to(self.compute.dtype)

    def _rotary(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the positions of whole sequences, [tokens, head_dim / 2] float32."""
        tables = [self._angles.at(0, length, length) for length in lengths]
        cos, sin = (np.concatenate([table[part] for table in tables]) for part in (0, 1))
        return torch.from_numpy(cos).to(self.compute.device), torch.from_numpy(sin).to(self.compute.device)


def ranges_of(items: range, size: int) -> list[range]:
    """Split a range into ranges of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
