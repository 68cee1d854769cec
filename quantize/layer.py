"""One decoder layer (or lm_head) -> its packed linears, by the recipe.

Knows the order of steps: choose all input scales, fold them into their producers, clip, round. Does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.calibration.compute import Compute, to_numpy, to_torch
from internvl_edge.calibration.statistics import InputStatistics, Wanted, whole_gram
from internvl_edge.calibration.weights import require_finite
from internvl_edge.checkpoint import Checkpoint
from internvl_edge.linear import PackedLinear, Scheme
from internvl_edge.recipe import Recipe

from .awq import block_gram, search_clipping, search_scale
from .compensation import compensated_rounding, inverse_factor
from .folding import HEAD_GROUP, SCALE_GROUPS, ScaleGroup, reduce_channels, spread_channels, storable_scale
from .grid import minmax_grid

_SUBSET_TOKENS = 1024
_REPORT_ROWS = 256
# lm_head has as many outputs as there are tokens; they are rounded this many at a time.
_ROWS = 16384


@dataclass
class QuantisedBlock:
    """What becomes of one block's tensors, by canonical name.

    Attributes:
        linears: the packed linears, by module ("decoder.layers.0.mlp.up_proj").
        tensors: float tensors that change (norms, biases), in their stored type.
        errors: relative output error on calibration tokens, by module: sqrt(|X (W' - W)|^2 / |X W|^2).
    """

    linears: dict[str, PackedLinear] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def replacements(self, prefix: str, compute: Compute) -> dict[str, Tensor]:
        """The block's changed tensors as calibration computes with them, by their name below `prefix`."""
        floats = {name: to_torch(array).float() for name, array in self.tensors.items()}
        weights = {f"{name}.weight": to_torch(packed.dequantise()) for name, packed in self.linears.items()}
        biases = {name: tensor for name, tensor in floats.items() if name.endswith(".bias")}
        multiplied = {name: tensor.to(compute.dtype) for name, tensor in (weights | biases).items()}
        return {name.removeprefix(prefix): tensor.to(compute.device) for name, tensor in (floats | multiplied).items()}


class BlockQuantiser:
    """Quantises blocks of one checkpoint by one recipe; `scale_dtype` is how scales will be stored."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, compute: Compute, scale_dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._device = compute.device
        self._scale_dtype = scale_dtype
        self._scheme = decoder_scheme(recipe)

    @property
    def wanted(self) -> Wanted:
        """The statistics that `layer` and `head` need."""
        return Wanted(gram=self._recipe.error_compensation, tokens=_SUBSET_TOKENS)

    def layer(self, number: int, statistics: Mapping[str, InputStatistics] | None) -> QuantisedBlock:
        """One decoder layer; w4a16-awq needs the statistics of its inputs."""
        prefix = f"decoder.layers.{number}."
        groups = SCALE_GROUPS[self._checkpoint.config.decoder.architecture]
        if not self._recipe.needs_data:
            block = QuantisedBlock()
            for name in (name for group in groups for name in group.consumers):
                block.linears[prefix + name] = self._rounded(prefix + name, self._scheme)
            return block
        assert statistics is not None
        return self._activation_aware(prefix, groups, statistics, self._scheme)

    def head(self, inputs: InputStatistics | None) -> QuantisedBlock:
        """lm_head; as int4 of w4a16-awq it needs the statistics of its input."""
        if self._recipe.lm_head == "int4" and self._recipe.needs_data:
            assert inputs is not None
            return self._activation_aware("decoder.", [HEAD_GROUP], {"lm_head": inputs}, self._scheme)
        scheme = Scheme(8, None, symmetric=True) if self._recipe.lm_head == "int8" else self._scheme
        return QuantisedBlock({"decoder.lm_head": self._rounded("decoder.lm_head", scheme)})

    def _rounded(self, name: str, scheme: Scheme) -> PackedLinear:
        """Rounding alone."""
        weight = self._float(f"{name}.weight")
        grid = minmax_grid(weight, scheme, self._scale_dtype)
        return grid.pack(grid.round(weight))

    def _activation_aware(
        self,
        prefix: str,
        groups: Sequence[ScaleGroup],
        statistics: Mapping[str, InputStatistics],
        scheme: Scheme,
    ) -> QuantisedBlock:
        block = QuantisedBlock()
        input_scales: dict[str, Tensor] = {}
        output_scales: dict[str, Tensor] = {}
        for group in groups:
            inputs = statistics[group.consumers[0]]
            if inputs.gram is not None:
                whole_gram(inputs.gram)
            scale = self._search(prefix, group, inputs, scheme)
            producer_scale = self._fold(prefix, group, scale, block)
            input_scales[group.consumers[0]] = spread_channels(producer_scale, group, self._checkpoint.config.decoder)
            output_scales[group.producer] = producer_scale
        for group in groups:
            inputs, scale = statistics[group.consumers[0]], input_scales[group.consumers[0]]
            self._round_group(prefix, group, inputs, scale, output_scales, scheme, block)
        return block

    def _search(self, prefix: str, group: ScaleGroup, inputs: InputStatistics, scheme: Scheme) -> Tensor:
        """The scale per producer channel."""
        decoder = self._checkpoint.config.decoder
        weights = [self._float(f"{prefix}{name}.weight") for name in group.consumers]
        choice = search_scale(
            weights,
            inputs,
            scheme,
            self._scale_dtype,
            spread=lambda values: spread_channels(values, group, decoder),
            reduce=lambda values: reduce_channels(values, group, decoder),
        )
        return reduce_channels(choice.scale, group, decoder)

    def _fold(self, prefix: str, group: ScaleGroup, scale: Tensor, block: QuantisedBlock) -> Tensor:
        """Divide what is stored of the producer; returns the scale that this made exact."""
        name = f"{prefix}{group.producer}." + ("weight" if "norm" in group.producer else "bias")
        stored = to_torch(self._checkpoint.tensor(name)).to(self._device) if self._checkpoint.has(name) else None
        fitted, divided = storable_scale(scale, stored)
        if divided is not None:
            block.tensors[name] = to_numpy(divided)
        return fitted

    def _round_group(
        self,
        prefix: str,
        group: ScaleGroup,
        inputs: InputStatistics,
        scale: Tensor,
        output_scales: Mapping[str, Tensor],
        scheme: Scheme,
        block: QuantisedBlock,
    ) -> None:
        """Clip and round the consumers of one input; `scale` is theirs, `output_scales` what they were folded with."""
        assert scheme.group_size is not None
        blocks = block_gram(inputs, scale, scheme.group_size)
        factor = None
        if inputs.gram is not None:
            inputs.gram.div_(scale[:, None]).div_(scale)
            factor = inverse_factor(inputs.gram)
            inputs.gram = None
        for name in group.consumers:
            weight = self._float(f"{prefix}{name}.weight") * scale
            if name in output_scales:
                weight /= output_scales[name][:, None]
            packed = []
            total = torch.zeros(2, dtype=torch.float64)
            for rows in torch.split(weight, _ROWS):
                grid = search_clipping(rows, blocks, scheme, self._scale_dtype)
                q = grid.round(rows) if factor is None else compensated_rounding(rows, grid, *factor)
                total += _energies(rows, grid.dequantise(q), inputs, scale)
                packed.append(grid.pack(q))
            block.linears[prefix + name] = join_rows(packed)
            block.errors[prefix + name] = float((total[0] / total[1].clamp(min=1e-30)).sqrt())

    def _float(self, name: str) -> Tensor:
        tensor = to_torch(self._checkpoint.tensor(name))
        require_finite(tensor, name)
        return tensor.to(self._device, torch.float32, copy=True)


def decoder_scheme(recipe: Recipe) -> Scheme:
    """How the decoder's weights are rounded."""
    if recipe.bits == 8:
        return Scheme(8, None, symmetric=True)
    return Scheme(4, recipe.group_size, recipe.symmetric)


def join_rows(parts: Sequence[PackedLinear]) -> PackedLinear:
    """Layers with the same inputs, one below the other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return PackedLinear(
        values=np.concatenate([part.values for part in parts]),
        scale=np.concatenate([part.scale for part in parts]),
        zero_point=np.concatenate(zeros) if zeros else None,
        bits=parts[0].bits,
    )


def _energies(weight: Tensor, rounded: Tensor, inputs: InputStatistics, scale: Tensor) -> Tensor:
    """Squared size of the output's error and of the output, on the token subset and some of the rows."""
    assert inputs.subset is not None
    tokens = (inputs.subset.float() / scale).T
    step = max(1, len(weight) // _REPORT_ROWS)
    error, output = (rounded - weight)[::step] @ tokens, weight[::step] @ tokens
    return torch.stack([part.square().sum(dtype=torch.float64) for part in (error, output)]).cpu()
