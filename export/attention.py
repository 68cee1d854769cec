"""Attention over the KV cache in two dialects. Nothing else differs between their decoder graphs.

The cache has a fixed capacity and is written in place. `standard` uses only ONNX operators, in the form that TensorRT
takes: TensorScatter into the cache, Slice to the used part, single-output Attention with an explicit mask.
`onnxruntime` uses GroupQueryAttention over the shared cache.

A cache can hold int8 values with one scale per KV head and channel. GroupQueryAttention takes these scales directly. In
the standard dialect, keys and values are divided by their scales and rounded. Queries are multiplied by the keys'
scales before the scores are computed, and the weighted sum of values is multiplied by the values' scales. This costs
two small products per layer, and the cache then needs only the scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from internvl_edge.model.config import DecoderConfig

from .builder import MICROSOFT, GraphBuilder, Heads
from .weights import Array

Dialect = str


@dataclass(frozen=True)
class Inputs:
    """The inputs that every layer's attention needs in addition to the hidden state."""

    cos: ir.Value
    sin: ir.Value
    past_length: ir.Value
    seq: ir.Value  # [1] int64


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values so far, [batch, kv_heads, capacity, head_dim], and the scales of int8 ones."""

    key: ir.Value
    value: ir.Value
    scales: tuple[Array, Array] | None = None  # of keys and of values, [kv_heads, head_dim] float32


# (q, k, v [batch, seq, width], cache) -> (attended [batch, seq, width], present key, present value)
Attend = Callable[[ir.Value, ir.Value, ir.Value, LayerCache], tuple[ir.Value, ir.Value, ir.Value]]
# Adds the nodes that all layers share, and returns what adds those of one.
Attention = Callable[[GraphBuilder, DecoderConfig, Inputs], Attend]


def _standard_attention(g: GraphBuilder, decoder: DecoderConfig, inputs: Inputs) -> Attend:
    zero, axis = g.constant([0]), g.constant([1])
    steps = g.op("Range", g.constant(0), g.op("Squeeze", inputs.seq), g.constant(1))
    positions = g.op("Add", g.op("Unsqueeze", inputs.past_length, axis), steps)  # [batch, seq]
    total = g.op("Add", g.op("ReduceMax", inputs.past_length, zero, keepdims=1), inputs.seq)  # [1]
    slots = g.op("Range", g.constant(0), g.op("Squeeze", total), g.constant(1))
    mask = g.op("LessOrEqual", slots, g.op("Unsqueeze", positions, g.constant([1, 3])))  # [batch, 1, seq, total]

    def scatter_and_slice(past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        present = g.op("TensorScatter", past, new, inputs.past_length, axis=2)
        return present, g.slice(present, zero, total, axis=2)

    def attend(q: ir.Value, k: ir.Value, v: ir.Value, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        q, k, v = (g.heads(x, decoder.head_dim) for x in (q, k, v))
        q, k = (g.rotary(x, inputs.cos, inputs.sin) for x in (q, k))
        if cache.scales is not None:
            k, v = (
                g.op("QuantizeLinear", divide(g, x, scale), *g.unit_scale())
                for x, scale in zip((k, v), cache.scales, strict=True)
            )
            q = multiply(g, decoder, q, cache.scales[0])
        (key, used_key), (value, used_value) = scatter_and_slice(cache.key, k), scatter_and_slice(cache.value, v)
        if cache.scales is not None:
            used_key, used_value = (g.op("DequantizeLinear", x, *g.unit_scale()) for x in (used_key, used_value))
        attended = g.attention(q, used_key, used_value, heads_of(decoder), mask)
        if cache.scales is not None:
            attended = multiply(g, decoder, attended, cache.scales[1])
        return g.merge_heads(attended, decoder.num_attention_heads * decoder.head_dim), key, value

    return attend


def heads_of(decoder: DecoderConfig) -> Heads:
    """Return the heads of a decoder's attention."""
    return Heads(decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_dim)


def divide(g: GraphBuilder, x: ir.Value, scale: Array) -> ir.Value:
    """Divide keys or values x [batch, kv_heads, seq, head_dim] by their scales [kv_heads, head_dim]."""
    return g.op("Mul", x, g.floats((1 / _invertible(g, scale))[None, :, None]))


def multiply(g: GraphBuilder, decoder: DecoderConfig, x: ir.Value, scale: Array) -> ir.Value:
    """Multiply x [batch, heads, seq, head_dim] by the scales [kv_heads, head_dim] of the KV heads that it reads."""
    repeated = np.repeat(_invertible(g, scale), decoder.num_query_groups, axis=0)
    return g.op("Mul", x, g.floats(repeated[None, :, None]))


def _invertible(g: GraphBuilder, scale: Array) -> Array:
    """Return scales whose inverses the graph's type holds: those of channels of zeros are too small for float16."""
    if g.types.activations != ir.DataType.FLOAT16:
        return scale
    return np.maximum(scale, 1 / np.float32(np.finfo(np.float16).max))


def _onnxruntime_attention(g: GraphBuilder, decoder: DecoderConfig, inputs: Inputs) -> Attend:
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    totals = g.op("Add", inputs.past_length, inputs.seq)
    last = g.cast(g.op("Sub", totals, g.constant([1])), ir.DataType.INT32)  # [batch]
    total = g.cast(g.op("ReduceMax", totals, keepdims=0), ir.DataType.INT32)  # []

    def attend(q: ir.Value, k: ir.Value, v: ir.Value, cache: LayerCache) -> tuple[ir.Value, ir.Value, ir.Value]:
        q = g.op("RotaryEmbedding", q, inputs.cos, inputs.sin, num_heads=heads)
        k = g.op("RotaryEmbedding", k, inputs.cos, inputs.sin, num_heads=kv_heads)
        scales: list[ir.Value | None] = []
        attributes = {}
        if cache.scales is not None:
            skipped = [None] * 5  # cos and sin, positions, bias and sinks
            scales = [*skipped, *(g.constant(scale[None, :, None], np.float32) for scale in cache.scales)]
            attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        attended, key, value = g.ops(
            "GroupQueryAttention",
            *(q, k, v, cache.key, cache.value, last, total, *scales),
            outputs=3,
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            **attributes,
        )
        return attended, key, value

    return attend


ATTENTION: dict[Dialect, Attention] = {
    "standard": _standard_attention,
    "onnxruntime": _onnxruntime_attention,
}
