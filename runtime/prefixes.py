"""Reuse of the KV cache: the beginning of a prompt that a row already holds is not computed again.

Positions are compared by keys. The key of a text token is its id; the key of an image token is a number made from the
pixels of its image.

An answer never depends on what was asked before. Only tokens of prompts serve another prompt, and only up to the end
of a step that both prompts take (see `engines/steps.py`): their entries are the same to the bit as if they had been
computed again. The tokens of an answer are decoded one by one, with another kernel; as part of a later prompt they are
computed again. With dynamic NTK, a prompt that is longer than the model's maximum has keys of another base, and shares
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.rope import RotaryAngles

from .engines import Engine
from .engines.steps import common_steps

Keys = NDArray[np.int64]
_NOTHING: Keys = np.empty(0, np.int64)


class Prompt:
    """A prompt, which several answers may share.

    Args:
        keys: one key for each position.
        embed: computes the embeddings [seq, hidden] of all positions, one step for each `next`.

    Attributes:
        logits: [vocab] after the prompt, as soon as it has been computed.
    """

    def __init__(self, keys: Keys, embed: Callable[[], Generator[None, None, NDArray[np.float32]]]) -> None:
        self.keys = keys
        self.embed = embed
        self.logits: NDArray[np.float32] | None = None


class Prefixes:
    """Which rows of an engine's cache are free, and which prompt each of them holds."""

    def __init__(self, engine: Engine, decoder: DecoderConfig) -> None:
        self._engine = engine
        self._angles = RotaryAngles(decoder)
        self._held: list[Prompt | None] = [None] * engine.cache.rows
        self._keys = [_NOTHING] * engine.cache.rows
        self._planned = [0] * engine.cache.rows  # length of the prompt whose steps filled the row
        self._free = list(range(engine.cache.rows))  # the one that was released first comes first

    def take(self, prompt: Prompt) -> int | None:
        """Return the free row that holds most of a prompt, which is then no longer free; None if no row is free."""
        if not self._free:
            return None
        row = max(self._free, key=lambda each: self._usable(prompt, each))
        self._free.remove(row)
        return row

    def begin(self, prompt: Prompt, row: int) -> int:
        """Put as much of a prompt into a row as any row holds, drop everything else from it, and return that length."""
        source = max(range(len(self._keys)), key=lambda each: (self._usable(prompt, each), each == row))
        length = self._usable(prompt, source)
        if source != row and length:
            self._engine.copy(source, row, length)
        self._engine.cache.reset(length, row)
        self._held[row], self._keys[row], self._planned[row] = None, prompt.keys[:length], len(prompt.keys)
        return length

    def hold(self, prompt: Prompt, row: int) -> None:
        """Record that a row now holds all of a prompt."""
        self._held[row], self._keys[row] = prompt, prompt.keys

    def release(self, row: int) -> None:
        """Make a row free. It keeps its prompt until another one needs the row."""
        self._free.append(row)

    def forget(self) -> None:
        """Forget what the rows hold."""
        self._held = [None] * len(self._held)
        self._keys = [_NOTHING] * len(self._keys)

    def _usable(self, prompt: Prompt, row: int) -> int:
        """Return how many leading positions of a prompt a row can give: all for an answer to the same prompt."""
        if prompt.logits is not None and self._held[row] is prompt:
            return len(prompt.keys)
        keys, held = prompt.keys, self._keys[row]
        if any(self._angles.scales_at(length) for length in (len(keys), len(held))):
            return 0
        # The last step of a prompt gives its logits. The same tokens inside of a longer prompt may take another graph.
        last = len(held) == self._planned[row]
        length = max(0, min(len(keys) - 1, len(held) - last))
        different = np.flatnonzero(keys[:length] != held[:length])
        longest = int(different[0]) if len(different) else length
        mine, theirs = self._engine.steps(len(keys)), self._engine.steps(self._planned[row])
        return sum(common_steps(mine, theirs, longest))


def image_keys(digest: bytes, count: int) -> Keys:
    """Return the keys of the `count` tokens of an image. Keys are negative, so that they never equal a token id."""
    seed = int.from_bytes(digest[:8], "little") >> 2
    return -1 - ((seed + np.arange(count, dtype=np.int64) * 0x9E3779B1) & (2**62 - 1))
