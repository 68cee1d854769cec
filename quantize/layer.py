"""Quantize one decoder layer (or lm_head) in two steps: choose and fold all input scales; then clip and round.

Each linear gets the precision that the plan gives it, and what is done to it stands in its row of `recipe.METHODS`.
This module does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.block_weights import require_finite
from internvl_edge.calibration.compute import Compute, is_finite, to_numpy, to_torch
from internvl_edge.calibration.statistics import InputStatistics, StatisticsRequest, symmetrize
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import LinearReport
from internvl_edge.model.components import bits_per_weight
from internvl_edge.model.linear import PackedLinear, concatenate
from internvl_edge.recipe.recipe import Precision, Recipe

from .awq import search_scale
from .block import Latent, QuantizedBlock, computed
from .folding import HEAD_GROUP, SCALE_GROUPS, ScaleGroup, reduce_channels, spread_channels, storable_scale
from .integer import best_strength, quantize_linear, round_inputs
from .linear_report import OutputComparison, activation_range
from .plan import Choice, Plan
from .rounding import (
    Grid,
    GridKind,
    block_gram,
    compensated_rounding,
    feedback_factor,
    minmax_grid,
    near,
    search_clipping,
)
from .smoothing import STRENGTHS, power_of_two, smoothing_scale

_SUBSET_TOKENS = 1024
_REPORT_ROWS = 256
# The number of outputs on which smoothing strengths are compared.
_SMOOTHING_ROWS = 1024
# lm_head has one output per token of the vocabulary, so its rows are rounded this many at a time.
_ROWS = 16384
_HEAD = "decoder.lm_head"


@dataclass(frozen=True)
class _Shared:
    """The values that the consumers of one input share.

    Attributes:
        inputs: statistics, before scaling.
        scale: [in] that weights are multiplied by, or None.
        blocks: Gram matrices of scaled inputs by group size, for clipping.
        factor: for error compensation, or None.
        integers: packed consumers with int8 inputs, by name. They are rounded together.
    """

    inputs: InputStatistics
    scale: Tensor | None
    blocks: Mapping[int, Tensor]
    factor: tuple[Tensor, Tensor] | None
    integers: Mapping[str, PackedLinear]

    @property
    def tokens(self) -> Tensor:
        """The token subset after scaling, [tokens, in] float32."""
        assert self.inputs.subset is not None
        tokens = self.inputs.subset.float()
        return tokens if self.scale is None else tokens / self.scale


class BlockQuantizer:
    """Quantizes the blocks of one checkpoint.

    Args:
        checkpoint: with float weights.
        recipe: how to round.
        compute: device.
        scale_dtype: stored type of the scales of packed weights.
        plan: the choice for each linear of the layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, compute: Compute, scale_dtype: torch.dtype, plan: Plan
    ) -> None:
        self._checkpoint = checkpoint
        self._decoder = checkpoint.config.decoder
        self._recipe = recipe
        self._device = compute.device
        self._scale_dtype = scale_dtype
        self._layers = plan
        self._plan = {**plan, _HEAD: Choice(recipe.head)}

    @property
    def wanted(self) -> StatisticsRequest:
        """The statistics that `layer` needs."""
        compensates = any(choice.precision.method.compensates for choice in self._layers.values())
        return StatisticsRequest(gram=self._recipe.error_compensation and compensates, tokens=_SUBSET_TOKENS)

    @property
    def head_request(self) -> StatisticsRequest:
        """The statistics that `head` needs. Errors of an int8 head are not compensated: they are small already."""
        method = self._precision(_HEAD).method
        gram = self._recipe.error_compensation and method.compensates and method.clips
        return StatisticsRequest(gram=gram, tokens=_SUBSET_TOKENS)

    def layer(
        self, number: int, statistics: Mapping[str, InputStatistics] | None, latents: bool = False
    ) -> QuantizedBlock:
        """Quantize one decoder layer. Without statistics of its inputs, only round it to the nearest values.

        With `latents`, the block keeps what the rounding can be learned from; call `settle` in the end.
        """
        groups = SCALE_GROUPS[self._decoder.architecture]
        return self._block(f"decoder.layers.{number}.", groups, statistics, latents)

    def head(self, inputs: InputStatistics | None) -> QuantizedBlock:
        """Quantize lm_head. Without statistics of its inputs, only round it to the nearest values."""
        return self._block("decoder.", [HEAD_GROUP], None if inputs is None else {"lm_head": inputs})

    def settle(self, block: QuantizedBlock) -> None:
        """Round the latents of a block again, after they were learned, and measure the linears again."""
        for name, latent in block.latents.items():
            low, high = latent.grid.limits
            q = torch.round(latent.values).clamp_(low, high)
            weight, comparison = self._scaled(name, latent.scale, block), OutputComparison()
            some, tokens = _some(weight), latent.tokens.T
            comparison.add(weight[some] @ tokens, latent.grid.dequantize(q)[some] @ tokens)
            block.linears[name] = latent.grid.pack(q)
            block.reports[name] = comparison.of(block.reports[name])
        block.latents.clear()

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

    def _precision(self, name: str) -> Precision:
        return self._plan[name].precision

    def _block(
        self,
        prefix: str,
        groups: Sequence[ScaleGroup],
        statistics: Mapping[str, InputStatistics] | None,
        latents: bool = False,
    ) -> QuantizedBlock:
        block = QuantizedBlock()
        each = [(group, statistics[group.consumers[0]] if statistics else None) for group in groups]
        for group, inputs in each:
            if inputs is not None:
                self._choose_and_fold(prefix, group, inputs, block)
        for group, inputs in each:
            self._clip_and_round(prefix, group, inputs, block, latents)
        return block

    # -- choose and fold scales -------------------------------------------------------------------------------------

    def _choose_and_fold(self, prefix: str, group: ScaleGroup, inputs: InputStatistics, block: QuantizedBlock) -> None:
        """Choose the scale per producer channel, where a consumer needs one, and divide the producer by it.

        What is stored of the producer (norm weight or bias) has few digits, and the scale becomes one that divides it
        exactly.
        """
        if inputs.gram is not None:
            symmetrize(inputs.gram)
        names = [prefix + name for name in group.consumers]
        wanted = {self._precision(name).method.scales for name in names}
        scale = None
        if "smooth" in wanted:
            scale = self._smoothing(prefix, group, names, inputs) if self._recipe.decoder_int8.smoothing else None
        elif "awq" in wanted:
            scale = self._awq(prefix, group, names, inputs)
        if scale is not None:
            fitted, divided = storable_scale(scale, self._vector(prefix, group))
            if divided is not None:
                block.tensors[_vector_name(prefix, group)] = to_numpy(divided)
            block.scales[prefix + group.producer] = fitted

    def _awq(self, prefix: str, group: ScaleGroup, names: Sequence[str], inputs: InputStatistics) -> Tensor:
        """Return AWQ's scale. Where a float weight is multiplied or divided, it is powers of two: that stays exact."""
        rounded = [name for name in names if self._precision(name).scheme is not None]
        found = search_scale(
            [self._float(f"{name}.weight") for name in rounded],
            inputs,
            [self._kind(self._precision(name)) for name in rounded],
            spread=lambda values: spread_channels(values, group, self._decoder),
            reduce=lambda values: reduce_channels(values, group, self._decoder),
        )
        scale = reduce_channels(found, group, self._decoder)
        producer = self._plan.get(prefix + group.producer)
        floats = len(rounded) < len(names) or (producer is not None and producer.precision.scheme is None)
        return power_of_two(scale) if floats else scale

    def _smoothing(
        self, prefix: str, group: ScaleGroup, names: Sequence[str], inputs: InputStatistics
    ) -> Tensor | None:
        """Return SmoothQuant's scale for the consumers with int8 inputs, or None where none helps."""
        integers = [name for name in names if self._precision(name).method.rounds_inputs]
        weight = torch.cat([self._float(f"{name}.weight") for name in integers])
        largest = reduce_channels(inputs.max_abs, group, self._decoder, largest=True)
        weights = reduce_channels(weight.abs().amax(0), group, self._decoder, largest=True)
        stored = self._vector(prefix, group)
        vectors = [] if stored is None else [stored]
        tried = {strength: smoothing_scale(largest, weights, strength, vectors) for strength in STRENGTHS}
        some = weight[:: max(1, len(weight) // _SMOOTHING_ROWS)]
        spread = {strength: spread_channels(scale, group, self._decoder) for strength, scale in tried.items()}
        return tried.get(best_strength(some, inputs, spread, per_token=True))

    def _vector(self, prefix: str, group: ScaleGroup) -> Tensor | None:
        """Return the stored norm weight or linear bias that an input's scale divides, or None where there is none."""
        name = _vector_name(prefix, group)
        return to_torch(self._checkpoint.tensor(name)).to(self._device) if self._checkpoint.has(name) else None

    # -- clip and round ---------------------------------------------------------------------------------------------

    def _clip_and_round(
        self, prefix: str, group: ScaleGroup, inputs: InputStatistics | None, block: QuantizedBlock, latents: bool
    ) -> None:
        """Clip and round all consumers of one input. Without statistics, only round to the nearest values."""
        produced = block.scales.get(prefix + group.producer)
        scale = None if produced is None else spread_channels(produced, group, self._decoder)
        names = [prefix + name for name in group.consumers]
        shared = None if inputs is None else self._share(names, inputs, scale, block)
        for name in names:
            precision, comparison = self._precision(name), OutputComparison()
            if precision.scheme is None:
                if scale is not None or name in block.scales:
                    block.tensors[f"{name}.weight"] = to_numpy(self._float_scaled(name, scale, block))
            elif shared is not None and precision.method.rounds_inputs:
                block.linears[name] = shared.integers[name]
                self._compare_integers(shared, name, self._scaled(name, scale, block), comparison)
            else:
                weight = self._scaled(name, scale, block)
                keeps = latents and precision.method.learns
                block.linears[name], latent = self._packed(precision, weight, shared, comparison, keeps)
                if latent is not None:
                    block.latents[name] = latent
            block.reports[name] = self._report(name, inputs, block.linears.get(name), comparison)

    def _share(
        self, names: Sequence[str], inputs: InputStatistics, scale: Tensor | None, block: QuantizedBlock
    ) -> _Shared:
        precisions = {name: self._precision(name) for name in names}
        ones = torch.ones_like(inputs.max_abs) if scale is None else scale
        clipped = [p.scheme.group_size for p in precisions.values() if p.method.clips and p.scheme]
        blocks = {size: block_gram(inputs, ones, size) for size in set(clipped) if size is not None}
        factor = None
        if inputs.gram is not None and any(p.method.compensates for p in precisions.values()):
            inputs.gram.div_(ones[:, None]).div_(ones)
            factor = feedback_factor(inputs.gram, inputs.count)
        inputs.gram = None
        integers = {}
        if rounded := [name for name, precision in precisions.items() if precision.method.rounds_inputs]:
            weights = [self._scaled(name, scale, block) for name in rounded]
            how = self._recipe.decoder_int8
            made = quantize_linear(torch.cat(weights), divided(inputs, scale), how.calibrator, None, True).packed
            starts = np.cumsum([0, *(len(weight) for weight in weights)])
            rows = [np.arange(start, stop) for start, stop in pairwise(starts)]
            integers = {name: made.rows(index) for name, index in zip(rounded, rows, strict=True)}
        return _Shared(inputs, scale, blocks, factor, integers)

    def _packed(
        self,
        precision: Precision,
        weight: Tensor,
        shared: _Shared | None,
        comparison: OutputComparison,
        keeps: bool,
    ) -> tuple[PackedLinear, Latent | None]:
        """Return a linear with integer weights and float inputs, and its latent. `weight` is scaled already."""
        packed, grids, values = [], [], []
        tokens = None if shared is None else shared.tokens.T
        for rows in torch.split(weight, _ROWS):
            grid = self._grid(precision, rows, shared)
            unrounded = torch.empty_like(rows) if keeps else None
            if shared is not None and shared.factor is not None and precision.method.compensates:
                q = compensated_rounding(rows, grid, *shared.factor, unrounded)
            else:
                q = grid.round(rows)
                unrounded = grid.unrounded(rows) if keeps else None
            if tokens is not None:
                comparison.add(rows[_some(rows)] @ tokens, grid.dequantize(q)[_some(rows)] @ tokens)
            packed.append(grid.pack(q))
            if unrounded is not None:
                grids.append(grid)
                values.append(near(q, unrounded))
        made = concatenate(packed)
        if not values or shared is None:
            return made, None
        grid = Grid(grids[0].scheme, torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]))
        return made, Latent(torch.cat(values), grid, shared.scale, shared.tokens)

    def _grid(self, precision: Precision, weight: Tensor, shared: _Shared | None) -> Grid:
        kind = self._kind(precision)
        if shared is not None and precision.method.clips and kind.scheme.group_size is not None:
            return search_clipping(weight, shared.blocks[kind.scheme.group_size], kind)
        return minmax_grid(weight, kind)

    def _kind(self, precision: Precision) -> GridKind:
        assert precision.scheme is not None
        negative = self._recipe.negative_scales and precision.method.groups
        return GridKind(precision.scheme, self._scale_dtype, negative)

    def _compare_integers(self, shared: _Shared, name: str, weight: Tensor, comparison: OutputComparison) -> None:
        linear = shared.integers[name]
        assert linear.input_scale is not None
        values = torch.from_numpy(linear.dequantize()[_some(weight)]).to(self._device)
        found = round_inputs(shared.tokens, linear.input_scale) @ values.T * linear.input_scale
        comparison.add(shared.tokens @ weight[_some(weight)].T, found)

    def _report(
        self, name: str, inputs: InputStatistics | None, packed: PackedLinear | None, comparison: OutputComparison
    ) -> LinearReport:
        choice = self._plan[name]
        scheme = choice.precision.scheme
        width = self._checkpoint.shapes[f"{name}.weight"][1]
        stored = self._checkpoint.tensor(f"{name}.weight").dtype
        bits = bits_per_weight(scheme, width, 8 * self._scale_dtype.itemsize) if scheme else 8 * stored.itemsize
        clipped = None if packed is None or packed.input_scale is None else 127 * packed.input_scale
        report = LinearReport(
            name=name,
            dtype=stored.name,
            scheme=scheme,
            bits_per_weight=round(bits, 3),
            part=choice.part,
            reason=choice.reason,
            inputs=activation_range(inputs, clipped) if inputs is not None else None,
        )
        return report if packed is None or inputs is None else comparison.of(report)

    # -- weights ----------------------------------------------------------------------------------------------------

    def _scaled(self, name: str, scale: Tensor | None, block: QuantizedBlock) -> Tensor:
        """Return a weight [out, in] float32, multiplied by its input's scale and divided by its outputs' scale."""
        weight = self._float(f"{name}.weight")
        if scale is not None:
            weight *= scale
        if name in block.scales:
            weight /= block.scales[name][:, None]
        return weight

    def _float_scaled(self, name: str, scale: Tensor | None, block: QuantizedBlock) -> Tensor:
        """Return the same for a weight that stays float, in its stored type."""
        stored = self._checkpoint.tensor(f"{name}.weight")
        scaled = self._scaled(name, scale, block).to(to_torch(stored).dtype)
        if not is_finite(scaled):
            raise EdgeError(
                f"{name} stays {stored.dtype}, which cannot hold its weights times the scale that quantized linears "
                "near it need; quantize it too, or keep those fp as well, or convert the checkpoint to bfloat16"
            )
        return scaled

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


def _some(weight: Tensor) -> slice:
    """Return the outputs that are compared for the report."""
    return slice(None, None, max(1, len(weight) // _REPORT_ROWS))
