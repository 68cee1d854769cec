"""Pass calibration data through the blocks of a model, with one block in memory at a time: the tower or the decoder.

`Tower` and `Decoder` say what the blocks are: their names, what enters the first one, how one of them computes. The
pass itself is the same for both. `BlockStream.run` goes forward: each block's statistics go out to a handler, and the
tensors that it returns take the place of the block's own. `BlockStream.back` carries gradients back to the first block
for a few probes. All state is in a work folder: hidden states as files, so that the page cache decides what stays in
memory, and one JSON file for each direction, which is written after each block. A killed run continues with the block
that it was in. This module does not know rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import Advance, Progress
from internvl_edge.checkpoint.kv_scales import KvScales
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
from .statistics import InputStatistics, Observer, StatisticsRequest
from .work import WorkFolder

# Enough for efficient matrix products in little memory: the tiles, or the tokens, that go through a block together.
_CHUNK_TILES = 4
_CHUNK_TOKENS = 2048
PROJECTOR = "projector"

Statistics = Mapping[str, InputStatistics]
# Takes the index of a block and the statistics of its inputs, and returns the tensors that replace the block's own in
# the rest of the pass, by their names in the block, or None. It stores its own results. It can be called again for a
# block whose results it has stored already.
Handler = Callable[[int, Statistics], Mapping[str, Tensor] | None]


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


@dataclass(frozen=True)
class Probe:
    """One item on the way back through a block.

    Attributes:
        item: its index.
        weights: the block's own tensors, float32.
        x, y: what goes into the block and what comes out, [rows, width] float32.
        gradients: [draws, rows, width] float32 at the output.
    """

    item: int
    weights: Weights
    x: Tensor
    y: Tensor
    gradients: Tensor


class BlockStream:
    """A resumable pass through `blocks`.

    Args:
        work: where the state is.
        label: separates the files of several passes in one work folder.
        blocks: the blocks, and what passes through them.
        probes: items whose hidden states are kept for all blocks, for the way back.
        held_out: items that pass through the blocks but are not part of the statistics.
    """

    def __init__(
        self, work: WorkFolder, label: str, blocks: Blocks, probes: Sequence[int] = (), held_out: Collection[int] = ()
    ) -> None:
        self._work = work
        self._label = label
        self.blocks = blocks
        self.probes = probes
        self._held_out = frozenset(held_out)

    @torch.no_grad()
    def run(
        self,
        progress: Progress,
        title: str,
        handle: Handler,
        wanted: StatisticsRequest | None = None,
        replaces: bool = True,
        until: int | None = None,
    ) -> None:
        """Run all blocks. For each, collect the `wanted` statistics, call `handle`, and go on with what it returns.

        Args:
            progress, title: for the phase.
            handle: see `Handler`. Without `wanted`, it is called before a block is run.
            wanted: the statistics; None for none.
            replaces: False where `handle` replaces no tensor of a block that it has seen. This saves the second time
                that each item passes through a block.
            until: stop before this block; another call goes on. Until then, what came out of the last one is kept.

        Raises:
            EdgeError: NaN or infinity; the message names block, tensor and sample.
        """
        count, twice = len(self.blocks.names), replaces and wanted is not None
        rows = [sum(self.blocks.lengths(index + 1)) * (1 + twice) for index in range(count)]
        done = int((self._work.read_json(f"{self._label}.json") or {"blocks": 0})["blocks"])
        with progress.phase(title, sum(rows), self.blocks.unit, count) as advance:
            advance(sum(rows[:done]))
            for index in range(done, count if until is None else until):
                if wanted is None:
                    self._propagate(index, handle(index, {}) or {}, advance)
                elif twice:
                    replaced = handle(index, self._observe(index, wanted, advance))
                    self._propagate(index, replaced or {}, advance)
                else:
                    handle(index, self._propagate(index, {}, advance, wanted))
                self._work.write_json(f"{self._label}.json", {"blocks": index + 1})
                self._work.remove(self._hidden(index))

    def inputs(self, index: int, items: range) -> Tensor:
        """Return what some items bring to a block, [rows, width] float32.

        It exists while `handle` works on that block. After `run`, the index one past the last block gives what came
        out.
        """
        if index == 0:
            return self.blocks.first(items)
        lengths = self.blocks.lengths(index)
        path, shape = self._work.need(self._hidden(index)), (sum(lengths), self.blocks.width(index))
        start, stop = sum(lengths[: items.start]), sum(lengths[: items.stop])
        states = np.memmap(path, np.float32, "r", shape=shape)[start:stop]
        return torch.from_numpy(np.array(states)).to(self.blocks.compute.device)

    @torch.no_grad()
    def observe_output(
        self, name: str, apply: Callable[[Tensor], Tensor], wanted: StatisticsRequest
    ) -> InputStatistics:
        """Return the statistics of what `apply` makes of the last block's output, under a name; after `run`."""
        end = len(self.blocks.names)
        observer = Observer(self.blocks.names[0].partition(".")[0], sum(self.blocks.lengths(end)), wanted)
        for items in self.blocks.chunks:
            self._announce(observer, items, self.blocks.lengths(end), sum(self.blocks.lengths(end)[: items.start]))
            observer(name, apply(self.inputs(end, items)))
        return observer.inputs[name]

    def kv_scales(self) -> KvScales:
        """Return scales of an int8 KV cache that reach what went into it; after `run`."""
        layers = [self._work.need_arrays(self._cache(index)) for index in range(len(self.blocks.names))]
        keys, values = (np.stack([layer[part] for layer in layers]) for part in ("keys", "values"))
        return KvScales.from_ranges(keys, values)

    def back(
        self,
        progress: Progress,
        title: str,
        start: Callable[[int], Tensor],
        measure: Callable[[int, Iterator[Probe]], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Carry gradients of the probes from the last block to the first, and return all that `measure` finds.

        Args:
            progress, title: for the phase.
            start: the gradients [draws, rows, width] float32 of a probe, by item, at the output of the last block.
            measure: takes the index of a block and all probes there; returns JSON values by name.
        """
        count, state = len(self.blocks.names), f"{self._label}-back.json"
        saved = self._work.read_json(state) or {"left": count, "found": {}}
        found: dict[str, Any] = saved["found"]
        with progress.phase(title, count, self.blocks.unit) as advance:
            advance(count - saved["left"])
            for index in reversed(range(saved["left"])):
                before: dict[str, NDArray[Any]] = {}
                found |= measure(index, self._probes_at(index, start, before))
                if index:
                    self._work.write_arrays(self._gradient(index), before)
                self._work.write_json(state, {"left": index, "found": found})
                for name in (self._gradient(index + 1), self._probe(index + 1)):
                    self._work.remove(name)
                advance(1)
        return found

    def output(self, item: int) -> Tensor:
        """Return what came out of the last block for one of the probes, [rows, width] float32; after `run`."""
        return self._tensor(self._work.need_arrays(self._probe(len(self.blocks.names)))[str(item)])

    def forget(self) -> None:
        """Delete what came out of the last block."""
        self._work.remove(self._hidden(len(self.blocks.names)))

    # -- forward ----------------------------------------------------------------------------------------------------

    def _observe(self, index: int, wanted: StatisticsRequest, advance: Advance) -> Statistics:
        blocks, weights = self.blocks, self.blocks.load(index)
        lengths = blocks.lengths(index + 1)
        observed = sum(length for item, length in enumerate(lengths) if item not in self._held_out)
        observer, seen = Observer(blocks.names[index], observed, wanted), 0
        for chunk in blocks.chunks:
            for items in _without(chunk, self._held_out):
                self._announce(observer, items, lengths, seen)
                seen += sum(lengths[items.start : items.stop])
                blocks.run(index, weights, self.inputs(index, items), items, observer, output=False)
            advance(sum(lengths[chunk.start : chunk.stop]))
        return observer.inputs

    def _propagate(
        self, index: int, replaced: Mapping[str, Tensor], advance: Advance, wanted: StatisticsRequest | None = None
    ) -> Statistics:
        """Write what comes out of a block; with `wanted`, observe its inputs too."""
        blocks, weights = self.blocks, self.blocks.load(index) | dict(replaced)
        lengths, ranges = blocks.lengths(index + 1), blocks.cache_ranges()
        observer, seen = Observer(blocks.names[index], sum(lengths), wanted or StatisticsRequest()), 0
        probes: dict[str, NDArray[Any]] = {}
        # Written, not mapped: a full disk is then an error and not a crash.
        with self._work.writing(self._hidden(index + 1)) as new, new.open("wb") as file:
            for items in blocks.chunks:
                self._announce(observer, items, lengths, seen)
                x = self.inputs(index, items)
                x = blocks.run(index, weights, x, items, observer if wanted else no_observer, ranges=ranges)
                observer.check("the output", x)
                file.write(x.cpu().numpy().data)
                parts = zip(items, torch.split(x, list(lengths[items.start : items.stop])), strict=True)
                probes |= {str(item): part.cpu().numpy() for item, part in parts if item in self.probes}
                seen += len(x)
                advance(len(x))
            # These first: where the hidden states are whole, so are they.
            if probes:
                self._work.write_arrays(self._probe(index + 1), probes)
            if ranges:
                self._work.write_arrays(self._cache(index), ranges.arrays())
        return observer.inputs

    def _announce(self, observer: Observer, items: range, lengths: Sequence[int], offset: int) -> None:
        observer.begin(offset, [(self.blocks.owners[item], lengths[item]) for item in items])

    # -- back -------------------------------------------------------------------------------------------------------

    def _probes_at(
        self, index: int, start: Callable[[int], Tensor], before: dict[str, NDArray[Any]]
    ) -> Iterator[Probe]:
        """Yield the probes at a block, and fill `before` with their gradients at its input."""
        # The differences of nearly equal outputs would be lost in the rounding of bfloat16.
        weights = self.blocks.load(index, torch.float32)
        last = index + 1 == len(self.blocks.names)
        behind = {} if last else self._work.need_arrays(self._gradient(index + 1))
        inputs = self._work.need_arrays(self._probe(index)) if index else {}
        for item in self.probes:
            items = range(item, item + 1)
            gradients = start(item) if last else self._tensor(behind[str(item)])
            x = self._tensor(inputs[str(item)]) if index else self.blocks.first(items)
            with torch.set_grad_enabled(index > 0):
                x = x.requires_grad_(index > 0)
                y = self.blocks.run(index, weights, x, items)
                if index:
                    pulled = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in gradients]
                    before[str(item)] = torch.stack(pulled).cpu().numpy()
            yield Probe(item, weights, x.detach(), y.detach(), gradients)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.blocks.compute.device)

    def _hidden(self, index: int) -> str:
        return f"{self._label}-hidden-{index}.f32"

    def _probe(self, index: int) -> str:
        return f"{self._label}-probe-{index}.npz"

    def _gradient(self, index: int) -> str:
        return f"{self._label}-gradient-{index}.npz"

    def _cache(self, index: int) -> str:
        return f"{self._label}-cache-{index}.npz"


def ranges_of(items: range, size: int) -> list[range]:
    """Split a range into ranges of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _without(chunk: range, held_out: Collection[int]) -> Iterator[range]:
    """Yield the ranges of items in a chunk that remain without the held-out ones."""
    start = chunk.start
    for index in [*(index for index in chunk if index in held_out), chunk.stop]:
        if index > start:
            yield range(start, index)
        start = index + 1
