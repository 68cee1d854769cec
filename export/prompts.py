"""The graph for prompts (prefill): the onnxruntime decoder without lm_head, with int8 weights and int8 inputs.

Long prompts are limited by arithmetic. A product with 4-bit weights spends most of it on unpacking the weights again
for every chunk. Here the same weights are rounded once more, to int8 with one scale per output, and the inputs to int8
with one scale per token. The result is one integer product, which is twice as fast. Tokens differ by orders of
magnitude (the first token of a text most of all), so one scale for all tokens would round most of them to zero.

    x -> x / s -> QuantizeLinear -> MatMulIntegerToFloat -> * s (-> + bias),   s [batch, seq, 1] = max |x| / 127

The last layer ends with its keys and values. The decoder itself computes the prompt's last token and all later tokens.
The graph needs a CPU that multiplies bytes exactly (VNNI on x86).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import PackedLinear

from .attention import ATTENTION
from .builder import MICROSOFT, GraphBuilder, Types
from .decoder import cache_type, layers, output_cache
from .weights import Array, WeightFile

_LARGEST = 127
# The scale where all inputs of a token are zero.
_SMALLEST_SCALE = 1e-9


def build_prompts(checkpoint: Checkpoint, types: Types, file: WeightFile) -> ir.Model:
    """Build the graph for prompts of a checkpoint whose decoder has 4-bit weights.

        inputs_embeds, cos, sin, past_length, past_key_values.N.{key,value} as `decoder` -> present.N.{key,value}

    Raises:
        EdgeError: no 4-bit weights, or activations that are not float32.
    """
    if types.activations != ir.DataType.FLOAT:
        raise EdgeError("prompts in int8 are for CPUs, whose graphs compute in float32; leave out --activations")
    if not any(scheme.bits == 4 for name, scheme in checkpoint.schemes.items() if name.startswith("decoder.layers")):
        raise EdgeError("prompts in int8 are made from 4-bit weights, and this decoder has none; quantize it first")
    g = GraphBuilder("prompts", types, file, checkpoint.shapes, checkpoint.tensor, _TokenwiseMatMul(checkpoint))
    stored = cache_type(types, checkpoint)
    _, presents = layers(g, checkpoint, ATTENTION["onnxruntime"], stored, whole=False)
    output_cache(g, checkpoint.config.decoder, stored, presents)
    return g.model()


class _TokenwiseMatMul:
    """Writes the products of quantized linears; see `builder.PackedMatMul`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._last: tuple[str, Array, Array] | None = None

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value | None:
        """Multiply x [batch, seq, in] by the linear's weights, without its bias. Return None for float weights."""
        if name not in self._checkpoint.schemes:
            return None
        out, inputs = self._checkpoint.shapes[f"{name}.weight"]
        values = g.weight(f"{name}.int8", ir.DataType.INT8, (inputs, out), self._part(name, lambda v, s: v.T))
        scale = g.weight(f"{name}.int8_scale", ir.DataType.FLOAT, (out,), self._part(name, lambda v, s: s))
        rounded, token_scale = self._round(g, x)
        y = g.op(
            "MatMulIntegerToFloat",
            *(rounded, values, g.floats(1), scale, g.constant(_LARGEST + 1, np.uint8)),
            domain=MICROSOFT,
        )
        return g.op("Mul", y, token_scale)

    def _round(self, g: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return x as bytes with zero point 128, and the scales of its tokens, once for all linears that share x."""
        if x not in self._rounded:
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
            scale = g.op("Max", g.op("Mul", largest, g.floats(1 / _LARGEST)), g.floats(_SMALLEST_SCALE))
            bytes_ = g.op("QuantizeLinear", g.op("Div", x, scale), g.floats(1), g.constant(_LARGEST + 1, np.uint8))
            self._rounded[x] = bytes_, scale
        return self._rounded[x]

    def _part(self, name: str, choose: Callable[[Array, Array], Array]) -> Callable[[], Array]:
        """Return a function that reads the integers or scales of a linear when they are written.

        The last linear is kept, because its parts are written one after another.
        """

        def read() -> Array:
            if self._last is None or self._last[0] != name:
                linear = self._checkpoint.linear(name)
                assert linear is not None
                self._last = name, *round_per_output(linear)
            return choose(*self._last[1:])

        return read


def round_per_output(linear: PackedLinear) -> tuple[Array, Array]:
    """Return the weights as int8 [out, in] and one scale per output [out] float32. The largest |weight| becomes 127."""
    weights = linear.dequantize()
    scale = np.maximum(np.abs(weights).max(axis=1), np.finfo(np.float32).tiny) / _LARGEST
    return np.rint(weights / scale[:, None]).astype(np.int8), scale.astype(np.float32)
