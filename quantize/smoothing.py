"""SmoothQuant: input channels with large values are divided by a scale, their weights multiplied by it.

The division goes into what produces the input: the norm before the linear, weight and bias, or rows of another linear
(Xiao et al., 2022: s = max|x|^a / max|W|^(1 - a) per channel). Scales are powers of two: norms are stored in 16 bits,
and only by these are they divided exactly, in every program that loads the checkpoint. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Strengths that are tried beside none.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Beyond 2^10 a channel's values are no longer made similar but lost.
_LARGEST_EXPONENT = 10


def smoothing_scale(
    largest_inputs: Tensor, largest_weights: Tensor, strength: float, vectors: Sequence[Tensor]
) -> Tensor:
    """Scales [channels], powers of two, by which all of `vectors` divide exactly; their geometric mean is about 1.

    Args:
        largest_inputs: [channels] max |x| of each channel.
        largest_weights: [channels] max |W| of the weights that a channel meets.
        strength: 0 moves all differences into the inputs, 1 all into the weights.
        vectors: [channels] in their stored type, that are to be divided.
    """
    inputs, weights = largest_inputs.double(), largest_weights.double()
    alive = (inputs > 0) & (weights > 0)
    exponent = torch.zeros_like(inputs)
    exponent[alive] = strength * torch.log2(inputs[alive]) - (1 - strength) * torch.log2(weights[alive])
    if bool(alive.any()):
        exponent[alive] -= exponent[alive].mean()
    scale = torch.exp2(exponent.round().clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    for vector in vectors:
        scale = torch.where(divide(vector, scale).double() * scale == vector.double(), scale, torch.ones_like(scale))
    return scale.float()


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest powers of two, in the logarithm."""
    return torch.exp2(torch.log2(scale).round())


def divide(vector: Tensor, scale: Tensor) -> Tensor:
    """A stored vector after smoothing, in its stored type."""
    return (vector.double() / scale.double()).to(vector.dtype)
