"""The decoding loop: logits in, tokens out. Knows tokens, sampling and the cache, and nothing about text or images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from .engines import ChoosingEngine, Engine
from .lookup import PromptLookup
from .sampling import Chooser

Embed = Callable[[int], NDArray[np.float32]]


def generate(
    engine: Engine,
    logits: NDArray[np.float32],
    embed: Embed,
    sampler: Chooser,
    stop_ids: Collection[int],
    max_new_tokens: int,
    lookup: PromptLookup | None = None,
) -> Iterator[int]:
    """Yield the tokens of an answer, the stop token included.

    With `lookup`, guessed tokens are put into the cache together with the last answered one. Each is accepted only if
    the sampler chooses the same token from the logits before it; from the first that differs on, the cache is wound
    back. The sampler sees the same logits in the same order either way, up to the rounding of a step of several tokens.

    Args:
        engine: holds the prompt in its cache.
        logits: [vocab] after the prompt.
        embed: row [hidden] of the token table.
        sampler: chooses each token.
        stop_ids: end the answer.
        max_new_tokens: most tokens to yield. The last one need not be in the cache.
        lookup: holds the prompt's tokens; None guesses nothing.
    """
    choosing = engine if isinstance(engine, ChoosingEngine) and sampler.takes_the_best else None
    token = sampler.choose(logits)
    answered = 0
    while True:
        yield token
        answered += 1
        if token in stop_ids or answered == max_new_tokens:
            return
        if lookup is not None:
            lookup.push(token)
        # One token less than may still come, so that what follows the guess has room too.
        guess = lookup.guess(max_new_tokens - answered - 1) if lookup is not None else []
        if choosing is not None and not guess:
            token = choosing.decode_token(embed(token))
            continue
        rows = (
            engine.score(np.stack([embed(t) for t in (token, *guess)])) if guess else engine.decode(embed(token))[None]
        )
        start = engine.length - len(guess)
        for right, row in enumerate(rows):
            token = sampler.choose(row)
            if right == len(guess) or token != guess[right] or token in stop_ids:
                break
            yield token
            answered += 1
            assert lookup is not None
            lookup.push(token)
        engine.reset(start + right)
        if lookup is not None:
            lookup.judged(len(guess), right)
