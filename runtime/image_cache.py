"""A cache of image tokens, so that a second question about the same image needs no vision time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from .engines import Engine

DEFAULT_BYTES = 256 << 20


def pixel_key(tiles: NDArray[np.uint8]) -> bytes:
    """Return a digest of the pixels of tiles [tiles, S, S, 3]."""
    return hashlib.blake2b(tiles.tobytes(), digest_size=16).digest()


class ImageCache:
    """An LRU cache of image tokens, with a limit in bytes and the pixels of the tiles as key.

    Attributes:
        hits: images that were found.
    """

    def __init__(self, engine: Engine, max_bytes: int = DEFAULT_BYTES) -> None:
        self._engine = engine
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self.hits = 0

    def encode_steps(self, tiles: NDArray[np.uint8]) -> Generator[None, None, NDArray[np.float32]]:
        """Return the image tokens [tiles, tokens_per_tile, hidden] of one image, from its tiles [tiles, S, S, 3].

        Each `next` encodes as many tiles as the engine takes at once. An image that is known needs none.
        """
        key = pixel_key(tiles)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        parts = []
        for start in range(0, len(tiles), self._engine.tiles_at_once):
            parts.append(self._engine.encode(tiles[start : start + self._engine.tiles_at_once]))
            yield
        embeds = np.concatenate(parts)
        self._entries[key] = embeds
        self._bytes += embeds.nbytes
        while self._bytes > self._max_bytes and self._entries:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes
        return embeds
