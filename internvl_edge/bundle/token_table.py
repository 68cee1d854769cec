"""The token table: one row [hidden] per token, read row by row from a mapped file.

Rows are floats, or int8 with one float32 scale per row. In the file, all scales follow all rows. A device reads a few
rows per second, so the table needs almost no memory. On disk, the float table of a 1B model is larger than its int4
decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = ("auto", "float", "int8")
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


class TokenTable:
    """A table of `shape` (vocab, hidden) in a file. `dtype` is "float32", "float16", "bfloat16" or "int8"."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int]) -> None:
        self.dtype, self.shape = dtype, shape
        # Plain arrays over the mapped file: an access to a `memmap` makes an object, which takes longer than a row.
        self._rows: NDArray[Any] = np.asarray(np.memmap(path, _STORED[dtype], "r", shape=shape))
        self._scales = (
            np.asarray(np.memmap(path, np.float32, "r", offset=_scale_offset(shape), shape=(shape[0],)))
            if dtype == "int8"
            else None
        )

    def __getitem__(self, ids: Any) -> NDArray[np.float32]:
        """Return the rows [n, hidden] of token ids [n], or the row [hidden] of one id."""
        rows: NDArray[Any] = np.asarray(self._rows[ids])
        if self._scales is not None:
            scaled: NDArray[np.float32] = rows * np.asarray(self._scales[ids])[..., None]
            return scaled
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def table_type(wanted: str, quantized: bool) -> str:
    """Return "float" or "int8" for one of `TYPES`: "auto" is int8 where the layers of the decoder are quantized.

    What int8 rows lose is far below what the layers lose (docs/quality.md), and a float table would be the largest file
    of an int4 decoder.
    """
    return wanted if wanted != "auto" else "int8" if quantized else "float"


def int8_table(blocks: Iterable[NDArray[Any]], shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """Yield the parts of an int8 file from blocks of float rows: int8 rows, padding that aligns the scales, scales."""
    scales = []
    for block in blocks:
        rows = block.astype(np.float32)
        scale = np.maximum(np.abs(rows).max(axis=1), 1e-30) / np.float32(127)
        scales.append(scale)
        yield np.rint(rows / scale[:, None]).astype(np.int8)
    yield np.zeros(_scale_offset(shape) - shape[0] * shape[1], np.int8)
    yield np.concatenate(scales)


def _scale_offset(shape: tuple[int, int]) -> int:
    return -(-shape[0] * shape[1] // 4) * 4


def table_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the size of the file in bytes."""
    size = shape[0] * shape[1] * np.dtype(_STORED[dtype]).itemsize
    return _scale_offset(shape) + 4 * shape[0] if dtype == "int8" else size
