"""Measure how large the keys and values of one layer become, per KV head and channel, while samples pass through it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.model.config import DecoderConfig


class CacheRanges:
    """The largest magnitudes in the KV cache of one layer.

    A key's channels j and j + head_dim / 2 are rotated into one another by position. The relevant value is therefore
    the length of the pair, which no rotation changes. It is computed from keys before their rotation and holds at every
    position.
    """

    def __init__(self, decoder: DecoderConfig, device: torch.device) -> None:
        heads, width = decoder.num_key_value_heads, decoder.head_dim
        self._keys = torch.zeros(heads, width // 2, device=device)
        self._values = torch.zeros(heads, width, device=device)

    def add(self, key: Tensor, value: Tensor) -> None:
        """Add keys before their rotation, and values, both [tokens, kv_heads, head_dim]."""
        first, second = key.float().chunk(2, dim=-1)
        torch.maximum(self._keys, torch.hypot(first, second).amax(0), out=self._keys)
        torch.maximum(self._values, value.float().abs().amax(0), out=self._values)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return "keys" [kv_heads, head_dim / 2] and "values" [kv_heads, head_dim]."""
        return {"keys": self._keys.cpu().numpy(), "values": self._values.cpu().numpy()}
