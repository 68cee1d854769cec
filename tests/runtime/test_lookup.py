"""Prompt lookup by itself, and answers with it against answers without, on an engine whose answers are known."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.remembering_engine import VOCABULARY, RememberingEngine, greedy
from internvl_edge.runtime.decoding import Decoding
from internvl_edge.runtime.engines import finish
from internvl_edge.runtime.lookup import PromptLookup
from internvl_edge.runtime.sampling import Sampler, Sampling


def answer(prompt: list[int], count: int, stop: tuple[int, ...], guessing: bool) -> tuple[list[int], RememberingEngine]:
    engine = RememberingEngine()
    lookup = PromptLookup(prompt) if guessing else None
    decoding = Decoding(Sampler(Sampling()), stop, count, lambda _: False, lookup)
    decoding.begin(finish(engine.prefill_steps(np.array(prompt, np.float32)[:, None])))
    engine.calls = 0
    while not decoding.finished:
        start = engine.cache.length()
        tokens = decoding.next_tokens()
        right = decoding.advance(list(engine.score(np.array(tokens, np.float32)[:, None])))
        engine.cache.reset(start + 1 + right)
    return decoding.tokens, engine


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 30))
def test_an_answer_and_the_cache_after_it_are_the_same_with_guesses(prompt: list[int], count: int, stop: int) -> None:
    plain, without = answer(prompt, count, (stop,), guessing=False)
    guessed, engine = answer(prompt, count, (stop,), guessing=True)
    assert guessed == plain == greedy(prompt, count, (stop,))
    length = engine.cache.length()
    assert engine.tokens[0][:length] == (prompt + plain)[:length]
    assert engine.calls <= without.calls
    assert length >= without.cache.length()


def test_repetition_saves_steps() -> None:
    """Greedy answers of a deterministic engine run into a cycle, which is guessed."""
    plain, without = answer([1, 2, 3], 200, (), guessing=False)
    guessed, engine = answer([1, 2, 3], 200, (), guessing=True)
    assert guessed == plain
    assert engine.calls < 0.4 * without.calls


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
