"""Reuse of the KV cache across requests: the common prefix of a new prompt and the last one is not computed again.

Positions are compared by keys. The key of a text token is its id; the key of an image token is a number made from the
pixels of its image. With dynamic NTK, the cache is not reused where its old or its new length exceeds the model's
maximum, because its entries are then rotated with another base.
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
    """The KV cache of one engine, and the keys of its positions."""

    def __init__(self, engine: Engine, decoder: DecoderConfig) -> None:
        self.engine = engine
        self._angles = RotaryAngles(decoder)
        self._keys: Keys = np.empty(0, np.int64)

    def prefill(self, keys: Keys, embed_from: Callable[[int], NDArray[np.float32]]) -> tuple[NDArray[np.float32], int]:
        """Compute a prompt and leave it in the KV cache.

        Args:
            keys: one key per prompt position.
            embed_from: returns the embeddings [seq - start, hidden] of the prompt from position `start` on.

        Returns:
            The logits [vocab] after the prompt, and the number of tokens that were computed.
        """
        start = self.shared(keys)
        self.engine.reset(start)
        self._keys = keys[:start]  # if the engine fails, only these positions are known to be valid
        logits = self.engine.prefill(embed_from(start))
        self._keys = keys
        return logits, len(keys) - start

    def shared(self, keys: Keys) -> int:
        """Return how many leading positions of a new prompt the KV cache holds. At least one remains to compute."""
        if any(self._angles.scales_at(length) for length in (len(keys), len(self._keys))):
            return 0
        length = min(len(keys) - 1, len(self._keys), self.engine.length)
        different = np.nonzero(keys[:length] != self._keys[:length])[0]
        return int(different[0]) if len(different) else length

    def extend(self, tokens: list[int]) -> None:
        """Record the tokens of an answer, as far as the engine has appended them to the KV cache."""
        keys = np.concatenate([self._keys, np.array(tokens, np.int64)])
        self._keys = keys[: self.engine.length]


def image_keys(digest: bytes, count: int) -> Keys:
    """Return the keys of the `count` tokens of an image. Keys are negative, so that they never equal a token id."""
    seed = int.from_bytes(digest[:8], "little") >> 2
    return -1 - ((seed + np.arange(count, dtype=np.int64) * 0x9E3779B1) & (2**62 - 1))
