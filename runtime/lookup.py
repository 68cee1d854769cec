"""Prompt lookup: guess the next tokens from earlier text, so that one step can verify several.

Answers about documents repeat the prompt and themselves (fields, JSON keys, numbers). The last n-gram is looked up in
all tokens so far, and the tokens that followed it there are the guess. Guesses change the speed, but not the answer
(see `generate`).

Method: prompt lookup decoding (Saxena, 2023), an n-gram case of speculative decoding (Leviathan et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

_LONGEST, _SHORTEST = 3, 2
_MOST_GUESSED = 6
# After _PATIENCE guessed tokens, guessing stops for the rest of the answer if less than this share of them was right,
# because a step that verifies several tokens takes longer than a step of one token.
_PATIENCE, _WORTHWHILE = 24, 0.25


class Guesser(Protocol):
    """The interface that guesses the next tokens of one answer."""

    def push(self, token: int) -> None:
        """Append a token of the answer."""
        ...

    def guess(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next. The list is often empty."""
        ...

    def judged(self, guessed: int, right: int) -> None:
        """Record how many tokens of the last guess were right."""
        ...


class PromptLookup:
    """Makes the guesses of one answer. It never guesses `excluded` tokens (image placeholders)."""

    def __init__(self, prompt_ids: Iterable[int], excluded: Iterable[int] = ()) -> None:
        self._excluded = frozenset(excluded)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._guessed = self._right = 0
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token of the prompt or the answer."""
        # Index the n-grams that end before this token only now. So the last n-gram never finds itself.
        for length in range(_SHORTEST, _LONGEST + 1):
            if len(self._tokens) >= length:
                self._ends[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next. The list is often empty."""
        if self._guessed >= _PATIENCE and self._right < _WORTHWHILE * self._guessed:
            return []
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._ends.get(tuple(self._tokens[-length:]))
            if end is not None and len(self._tokens) >= length:
                return self._until_excluded(end, min(most, _MOST_GUESSED))
        return []

    def judged(self, guessed: int, right: int) -> None:
        """Record how many of the guessed tokens were right."""
        self._guessed += guessed
        self._right += right

    def _until_excluded(self, start: int, count: int) -> list[int]:
        guess = self._tokens[start : start + count]
        cut = next((index for index, token in enumerate(guess) if token in self._excluded), len(guess))
        return guess[:cut]
