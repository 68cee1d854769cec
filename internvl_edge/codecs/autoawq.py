"""AutoAWQ's GEMM format: 4-bit weights in int32 words, one zero point and one scale per group of inputs.

    qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales float16 [in / group, out]
    weight[n, k] = (q[n, k] - zero[n, k / group]) * scale[n, k / group]

Nibble i of a word, counted from the lowest, holds column ORDER[i] of its eight. (GPTQ's format differs: consecutive
columns, and zero points stored minus one.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..linear import PackedLinear

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BYTES = tuple(zip(ORDER[::2], ORDER[1::2], strict=True))
# Without stored zero points, the middle of 0..15 stands for zero.
SYMMETRIC_ZERO = 8

Words = NDArray[np.int32]


def pack(linear: PackedLinear) -> dict[str, NDArray[Any]]:
    """`qweight`, `qzeros` and `scales` of one layer; symmetric weights get the zero point 8. A bias is not included.

    Raises:
        CheckpointError: not 4 bits, outputs not a multiple of 8, or a scale that float16 cannot hold.
    """
    out, groups = linear.scale.shape
    if linear.bits != 4 or out % 8:
        raise CheckpointError(f"AutoAWQ packs 4 bits and multiples of 8 outputs, not {linear.bits} bits x {out}")
    with np.errstate(over="ignore"):
        scales = linear.scale.T.astype(np.float16, order="C")
    if not np.isfinite(scales).all():
        raise CheckpointError("AutoAWQ stores scales as float16, which cannot hold those of this layer")
    if linear.zero_point is None:
        values = (linear.values + SYMMETRIC_ZERO).astype(np.uint8)
        zeros = np.full((out, groups), SYMMETRIC_ZERO, np.uint8)
    else:
        values, zeros = linear.values.astype(np.uint8, copy=False), linear.zero_point
    return {"qweight": _to_words(values.T), "qzeros": _to_words(zeros.T), "scales": scales}


def unpack(qweight: Words, qzeros: Words, scales: NDArray[np.float16]) -> PackedLinear:
    """The layer behind the three stored tensors, bit for bit: `pack(unpack(...))` gives them back."""
    return PackedLinear(
        values=np.ascontiguousarray(_from_words(qweight).T),
        scale=np.ascontiguousarray(scales.T, np.float32),
        zero_point=np.ascontiguousarray(_from_words(qzeros).T),
        bits=4,
    )


def _to_words(values: NDArray[np.uint8]) -> Words:
    """[rows, columns] of 0..15 -> [rows, columns / 8]. One strided pass per byte: numpy's fancy indexing is slower."""
    rows, columns = values.shape
    eights = values.reshape(rows, columns // 8, 8)
    packed = np.empty((rows, columns // 8, 4), np.uint8)
    for byte, (low, high) in enumerate(_BYTES):
        packed[:, :, byte] = eights[:, :, low] | eights[:, :, high] << 4
    return packed.view("<i4")[:, :, 0]


def _from_words(words: Words) -> NDArray[np.uint8]:
    rows, columns = words.shape
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, columns, 4)
    eights = np.empty((rows, columns, 8), np.uint8)
    for byte, (low, high) in enumerate(_BYTES):
        eights[:, :, low], eights[:, :, high] = packed[:, :, byte] & 15, packed[:, :, byte] >> 4
    return eights.reshape(rows, 8 * columns)
