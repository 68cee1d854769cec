"""One quantized linear layer as numbers, independent of the file it came from and the graph it goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scheme:
    """How the weights of a layer are rounded.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share one scale; None for one scale per output.
        symmetric: True without zero points.
        static_inputs: inputs are rounded to symmetric int8 as well, with one scale that calibration found.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    static_inputs: bool = False

    def __str__(self) -> str:
        """Return a text for messages: int4 in groups of 128, with zero points."""
        groups = "per output" if self.group_size is None else f"in groups of {self.group_size}"
        inputs = ", int8 inputs" if self.static_inputs else ""
        return f"int{self.bits} {groups}, {'symmetric' if self.symmetric else 'with zero points'}{inputs}"


def count_schemes(schemes: Iterable[Scheme]) -> str:
    """Return a readable count of linears by scheme: "168 x int4 in groups of 128, symmetric; 1 x int8 ..."."""
    return "; ".join(f"{count} x {scheme}" for scheme, count in Counter(schemes).most_common())


# Group sizes that every kernel supports.
GROUP_SIZES = (32, 64, 128)
# One scale per output, no zero points.
INT8 = Scheme(8, None, symmetric=True)
# The same weights, with int8 inputs of one scale for the whole input.
W8A8 = Scheme(8, None, symmetric=True, static_inputs=True)


@dataclass(frozen=True)
class PackedLinear:
    """Integer weights with their scales: y = x @ dequantize().T + bias.

    Attributes:
        values: [out, in] integers, one per element; uint8 in [0, 2**bits - 1] with a zero point, int8 in
            [-2**(bits-1), 2**(bits-1) - 1] without (symmetric).
        scale: [out, groups] float32; groups = in / group_size.
        zero_point: [out, groups] uint8, or None for symmetric weights.
        bits: 4 or 8.
        bias: [out] float, or None.
        input_scale: the step of the int8 input, or None where inputs stay float.
    """

    values: NDArray[np.uint8] | NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    bits: int
    bias: NDArray[Any] | None = None
    input_scale: float | None = None

    @property
    def group_size(self) -> int:
        """The number of inputs that share one scale. For per-channel weights this is all inputs."""
        return int(self.values.shape[1] // self.scale.shape[1])

    @property
    def middle(self) -> int:
        """The offset between signed and unsigned integers: 8 for 4 bits, 128 for 8."""
        return 1 << (self.bits - 1)

    def signed(self) -> tuple[NDArray[np.int8], NDArray[np.int8] | None]:
        """Return values and zero points as int8, with the middle subtracted. Symmetric values do not change.

        The differences between values and zero points stay the same.
        """
        if self.zero_point is None:
            return self.values.view(np.int8), None
        flip = np.uint8(256 - self.middle)  # adding modulo 256 subtracts the middle
        return (self.values.view(np.uint8) + flip).view(np.int8), (self.zero_point + flip).view(np.int8)

    def rows(self, index: NDArray[np.intp]) -> PackedLinear:
        """Return a layer with some of the outputs, in the order of `index`."""
        return replace(
            self,
            values=self.values[index],
            scale=self.scale[index],
            zero_point=None if self.zero_point is None else self.zero_point[index],
            bias=None if self.bias is None else self.bias[index],
        )

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights [out, in] that the integers stand for: scale * (values - zero_point)."""
        out, groups = self.scale.shape
        grouped = self.values.reshape(out, groups, -1).astype(np.float32)
        if self.zero_point is not None:
            grouped -= self.zero_point[:, :, None].astype(np.float32)
        grouped *= self.scale[:, :, None]
        return grouped.reshape(self.values.shape)


def concatenate(linears: Sequence[PackedLinear]) -> PackedLinear:
    """Join layers with the same inputs and scheme and without biases, outputs one after the other.

    Where their inputs are rounded, the joined layer gets the largest of their input scales, so that none is clipped
    more.
    """
    first = linears[0]
    if len(linears) == 1:
        return first
    zeros = [linear.zero_point for linear in linears if linear.zero_point is not None]
    inputs = [linear.input_scale for linear in linears if linear.input_scale is not None]
    return PackedLinear(
        values=np.concatenate([linear.values for linear in linears]),
        scale=np.concatenate([linear.scale for linear in linears]),
        zero_point=np.concatenate(zeros) if zeros else None,
        bits=first.bits,
        input_scale=max(inputs, default=None),
    )
