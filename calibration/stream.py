"""Pass calibration data through the blocks of a model, with one block in memory at a time: the tower or the decoder.

`models` says what the blocks are. The pass itself is the same for both. `BlockStream.run` goes forward: each block's
statistics go out to a handler, and the tensors that it returns take the place of the block's own. `BlockStream.back`
carries gradients back to the first block for a few probes. All state is in a work folder: hidden states as files, so
that the page cache decides what stays in memory, and one JSON file for each direction, which is written after each
block. A killed run continues with the block that it was in. This module does not know rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import Advance, Progress
from internvl_edge.checkpoint.kv_scales import KvScales

from .blocks import no_observer
from .models import Blocks
from .statistics import InputStatistics, Observer, StatisticsRequest
from .work import WorkFolder

Statistics = Mapping[str, InputStatistics]
# Takes the index of a block and the statistics of its inputs, and returns the tensors that replace the block's own in
# the rest of the pass, by their names in the block, or None. It stores its own results. It can be called again for a
# block whose results it has stored already.
Handler = Callable[[int, Statistics], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Probe:
    """One item on the way back through a block.

    Attributes:
        item: its index.
        x: what goes into the block, [rows, width] float32.
        gradients: [draws, rows, width] float32 at the output.
    """

    item: int
    x: Tensor
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
        layers = [self._work.need_arrays(self._arrays("cache", index)) for index in range(len(self.blocks.names))]
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

        Gradients are computed in the compute type: few of them are an estimate whose own error is far larger.

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
                    self._work.write_arrays(self._arrays("gradient", index), before)
                self._work.write_json(state, {"left": index, "found": found})
                for name in (self._arrays("gradient", index + 1), self._arrays("probe", index + 1)):
                    self._work.remove(name)
                advance(1)
        return found

    def output(self, item: int) -> Tensor:
        """Return what came out of the last block for one of the probes, [rows, width] float32; after `run`."""
        return self._tensor(self._work.need_arrays(self._arrays("probe", len(self.blocks.names)))[str(item)])

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
                self._work.write_arrays(self._arrays("probe", index + 1), probes)
            if ranges:
                self._work.write_arrays(self._arrays("cache", index), ranges.arrays())
        return observer.inputs

    def _announce(self, observer: Observer, items: range, lengths: Sequence[int], offset: int) -> None:
        observer.begin(offset, [(self.blocks.owners[item], lengths[item]) for item in items])

    # -- back -------------------------------------------------------------------------------------------------------

    def _probes_at(
        self, index: int, start: Callable[[int], Tensor], before: dict[str, NDArray[Any]]
    ) -> Iterator[Probe]:
        """Yield the probes at a block, and fill `before` with their gradients at its input."""
        weights = self.blocks.load(index) if index else {}
        last = index + 1 == len(self.blocks.names)
        behind = {} if last else self._work.need_arrays(self._arrays("gradient", index + 1))
        inputs = self._work.need_arrays(self._arrays("probe", index)) if index else {}
        for item in self.probes:
            items = range(item, item + 1)
            gradients = start(item) if last else self._tensor(behind[str(item)])
            x = self._tensor(inputs[str(item)]) if index else self.blocks.first(items)
            if index:
                with torch.enable_grad():
                    y = self.blocks.run(index, weights, x.requires_grad_(), items)
                pulled = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in gradients]
                before[str(item)] = torch.stack(pulled).cpu().numpy()
            yield Probe(item, x.detach(), gradients)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.blocks.compute.device)

    def _hidden(self, index: int) -> str:
        return f"{self._label}-hidden-{index}.f32"

    def _arrays(self, kind: str, index: int) -> str:
        return f"{self._label}-{kind}-{index}.npz"


def _without(chunk: range, held_out: Collection[int]) -> Iterator[range]:
    """Yield the ranges of items in a chunk that remain without the held-out ones."""
    start = chunk.start
    for index in [*(index for index in chunk if index in held_out), chunk.stop]:
        if index > start:
            yield range(start, index)
        start = index + 1
