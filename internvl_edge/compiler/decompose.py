"""Replace newer ONNX operators by older ones, for TensorRT 10.3 (JetPack 6.2), which has no layers for them.

RMSNormalization, RotaryEmbedding and Attention become the basic operators that define them. The types are those that
TensorRT's own layers would use: norms compute in float32. The result is ONNX opset 21. The input is a model that
`header` has already changed for TensorRT. This module knows onnx-ir. It does not know TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET, IR_VERSION = 21, 10
# The score of a masked position: it is below every attention score, and float16 can represent it.
_MASKED_SCORE = -3e4


@dataclass(frozen=True)
class Heads:
    """The heads of attention: number of query heads, number of key and value heads, and the width of one head."""

    query: int
    key: int
    width: int


def decompose(model: ir.Model, heads: Heads, dtype: ir.DataType) -> None:
    """Replace all nodes that are newer than opset 21, in place. `dtype` is the type that the graph computes in."""
    writer = _Writer(model.graph, heads, dtype)
    for node in list(model.graph):
        if form := _FORMS.get(node.op_type):
            writer.before = node
            node.outputs[0].replace_all_uses_with(form(writer, node))
            model.graph.remove(node, safe=True)
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


class _Writer:
    """Inserts nodes before the node `before`. Equal constants, and nodes made by `shared`, exist only once."""

    before: ir.Node

    def __init__(self, graph: ir.Graph, heads: Heads, dtype: ir.DataType) -> None:
        self.heads, self.dtype = heads, dtype
        self._graph = graph
        self._constants: dict[tuple[bytes, str], ir.Value] = {}
        self._shared: dict[tuple[Any, ...], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        self._graph.insert_before(self.before, node)
        return node.outputs

    def one(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.op(op_type, *inputs, **attributes)[0]

    def shared(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Return one node for all calls with the same arguments.

        Its inputs must come before all nodes that use it.
        """
        key = (op_type, inputs, tuple(attributes.items()))
        if key not in self._shared:
            self._shared[key] = self.one(op_type, *inputs, **attributes)
        return self._shared[key]

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        array = np.asarray(values, dtype)
        key = array.tobytes(), f"{array.dtype}{array.shape}"
        if key not in self._constants:
            name = f"decomposed_{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def reshape(self, x: ir.Value | None, shape: Sequence[int]) -> ir.Value:
        return self.one("Reshape", x, self.constant(shape))


def _rms_normalization(w: _Writer, node: ir.Node) -> ir.Value:
    x, weight = node.inputs
    wide = w.one("Cast", x, to=int(ir.DataType.FLOAT))
    mean = w.one("ReduceMean", w.one("Mul", wide, wide), w.constant([-1]), keepdims=1)
    epsilon = w.constant(node.attributes["epsilon"].as_float(), np.float32)
    normalised = w.one("Div", wide, w.one("Sqrt", w.one("Add", mean, epsilon)))
    return w.one("Mul", w.one("Cast", normalised, to=int(w.dtype)), weight)


def _rotary_embedding(w: _Writer, node: ir.Node) -> ir.Value:
    """Rotate x [1, heads, seq, width]. Each value in the first half of a head pairs with one in its second half."""
    x, cos, sin = node.inputs[:3]
    cos, sin = (w.shared("Unsqueeze", table, w.constant([1])) for table in (cos, sin))
    first, second = w.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    return w.one(
        "Concat",
        w.one("Sub", w.one("Mul", first, cos), w.one("Mul", second, sin)),
        w.one("Add", w.one("Mul", first, sin), w.one("Mul", second, cos)),
        axis=-1,
    )


def _attention(w: _Writer, node: ir.Node) -> ir.Value:
    """Compute attention.

    The tower has q, k, v [tiles, tokens, heads * width]. The decoder has q, k, v [1, heads, seq, width] and a mask.
    """
    q, k, v = node.inputs[:3]
    heads = w.heads
    if len(node.inputs) == 3:
        q, k, v = (
            w.one("Transpose", w.reshape(x, [0, 0, heads.query, heads.width]), perm=[0, 2, 1, 3]) for x in (q, k, v)
        )
        attended = w.one("Transpose", _softmax_product(w, q, k, v, [0, 1, 3, 2]), perm=[0, 2, 1, 3])
        return w.reshape(attended, [0, 0, heads.query * heads.width])
    # Query heads that share a key head become one more axis, so that keys and values need not be repeated.
    q = w.reshape(q, [0, heads.key, heads.query // heads.key, -1, heads.width])
    k, v = (w.one("Unsqueeze", x, w.constant([2])) for x in (k, v))
    visible = w.shared("Unsqueeze", node.inputs[3], w.constant([1]))
    return w.reshape(_softmax_product(w, q, k, v, [0, 1, 2, 4, 3], visible), [0, heads.query, -1, heads.width])


def _softmax_product(
    w: _Writer,
    q: ir.Value | None,
    k: ir.Value | None,
    v: ir.Value | None,
    transposed: list[int],
    visible: ir.Value | None = None,
) -> ir.Value:
    """Compute softmax(q k^T / sqrt(width)) v. Queries are scaled first, which keeps the scores small in float16."""
    number = w.dtype.numpy()
    scaled = w.one("Mul", q, w.constant(w.heads.width**-0.5, number))
    scores = w.one("MatMul", scaled, w.one("Transpose", k, perm=transposed))
    if visible is not None:
        scores = w.one("Where", visible, scores, w.constant(_MASKED_SCORE, number))
    return w.one("MatMul", w.one("Softmax", scores, axis=-1), v)


_FORMS: dict[str, Callable[[_Writer, ir.Node], ir.Value]] = {
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Attention": _attention,
}
