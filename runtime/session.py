"""The KV cache across requests: what a new prompt shares with the last one is not computed again.

Positions are compared by keys: a text token's id, or for an image token a number made from the pixels it stands for.
Under dynamic NTK a cache that is, or becomes, longer than the model's maximum is not reused: its keys are rotated by
another base.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.rope import RotaryAngles

from .engines import Engine

Keys = NDArray[np.int64]


class Session:
    """One engine's cache and the keys of what it holds."""

    def __init__(self, engine: Engine, decoder: DecoderConfig) -> None:
        self.engine = engine
        self._angles = RotaryAngles(decoder)
        self._keys: Keys = np.empty(0, np.int64)

    def prefill(self, keys: Keys, embed_from: Callable[[int], NDArray[np.float32]]) -> tuple[NDArray[np.float32], int]:
        """Put a prompt into the cache.

        Args:
            keys: one per prompt position.
            embed_from: embeddings [seq - start, hidden] of the prompt from a position on.

        Returns:
            Logits [vocab] after the prompt, and how many tokens were computed.
        """
        start = self.shared(keys)
        self.engine.reset(start)
        self._keys = keys[:start]  # if the engine fails, only this much is known to be good
        logits = self.engine.prefill(embed_from(start))
        self._keys = keys
        return logits, len(keys) - start

    def shared(self, keys: Keys) -> int:
        """Leading positions of a new prompt that the cache already holds; at least one is left to compute."""
        if any(self._angles.scales_at(length) for length in (len(keys), len(self._keys))):
            return 0
        length = min(len(keys) - 1, len(self._keys), self.engine.length)
        different = np.nonzero(keys[:length] != self._keys[:length])[0]
        return int(different[0]) if len(different) else length

    def extend(self, tokens: list[int]) -> None:
        """Record answered tokens, as far as the engine has put them into the cache."""
        keys = np.concatenate([self._keys, np.array(tokens, np.int64)])
        self._keys = keys[: self.engine.length]


def image_keys(digest: bytes, count: int) -> Keys:
    """Keys of an image's `count` tokens: negative, so that they never equal a token id."""
    seed = int.from_bytes(digest[:8], "little") >> 2
    return -1 - ((seed + np.arange(count, dtype=np.int64) * 0x9E3779B1) & (2**62 - 1))
