"""The decoder half of a calibration run: layer by layer over all samples, statistics out, quantized weights in.

One layer's tensors are in memory at a time; hidden states lie in memory-mapped files, so that the page cache decides
what stays in memory. After each layer the state is saved: a killed run continues with the layer it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
# Tokens that go through a layer together: enough for matrix products to be efficient, little memory.
_CHUNK_TOKENS = 2048

Statistics = Mapping[str, InputStatistics]
# (layer, statistics of its inputs) -> the tensors that replace the layer's own for what follows, or None for none.
# It stores its own results, and may be called again for a layer whose results it has stored already.
LayerHandler = Callable[[int, Statistics], Mapping[str, Tensor] | None]
Progress = Callable[[int], object]


class DecoderPass:
    """A resumable pass of a calibration set through a decoder.

    `label` keeps several in one work folder apart; the samples `held_out` pass through, but no statistics know them.
    """

    def __init__(
        self,
        work: WorkFolder,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        compute: Compute,
        progress: Progress,
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
        """Units of progress in all: tokens x layers x 2 (observe, propagate)."""
        return calibration.total * layers * 2

    @torch.no_grad()
    def run(self, wanted: StatisticsRequest, handle: LayerHandler) -> None:
        """Take every layer: gather what is wanted, let `handle` do its work, propagate through what it returns.

        Raises:
            EdgeError: NaN or infinity, named by layer, tensor and sample.
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
        """Statistics of the input of lm_head; after `run`."""
        weight = load_tensor(self._checkpoint, "decoder.norm.weight", self._compute)
        observer = Observer("decoder", self._calibration.total, wanted)
        for chunk in self._chunks:
            x = self._read(self._config.num_hidden_layers, chunk)
            self._announce(observer, chunk, int(self._starts[chunk.start]))
            observer("lm_head", rms_norm(x, weight, self._config.rms_norm_eps).to(self._compute.dtype))
        return observer.inputs["lm_head"]

    def inputs(self, layer: int, sample: int) -> Tensor:
        """Input of a layer for one sample, [tokens, hidden] float32; while `handle` has it, or behind the last."""
        return self._read(layer, range(sample, sample + 1))

    def rotary(self, sample: int) -> tuple[Tensor, Tensor]:
        """cos and sin of one sample's positions, [tokens, head_dim / 2] float32."""
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
        """Input of a layer for a run of samples, [tokens, hidden] float32."""
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
    """The runs of samples that are left of a chunk."""
    start = chunk.start
    for index in [*(index for index in chunk if index in held_out), chunk.stop]:
        if index > start:
            yield range(start, index)
        start = index + 1
