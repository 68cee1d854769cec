"""Quantize one float linear to int8 weights and int8 inputs: choose the smoothing strength and the clipping range.

Each choice is judged by the error of the layer's output on a sample of its inputs. This module does not know where in
the model the layer stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.calibration.statistics import InputStatistics
from internvl_edge.model.linear import PackedLinear

from .calibrators import CALIBRATORS, HIGHEST, find_range, histogram
from .smoothing import STRENGTHS, smoothing_scale

# Smoothing strengths are compared with the range that this calibrator finds.
_FOR_STRENGTH = ("mse",)
_ARRAYS = ("values", "scale", "input_scale", "smoothing")


@dataclass(frozen=True)
class IntegerLinear:
    """A quantized layer and the choices that led to it.

    Attributes:
        packed: int8 weights with their scales, and the input's scale.
        smoothing: [in] float32 that the norm before the layer must be divided by; None without smoothing.
        calibrator: the method that found the range.
        strength: the smoothing strength, 0 for none.
        error: relative output error on the sample of inputs: sqrt(|Y' - Y|^2 / |Y|^2).
    """

    packed: PackedLinear
    smoothing: NDArray[np.float32] | None
    calibrator: str
    strength: float
    error: float

    @property
    def range(self) -> float:
        """The largest |x|, after smoothing, that is not clipped."""
        assert self.packed.input_scale is not None
        return self.packed.input_scale * HIGHEST

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays to store, together with `facts`."""
        packed = self.packed
        smoothing = np.empty(0, np.float32) if self.smoothing is None else self.smoothing
        return dict(zip(_ARRAYS, (packed.values, packed.scale, np.array(packed.input_scale), smoothing), strict=True))

    def facts(self) -> dict[str, Any]:
        """Return the JSON values to store, together with `arrays`."""
        return {"calibrator": self.calibrator, "strength": self.strength, "range": self.range, "error": self.error}

    @staticmethod
    def stored(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> IntegerLinear:
        """Return the layer that `arrays` and `facts` were made from."""
        values, scale, step, smoothing = (arrays[name] for name in _ARRAYS)
        packed = PackedLinear(values, scale, None, bits=8, input_scale=float(step))
        kept = smoothing if len(smoothing) else None
        return IntegerLinear(packed, kept, facts["calibrator"], facts["strength"], facts["error"])


def quantize_linear(
    weight: Tensor,
    inputs: InputStatistics,
    calibrator: str,
    norm: Sequence[Tensor] | None,
    per_token: bool = False,
) -> IntegerLinear:
    """Quantize a weight [out, in] float32 for these inputs. The statistics must hold a token subset.

    Args:
        weight: the weight of the linear.
        inputs: statistics of its input, before smoothing.
        calibrator: one of `CALIBRATORS`, or "best" for the one with the smallest output error.
        norm: vectors in their stored type that smoothing folds into; None where smoothing is not possible.
        per_token: judge choices by the error of each token relative to its own output. In decoders a few tokens have
            outputs hundreds of times larger than the others, but every token is normalized by itself afterwards.
    """
    scales: dict[float, Tensor] = {}
    if norm is not None:
        largest = weight.abs().amax(0)
        scales = {strength: smoothing_scale(inputs.max_abs, largest, strength, norm) for strength in STRENGTHS}
    strength = best_strength(weight, inputs, scales, per_token)
    methods = CALIBRATORS if calibrator == "best" else (calibrator,)
    return _Layer(weight, inputs, per_token).rounded(strength, scales.get(strength), methods)


def best_strength(
    weight: Tensor, inputs: InputStatistics, scales: Mapping[float, Tensor], per_token: bool = False
) -> float:
    """Return the strength whose scale [in] has the smallest output error, or 0 where no scale is better than none."""
    if not scales:
        return 0.0
    layer = _Layer(weight, inputs, per_token)
    tried: list[tuple[float, Tensor | None]] = [(0.0, None), *scales.items()]
    errors = {strength: layer.rounded(strength, scale, _FOR_STRENGTH).error for strength, scale in tried}
    return min(errors, key=lambda strength: errors[strength])


class _Layer:
    """A float linear with the sample of its inputs."""

    def __init__(self, weight: Tensor, inputs: InputStatistics, per_token: bool) -> None:
        assert inputs.subset is not None
        self._weight, self._x, self._largest = weight, inputs.subset.float(), inputs.max_abs
        self._expected = self._x @ weight.T
        energies = self._expected.square().sum(1, dtype=torch.float64).clamp(min=1e-30)
        self._weights = 1 / energies / len(energies) if per_token else torch.ones_like(energies) / energies.sum()

    def error(self, y: Tensor) -> float:
        """Return the relative error of outputs y [tokens, out]: sqrt(|Y' - Y|^2 / |Y|^2), overall or token by token.

        The tensor y is overwritten.
        """
        missed = y.sub_(self._expected).square_().sum(1, dtype=torch.float64)
        return float((missed * self._weights).sum().sqrt())

    def rounded(self, strength: float, smoothing: Tensor | None, calibrators: Sequence[str]) -> IntegerLinear:
        """Return the layer in int8 after smoothing, with the clipping range of the calibrator of least error."""
        x, weight, largest = self._x, self._weight, self._largest
        if smoothing is not None:
            x, weight, largest = x / smoothing, weight * smoothing, largest / smoothing
        highest = float(largest.max()) or 1.0
        counts = histogram(x, highest)
        scale = weight.abs().amax(1, keepdim=True) / HIGHEST
        scale[scale == 0] = 1
        values = torch.round(weight / scale)
        tried = []
        for calibrator in calibrators:
            step = float(np.float32(find_range(calibrator, counts, highest) / HIGHEST))
            y = (round_inputs(x, step) @ values.T).mul_(scale[:, 0] * step)
            tried.append((self.error(y), calibrator, step))
        error, calibrator, step = min(tried, key=lambda choice: choice[0])
        packed = PackedLinear(values.to(torch.int8).cpu().numpy(), scale.cpu().numpy(), None, bits=8, input_scale=step)
        kept = None if smoothing is None else smoothing.cpu().numpy()
        return IntegerLinear(packed, kept, calibrator, strength, error)


def round_inputs(x: Tensor, step: float) -> Tensor:
    """Return the int8 values of an input, as floats."""
    return (x / step).round_().clamp_(-HIGHEST - 1, HIGHEST)
