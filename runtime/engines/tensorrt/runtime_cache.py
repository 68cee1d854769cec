"""The KV cache on the device, in one piece [layers x (key, value) x kv_heads, capacity, head_dim].

Newer TensorRT writes floats in place by a layer of its own. It takes no int8, and before 10.15 there is none: then the
graph reads what is there, puts out what is new, and one strided copy after each step puts that in its place.
"""

from __future__ import annotations

from typing import Any

from internvl_edge.model.config import DecoderConfig

from .cuda import Cuda

NEW_ENTRIES = "new_entries"
_PURPOSE = "the KV cache (a smaller --context needs less)"


class DeviceCache:
    """Device memory for `capacity` tokens.

    Args:
        cuda: gives the memory, all zeros: what is masked is still multiplied, and rubbish could be NaN.
        decoder: layers, heads and their width.
        capacity: tokens.
        itemsize: bytes of one number.
        chunk: most tokens of one step where the graph puts out what is new, 0 where it writes in place.
    """

    def __init__(self, cuda: Cuda, decoder: DecoderConfig, capacity: int, itemsize: int, chunk: int = 0) -> None:
        self._cuda = cuda
        self._layers = decoder.num_hidden_layers
        self._rows = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads
        self._width = decoder.head_dim * itemsize
        self._pitch = capacity * self._width
        self._part = decoder.num_key_value_heads * self._pitch
        self._base = cuda.device_memory(self._rows * self._pitch, _PURPOSE)
        self._new = cuda.device_memory(self._rows * chunk * self._width, _PURPOSE) if chunk else None

    def addresses(self) -> dict[str, int]:
        """Where the graph's inputs and outputs lie."""
        places = {
            f"{layer}.{part}": self._base + (2 * layer + index) * self._part
            for layer in range(self._layers)
            for index, part in enumerate(("key", "value"))
        }
        past = {f"past_key_values.{name}": place for name, place in places.items()}
        if self._new is not None:
            return past | {NEW_ENTRIES: self._new}
        return past | {f"present.{name}": place for name, place in places.items()}

    def store(self, start: int, count: int, stream: Any) -> None:
        """Start putting the `count` entries of the step just enqueued at positions start .., unless they are there.

        Not part of a CUDA graph, which would keep the position it was captured with.
        """
        if self._new is None:
            return
        size = count * self._width
        self._cuda.within_device_rows(
            self._base + start * self._width, self._pitch, self._new, size, self._rows, stream
        )
