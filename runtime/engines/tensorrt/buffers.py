"""Blocks of memory with the same layout on host and device, and the conversion of 16-bit floats.

This module knows the CUDA wrapper (`cuda`). It does not know a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import Cuda

# Bytes. TensorRT requires aligned addresses, and CUDA reads vectors fastest from them.
_ALIGNMENT = 256


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
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


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
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + math.prod(shape) * np.dtype(dtype).itemsize
            self._places[name] = start, end
        self._device = cuda.device_memory(end, purpose)
        self._host = cuda.pinned(end)
        self._host[:] = 0
        self.arrays: dict[str, NDArray[Any]] = {
            name: self._host[slice(*self._places[name])].view(dtype).reshape(shape)
            for name, (shape, dtype) in parts.items()
        }

    def address(self, name: str) -> int:
        """Return the device address of a part."""
        return self._device + self._places[name][0]

    def upload(self, stream: Any) -> None:
        """Start a copy of all parts to the device. The host arrays must not change until the stream has done it."""
        self._cuda.to_device(self._device, self._host, stream)

    def download(self, name: str, stream: Any, size: int | None = None) -> None:
        """Start a copy of one part, or of its first `size` bytes, to the host."""
        start, end = self._places[name]
        end = end if size is None else start + size
        self._cuda.to_host(self._host[start:end], self._device + start, stream)
