"""Quantised linears in graphs: integers and scales once in the weights file, zero points in the way the dialect takes.

Integers are stored [in, out] counted from the middle (int4 or int8), the form that ONNX Runtime fuses to MatMulNBits
and that TensorRT reads; both dialects share them. With zero points z, counted likewise, W = s (q - z) = s q - s z, so

    onnxruntime   x @ DequantizeLinear(q, s, z)
    standard      x @ DequantizeLinear(q, s) + R @ C,  R[k] = sum of x over group k,  C[k, n] = -s[k, n] z[k, n]

because TensorRT takes no zero points. R is summed in float32. The second term costs in / group_size rows of a matrix
product and is exact, where clamping or rounding again would change weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.checkpoint import Checkpoint
from internvl_edge.errors import EdgeError
from internvl_edge.linear import PackedLinear, Scheme

from .builder import GraphBuilder, Types
from .weights import NUMPY_DTYPES, Array

ASYMMETRIC = ("exact", "requantise")
INTEGERS = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
# Rounding again tries scales that put the largest weight of a group on the highest integer, on the lowest, or between.
_BELOW_MIDDLE = (1.0, 0.5, 0.0)
# Outputs of each layer on which the weights' error is measured.
_SAMPLED_ROWS = 256


class PackedWeights:
    """The quantised linears of a checkpoint as graphs take them.

    Args:
        checkpoint: any; without quantised linears nothing here does anything.
        types: of the graphs.
        asymmetric: "exact", or "requantise" to round weights with zero points again to a symmetric grid.
    """

    def __init__(self, checkpoint: Checkpoint, types: Types, asymmetric: str = "exact") -> None:
        if asymmetric not in ASYMMETRIC:
            raise EdgeError(f"asymmetric {asymmetric!r} is not one of {', '.join(ASYMMETRIC)}")
        self._checkpoint = checkpoint
        self._types = types
        self._requantises = asymmetric == "requantise"
        self._last: tuple[str, PackedLinear] | None = None
        self._errors: dict[str, tuple[float, float]] = {}

    def scheme(self, name: str) -> Scheme | None:
        """How the graph rounds a linear, None for floats."""
        scheme = self._checkpoint.schemes.get(name)
        return replace(scheme, symmetric=True) if scheme and self._requantises else scheme

    def linear(self, name: str) -> PackedLinear:
        """The numbers of one linear in that scheme; the last one is kept, as its parts are written one by one."""
        if self._last is None or self._last[0] != name:
            source = self._checkpoint.linear(name)
            assert source is not None
            linear = requantise(source) if self._requantises and source.zero_point is not None else source
            self._errors[name] = _squared_errors(source, linear, self._types.activations)
            self._last = name, linear
        return self._last[1]

    def matmul(self, g: GraphBuilder, x: ir.Value, name: str, native_zero_points: bool) -> ir.Value | None:
        """x [batch, seq, in] times the linear's weights, without its bias; None where they are floats."""
        scheme = self.scheme(name)
        if scheme is None:
            return None
        out, inputs = self._checkpoint.shapes[f"{name}.weight"]
        stored = INTEGERS[scheme.bits]
        # One scale per output is DequantizeLinear's per-axis form, anything else its blocked form.
        groups = inputs // scheme.group_size if scheme.group_size else 1
        grid = (out,) if scheme.group_size is None else (groups, out)
        form: dict[str, Any] = (
            {"axis": 1} if scheme.group_size is None else {"axis": 0, "block_size": scheme.group_size}
        )
        parts: dict[str, tuple[ir.DataType, tuple[int, ...], Callable[[PackedLinear], Array]]] = {
            "values": (stored, (inputs, out), lambda linear: linear.signed()[0].T),
            "scale": (g.types.activations, grid, lambda linear: linear.scale.T),
        }
        if not scheme.symmetric:
            parts["zero_point"] = stored, grid, lambda linear: np.asarray(linear.signed()[1]).T
            parts["correction"] = g.types.activations, (groups, out), correction_of
        for last, (dtype, shape, read) in parts.items():  # together, so that a layer is read once for all dialects
            g.reserve(f"{name}.{last}", dtype, shape, partial(self._part, name, read))
        values, scale = g.reserved(f"{name}.values"), g.reserved(f"{name}.scale")
        if scheme.symmetric:
            return g.op("MatMul", x, g.op("DequantizeLinear", values, scale, **form))
        if native_zero_points:
            zeros = g.reserved(f"{name}.zero_point")
            return g.op("MatMul", x, g.op("DequantizeLinear", values, scale, zeros, **form))
        y = g.op("MatMul", x, g.op("DequantizeLinear", values, scale, **form))
        return g.op("Add", y, g.op("MatMul", g.group_sums(x, groups), g.reserved(f"{name}.correction")))

    def _part(self, name: str, read: Callable[[PackedLinear], Array]) -> Array:
        return read(self.linear(name))

    def summary(self) -> dict[str, Any] | None:
        """What the manifest says of a quantised decoder once its weights are written; None for float weights.

        method, asymmetric: of the checkpoint, and what became of its zero points. bits, group_size, symmetric: of most
        layers. lm_head: the head's. bits_per_weight: over all linears of the decoder with scales and zero points as
        stored for ONNX Runtime. weight_error: root mean square of what the graphs' weights miss of the checkpoint's,
        relative to these, on up to 256 outputs of each quantised layer.
        """
        quantization = self._checkpoint.quantization
        schemes = {name: self._checkpoint.schemes[name] for name in self._errors}
        if quantization is None or not schemes:
            return None
        most = Counter(schemes.values()).most_common(1)[0][0]
        head = self.scheme("decoder.lm_head")
        missed, whole = (sum(error) for error in zip(*self._errors.values(), strict=True))
        no_zeros = all(scheme.symmetric for scheme in schemes.values())
        return {
            "method": quantization.method,
            "bits": most.bits,
            "group_size": most.group_size,
            "symmetric": most.symmetric,
            "lm_head": str(head) if head else self._types.weights.name.lower(),
            "bits_per_weight": round(self._bits_per_weight(), 3),
            "asymmetric": None if no_zeros else "requantise" if self._requantises else "exact",
            "weight_error": math.sqrt(missed / whole) if whole else 0.0,
        }

    def _bits_per_weight(self) -> float:
        types, bits, weights = self._types, 0.0, 0
        for name, shape in self._checkpoint.shapes.items():
            module = name.removesuffix(".weight")
            if not name.startswith("decoder.") or len(shape) != 2 or module == "decoder.embed_tokens":
                continue
            scheme, size = self.scheme(module), int(np.prod(shape))
            each: float = types.weights.bitwidth
            if scheme:
                grid = types.activations.bitwidth + (0 if scheme.symmetric else scheme.bits)
                each = scheme.bits + grid / (scheme.group_size or shape[1])
            bits, weights = bits + each * size, weights + size
        return bits / weights


def _squared_errors(source: PackedLinear, linear: PackedLinear, activations: ir.DataType) -> tuple[float, float]:
    """Sums over evenly spaced outputs: what the graph's weights miss of the checkpoint's, and the latter, squared."""
    rows = np.unique(np.linspace(0, len(source.values) - 1, _SAMPLED_ROWS).astype(np.intp))
    expected = source.rows(rows).dequantise().astype(np.float64)
    missed = stored_weights(linear.rows(rows), activations) - expected
    return float(np.square(missed).sum()), float(np.square(expected).sum())


def correction_of(linear: PackedLinear) -> Array:
    """C [groups, out], float32, exact in it."""
    zeros = linear.signed()[1]
    assert zeros is not None
    return np.asarray(-(linear.scale * zeros).T)


def stored_weights(linear: PackedLinear, activations: ir.DataType) -> Array:
    """The weights [out, in] of the standard dialect in float64, with scales and corrections as they are stored."""
    dtype = NUMPY_DTYPES[activations]
    values, zeros = linear.signed()
    weights = np.repeat(linear.scale.astype(dtype).astype(np.float64), linear.group_size, axis=1) * values
    if zeros is not None:
        weights += np.repeat(correction_of(linear).T.astype(dtype).astype(np.float64), linear.group_size, axis=1)
    return weights


def requantise(linear: PackedLinear) -> PackedLinear:
    """The same weights rounded again without zero points; of a few scales per group the one that misses least."""
    values = np.empty(linear.values.shape, np.int8)
    scale = np.empty(linear.scale.shape, np.float32)
    for start in range(0, len(values), _SAMPLED_ROWS):
        rows = slice(start, start + _SAMPLED_ROWS)
        index = np.arange(*rows.indices(len(values)))
        values[rows], scale[rows] = _round_symmetric(
            linear.rows(index).dequantise(), linear.scale.shape[1], linear.middle
        )
    return PackedLinear(values, scale, None, linear.bits, linear.bias)


def _round_symmetric(weights: Array, groups: int, middle: int) -> tuple[Array, Array]:
    grouped = weights.reshape(len(weights), groups, -1)
    largest = np.abs(grouped).max(-1)
    best = np.full(largest.shape, np.inf, np.float32)
    values, scale = np.zeros(grouped.shape, np.int8), np.ones(largest.shape, np.float32)
    for below in _BELOW_MIDDLE:
        tried = np.where(largest > 0, largest / (middle - below), 1).astype(np.float32)
        rounded = np.clip(np.rint(grouped / tried[:, :, None]), -middle, middle - 1)
        missed = np.square(rounded * tried[:, :, None] - grouped).sum(-1)
        better = missed < best
        values[better], scale[better], best[better] = rounded[better].astype(np.int8), tried[better], missed[better]
    return values.reshape(weights.shape), scale
