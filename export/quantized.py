"""Quantized linears in graphs. Each dialect has the form that its engine takes without rewriting weights at load.

Linears with int8 inputs are written the same way in both dialects, see `int8`. The other quantized linears are written
as follows.

onnxruntime: MatMulNBits. Integers [out, blocks of the inputs] and zero points are stored unchanged.

standard: DequantizeLinear before MatMul, the form that TensorRT reads. Integers [in, out] (int4 or int8) are stored as
their distance from the middle of their range. TensorRT takes no zero points. With z stored in the same way,
W = s (q - z) = s q - s z and

    y = x @ DequantizeLinear(q, s) + R @ C,  R[k] = sum of x over group k,  C[k, n] = -s[k, n] z[k, n]

R is summed in float32. The second term costs in / group_size rows of a matrix product and is exact. Clamping or
rounding again would change the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.manifest import DecoderQuantization
from internvl_edge.model.components import bits_per_weight
from internvl_edge.model.linear import PackedLinear, Scheme

from .builder import MICROSOFT, GraphBuilder, Source, Types
from .int8 import IntegerMatMul
from .weights import NUMPY_DTYPES, Array, WeightFile

BLOCKS = "decoder.onnxruntime.data"
# MatMulNBits takes blocks of a power of two. Larger blocks than these gain nothing measurable.
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16
# Level 4 rounds activations to int8 per block. Decoding is 1.7 times as fast as with float32.
_ACCURACY_LEVEL = 4
_INTEGERS = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
# The number of outputs per layer on which the error of the weights is measured.
_SAMPLED_ROWS = 256


class PackedWeights:
    """The quantized linears of a checkpoint in the forms that graphs take.

    Args:
        checkpoint: any checkpoint. Without quantized linears this class has no effect.
        types: the types of the graphs.

    Attributes:
        blocks: the file with ONNX Runtime's form of the weights. The standard form is in the builder's own file.
    """

    def __init__(self, checkpoint: Source, types: Types) -> None:
        self._checkpoint = checkpoint
        self._types = types
        self.blocks = WeightFile(BLOCKS)
        # A factor of 1 changes only scales that float16 cannot distinguish from 0.
        self._integers = IntegerMatMul(checkpoint, lambda name: np.ones(checkpoint.shapes[f"{name}.weight"][0]))
        self._last: tuple[str, PackedLinear] | None = None
        self._errors: dict[str, tuple[float, float]] = {}

    def matmul(self, g: GraphBuilder, x: ir.Value, name: str, dialect: str) -> ir.Value | None:
        """Multiply x [batch, seq, in] by the linear's weights, without its bias. Return None for float weights.

        Raises:
            EdgeError: ONNX Runtime has no blocks that fit the group size; the layer is named.
        """
        scheme = self._checkpoint.schemes.get(name)
        if scheme is None:
            return None
        if scheme.static_inputs:
            return self._integers(g, x, name, unsigned=dialect == "onnxruntime")
        out, inputs = self._checkpoint.shapes[f"{name}.weight"]
        write = self._in_blocks if dialect == "onnxruntime" else self._dequantized
        return write(g, x, name, scheme, out, inputs)

    def _in_blocks(self, g: GraphBuilder, x: ir.Value, name: str, scheme: Scheme, out: int, inputs: int) -> ir.Value:
        block = _block_size(name, scheme, inputs)
        count = -(-inputs // block)
        packed, row = block * scheme.bits // 8, -(-count * scheme.bits // 8)

        def part(
            last: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[PackedLinear], Array]
        ) -> ir.Value:
            return g.weight(f"{name}.{last}", dtype, shape, partial(self._part, name, read), self.blocks)

        values = part("blocks", ir.DataType.UINT8, (out, count, packed), partial(block_values, block=block))
        scale = part("block_scale", g.types.activations, (out * count,), partial(block_scales, block=block))
        inputs_of_node = [x, values, scale]
        if not scheme.symmetric:
            zeros = part("block_zero_point", ir.DataType.UINT8, (out * row,), partial(block_zero_points, block=block))
            inputs_of_node.append(zeros)
        return g.op(
            "MatMulNBits",
            *inputs_of_node,
            domain=MICROSOFT,
            K=inputs,
            N=out,
            bits=scheme.bits,
            block_size=block,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _dequantized(self, g: GraphBuilder, x: ir.Value, name: str, scheme: Scheme, out: int, inputs: int) -> ir.Value:
        # One scale per output is DequantizeLinear's per-axis form. A scale per group is its blocked form.
        groups = inputs // scheme.group_size if scheme.group_size else 1
        columns = g.columns(out)
        grid = (groups, columns) if scheme.group_size else (columns,)
        form: dict[str, Any] = {"axis": 0, "block_size": scheme.group_size} if scheme.group_size else {"axis": 1}

        def part(
            last: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[PackedLinear], Array]
        ) -> ir.Value:
            return g.weight(f"{name}.{last}", dtype, shape, partial(self._part, name, read))

        values = part("values", _INTEGERS[scheme.bits], (inputs, columns), lambda linear: linear.signed()[0].T)
        scale = part("scale", g.types.activations, grid, lambda linear: linear.scale.T)
        y = g.op("MatMul", x, g.op("DequantizeLinear", values, scale, **form))
        if columns > out:
            y = g.slice(y, g.constant([0]), g.constant([out]), axis=2)
        if scheme.symmetric:
            return y
        read = partial(self._part, name, correction_of)
        correction = g.factor(f"{name}.correction", (groups, out), read)
        return g.op("Add", y, g.op("MatMul", g.group_sums(x, groups), correction))

    def _part(self, name: str, read: Callable[[PackedLinear], Array]) -> Array:
        """Return the result of `read` for a linear.

        The last linear is kept, because its parts are written one after another.
        """
        if self._last is None or self._last[0] != name:
            linear = self._checkpoint.linear(name)
            assert linear is not None
            linear = centered_zeros(linear)
            if name not in self._errors:
                self._errors[name] = _squared_errors(linear, self._types.activations)
            self._last = name, linear
        return read(self._last[1])

    def summary(self, method: str) -> DecoderQuantization | None:
        """Return the manifest's description of a decoder that a method quantized, or None for float weights.

        Call it after the weights are written.
        """
        if not any(name.startswith("decoder.") for name in self._checkpoint.schemes):
            return None
        missed, whole = (sum(error) for error in zip((0.0, 0.0), *self._errors.values(), strict=True))
        return DecoderQuantization(
            method=method,
            bits_per_weight=round(self._bits_per_weight(), 3),
            weight_error=math.sqrt(missed / whole) if whole else 0.0,
        )

    def _bits_per_weight(self) -> float:
        types, bits, weights = self._types, 0.0, 0
        for name, shape in self._checkpoint.shapes.items():
            module = name.removesuffix(".weight")
            if not name.startswith("decoder.") or len(shape) != 2 or module == "decoder.embed_tokens":
                continue
            scheme, size = self._checkpoint.schemes.get(module), int(np.prod(shape))
            each = bits_per_weight(scheme, shape[1], types.activations.bitwidth) if scheme else types.weights.bitwidth
            bits, weights = bits + each * size, weights + size
        return bits / weights


def _block_size(name: str, scheme: Scheme, inputs: int) -> int:
    """Return a power of two that divides the groups, or, with one scale per output, one that wastes little."""
    block = math.gcd(scheme.group_size or inputs, _LARGEST_BLOCK)
    if scheme.group_size is None:
        return block if block >= _LARGEST_BLOCK // 4 else _LARGEST_BLOCK
    if block < _SMALLEST_BLOCK:
        raise EdgeError(
            f"{name} has groups of {scheme.group_size}, which ONNX Runtime's blocks of {_SMALLEST_BLOCK} to "
            f"{_LARGEST_BLOCK} do not divide; quantize with group size 32, 64 or 128"
        )
    return block


def centered_zeros(linear: PackedLinear) -> PackedLinear:
    """Return the linear with the middle of the range as integers and zero point of all groups that stand for zeros.

    Quantizers give such a group any scale, often one that is far too large for the layer's weights. The standard
    dialect then subtracts two large products to get the zero, and what each of them was rounded by remains. Zero times
    the scale has no such rest.
    """
    if linear.zero_point is None:
        return linear
    out, groups = linear.scale.shape
    empty = (linear.values.reshape(out, groups, -1) == linear.zero_point[:, :, None]).all(-1)
    if not empty.any():
        return linear
    values, zeros = linear.values.copy(), linear.zero_point.copy()
    values.reshape(out, groups, -1)[empty] = linear.middle
    zeros[empty] = linear.middle
    return replace(linear, values=values, zero_point=zeros)


def _squared_errors(linear: PackedLinear, activations: ir.DataType) -> tuple[float, float]:
    """Return two sums over evenly spaced outputs: the squared error of the graph's weights, and their squares.

    The error is measured against the checkpoint's weights, and the squares are those of the checkpoint's weights.
    """
    rows = np.unique(np.linspace(0, len(linear.values) - 1, _SAMPLED_ROWS).astype(np.intp))
    sampled = linear.rows(rows)
    expected = sampled.dequantize().astype(np.float64)
    missed = stored_weights(sampled, activations) - expected
    return float(np.square(missed).sum()), float(np.square(expected).sum())


def block_values(linear: PackedLinear, block: int) -> Array:
    """Return MatMulNBits' B, uint8 [out, blocks, block * bits / 8]. Integers count from the lowest value.

    An incomplete last block is filled up.
    """
    packed = _pack_rows(_unsigned(linear), -linear.values.shape[1] % block, linear)
    return packed.reshape(len(packed), -1, block * linear.bits // 8)


def block_scales(linear: PackedLinear, block: int) -> Array:
    """Return the scales [out * blocks]. The scale of a group is repeated for each of its blocks."""
    return _per_block(linear.scale, linear, block).reshape(-1)


def block_zero_points(linear: PackedLinear, block: int) -> Array:
    """Return the zero points [out * bytes of a row], counted from the lowest value and packed like the integers."""
    assert linear.zero_point is not None
    zeros = _per_block(linear.zero_point, linear, block)
    return _pack_rows(zeros, -zeros.shape[1] % (8 // linear.bits), linear).reshape(-1)


def _per_block(grid: Array, linear: PackedLinear, block: int) -> Array:
    return np.repeat(grid, -(-linear.group_size // block), axis=1)


def _unsigned(linear: PackedLinear) -> Array:
    if linear.zero_point is not None:
        return linear.values
    return linear.values.view(np.uint8) + np.uint8(linear.middle)


def _pack_rows(integers: Array, missing: int, linear: PackedLinear) -> Array:
    """Pack [rows, columns] to bytes [rows, (columns + missing) * bits / 8], lower half first.

    The middle of the range fills the missing columns.
    """
    if missing:
        integers = np.pad(integers, ((0, 0), (0, missing)), constant_values=linear.middle)
    return integers if linear.bits == 8 else integers[:, 0::2] | integers[:, 1::2] << 4


def correction_of(linear: PackedLinear) -> Array:
    """Return C [groups, out] float32. It is exact in this type."""
    zeros = linear.signed()[1]
    assert zeros is not None
    return np.asarray(-(linear.scale * zeros).T)


def stored_weights(linear: PackedLinear, activations: ir.DataType) -> Array:
    """Return the weights [out, in] of the standard dialect in float64, with scales and corrections as stored."""
    dtype = NUMPY_DTYPES[activations]
    values, zeros = linear.signed()
    weights = np.repeat(linear.scale.astype(dtype).astype(np.float64), linear.group_size, axis=1) * values
    if zeros is not None:
        weights += np.repeat(correction_of(linear).T.astype(dtype).astype(np.float64), linear.group_size, axis=1)
    return weights
