"""The decoding loop: logits in, tokens out. Knows tokens, sampling and the cache, and nothing about text or images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from .engines import Engine
from .sampling import Sampler

Embed = Callable[[int], NDArray[np.float32]]


def generate(
    engine: Engine,
    logits: NDArray[np.float32],
    embed: Embed,
    sampler: Sampler,
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[int]:
    """Yield the tokens of an answer, the stop token included.

    Args:
        engine: holds the prompt in its cache.
        logits: [vocab] after the prompt.
        embed: row [hidden] of the token table.
        sampler: chooses each token.
        stop_ids: end the answer.
        max_new_tokens: most tokens to yield. The last one is not put into the cache.
    """
    for remaining in range(max_new_tokens, 0, -1):
        token = sampler.choose(logits)
        yield token
        if token in stop_ids or remaining == 1:
            return
        logits = engine.decode(embed(token))
