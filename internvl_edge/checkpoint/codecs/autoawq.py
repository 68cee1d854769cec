"""AutoAWQ's GEMM format: 4-bit weights in int32 words, one zero point and one scale per group of inputs.

    qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales float16 [in / group, out]
    weight[n, k] = (q[n, k] - zero[n, k / group]) * scale[n, k / group]

Nibble i of a word, counted from the lowest, holds column ORDER[i] of its eight columns. (GPTQ's format differs: its
columns are consecutive, and its zero points are stored minus one.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.text import shown
from internvl_edge.model.linear import PackedLinear, Scheme

from .fields import inputs_per_group, module_names

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BYTES = tuple(zip(ORDER[::2], ORDER[1::2], strict=True))

Words = NDArray[np.int32]


def pack(linear: PackedLinear) -> dict[str, NDArray[Any]]:
    """Return `qweight`, `qzeros` and `scales` of one layer, without its bias. Symmetric weights get the zero point 8.

    Scales are rounded to float16. Round them before you choose the integers.

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
        values = (linear.values + np.int8(linear.middle)).view(np.uint8)
        zeros = np.full((out, groups), linear.middle, np.uint8)
    else:
        values, zeros = linear.values.view(np.uint8), linear.zero_point
    return {"qweight": _to_words(values.T), "qzeros": _to_words(zeros.T), "scales": scales}


def unpack(qweight: Words, qzeros: Words, scales: NDArray[np.float16]) -> PackedLinear:
    """Return the layer in the three stored tensors. `pack(unpack(...))` returns the same bits."""
    return PackedLinear(
        values=np.ascontiguousarray(_from_words(qweight).T),
        scale=np.ascontiguousarray(scales.T, np.float32),
        zero_point=np.ascontiguousarray(_from_words(qzeros).T),
        bits=4,
    )


def _to_words(values: NDArray[np.uint8]) -> Words:
    """Pack [rows, columns] of 0..15 to [rows, columns / 8].

    It makes one strided pass per byte, because numpy's fancy indexing is slower.
    """
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


def configuration(group_size: int, modules_to_not_convert: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint. Modules whose name contains one of these strings stay float."""
    return {
        "quant_method": METHOD,
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(modules_to_not_convert),
    }


def read_configuration(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """Return the only scheme of a `quantization_config`. The stored tensors tell which layers have it.

    Raises:
        CheckpointError: another packing than GEMM, other bits than 4, no zero points, or no group size.
    """
    version = str(config.get("version", "gemm")).lower()
    bits, zero_point = config.get("bits", config.get("w_bit")), config.get("zero_point", True)
    group_size = config.get("group_size", config.get("q_group_size"))
    if version != "gemm" or bits != 4 or zero_point is not True:
        found = f"version {shown(version)} with {shown(bits)} bits, zero_point {shown(zero_point)}"
        raise CheckpointError(
            f"quantization_config: AWQ {found} is not supported, only 'gemm' with 4 bits and zero points; use another "
            "AWQ checkpoint or the unquantized one"
        )
    return (Scheme(4, None if group_size == -1 else inputs_per_group(group_size), symmetric=False),)


def read_targets(config: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Which modules the scheme is for, and which keep floats, in the form of compressed-tensors."""
    floats = module_names(config, "modules_to_not_convert")
    return (("Linear",),), tuple(f"re:.*{re.escape(name)}" for name in floats)
