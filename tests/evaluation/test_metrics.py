"""Metrics against an independent implementation of each, and intervals against scipy and against their definition."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import suite_scores
from internvl_edge.bundle.gate import METRICS, SUITE_METRICS
from internvl_edge.evaluation import SCORES, Case
from internvl_edge.evaluation import metrics as product

# Texts that are near each other, so that scores are not nearly always 0.
_WORDS = (
    "A",
    "B",
    "(B)",
    "b.",
    "yes",
    "No,",
    "Total",
    "total",
    "12",
    "12.0",
    "12.5%",
    "1,200",
    "-3",
    "0",
    "$12.50",
    "€ 7",
)
_MARKS = (" ", "  ", "\n", ".", ",", "'", '"', "!", ":", "")
_NEAR = st.lists(st.sampled_from(_WORDS + _MARKS), max_size=8).map("".join)
_TEXT = st.one_of(
    _NEAR, st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Nd", "No")), max_size=12)
)
_NUMBER = st.one_of(
    st.integers(-200, 200).map(str),
    st.floats(-1e6, 1e6).map(lambda value: f"{value:.3f}"),
    st.floats(0, 100).map(lambda value: f"{value:.2f}%"),
)
_RIGHT = st.lists(_TEXT.filter(str.strip), min_size=1, max_size=3)

PAIRS: list[tuple[Callable[[str, Sequence[str]], float], Callable[[str, Sequence[str]], float]]] = [
    (product.exact_match, suite_scores.exact),
    (product.normalized_match, suite_scores.normalized),
    (product.anls, suite_scores.anls),
    (product.relaxed_accuracy, suite_scores.relaxed),
    (product.contains, lambda answer, right: suite_scores.contained(answer, right, formula=False)),
    (lambda a, r: product.contains(a, r, formula=True), lambda a, r: suite_scores.contained(a, r, formula=True)),
]
NAMES = ["exact", "normalized", "anls", "relaxed", "contains", "contains formula"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=NAMES)
@given(answer=_TEXT, right=_RIGHT)
@settings(max_examples=300, deadline=None)
def test_a_metric_is_the_independent_one(
    ours: Callable[[str, Sequence[str]], float],
    theirs: Callable[[str, Sequence[str]], float],
    answer: str,
    right: list[str],
) -> None:
    assert ours(answer, right) == pytest.approx(theirs(answer, right), abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=NAMES)
@given(answer=_TEXT, data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_metric_is_the_independent_one_near_the_right_answer(
    ours: Callable[[str, Sequence[str]], float],
    theirs: Callable[[str, Sequence[str]], float],
    answer: str,
    data: st.DataObject,
) -> None:
    """The right answer is the answer with some characters changed, and sometimes the answer in another form."""
    changes = data.draw(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "x", " ", "ä", "7"])), max_size=4))
    text = list(answer)
    for place, new in changes:
        text[place : place + 1] = new
    right = ["".join(text) or "x", data.draw(st.sampled_from([answer.upper(), f"“{answer}”.", answer])) or "x"]
    assert ours(answer, right) == pytest.approx(theirs(answer, right), abs=1e-12)


@given(answer=_NUMBER, right=st.lists(_NUMBER, min_size=1, max_size=2))
@example(answer="105", right=["100"])
@example(answer="105.001", right=["100"])
@example(answer="95", right=["100"])
@example(answer="0.001", right=["0"])
@example(answer="-100", right=["100"])
@example(answer="12%", right=["0.12"])
@settings(max_examples=400, deadline=None)
def test_relaxed_accuracy_of_numbers_is_the_independent_one(answer: str, right: list[str]) -> None:
    assert product.relaxed_accuracy(answer, right) == suite_scores.relaxed(answer, right)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Nan", "nan", 1),
        ("infinity", "Infinity", 1),
        ("inf", "5", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("1,200", "1200", 0),
        ("Light Blue", "light blue", 1),
    ],
)
def test_relaxed_accuracy_compares_what_is_no_number_as_text(answer: str, right: str, score: float) -> None:
    assert product.relaxed_accuracy(answer, [right]) == score


CHOICES = ["Paris", "the old harbour", "A", "none of these"]


@given(
    answer=st.one_of(
        st.sampled_from([*"ABCD", "(B)", "B.", "B) x", "the answer is C.", "A or B", "I say (A), no, (C)", *CHOICES]),
        st.lists(st.sampled_from([*_WORDS, *CHOICES, "C", "(D)", "D:", "is", "we", "see", " "]), max_size=9).map(
            " ".join
        ),
    ),
    right=st.lists(st.sampled_from(["B", "D", "Paris", "the old harbour"]), min_size=1, max_size=2),
)
@settings(max_examples=600, deadline=None)
def test_choice_accuracy_is_the_independent_one(answer: str, right: list[str]) -> None:
    assert product.choice_accuracy(answer, right, CHOICES) == suite_scores.choice(answer, right, CHOICES)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B. Rome", 1),
        ("b", None),
        ("The answer is (A), not (C).", 2),
        ("rome!", 1),
        ("Madrid", None),
        ("As one can see in the picture it is Rome.", 1),
        ("", None),
        ("E", None),
    ],
)
def test_a_choice_is_named_by_letter_or_text_and_never_guessed(answer: str, named: int | None) -> None:
    assert product.named_choice(answer, ["Paris", "Rome", "Oslo"]) == named


@given(one=st.text("abcß", max_size=9), other=st.text("abcß", max_size=9))
@settings(max_examples=200, deadline=None)
def test_the_distance_is_that_of_the_recursion(one: str, other: str) -> None:
    assert product._distance(one, other) == suite_scores.levenshtein(one, other)


def test_anls_at_its_threshold_and_of_long_answers() -> None:
    assert product.anls("abcd", ["abxy"]) == 0.5
    assert product.anls("abcd", ["axyz"]) == 0
    assert product.anls("", ["x"]) == 0
    long = "word " * 2000
    assert product.anls(long, [long + "x"]) > 0.999


@given(asked=st.integers(1, 3000), data=st.data())
@settings(max_examples=200, deadline=None)
def test_wilson_is_scipys_and_its_own_definition(asked: int, data: st.DataObject) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    right = data.draw(st.integers(0, asked))
    found = product.wilson(right, asked)
    interval = scipy_stats.binomtest(right, asked).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(suite_scores.wilson_ends(right, asked), abs=1e-9)
    assert 0 <= found.low <= found.value == right / asked <= found.high <= 1


def test_the_bootstrap_is_scipys_but_for_its_random_numbers() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    scores = np.where(rng.random(300) < 0.3, 0.0, rng.random(300))
    found = product.bootstrap(scores.tolist())
    theirs = scipy_stats.bootstrap((scores,), np.mean, n_resamples=10_000, method="percentile", rng=rng)
    assert found.value == pytest.approx(scores.mean(), abs=1e-12)
    width = found.high - found.low
    interval = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.05 * width)
    assert product.bootstrap(scores.tolist()) == found, "the same scores give the same interval"


def test_a_bootstrap_of_many_scores_stays_small_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [random.Random(1).random() for _ in range(900)]
    whole = product.bootstrap(scores)
    monkeypatch.setattr(product, "_DRAWN", 9_000)  # ten resamples at a time
    assert product.bootstrap(scores) == whole, "the random numbers do not depend on how they are drawn"


def test_intervals_of_nothing_are_no_numbers() -> None:
    for found in (product.wilson(0, 0), product.bootstrap([])):
        assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_every_metric_has_words_and_a_condition() -> None:
    assert SCORES.keys() == SUITE_METRICS.keys()
    for name in SCORES:
        assert METRICS[name].run == METRICS[f"{name}_loss"].run == "suite"


def test_scores_are_between_0_and_1_and_say_whether_they_are_binary() -> None:
    case = Case("one", "?", answer="Rome", also_right=("A",), choices=("Rome", "Oslo"))
    for name, score in SCORES.items():
        found = {score.of(answer, case) for answer in ("Rome", "rome", "Rom", "B", "", "It is Rome")}
        assert found <= ({0.0, 1.0} if score.is_binary else {0.0, 0.75, 1.0}), name
        assert 1 in found
    assert not SCORES["choice_accuracy"].applies(Case("two", "?", answer="Rome"))
