"""Change the types in a graph and insert nodes, step by step and in place.

This module needs onnx-ir. It knows how `export` stores weights, sums over groups and puts out logits. It does not know
TensorRT, and not what a graph is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import BundleError

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Float matrices with more elements than this stay in their file, and the builder converts them. Smaller ones are
# converted here.
_SMALL = 1 << 16
# The head computes in this type, whatever the layers compute in.
HEAD_TYPE = ir.DataType.FLOAT16


class GraphEditor:
    """One graph that is being changed.

    Args:
        path: the bundle's graph; its external data is beside it, and is read only where it is changed.
        activations: the type that the graph computes in: "float32", "float16" or "bfloat16".
        dtype: the type that it shall compute in: "float16" or "bfloat16".

    Attributes:
        head: nodes that compute in `HEAD_TYPE` instead, behind the tensor `normed`.
    """

    def __init__(self, path: Path, activations: str, dtype: str) -> None:
        self.path = path
        self.model = ir.load(path)
        self.graph = self.model.graph
        self.source, self.target = DTYPES[activations], DTYPES[dtype]
        self.head: set[ir.Node] = set()
        self.normed: ir.Value | None = None

    def serialise(self) -> bytes:
        """Return the model's bytes. Names of external data are relative to the bundle's folder."""
        proto: Any = ir.to_proto(self.model)
        data: bytes = proto.SerializeToString()
        return data

    def retype(self) -> None:
        """Change inputs, constants, casts and outputs to the new dtype (see the module docstring)."""
        self._retype_initializers()
        self._retype_casts()
        if self.source == ir.DataType.FLOAT:
            self._sum_in_float32()
        if self.normed is not None and self.target != HEAD_TYPE:
            narrow = self.insert_before(first_of(self.graph, self.head), "Cast", [self.normed], to=int(HEAD_TYPE))
            for node, index in list(self.normed.uses()):
                if node in self.head:
                    node.replace_input_with(index, narrow)
        for value in self.graph.inputs:
            if value.dtype == self.source:
                value.type = ir.TensorType(self.target)
        for value in list(self.graph.outputs):
            if value.dtype != self.source:
                continue
            if value.name == "logits":
                self._widen_logits(value)
            else:
                value.type = ir.TensorType(self.target)
        self._drop_unused()

    def _retype_initializers(self) -> None:
        for value in list(self.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != self.source:
                continue
            uses = [(node, index) for node, index in value.uses()]
            for dtype in (self.target, HEAD_TYPE) if self.target != HEAD_TYPE else (self.target,):
                mine = [(node, index) for node, index in uses if self._type_in(node) == dtype]
                if mine:
                    self._retype_initializer(value, tensor, dtype, mine)

    def _retype_initializer(
        self, value: ir.Value, tensor: ir.TensorProtocol, dtype: ir.DataType, uses: list[tuple[ir.Node, int]]
    ) -> None:
        """Give some uses of a constant another type."""
        if _is_large_matrix(value, tensor):
            converted = self.insert_before(first_of(self.graph, [node for node, _ in uses]), "Cast", [value])
            self._attribute(converted, "to", int(dtype))
        else:
            narrow = self.read(tensor).astype(np.float32).astype(dtype.numpy())
            if not np.isfinite(narrow.astype(np.float32)).all():
                raise BundleError(f"{self.path.name}: {value.name} does not fit {dtype.name.lower()}")
            converted = self.initializer(f"{value.name}_{dtype.name.lower()}", ir.tensor(narrow, dtype=dtype))
        for node, index in uses:
            node.replace_input_with(index, converted)

    def _type_in(self, node: ir.Node) -> ir.DataType:
        return HEAD_TYPE if node in self.head else self.target

    def _retype_casts(self) -> None:
        for node in list(self.graph):
            if node.op_type != "Cast" or node.attributes["to"].as_int() != int(self.source):
                continue
            source = node.inputs[0]
            assert source is not None
            users = {self._type_in(user) for user, _ in node.outputs[0].uses()}
            dtype = users.pop() if len(users) == 1 else self._type_in(node)
            if source.dtype == dtype and source.is_initializer():
                node.outputs[0].replace_all_uses_with(source)
                self.graph.remove(node, safe=True)
            else:
                self._attribute(node.outputs[0], "to", int(dtype))

    def _sum_in_float32(self) -> None:
        """Keep sums over groups of activations in float32, because their terms cancel. There is no other ReduceSum."""
        for node in [node for node in self.graph if node.op_type == "ReduceSum"]:
            source = node.inputs[0]
            assert source is not None
            wide = self.insert_before(node, "Cast", [source], to=int(ir.DataType.FLOAT))
            node.replace_input_with(0, wide)
            sums = node.outputs[0]
            uses = list(sums.uses())
            narrow = ir.node("Cast", [sums], {"to": int(self._type_in(node))})
            self.graph.insert_after(node, narrow)
            for user, index in uses:
                user.replace_input_with(index, narrow.outputs[0])

    def _widen_logits(self, logits: ir.Value) -> None:
        node = logits.producer()
        assert node is not None
        cast = ir.node("Cast", [logits], {"to": int(ir.DataType.FLOAT)})
        self.graph.insert_after(node, cast)
        wide = cast.outputs[0]
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), logits.shape
        self.graph.outputs[self.graph.outputs.index(logits)] = wide
        logits.name, logits.type, logits.shape = "logits_narrow", None, None
        wide.name = "logits"

    def _drop_unused(self) -> None:
        """Remove nodes and constants that are no longer used, from the last node to the first."""
        kept = set(self.graph.outputs)
        for node in reversed(list(self.graph)):
            if not any(output in kept or output.uses() for output in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]

    def read(self, tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
        """Return the values of a constant.

        External data is read here, because onnx-ir refuses files that are links, and files of a bundle may be links.
        """
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        if Path(tensor.location).name != str(tensor.location):
            raise self.unexpected("data in the bundle's own folder")
        dtype, shape = tensor.dtype.numpy(), tensor.shape.numpy()
        path, offset = self.path.parent / tensor.location, tensor.offset or 0
        if tensor.dtype.bitwidth == 4:  # two in a byte, the lower half first
            pairs = np.fromfile(path, np.int8, count=-(-tensor.size // 2), offset=offset)
            halves = np.stack([(pairs << 4) >> 4, pairs >> 4], axis=-1).reshape(-1)[: tensor.size]
            return halves.astype(dtype).reshape(shape)
        return np.fromfile(path, dtype, count=tensor.size, offset=offset).reshape(shape)

    def constant(self, name: str, values: list[int]) -> ir.Value:
        """Return a constant int64 vector. It exists only once."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self.initializer(name, ir.tensor(np.array(values, np.int64)))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a constant."""
        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
        self.graph.register_initializer(value)
        return value

    def input(self, name: str) -> ir.Value:
        """Return an input that is used. Raise BundleError where there is none of this name."""
        for value in self.graph.inputs:
            if value.name == name and value.uses():
                return value
        raise self.unexpected(f"an input {name}")

    def new_input(self, name: str, dim: str) -> ir.Value:
        """Add an int64 vector of variable length to the inputs."""
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([dim]))
        self.graph.inputs.append(value)
        return value

    def insert_before(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> ir.Value:
        """Insert a node and return its output."""
        new = ir.node(op_type, inputs, attributes)
        self.graph.insert_before(node, new)
        return new.outputs[0]

    @staticmethod
    def _attribute(output: ir.Value, name: str, value: int) -> None:
        node = output.producer()
        assert node is not None
        node.attributes[name] = ir.AttrInt64(name, value)

    def unexpected(self, expected: str) -> BundleError:
        """Return the error for a graph without what `export` writes."""
        return BundleError(
            f"{self.path} is not the graph that export writes (expected {expected}); export the bundle again"
        )


def _is_large_matrix(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant is a large weight matrix, used only as the second factor of MatMul."""
    return tensor.size > _SMALL and all(node.op_type == "MatMul" and index == 1 for node, index in value.uses())


def first_of(graph: ir.Graph, nodes: Iterable[ir.Node]) -> ir.Node:
    """Return the node that comes first in the graph."""
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)
