"""The memory of the KV cache for ONNX Runtime, and which row lies where in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.model.config import DecoderConfig

from .rows import CacheRows


class KvBuffers:
    """The memory of the KV cache: one array [places, kv_heads, capacity, head_dim] for each input of the graphs.

    Args:
        cache: its rows and their lengths.
        decoder: the shapes.
        dtype: of keys and values.
        to_value: makes the ONNX Runtime value of an array, on the device.

    Attributes:
        arrays: by the name of the input, without its prefix.
        places: the place of each row.
    """

    def __init__(
        self, cache: CacheRows, decoder: DecoderConfig, dtype: np.dtype[Any], to_value: Callable[[NDArray[Any]], Any]
    ) -> None:
        rows = cache.rows
        self._cache = cache
        self.places = list(range(rows))
        partner = rows > 1
        shape = (rows + partner, decoder.num_key_value_heads, cache.capacity, decoder.head_dim)
        layers = range(decoder.num_hidden_layers)
        self.arrays = {f"{layer}.{kind}": np.zeros(shape, dtype) for layer in layers for kind in ("key", "value")}
        self._values = {name: to_value(array) for name, array in self.arrays.items()}

    def gather(self, rows: Sequence[int]) -> tuple[int, int]:
        """Move rows to the last places, and return the first place and the number of places of a step over them."""
        last = self._cache.rows
        first = last - len(rows)
        homeless = [row for row in rows if self.places[row] < first]
        taken = set(rows)
        guests = [row for row, place in enumerate(self.places) if place >= first and row not in taken]
        for row, guest in zip(homeless, guests, strict=True):
            self._swap(row, guest)
        return first, len(rows) + len(rows) % 2 if last > 1 else 1

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first entries of one row into another."""
        place, other = self.places[source], self.places[target]
        for array in self.arrays.values():
            array[other, :, :length] = array[place, :, :length]

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Bind `count` places from `first` on as past and as present."""
        for name, array in self.arrays.items():
            value = self._values[name]
            address = value.data_ptr() + first * array.strides[0]
            where = (value.device_name(), 0, array.dtype, (count, *array.shape[1:]), address)
            binding.bind_input(f"past_key_values.{name}", *where)
            binding.bind_output(f"present.{name}", *where)

    def _swap(self, row: int, other: int) -> None:
        length, others = self._cache.length(row), self._cache.length(other)
        here, there = self.places[row], self.places[other]
        for array in self.arrays.values():
            kept = array[there, :, :others].copy()
            array[there, :, :length] = array[here, :, :length]
            array[here, :, :others] = kept
        self.places[row], self.places[other] = there, here
