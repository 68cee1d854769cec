"""Read a network that TensorRT parsed: its inputs and outputs, and its layers."""

from __future__ import annotations

from collections import Counter
from typing import Any


def tensors(network: Any) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Return inputs and outputs: name -> ("input" or "output", type, shape with -1 where it varies)."""
    found = {}
    for kind, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for tensor in (get(index) for index in range(count)):
            found[tensor.name] = kind, tensor.dtype.name, tuple(tensor.shape)
    return found


def layers(network: Any) -> list[Any]:
    """Return all layers."""
    return [network.get_layer(index) for index in range(network.num_layers)]


def layer_types(network: Any) -> Counter[str]:
    """Return the number of layers of each type."""
    return Counter(layer.type.name for layer in layers(network))


def shape_inputs(network: Any) -> list[str]:
    """Return inputs whose values decide shapes. Such a value must be on the host, and prevents a CUDA graph."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return [tensor.name for tensor in inputs if tensor.is_shape_tensor]


def outputs_of_type(network: Any, layer_type: str) -> Counter[str]:
    """Return the element types of the outputs of all layers of one type."""
    return Counter(layer.get_output(0).dtype.name for layer in layers(network) if layer.type.name == layer_type)
