"""The building blocks of graphs: `linear`, `rms_norm`, `slice`, `heads` and others over onnx-ir.

This module knows ONNX operators and where weights are stored. It does not know InternVL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from .weights import Array, WeightFile

OPSET = 24
MICROSOFT = "com.microsoft"
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Types:
    """The element types of a graph: `weights` is the stored type of matrices, `activations` the type it computes in."""

    weights: ir.DataType
    activations: ir.DataType

    @property
    def folded(self) -> ir.DataType:
        """The stored type of matrices that folding has changed.

        bfloat16 would round them a second time, with a visible effect (image features move by 0.036). float16 has three
        more bits.
        """
        return ir.DataType.FLOAT16 if self.weights == ir.DataType.BFLOAT16 else self.weights


class PackedMatMul(Protocol):
    """Writes the products with quantized weights; see `quantized.PackedWeights`."""

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value | None:
        """Multiply x by the weights of linear `name`. Return None for float weights."""


class GraphBuilder:
    """One ONNX graph under construction. Matrices go to the shared `WeightFile`, small constants into the header.

    `read(name)` returns a tensor by canonical name, `shapes` holds the tensors that exist, and `packed` writes the
    quantized linears.
    """

    def __init__(
        self,
        name: str,
        types: Types,
        file: WeightFile,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], Array],
        packed: PackedMatMul | None = None,
    ) -> None:
        self.types = types
        self._file = file
        self._shapes = shapes
        self._read = read
        self._packed = packed
        self._group_sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self._constants: dict[bytes, ir.Value] = {}

    # -- inputs, outputs, constants ---------------------------------------------------------------------------------

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value a graph output with this name."""
        value.name = name
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._graph.outputs.append(value)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """Add a small constant to the header. Equal constants are shared."""
        array = np.asarray(values, dtype)
        key = array.tobytes() + str((array.dtype, array.shape)).encode()
        if key not in self._constants:
            self._constants[key] = self._initializer(ir.tensor(array, name=f"constant_{len(self._constants)}"))
        return self._constants[key]

    def floats(self, values: Any) -> ir.Value:
        """Add a small constant in the activations' type."""
        return self.constant(values, self.types.activations.numpy())

    def unit_scale(self) -> tuple[ir.Value, ir.Value]:
        """Return scale 1 and zero point 0, for int8 values that are multiplied by their scale elsewhere."""
        return self.floats(1), self.constant(0, np.int8)

    def model(self) -> ir.Model:
        """Return the finished model."""
        return ir.Model(self._graph, ir_version=11, producer_name="internvl-edge")

    # -- weights ----------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Return whether the model has this tensor."""
        return name in self._shapes

    def matrix(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        read: Callable[[], Array] | None = None,
        folded: bool = False,
    ) -> ir.Value:
        """Add a weight in `types.weights` (or `.folded`).

        The default is the checkpoint's linear [out, in] as [in, out].
        """
        if shape is None:
            shape = self._shapes[name][::-1]
        dtype = self.types.folded if folded else self.types.weights
        return self._weight(name, dtype, shape, read or (lambda: self._read(name).T))

    def vector(
        self, name: str, shape: tuple[int, ...] | None = None, read: Callable[[], Array] | None = None
    ) -> ir.Value:
        """Add a bias, norm or other small weight.

        It is stored in the activations' type, so that no precision is lost.
        """
        return self._weight(
            name, self.types.activations, shape or self._shapes[name], read or (lambda: self._read(name))
        )

    def weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        read: Callable[[], Array],
        file: WeightFile | None = None,
    ) -> ir.Value:
        """Add any tensor to a weights file, by default the graph's own, in its stored type."""
        value = self._graph.initializers.get(name)
        return value or self._initializer((file or self._file).add(name, dtype, shape, read))

    def _weight(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array]) -> ir.Value:
        value = self.weight(name, dtype, shape, read)
        return value if dtype == self.types.activations else self.cast(value, self.types.activations)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
        self._graph.register_initializer(value)
        return value

    # -- operators --------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add one node with one output."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add one node with several outputs."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        if domain:
            self._graph.opset_imports.setdefault(domain, 1)
        self._graph.append(node)
        return node.outputs

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Change the element type."""
        return self.op("Cast", x, to=int(dtype))

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape x. A size of 0 keeps a dimension, and -1 takes the rest."""
        return self.op("Reshape", x, self.constant(shape))

    def slice(self, x: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        """Return x[start:end] along one axis. `start` and `end` are [1] int64."""
        return self.op("Slice", x, start, end, self.constant([axis]))

    def split(self, x: ir.Value, parts: int) -> Sequence[ir.Value]:
        """Split the last axis into equal parts."""
        return self.ops("Split", x, outputs=parts, axis=-1, num_outputs=parts)

    def linear(self, x: ir.Value, name: str, folded: bool = False) -> ir.Value:
        """Apply a linear, x [..., in] -> [..., out], with its bias where the checkpoint has one."""
        y = self._packed(self, x, name) if self._packed else None
        if y is None:
            y = self.op("MatMul", x, self.matrix(f"{name}.weight", folded=folded))
        return self.op("Add", y, self.vector(f"{name}.bias")) if self.has(f"{name}.bias") else y

    def group_sums(self, x: ir.Value, groups: int) -> ir.Value:
        """Sum x [batch, seq, width] over equal parts of the width, [batch, seq, groups].

        The sum is computed in float32.
        """
        if (x, groups) not in self._group_sums:
            wide = self.types.activations == ir.DataType.FLOAT
            parts = self.reshape(x if wide else self.cast(x, ir.DataType.FLOAT), [0, 0, groups, -1])
            sums = self.op("ReduceSum", parts, self.constant([-1]), keepdims=0)
            self._group_sums[x, groups] = sums if wide else self.cast(sums, self.types.activations)
        return self._group_sums[x, groups]

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Apply root mean square normalisation over the last axis."""
        return self.op("RMSNormalization", x, self.vector(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def head_norm(self, x: ir.Value, name: str, epsilon: float, head_dim: int) -> ir.Value:
        """Apply root mean square normalisation to each head of x [batch, seq, heads * head_dim]."""
        return self.reshape(self.rms_norm(self.reshape(x, [0, 0, -1, head_dim]), name, epsilon), [0, 0, -1])

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Apply layer normalisation over the last axis."""
        weight, bias = self.vector(f"{name}.weight"), self.vector(f"{name}.bias")
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def silu(self, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def heads(self, x: ir.Value, head_dim: int) -> ir.Value:
        """Reshape [batch, seq, heads * head_dim] to [batch, heads, seq, head_dim]."""
        return self.op("Transpose", self.reshape(x, [0, 0, -1, head_dim]), perm=[0, 2, 1, 3])

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        """Reshape [batch, heads, seq, head_dim] to [batch, seq, width]."""
        return self.reshape(self.op("Transpose", x, perm=[0, 2, 1, 3]), [0, 0, width])
