"""Linears with int8 weights and int8 inputs in graphs: QuantizeLinear/DequantizeLinear around a MatMul.

    x -> Q -> DQ -> MatMul -> (+ bias),  weights int8 [in, out] -> DQ (one scale per output)

ONNX Runtime makes one integer product of it, TensorRT too: symmetric, zero points 0, scales positive constants, nothing
between MatMul and bias. On x86 ONNX Runtime needs unsigned inputs and makes them so itself, but not where several
linears share an input; a graph for it alone can have them unsigned from the start, the same numbers counted from 128.
A scale per output that the graph would apply afterwards (layer scale) goes into the weights' scale, its sign into the
integers, so the integers of the checkpoint are those of the product. Knows nothing of towers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import PackedLinear

from .builder import GraphBuilder
from .weights import NUMPY_DTYPES, Array

# Graphs in float32 become float16 ones for some devices.
_SMALLEST_SCALE = 2.0**-24
# A linear's name -> the factor [out] its output is multiplied by, or None.
OutputScale = Callable[[str], Array | None]


class IntegerMatMul:
    """Writes the products of a checkpoint's linears whose weights and inputs are int8.

    Args:
        checkpoint: any; without such linears nothing here does anything.
        output_scale: factors to fold, by linear; its bias is the caller's to scale.
    """

    def __init__(self, checkpoint: Checkpoint, output_scale: OutputScale) -> None:
        self._checkpoint = checkpoint
        self._output_scale = output_scale
        self._inputs: dict[tuple[ir.Value, float], ir.Value] = {}

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str, unsigned: bool = False) -> ir.Value | None:
        """x [..., in] times the linear's weights, without its bias; None where they are not of this kind.

        `unsigned` is for graphs that only ONNX Runtime will read.
        """
        scheme = self._checkpoint.schemes.get(name)
        if scheme is None or not scheme.static_inputs:
            return None
        linear = self._linear(name)
        out, inputs = linear.values.shape
        values = g.weight(f"{name}.int8", ir.DataType.INT8, (inputs, out), lambda: self._scaled(name).values.T)
        scale = g.vector(f"{name}.int8_scale", (out,), lambda: self._scaled(name).scale[:, 0])
        return g.op("MatMul", self._rounded(g, x, linear, unsigned), g.op("DequantizeLinear", values, scale, axis=1))

    def _rounded(self, g: GraphBuilder, x: ir.Value, linear: PackedLinear, unsigned: bool) -> ir.Value:
        """x as its int8 numbers stand for, once for all linears that take it; the zero point gives them their type."""
        assert linear.input_scale is not None
        key = x, linear.input_scale
        if key not in self._inputs:
            scale = g.constant(linear.input_scale, NUMPY_DTYPES[g.types.activations])
            zero = g.constant(128, np.uint8) if unsigned else g.constant(0, np.int8)
            self._inputs[key] = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
        return self._inputs[key]

    def _scaled(self, name: str) -> PackedLinear:
        linear, factor = self._linear(name), self._output_scale(name)
        return linear if factor is None else scale_outputs(linear, factor)

    def _linear(self, name: str) -> PackedLinear:
        linear = self._checkpoint.linear(name)
        assert linear is not None
        return linear


def scale_outputs(linear: PackedLinear, factor: Array) -> PackedLinear:
    """Multiply every output by a factor [out]: integers change sign at most, scales stay positive.

    Scales that float16 could not tell from 0 are raised to the smallest that it can, and their integers rounded again:
    an error of 3e-8 per weight. So is -128 where its sign would change, to 127.
    """
    scale = linear.scale[:, 0].astype(np.float64) * np.abs(factor)
    stored = np.maximum(scale, _SMALLEST_SCALE)
    values = linear.values.astype(np.int8)
    negative, raised = factor < 0, stored > scale
    values[negative] = -np.maximum(values[negative], -127)
    values[raised] = np.rint(values[raised] * (scale / stored)[raised, None])
    return PackedLinear(
        values=values,
        scale=stored[:, None].astype(np.float32),
        zero_point=None,
        bits=linear.bits,
        input_scale=linear.input_scale,
    )
