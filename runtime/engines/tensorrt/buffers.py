"""Memory that host and device share the layout of, and 16-bit numbers as bits. Knows CUDA's wrapper, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import Cuda

# CUDA reads vectors of numbers fastest from such addresses, and TensorRT asks for them.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Half:
    """How 16-bit floats of one kind are kept on the host.

    `stored` is numpy's type for them: float16, or uint16 for the bits of bfloat16, which numpy lacks.
    """

    stored: np.dtype[Any]
    pack: Callable[[NDArray[np.float32]], NDArray[Any]]
    unpack: Callable[[NDArray[Any]], NDArray[np.float32]]


def _pack_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of float32, rounded to nearest, ties to even."""
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
    """Several arrays side by side, in pinned host memory and at the same places in device memory: one copy moves all.

    Args:
        cuda: gives and takes back the memory.
        parts: name -> shape and type.
        purpose: named when memory does not suffice.
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
        """Where a part lies on the device."""
        return self._device + self._places[name][0]

    def upload(self, stream: Any) -> None:
        """Start copying everything to the device. The host's part must not change until the stream has done it."""
        self._cuda.to_device(self._device, self._host, stream)

    def download(self, name: str, stream: Any, size: int | None = None) -> None:
        """Start copying one part, or its first `size` bytes, to the host."""
        start, end = self._places[name]
        end = end if size is None else start + size
        self._cuda.to_host(self._host[start:end], self._device + start, stream)
