"""SmoothQuant: divide input channels that have large values by a scale, and multiply their weights by it.

The scale per channel is s = max|x|^a / max|W|^(1 - a) (Xiao et al., 2022). The division is folded into the producer of
the input: the weight and bias of the norm before the linear, or the rows of another linear. Scales are powers of two,
because norms are stored in 16 bits and only a power of two divides them exactly in every program that loads the
checkpoint. This module does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The strengths that are tried. No smoothing is tried as well.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# A scale beyond 2^10 would push a channel's values towards zero instead of making them similar to the others.
_LARGEST_EXPONENT = 10


def smoothing_scale(
    largest_inputs: Tensor, largest_weights: Tensor, strength: float, vectors: Sequence[Tensor]
) -> Tensor:
    """Return scales [channels]: powers of two that divide all of `vectors` exactly, with a geometric mean of about 1.

    Args:
        largest_inputs: [channels] max |x| of each channel.
        largest_weights: [channels] max |W| of the weights that each channel is multiplied by.
        strength: 0 moves all differences between channels into the inputs, 1 moves all into the weights.
        vectors: [channels] in their stored type: the vectors that will be divided by the scales.
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
    """Return the powers of two nearest to `scale`, measured in the logarithm."""
    return torch.exp2(torch.log2(scale).round())


def divide(vector: Tensor, scale: Tensor) -> Tensor:
    """Return a stored vector divided by its smoothing scale, in its stored type."""
    return (vector.double() / scale.double()).to(vector.dtype)
