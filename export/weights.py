"""One external-data file for the weights of several graphs, written one tensor at a time.

A tensor's place in the file follows only from its shape and type, so graphs are built before any weight is read. Two
graphs that use the same name share the bytes. At most one tensor's block is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from internvl_edge.base.errors import CheckpointError

Array = np.ndarray[Any, Any]
NUMPY_DTYPES: dict[ir.DataType, np.dtype[Any]] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# Integers are read as one byte each. int4 is stored two to a byte, the first in the lower half.
_INTEGER_BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
# Tensors are page-aligned, so that ONNX Runtime can map them from the file instead of copying them.
_ALIGNMENT = 4096
_BLOCK_BYTES = 32 << 20
_TRANSPOSE_BLOCK = 256


@dataclass(frozen=True)
class _Entry:
    tensor: ir.ExternalTensor
    read: Callable[[], Array]
    shape: tuple[int, ...]

    def blocks(self, name: str) -> Iterator[Any]:
        """Return the bytes to write, in pieces."""
        bits = _INTEGER_BITS.get(self.tensor.dtype)
        if bits is None:
            return convert_blocks(name, self.read(), NUMPY_DTYPES[self.tensor.dtype], self.shape)
        return pack_blocks(self.read().reshape(self.shape), bits)


class WeightFile:
    """Collects tensors, then writes all of them: `write(folder)` makes `folder / name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self._entries: dict[str, _Entry] = {}

    def add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array], exact: bool = True
    ) -> ir.ExternalTensor:
        """Reserve a place for a tensor. The same name always returns the same place.

        `read` is called when the tensor is written. It can return any float dtype, or one byte per integer. The tensor
        has the type that was asked for, also where it need not be `exact`.
        """
        if name not in self._entries:
            bits = _INTEGER_BITS.get(dtype) or 8 * NUMPY_DTYPES[dtype].itemsize
            offset = -(-self.size // _ALIGNMENT) * _ALIGNMENT
            length = -(-bits * int(np.prod(shape, dtype=np.int64)) // 8)
            tensor = ir.ExternalTensor(self.name, offset, length, dtype, shape=ir.Shape(shape), name=name)
            self._entries[name] = _Entry(tensor, read, shape)
            self.size = offset + length
        return self._entries[name].tensor

    def write(self, folder: Path, progress: Callable[[int], None]) -> str:
        """Write every tensor and return the file's SHA-256. `progress` is called with the number of bytes written.

        Raises:
            CheckpointError: a weight is NaN or infinite, or does not fit the target type; the tensor is named.
        """
        digest = hashlib.sha256()
        with (folder / self.name).open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)
                progress(len(data))

            for name, entry in self._entries.items():
                assert entry.tensor.offset is not None
                put(bytes(entry.tensor.offset - file.tell()))
                for block in entry.blocks(name):
                    put(memoryview(block.view(np.uint8)).cast("B"))
        return digest.hexdigest()


def convert_blocks(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield `array` as contiguous blocks of rows in `dtype`. Check that `dtype` can represent every value.

    `array` can be a transposed view of a mapped file.
    """
    array = array.reshape(shape)
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, _BLOCK_BYTES // max(1, rows[0].size * 4))
    if rows.ndim == 2 and not rows.flags.c_contiguous:
        step = max(step, _TRANSPOSE_BLOCK)
    for start in range(0, len(rows), step):
        block = _cast(_contiguous(rows[start : start + step]), dtype)
        if not np.isfinite(block).all():
            source = rows[start : start + step].astype(np.float64)
            if not np.isfinite(source).all():
                raise CheckpointError(
                    f"tensor {name} holds NaN or infinity: the checkpoint itself is broken, in every --dtype; download "
                    "it again, or take one from before its training diverged"
                )
            raise CheckpointError(
                f"tensor {name} holds {np.abs(source).max():.3g}, which {dtype.name} cannot represent; "
                "try another --dtype"
            )
        yield block


def pack_blocks(array: Array, bits: int) -> Iterator[Array]:
    """Yield an `array` of 4- or 8-bit integers, one byte each, as the bytes that ONNX stores, in blocks of rows."""
    rows = array.reshape(-1, 1) if array.ndim < 2 else array.reshape(len(array), -1) if array.ndim > 2 else array
    step = 2 * max(_TRANSPOSE_BLOCK, _BLOCK_BYTES // max(1, 2 * rows[0].size))  # even: no byte is shared by two blocks
    for start in range(0, len(rows), step):
        block: Array = _contiguous(rows[start : start + step]).reshape(-1).view(np.uint8)
        if bits == 4:
            nibbles = np.pad(block, (0, block.size % 2)) & 15
            block = nibbles[0::2] | nibbles[1::2] << 4
        yield block


def _contiguous(rows: Array) -> Array:
    if rows.ndim != 2 or rows.flags.c_contiguous:
        return np.ascontiguousarray(rows)
    out = np.empty(rows.shape, rows.dtype)  # blockwise copying is more than twice as fast as numpy's own
    for column in range(0, rows.shape[1], _TRANSPOSE_BLOCK):
        out[:, column : column + _TRANSPOSE_BLOCK] = rows[:, column : column + _TRANSPOSE_BLOCK]
    return out


def _cast(block: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        if block.dtype == dtype:
            return block
        return block.astype(np.float32).astype(dtype)
