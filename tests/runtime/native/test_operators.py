"""The operators compute what float64 computes, for each level that this CPU has; rows and threads change no bit."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers.native_attention import (
    MICROSOFT,
    Shape,
    Step,
    attended,
    attention_model,
    group_query_model,
    level_here,
    session_of,
)
from internvl_edge.runtime.native.build import LEVELS

# Errors as a share of the largest value. Operands in bfloat16 have 8 bits.
FLOAT32, BFLOAT16 = 2e-6, 1e-2
# The levels of machines like this one, whether or not its CPU has them.
KIND = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
ALL_LEVELS = sorted(LEVELS.get(KIND, {"baseline": ()}))
SHAPES = [
    *(Shape(group * 2, 2, 64) for group in range(1, 9)),
    *(Shape(4, 2, width) for width in (16, 32, 48, 80, 96, 128, 256)),
    Shape(17, 1, 64),
    Shape(8, 8, 128),
]


@pytest.fixture(params=ALL_LEVELS)
def level(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("INTERNVL_EDGE_NATIVE_LEVEL", request.param)
    if level_here(library) != request.param:
        pytest.skip(f"this CPU or compiler has no {request.param}")
    return str(request.param)


def error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def blocks_tolerance(level: str) -> float:
    return BFLOAT16 if level.endswith("bf16") else FLOAT32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_is_computed_in_float32(library: Path, level: str, shape: Shape) -> None:
    session = session_of(group_query_model(shape), library)
    for past in (0, 1, 15, 16, 127, 128, 129, 300, 1000):
        step = Step.drawn(shape, [past], capacity=past + 3)
        found, key, value = step.run(session)
        assert error(found, step.expected()) < FLOAT32
        np.testing.assert_array_equal([key, value], step.cache())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_and_their_continuations(library: Path, level: str, shape: Shape) -> None:
    session = session_of(group_query_model(shape), library)
    for tokens, past in ((2, 0), (7, 5), (64, 0), (65, 190), (200, 0), (33, 301)):
        step = Step.drawn(shape, [past], tokens, capacity=past + tokens + 5)
        found, key, value = step.run(session)
        assert error(found, step.expected()) < blocks_tolerance(level)
        np.testing.assert_array_equal([key, value], step.cache())


def test_long_sequences(library: Path, level: str) -> None:
    shape = Shape(14, 2, 64)
    session = session_of(group_query_model(shape), library, threads=2)
    for step in (Step.drawn(shape, [2999]), Step.drawn(shape, [2700], 256)):
        limit = FLOAT32 if step.tokens == 1 else blocks_tolerance(level)
        assert error(step.run(session)[0], step.expected()) < limit


@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_of_unequal_length(library: Path, level: str, tokens: int) -> None:
    shape = Shape(6, 2, 64)
    step = Step.drawn(shape, [0, 130, 17, 700], tokens)
    found, key, value = step.run(session_of(group_query_model(shape), library))
    assert error(found, step.expected()) < (FLOAT32 if tokens == 1 else blocks_tolerance(level))
    np.testing.assert_array_equal([key, value], step.cache())


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_row_is_the_same_to_the_bit_alone_and_beside_others(library: Path, level: str, tokens: int) -> None:
    """For every number of threads, too."""
    shape = Shape(14, 2, 64)
    one, two, three = (session_of(group_query_model(shape), library, threads=threads) for threads in (1, 2, 3))
    step = Step.drawn(shape, [300, 0, 1100, 129], tokens)
    together = step.run(two)[0]
    np.testing.assert_array_equal(step.run(three)[0], together)
    for row in range(4):
        np.testing.assert_array_equal(step.row(row).run(one)[0][0], together[row])


@pytest.mark.parametrize(("heads", "width"), [(1, 64), (16, 64), (4, 96), (3, 128), (5, 16)])
def test_tokens_that_all_see_each_other(library: Path, level: str, heads: int, width: int) -> None:
    session = session_of(attention_model(heads, width), library, threads=2)
    for tiles, tokens in ((1, 1), (2, 17), (1, 257), (3, 300)):
        random = np.random.default_rng(tokens)
        inputs = {
            name: random.standard_normal((tiles, tokens, heads * width), np.float32)
            for name in ("query", "key", "value")
        }
        [found] = session.run(None, inputs)
        for tile in range(tiles):
            parts = [each[tile].reshape(tokens, heads, width).transpose(1, 0, 2) for each in inputs.values()]
            expected = attended(*parts, np.ones((tokens, tokens), bool))
            assert error(found[tile], expected) < blocks_tolerance(level)
            alone = session.run(None, {name: each[tile : tile + 1] for name, each in inputs.items()})[0]
            np.testing.assert_array_equal(alone[0], found[tile])


def test_large_scores_overflow_nowhere(library: Path, level: str) -> None:
    shape = Shape(4, 2, 64)
    session = session_of(group_query_model(shape), library)
    for tokens in (1, 40):
        step = Step.drawn(shape, [500], tokens)
        step.query *= 1000
        found = step.run(session)[0]
        assert np.isfinite(found).all()
        if not level.endswith("bf16") or tokens == 1:
            assert error(found, step.expected()) < 1e-3


@pytest.mark.parametrize("tokens", [1, 30])
def test_what_lies_behind_the_last_token_counts_for_nothing(library: Path, level: str, tokens: int) -> None:
    shape = Shape(6, 2, 64)
    session = session_of(group_query_model(shape), library)
    step = Step.drawn(shape, [140], tokens, capacity=400)
    expected = step.run(session)[0]
    for cache in (step.past_key, step.past_value):
        cache[:, :, 140 + tokens :] = np.nan
    np.testing.assert_array_equal(step.run(session)[0], expected)


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_cache_that_is_not_shared_is_copied(library: Path, tokens: int) -> None:
    shape = Shape(6, 2, 64)
    session = session_of(group_query_model(shape), library)
    step = Step.drawn(shape, [50], tokens, capacity=99)
    for mine, other in zip(step.run(session), step.run(session, in_place=False), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("shape", [Shape(14, 2, 64), Shape(16, 8, 128), Shape(4, 4, 96)], ids=str)
def test_the_graphs_own_operator_is_no_closer(library: Path, shape: Shape) -> None:
    """One token, compared with com.microsoft.GroupQueryAttention: both have the error of float32 sums."""
    ours, theirs = session_of(group_query_model(shape), library), session_of(group_query_model(shape, MICROSOFT))
    for past in (3, 299, 1999):
        step = Step.drawn(shape, [past])
        (found, *cache), (own, *own_cache) = step.run(ours), step.run(theirs)
        assert error(found, own) < FLOAT32
        assert error(found, step.expected()) < 4 * error(own, step.expected()) + 1e-7
        np.testing.assert_array_equal(cache, own_cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": [400]}, "do not fit the cache"),
        ({"past": [-2]}, "do not fit the cache"),
        ({"key": np.zeros((1, 1, 64), np.float32)}, "do not fit each other"),
        ({"past_value": np.zeros((1, 2, 99, 64), np.float32)}, "do not fit each other"),
        ({"query": np.zeros((1, 1, 4 * 24), np.float32)}, "no multiple of 16"),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_crash(library: Path, change: dict[str, Any], message: str) -> None:
    shape = Shape(4, 2, 64)
    model = group_query_model(shape)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    session = session_of(model, library)
    step = Step.drawn(shape, [20], capacity=100)
    for name, value in change.items():
        setattr(step, name, value)
    with pytest.raises(Exception, match=message):
        step.run(session, in_place=False)


def test_heads_that_do_not_divide_are_refused(library: Path) -> None:
    with pytest.raises(Exception, match="no multiple of kv_heads"):
        session_of(group_query_model(Shape(5, 2, 64)), library)
