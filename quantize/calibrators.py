"""Find the clipping range of symmetric int8 activations: the |x| that the highest integer, 127, stands for.

minmax takes the largest value ever seen. The other methods clip rare large values, so that all other values get a
smaller step:

    percentile-P  the value below which P % of all |x| lie
    entropy       smallest Kullback-Leibler divergence between values and rounded values (Migacz, "8-bit inference with
                  TensorRT", 2017)
    mse           smallest mean squared rounding error

Each method sees only a histogram of |x|. This module does not know layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CALIBRATORS = ("minmax", "percentile-99.9", "percentile-99.99", "entropy", "mse")
HIGHEST = 127
_BINS = 8192
# The usual histogram of the entropy method: 2048 bins, and as many levels as int8 has magnitudes.
_ENTROPY_BINS = 2048
_LEVELS = 128
_ENTROPY_STEP = 16
_MSE_CANDIDATES = 128

Counts = NDArray[np.float64]


def find_range(calibrator: str, counts: Counts, largest: float) -> float:
    """Return the clipping range that one of `CALIBRATORS` finds. It is at most `largest`.

    Args:
        calibrator: the name of the method.
        counts: `histogram` of the values.
        largest: the largest |x| of all data. The histogram ends there, but may hold only a sample of the data.
    """
    if calibrator == "minmax":
        return largest
    if calibrator == "entropy":
        return largest * _entropy(counts.reshape(_ENTROPY_BINS, -1).sum(1)) / _ENTROPY_BINS
    if calibrator == "mse":
        return largest * _least_squares(counts)
    return largest * _percentile(counts, float(calibrator.removeprefix("percentile-")))


def histogram(x: Tensor, largest: float) -> Counts:
    """Count |x| in equal bins from 0 to `largest`."""
    counts = torch.histc(x.float().abs().flatten(), _BINS, 0, largest)
    return np.asarray(counts.double().cpu().numpy())


def _percentile(counts: Counts, percent: float) -> float:
    """Return the upper edge of the bin that holds the percentile, as a share of the histogram's width."""
    below = np.cumsum(counts)
    return float(np.searchsorted(below, percent / 100 * below[-1]) + 1) / len(counts)


def _least_squares(counts: Counts) -> float:
    centres = (np.arange(len(counts)) + 0.5) / len(counts)
    ranges = np.arange(1, _MSE_CANDIDATES + 1) / _MSE_CANDIDATES
    missed = [float(counts @ np.square(centres - rounded(centres, range_))) for range_ in ranges]
    return float(ranges[int(np.argmin(missed))])


def rounded(x: NDArray[Any], range_: float) -> NDArray[Any]:
    """Return the magnitudes x after rounding to int8 with this range."""
    step = range_ / HIGHEST
    return np.asarray(np.minimum(np.rint(x / step), HIGHEST) * step)


def _entropy(counts: Counts) -> float:
    """Return the number of bins to keep: the length whose rounded distribution diverges least."""
    lengths = np.arange(_LEVELS, len(counts) + 1, _ENTROPY_STEP)
    divergences = [_divergence(counts, int(length)) for length in lengths]
    return float(lengths[int(np.argmin(divergences))])


def _divergence(counts: Counts, length: int) -> float:
    """Return the KL divergence between the clipped distribution and its rounded form, for the first `length` bins.

    The clipped counts are added to the last bin. Each level spreads its count evenly over those of its bins that are
    not empty.
    """
    kept = counts[:length].copy()
    reference = kept.copy()
    reference[-1] += counts[length:].sum()
    starts = np.arange(_LEVELS) * length // _LEVELS
    occupied = kept > 0
    totals, bins = np.add.reduceat(kept, starts), np.add.reduceat(occupied, starts, dtype=np.float64)
    level = np.repeat(np.arange(_LEVELS), np.diff(np.append(starts, length)))
    spread = np.where(occupied, (totals / np.maximum(bins, 1))[level], 0)
    p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-30)
    held = p > 0
    # A bin that holds only clipped values has no counterpart in q. Its whole share counts as lost.
    return float((p[held] * np.log(p[held] / np.maximum(q[held], 1e-12))).sum())
