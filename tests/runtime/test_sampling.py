"""Sampling against the plain way: sort everything in float64, cut, and compare sums with a random number."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from internvl_edge.base.errors import EngineError, PromptError
from internvl_edge.runtime import ranking
from internvl_edge.runtime.ranking import FEW, Weights, largest
from internvl_edge.runtime.sampling import Sampler, Sampling

LOGITS = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32, allow_nan=False, allow_subnormal=False)
)
TOLERANCE = 1e-6


class Drawn:
    """Stands for the random generator, and gives one number again and again."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def token_for(logits: np.ndarray, number: float, **options: Any) -> int:
    """The token that a sampler takes for a random number."""
    sampler = Sampler(Sampling(**options))
    sampler._random = Drawn(number)  # type: ignore[assignment]
    return sampler.choose(logits)


def plain(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens that may be chosen, most probable first, and their probabilities.

    Where the sum at the border of top_p, or a probability at the border of min_p, is within rounding of it, both
    distributions are right; there are several then.
    """
    tokens = np.argsort(-logits.astype(np.float64), kind="stable")[: top_k or len(logits)]
    exact = (logits[tokens].astype(np.float64) - float(logits[tokens[0]])) / temperature
    weights = np.exp(np.maximum(exact, -700.0) if np.isfinite(exact).all() else exact)
    before = (np.cumsum(weights) - weights) / weights.sum()
    shares = weights / weights[0]
    counts = set()
    for slack in (-TOLERANCE, 0.0, TOLERANCE):
        by_mass = max(1, np.searchsorted(before, top_p + slack)) if top_p < 1 else len(tokens)
        by_share = max(1, np.count_nonzero(shares >= min_p * (1 + slack))) if min_p else len(tokens)
        counts.add(int(min(by_mass, by_share)))
    return [(tokens[:count], weights[:count] / weights[:count].sum()) for count in sorted(counts)]


def is_right(distributions: list[tuple[np.ndarray, np.ndarray]], number: float, token: int, by_id: bool) -> bool:
    """Whether the plain way takes this token for a random number within the tolerance of the given one.

    The number is compared with sums of probabilities from the most probable token on, or in the order of ids.
    """
    for tokens, probabilities in distributions:
        if by_id:
            order = np.argsort(tokens)
            tokens, probabilities = tokens[order], probabilities[order]
        sums = np.cumsum(probabilities)
        place = np.flatnonzero(tokens == token)
        if len(place) and sums[place[0]] + TOLERANCE >= number >= sums[place[0]] - probabilities[place[0]] - TOLERANCE:
            return True
    return False


def random_case(random: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of one of many shapes, and sampling options of every combination.

    Logits are multiples of 2^-12, so that their differences are exact in float32. Others that are nearly equal can swap
    their ranks, and with them their equal probabilities.
    """
    vocab = int(random.choice([1, 2, 7, 40, 300, 300, 2000, 2000, 20_000]))
    kind = random.integers(8)
    logits = random.standard_normal(vocab).astype(np.float32) * np.float32(random.choice([0.01, 0.3, 2, 10]))
    logits = np.round(logits * 4096) / 4096
    if kind == 1:
        logits[:] = random.choice([0.0, 7.25, -3.5])
    elif kind == 2:  # many ties
        logits = np.round(logits * 4) / 4
    elif kind == 3:  # excluded tokens
        logits[random.random(vocab) < 0.7] = -np.inf
        logits[random.integers(vocab)] = 1.0
    elif kind == 4:  # one or a few stand out
        logits[random.integers(0, vocab, 3)] += 15
    elif kind == 5:  # two values, nearly equal
        logits = np.where(random.random(vocab) < 0.5, np.float32(1), np.float32(1 + 2.0**-12))
    elif kind == 6:
        logits *= np.float32(2**20)
    options = {"temperature": float(random.choice([0.01, 0.3, 0.7, 1, 1.5, 10, 1e-30, 1e30, 1e300]))}
    if random.random() < 0.5:
        options["top_p"] = float(random.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12]))
    if random.random() < 0.4:
        options["top_k"] = int(random.choice([1, 2, 5, 50, 1000, 1500, 15_000, 10**7]))
    if random.random() < 0.4:
        options["min_p"] = float(random.choice([1e-12, 0.001, 0.05, 0.3, 1.0]))
    return logits.astype(np.float32), options


def numbers_for(random: np.random.Generator, distribution: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Random numbers, the least and the greatest one, and some on both sides of borders between tokens."""
    borders = np.cumsum(distribution[1])[random.integers(0, len(distribution[1]), 3)]
    numbers = [0.0, 1 - 2.0**-53, *random.random(3), *borders - 2e-6, *borders + 2e-6]
    return [float(min(max(number, 0.0), 1 - 2.0**-53)) for number in numbers]


def test_thousands_of_random_cases_choose_as_sorting_everything_does() -> None:
    """Without top_p, and with one so small that its border is looked for, one number decides."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        logits, options = random_case(random)
        options.pop("top_p", 1)
        few = 0 < options.get("top_k", 0) <= FEW
        if random.random() < 0.5:
            options["top_p"] = float(random.choice([1e-9, 0.1, 0.2, 0.39] + [0.9, 1 - 1e-12] * few))
        distributions = plain(logits, **options)
        for number in numbers_for(random, distributions[0]):
            token = token_for(logits, number, **options)
            by_id = "top_p" not in options and not few
            assert is_right(distributions, number, token, by_id), (options, len(logits), number, token)


@pytest.mark.parametrize("sorted_at_most", [8192, 16])
def test_the_border_of_a_part_is_where_sorting_finds_it(monkeypatch: pytest.MonkeyPatch, sorted_at_most: int) -> None:
    """By both ways: the weight before each token, and the order, where nearly nothing is sorted at once too."""
    monkeypatch.setattr(ranking, "_SORTED", sorted_at_most)
    random = np.random.default_rng(sorted_at_most)
    for _ in range(700):
        logits, options = random_case(random)
        top_p = options.setdefault("top_p", 0.9)
        distributions = plain(logits, **options)
        weights = Weights(
            logits, logits.max(), options["temperature"], options.get("top_k", 0), options.get("min_p", 0.0)
        )
        for token in [*random.integers(0, len(logits), 5).tolist(), int(distributions[0][0][-1])]:
            stays = bool(weights._space.weights[token] > 0 and weights.mass_before(token) < top_p * weights.mass)
            for_sure = [bool((tokens == token).any()) for tokens, _ in distributions]
            underflow = plain(logits, **options)[-1][1].min() < 1e-30
            assert stays in for_sure or underflow, (options, token)
        order = weights.order(top_p)
        kept = order.reaching(top_p * weights.mass)
        for number in numbers_for(random, distributions[0]):
            token = order.covering(number * kept)
            assert is_right(distributions, number, token, by_id=False), (options, len(logits), number, token)


@pytest.mark.parametrize("top_p", [0.4, 0.9])
def test_drawing_again_gives_the_distribution_of_top_p(top_p: float) -> None:
    """Chi-square of 12,000 draws, at a level that one in a million right samplers would miss."""
    logits = np.random.default_rng(3).standard_normal(30).astype(np.float32) * 1.5
    tokens, probabilities = plain(logits, temperature=0.8, top_p=top_p)[0]
    sampler = Sampler(Sampling(temperature=0.8, top_p=top_p, seed=9))
    counts = np.bincount([sampler.choose(logits) for _ in range(12_000)], minlength=30)
    assert counts.sum() == counts[tokens].sum()
    expected = probabilities * counts.sum()
    square = ((counts[tokens] - expected) ** 2 / expected).sum()
    assert square < len(tokens) + 5 * np.sqrt(2 * len(tokens)) + 12


@given(LOGITS, st.integers(1, 45), st.booleans())
def test_the_largest_are_the_first_of_a_stable_sort(logits: np.ndarray, count: int, ties: bool) -> None:
    logits = np.round(logits / 10) if ties else logits
    for many in (logits, np.tile(logits, 50)):
        np.testing.assert_array_equal(largest(many, count), np.argsort(-many, kind="stable")[:count])


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_flat_distribution_keeps_top_p_of_it(top_p: float) -> None:
    """All logits are equal: the tokens with the smallest ids stay, and each is as probable as another."""
    logits = np.full(151_674, 2.5, np.float32)
    sampler = Sampler(Sampling(temperature=0.7, top_p=top_p, seed=1))
    found = np.array([sampler.choose(logits) for _ in range(200)])
    assert found.max() <= top_p * len(logits)
    assert abs(found.mean() / (top_p * len(logits)) - 0.5) < 0.1


@given(LOGITS)
def test_greedy_is_the_argmax_and_leaves_the_logits_alone(logits: np.ndarray) -> None:
    before = logits.copy()
    for sampling in (Sampling(), Sampling(logit_bias={0: -3.0}, frequency_penalty=1.0)):
        Sampler(sampling).choose(logits)
        assert (logits == before).all()
    assert Sampler(Sampling()).choose(logits) == logits.argmax()


@given(LOGITS, st.integers(0, 2**31))
def test_a_seed_repeats(logits: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=1.0, seed=seed)
    one, two = Sampler(sampling), Sampler(sampling)
    assert [one.choose(logits) for _ in range(5)] == [two.choose(logits) for _ in range(5)]


def test_answers_of_several_requests_in_turn_are_those_of_each_alone() -> None:
    """Samplers share arrays of a thread, and nothing else."""
    random = np.random.default_rng(0)
    steps = random.standard_normal((20, 20_000)).astype(np.float32)
    options = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 2, "frequency_penalty": 1.0},
        {"temperature": 2.0, "top_k": 40, "seed": 3, "logit_bias": {3: 4.0}},
        {"repetition_penalty": 1.3},
    ]
    alone = [[sampler.choose(logits) for logits in steps] for sampler in (Sampler(Sampling(**o)) for o in options)]
    together = [Sampler(Sampling(**o)) for o in options]
    other = Sampler(Sampling(temperature=1.0, presence_penalty=1.0))
    rows = [[(sampler.choose(logits), other.choose(logits[:300]))[0] for sampler in together] for logits in steps]
    assert [list(row) for row in zip(*rows, strict=True)] == alone


def test_seeds_with_a_small_top_k_draw_as_numpy_does_from_the_sorted_distribution() -> None:
    """One random number for each token, compared with the sums from the most probable token on, as in 0.2."""
    random = np.random.default_rng(5)
    for seed in range(200):
        logits = (random.standard_normal(500) * 2).astype(np.float32)
        options: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9 if seed % 2 else 1.0}
        tokens, probabilities = plain(logits, **options)[0]
        sampler, generator = Sampler(Sampling(seed=seed, **options)), np.random.default_rng(seed)
        assert all(sampler.choose(logits) == generator.choice(tokens, p=probabilities) for _ in range(5))


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


# -- penalties and biases ----------------------------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_answered_tokens_only() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    assert sampler.choose(np.array([3.0, 2.0, 1.0], np.float32)) == 0
    assert sampler.choose(np.array([3.0, 2.0, 1.0], np.float32)) == 1  # 3 / 2 < 2
    assert sampler.choose(np.array([-1.0, -1.9, -1.95], np.float32)) == 2  # -1 * 2, -1.9 * 2


@pytest.mark.parametrize("counted", [[], [3, 3, 5]])
def test_penalties_are_those_of_counting_anew_for_each_token(counted: list[int]) -> None:
    """The prompt's tokens count for the repetition penalty alone; the others have OpenAI's formula."""
    random = np.random.default_rng(1)
    sampling = Sampling(
        repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4, logit_bias={2: 3.5, 7: -100.0}
    )
    sampler, answer = Sampler(sampling, counted), list[int]()
    for _ in range(300):
        logits = random.standard_normal(12).astype(np.float32) * 2
        expected = logits.astype(np.float64)
        expected[2] += 3.5
        expected[7] -= 100
        for token in {*answer, *counted}:
            expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        for token in set(answer):
            expected[token] -= 0.7 * answer.count(token) - 0.4
        best = np.sort(expected)[-2:]
        answer.append(sampler.choose(logits))
        if best[1] - best[0] > 1e-4:
            assert answer[-1] == expected.argmax()


def test_biases_exclude_and_force() -> None:
    logits = np.array([5.0, 4.0, -20.0], np.float32)
    assert Sampler(Sampling(logit_bias={0: -100})).choose(logits) == 1
    assert Sampler(Sampling(temperature=1.0, logit_bias={2: 100})).choose(logits) == 2


def test_only_plain_greedy_leaves_the_choice_to_the_engine() -> None:
    assert Sampler(Sampling(top_p=0.5, top_k=3, min_p=0.1, logit_bias={})).takes_the_best
    for options in (
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"logit_bias": {1: 1.0}},
    ):
        assert not Sampler(Sampling(**options)).takes_the_best  # type: ignore[arg-type]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [[np.nan, 1.0], [1.0, np.nan], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(broken: list[float], temperature: float) -> None:
    for options in ({}, {"top_k": 1}, {"frequency_penalty": 1.0}):
        with pytest.raises(EngineError, match="largest logit, expected a finite number"):
            Sampler(Sampling(temperature, **options)).choose(np.array(broken, np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("frequency_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=name):
        Sampling(**{name: value})


def test_choosing_takes_a_bounded_time_for_every_distribution() -> None:
    """Far above the 1 ms that `benchmarks/choosing.py` records, and far below sorting everything several times."""
    random = np.random.default_rng(0)
    vocab = 151_674
    shapes = [
        np.zeros(vocab),
        random.standard_normal(vocab) * 0.2,
        random.standard_normal(vocab) * 3,
        random.choice([1.0, np.nextafter(np.float32(1), np.float32(2))], vocab),
        np.where(random.random(vocab) < 0.5, 0.0, -np.inf),
    ]
    for logits in shapes:
        for options in ({}, {"top_p": 0.9}, {"top_p": 0.95, "min_p": 0.01, "top_k": 50_000, "presence_penalty": 0.5}):
            sampler = Sampler(Sampling(temperature=0.7, **options))  # type: ignore[arg-type]
            times = []
            for _ in range(7):
                began = time.thread_time()
                sampler.choose(logits.astype(np.float32))
                times.append(time.thread_time() - began)
            assert np.median(times) < 0.008
