"""The decoding of one sequence: logits become tokens.

This module knows tokens, sampling and guesses. It does not know rows, text or images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from .lookup import Guesser
from .sampling import Chooser


class Decoding:
    """The tokens of one answer, from the logits after its prompt to its end.

    A step appends `next_tokens` to the KV cache: the last token of the answer, and the tokens that may follow it where
    `guesser` guesses some. A guess is right if the chooser takes the same token from the logits before it. The first
    guess that is wrong, and all after it, are dropped from the cache again. With and without guesses the chooser sees
    the same logits in the same order, apart from the rounding of a step of several tokens.

    Args:
        chooser: takes a token from logits; it is asked once for each token of the answer.
        stop_ids: tokens that end the answer, and are its last one.
        max_new_tokens: the most tokens of the answer.
        accept: is told each token as it is taken; True ends the answer.
        guesser: guesses tokens, and already knows the prompt; None for no guesses.

    Attributes:
        tokens: the answer so far.
        finished: whether the answer is complete. Its last token need not be in the KV cache.
    """

    def __init__(
        self,
        chooser: Chooser,
        stop_ids: Collection[int],
        max_new_tokens: int,
        accept: Callable[[int], bool],
        guesser: Guesser | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.finished = False
        self._chooser = chooser
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens
        self._accept = accept
        self._guesser = guesser
        self._guess: list[int] = []

    @property
    def takes_the_best(self) -> bool:
        """Whether the device may choose the next token, because it is always the most probable one."""
        return self._chooser.takes_the_best

    @property
    def guessed(self) -> bool:
        """Whether the last `next_tokens` held guesses."""
        return bool(self._guess)

    @property
    def stopped(self) -> bool:
        """Whether the model ended the answer with one of its stop tokens."""
        return bool(self.tokens) and self.tokens[-1] in self._stop_ids

    def begin(self, logits: NDArray[np.float32]) -> None:
        """Take the first token from the logits [vocab] after the prompt."""
        self._take(self._chooser.choose(logits))

    def next_tokens(self) -> list[int]:
        """Return the tokens of the next step: the last one of the answer, and those that are guessed to follow it."""
        # One guess less than tokens may come, because the step also gives the token after the guesses.
        most = self._max_new_tokens - len(self.tokens) - 1
        self._guess = self._guesser.guess(most) if self._guesser is not None else []
        return [self.tokens[-1], *self._guess]

    def advance(self, logits: Sequence[NDArray[np.float32]]) -> int:
        """Take tokens from the logits [vocab] after each of `next_tokens`, and return how many of the guesses stay."""
        guess, right = self._guess, 0
        for row in logits:
            token = self._chooser.choose(row)
            self._take(token)
            if self.finished or right == len(guess) or token != guess[right]:
                break
            right += 1
        if self._guesser is not None:
            self._guesser.judged(len(guess), right)
        return right

    def advance_to(self, token: int, logits: Callable[[], NDArray[np.float32]]) -> None:
        """Take the token that the device has chosen after the only one of `next_tokens`.

        Where the chooser refuses it, take another one from `logits`, which returns those of the step.
        """
        self._take(token if self._chooser.take(token) else self._chooser.choose(logits()))

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        if self._guesser is not None:
            self._guesser.push(token)
        ends = self._accept(token)
        self.finished = ends or token in self._stop_ids or len(self.tokens) == self._max_new_tokens
