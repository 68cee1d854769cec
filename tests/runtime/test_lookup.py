"""Prompt lookup by itself, and the decoding loop with it against one without, on an engine whose answers are known."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.generate import generate
from internvl_edge.runtime.lookup import PromptLookup
from internvl_edge.runtime.sampling import Sampler, Sampling

VOCABULARY = 12


class RememberingEngine:
    """Logits are a fixed function of the last three tokens in the cache; embeddings are the token itself."""

    capacity = 10_000

    def __init__(self, prompt: list[int]) -> None:
        self.cache = list(prompt)
        self.steps = 0

    @property
    def length(self) -> int:
        return len(self.cache)

    def logits(self) -> np.ndarray:
        state = sum(token * 5**place for place, token in enumerate(self.cache[-2:]))
        return np.random.default_rng(state).standard_normal(VOCABULARY).astype(np.float32)

    def decode(self, embed: np.ndarray) -> np.ndarray:
        return self.score(embed[None])[0]

    def score(self, embeds: np.ndarray) -> np.ndarray:
        self.steps += 1
        rows = []
        for row in embeds:
            self.cache.append(int(row[0]))
            rows.append(self.logits())
        return np.stack(rows)

    def reset(self, length: int = 0) -> None:
        del self.cache[length:]


def answer(prompt: list[int], count: int, stop: tuple[int, ...], guessing: bool) -> tuple[list[int], RememberingEngine]:
    engine = RememberingEngine(prompt)
    lookup = PromptLookup(prompt) if guessing else None
    tokens = generate(
        engine,  # type: ignore[arg-type]
        engine.logits(),
        lambda token: np.array([token], np.float32),
        Sampler(Sampling()),
        stop,
        count,
        lookup,
    )
    return list(tokens), engine


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 30))
def test_an_answer_and_the_cache_after_it_are_the_same_with_guesses(prompt: list[int], count: int, stop: int) -> None:
    plain, without = answer(prompt, count, (stop,), guessing=False)
    guessed, engine = answer(prompt, count, (stop,), guessing=True)
    assert guessed == plain
    assert engine.cache == (prompt + plain)[: engine.length]
    assert engine.steps <= without.steps
    assert engine.length >= without.length


def test_repetition_saves_steps() -> None:
    """Greedy answers of a deterministic engine run into a cycle, which is guessed."""
    plain, without = answer([1, 2, 3], 200, (), guessing=False)
    guessed, engine = answer([1, 2, 3], 200, (), guessing=True)
    assert guessed == plain
    assert engine.steps < 0.4 * without.steps


def test_the_longest_and_latest_match_is_continued() -> None:
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).guess(2) == [4, 9]
    assert PromptLookup([7, 2, 3, 4, 8, 2, 3, 5, 6, 2, 3]).guess(2) == [5, 6]
    assert PromptLookup([1, 2, 3, 4, 5]).guess(4) == []
    assert PromptLookup([1]).guess(4) == []
    assert PromptLookup([5, 6, 7, 8, 5, 6]).guess(0) == []


def test_image_tokens_are_never_guessed() -> None:
    assert PromptLookup([1, 2, 3, 99, 99, 1, 2], excluded=[99]).guess(6) == [3]


def test_guessing_ends_when_it_does_not_pay() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 1, 2])
    assert lookup.guess(2) == [3, 4]
    lookup.judged(24, 5)
    assert lookup.guess(2) == []
