"""Reuse of the KV cache across requests: the common prefix of a new prompt and the last one is not computed again.

Positions are compared by keys. The key of a text token is its id; the key of an image token is a number made from the
pixels of its image. A prefix ends where a step of both prompts ends, and it never includes tokens of an answer: the
cache then holds what the new prompt alone would have left there, to the bit, and the answer does not depend on what was
asked before (`engines/steps.py`). With dynamic NTK, the cache is not reused where the old or the new prompt exceeds the
model's maximum, because its entries are then rotated with another base.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.rope import RotaryAngles

from .engines import Engine
from .engines.steps import common_steps

Keys = NDArray[np.int64]


class Session:
    """The KV cache of one engine, and the keys and steps of the prompt that it holds."""

    def __init__(self, engine: Engine, decoder: DecoderConfig) -> None:
        self.engine = engine
        self._angles = RotaryAngles(decoder)
        self._keys: Keys = np.empty(0, np.int64)
        self._steps: list[int] = []

    def prefill(self, keys: Keys, embed_from: Callable[[int], NDArray[np.float32]]) -> tuple[NDArray[np.float32], int]:
        """Compute a prompt and leave it in the KV cache.

        Args:
            keys: one key per prompt position.
            embed_from: returns the embeddings [seq - start, hidden] of the prompt from position `start` on.

        Returns:
            The logits [vocab] after the prompt, and the number of tokens that were computed.
        """
        planned = self.engine.steps(len(keys))
        reused = common_steps(self._steps, planned, self.shared(keys))
        start = sum(reused)
        self.engine.reset(start)
        self._keys, self._steps = keys[:start], reused  # if the engine fails, only these are known to be valid
        logits = self.engine.prefill(embed_from(start))
        # An engine may compute the last step of a prompt in another way than the same tokens inside a longer prompt.
        self._keys, self._steps = keys, planned[:-1]
        return logits, len(keys) - start

    def shared(self, keys: Keys) -> int:
        """Return how many leading positions a new prompt shares with the last one. At least one remains to compute."""
        if any(self._angles.scales_at(length) for length in (len(keys), len(self._keys))):
            return 0
        length = min(len(keys) - 1, len(self._keys), self.engine.length)
        different = np.nonzero(keys[:length] != self._keys[:length])[0]
        return int(different[0]) if len(different) else length


def image_keys(digest: bytes, count: int) -> Keys:
    """Return the keys of the `count` tokens of an image. Keys are negative, so that they never equal a token id."""
    seed = int.from_bytes(digest[:8], "little") >> 2
    return -1 - ((seed + np.arange(count, dtype=np.int64) * 0x9E3779B1) & (2**62 - 1))
