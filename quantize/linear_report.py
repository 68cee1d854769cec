"""Measure one linear and its input for the report, while both are in memory.

Outputs are compared on a subset of the calibration tokens. For wide layers only some of the outputs are compared.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from internvl_edge.calibration.statistics import InputStatistics
from internvl_edge.checkpoint.record import ActivationRange, LinearReport

from .calibrators import find_range, histogram

_SHARE = "percentile-99.99"
_CHANNELS = 8


class OutputComparison:
    """Accumulates, piece by piece, the sums that tell how far quantized outputs are from the float ones."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Add some outputs, float32. Both tensors have the same shape."""
        pairs = ((found - expected).square(), expected.square(), found.square(), found * expected)
        self._sums += torch.stack([part.sum(dtype=torch.float64) for part in pairs]).cpu()

    def of(self, report: LinearReport) -> LinearReport:
        """Return a linear's report with the figures of this comparison."""
        missed, whole, found, product = self._sums.tolist()
        error = math.sqrt(missed / max(whole, 1e-30))
        cosine = product / max(math.sqrt(whole * found), 1e-30) if whole or found else 1.0
        return replace(report, error=error, sqnr_db=-20 * math.log10(max(error, 1e-15)), cosine=cosine)


def activation_range(inputs: InputStatistics, clipped_at: float | None = None) -> ActivationRange:
    """Describe a linear's input. The percentile is computed on the token subset, and is None without a subset."""
    channels = inputs.max_abs
    largest = float(channels.max())
    worst = torch.topk(channels, min(_CHANNELS, len(channels)))
    share = None
    if inputs.subset is not None and largest:
        share = find_range(_SHARE, histogram(inputs.subset, largest), largest)
    return ActivationRange(
        largest=largest,
        p9999=share,
        typical=float(channels.median()),
        clipped_at=clipped_at,
        channels=tuple(zip(worst.indices.tolist(), worst.values.tolist(), strict=True)),
    )
