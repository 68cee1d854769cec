"""What stands in a network that TensorRT parsed: inputs and outputs, and layers to count."""

from __future__ import annotations

from collections import Counter
from typing import Any


def tensors(network: Any) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Inputs and outputs: name -> ("input" or "output", type, shape with -1 where it varies)."""
    found = {}
    for kind, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for tensor in (get(index) for index in range(count)):
            found[tensor.name] = kind, tensor.dtype.name, tuple(tensor.shape)
    return found


def layers(network: Any) -> list[Any]:
    """All layers."""
    return [network.get_layer(index) for index in range(network.num_layers)]


def layer_types(network: Any) -> Counter[str]:
    """How many layers of each type."""
    return Counter(layer.type.name for layer in layers(network))


def shape_inputs(network: Any) -> list[str]:
    """Inputs whose values decide shapes; such a value must be on the host, and forbids a CUDA graph."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return [tensor.name for tensor in inputs if tensor.is_shape_tensor]


def outputs_of_type(network: Any, layer_type: str) -> Counter[str]:
    """Element types of what the layers of one type put out."""
    return Counter(layer.get_output(0).dtype.name for layer in layers(network) if layer.type.name == layer_type)
