"""The building blocks of graphs: `linear`, `rms_norm`, `slice`, `heads` and others over onnx-ir.

This module knows ONNX operators and where weights are stored. It does not know InternVL. A subclass of `GraphBuilder`
writes the same graphs with other operators, for a reader that lacks some of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint.kv_scales import KvScales
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import PackedLinear, Scheme

from .weights import Array

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


@dataclass(frozen=True)
class Heads:
    """The heads of attention: the number for queries, the number for keys and values, and the width of each."""

    query: int
    key: int
    width: int


class Source(Protocol):
    """What graphs are written from: a `Checkpoint`, whose attributes and methods these are, or what stands for one."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    schemes: dict[str, Scheme]
    kv_scales: KvScales | None

    def tensor(self, name: str) -> Array:
        """Return one tensor by canonical name."""

    def linear(self, name: str) -> PackedLinear | None:
        """Return a quantized linear by canonical name, or None for float weights."""

    def input_scale(self, name: str) -> float:
        """Return the scale of the inputs of a linear with int8 inputs."""


class Weights(Protocol):
    """Where the weights of a graph are placed, such as a `WeightFile`."""

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array], exact: bool = True
    ) -> ir.TensorProtocol:
        """Return the tensor for a weight. If not `exact`, it can have another float type, and the graph casts it."""


class PackedMatMul(Protocol):
    """Writes the products with quantized weights; see `quantized.PackedWeights`."""

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value | None:
        """Multiply x by the weights of linear `name`. Return None for float weights."""


class GraphBuilder:
    """One ONNX graph under construction. Matrices go to the shared `WeightFile`, small constants into the header.

    `read(name)` returns a tensor by canonical name, `shapes` holds the tensors that exist, and `packed` writes the
    quantized linears. `sizes` gives numbers to dimensions of inputs and outputs that have names.

    Attributes:
        types: what the following nodes compute in.
    """

    opset: ClassVar[int] = 24
    ir_version: ClassVar[int] = 11
    # Whether uint8 tensors can be reshaped and transposed, which moves fewer bytes than floats.
    moves_bytes: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        types: Types,
        file: Weights,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Array],
        packed: PackedMatMul | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.types = types
        self._sizes = sizes or {}
        self._file = file
        self._shapes = shapes
        self._read = read
        self._packed = packed
        self._group_sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": self.opset}, name=name)
        self._constants: dict[bytes, ir.Value] = {}

    # -- inputs, outputs, constants ---------------------------------------------------------------------------------

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=self._shape(shape))
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value a graph output with this name."""
        value.name = name
        value.type, value.shape = ir.TensorType(dtype), self._shape(shape)
        self._graph.outputs.append(value)

    def _shape(self, shape: Sequence[int | str]) -> ir.Shape:
        return ir.Shape([self._sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape])

    def compute_in(self, dtype: ir.DataType) -> None:
        """Let the following nodes compute in another type. Values that they read must be cast to it."""
        self.types = replace(self.types, activations=dtype)

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
        return ir.Model(self._graph, ir_version=self.ir_version, producer_name="internvl-edge")

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
        return self.weight(
            name, self.types.activations, shape or self._shapes[name], read or (lambda: self._read(name))
        )

    def factor(self, name: str, shape: tuple[int, ...], read: Callable[[], Array]) -> ir.Value:
        """Add a matrix that is stored in the activations' type."""
        return self._weight(name, self.types.activations, shape, read)

    def columns(self, outputs: int) -> int:
        """Return the number of columns that a quantized matrix with `outputs` columns has in the graph."""
        return outputs

    def weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        read: Callable[[], Array],
        file: Weights | None = None,
        exact: bool = True,
    ) -> ir.Value:
        """Add any tensor to a weights file, by default the graph's own, in its stored type."""
        value = self._graph.initializers.get(name)
        return value or self._initializer((file or self._file).add(name, dtype, shape, read, exact))

    def _weight(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array]) -> ir.Value:
        value = self.weight(name, dtype, shape, read, exact=False)
        return value if value.dtype == self.types.activations else self.cast(value, self.types.activations)

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

    def bytes_to_floats(self, x: ir.Value) -> ir.Value:
        """Change uint8 to the activations' type, which holds all of its values exactly."""
        return self.cast(x, self.types.activations)

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
        """Apply root mean square normalization over the last axis."""
        return self.op("RMSNormalization", x, self.vector(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def head_norm(self, x: ir.Value, name: str, epsilon: float, head_dim: int) -> ir.Value:
        """Apply root mean square normalization to each head of x [batch, seq, heads * head_dim]."""
        return self.reshape(self.rms_norm(self.reshape(x, [0, 0, -1, head_dim]), name, epsilon), [0, 0, -1])

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Apply layer normalization over the last axis."""
        weight, bias = self.vector(f"{name}.weight"), self.vector(f"{name}.bias")
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def rotary(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Rotate x [batch, heads, seq, head_dim] by angles with cos and sin [batch, seq, head_dim / 2]."""
        return self.op("RotaryEmbedding", x, cos, sin)

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, heads: Heads, visible: ir.Value | None = None
    ) -> ir.Value:
        """Return softmax(q k^T / sqrt(width)) v for each head, in the shape of q.

        Without `visible`, q, k and v are [batch, seq, heads * width]. With it, q is [batch, heads, seq, width], k and v
        are [batch, heads, slots, width], and `visible` [batch, 1, seq, slots] says what each token sees.
        """
        if visible is None:
            return self.op("Attention", q, k, v, q_num_heads=heads.query, kv_num_heads=heads.key)
        return self.op("Attention", q, k, v, visible)

    def silu(self, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def heads(self, x: ir.Value, head_dim: int) -> ir.Value:
        """Reshape [batch, seq, heads * head_dim] to [batch, heads, seq, head_dim]."""
        return self.op("Transpose", self.reshape(x, [0, 0, -1, head_dim]), perm=[0, 2, 1, 3])

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        """Reshape [batch, heads, seq, head_dim] to [batch, seq, width]."""
        return self.reshape(self.op("Transpose", x, perm=[0, 2, 1, 3]), [0, 0, width])
