"""Load one block's tensors from a checkpoint in the compute type. No other tensors are in memory.

Where the stored type is the compute type, tensors are views of the mapped file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.reader import Checkpoint

from .compute import Compute, is_finite, to_torch


def load_block(checkpoint: Checkpoint, prefix: str, compute: Compute) -> dict[str, Tensor]:
    """Return all tensors below `prefix`, by the rest of their name.

    Prefixes are, for example, "decoder.layers.3.", "vision.layers.0." and "projector.".

    Raises:
        CheckpointError: a tensor holds NaN or infinity; it is named.
    """
    names = [name for name in checkpoint.shapes if name.startswith(prefix)]
    return {name.removeprefix(prefix): load_tensor(checkpoint, name, compute) for name in names}


def load_vision_embedding(checkpoint: Checkpoint, compute: Compute) -> dict[str, Tensor]:
    """Return the tensors that turn pixels into the vision tower's first hidden state."""
    names = [n for n in checkpoint.shapes if n.startswith("vision.") and not n.startswith("vision.layers.")]
    return {name.removeprefix("vision."): load_tensor(checkpoint, name, compute) for name in names}


def load_tensor(checkpoint: Checkpoint, name: str, compute: Compute) -> Tensor:
    """Return one tensor by canonical name, as `as_computed` does; CheckpointError as `load_block`."""
    stored = to_torch(checkpoint.tensor(name))
    require_finite(stored, name)
    return as_computed(stored, name, compute)


def as_computed(stored: Tensor, name: str, compute: Compute) -> Tensor:
    """Return a tensor on the device: weights and biases of linears in the compute type, all others in float32."""
    multiplied = stored.ndim == 2 or (name.endswith(".bias") and "norm" not in name)
    return stored.to(compute.device, compute.dtype if multiplied else torch.float32)


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise CheckpointError, naming the tensor, where it holds NaN or infinity."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity in {bad} places; the checkpoint is damaged, download it again"
        )
