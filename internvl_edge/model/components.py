"""How large each part of a model is: the numbers it holds and the bits they take.

Counted from shapes and schemes, in checkpoints and bundles alike: integers, scales and zero points, and floats of the
given width. What a file adds (padding, a second dialect's copy of quantized weights) is not part of a model's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from .linear import Scheme

# Component -> the canonical names that belong to it, by how they begin.
_PREFIXES = {
    "vision": ("vision.",),
    "projector": ("projector.",),
    "decoder": ("decoder.layers.", "decoder.norm."),
    "lm_head": ("decoder.lm_head.",),
    "token table": ("decoder.embed_tokens.",),
}
COMPONENTS = tuple(_PREFIXES)


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        name: one of `COMPONENTS`.
        parameters: numbers in the unquantized model.
        bytes: what they take.
        bits_per_weight: of these, scales and zero points included.
        stored: how the linears are stored, most frequent first: {"int4 in groups of 128, symmetric": 168}.
    """

    name: str
    parameters: int
    bytes: int
    bits_per_weight: float
    stored: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def component_of(name: str) -> str:
    """The component that a tensor or linear belongs to, by canonical name."""
    return next(part for part, prefixes in _PREFIXES.items() if f"{name}.".startswith(prefixes))


def bits_per_weight(scheme: Scheme, inputs: int, scale_bits: int) -> float:
    """Bits of one weight of a quantized linear, with its share of scales and zero points."""
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
) -> list[Component]:
    """The size of each part.

    Args:
        shapes: every tensor by canonical name.
        schemes: how quantized linears are stored, by name without `.weight`.
        float_name, float_bits: how everything else is stored: "float16", 16.
        scale_bits: of the scales of quantized linears.
        tied: the head is the token table and takes no room of its own.
    """
    found: dict[str, Component] = {}
    for part in COMPONENTS:
        bits, parameters, stored = 0.0, 0, Counter[str]()
        for name, shape in shapes.items():
            if component_of(name) != part or (tied and part == "lm_head"):
                continue
            scheme = schemes.get(name.removesuffix(".weight"))
            each = bits_per_weight(scheme, shape[-1], scale_bits) if scheme else float_bits
            bits, parameters = bits + each * prod(shape), parameters + prod(shape)
            if len(shape) == 2:
                stored[str(scheme) if scheme else float_name] += 1
        if parameters:
            average = round(bits / parameters, 3)
            found[part] = Component(part, parameters, round(bits / 8), average, dict(stored.most_common()))
    return list(found.values())
