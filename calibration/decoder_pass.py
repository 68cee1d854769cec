"""The decoder half of a calibration run: pass all samples through one layer after another.

Each layer's statistics go out to a handler, and its quantized weights come back. One layer's tensors are in memory at a
time. Hidden states are in memory-mapped files, so that the page cache decides what stays in memory. The state is saved
after each layer. A killed run continues with the layer that it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.progress import Advance
from internvl_edge.checkpoint.kv_scales import KvScales
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.rope import RotaryAngles

from .block_weights import load_block, load_tensor
from .blocks import decoder_block, no_observer, rms_norm
from .cache_ranges import CacheRanges
from .compute import Compute
from .dataset import CalibrationSet
from .statistics import InputStatistics, Observer, StatisticsRequest
from .work import WorkFolder

_STATE = "decoder.json"
# The number of tokens that go through a layer together: enough for efficient matrix products in little memory.
_CHUNK_TOKENS = 2048

Statistics = Mapping[str, InputStatistics]
# Takes a layer and the statistics of its inputs, and returns the tensors that replace the layer's own in the rest of
# the pass, or None. It stores its own results. It can be called again for a layer whose results it has stored already.
LayerHandler = Callable[[int, Statistics], Mapping[str, Tensor] | None]


class DecoderPass:
    """A resumable pass of a calibration set through a decoder.

    The `label` separates several passes in one work folder. The samples in `held_out` pass through the decoder, but are
    not part of the statistics.
    """

    def __init__(
        self,
        work: WorkFolder,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        compute: Compute,
        progress: Advance,
        label: str = "",
        held_out: Collection[int] = (),
    ) -> None:
        self._work = work
        self._label = label
        self._held_out = frozenset(held_out)
        self._checkpoint = checkpoint
        self._config = checkpoint.config.decoder
        self._calibration = calibration
        self._compute = compute
        self._progress = progress
        self._angles = RotaryAngles(self._config)
        self._chunks = calibration.chunks(_CHUNK_TOKENS)
        self._starts = np.concatenate([[0], np.cumsum(calibration.lengths)]).astype(int)

    @staticmethod
    def steps(calibration: CalibrationSet, layers: int) -> int:
        """Return the total number of progress steps: tokens x layers x 2 (observe, propagate)."""
        return calibration.total * layers * 2

    @torch.no_grad()
    def run(self, wanted: StatisticsRequest, handle: LayerHandler) -> None:
        """Run all layers. For each, collect statistics, call `handle`, and propagate with the tensors that it returns.

        Raises:
            EdgeError: NaN or infinity; the message names layer, tensor and sample.
        """
        state = self._label + _STATE
        done = int((self._work.read_json(state) or {"layers": 0})["layers"])
        self._progress(done * self._calibration.total * 2)
        for layer in range(done, self._config.num_hidden_layers):
            replaced = handle(layer, self._observe(layer, wanted))
            self._propagate(layer, replaced or {})
            self._work.write_json(state, {"layers": layer + 1})
            if layer:
                self._work.remove(self._hidden(layer))

    @torch.no_grad()
    def observe_head(self, wanted: StatisticsRequest) -> InputStatistics:
        """Return the statistics of lm_head's input. Call it after `run`."""
        weight = load_tensor(self._checkpoint, "decoder.norm.weight", self._compute)
        observer = Observer("decoder", self._calibration.total, wanted)
        for chunk in self._chunks:
            x = self._read(self._config.num_hidden_layers, chunk)
            self._announce(observer, chunk, int(self._starts[chunk.start]))
            observer("lm_head", rms_norm(x, weight, self._config.rms_norm_eps).to(self._compute.dtype))
        return observer.inputs["lm_head"]

    def inputs(self, layer: int, sample: int) -> Tensor:
        """Return the input of a layer for one sample, [tokens, hidden] float32.

        It exists while `handle` works on that layer. After `run`, the index one past the last layer gives the last
        output.
        """
        return self._read(layer, range(sample, sample + 1))

    def rotary(self, sample: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of one sample's positions, [tokens, head_dim / 2] float32."""
        return self._rotary([self._calibration.lengths[sample]])

    def forget(self) -> None:
        """Delete the hidden states behind the last layer."""
        self._work.remove(self._hidden(self._config.num_hidden_layers))

    def kv_scales(self) -> KvScales:
        """Scales of an int8 KV cache that reach what went into it; after `run`."""
        layers = (self._work.need_arrays(f"cache-{n}.npz") for n in range(self._config.num_hidden_layers))
        ranges = [(layer["keys"], layer["values"]) for layer in layers]
        keys, values = (np.stack(arrays) for arrays in zip(*ranges, strict=True))
        return KvScales.from_ranges(keys, values)

    def _observe(self, layer: int, wanted: StatisticsRequest) -> Statistics:
        name = f"decoder.layers.{layer}"
        weights = load_block(self._checkpoint, f"{name}.", self._compute)
        held_out = sum(self._calibration.lengths[index] for index in self._held_out)
        observer = Observer(name, self._calibration.total - held_out, wanted)
        seen = 0
        for chunk in self._chunks:
            for run in _without(chunk, self._held_out):
                x = self._read(layer, run)
                self._announce(observer, run, seen)
                seen += len(x)
                lengths = [self._calibration.lengths[index] for index in run]
                decoder_block(weights, x, lengths, self._rotary(lengths), self._config, observer, output=False)
            self._progress(sum(self._calibration.lengths[index] for index in chunk))
        return observer.inputs

    def _propagate(self, layer: int, replaced: Mapping[str, Tensor]) -> None:
        name = f"decoder.layers.{layer}"
        weights = load_block(self._checkpoint, f"{name}.", self._compute) | dict(replaced)
        observer = Observer(name, self._calibration.total, StatisticsRequest())
        ranges = CacheRanges(self._config, self._compute.device)
        # Written, not mapped: a full disk is then an error and not a crash.
        with self._work.writing(self._hidden(layer + 1)) as new, new.open("wb") as file:
            for chunk in self._chunks:
                x = self._read(layer, chunk)
                self._announce(observer, chunk, int(self._starts[chunk.start]))
                lengths = [self._calibration.lengths[index] for index in chunk]
                rotary = self._rotary(lengths)
                x = decoder_block(weights, x, lengths, rotary, self._config, no_observer, observe_cache=ranges.add)
                observer.check("the output", x)
                file.write(x.cpu().numpy().data)
                self._progress(len(x))
            self._work.write_arrays(f"cache-{layer}.npz", ranges.arrays())

    def _hidden(self, layer: int) -> str:
        return f"{self._label}hidden-{layer}.f32"

    def _rows(self, chunk: range) -> slice:
        return slice(self._starts[chunk.start], self._starts[chunk.stop])

    def _read(self, layer: int, chunk: range) -> Tensor:
        """Return the input of a layer for a range of samples, [tokens, hidden] float32."""
        states: NDArray[np.float32]
        if layer == 0:
            states = self._calibration.embeddings()
        else:
            shape = (self._calibration.total, self._config.hidden_size)
            states = np.memmap(self._work.need(self._hidden(layer)), np.float32, "r", shape=shape)
        return torch.from_numpy(np.array(states[self._rows(chunk)])).to(self._compute.device)

    def _announce(self, observer: Observer, chunk: range, offset: int) -> None:
        samples = [(self._calibration.names[index], self._calibration.lengths[index]) for index in chunk]
        observer.begin(offset, samples)

    def _rotary(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        tables = [self._angles.at(0, length, length) for length in lengths]
        cos, sin = (np.concatenate([table[part] for table in tables]) for part in (0, 1))
        return torch.from_numpy(cos).to(self._compute.device), torch.from_numpy(sin).to(self._compute.device)


def _without(chunk: range, held_out: Collection[int]) -> Iterator[range]:
    """Yield the ranges of samples in a chunk that remain without the held-out ones."""
    start = chunk.start
    for index in [*(index for index in chunk if index in held_out), chunk.stop]:
        if index > start:
            yield range(start, index)
        start = index + 1
