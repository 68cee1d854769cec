"""What executes a bundle's graphs. An engine knows tiles, embeddings, positions and logits, and nothing about text."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """One model on one device with one KV cache of fixed capacity."""

    @property
    def dialect(self) -> str:
        """The decoder graph that answers, a key of `bundle.DECODERS`."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that fit the cache, prompt and answer together."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Tiles [tiles, S, S, 3] -> image tokens [tiles, tokens_per_tile, hidden]."""
        ...

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append a prompt [seq, hidden] to the cache; logits [vocab] after its last token."""
        ...

    def decode(self, embed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append one token [hidden] to the cache; logits [vocab] after it, valid until the next call."""
        ...

    def score(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append tokens [seq, hidden] to the cache; logits [seq, vocab] after each of them.

        Rotated as one prompt: under dynamic NTK beyond the maximum this differs from appending them one by one.
        """
        ...

    def reset(self, length: int = 0) -> None:
        """Forget everything from position `length` on."""
        ...

    def close(self) -> None:
        """Release the device's memory; the engine cannot be used afterwards."""
        ...


@runtime_checkable
class ChoosingEngine(Engine, Protocol):
    """An engine that finds the most probable token where the logits are, and returns that alone."""

    def decode_token(self, embed: NDArray[np.float32]) -> int:
        """Append one token [hidden] to the cache; the most probable next one."""
        ...
