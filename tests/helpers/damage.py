"""Damage the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def poison(checkpoint: Path, name: str, value: float) -> None:
    """Replace one number of a stored tensor."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
