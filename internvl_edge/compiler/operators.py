"""Compare the operators of a graph with what a version of TensorRT takes (`planning/versions.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from internvl_edge.base.errors import EngineError
from internvl_edge.planning.versions import Version, since

# Operators whose output has another type than their first input.
_INT64 = ("Shape", "ArgMax")
_BOOL = ("Less", "LessOrEqual", "And")
# Operators whose data is another input than the first.
_DATA = {"Where": 1}


def require_operators(header: bytes, name: str, flavour: str, version: Version) -> None:
    """Raise EngineError unless a version of TensorRT takes every operator of a graph, for the data it gets.

    Args:
        header: the graph for TensorRT, serialized.
        name: the name of the graph in the message.
        flavour: "tensorrt" or "tensorrt_rtx".
        version: major and minor version.
    """
    for operator, kind in operators(header):
        first = since(operator, kind, flavour)
        if first is not None and version >= first:
            continue
        there = f"has it since {first[0]}.{first[1]}" if first else "does not list it in any version"
        raise EngineError(
            f"{name} needs {operator} for {kind} data, and {flavour} {there}; this is {version[0]}.{version[1]}. "
            "Update TensorRT, or export and build again with this version of internvl-edge"
        )


def operators(header: bytes) -> list[tuple[str, str]]:
    """Return the operators of a graph with the kind of their data, as `planning.versions.Row` names it, sorted."""
    return sorted(set(_operators(header)))


def _operators(header: bytes) -> Iterator[tuple[str, str]]:
    import onnx

    graph = onnx.load_from_string(header).graph
    name_of = onnx.TensorProto.DataType.Name
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        data = types[node.input[_DATA.get(node.op_type, 0)]]
        attributes = {attribute.name: attribute for attribute in node.attribute}
        kind = name_of(data).lower() if data in (onnx.TensorProto.INT8, onnx.TensorProto.INT4) else "plain"
        made = data
        if node.op_type == "Cast":
            made = attributes["to"].i
            if data == onnx.TensorProto.UINT8:
                kind = f"uint8 to {'float32' if made == onnx.TensorProto.FLOAT else name_of(made).lower()}"
        elif data == onnx.TensorProto.UINT8:
            kind = "uint8"
        elif node.op_type == "DequantizeLinear":
            made = types[node.input[1]]
        elif node.op_type == "QuantizeLinear":
            made = types[node.input[2]] if len(node.input) > 2 else onnx.TensorProto.UINT8
        elif node.op_type in _INT64:
            made = onnx.TensorProto.INT64
        elif node.op_type in _BOOL:
            made = onnx.TensorProto.BOOL
        types |= dict.fromkeys(node.output, made)
        yield node.op_type, kind
