"""Linears with int8 weights and int8 inputs in graphs: QuantizeLinear/DequantizeLinear around a MatMul.

    x -> Q -> DQ -> MatMul -> (+ bias),  weights int8 [in, out] -> DQ (one scale per output)

ONNX Runtime and TensorRT both turn this into one integer product. They need symmetric integers with zero point 0,
scales that are positive constants, and no operator between MatMul and bias. On x86 ONNX Runtime needs unsigned inputs.
It converts them itself, but not where several linears share an input. A graph that only ONNX Runtime reads can
therefore have unsigned inputs from the start: the same values with zero point 128.

A scale per output that the graph would apply afterwards (layer scale) is folded: its magnitude into the weights' scale,
its sign into the integers. The integers of the checkpoint are therefore those of the product. This module does not know
the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from internvl_edge.model.linear import PackedLinear

from .builder import GraphBuilder, Source
from .weights import NUMPY_DTYPES, Array

# The smallest positive float16 value. float32 graphs are converted to float16 for some devices.
_SMALLEST_SCALE = 2.0**-24
# A linear's name -> the factor [out] that its output is multiplied by, or None.
OutputScale = Callable[[str], Array | None]


class IntegerMatMul:
    """Writes the products of a checkpoint's linears whose weights and inputs are int8.

    Args:
        checkpoint: any checkpoint. Without such linears this class has no effect.
        output_scale: the factors to fold, by linear. The caller must scale the bias.
    """

    def __init__(self, checkpoint: Source, output_scale: OutputScale) -> None:
        self._checkpoint = checkpoint
        self._output_scale = output_scale
        self._inputs: dict[tuple[ir.Value, float], ir.Value] = {}

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str, unsigned: bool = False) -> ir.Value | None:
        """Multiply x [..., in] by the linear's weights, without its bias. Return None for other kinds of linears.

        `unsigned` is for graphs that only ONNX Runtime will read.
        """
        scheme = self._checkpoint.schemes.get(name)
        if scheme is None or not scheme.static_inputs:
            return None
        out, inputs = self._checkpoint.shapes[f"{name}.weight"]
        values = g.weight(f"{name}.int8", ir.DataType.INT8, (inputs, out), lambda: self._scaled(name).values.T)
        scale = g.vector(f"{name}.int8_scale", (out,), lambda: self._scaled(name).scale[:, 0])
        return g.op("MatMul", self._rounded(g, x, name, unsigned), g.op("DequantizeLinear", values, scale, axis=1))

    def _rounded(self, g: GraphBuilder, x: ir.Value, name: str, unsigned: bool) -> ir.Value:
        """Return x after rounding to int8, once for all linears that share it.

        The zero point sets the integers' type.
        """
        step = self._checkpoint.input_scale(name)
        key = x, step
        if key not in self._inputs:
            scale = g.constant(step, NUMPY_DTYPES[g.types.activations])
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
    """Multiply every output by a factor [out]. Integers change at most their sign, and scales stay positive.

    There are two exceptions. Scales that float16 could not distinguish from 0 are raised to the smallest float16 value,
    and their integers are rounded again: an error of 3e-8 per weight. An integer of -128 whose sign changes becomes
    127.
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
