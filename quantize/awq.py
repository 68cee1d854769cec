"""AWQ scales: choose which input channels get finer steps.

Method: AWQ (Lin et al., 2023, arXiv:2306.00978). The scale is s = mean|x|^alpha, optionally / mean|w|^(1 - alpha), with
alpha from a grid, chosen by the squared error of the layers' outputs on calibration tokens. Image tokens and text
tokens have the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internvl_edge.calibration.statistics import InputStatistics
from internvl_edge.model.linear import Scheme

from .rounding import GridKind, minmax_grid

# The paper's authors try 20 alphas. Here, eleven are tried, and then the neighbors of the best one, nearer and nearer.
_ALPHA_STEPS = (tuple(step / 10 for step in range(11)), (-0.05, 0.05), (-0.025, 0.025))
# The number of outputs per layer, evenly spaced, on which a scale is chosen. Alpha is one number for all outputs, so a
# sample is enough.
_SEARCH_ROWS = 256

Reduce = Callable[[Tensor], Tensor]


def search_scale(
    weights: Sequence[Tensor],
    inputs: InputStatistics,
    kinds: Sequence[GridKind],
    spread: Reduce = lambda values: values,
    reduce: Reduce = lambda values: values,
) -> Tensor:
    """Return the input scale [in] with the least total error at the outputs of all consumers.

    Args:
        weights: [out, in] float32 of each consumer.
        inputs: statistics with a subset of the inputs.
        kinds: the grids of each consumer (without clipping here).
        spread, reduce: map the producer's channels to input channels and back, where the two differ.
    """
    rows = [weight[:: max(1, len(weight) // _SEARCH_ROWS)] for weight in weights]
    error = _output_error(inputs, rows[0].shape[1])
    x_mean = reduce(inputs.mean_abs).clamp(min=1e-8)
    sizes = [_relative_size(weight, kind.scheme) for weight, kind in zip(rows, kinds, strict=True)]
    w_mean = reduce(torch.cat(sizes).mean(0)).clamp(min=1e-8)

    def loss(scale: Tensor) -> float:
        total = 0.0
        for weight, kind in zip(rows, kinds, strict=True):
            scaled = weight * scale
            grid = minmax_grid(scaled, kind)
            total += error(grid.dequantize(grid.round(scaled)) / scale - weight)
        return total

    def candidate(alpha: float, weighted: bool) -> Tensor:
        scale = x_mean**alpha
        if weighted:
            scale = scale / w_mean ** (1 - alpha)
        return spread(scale / (scale.max() * scale.min()).sqrt()).clamp(min=1e-4, max=1e4)

    unscaled = torch.ones(rows[0].shape[1], device=rows[0].device)
    best = (loss(unscaled), unscaled)
    for weighted in (False, True):
        tried: dict[float, float] = {}
        for steps in _ALPHA_STEPS:
            around = min(tried, key=tried.__getitem__, default=0.0)
            for alpha in (around + step for step in steps):
                if 0 <= alpha <= 1:
                    scale = candidate(alpha, weighted)
                    tried[alpha] = loss(scale)
                    if tried[alpha] < best[0]:
                        best = (tried[alpha], scale)
    return best[1]


def _relative_size(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return |w| as a share of the largest |w| of its group, [out, in]."""
    grouped = weight.abs().reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1)


def _output_error(inputs: InputStatistics, width: int) -> Callable[[Tensor], float]:
    """Return a function: weight error [rows, in] -> squared error at the outputs.

    It is exact with a Gram matrix that is no wider than the subset is long. Otherwise it is computed on the subset.
    """
    if inputs.gram is not None and (inputs.subset is None or width <= len(inputs.subset)):
        gram = inputs.gram
        return lambda e: float(((e @ gram) * e).sum(dtype=torch.float64))
    assert inputs.subset is not None
    tokens = inputs.subset.T.contiguous()
    # In the type of the inputs: what bfloat16 rounds off each product is far below the difference of two scales.
    return lambda e: float((e.to(tokens.dtype) @ tokens).float().square().sum(dtype=torch.float64))
