"""The decoder graph in two dialects that differ only in attention and its KV cache.

    inputs_embeds [batch, seq, hidden], cos and sin [batch, seq, head_dim / 2], past_length [batch] int64,
    logits_to_keep [1] int64, past_key_values.N.{key,value} [batch, kv_heads, capacity, head_dim]
    -> logits [batch, kept, vocab] float32, present.N.{key,value}

`past_length` is the number of tokens already in the cache. Rows are not padded. The cache has a fixed capacity and is
written in place: bind each `present` to its `past`. It holds int8 values where the checkpoint has scales for them. The
host computes the rotary angles, so the graph has no length limit and no state for dynamic NTK.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.config import DecoderConfig

from .attention import ATTENTION, Attend, Attention, Dialect, Inputs, LayerCache
from .builder import INT64_MAX, GraphBuilder, Source, Types
from .quantized import PackedWeights
from .weights import Array, WeightFile

HEAD = "decoder.lm_head"
PADDING = f"{HEAD}.padding"
# A float16 value that is below every logit.
_NEVER = -3e4
# The number of lm_head rows that are examined at a time. All rows as floats would be the largest array in memory.
_ROWS = 4096
# The new keys and values of every layer.
Cache = list[tuple[ir.Value, ir.Value]]


def build_decoder(
    checkpoint: Checkpoint,
    types: Types,
    dialect: Dialect,
    file: WeightFile,
    packed: PackedWeights | None = None,
    vocabulary: int | None = None,
) -> ir.Model:
    """Build the decoder of a checkpoint in one dialect. Weights are placed in `file`, which the dialects share.

    Args:
        packed: the checkpoint's quantized linears, to keep them quantized.
        vocabulary: the number of tokens in the tokenizer. In a quantized checkpoint, no row beyond it wins an argmax.
    """
    decoder = checkpoint.config.decoder
    matmul = partial(packed.matmul, dialect=dialect) if packed else None
    g = GraphBuilder("decoder", types, file, checkpoint.shapes, checkpoint.tensor, matmul)
    keep = g.input("logits_to_keep", ir.DataType.INT64, [1])
    stored = cache_type(types, checkpoint)
    x, presents = layers(g, checkpoint, ATTENTION[dialect], stored)
    assert x is not None
    x = g.slice(x, g.op("Neg", keep), g.constant([INT64_MAX]), axis=1)
    x = g.rms_norm(x, "decoder.norm", decoder.rms_norm_eps)
    output_logits(g, decoder, x, partial(_padding, checkpoint, vocabulary) if checkpoint.quantization else None)
    output_cache(g, decoder, stored, presents)
    return g.model()


def output_logits(
    g: GraphBuilder, decoder: DecoderConfig, x: ir.Value, padding: Callable[[], Array] | None
) -> ir.Value:
    """Make the logits of hidden states x [batch, kept, hidden], which are normed, an output of the graph.

    `padding` reads the penalty [vocab] that is added to them, and is None where there is none.
    """
    logits = g.linear(x, HEAD)
    if padding is not None:
        logits = g.op("Add", logits, g.vector(PADDING, (decoder.vocab_size,), padding))
    if g.types.activations != ir.DataType.FLOAT:
        logits = g.cast(logits, ir.DataType.FLOAT)
    g.output(logits, "logits", ir.DataType.FLOAT, ["batch", "kept", decoder.vocab_size])
    return logits


def layers(
    g: GraphBuilder, checkpoint: Source, attention: Attention, stored: ir.DataType, whole: bool = True
) -> tuple[ir.Value | None, Cache]:
    """Add the graph's inputs and all layers, with a cache of type `stored`.

    Return the last layer's hidden state [batch, seq, hidden] and the new cache. If `whole` is False, the last layer
    ends with its keys and values, and there is no hidden state.
    """
    decoder, activations = checkpoint.config.decoder, g.types.activations
    x: ir.Value | None = g.input("inputs_embeds", activations, ["batch", "seq", decoder.hidden_size])
    assert x is not None
    half: list[int | str] = ["batch", "seq", decoder.head_dim // 2]
    cos, sin = g.input("cos", activations, half), g.input("sin", activations, half)
    past_length = g.input("past_length", ir.DataType.INT64, ["batch"])
    attend = attention(g, decoder, Inputs(cos, sin, past_length, g.op("Shape", x, start=1, end=2)))
    scales = checkpoint.kv_scales
    presents: Cache = []
    for n in range(decoder.num_hidden_layers):
        assert x is not None
        key, value = (
            g.input(f"past_key_values.{n}.{kind}", stored, _cache_shape(decoder)) for kind in ("key", "value")
        )
        cache = LayerCache(key, value, (scales.key[n], scales.value[n]) if scales else None)
        x, present = _block(g, decoder, attend, x, n, cache, whole or n < decoder.num_hidden_layers - 1)
        presents.append(present)
    return x, presents


def output_cache(g: GraphBuilder, decoder: DecoderConfig, stored: ir.DataType, presents: Cache) -> None:
    """Make the new cache an output of the graph."""
    shape = _cache_shape(decoder)
    for n, pair in enumerate(presents):
        for kind, value in zip(("key", "value"), pair, strict=True):
            g.output(value, f"present.{n}.{kind}", stored, shape)


def cache_type(types: Types, checkpoint: Source) -> ir.DataType:
    """Return the type of the cache: int8 where the checkpoint has scales for it."""
    return types.activations if checkpoint.kv_scales is None else ir.DataType.INT8


def _padding(checkpoint: Checkpoint, vocabulary: int | None) -> Array:
    """Return a penalty [vocab] to add to the logits: padding gets a value below all other logits, other rows 0.

    Padding is the rows beyond the tokenizer's vocabulary and the rows of zeros.
    """
    packed = checkpoint.linear(HEAD)
    head = checkpoint.tensor(f"{HEAD}.weight") if packed is None else packed.values
    penalty = np.zeros(len(head), np.float32)
    for start in range(0, len(head), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(head)))
        weights = head[rows] if packed is None else packed.rows(rows).dequantize()
        penalty[rows] = np.where(weights.any(axis=1), 0, _NEVER)
    penalty[vocabulary or len(head) :] = _NEVER
    return penalty


def _cache_shape(decoder: DecoderConfig) -> list[int | str]:
    return ["batch", decoder.num_key_value_heads, "capacity", decoder.head_dim]


def _block(
    g: GraphBuilder, decoder: DecoderConfig, attend: Attend, x: ir.Value, n: int, cache: LayerCache, whole: bool
) -> tuple[ir.Value | None, tuple[ir.Value, ir.Value]]:
    block = f"decoder.layers.{n}"
    h = g.rms_norm(x, f"{block}.input_layernorm", decoder.rms_norm_eps)
    q, k, v = (g.linear(h, f"{block}.self_attn.{name}_proj") for name in "qkv")
    if decoder.qk_norm:
        q, k = (
            g.head_norm(x, f"{block}.self_attn.{name}_norm", decoder.rms_norm_eps, decoder.head_dim)
            for name, x in (("q", q), ("k", k))
        )
    attended, key, value = attend(q, k, v, cache)
    if not whole:
        return None, (key, value)
    x = g.op("Add", x, g.linear(attended, f"{block}.self_attn.o_proj"))
    h = g.rms_norm(x, f"{block}.post_attention_layernorm", decoder.rms_norm_eps)
    gated = g.op("Mul", g.silu(g.linear(h, f"{block}.mlp.gate_proj")), g.linear(h, f"{block}.mlp.up_proj"))
    return g.op("Add", x, g.linear(gated, f"{block}.mlp.down_proj")), (key, value)
