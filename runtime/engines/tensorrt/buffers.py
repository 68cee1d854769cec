"""Blocks of memory with the same layout on host and device, and the conversion of 16-bit floats.

This module knows the CUDA wrapper (`cuda`). It does not know a model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import Cuda

# Bytes. TensorRT requires aligned addresses, and CUDA reads vectors fastest from them.
ALIGNMENT = 256
# Which half of a 32-bit number holds its upper bits.
_UPPER = 1 if sys.byteorder == "little" else 0


@dataclass(frozen=True)
class Half:
    """How one kind of 16-bit floats is stored on the host.

    `stored` is its numpy type: float16, or uint16 for the bits of bfloat16, because numpy has no bfloat16.
    """

    stored: np.dtype[Any]
    pack: Callable[[NDArray[np.float32]], NDArray[Any]]
    unpack: Callable[[NDArray[Any]], NDArray[np.float32]]


def _pack_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper 16 bits of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    return rounded.view(np.uint16)[..., _UPPER::2]


def _unpack_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


HALVES = {
    "float16": Half(
        np.dtype(np.float16), lambda values: values.astype(np.float16), lambda bits: bits.astype(np.float32)
    ),
    "bfloat16": Half(np.dtype(np.uint16), _pack_bfloat16, _unpack_bfloat16),
}


class Block:
    """Several arrays in one piece of pinned host memory and one piece of device memory with the same layout.

    One copy moves all of them.

    Args:
        cuda: allocates and frees the memory.
        parts: name -> shape and dtype.
        purpose: what the memory is for, named in the error message where there is too little.
    """

    def __init__(self, cuda: Cuda, parts: dict[str, tuple[tuple[int, ...], Any]], purpose: str) -> None:
        self._cuda = cuda
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, dtype) in parts.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + math.prod(shape) * np.dtype(dtype).itemsize
            self._places[name] = start, end
        self._device = cuda.device_memory(end, purpose)
        host = cuda.pinned(end)
        host[:] = 0
        self._host, self._size = host.ctypes.data, end
        self.arrays: dict[str, NDArray[Any]] = {
            name: host[slice(*self._places[name])].view(dtype).reshape(shape) for name, (shape, dtype) in parts.items()
        }

    def address(self, name: str) -> int:
        """Return the device address of a part."""
        return self._device + self._places[name][0]

    def upload(self, stream: Any) -> None:
        """Start a copy of all parts to the device. The host arrays must not change until the stream has done it."""
        self._cuda.to_device(self._device, self._host, self._size, stream)

    def download(self, name: str, stream: Any, size: int | None = None, first: int = 0) -> None:
        """Start a copy of one part, or of `size` of its bytes from byte `first` on, to the host."""
        start, end = self._places[name]
        start += first
        self._cuda.to_host(self._host + start, self._device + start, end - start if size is None else size, stream)
