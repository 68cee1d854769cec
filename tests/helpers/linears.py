"""One linear layer on its own: its inputs, its weights rounded to nearest, and the error of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_edge.calibration.statistics import InputStatistics, Observer, StatisticsRequest
from internvl_edge.model.linear import Scheme
from internvl_edge.quantize.rounding import GridKind, minmax_grid

ASYMMETRIC, SYMMETRIC = Scheme(4, 32, symmetric=False), Scheme(4, 32, symmetric=True)


def kind(scheme: Scheme, negative: bool = False) -> GridKind:
    return GridKind(scheme, torch.float16, negative)


def observed(x: Tensor, wanted: StatisticsRequest | None = None) -> InputStatistics:
    observer = Observer("layer", len(x), wanted or StatisticsRequest(gram=True, tokens=len(x)))
    observer.begin(0, [("sample", len(x))])
    observer("linear", x)
    return observer.inputs["linear"]


def output_error(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((x @ (rounded - weight).T).square().mean())


def nearest(weight: Tensor, scheme: Scheme) -> Tensor:
    grid = minmax_grid(weight, kind(scheme))
    return grid.dequantize(grid.round(weight))
