"""The size of each part of a model: the number of its weights and the bits that they take.

It is computed from shapes and schemes, for checkpoints and bundles alike: integers, scales and zero points, and floats
of the given width. Padding in a file, or a second dialect's copy of quantized weights, is not part of a model's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from internvl_edge.base.units import size

from .linear import Scheme

# Component -> prefixes of its tensors' canonical names.
_PREFIXES = {
    "vision": ("vision.",),
    "projector": ("projector.",),
    "decoder": ("decoder.layers.", "decoder.norm."),
    "lm_head": ("decoder.lm_head.",),
    "token table": ("decoder.embed_tokens.",),
}
COMPONENTS = tuple(_PREFIXES)
# Bytes of one number.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Stored:
    """A number of linears that are stored in the same way: rounded by a scheme, or (None) as floats of `dtype`."""

    linears: int
    dtype: str
    scheme: Scheme | None = None

    def __str__(self) -> str:
        return str(self.scheme or self.dtype)


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        name: one of `COMPONENTS`.
        parameters: number of weights in the unquantized model.
        bytes: their size.
        bits_per_weight: average over them, including scales and zero points.
        stored: how the linears are stored, most frequent first.
    """

    name: str
    parameters: int
    bytes: int
    bits_per_weight: float
    stored: tuple[Stored, ...]


def component_of(name: str) -> str:
    """Return the component that a tensor or linear belongs to, by canonical name."""
    return next(part for part, prefixes in _PREFIXES.items() if f"{name}.".startswith(prefixes))


def bits_per_weight(scheme: Scheme, inputs: int, scale_bits: int) -> float:
    """Return the bits of one weight of a quantized linear, with its share of scales and zero points."""
    grid = scale_bits + (0 if scheme.symmetric else scheme.bits)
    return scheme.bits + grid / (scheme.group_size or inputs)


def components(
    shapes: Mapping[str, tuple[int, ...]],
    schemes: Mapping[str, Scheme],
    float_name: str,
    float_bits: int,
    scale_bits: int,
    *,
    tied: bool = False,
) -> tuple[Component, ...]:
    """Return the size of each part.

    Args:
        shapes: shape of every tensor, by canonical name.
        schemes: how quantized linears are stored, by name without `.weight`.
        float_name, float_bits: stored type of all other tensors: "float16", 16.
        scale_bits: bits of the scales of quantized linears.
        tied: the head is the token table and takes no space of its own.
    """
    found = []
    for part in COMPONENTS:
        bits, parameters, stored = 0.0, 0, Counter[Scheme | None]()
        for name, shape in shapes.items():
            if component_of(name) != part or (tied and part == "lm_head"):
                continue
            scheme = schemes.get(name.removesuffix(".weight"))
            each = bits_per_weight(scheme, shape[-1], scale_bits) if scheme else float_bits
            bits, parameters = bits + each * prod(shape), parameters + prod(shape)
            if len(shape) == 2:
                stored[scheme] += 1
        if parameters:
            average = round(bits / parameters, 3)
            kinds = tuple(Stored(count, float_name, scheme) for scheme, count in stored.most_common())
            found.append(Component(part, parameters, round(bits / 8), average, kinds))
    return tuple(found)


def weights_text(parts: Sequence[Component]) -> str:
    """Say how large the weights are: "5.03 GB, 4.43 bits per weight, each counted once".

    Files are larger where they hold quantized weights a second time for another kind of engine, and padding.
    """
    stored, weights = sum(part.bytes for part in parts), sum(part.parameters for part in parts)
    return f"{size(stored)}, {8 * stored / max(1, weights):.2f} bits per weight, each counted once"
