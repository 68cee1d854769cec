"""The decoder graph in two dialects that differ only in attention and its cache.

    inputs_embeds [batch, seq, hidden], cos and sin [batch, seq, head_dim / 2], past_length [batch] int64,
    logits_to_keep [1] int64, past_key_values.N.{key,value} [batch, kv_heads, capacity, head_dim]
    -> logits [batch, kept, vocab] float32, present.N.{key,value}

`past_length` counts the tokens already in the cache; rows are not padded. The cache has a fixed capacity and is written
in
place: bind each `present` to its `past`. Rotary angles come from the host, so the graph has no length limit and dynamic
NTK needs no state in it.

`standard` uses ONNX operators alone, in the form that TensorRT takes: TensorScatter into the cache, Slice to the used
part, single-output Attention with an explicit mask. `onnxruntime` uses GroupQueryAttention over the shared cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint import Checkpoint
from internvl_edge.config import DecoderConfig

from .builder import INT64_MAX, MICROSOFT, GraphBuilder, Types
from .quantised import PackedWeights
from .weights import Array, WeightFile

Dialect = str
DIALECTS: tuple[Dialect, ...] = ("standard", "onnxruntime")
# Below every logit, within float16.
_NEVER = -3e4
# Rows of the head looked at together; as floats the whole would be the largest thing in memory.
_ROWS = 4096


@dataclass(frozen=True)
class _Inputs:
    """What every layer's attention needs beside the hidden state."""

    cos: ir.Value
    sin: ir.Value
    past_length: ir.Value
    seq: ir.Value  # [1] int64


# (q, k, v [batch, seq, width], past key, past value) -> (attended [batch, seq, width], present key, present value)
_Attend = Callable[[ir.Value, ir.Value, ir.Value, ir.Value, ir.Value], tuple[ir.Value, ir.Value, ir.Value]]


def build_decoder(
    checkpoint: Checkpoint,
    types: Types,
    dialect: Dialect,
    file: WeightFile,
    packed: PackedWeights | None = None,
    vocabulary: int | None = None,
) -> ir.Model:
    """The decoder of a checkpoint in one dialect; weights are placed in `file`, shared between dialects.

    Args:
        packed: the checkpoint's quantised linears, if they are to stay quantised.
        vocabulary: tokens that the tokenizer has; rows of a quantised checkpoint beyond them never win an argmax.
    """
    decoder = checkpoint.config.decoder
    matmul = partial(packed.matmul, dialect=dialect) if packed else None
    g = GraphBuilder("decoder", types, file, checkpoint.shapes, checkpoint.tensor, matmul)
    x = g.input("inputs_embeds", types.activations, ["batch", "seq", decoder.hidden_size])
    half: list[int | str] = ["batch", "seq", decoder.head_dim // 2]
    cos, sin = g.input("cos", types.activations, half), g.input("sin", types.activations, half)
    past_length = g.input("past_length", ir.DataType.INT64, ["batch"])
    keep = g.input("logits_to_keep", ir.DataType.INT64, [1])
    inputs = _Inputs(cos, sin, past_length, g.op("Shape", x, start=1, end=2))
    attend = _ATTENTION[dialect](g, decoder, inputs)
    presents = []
    for n in range(decoder.num_hidden_layers):
        x, present = _block(g, decoder, attend, x, n)
        presents.append(present)
    x = g.slice(x, g.op("Neg", keep), g.constant([INT64_MAX]), axis=1)
    logits = g.linear(g.rms_norm(x, "decoder.norm", decoder.rms_norm_eps), "decoder.lm_head")
    if checkpoint.quantization:
        penalty = g.vector("decoder.lm_head.padding", (decoder.vocab_size,), partial(_padding, checkpoint, vocabulary))
        logits = g.op("Add", logits, penalty)
    if types.activations != ir.DataType.FLOAT:
        logits = g.cast(logits, ir.DataType.FLOAT)
    g.output(logits, "logits", ir.DataType.FLOAT, ["batch", "kept", decoder.vocab_size])
    for n, pair in enumerate(presents):
        for kind, value in zip(("key", "value"), pair, strict=True):
            g.output(value, f"present.{n}.{kind}", types.activations, _cache_shape(decoder))
    return g.model()


def _padding(checkpoint: Checkpoint, vocabulary: int | None) -> Array:
    """[vocab] to add to logits: rows beyond the tokenizer's and rows of zeros, both padding, sink below all others."""
    packed = checkpoint.linear("decoder.lm_head")
    head = checkpoint.tensor("decoder.lm_head.weight") if packed is None else packed.values
    penalty = np.zeros(len(head), np.float32)
    for start in range(0, len(head), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(head)))
        weights = head[rows] if packed is None else packed.rows(rows).dequantise()
        penalty[rows] = np.where(weights.any(axis=1), 0, _NEVER)
    penalty[vocabulary or len(head) :] = _NEVER
    return penalty


def _cache_shape(decoder: DecoderConfig) -> list[int | str]:
    return ["batch", decoder.num_key_value_heads, "capacity", decoder.head_dim]


def _block(
    g: GraphBuilder, decoder: DecoderConfig, attend: _Attend, x: ir.Value, n: int
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    block = f"decoder.layers.{n}"
    past_key = g.input(f"past_key_values.{n}.key", g.types.activations, _cache_shape(decoder))
    past_value = g.input(f"past_key_values.{n}.value", g.types.activations, _cache_shape(decoder))
    h = g.rms_norm(x, f"{block}.input_layernorm", decoder.rms_norm_eps)
    q, k, v = (g.linear(h, f"{block}.self_attn.{name}_proj") for name in "qkv")
    attended, key, value = attend(q, k, v, past_key, past_value)
    x = g.op("Add", x, g.linear(attended, f"{block}.self_attn.o_proj"))
    h = g.rms_norm(x, f"{block}.post_attention_layernorm", decoder.rms_norm_eps)
    gated = g.op("Mul", g.silu(g.linear(h, f"{block}.mlp.gate_proj")), g.linear(h, f"{block}.mlp.up_proj"))
    return g.op("Add", x, g.linear(gated, f"{block}.mlp.down_proj")), (key, value)


def _standard_attention(g: GraphBuilder, decoder: DecoderConfig, inputs: _Inputs) -> _Attend:
    zero, axis = g.constant([0]), g.constant([1])
    steps = g.op("Range", g.constant(0), g.op("Squeeze", inputs.seq), g.constant(1))
    positions = g.op("Add", g.op("Unsqueeze", inputs.past_length, axis), steps)  # [batch, seq]
    total = g.op("Add", g.op("ReduceMax", inputs.past_length, zero, keepdims=1), inputs.seq)  # [1]
    slots = g.op("Range", g.constant(0), g.op("Squeeze", total), g.constant(1))
    mask = g.op("LessOrEqual", slots, g.op("Unsqueeze", positions, g.constant([1, 3])))  # [batch, 1, seq, total]

    def attend(
        q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        q, k, v = (g.heads(x, decoder.head_dim) for x in (q, k, v))
        q, k = (g.op("RotaryEmbedding", x, inputs.cos, inputs.sin) for x in (q, k))
        key, value = (
            g.op("TensorScatter", past, new, inputs.past_length, axis=2)
            for past, new in ((past_key, k), (past_value, v))
        )
        used_key, used_value = (g.slice(x, zero, total, axis=2) for x in (key, value))
        attended = g.op("Attention", q, used_key, used_value, mask)
        return g.merge_heads(attended, decoder.num_attention_heads * decoder.head_dim), key, value

    return attend


def _onnxruntime_attention(g: GraphBuilder, decoder: DecoderConfig, inputs: _Inputs) -> _Attend:
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    totals = g.op("Add", inputs.past_length, inputs.seq)
    last = g.cast(g.op("Sub", totals, g.constant([1])), ir.DataType.INT32)  # [batch]
    total = g.cast(g.op("ReduceMax", totals, keepdims=0), ir.DataType.INT32)  # []

    def attend(
        q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        q = g.op("RotaryEmbedding", q, inputs.cos, inputs.sin, num_heads=heads)
        k = g.op("RotaryEmbedding", k, inputs.cos, inputs.sin, num_heads=kv_heads)
        attended, key, value = g.ops(
            "GroupQueryAttention",
            *(q, k, v, past_key, past_value, last, total),
            outputs=3,
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
        )
        return attended, key, value

    return attend


_ATTENTION: dict[Dialect, Callable[[GraphBuilder, DecoderConfig, _Inputs], _Attend]] = {
    "standard": _standard_attention,
    "onnxruntime": _onnxruntime_attention,
}
