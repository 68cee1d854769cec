"""One quantised linear layer as numbers, whatever file it came from and whatever graph it goes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedLinear:
    """Integer weights with their scales: y = x @ dequantise().T + bias.

    Attributes:
        values: [out, in] integers, one per element; uint8 in [0, 2**bits - 1] with a zero point, int8 in
            [-2**(bits-1), 2**(bits-1) - 1] without (symmetric).
        scale: [out, groups] float32; groups = in / group_size.
        zero_point: [out, groups] uint8, or None for symmetric weights.
        bits: 4 or 8.
        bias: [out] float, or None.
    """

    values: NDArray[np.uint8] | NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    bits: int
    bias: NDArray[Any] | None = None

    @property
    def group_size(self) -> int:
        """Inputs that share one scale; all of them for per-channel weights."""
        return int(self.values.shape[1] // self.scale.shape[1])

    def dequantise(self) -> NDArray[np.float32]:
        """The weights [out, in] that the integers stand for: scale * (values - zero_point)."""
        out, groups = self.scale.shape
        grouped = self.values.reshape(out, groups, -1).astype(np.float32)
        if self.zero_point is not None:
            grouped -= self.zero_point[:, :, None].astype(np.float32)
        return np.asarray((grouped * self.scale[:, :, None]).reshape(self.values.shape), np.float32)
