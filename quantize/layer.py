"""Quantize one decoder layer (or lm_head): each linear gets the precision that the plan gives it.

This module knows the order of steps: choose all input scales, fold them into their producers, clip, round. It does not
know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from internvl_edge.calibration.block_weights import require_finite
from internvl_edge.calibration.compute import Compute, to_numpy, to_torch
from internvl_edge.calibration.statistics import InputStatistics, StatisticsRequest, symmetrize
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import LinearReport
from internvl_edge.model.components import bits_per_weight
from internvl_edge.model.linear import PackedLinear, concatenate
from internvl_edge.recipe.recipe import Precision, Recipe

from .awq import block_gram, search_clipping, search_scale
from .block import QuantizedBlock, computed
from .compensation import compensated_rounding, inverse_factor
from .folding import HEAD_GROUP, SCALE_GROUPS, ScaleGroup, reduce_channels, spread_channels, storable_scale
from .grid import Grid, minmax_grid
from .integer import best_strength, quantize_linear, round_inputs
from .linear_report import OutputComparison, activation_range
from .plan import Choice, Plan, plan_decoder
from .smoothing import STRENGTHS, power_of_two, smoothing_scale

_SUBSET_TOKENS = 1024
_REPORT_ROWS = 256
# The number of outputs on which smoothing strengths are compared.
_SMOOTHING_ROWS = 1024
# lm_head has one output per token of the vocabulary, so its rows are rounded this many at a time.
_ROWS = 16384
_COMPENSATED = ("w4a16-awq", "w8a16")


@dataclass(frozen=True)
class _Shared:
    """The values that the consumers of one input share.

    Attributes:
        inputs: statistics, before scaling.
        scale: [in] that weights are multiplied by, or None.
        blocks: Gram matrices of scaled inputs by group size, for clipping.
        factor: for error compensation, or None.
        integers: packed w8a8 consumers by name. They are rounded together.
    """

    inputs: InputStatistics
    scale: Tensor | None
    blocks: Mapping[int, Tensor]
    factor: tuple[Tensor, Tensor] | None
    integers: Mapping[str, PackedLinear]


class BlockQuantizer:
    """Quantizes the blocks of one checkpoint.

    Args:
        checkpoint: with float weights.
        recipe: how to round.
        compute: device.
        scale_dtype: stored type of the scales of packed weights.
        plan: the choice for each linear; default: the recipe's plan, without an automatic choice.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        compute: Compute,
        scale_dtype: torch.dtype,
        plan: Plan | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._decoder = checkpoint.config.decoder
        self._recipe = recipe
        self._device = compute.device
        self._scale_dtype = scale_dtype
        self._plan = {**(plan or plan_decoder(checkpoint, recipe)), "decoder.lm_head": Choice(recipe.head)}

    @property
    def wanted(self) -> StatisticsRequest:
        """The statistics that `layer` needs."""
        return StatisticsRequest(
            gram=self._recipe.error_compensation and self._compensates(self._plan), tokens=_SUBSET_TOKENS
        )

    @property
    def head_request(self) -> StatisticsRequest:
        """The statistics that `head` needs."""
        precision = self._precision("decoder.lm_head")
        gram = self._recipe.error_compensation and precision.method == "w4a16-awq"
        return StatisticsRequest(gram=gram, tokens=_SUBSET_TOKENS)

    def layer(self, number: int, statistics: Mapping[str, InputStatistics] | None) -> QuantizedBlock:
        """Quantize one decoder layer. Without statistics of its inputs, only round it to the nearest values."""
        groups = SCALE_GROUPS[self._decoder.architecture]
        return self._block(f"decoder.layers.{number}.", groups, statistics)

    def head(self, inputs: InputStatistics | None) -> QuantizedBlock:
        """Quantize lm_head. Without statistics of its inputs, only round it to the nearest values."""
        return self._block("decoder.", [HEAD_GROUP], None if inputs is None else {"lm_head": inputs})

    def only_unit(self, prefix: str, group: ScaleGroup, block: QuantizedBlock) -> dict[str, Tensor]:
        """Return the tensors that round the consumers of one input and nothing else, from a block that `layer` made.

        They are float32, by their name below `prefix`. The consumers are in the form that calibration computes with.
        Where the scale of another input divided their rows, that division is undone. The producer of the unit's own
        input is divided, exactly in float32.
        """
        tensors: dict[str, Tensor] = {}
        for name in group.consumers:
            if prefix + name not in block.linears:
                continue
            parts = {k: v.to(self._device) for k, v in computed(block.linears[prefix + name], torch.float32).items()}
            if (rows := block.scales.get(prefix + name)) is not None:
                last = "weight_scale" if "weight_scale" in parts else "weight"
                parts[last] = parts[last] * (rows if parts[last].ndim == 1 else rows[:, None])
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        produced = block.scales.get(prefix + group.producer)
        if produced is not None:
            for part in ("weight", "bias"):
                if self._checkpoint.has(f"{prefix}{group.producer}.{part}"):
                    tensor = self._float(f"{prefix}{group.producer}.{part}")
                    divisor = produced if tensor.ndim == 1 else produced[:, None]
                    tensors[f"{group.producer}.{part}"] = tensor / divisor
        return tensors

    def _compensates(self, names: Sequence[str] | Plan) -> bool:
        layers = [name for name in names if name.startswith("decoder.layers.")]
        return any(self._precision(name).method in _COMPENSATED for name in layers)

    def _precision(self, name: str) -> Precision:
        return self._plan[name].precision

    def _block(
        self, prefix: str, groups: Sequence[ScaleGroup], statistics: Mapping[str, InputStatistics] | None
    ) -> QuantizedBlock:
        block = QuantizedBlock()
        if statistics is None:
            for name in (prefix + name for group in groups for name in group.consumers):
                self._round_alone(name, block)
            return block
        for group in groups:
            inputs = statistics[group.consumers[0]]
            if inputs.gram is not None:
                symmetrize(inputs.gram)
            scale = self._search(prefix, group, inputs)
            if scale is not None:
                block.scales[prefix + group.producer] = self._fold(prefix, group, scale, block)
        for group in groups:
            self._round_group(prefix, group, statistics[group.consumers[0]], block)
        return block

    # -- scales -----------------------------------------------------------------------------------------------------

    def _search(self, prefix: str, group: ScaleGroup, inputs: InputStatistics) -> Tensor | None:
        """Return the scale per producer channel, or None where no consumer needs one.

        Where a float weight is multiplied or divided, scales are powers of two, so that it stays exact.
        """
        precisions = {prefix + name: self._precision(prefix + name) for name in group.consumers}
        methods = {precision.method for precision in precisions.values()}
        if "w8a8" in methods:
            names = [name for name, precision in precisions.items() if precision.method == "w8a8"]
            return self._smoothing(prefix, group, names, inputs) if self._recipe.decoder_int8.smoothing else None
        if "w4a16-awq" not in methods:
            return None
        rounded = {name: p.scheme for name, p in precisions.items() if p.scheme is not None}
        found = search_scale(
            [self._float(f"{name}.weight") for name in rounded],
            inputs,
            list(rounded.values()),
            self._scale_dtype,
            spread=lambda values: spread_channels(values, group, self._decoder),
            reduce=lambda values: reduce_channels(values, group, self._decoder),
        )
        scale = reduce_channels(found, group, self._decoder)
        producer = self._plan.get(prefix + group.producer)
        floats = len(rounded) < len(precisions) or (producer is not None and producer.precision.scheme is None)
        return power_of_two(scale) if floats else scale

    def _smoothing(
        self, prefix: str, group: ScaleGroup, names: Sequence[str], inputs: InputStatistics
    ) -> Tensor | None:
        """Return SmoothQuant's scale per producer channel for consumers with int8 inputs, or None where none helps."""
        weight = torch.cat([self._float(f"{name}.weight") for name in names])
        largest = reduce_channels(inputs.max_abs, group, self._decoder, largest=True)
        weights = reduce_channels(weight.abs().amax(0), group, self._decoder, largest=True)
        stored = self._vector(prefix, group)
        vectors = [] if stored is None else [stored]
        tried = {strength: smoothing_scale(largest, weights, strength, vectors) for strength in STRENGTHS}
        some = weight[:: max(1, len(weight) // _SMOOTHING_ROWS)]
        spread = {strength: spread_channels(scale, group, self._decoder) for strength, scale in tried.items()}
        return tried.get(best_strength(some, inputs, spread, per_token=True))

    def _fold(self, prefix: str, group: ScaleGroup, scale: Tensor, block: QuantizedBlock) -> Tensor:
        """Divide the producer's stored vector (norm weight or bias) by the scale.

        Return the scale that makes this exact.
        """
        fitted, divided = storable_scale(scale, self._vector(prefix, group))
        if divided is not None:
            block.tensors[_vector_name(prefix, group)] = to_numpy(divided)
        return fitted

    def _vector(self, prefix: str, group: ScaleGroup) -> Tensor | None:
        """Return the stored norm weight or linear bias that an input's scale divides, or None where there is none."""
        name = _vector_name(prefix, group)
        return to_torch(self._checkpoint.tensor(name)).to(self._device) if self._checkpoint.has(name) else None

    # -- rounding ---------------------------------------------------------------------------------------------------

    def _round_alone(self, name: str, block: QuantizedBlock) -> None:
        """Round a linear to the nearest values, without calibration data."""
        precision = self._precision(name)
        if precision.scheme is not None:
            weight = self._float(f"{name}.weight")
            grid = minmax_grid(weight, precision.scheme, self._scale_dtype)
            block.linears[name] = grid.pack(grid.round(weight))
        block.reports[name] = self._report(name)

    def _round_group(self, prefix: str, group: ScaleGroup, inputs: InputStatistics, block: QuantizedBlock) -> None:
        """Clip and round all consumers of one input."""
        produced = block.scales.get(prefix + group.producer)
        scale = None if produced is None else spread_channels(produced, group, self._decoder)
        names = [prefix + name for name in group.consumers]
        shared = self._share(names, inputs, scale, block)
        for name in names:
            precision, weight = self._precision(name), self._scaled(name, scale, block)
            comparison = OutputComparison()
            if precision.method == "w8a8":
                self._compare_integers(shared, name, weight, comparison)
                block.linears[name] = shared.integers[name]
            elif precision.scheme is not None:
                block.linears[name] = self._packed(precision, weight, shared, comparison)
            elif scale is not None or name in block.scales:
                stored = to_torch(self._checkpoint.tensor(f"{name}.weight")).dtype
                block.tensors[f"{name}.weight"] = to_numpy(weight.to(stored))
            packed = block.linears.get(name)
            block.reports[name] = self._report(name, inputs, packed, comparison if packed else None)

    def _share(
        self, names: Sequence[str], inputs: InputStatistics, scale: Tensor | None, block: QuantizedBlock
    ) -> _Shared:
        precisions = {name: self._precision(name) for name in names}
        ones = torch.ones_like(inputs.max_abs) if scale is None else scale
        clipped = [p.scheme.group_size for p in precisions.values() if p.method == "w4a16-awq" and p.scheme]
        blocks = {size: block_gram(inputs, ones, size) for size in set(clipped) if size is not None}
        factor = None
        if inputs.gram is not None and any(p.method in _COMPENSATED for p in precisions.values()):
            inputs.gram.div_(ones[:, None]).div_(ones)
            factor = inverse_factor(inputs.gram)
        inputs.gram = None
        integers = {}
        if rounded := [name for name, precision in precisions.items() if precision.method == "w8a8"]:
            weights = [self._scaled(name, scale, block) for name in rounded]
            how = self._recipe.decoder_int8
            made = quantize_linear(torch.cat(weights), divided(inputs, scale), how.calibrator, None, True).packed
            starts = np.cumsum([0, *(len(weight) for weight in weights)])
            rows = [np.arange(start, stop) for start, stop in pairwise(starts)]
            integers = {name: made.rows(index) for name, index in zip(rounded, rows, strict=True)}
        return _Shared(inputs, scale, blocks, factor, integers)

    def _packed(
        self, precision: Precision, weight: Tensor, shared: _Shared, comparison: OutputComparison
    ) -> PackedLinear:
        """Return a linear with integer weights and float inputs. `weight` is scaled already."""
        packed = []
        tokens = _tokens(shared).T
        for rows in torch.split(weight, _ROWS):
            grid = self._grid(precision, rows, shared)
            compensated = shared.factor is not None and precision.method in _COMPENSATED
            q = compensated_rounding(rows, grid, *shared.factor) if compensated and shared.factor else grid.round(rows)
            some = slice(None, None, max(1, len(rows) // _REPORT_ROWS))
            comparison.add(rows[some] @ tokens, grid.dequantize(q)[some] @ tokens)
            packed.append(grid.pack(q))
        return concatenate(packed)

    def _grid(self, precision: Precision, weight: Tensor, shared: _Shared) -> Grid:
        scheme = precision.scheme
        assert scheme is not None
        if precision.method == "w4a16-awq" and scheme.group_size is not None:
            return search_clipping(weight, shared.blocks[scheme.group_size], scheme, self._scale_dtype)
        return minmax_grid(weight, scheme, self._scale_dtype)

    def _compare_integers(self, shared: _Shared, name: str, weight: Tensor, comparison: OutputComparison) -> None:
        linear = shared.integers[name]
        assert linear.input_scale is not None
        some = slice(None, None, max(1, len(weight) // _REPORT_ROWS))
        tokens = _tokens(shared)
        values = torch.from_numpy(linear.dequantize()[some]).to(self._device)
        found = round_inputs(tokens, linear.input_scale) @ values.T * linear.input_scale
        comparison.add(tokens @ weight[some].T, found)

    def _report(
        self,
        name: str,
        inputs: InputStatistics | None = None,
        packed: PackedLinear | None = None,
        comparison: OutputComparison | None = None,
    ) -> LinearReport:
        choice = self._plan[name]
        scheme = choice.precision.scheme
        width = self._checkpoint.shapes[f"{name}.weight"][1]
        stored = self._checkpoint.tensor(f"{name}.weight").dtype
        bits = bits_per_weight(scheme, width, 8 * self._scale_dtype.itemsize) if scheme else 8 * stored.itemsize
        clipped = None if packed is None or packed.input_scale is None else 127 * packed.input_scale
        return LinearReport(
            name=name,
            dtype=stored.name,
            scheme=scheme,
            bits_per_weight=round(bits, 3),
            error=comparison.error if comparison else None,
            sqnr_db=comparison.sqnr_db if comparison else None,
            cosine=comparison.cosine if comparison else None,
            part=choice.part,
            reason=choice.reason,
            inputs=activation_range(inputs, clipped) if inputs is not None else None,
        )

    # -- weights ----------------------------------------------------------------------------------------------------

    def _scaled(self, name: str, scale: Tensor | None, block: QuantizedBlock) -> Tensor:
        """Return a weight [out, in] float32, multiplied by its input's scale and divided by its outputs' scale."""
        weight = self._float(f"{name}.weight")
        if scale is not None:
            weight *= scale
        if name in block.scales:
            weight /= block.scales[name][:, None]
        return weight

    def _float(self, name: str) -> Tensor:
        tensor = to_torch(self._checkpoint.tensor(name))
        require_finite(tensor, name)
        return tensor.to(self._device, torch.float32, copy=True)


def divided(inputs: InputStatistics, scale: Tensor | None) -> InputStatistics:
    """Return the statistics of inputs after division by `scale` [in], without their Gram matrix."""
    if scale is None:
        return replace(inputs, gram=None)
    return InputStatistics(
        count=inputs.count,
        sum_abs=inputs.sum_abs / scale,
        max_abs=inputs.max_abs / scale,
        subset=None if inputs.subset is None else inputs.subset.float() / scale,
    )


def _vector_name(prefix: str, group: ScaleGroup) -> str:
    return f"{prefix}{group.producer}." + ("weight" if "norm" in group.producer else "bias")


def _tokens(shared: _Shared) -> Tensor:
    """Return the token subset after scaling, [tokens, in] float32."""
    assert shared.inputs.subset is not None
    tokens = shared.inputs.subset.float()
    return tokens if shared.scale is None else tokens / shared.scale
