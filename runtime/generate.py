"""The decode loop, which turns logits into tokens.

This module knows tokens, sampling and the KV cache. It does not know text or images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from .engines import ChoosingEngine, Engine
from .lookup import Guesser
from .sampling import Chooser

Embed = Callable[[int], NDArray[np.float32]]


def generate(
    engine: Engine,
    logits: NDArray[np.float32],
    embed: Embed,
    sampler: Chooser,
    stop_ids: Collection[int],
    max_new_tokens: int,
    lookup: Guesser | None = None,
) -> Iterator[int]:
    """Yield the tokens of an answer, the stop token included.

    With `lookup`, each step appends guessed tokens to the KV cache, together with the last token of the answer. A guess
    is accepted only if the sampler chooses the same token from the logits before it. The first guess that differs, and
    all after it, are dropped from the cache. With and without `lookup`, the sampler sees the same logits in the same
    order, except for the rounding of a step of several tokens.

    Args:
        engine: an engine with the prompt in its KV cache.
        logits: [vocab] after the prompt.
        embed: returns the row [hidden] of a token in the token table.
        sampler: chooses each token.
        stop_ids: tokens that end the answer.
        max_new_tokens: the most tokens to yield. The last one need not be in the KV cache.
        lookup: makes the guesses, and already holds the prompt's tokens; None for no guesses.
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
        # One token less than may still come, because each step also yields the token after the guess.
        guess = lookup.guess(max_new_tokens - answered - 1) if lookup is not None else []
        if choosing is not None and not guess:
            token = choosing.decode_token(embed(token))
            if not sampler.take(token):
                token = sampler.choose(choosing.last_logits())
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
