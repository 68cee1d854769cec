"""Write a bundle's graphs for TensorRT, with the functions of `export` and over the weights in the bundle's files.

The result is a header, that is an ONNX model without its large weights (a few hundred kilobytes). What differs from the
standard dialect:

- Everything computes in bfloat16 or float16, whatever the bundle stores. Sums over groups, which correct zero points,
  stay in float32.
- The head computes in float16 and puts out float32, from which the token is chosen. Logits of 16 are 1/8 apart in
  bfloat16, and the first of equal ones would win.
- A quantized head with an odd number of columns, as its vocabulary has, gets columns of zeros, because TensorRT for RTX
  would otherwise dequantize the whole head in memory for each step.
- The capacity of the KV cache is fixed, as TensorRT's in-place update requires. The batch is 1. For several rows it
  varies: a profile fixes it to all rows for steps of one token, and to 1 for prompts.
- `slots` [window] int64, the numbers 0 to window - 1, is an input. The shape of this input, and not a value, says how
  many cache slots attention reads. So no shape depends on device data, and a decode step can be captured as a CUDA
  graph. The mask hides the slots after the present position.
- `kept` [kept] int64 is an input in the same way: the positions of this step that get logits.
- `token` [batch, kept] int64, the most probable tokens, is an output.
- An int8 cache becomes one of 16 bits where TensorRT does not list int8 tensors in these places. Scales stay as they
  are, and only the rounding is left out.
- TensorRT's cache update does not support int8, and TensorRT before 10.15 has no cache update. In these cases the graph
  only reads the cache. The entries of the step become one output `new_entries` [batch, 2 x layers x kv_heads, seq,
  head_dim], and attention reads the cache followed by these entries.
- For TensorRT before 10.15, older operators stand for newer ones (`OldBuilder`).

This module needs onnx-ir. It does not know TensorRT's library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.export import DTYPES
from internvl_edge.export.attention import Attend, Inputs, LayerCache, divide, heads_of, multiply
from internvl_edge.export.builder import GraphBuilder, Heads, Types
from internvl_edge.export.decoder import PADDING, cache_type, layers, output_cache, output_logits
from internvl_edge.export.quantized import PackedWeights
from internvl_edge.export.vision import build_vision
from internvl_edge.model.config import DecoderConfig, ModelConfig
from internvl_edge.runtime.engines.tensorrt.runtime_cache import NEW_ENTRIES

from .stored import StoredGraph

# The head computes in this type, whatever the layers compute in.
HEAD_TYPE = ir.DataType.FLOAT16
# Columns of a quantized matrix are filled up to a multiple of this where their number is odd.
_COLUMNS = 16
# The score of a masked position: it is below every attention score, and float16 can represent it.
_MASKED_SCORE = -3e4


class TensorRTBuilder(GraphBuilder):
    """Writes operators in the form that TensorRT takes.

    Args:
        arguments, keywords: those of `GraphBuilder`.
        decomposable: let TensorRT compute attention with several kernels where it has no single one.
    """

    moves_bytes = False  # TensorRT cannot reshape or transpose uint8 tensors

    def __init__(self, *arguments: Any, decomposable: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._hints = {"TRT_decomposable": 1} if decomposable else {}
        self._shared: dict[tuple[str, ir.Value, int], ir.Value] = {}

    def bytes_to_floats(self, x: ir.Value) -> ir.Value:
        """Change uint8 to float16 first: TensorRT lists no other 16-bit type (NvInfer.h, IIdentityLayer)."""
        half = self.cast(x, ir.DataType.FLOAT16)
        return half if self.types.activations == ir.DataType.FLOAT16 else self.cast(half, self.types.activations)

    def columns(self, outputs: int) -> int:
        """Return the number of columns that a quantized matrix has, which is even."""
        return -(-outputs // _COLUMNS) * _COLUMNS if outputs % 2 else outputs

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, heads: Heads, visible: ir.Value | None = None
    ) -> ir.Value:
        """Compute attention (see `GraphBuilder`)."""
        attended = super().attention(q, k, v, heads, visible)
        node = attended.producer()
        assert node is not None
        node.attributes.update({name: ir.AttrInt64(name, value) for name, value in self._hints.items()})
        return attended


class OldBuilder(TensorRTBuilder):
    """Writes what TensorRT before 10.15 has, which has no layers for norms, rotary embedding and attention.

    They become the basic operators that define them, all of opset 21. The types are those that TensorRT's own layers
    would use: norms compute in float32.
    """

    opset, ir_version = 21, 10

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Apply root mean square normalization over the last axis."""
        wide = self.cast(x, ir.DataType.FLOAT)
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), self.constant([-1]), keepdims=1)
        normed = self.op("Div", wide, self.op("Sqrt", self.op("Add", mean, self.constant(epsilon, np.float32))))
        return self.op("Mul", self.cast(normed, self.types.activations), self.vector(f"{name}.weight"))

    def rotary(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Rotate x. Each value in the first half of a head pairs with one in its second half."""
        cos, sin = (self._unsqueezed(table, 1) for table in (cos, sin))
        first, second = self.split(x, 2)
        return self.op(
            "Concat",
            self.op("Sub", self.op("Mul", first, cos), self.op("Mul", second, sin)),
            self.op("Add", self.op("Mul", first, sin), self.op("Mul", second, cos)),
            axis=-1,
        )

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, heads: Heads, visible: ir.Value | None = None
    ) -> ir.Value:
        """Compute attention (see `GraphBuilder`)."""
        if visible is None:
            q, k, v = (self.heads(x, heads.width) for x in (q, k, v))
            attended = self._softmax_product(q, k, v, heads, [0, 1, 3, 2])
            return self.merge_heads(attended, heads.query * heads.width)
        # Query heads that share a key head become one more axis, so that keys and values need not be repeated.
        q = self.reshape(q, [0, heads.key, heads.query // heads.key, -1, heads.width])
        k, v = (self.op("Unsqueeze", x, self.constant([2])) for x in (k, v))
        attended = self._softmax_product(q, k, v, heads, [0, 1, 2, 4, 3], self._unsqueezed(visible, 1))
        return self.reshape(attended, [0, heads.query, -1, heads.width])

    def _softmax_product(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        heads: Heads,
        transposed: Sequence[int],
        visible: ir.Value | None = None,
    ) -> ir.Value:
        """Return softmax(q k^T / sqrt(width)) v. Queries are scaled first, which keeps the scores small in float16."""
        scaled = self.op("Mul", q, self.floats(heads.width**-0.5))
        scores = self.op("MatMul", scaled, self.op("Transpose", k, perm=transposed))
        if visible is not None:
            scores = self.op("Where", visible, scores, self.floats(_MASKED_SCORE))
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)

    def _unsqueezed(self, x: ir.Value, axis: int) -> ir.Value:
        """Insert an axis, once for all that read it."""
        key = "Unsqueeze", x, axis
        if key not in self._shared:
            self._shared[key] = self.op("Unsqueeze", x, self.constant([axis]))
        return self._shared[key]


def vision_header(
    path: Path, config: ModelConfig, stored: str, dtype: str, decomposed: bool = False, decomposable: bool = False
) -> bytes:
    """Return the vision graph for TensorRT, serialized.

    pixels [tiles, S, S, 3] uint8 -> image_embeds [tiles, tokens_per_tile, hidden] in `dtype`

    Args:
        path: the bundle's graph; the result refers to its external data, which is read only where it is converted.
        config: the model.
        stored: the type of the bundle's float matrices: "float32", "float16" or "bfloat16".
        dtype: the type to compute in: "float16" or "bfloat16".
        decomposed: for TensorRT before 10.15.
        decomposable: for a TensorRT that has such layers, but not one kernel for each shape of attention.

    Raises:
        BundleError: the bundle's graph is not as `export` writes it, or a weight does not fit `dtype`.
    """
    source = StoredGraph(path, config)
    builder = _builder(decomposed, decomposable)
    return _serialized(build_vision(source, Types(DTYPES[stored], DTYPES[dtype]), source, builder), source)


def decoder_header(
    path: Path,
    config: ModelConfig,
    stored: str,
    dtype: str,
    slots: int,
    rows: int = 1,
    decomposed: bool = False,
    decomposable: bool = False,
    wide_cache: bool = False,
) -> bytes:
    """Return the decoder graph for TensorRT, serialized.

    inputs_embeds [batch, seq, hidden], cos and sin [batch, seq, head_dim / 2], past_length [batch] int64,
    slots [window] int64, kept [kept] int64, past_key_values.N.{key,value} [batch, kv_heads, slots, head_dim]
    -> logits [batch, kept, vocab] float32, token [batch, kept] int64, present.N.{key,value} in the memory of
       past_key_values.N.{key,value}, or new_entries instead of all present.*

    Args and raises are those of `vision_header`; `path` is the graph in the standard dialect, `slots` is the number of
    slots of a row of the KV cache, and `wide_cache` keeps an int8 cache in 16 bits. With one of `rows`, the batch is 1.
    """
    source = StoredGraph(path, config)
    decoder, types = config.decoder, Types(DTYPES[stored], DTYPES[dtype])
    packed = PackedWeights(source, types)
    g = _builder(decomposed, decomposable)(
        *("decoder", types, source, source.shapes, source.tensor),
        partial(packed.matmul, dialect="standard"),
        sizes={"capacity": slots} | ({"batch": 1} if rows == 1 else {}),
    )
    kind = types.activations if wide_cache else cache_type(types, source)
    in_place = not decomposed and kind == types.activations
    x, presents = layers(g, source, partial(_attention, in_place=in_place, stored=kind), kind)
    assert x is not None
    x = g.op("Gather", x, g.input("kept", ir.DataType.INT64, ["kept"]), axis=1)
    x = g.rms_norm(x, "decoder.norm", decoder.rms_norm_eps)
    if types.activations != HEAD_TYPE:
        x = g.cast(x, HEAD_TYPE)
        g.compute_in(HEAD_TYPE)
    logits = output_logits(g, decoder, x, (lambda: source.tensor(PADDING)) if source.has(PADDING) else None)
    g.output(g.op("ArgMax", logits, axis=-1, keepdims=0), "token", ir.DataType.INT64, ["batch", "kept"])
    if in_place:
        output_cache(g, decoder, kind, presents)
    else:
        entries = g.op("Concat", *(part for pair in presents for part in pair), axis=1)
        count = 2 * len(presents) * decoder.num_key_value_heads
        g.output(entries, NEW_ENTRIES, kind, ["batch", count, "seq", decoder.head_dim])
    return _serialized(g.model(), source)


def _builder(decomposed: bool, decomposable: bool) -> partial[TensorRTBuilder]:
    return partial(OldBuilder if decomposed else TensorRTBuilder, decomposable=decomposable)


def _attention(
    g: GraphBuilder, decoder: DecoderConfig, inputs: Inputs, *, in_place: bool, stored: ir.DataType
) -> Attend:
    """Write attention over `slots` of the cache, whose values have the type `stored`.

    If not `in_place`, what comes out instead of the cache are the entries of this step, [batch, kv_heads, seq,
    head_dim]. Attention then sees the slots before this step, and of this step the positions up to each token's own.
    """
    rounded = stored == ir.DataType.INT8
    zero, axis = g.constant([0]), g.constant([1])
    steps = g.op("Range", g.constant(0), g.op("Squeeze", inputs.seq), g.constant(1))
    positions = g.op("Add", g.op("Unsqueeze", inputs.past_length, axis), steps)  # [batch, seq]
    slots = g.input("slots", ir.DataType.INT64, ["window"])
    window = g.op("Shape", slots)
    rows = g.op("Unsqueeze", positions, g.constant([1, 3]))
    mask = g.op("LessOrEqual", slots, rows)  # [batch, 1, seq, window]
    if not in_place:
        before = g.op("Less", slots, g.op("Unsqueeze", inputs.past_length, g.constant([1, 2, 3])))
        columns = g.op("Unsqueeze", positions, g.constant([1, 2]))
        mask = g.op("Concat", g.op("And", mask, before), g.op("LessOrEqual", columns, rows), axis=3)

    def update(past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return what attention reads, and what comes out."""
        if in_place:
            present = g.op("TensorScatter", past, new, inputs.past_length, axis=2)
            return g.slice(present, zero, window, axis=2), present
        parts = [g.slice(past, zero, window, axis=2), new]
        if rounded:
            parts = [g.op("DequantizeLinear", part, *g.unit_scale()) for part in parts]
        return g.op("Concat", *parts, axis=2), new

    def attend(q: ir.Value, k: ir.Value, v: ir.Value, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        q, k, v = (g.heads(x, decoder.head_dim) for x in (q, k, v))
        q, k = (g.rotary(x, inputs.cos, inputs.sin) for x in (q, k))
        if cache.scales is not None:
            k, v = (divide(g, x, scale) for x, scale in zip((k, v), cache.scales, strict=True))
            q = multiply(g, decoder, q, cache.scales[0])
        if rounded:
            k, v = (g.op("QuantizeLinear", x, *g.unit_scale()) for x in (k, v))
        (used_key, key), (used_value, value) = update(cache.key, k), update(cache.value, v)
        attended = g.attention(q, used_key, used_value, heads_of(decoder), mask)
        if cache.scales is not None:
            attended = multiply(g, decoder, attended, cache.scales[1])
        return g.merge_heads(attended, decoder.num_attention_heads * decoder.head_dim), key, value

    return attend


def _serialized(model: ir.Model, source: StoredGraph) -> bytes:
    """Return the model's bytes. Names of external data are relative to the bundle's folder."""
    source.require_all_used()
    proto: Any = ir.to_proto(model)
    data: bytes = proto.SerializeToString()
    return data
