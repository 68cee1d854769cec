"""Sampling by its properties, and greedy by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from internvl_edge.base.errors import PromptError
from internvl_edge.runtime.sampling import Sampler, Sampling

LOGITS = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32, allow_nan=False, allow_subnormal=False)
)


@given(LOGITS)
def test_greedy_is_the_argmax_and_leaves_the_logits_alone(logits: np.ndarray) -> None:
    before = logits.copy()
    assert Sampler(Sampling()).choose(logits) == logits.argmax()
    assert (logits == before).all()


@given(LOGITS, st.integers(0, 50), st.floats(0.05, 1.0), st.floats(0.1, 5.0))
def test_a_distribution_is_what_its_parameters_say(
    logits: np.ndarray, top_k: int, top_p: float, temperature: float
) -> None:
    tokens, probabilities = Sampler(Sampling(temperature, top_k, top_p)).distribution(logits)
    assert len(set(tokens.tolist())) == len(tokens) == len(probabilities) >= 1
    assert abs(probabilities.sum() - 1) < 1e-9
    assert (np.diff(probabilities) <= 1e-12).all()
    assert logits[tokens[0]] == logits.max()
    if top_k:
        assert len(tokens) <= top_k
    full = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    # Ratios among the kept tokens are those of the softmax.
    np.testing.assert_allclose(probabilities / probabilities[0], full[tokens] / full[tokens[0]], rtol=1e-9)
    # Nothing that was cut is more probable than what was kept.
    cut = np.delete(logits, tokens)
    assert not len(cut) or cut.max() <= logits[tokens].min()


@given(LOGITS, st.floats(0.05, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_it(logits: np.ndarray, top_p: float) -> None:
    tokens, _ = Sampler(Sampling(temperature=1.0, top_p=top_p)).distribution(logits)
    full = np.exp(logits.astype(np.float64) - logits.max())
    full /= full.sum()
    assert full[tokens].sum() >= top_p - 1e-9
    assert full[tokens[:-1]].sum() < top_p + 1e-9


@given(LOGITS, st.integers(0, 2**31))
def test_a_seed_repeats(logits: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=1.0, seed=seed)
    one, two = Sampler(sampling), Sampler(sampling)
    assert [one.choose(logits) for _ in range(5)] == [two.choose(logits) for _ in range(5)]


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_answered_tokens_only() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    assert sampler.choose(np.array([3.0, 2.0, 1.0], np.float32)) == 0
    assert sampler.choose(np.array([3.0, 2.0, 1.0], np.float32)) == 1  # 3 / 2 < 2
    assert sampler.choose(np.array([-1.0, -1.9, -1.95], np.float32)) == 2  # -1 * 2, -1.9 * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("repetition_penalty", 0), ("seed", -1)],
)
def test_parameters_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(PromptError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]
