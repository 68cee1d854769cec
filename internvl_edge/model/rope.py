"""Compute rotary angles on the host, in float64, for plain, linear and dynamic NTK rotary embedding.

Dynamic NTK (InternLM2) depends on the length of the sequence at the time of the call. Beyond `max_position_embeddings`
the base grows with the length, for all positions of that call. Keys already in the cache keep their rotation. The
angles are inputs of the graph, so the graph is stateless and has no length limit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig


class RotaryAngles:
    """The cos and sin tables of one decoder. It keeps no state between calls."""

    def __init__(self, decoder: DecoderConfig) -> None:
        self._rope = decoder.rope
        self._head_dim = decoder.head_dim
        self._limit = decoder.max_position_embeddings

    def at(self, start: int, count: int, total: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return cos and sin [count, head_dim / 2] of `count` positions from `start` on, for a sequence length `total`.

        For a prompt that is computed in chunks, pass the length of the whole prompt with every chunk.
        """
        positions = np.arange(start, start + count, dtype=np.float64)
        if self._rope.scaling == "linear":
            positions /= self._rope.factor
        exponents = np.arange(0, self._head_dim, 2, dtype=np.float64) / self._head_dim
        angles = np.outer(positions, self.base(total) ** -exponents)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def base(self, total: int) -> float:
        """Return the rotary base for a sequence of `total` tokens."""
        if not self.scales_at(total):
            return self._rope.theta
        factor, dim = self._rope.factor, self._head_dim
        stretch: float = (factor * total / self._limit - (factor - 1)) ** (dim / (dim - 2))
        return self._rope.theta * stretch

    def scales_at(self, total: int) -> bool:
        """Return whether keys of a sequence of this length are rotated with another base than those of shorter ones."""
        return self._rope.scaling == "dynamic" and total > self._limit
