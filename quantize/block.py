"""The quantized form of one decoder block (or lm_head): packed linears, changed float tensors, a report per linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.calibration.block_weights import as_computed
from internvl_edge.calibration.compute import Compute, to_torch
from internvl_edge.checkpoint.record import LinearReport
from internvl_edge.model.linear import PackedLinear

from .rounding import Grid


@dataclass
class Latent:
    """What the rounding of one linear is learned from.

    Attributes:
        values: [out, in] float32 in units of the grid; they round to the integers.
        grid: the values that the integers stand for.
        scale: [in] that the weights were multiplied by, or None.
        tokens: [tokens, in] float32, some of the scaled inputs, for the report.
    """

    values: Tensor
    grid: Grid
    scale: Tensor | None
    tokens: Tensor


@dataclass
class QuantizedBlock:
    """The quantized tensors of one block, by canonical name.

    Attributes:
        linears: the packed linears, by module ("decoder.layers.0.mlp.up_proj").
        tensors: the float tensors that change (norms, biases, float weights beside scaled inputs), in their stored
            type.
        reports: one report per linear, packed or not, by module.
        scales: [out] float32 that the outputs of a producer were divided by, by producer
            ("decoder.layers.0.mlp.up_proj").
        latents: the linears whose rounding is to be learned.
    """

    linears: dict[str, PackedLinear] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    reports: dict[str, LinearReport] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    latents: dict[str, Latent] = field(default_factory=dict)

    def replacements(self, prefix: str, compute: Compute) -> dict[str, Tensor]:
        """Return the changed tensors in the form that calibration computes with, by their name below `prefix`."""
        replaced = {name: as_computed(to_torch(array), name, compute) for name, array in self.tensors.items()}
        for name, packed in self.linears.items():
            replaced |= {f"{name}.{part}": tensor for part, tensor in computed(packed, compute.dtype).items()}
        return {name.removeprefix(prefix): tensor.to(compute.device) for name, tensor in replaced.items()}


def computed(packed: PackedLinear, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return a packed linear as `calibration.blocks.linear` takes it: weights, or integers with their scales."""
    if packed.input_scale is None:
        return {"weight": to_torch(packed.dequantize()).to(dtype)}
    return {
        "weight": torch.from_numpy(packed.values).to(dtype),
        "weight_scale": torch.from_numpy(packed.scale[:, 0].copy()),
        "input_scale": torch.tensor(packed.input_scale, dtype=torch.float32),
    }
