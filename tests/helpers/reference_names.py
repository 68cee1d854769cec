"""The torch reference's names of tensors for which the product has its own names."""

from __future__ import annotations

RENAMES = {
    "vision.layers.": "vision_model.encoder.layers.",
    "decoder.layers.": "language_model.model.layers.",
    "projector.fc1": "mlp1.1",
    "projector.fc2": "mlp1.3",
}


def reference_name(name: str) -> str:
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def text_name(name: str) -> str:
    """Return the reference's name of a canonical decoder tensor."""
    if name.startswith("decoder.layers."):
        return reference_name(name)
    return "language_model." + ("" if "lm_head" in name else "model.") + name.removeprefix("decoder.")
