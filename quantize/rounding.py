"""Round one linear's weights: the grid of values that a weight can take, its clipping, and error compensation.

A grid has one scale (and zero point) per output and group of inputs. Scales are rounded to their stored type before any
weight is rounded, so the integers fit the scales that a reader will see.

Clipping shrinks the range of each group to the one with the least squared error of the group's part of the output
(AWQ; Lin et al., 2023, arXiv:2306.00978).

Error compensation spreads each column's rounding error over the columns that are not yet rounded (GPTQ; Frantar et al.,
2022, arXiv:2210.17323). Columns are rounded in order of falling activation energy. The grids are fixed before: each
column keeps the grid of its own group, so grids that were found by clipping remain valid in any column order.

This module does not know where in a model the linear stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.compute import is_finite, one_thread
from internvl_edge.calibration.statistics import InputStatistics
from internvl_edge.model.linear import PackedLinear, Scheme

# Ratios of a group's interval that are tried, the widest first.
_RATIOS = (1.0, *(1 - 0.05 * step for step in range(1, 11)))
# Those for symmetric 4-bit scales: max/7, then max/7.5 and max/8, which use the lowest integer; the others clip.
_SYMMETRIC_RATIOS = (1.0, 7 / 7.5, *(7 / 8 * ratio for ratio in _RATIOS))
# The same with negative scales: in max/8, the lowest integer stands for the weight of the largest magnitude.
_NEGATIVE_RATIOS = tuple(7 / 8 * ratio for ratio in _RATIOS)
# The number of weights whose clipping is searched together. They must fit into the processor's cache.
_CLIP_WEIGHTS = 1 << 19
# The number of columns whose errors are spread over all later ones together.
_BLOCK = 128
# Shares of its mean diagonal that damp the Gram matrix: the first, and more where float32 cannot factorize it.
_DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)
# How far `near` goes from an integer. The border to the next one is at 0.5.
_LATENT = 0.49


# ---- grids ----


@dataclass(frozen=True)
class GridKind:
    """The grids that a linear may have.

    Attributes:
        scheme: bits, group size, symmetric or not.
        stored: type of the stored scales.
        negative: scales may be below 0; for symmetric grids alone. The lowest integer, which has one step more than the
            highest, is then on the side of a group's largest weight.
    """

    scheme: Scheme
    stored: torch.dtype
    negative: bool = False


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

    def unrounded(self, weight: Tensor) -> Tensor:
        """Return a weight [out, in] float32 in units of the grid: what `round` rounds to integers."""
        grouped = _groups(weight, self.scale.shape[1])
        return (grouped / self.scale[..., None] + self.zero[..., None]).flatten(1)

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


def minmax_grid(weight: Tensor, kind: GridKind) -> Grid:
    """Return the grid that spans the weights [out, in] of each group.

    Where scales may be negative, the lowest integer stands for the weight of the largest magnitude. A weight of about
    this magnitude and the other sign is clipped a little.
    """
    return spanning(extent(weight, kind.scheme), kind, _ratios(kind)[0])


def extent(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [out, groups]. The interval always includes 0."""
    grouped = _groups(weight, 1 if scheme.group_size is None else weight.shape[1] // scheme.group_size)
    smallest, largest = torch.aminmax(grouped, dim=-1)
    return smallest.clamp_(max=0), largest.clamp_(min=0)


def spanning(spanned: tuple[Tensor, Tensor], kind: GridKind, ratio: float) -> Grid:
    """Return the grid for groups that span the interval `spanned` (from `extent`), after shrinking it by `ratio`.

    Asymmetric grids always hold 0. At ratio 1, a symmetric grid spans [-max, max] and its highest integer stands for
    max. A ratio of 7/8 therefore makes the lowest 4-bit integer stand for -max.
    """
    low, high = limits(kind.scheme)
    smallest, largest = (values * ratio for values in spanned)
    if kind.scheme.symmetric:
        scale = torch.maximum(-smallest, largest) / high
        scale = round_scale(torch.where(largest > -smallest, -scale, scale) if kind.negative else scale, kind.stored)
        return Grid(kind.scheme, scale, torch.zeros_like(scale))
    scale = round_scale((largest - smallest) / high, kind.stored)
    return Grid(kind.scheme, scale, torch.round(-smallest / scale).clamp_(low, high))


def round_scale(scale: Tensor, stored: torch.dtype) -> Tensor:
    """Return scales as the stored type holds them, in float32. A scale that becomes 0 (group of zeros) is set to 1."""
    most = torch.finfo(stored).max
    rounded = scale.clamp(-most, most).to(stored).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _groups(weight: Tensor, groups: int) -> Tensor:
    """Reshape [out, in] to [out, groups, in / groups]."""
    return weight.reshape(len(weight), groups, -1)


def near(q: Tensor, unrounded: Tensor) -> Tensor:
    """Return the numbers nearest to `unrounded` that round to the integers q, and not at the border between two."""
    return q + (unrounded - q).clamp_(-_LATENT, _LATENT)


# ---- clipping ----


def block_gram(inputs: InputStatistics, scale: Tensor, group_size: int) -> Tensor:
    """Return the Gram matrices [groups, size, size] of each group of inputs after division by `scale` [in]."""
    groups = len(scale) // group_size
    if inputs.gram is not None:
        starts = range(0, len(scale), group_size)
        blocks = torch.stack([inputs.gram[n : n + group_size, n : n + group_size] for n in starts])
    else:
        assert inputs.subset is not None
        tokens = inputs.subset.float().reshape(-1, groups, group_size).transpose(0, 1)
        blocks = tokens.transpose(1, 2) @ tokens
    inverse = 1 / scale.reshape(groups, group_size)
    return blocks * inverse[:, :, None] * inverse[:, None, :]


def search_clipping(weight: Tensor, blocks: Tensor, kind: GridKind) -> Grid:
    """Return the grid of `weight` [out, in] with the clipping range of least error for each output and group.

    The error is that of the group's part of the output, for this group's inputs.

    Args:
        weight: float32, already multiplied by its input scale.
        blocks: Gram matrix of each group, see `block_gram`.
        kind: the grids to choose from.
    """
    rows = max(1, _CLIP_WEIGHTS // weight.shape[1])
    parts = [_clip_rows(part, blocks, kind) for part in torch.split(weight, rows)]
    return Grid(kind.scheme, torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _clip_rows(weight: Tensor, blocks: Tensor, kind: GridKind) -> Grid:
    spanned = extent(weight, kind.scheme)
    grouped = weight.reshape(len(weight), len(blocks), -1).transpose(0, 1).contiguous()
    widest, *others = _ratios(kind)
    best = spanning(spanned, kind, widest)
    least = _group_error(grouped, best, blocks)
    for ratio in others:
        grid = spanning(spanned, kind, ratio)
        error = _group_error(grouped, grid, blocks)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(kind.scheme, torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
    return best


def _ratios(kind: GridKind) -> tuple[float, ...]:
    if kind.negative:
        return _NEGATIVE_RATIOS
    return _SYMMETRIC_RATIOS if kind.scheme.symmetric else _RATIOS


def _group_error(weight: Tensor, grid: Grid, blocks: Tensor) -> Tensor:
    """Return the squared error [out, groups] of each group's part of the output. `weight` is [groups, out, size]."""
    scale, zero = grid.scale.T[..., None], grid.zero.T[..., None]
    error = torch.div(weight, scale).round_().add_(zero).clamp_(*grid.limits)
    error.sub_(zero).mul_(scale).sub_(weight)
    return (error @ blocks).mul_(error).sum(-1).T


# ---- error compensation ----


def feedback_factor(gram: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the column order [in] and the upper factor [in, in] that hands rounding errors to later columns.

    In that order, the damped matrix is U D U^T with a unit upper triangular U and a diagonal D. An error of column j,
    times U[j, k], belongs into column k. This is the form of LDLQ (Chee et al., 2023, arXiv:2307.13304), which gives
    the same integers as GPTQ's inverse matrix: it needs no inverse.

    Few tokens tell little about a wide input, and compensation would fit what is chance in them. The correlations are
    therefore shrunk: the diagonal grows by itself times the columns per token (a fixed form of Ledoit and Wolf, 2004).
    It is damped by 1 % of its mean too, and by more only where float32 cannot factorize the matrix.

    Args:
        gram: [in, in] float32, the sum over all tokens.
        tokens: their number.

    Raises:
        EdgeError: the matrix cannot be factorized (activations that are not finite).
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    shrinkage = len(gram) / max(tokens, 1)
    for damping in _DAMPING:
        h = gram[reverse][:, reverse]
        h.diagonal().mul_(1 + shrinkage).add_(damping * float(diagonal.mean()) + 1e-10)
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        if int(failed) == 0 and is_finite(lower):
            return order, lower.div_(lower.diagonal().clone()).flip(0, 1)
    raise EdgeError("the activations' Gram matrix cannot be factorized; switch off error compensation")


def compensated_rounding(
    weight: Tensor, grid: Grid, order: Tensor, upper: Tensor, unrounded: Tensor | None = None
) -> Tensor:
    """Return integers [out, in] on the grid that make the error of the outputs small, not each weight's own error.

    Args:
        weight: [out, in] float32.
        grid: the values that the integers stand for.
        order, upper: from `feedback_factor` for the same inputs.
        unrounded: [out, in] to be filled with what each integer was rounded from, in units of the grid.
    """
    low, high = grid.limits
    size = weight.shape[1] // grid.scale.shape[1]
    group = (order // size).tolist()
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()  # [groups, out]
    w = weight.T[order].contiguous()  # [in, out]: a column of the layer is a contiguous row here
    q = torch.empty_like(w)
    before = torch.empty_like(w) if unrounded is not None else None
    errors = torch.empty(min(_BLOCK, len(w)), w.shape[1], device=w.device)
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        own = weight.T[order[start:stop]]  # `w` has taken up the errors of earlier columns by now
        with one_thread():
            for index, column in enumerate(range(start, stop)):
                step, offset, error = scale[group[column]], zero[group[column]], errors[index]
                rounded = torch.div(w[column], step, out=q[column])
                if before is not None:
                    torch.add(rounded, offset, out=before[column])
                rounded.round_().add_(offset).clamp_(low, high)
                torch.addcmul(own[index], torch.sub(rounded, offset, out=error), step, value=-1, out=error)
                w[column + 1 : stop].addr_(upper[column, column + 1 : stop], error)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start])
    del w  # as large as the weights
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    if unrounded is not None and before is not None:
        unrounded.copy_(before[back].T)
        del before
    return q[back].T.contiguous()
