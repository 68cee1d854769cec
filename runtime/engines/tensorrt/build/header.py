"""A bundle's graphs as TensorRT takes them: the same nodes and weights, another type and fixed sizes.

Changes, all in the header of a few hundred kilobytes; weights stay in the bundle's files:

- Everything that computes in the bundle's `activations` computes in bfloat16 or float16. Sums over groups, which
  correct zero points, stay in float32, and so do the logits.
- One row (batch 1) and a KV cache of fixed capacity, as TensorRT's in-place update demands.
- `slots` [window] int64, 0 to window - 1, becomes an input: how much of the cache attention looks at follows from the
  shape of an input instead of a value, so that no shape depends on device data and a decoding step can be captured as a
  CUDA graph. The mask hides slots behind the present position.
- `kept` [kept] int64 becomes an input likewise: the positions of this step whose logits are computed.
- `token` [1, kept] int64, the most probable ones, becomes an output.
- TensorRT's cache update takes no int8, and before 10.15 there is none: such a cache is only read, what is new becomes
  one output `new_entries` [1, 2 x layers x kv_heads, seq, head_dim], and attention sees both, one behind the other.
- For TensorRT before 10.15 newer operators are written as older ones (`decompose`).

Needs onnx-ir; knows the names and forms that `export` writes, and nothing about TensorRT's interfaces.
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
# Float matrices above this many elements stay in their file and are converted by the builder; below, here.
_SMALL = 1 << 16


def vision_header(path: Path, activations: str, dtype: str, heads: Heads | None = None) -> bytes:
    """The vision graph in another type, serialised.

    pixels [tiles, S, S, 3] uint8 -> image_embeds [tiles, tokens_per_tile, hidden] in `dtype`

    Args:
        path: the bundle's graph; its external data is referred to, not read.
        activations: what the graph computes in: "float32", "float16" or "bfloat16".
        dtype: what it is to compute in: "float16" or "bfloat16".
        heads: given, the header is written for TensorRT before 10.15.

    Raises:
        BundleError: not a graph of the expected form.
    """
    tailor = _Tailor(path, activations, dtype)
    tailor.cast_bytes_at_once("pixels")
    tailor.retype()
    tailor.decompose(heads)
    return tailor.serialise()


def decoder_header(path: Path, activations: str, dtype: str, capacity: int, heads: Heads | None = None) -> bytes:
    """The standard decoder graph in another type and with fixed sizes, serialised.

    inputs_embeds [1, seq, hidden], cos and sin [1, seq, head_dim / 2], past_length [1] int64, slots [window] int64,
    kept [kept] int64, past_key_values.N.{key,value} [1, kv_heads, capacity, head_dim]
    -> logits [1, kept, vocab] float32, token [1, kept] int64, present.N.{key,value}, each in the memory of its past,
       or new_entries in their place

    Args and raises: as `vision_header`; `capacity` is the number of tokens in the KV cache.
    """
    tailor = _Tailor(path, activations, dtype)
    tailor.take_kept()
    tailor.take_slots()
    tailor.put_out_new_entries(always=heads is not None)
    tailor.fix_sizes({"batch": 1, "capacity": capacity})
    tailor.choose_token()
    tailor.retype()
    tailor.decompose(heads)
    return tailor.serialise()


class _Tailor:
    """One graph being changed in place."""

    def __init__(self, path: Path, activations: str, dtype: str) -> None:
        self._path = path
        self._model = ir.load(path)
        self._graph = self._model.graph
        self._from, self._to = DTYPES[activations], DTYPES[dtype]

    def serialise(self) -> bytes:
        """The model's bytes; external data is named relative to the bundle's folder."""
        proto: Any = ir.to_proto(self._model)
        data: bytes = proto.SerializeToString()
        return data

    def cast_bytes_at_once(self, name: str) -> None:
        """TensorRT moves no uint8 tensors around: the input is converted first and rearranged afterwards.

        All integers up to 255 are exact in both 16-bit types.
        """
        pixels = self._input(name)
        consumers = list(pixels.uses())
        converted = self._insert_before(consumers[0][0], "Cast", [pixels], to=int(self._from))
        for node, index in consumers:
            node.replace_input_with(index, converted)

    def take_kept(self) -> None:
        """Let an input `kept` name the positions that get logits, in place of a number of last ones."""
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
        """Let the shape of a new input `slots` say how many cache slots are looked at, not a computed length."""
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
        """Replace the in-place update of an int8 cache, or of `always` any."""
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
        """Let attention read the cache as it was and, behind it, what this step adds."""
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
        """Slots before this step's first position, then this step's positions up to each one's own."""
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
        """Give symbolic dimensions of inputs and outputs a size."""
        for value in [*self._graph.inputs, *self._graph.outputs]:
            assert value.shape is not None
            dims: list[Any] = [sizes.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)

    def choose_token(self) -> None:
        """Add the position of the greatest logit as output `token`."""
        logits = next(value for value in self._graph.outputs if value.name == "logits")
        node = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
        self._graph.append(node)
        token = node.outputs[0]
        token.name, token.type, token.shape = "token", ir.TensorType(ir.DataType.INT64), ir.Shape([1, "kept"])
        self._graph.outputs.append(token)

    def retype(self) -> None:
        """Compute in the new type: inputs, constants, casts and outputs; see the module's description."""
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
        """Write newer operators as older ones where `heads` are given; after `retype`."""
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
        """A constant's numbers; onnx-ir itself refuses files that are links, as copies of bundles may be."""
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
        """Sums over groups of activations keep float32, as they cancel; other ReduceSums do not occur."""
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
        """Nodes and constants that nothing asks for any more, last first."""
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
        """An int64 vector of varying length."""
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
    """Whether a constant is a weight matrix: only the second factor of products, and too large to hold here."""
    return tensor.size > _SMALL and all(node.op_type == "MatMul" and index == 1 for node, index in value.uses())


def _outputs(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {output for node in nodes for output in node.outputs}


def _first(graph: ir.Graph, nodes: Iterable[ir.Node]) -> ir.Node:
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)
