"""Integer grids: the values that a weight can take, and rounding to them.

A grid has one scale (and zero point) per output and group of inputs. Scales are rounded to their stored type before any
weight is rounded, so the integers fit the scales that a reader will see. This module does not know activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.model.linear import PackedLinear, Scheme


@dataclass(frozen=True)
class Grid:
    """The representable weights of one layer: scale * (q - zero), q in [low, high].

    Attributes:
        scheme: bits, group size, symmetric or not.
        scale: [out, groups] float32, exact in the stored type.
        zero: [out, groups] float32 whole numbers; all 0 for symmetric grids.
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return limits(self.scheme)

    def round(self, weight: Tensor) -> Tensor:
        """Round a weight [out, in] float32 to the nearest integers on the grid, [out, in] float32."""
        grouped = _groups(weight, self.scale.shape[1])
        q = torch.round(grouped / self.scale[..., None]) + self.zero[..., None]
        return q.clamp_(*self.limits).flatten(1)

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the weights [out, in] that the integers stand for."""
        grouped = _groups(q, self.scale.shape[1])
        return ((grouped - self.zero[..., None]) * self.scale[..., None]).flatten(1)

    def pack(self, q: Tensor, bias: NDArray[Any] | None = None) -> PackedLinear:
        """Return the layer as integers and scales."""
        symmetric = self.scheme.symmetric
        return PackedLinear(
            values=q.to(torch.int8 if symmetric else torch.uint8).cpu().numpy(),
            scale=self.scale.cpu().numpy(),
            zero_point=None if symmetric else self.zero.to(torch.uint8).cpu().numpy(),
            bits=self.scheme.bits,
            bias=bias,
        )


def limits(scheme: Scheme) -> tuple[int, int]:
    """Return the lowest and the highest integer of a scheme."""
    return (
        (-(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1) if scheme.symmetric else (0, (1 << scheme.bits) - 1)
    )


def minmax_grid(weight: Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    """Return the grid that spans all weights [out, in] of each group."""
    return spanning(extent(weight, scheme), scheme, stored)


def extent(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [out, groups]. The interval always includes 0."""
    grouped = _groups(weight, 1 if scheme.group_size is None else weight.shape[1] // scheme.group_size)
    smallest, largest = torch.aminmax(grouped, dim=-1)
    return smallest.clamp_(max=0), largest.clamp_(min=0)


def spanning(spanned: tuple[Tensor, Tensor], scheme: Scheme, stored: torch.dtype, ratio: float = 1.0) -> Grid:
    """Return the grid for groups that span the interval `spanned` (from `extent`), after shrinking it by `ratio`.

    Asymmetric grids always hold 0. At ratio 1, a symmetric grid spans [-max, max] and its highest integer stands for
    max. A ratio of 7/8 therefore makes the lowest 4-bit integer stand for -max.
    """
    low, high = limits(scheme)
    smallest, largest = (values * ratio for values in spanned)
    if scheme.symmetric:
        scale = round_scale(torch.maximum(-smallest, largest) / high, stored)
        return Grid(scheme, scale, torch.zeros_like(scale))
    scale = round_scale((largest - smallest) / high, stored)
    return Grid(scheme, scale, torch.round(-smallest / scale).clamp_(low, high))


def round_scale(scale: Tensor, stored: torch.dtype) -> Tensor:
    """Return scales as the stored type holds them, in float32. A scale that becomes 0 (group of zeros) is set to 1."""
    rounded = scale.clamp(max=torch.finfo(stored).max).to(stored).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _groups(weight: Tensor, groups: int) -> Tensor:
    """Reshape [out, in] to [out, groups, in / groups]."""
    return weight.reshape(len(weight), groups, -1)
