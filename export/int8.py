"""Linears with int8 weights and int8 inputs in graphs: QuantizeLinear/DequantizeLinear around a MatMul.

    x -> Q -> DQ -> MatMul -> (+ bias),  weights int8 [in, out] -> DQ (one scale per output)

ONNX Runtime makes one integer product of it, TensorRT too: symmetric, zero points 0, scales positive constants, nothing
between MatMul and bias. A scale per output that the graph would apply afterwards (layer scale) goes into the weights'
scale, its sign into the integers, so the integers of the checkpoint are those of the product. Knows nothing of towers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint import Checkpoint
from internvl_edge.linear import PackedLinear

from .builder import GraphBuilder
from .weights import NUMPY_DTYPES, Array

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

    def __call__(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value | None:
        """x [..., in] times the linear's weights, without its bias; None where they are not of this kind."""
        scheme = self._checkpoint.schemes.get(name)
        if scheme is None or not scheme.static_inputs:
            return None
        linear = self._linear(name)
        factor = self._output_scale(name)
        folds = factor is not None and is_foldable(linear, factor, NUMPY_DTYPES[g.types.activations])
        out, inputs = linear.values.shape
        read = partial(self._read, name, folds)
        values = g.weight(f"{name}.int8", ir.DataType.INT8, (inputs, out), lambda: read().values.T)
        scale = g.vector(f"{name}.int8_scale", (out,), lambda: read().scale[:, 0])
        y = g.op("MatMul", _rounded(g, x, linear), g.op("DequantizeLinear", values, scale, axis=1))
        if factor is None or folds:
            return y
        return g.op("Mul", y, g.vector(f"{name}.output_scale", (out,), lambda: factor))

    def _read(self, name: str, folds: bool) -> PackedLinear:
        linear, factor = self._linear(name), self._output_scale(name)
        return scale_outputs(linear, factor) if folds and factor is not None else linear

    def _linear(self, name: str) -> PackedLinear:
        linear = self._checkpoint.linear(name)
        assert linear is not None
        return linear


def _rounded(g: GraphBuilder, x: ir.Value, linear: PackedLinear) -> ir.Value:
    """x as its int8 numbers stand for; the zero point says that they are signed."""
    scale = g.constant(linear.input_scale, NUMPY_DTYPES[g.types.activations])
    zero = g.constant(0, np.int8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)


def is_foldable(linear: PackedLinear, factor: Array, dtype: np.dtype[Any]) -> bool:
    """Whether `scale_outputs` loses nothing in `dtype`: scales stay normal numbers, and -128 need not change sign."""
    tiny = float(np.finfo(np.float16 if dtype == np.float16 else np.float32).tiny)
    scales = np.abs(linear.scale[:, 0] * factor)
    negative = linear.values[factor < 0]
    return bool((scales[factor != 0] >= tiny).all() and not (negative == -128).any())


def scale_outputs(linear: PackedLinear, factor: Array) -> PackedLinear:
    """Multiply every output by a factor [out]: integers change sign at most, scales stay positive.

    Where the factor is 0 the integers become 0 and the scale 1.
    """
    sign = np.sign(factor).astype(np.int8)
    scale = linear.scale * np.abs(factor)[:, None]
    return PackedLinear(
        values=(linear.values * sign[:, None]).astype(np.int8),
        scale=np.where(sign[:, None] == 0, 1, scale).astype(np.float32),
        zero_point=None,
        bits=linear.bits,
        input_scale=linear.input_scale,
    )
