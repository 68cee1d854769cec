"""A bundle's graph in the place of the checkpoint that it was exported from: where its weights lie, and their schemes.

With it, the functions of `export` write further graphs over the data files that a bundle has already. A weight is found
by the name that `export` gave it. The scales of int8 inputs and of an int8 KV cache are constants without names, and
are found where they are used. This module needs onnx-ir. It does not know TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import BundleError
from internvl_edge.checkpoint.kv_scales import KvScales
from internvl_edge.checkpoint.layouts import linear_names, tensor_shapes
from internvl_edge.export.weights import NUMPY_DTYPES, Array
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import W8A8, PackedLinear, Scheme

_BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}


class StoredGraph:
    """The weights of one graph. It is an `export.builder.Source`, and an `export.builder.Weights` without new places.

    Args:
        path: the graph in the standard dialect; its data files are beside it.
        config: the model.

    Raises:
        BundleError: from any method, when the graph is not one that `export` writes.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.config = config
        self.shapes = tensor_shapes(config)
        self._path = path
        self._graph = ir.load(path).graph
        self._tensors = {name: value.const_value for name, value in self._graph.initializers.items()}
        self._unused = {name for name, tensor in self._tensors.items() if isinstance(tensor, ir.ExternalTensor)}
        self.schemes = {name: scheme for name in linear_names(config) if (scheme := self._scheme(name))}
        self.kv_scales = self._kv_scales()

    def has(self, name: str) -> bool:
        """Return whether the graph has a weight of this name."""
        return name in self._tensors

    def tensor(self, name: str) -> NoReturn:
        """Refuse: weights are not read, because they are in the bundle's files already."""
        raise AssertionError(name)

    def linear(self, name: str) -> PackedLinear | None:
        """Refuse, as `tensor` does."""
        self.tensor(name)

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array], exact: bool = True
    ) -> ir.TensorProtocol:
        """Return a stored weight. One of another float type is converted if it must be `exact`.

        A weight with fewer columns is filled up: integers with 0, and scales with 1.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self._unexpected(f"the weight {name}")
        self._unused.discard(name)
        floats = dtype in NUMPY_DTYPES
        stored = tuple(int(size) for size in tensor.shape.numpy())
        if stored[:-1] != shape[:-1] or stored[-1:] > shape[-1:] or (tensor.dtype in NUMPY_DTYPES) != floats:
            raise self._unexpected(f"{name} of shape {list(shape)}, found {list(stored)}")
        if stored == shape and (tensor.dtype == dtype or (floats and not exact)):
            return tensor
        if not floats and tensor.dtype != dtype:
            raise self._unexpected(f"{name} in {dtype.name.lower()}")
        values = self._read(tensor)
        if stored != shape:
            missing = [(0, 0)] * (len(shape) - 1) + [(0, shape[-1] - stored[-1])]
            values = np.pad(values, missing, constant_values=values.dtype.type(1 if floats else 0))
        if floats:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32).astype(NUMPY_DTYPES[dtype])
            if not np.isfinite(values.astype(np.float32)).all():
                raise BundleError(f"{self._path.name}: {name} does not fit {dtype.name.lower()}; try another --dtype")
        return ir.tensor(values, dtype=dtype, name=name)

    def require_all_used(self) -> None:
        """Raise BundleError where the graph has a weight that nobody asked for: it computes something else."""
        if self._unused:
            raise self._unexpected(f"no weight {min(self._unused)}")

    def input_scale(self, name: str) -> float:
        """Return the scale of the inputs of a linear with int8 inputs."""
        product = self._reader(self._reader(self._graph.initializers[f"{name}.int8"], "DequantizeLinear"), "MatMul")
        scale = self._maker(product.producer(), 0, "DequantizeLinear").inputs[1]
        return float(self._constant(scale).item())

    def _scheme(self, name: str) -> Scheme | None:
        """Return how a linear is quantized, from the form of its weights."""
        if f"{name}.int8" in self._tensors:
            return W8A8
        values, scale = self._tensors.get(f"{name}.values"), self._tensors.get(f"{name}.scale")
        if values is None:
            return None
        if scale is None or values.dtype not in _BITS:
            raise self._unexpected(f"integers with scales for {name}")
        if (scale.numpy() < 0).any():
            raise BundleError(
                f"{name} has scales below 0, which TensorRT's documentation rules out; quantize with --positive-scales"
            )
        group = int(values.shape.numpy()[0]) // int(scale.shape.numpy()[0]) if len(scale.shape) == 2 else None
        return Scheme(_BITS[values.dtype], group, symmetric=f"{name}.correction" not in self._tensors)

    def _kv_scales(self) -> KvScales | None:
        """Return the scales of an int8 cache: the graph multiplies new entries by their inverses, then rounds them."""
        inputs = {value.name: value for value in self._graph.inputs}
        if (first := inputs.get("past_key_values.0.key")) is None or first.dtype != ir.DataType.INT8:
            return None
        found: dict[str, Array] = {}
        for kind in ("key", "value"):
            rows: list[Array] = []
            for layer in range(self.config.decoder.num_hidden_layers):
                updated = self._reader(inputs[f"past_key_values.{layer}.{kind}"], "TensorScatter")
                rounded = self._maker(updated.producer(), 1, "QuantizeLinear")
                inverse = self._constant(self._maker(rounded, 0, "Mul").inputs[1])
                rows.append(1 / inverse.astype(np.float32)[0, :, 0])
            found[kind] = np.stack(rows)
        return KvScales(found["key"], found["value"])

    def _reader(self, value: ir.Value, operator: str) -> ir.Value:
        """Return the output of the only node that reads a value."""
        nodes = [node for node, _ in value.uses()]
        if [node.op_type for node in nodes] != [operator]:
            raise self._unexpected(f"{operator} behind {value.name}")
        return nodes[0].outputs[0]

    def _maker(self, node: ir.Node | None, index: int, operator: str) -> ir.Node:
        """Return the node that makes an input of another one."""
        value = node.inputs[index] if node is not None else None
        maker = value.producer() if value is not None else None
        if maker is None or maker.op_type != operator:
            raise self._unexpected(f"{operator} before {node.name if node is not None else 'a node'}")
        return maker

    def _constant(self, value: ir.Value | None) -> Array:
        if value is None or value.const_value is None:
            raise self._unexpected("constant scales")
        return value.const_value.numpy()

    def _read(self, tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
        """Return the values of a constant.

        External data is read here, because onnx-ir refuses files that are links, and files of a bundle may be links.
        """
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        if Path(tensor.location).name != str(tensor.location):
            raise self._unexpected("data in the bundle's own folder")
        dtype, shape = tensor.dtype.numpy(), tensor.shape.numpy()
        path, offset = self._path.parent / tensor.location, tensor.offset or 0
        if tensor.dtype.bitwidth == 4:  # two in a byte, the lower half first
            pairs = np.fromfile(path, np.int8, count=-(-tensor.size // 2), offset=offset)
            halves = np.stack([(pairs << 4) >> 4, pairs >> 4], axis=-1).reshape(-1)[: tensor.size]
            return halves.astype(dtype).reshape(shape)
        return np.fromfile(path, dtype, count=tensor.size, offset=offset).reshape(shape)

    def _unexpected(self, expected: str) -> BundleError:
        return BundleError(
            f"{self._path} is not the graph that export writes (expected {expected}); export the bundle again"
        )
