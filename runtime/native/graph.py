"""Replace the attention nodes of an ONNX graph by the native operators, in memory.

A graph is a protobuf message (onnx.proto3 in the ONNX repository). Running a bundle needs no package that reads these,
so the few fields that matter are read here. Everything else is copied as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DOMAIN = "internvl_edge"
FLOAT, INT32 = 1, 6  # TensorProto.DataType
# Numbers of fields in onnx.proto3.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_VALUE_INFO = 1, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME = 1
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
# Encodings of a field on the wire.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class _Form:
    """A node that a native operator can stand in for: all of its inputs, outputs and attributes."""

    domain: str
    inputs: int
    outputs: int
    attributes: frozenset[str]


_FORMS = {
    "GroupQueryAttention": _Form("com.microsoft", 7, 3, frozenset({"num_heads", "kv_num_heads"})),
    "Attention": _Form("", 3, 1, frozenset({"q_num_heads", "kv_num_heads"})),
}


def with_native_attention(model: bytes, width: int | None = None) -> bytes | None:
    """Return a serialized ModelProto with the native operators in the place of attention nodes; None where none fits.

    Args:
        width: the last axis of what Attention returns. ONNX Runtime does not know the shapes of foreign operators, and
            fuses some of what follows only where it knows this axis.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    fields = []
    found = False
    for number, value in read_fields(model):
        if number == _MODEL_GRAPH and isinstance(value, bytes):
            value, replaced = _replaced(value, width)
            found = found or replaced
        fields.append(write_field(number, value))
    if not found:
        return None
    opset = write_field(_OPSET_DOMAIN, DOMAIN.encode()) + write_field(_OPSET_VERSION, 1)
    return b"".join([*fields, write_field(_MODEL_OPSET, opset)])


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field: an integer, or the bytes of a text or of a message.

    Numbers of fixed width do not occur at the levels that are read here. Raise ValueError for them, and for a message
    that ends within a field.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind not in (_VARINT, _BYTES):
            raise ValueError(f"field {key >> 3} has the encoding {kind}")
        value, position = _varint(message, position)
        if kind == _VARINT:
            yield key >> 3, value
            continue
        if position + value > len(message):
            raise ValueError(f"field {key >> 3} is cut off")
        yield key >> 3, message[position : position + value]
        position += value


def write_field(number: int, value: int | bytes) -> bytes:
    """Return one field as it stands in a message."""
    if isinstance(value, int):
        return _write_varint(number << 3 | _VARINT) + _write_varint(value)
    return _write_varint(number << 3 | _BYTES) + _write_varint(len(value)) + value


def value_info(name: str, element: int, axes: Sequence[int | None] | None) -> bytes:
    """Return a ValueInfoProto of a tensor. An axis of None has an unknown size; no axes mean an unknown rank."""
    tensor = write_field(1, element)
    if axes is not None:
        tensor += write_field(2, b"".join(write_field(1, write_field(1, each) if each else b"") for each in axes))
    return write_field(1, name.encode()) + write_field(2, write_field(1, tensor))


def _replaced(graph: bytes, width: int | None) -> tuple[bytes, bool]:
    """Replace what fits in a GraphProto; return whether anything did."""
    fields = []
    found = False
    for number, value in read_fields(graph):
        if number == _GRAPH_NODE and isinstance(value, bytes) and _fits(parts := _parts(value)):
            value, found = _in_our_domain(value), True
            if width is not None:
                shape = value_info(parts[_NODE_OUTPUT][0].decode(), FLOAT, (None, None, width))
                fields.append(write_field(_GRAPH_VALUE_INFO, shape))
        fields.append(write_field(number, value))
    return b"".join(fields), found


def _parts(node: bytes) -> dict[int, list[bytes]]:
    """Return the texts and messages of a node by field."""
    parts: dict[int, list[bytes]] = {}
    for number, value in read_fields(node):
        if isinstance(value, bytes):
            parts.setdefault(number, []).append(value)
    return parts


def _fits(parts: dict[int, list[bytes]]) -> bool:
    form = _FORMS.get(_text(parts, _NODE_OP_TYPE))
    inputs, outputs = parts.get(_NODE_INPUT, []), parts.get(_NODE_OUTPUT, [])
    return (
        form is not None
        and _text(parts, _NODE_DOMAIN) == form.domain
        and (len(inputs), len(outputs)) == (form.inputs, form.outputs)
        and all(inputs)
        and all(outputs)
        and {_attribute_name(each) for each in parts.get(_NODE_ATTRIBUTE, [])} == form.attributes
    )


def _in_our_domain(node: bytes) -> bytes:
    kept = [write_field(number, value) for number, value in read_fields(node) if number != _NODE_DOMAIN]
    return b"".join([*kept, write_field(_NODE_DOMAIN, DOMAIN.encode())])


def _attribute_name(attribute: bytes) -> str:
    for number, value in read_fields(attribute):
        if number == _ATTRIBUTE_NAME and isinstance(value, bytes):
            return value.decode()
    return ""


def _text(parts: dict[int, list[bytes]], number: int) -> str:
    return parts.get(number, [b""])[-1].decode()


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("a number is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _write_varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
