"""Rounding with error compensation: spread each column's rounding error over the columns that are not yet rounded.

Method: GPTQ (Frantar et al., 2022, arXiv:2210.17323). Columns are rounded in order of falling activation energy. The
grids are fixed before rounding starts: each column keeps the grid of its own group, so grids that were found by
clipping remain valid in any column order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.compute import one_thread

from .grid import Grid

_BLOCK = 128
_DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)


def inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column order [in] and the upper Cholesky factor [in, in] of the inverse Gram matrix in that order.

    The matrix is damped by 1 % of its mean diagonal, and by more only where float32 cannot factorise it. With the
    columns in reverse order the matrix is M M^T, and the factor of the inverse is M^-1 with rows and columns reversed.
    The inverse itself is never computed.

    Raises:
        EdgeError: the matrix cannot be factorised (activations that are not finite).
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    for damping in _DAMPING:
        h = gram[reverse][:, reverse]
        h.diagonal().add_(damping * float(diagonal.mean()) + 1e-10)
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        if int(failed) == 0:
            _invert_lower(lower)
            if bool(torch.isfinite(lower).all()):
                return order, lower.flip(0, 1)
    raise EdgeError("the activations' Gram matrix cannot be factorised; switch off error compensation")


def _invert_lower(matrix: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves, so that nearly all of the work is matrix products."""
    size = len(matrix)
    if size <= _BLOCK:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = size // 2
    first, second, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    below.copy_(-(second @ (below @ first)))


def compensated_rounding(weight: Tensor, grid: Grid, order: Tensor, upper: Tensor) -> Tensor:
    """Return integers [out, in] on the grid that make the error of the outputs small, not each weight's own error.

    Args:
        weight: [out, in] float32.
        grid: the values that the integers stand for.
        order, upper: from `inverse_factor` for the same inputs.
    """
    low, high = grid.limits
    size = weight.shape[1] // grid.scale.shape[1]
    group = order // size
    w = weight.T[order].contiguous()  # [in, out]: a column of the layer is a contiguous row here
    scale, zero = grid.scale.T[group], grid.zero.T[group]
    q = torch.empty_like(w)
    errors = torch.empty(min(_BLOCK, len(w)), w.shape[1], device=w.device)
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        with one_thread():
            for column in range(start, stop):
                step = scale[column]
                rounded = torch.round(w[column] / step).add_(zero[column]).clamp_(low, high)
                q[column] = rounded
                error = (w[column] - (rounded - zero[column]) * step).div_(upper[column, column])
                errors[column - start] = error
                w[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return q[back].T.contiguous()
