"""The token table: one row of numbers per token, read row by row from a mapped file.

Rows are floats, or int8 with one float32 scale each, all scales behind all rows. A device looks up a few rows a second,
so the table costs no memory, but on the disk of a 1B it is larger than the int4 decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = ("float", "int8")
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


class TokenTable:
    """A table of `shape` (vocab, hidden) in a file; `dtype` is "float32", "float16", "bfloat16" or "int8"."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int]) -> None:
        self.dtype, self.shape = dtype, shape
        self._rows = np.memmap(path, _STORED[dtype], "r", shape=shape)
        self._scales = (
            np.memmap(path, np.float32, "r", offset=_scale_offset(shape), shape=(shape[0],))
            if dtype == "int8"
            else None
        )

    def __getitem__(self, ids: Any) -> NDArray[np.float32]:
        """Rows of tokens `ids` [n], [n, hidden]; of one token, [hidden]."""
        rows: NDArray[Any] = np.asarray(self._rows[ids])
        if self._scales is not None:
            scaled: NDArray[np.float32] = rows * np.asarray(self._scales[ids])[..., None]
            return scaled
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def int8_table(blocks: Iterable[NDArray[Any]], shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """Blocks of float rows -> what an int8 file holds: blocks of rows, what aligns the scales, the scales."""
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
    """Size of the file."""
    size = shape[0] * shape[1] * np.dtype(_STORED[dtype]).itemsize
    return _scale_offset(shape) + 4 * shape[0] if dtype == "int8" else size
