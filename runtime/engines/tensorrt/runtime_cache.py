"""The KV cache on the device, in one piece of memory: a part [rows, kv_heads, slots, head_dim] for each layer's keys,
and one for its values. TensorRT wants tensors at multiples of 256 bytes, so where a part's size is none, a gap follows
it. Where there are several rows, the size of each is such a multiple.

TensorRT for RTX, and TensorRT from 10.15, have a layer that writes float entries into the cache in place. For int8 and
for older versions there is no such layer. Then the graph only reads the cache and outputs the entries of the step, and
one strided copy after the step writes these entries into the cache.
"""

from __future__ import annotations

from typing import Any

from internvl_edge.model.config import DecoderConfig

from .buffers import ALIGNMENT
from .cuda import Cuda

NEW_ENTRIES = "new_entries"
_PURPOSE = "the KV cache (a smaller --context needs less)"


class DeviceCache:
    """The device memory of a KV cache.

    Args:
        cuda: allocates the memory with zeros: masked entries are still multiplied, and undefined ones could be NaN.
        decoder: gives the number of layers and heads, and the width of a head.
        slots: the slots of each row.
        itemsize: bytes of one value.
        rows: the sequences in the cache.
        new: the most entries of one step, of all its rows, where the graph outputs them; 0 where it writes them in
            place.
    """

    def __init__(
        self, cuda: Cuda, decoder: DecoderConfig, slots: int, itemsize: int, rows: int = 1, new: int = 0
    ) -> None:
        self._cuda = cuda
        self._layers = decoder.num_hidden_layers
        self._heads = decoder.num_key_value_heads
        self._lines = 2 * self._layers * self._heads  # the heads of a row, over all parts
        self._width = decoder.head_dim * itemsize
        self._pitch = slots * self._width
        self._row = self._heads * self._pitch
        self._part = -(-rows * self._row // ALIGNMENT) * ALIGNMENT
        self._base = cuda.device_memory(2 * self._layers * self._part, _PURPOSE)
        self._new = cuda.device_memory(self._lines * new * self._width, _PURPOSE) if new else None

    def addresses(self, row: int = 0) -> dict[str, int]:
        """Return the addresses of the graph's cache inputs and outputs, for a step that begins with this row."""
        places = {
            f"{layer}.{part}": self._base + row * self._row + (2 * layer + index) * self._part
            for layer in range(self._layers)
            for index, part in enumerate(("key", "value"))
        }
        past = {f"past_key_values.{name}": place for name, place in places.items()}
        if self._new is not None:
            return past | {NEW_ENTRIES: self._new}
        return past | {f"present.{name}": place for name, place in places.items()}

    def store(self, start: int, count: int, tokens: int, stream: Any, row: int = 0, index: int = 0) -> None:
        """Start the copy of a row's first `count` of the last step's `tokens` entries to the positions from `start` on.

        `index` is the place of the row in the step. This does nothing where the graph writes entries in place. It must
        not be part of a CUDA graph, which would keep the position from the time of its capture.
        """
        if self._new is None:
            return
        size, step = count * self._width, tokens * self._width
        source = self._new + index * self._lines * step
        target = self._base + row * self._row + start * self._width
        copy = self._cuda.within_device_rows
        if self._part == self._row:
            copy(target, self._pitch, source, step, size, self._lines, stream)
            return
        for head in range(self._heads):  # the lines of one head are evenly apart, whatever the gaps
            place, new = target + head * self._pitch, source + head * step
            copy(place, self._part, new, self._heads * step, size, 2 * self._layers, stream)

    def copy(self, source: int, target: int, length: int, stream: Any) -> None:
        """Start the copy of the first `length` entries of one row into another."""
        for head in range(self._heads):
            here, there = (self._base + row * self._row + head * self._pitch for row in (source, target))
            size, lines = length * self._width, 2 * self._layers
            self._cuda.within_device_rows(there, self._part, here, self._part, size, lines, stream)
