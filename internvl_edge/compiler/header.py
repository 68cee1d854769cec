"""Change a bundle's graphs for TensorRT: the same nodes and weights, with another dtype and fixed sizes.

All changes are in the header, that is the ONNX model without its large weights (a few hundred kilobytes). The weights
stay in the bundle's files. The changes are:

- Everything that computes in the bundle's `activations` computes in bfloat16 or float16. Sums over groups, which
  correct zero points, stay in float32.
- The head computes in float16 and puts out float32, from which the token is chosen. Logits of 16 are 1/8 apart in
  bfloat16, and the first of equal ones would win.
- A quantized head with an odd number of columns, as its vocabulary has, gets columns of zeros, because TensorRT for RTX
  would otherwise dequantize the whole head in memory for each step.
- The batch is 1 and the KV cache has a fixed capacity, as TensorRT's in-place update requires.
- `slots` [window] int64, the numbers 0 to window - 1, becomes an input. The shape of this input, and not a value, now
  says how many cache slots attention reads. So no shape depends on device data, and a decode step can be captured as a
  CUDA graph. The mask hides the slots after the present position.
- `kept` [kept] int64 becomes an input in the same way: the positions of this step that get logits.
- `token` [1, kept] int64, the most probable tokens, becomes an output.
- An int8 cache becomes one of 16 bits where TensorRT does not list int8 tensors in these places. Scales stay as they
  are, and only the rounding is left out.
- TensorRT's cache update does not support int8, and TensorRT before 10.15 has no cache update. In these cases the graph
  only reads the cache. The entries of the step become one output `new_entries` [1, 2 x layers x kv_heads, seq,
  head_dim], and attention reads the cache followed by these entries.
- For TensorRT before 10.15, older operators replace newer ones (`decompose`).

This module needs onnx-ir. It knows the names and the graph patterns that `export` writes. It does not know TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.runtime.engines.tensorrt.runtime_cache import NEW_ENTRIES

from .decompose import Heads, decompose
from .editor import GraphEditor, first_of

# Columns of a quantized head are filled up to a multiple of this.
_COLUMNS = 16
_ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")


def vision_header(
    path: Path, activations: str, dtype: str, heads: Heads | None = None, decomposable: bool = False
) -> bytes:
    """Return the vision graph in another dtype, serialised.

    pixels [tiles, S, S, 3] uint8 -> image_embeds [tiles, tokens_per_tile, hidden] in `dtype`

    Args:
        path: the bundle's graph; the result refers to its external data, which is not read.
        activations: the type that the graph computes in: "float32", "float16" or "bfloat16".
        dtype: the type that the result computes in: "float16" or "bfloat16".
        heads: the attention heads, given only for TensorRT before 10.15; None for newer versions.
        decomposable: let TensorRT compute attention with several kernels where it has no single one.

    Raises:
        BundleError: the graph is not as `export` writes it.
    """
    editor = _Tower(path, activations, dtype)
    editor.cast_bytes_at_once("pixels")
    editor.retype()
    editor.cast_bytes_to_float16("pixels")
    editor.decompose(heads)
    editor.mark_attention(decomposable)
    return editor.serialise()


def decoder_header(
    path: Path,
    activations: str,
    dtype: str,
    capacity: int,
    heads: Heads | None = None,
    decomposable: bool = False,
    wide_cache: bool = False,
) -> bytes:
    """Return the standard decoder graph in another dtype and with fixed sizes, serialised.

    inputs_embeds [1, seq, hidden], cos and sin [1, seq, head_dim / 2], past_length [1] int64, slots [window] int64,
    kept [kept] int64, past_key_values.N.{key,value} [1, kv_heads, capacity, head_dim]
    -> logits [1, kept, vocab] float32, token [1, kept] int64, present.N.{key,value} in the memory of
       past_key_values.N.{key,value}, or new_entries instead of all present.*

    Args and raises are those of `vision_header`; `capacity` is the number of tokens in the KV cache, and `wide_cache`
    keeps an int8 cache in 16 bits.
    """
    editor = _Decoder(path, activations, dtype)
    editor.take_kept()
    editor.take_slots()
    if wide_cache:
        editor.widen_cache()
    editor.put_out_new_entries(always=heads is not None)
    editor.fix_sizes({"batch": 1, "capacity": capacity})
    editor.find_head()
    editor.retype()
    editor.pad_head()
    editor.choose_token()
    editor.decompose(heads)
    editor.mark_attention(decomposable)
    return editor.serialise()


class _Graph(GraphEditor):
    """What is done to both graphs."""

    def decompose(self, heads: Heads | None) -> None:
        """Replace newer operators by older ones if `heads` is given. Call this after `retype`."""
        if heads is not None:
            decompose(self.model, heads, self.target)

    def mark_attention(self, decomposable: bool) -> None:
        """Set the attribute by which TensorRT's importer allows attention to become several kernels."""
        for node in self.graph:
            if decomposable and node.op_type == "Attention":
                node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)


class _Tower(_Graph):
    """The vision graph."""

    def cast_bytes_at_once(self, name: str) -> None:
        """Convert the uint8 input before any other node, because TensorRT cannot reshape or transpose uint8 tensors.

        All integers up to 255 are exact in both 16-bit types.
        """
        pixels = self.input(name)
        consumers = list(pixels.uses())
        converted = self.insert_before(consumers[0][0], "Cast", [pixels], to=int(self.source))
        for node, index in consumers:
            node.replace_input_with(index, converted)

    def cast_bytes_to_float16(self, name: str) -> None:
        """Convert the uint8 input to float16 first. Call this after `retype`.

        TensorRT lists conversions of uint8 to float16 and float32 only (NvInfer.h, IIdentityLayer). All integers up to
        255 are exact in both.
        """
        pixels = self.input(name)
        for node, index in list(pixels.uses()):
            if node.attributes["to"].as_int() != int(ir.DataType.FLOAT16):
                first = self.insert_before(node, "Cast", [pixels], to=int(ir.DataType.FLOAT16))
                node.replace_input_with(index, first)


class _Decoder(_Graph):
    """The decoder graph."""

    def take_kept(self) -> None:
        """Replace the input `logits_to_keep`, a number of last positions, by `kept`, the positions that get logits."""
        keep = self.input("logits_to_keep")
        negated = [node for node, _ in keep.uses()]
        slices = [node for node in self.graph if node.op_type == "Slice" and node.inputs[1] in _outputs(negated)]
        if len(slices) != 1 or slices[0].inputs[0] is None:
            raise self.unexpected("one Slice that logits_to_keep decides")
        kept = self.new_input("kept", "kept")
        hidden = self.insert_before(slices[0], "Gather", [slices[0].inputs[0], kept], axis=1)
        slices[0].outputs[0].replace_all_uses_with(hidden)
        for node in [*slices, *negated]:
            self.graph.remove(node, safe=True)
        self.graph.inputs.remove(keep)

    def take_slots(self) -> None:
        """Take the number of cache slots that attention reads from the shape of a new input `slots`.

        In the bundle's graph it is a computed length.
        """
        scatters = [node for node in self.graph if node.op_type == "TensorScatter"]
        slices = [use for node in scatters for use, _ in node.outputs[0].uses() if use.op_type == "Slice"]
        totals = {node.inputs[2] for node in slices}
        masks = [node for node in self.graph if node.op_type == "LessOrEqual"]
        if len(slices) != len(scatters) or len(totals) != 1 or len(masks) != 1 or not slices:
            raise self.unexpected("one TensorScatter and Slice per cache, and one mask")
        slots = self.new_input("slots", "window")
        mask, total = masks[0], totals.pop()
        window = self.insert_before(mask, "Shape", [slots])
        mask.replace_input_with(0, slots)
        assert total is not None
        for node in slices:
            node.replace_input_with(2, window)

    def widen_cache(self) -> None:
        """Keep an int8 cache in the type of the graph: without its roundings, with all multiplications by scales."""
        for scatter in [node for node in self.graph if node.op_type == "TensorScatter"]:
            past, new = scatter.inputs[:2]
            assert past is not None
            if past.dtype != ir.DataType.INT8:
                continue
            readers = [reader for node, _ in scatter.outputs[0].uses() for reader, _ in node.outputs[0].uses()]
            rounding = new.producer() if new is not None else None
            if rounding is None or {node.op_type for node in (rounding, *readers)} != {*_ROUNDINGS}:
                raise self.unexpected("one QuantizeLinear and DequantizeLinear for each int8 cache")
            scatter.replace_input_with(1, rounding.inputs[0])
            for reader in readers:
                assert reader.inputs[0] is not None
                reader.outputs[0].replace_all_uses_with(reader.inputs[0])
                self.graph.remove(reader, safe=True)
            past.type = scatter.outputs[0].type = ir.TensorType(self.source)

    def put_out_new_entries(self, always: bool) -> None:
        """Replace the in-place update of an int8 cache by the output `new_entries`; with `always`, of any cache."""
        scatters = [node for node in self.graph if node.op_type == "TensorScatter"]
        caches = [node.inputs[0] for node in scatters]
        dtype = caches[0].dtype if caches and caches[0] else None
        if not (always or dtype == ir.DataType.INT8):
            return
        new = [node.inputs[1] for node in scatters]
        for node in scatters:
            self._read_past_and_new(node)
        self._mask_past_and_new()
        for node in scatters:
            self.graph.outputs.remove(node.outputs[0])
            self.graph.remove(node, safe=True)
        joined = ir.node("Concat", new, {"axis": 1})
        self.graph.append(joined)
        entries, cache = joined.outputs[0], caches[0]
        assert cache is not None
        assert cache.shape is not None
        assert dtype is not None
        _, heads, _, width = cache.shape
        assert isinstance(heads, int)
        entries.name, entries.type = NEW_ENTRIES, ir.TensorType(dtype)
        entries.shape = ir.Shape([1, len(new) * heads, "seq", width])
        self.graph.outputs.append(entries)

    def _read_past_and_new(self, scatter: ir.Node) -> None:
        """Make attention read the cache before this step, followed by the entries of this step."""
        past, new = scatter.inputs[:2]
        slices = [node for node, _ in scatter.outputs[0].uses()]
        if [node.op_type for node in slices] != ["Slice"]:
            raise self.unexpected("one Slice for each cache")
        slices[0].replace_input_with(0, past)
        used = slices[0].outputs[0]
        reader, index = next(iter(used.uses()))
        if reader.op_type == "DequantizeLinear":
            added = self.insert_before(reader, "DequantizeLinear", [new, *reader.inputs[1:]])
            used, new = reader.outputs[0], added
            reader, index = next(iter(used.uses()))
        reader.replace_input_with(index, self.insert_before(reader, "Concat", [used, new], axis=2))

    def _mask_past_and_new(self) -> None:
        """Make the mask show the slots before this step, and of this step the positions up to each token's own."""
        mask = next(node for node in self.graph if node.op_type == "LessOrEqual")
        slots, rows = mask.inputs  # [window], [1, 1, seq, 1]
        positions = rows.producer().inputs[0] if rows is not None and rows.producer() else None  # type: ignore[union-attr]
        uses = list(mask.outputs[0].uses())
        first = first_of(self.graph, [node for node, _ in uses])
        before = self.insert_before(first, "Less", [slots, self.input("past_length")])
        past = self.insert_before(first, "And", [mask.outputs[0], before])
        axes = ir.Value(name="row_axes", const_value=ir.tensor(np.array([1, 2]), name="row_axes"))
        self.graph.register_initializer(axes)
        columns = self.insert_before(first, "Unsqueeze", [positions, axes])
        new = self.insert_before(first, "LessOrEqual", [columns, rows])
        both = self.insert_before(first, "Concat", [past, new], axis=3)
        for node, index in uses:
            node.replace_input_with(index, both)

    def fix_sizes(self, sizes: dict[str, int]) -> None:
        """Replace symbolic dimensions of inputs and outputs by sizes."""
        for value in [*self.graph.inputs, *self.graph.outputs]:
            assert value.shape is not None
            dims: list[Any] = [sizes.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)

    def find_head(self) -> None:
        """Find the nodes behind the last norm, which make the logits, and those that prepare constants for them."""
        norms = [node for node in self.graph if node.op_type == "RMSNormalization"]
        if not norms:
            raise self.unexpected("a norm before the head")
        reached = [node for node, _ in norms[-1].outputs[0].uses()]
        while reached:
            node = reached.pop()
            if node not in self.head:
                self.head.add(node)
                reached += [user for output in node.outputs for user, _ in output.uses()]
                makers = [value.producer() for value in node.inputs if value is not None]
                reached += [maker for maker in makers if maker is not None and _is_constant(maker)]
        self.normed = norms[-1].outputs[0]

    def pad_head(self) -> None:
        """Give a quantized head with an odd number of columns a few more, and cut them off its product."""
        for node in [node for node in self.graph if node in self.head and node.op_type == "MatMul"]:
            dequantized = node.inputs[1].producer() if node.inputs[1] is not None else None
            if dequantized is None or dequantized.op_type != "DequantizeLinear":
                continue
            weights, scale = dequantized.inputs[:2]
            assert weights is not None
            assert weights.const_value is not None
            columns = weights.const_value.shape.numpy()[-1]
            if columns % 2 == 0:
                continue
            for index, (value, fill) in enumerate(((weights, 0), (scale, 1))):
                dequantized.replace_input_with(
                    index, self._with_columns(value, -(-columns // _COLUMNS) * _COLUMNS, fill)
                )
            product = node.outputs[0]
            uses = list(product.uses())
            bounds = [
                self.constant(name, [n]) for name, n in (("head_first", 0), ("head_end", columns), ("head_axis", 2))
            ]
            cut = ir.node("Slice", [product, *bounds])
            self.graph.insert_after(node, cut)
            for user, index in uses:
                user.replace_input_with(index, cut.outputs[0])

    def choose_token(self) -> None:
        """Add the output `token`, the index of the largest logit. Call this after `retype`."""
        logits = next(value for value in self.graph.outputs if value.name == "logits")
        node = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
        self.graph.append(node)
        token = node.outputs[0]
        token.name, token.type, token.shape = "token", ir.TensorType(ir.DataType.INT64), ir.Shape([1, "kept"])
        self.graph.outputs.append(token)

    def _with_columns(self, value: ir.Value | None, columns: int, fill: int) -> ir.Value:
        """Return a constant with more columns, all of them `fill`."""
        assert value is not None
        assert value.const_value is not None
        tensor = value.const_value
        values = self.read(tensor)
        wide = np.full((*values.shape[:-1], columns), fill, values.dtype)
        wide[..., : values.shape[-1]] = values
        return self.initializer(f"{value.name}_padded", ir.tensor(wide, dtype=tensor.dtype))


def _is_constant(node: ir.Node) -> bool:
    return all(value is not None and value.is_initializer() for value in node.inputs)


def _outputs(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {output for node in nodes for output in node.outputs}
