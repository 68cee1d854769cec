"""The KV cache on the device, in one piece of memory: a part [kv_heads, capacity, head_dim] for each layer's keys, and
one for its values. TensorRT wants tensors at multiples of 256 bytes, so where a part's size is none, a gap follows it.

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
    """The device memory of a KV cache for `capacity` tokens.

    Args:
        cuda: allocates the memory with zeros: masked entries are still multiplied, and undefined ones could be NaN.
        decoder: gives the number of layers and heads, and the width of a head.
        capacity: the most tokens in the cache.
        itemsize: bytes of one value.
        chunk: the most tokens of one step where the graph outputs new entries; 0 where it writes them in place.
    """

    def __init__(self, cuda: Cuda, decoder: DecoderConfig, capacity: int, itemsize: int, chunk: int = 0) -> None:
        self._cuda = cuda
        self._layers = decoder.num_hidden_layers
        self._rows = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads
        self._width = decoder.head_dim * itemsize
        self._pitch = capacity * self._width
        self._heads = decoder.num_key_value_heads
        self._part = -(-self._heads * self._pitch // ALIGNMENT) * ALIGNMENT
        self._base = cuda.device_memory(2 * self._layers * self._part, _PURPOSE)
        self._new = cuda.device_memory(self._rows * chunk * self._width, _PURPOSE) if chunk else None

    def addresses(self) -> dict[str, int]:
        """Return the addresses of the graph's cache inputs and outputs."""
        places = {
            f"{layer}.{part}": self._base + (2 * layer + index) * self._part
            for layer in range(self._layers)
            for index, part in enumerate(("key", "value"))
        }
        past = {f"past_key_values.{name}": place for name, place in places.items()}
        if self._new is not None:
            return past | {NEW_ENTRIES: self._new}
        return past | {f"present.{name}": place for name, place in places.items()}

    def store(self, start: int, count: int, rows: int, stream: Any) -> None:
        """Start the copy of the first `count` of the last step's `rows` entries to the positions from `start` on.

        This does nothing where the graph writes them in place. It must not be part of a CUDA graph, which would keep
        the position from the time of its capture.
        """
        if self._new is None:
            return
        size, step = count * self._width, rows * self._width
        target = self._base + start * self._width
        copy = self._cuda.within_device_rows
        if self._part == self._heads * self._pitch:
            copy(target, self._pitch, self._new, step, size, self._rows, stream)
            return
        for head in range(self._heads):  # the rows of one head are evenly apart, whatever the gaps
            source = self._new + head * step
            copy(target + head * self._pitch, self._part, source, self._heads * step, size, 2 * self._layers, stream)
