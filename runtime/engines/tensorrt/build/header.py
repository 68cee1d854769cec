"""Change a bundle's graphs for TensorRT: the same nodes and weights, with another dtype and fixed sizes.

All changes are in the header, that is the ONNX model without its large weights (a few hundred kilobytes). The weights
stay in the bundle's files. The changes are:

- Everything that computes in the bundle's `activations` computes in bfloat16 or float16. Sums over groups, which
  correct zero points, and the logits stay in float32.
- The batch is 1 and the KV cache has a fixed capacity, as TensorRT's in-place update requires.
- `slots` [window] int64, the numbers 0 to window - 1, becomes an input. The shape of this input, and not a value, now
  says how many cache slots attention reads. So no shape depends on device data, and a decode step can be captured as a
  CUDA graph. The mask hides the slots after the present position.
- `kept` [kept] int64 becomes an input in the same way: the positions of this step that get logits.
- `token` [1, kept] int64, the most probable tokens, becomes an output.
- TensorRT's cache update does not support int8, and TensorRT before 10.15 has no cache update. In these cases the graph
  only reads the cache. The entries of the step become one output `new_entries` [1, 2 x layers x kv_heads, seq,
  head_dim], and attention reads the cache followed by these entries.
- For TensorRT before 10.15, older operators replace newer ones (`decompose`).

This module needs onnx-ir. It knows the names and the graph patterns that `export` writes. It does not know TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import BundleError

from ..runtime_cache import NEW_ENTRIES
from .decompose import Heads, decompose

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Float matrices with more elements than this stay in their file, and the builder converts them. Smaller ones are
# converted here.
_SMALL = 1 << 16


def vision_header(path: Path, activations: str, dtype: str, heads: Heads | None = None) -> bytes:
    """Return the vision graph in another dtype, serialised.

    pixels [tiles, S, S, 3] uint8 -> image_embeds [tiles, tokens_per_tile, hidden] in `dtype`

    Args:
        path: the bundle's graph; the result refers to its external data, which is not read.
        activations: the type that the graph computes in: "float32", "float16" or "bfloat16".
        dtype: the type that the result computes in: "float16" or "bfloat16".
        heads: the attention heads, given only for TensorRT before 10.15; None for newer versions.

    Raises:
        BundleError: the graph is not as `export` writes it.
    """
    editor = _GraphEditor(path, activations, dtype)
    editor.cast_bytes_at_once("pixels")
    editor.retype()
    editor.decompose(heads)
    return editor.serialise()


def decoder_header(path: Path, activations: str, dtype: str, capacity: int, heads: Heads | None = None) -> bytes:
    """Return the standard decoder graph in another dtype and with fixed sizes, serialised.

    inputs_embeds [1, seq, hidden], cos and sin [1, seq, head_dim / 2], past_length [1] int64, slots [window] int64,
    kept [kept] int64, past_key_values.N.{key,value} [1, kv_heads, capacity, head_dim]
    -> logits [1, kept, vocab] float32, token [1, kept] int64, present.N.{key,value} in the memory of
       past_key_values.N.{key,value}, or new_entries instead of all present.*

    Args and raises are those of `vision_header`; `capacity` is the number of tokens in the KV cache.
    """
    editor = _GraphEditor(path, activations, dtype)
    editor.take_kept()
    editor.take_slots()
    editor.put_out_new_entries(always=heads is not None)
    editor.fix_sizes({"batch": 1, "capacity": capacity})
    editor.choose_token()
    editor.retype()
    editor.decompose(heads)
    return editor.serialise()


class _GraphEditor:
    """Changes one graph in place, step by step."""

    def __init__(self, path: Path, activations: str, dtype: str) -> None:
        self._path = path
        self._model = ir.load(path)
        self._graph = self._model.graph
        self._from, self._to = DTYPES[activations], DTYPES[dtype]

    def serialise(self) -> bytes:
        """Return the model's bytes. Names of external data are relative to the bundle's folder."""
        proto: Any = ir.to_proto(self._model)
        data: bytes = proto.SerializeToString()
        return data

    def cast_bytes_at_once(self, name: str) -> None:
        """Convert the uint8 input before any other node, because TensorRT cannot reshape or transpose uint8 tensors.

        All integers up to 255 are exact in both 16-bit types.
        """
        pixels = self._input(name)
        consumers = list(pixels.uses())
        converted = self._insert_before(consumers[0][0], "Cast", [pixels], to=int(self._from))
        for node, index in consumers:
            node.replace_input_with(index, converted)

    def take_kept(self) -> None:
        """Replace the input `logits_to_keep`, a number of last positions, by `kept`, the positions that get logits."""
        keep = self._input("logits_to_keep")
        negated = [node for node, _ in keep.uses()]
        slices = [node for node in self._graph if node.op_type == "Slice" and node.inputs[1] in _outputs(negated)]
        if len(slices) != 1 or slices[0].inputs[0] is None:
            raise self._unexpected("one Slice that logits_to_keep decides")
        kept = self._new_input("kept", "kept")
        hidden = self._insert_before(slices[0], "Gather", [slices[0].inputs[0], kept], axis=1)
        slices[0].outputs[0].replace_all_uses_with(hidden)
        for node in [*slices, *negated]:
            self._graph.remove(node, safe=True)
        self._graph.inputs.remove(keep)

    def take_slots(self) -> None:
        """Take the number of cache slots that attention reads from the shape of a new input `slots`.

        In the bundle's graph it is a computed length.
        """
        scatters = [node for node in self._graph if node.op_type == "TensorScatter"]
        slices = [use for node in scatters for use, _ in node.outputs[0].uses() if use.op_type == "Slice"]
        totals = {node.inputs[2] for node in slices}
        masks = [node for node in self._graph if node.op_type == "LessOrEqual"]
        if len(slices) != len(scatters) or len(totals) != 1 or len(masks) != 1 or not slices:
            raise self._unexpected("one TensorScatter and Slice per cache, and one mask")
        slots = self._new_input("slots", "window")
        mask, total = masks[0], totals.pop()
        window = self._insert_before(mask, "Shape", [slots])
        mask.replace_input_with(0, slots)
        assert total is not None
        for node in slices:
            node.replace_input_with(2, window)

    def put_out_new_entries(self, always: bool) -> None:
        """Replace the in-place update of an int8 cache by the output `new_entries`; with `always`, of any cache."""
        scatters = [node for node in self._graph if node.op_type == "TensorScatter"]
        caches = [node.inputs[0] for node in scatters]
        dtype = caches[0].dtype if caches and caches[0] else None
        if not (always or dtype == ir.DataType.INT8):
            return
        new = [node.inputs[1] for node in scatters]
        for node in scatters:
            self._read_past_and_new(node)
        self._mask_past_and_new()
        for node in scatters:
            self._graph.outputs.remove(node.outputs[0])
            self._graph.remove(node, safe=True)
        joined = ir.node("Concat", new, {"axis": 1})
        self._graph.append(joined)
        entries, cache = joined.outputs[0], caches[0]
        assert cache is not None
        assert cache.shape is not None
        assert dtype is not None
        _, heads, _, width = cache.shape
        assert isinstance(heads, int)
        entries.name, entries.type = NEW_ENTRIES, ir.TensorType(dtype)
        entries.shape = ir.Shape([1, len(new) * heads, "seq", width])
        self._graph.outputs.append(entries)

    def _read_past_and_new(self, scatter: ir.Node) -> None:
        """Make attention read the cache before this step, followed by the entries of this step."""
        past, new = scatter.inputs[:2]
        slices = [node for node, _ in scatter.outputs[0].uses()]
        if [node.op_type for node in slices] != ["Slice"]:
            raise self._unexpected("one Slice for each cache")
        slices[0].replace_input_with(0, past)
        used = slices[0].outputs[0]
        reader, index = next(iter(used.uses()))
        if reader.op_type == "DequantizeLinear":
            added = self._insert_before(reader, "DequantizeLinear", [new, *reader.inputs[1:]])
            used, new = reader.outputs[0], added
            reader, index = next(iter(used.uses()))
        reader.replace_input_with(index, self._insert_before(reader, "Concat", [used, new], axis=2))

    def _mask_past_and_new(self) -> None:
        """Make the mask show the slots before this step, and of this step the positions up to each token's own."""
        mask = next(node for node in self._graph if node.op_type == "LessOrEqual")
        slots, rows = mask.inputs  # [window], [1, 1, seq, 1]
        positions = rows.producer().inputs[0] if rows is not None and rows.producer() else None  # type: ignore[union-attr]
        uses = list(mask.outputs[0].uses())
        first = _first(self._graph, [node for node, _ in uses])
        before = self._insert_before(first, "Less", [slots, self._input("past_length")])
        past = self._insert_before(first, "And", [mask.outputs[0], before])
        axes = ir.Value(name="row_axes", const_value=ir.tensor(np.array([1, 2]), name="row_axes"))
        self._graph.register_initializer(axes)
        columns = self._insert_before(first, "Unsqueeze", [positions, axes])
        new = self._insert_before(first, "LessOrEqual", [columns, rows])
        both = self._insert_before(first, "Concat", [past, new], axis=3)
        for node, index in uses:
            node.replace_input_with(index, both)

    def fix_sizes(self, sizes: dict[str, int]) -> None:
        """Replace symbolic dimensions of inputs and outputs by sizes."""
        for value in [*self._graph.inputs, *self._graph.outputs]:
            assert value.shape is not None
            dims: list[Any] = [sizes.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)

    def choose_token(self) -> None:
        """Add the output `token`, the index of the largest logit."""
        logits = next(value for value in self._graph.outputs if value.name == "logits")
        node = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
        self._graph.append(node)
        token = node.outputs[0]
        token.name, token.type, token.shape = "token", ir.TensorType(ir.DataType.INT64), ir.Shape([1, "kept"])
        self._graph.outputs.append(token)

    def retype(self) -> None:
        """Change inputs, constants, casts and outputs to the new dtype (see the module docstring)."""
        self._retype_initializers()
        self._retype_casts()
        if self._from == ir.DataType.FLOAT:
            self._sum_in_float32()
        for value in self._graph.inputs:
            if value.dtype == self._from:
                value.type = ir.TensorType(self._to)
        for value in list(self._graph.outputs):
            if value.dtype != self._from:
                continue
            if value.name == "logits":
                self._widen_logits(value)
            else:
                value.type = ir.TensorType(self._to)
        self._drop_unused()

    def decompose(self, heads: Heads | None) -> None:
        """Replace newer operators by older ones if `heads` is given. Call this after `retype`."""
        if heads is not None:
            decompose(self._model, heads, self._to)

    def _retype_initializers(self) -> None:
        for value in list(self._graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != self._from:
                continue
            if _is_large_matrix(value, tensor):
                uses = list(value.uses())
                converted = self._insert_before(_first(self._graph, [node for node, _ in uses]), "Cast", [value])
                self._attribute(converted, "to", int(self._to))
                for node, index in uses:
                    node.replace_input_with(index, converted)
                continue
            narrow = self._read(tensor).astype(np.float32).astype(self._to.numpy())
            if not np.isfinite(narrow.astype(np.float32)).all():
                raise BundleError(f"{self._path.name}: {value.name} does not fit {self._to.name.lower()}")
            value.const_value = ir.tensor(narrow, dtype=self._to, name=value.name)
            value.type = ir.TensorType(self._to)

    def _read(self, tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
        """Return the values of a constant.

        External data is read here, because onnx-ir refuses files that are links, and files of a bundle may be links.
        """
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        if Path(tensor.location).name != str(tensor.location):
            raise self._unexpected("data in the bundle's own folder")
        dtype, shape = tensor.dtype.numpy(), tensor.shape.numpy()
        path = self._path.parent / tensor.location
        return np.fromfile(path, dtype, count=tensor.size, offset=tensor.offset or 0).reshape(shape)

    def _retype_casts(self) -> None:
        for node in list(self._graph):
            if node.op_type != "Cast" or node.attributes["to"].as_int() != int(self._from):
                continue
            source = node.inputs[0]
            assert source is not None
            if source.dtype == self._to and source.is_initializer():
                node.outputs[0].replace_all_uses_with(source)
                self._graph.remove(node, safe=True)
            else:
                self._attribute(node.outputs[0], "to", int(self._to))

    def _sum_in_float32(self) -> None:
        """Keep the sums over groups of activations in float32, because their terms cancel. No other ReduceSum occurs."""
        for node in [node for node in self._graph if node.op_type == "ReduceSum"]:
            source = node.inputs[0]
            assert source is not None
            wide = self._insert_before(node, "Cast", [source], to=int(ir.DataType.FLOAT))
            node.replace_input_with(0, wide)
            sums = node.outputs[0]
            uses = list(sums.uses())
            narrow = ir.node("Cast", [sums], {"to": int(self._to)})
            self._graph.insert_after(node, narrow)
            for user, index in uses:
                user.replace_input_with(index, narrow.outputs[0])

    def _widen_logits(self, logits: ir.Value) -> None:
        node = logits.producer()
        assert node is not None
        cast = ir.node("Cast", [logits], {"to": int(ir.DataType.FLOAT)})
        self._graph.insert_after(node, cast)
        wide = cast.outputs[0]
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), logits.shape
        self._graph.outputs[self._graph.outputs.index(logits)] = wide
        logits.name, logits.type, logits.shape = "logits_narrow", None, None
        wide.name = "logits"

    def _drop_unused(self) -> None:
        """Remove nodes and constants that are no longer used, from the last node to the first."""
        kept = set(self._graph.outputs)
        for node in reversed(list(self._graph)):
            if not any(output in kept or output.uses() for output in node.outputs):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]

    def _input(self, name: str) -> ir.Value:
        for value in self._graph.inputs:
            if value.name == name and value.uses():
                return value
        raise self._unexpected(f"an input {name}")

    def _new_input(self, name: str, dim: str) -> ir.Value:
        """Add an int64 vector of variable length to the inputs."""
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([dim]))
        self._graph.inputs.append(value)
        return value

    def _insert_before(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> ir.Value:
        new = ir.node(op_type, inputs, attributes)
        self._graph.insert_before(node, new)
        return new.outputs[0]

    @staticmethod
    def _attribute(output: ir.Value, name: str, value: int) -> None:
        node = output.producer()
        assert node is not None
        node.attributes[name] = ir.AttrInt64(name, value)

    def _unexpected(self, expected: str) -> BundleError:
        return BundleError(
            f"{self._path} is not the graph that export writes (expected {expected}); export the bundle again"
        )


def _is_large_matrix(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant is a large weight matrix, used only as the second factor of MatMul."""
    return tensor.size > _SMALL and all(node.op_type == "MatMul" and index == 1 for node, index in value.uses())


def _outputs(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {output for node in nodes for output in node.outputs}


def _first(graph: ir.Graph, nodes: Iterable[ir.Node]) -> ir.Node:
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)
