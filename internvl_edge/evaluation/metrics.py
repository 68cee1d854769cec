"""Score one answer against the right ones, and estimate a mean score with its confidence interval.

Pure functions of texts and numbers. A score is from 0 to 1. Where a question has several right answers, the best score
counts. `SCORES` is the table of all metrics; `gate.SUITE_METRICS` says the same names in words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from internvl_edge.runtime.voting import normalized

from .cases import Case

# Below this similarity, an answer is another answer and not a misspelt one (Biten et al., 2019).
ANLS_THRESHOLD = 0.5
# Relative error of a number that still counts as read (Methani et al., 2020).
RELAXED_TOLERANCE = 0.05
# Two-sided, for 95 %.
_Z = 1.959963984540054
_LOW, _HIGH = 2.5, 97.5
RESAMPLES = 10_000
# Scores that are drawn at a time, so that memory stays small.
_DRAWN = 1 << 20


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is a right one, character for character, spaces at the ends aside."""
    return float(answer.strip() in {text.strip() for text in right})


def normalized_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is a right one in the form of `voting.normalized`.

    That form has no case, quotes, end stop or thousands separators, and numbers are equal if their values are.
    """
    return float(normalized(answer) in set(map(normalized, right)))


def contains(answer: str, right: Sequence[str], formula: bool = False) -> float:
    """1 if a right answer stands somewhere in the answer, without regard to case.

    Formulas are compared with their case and without any spaces. Source: OCRBench (Liu et al., 2024), `example.py`,
    whose formulas are those of HME100k.
    """

    def form(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return float(any(form(text) in form(answer) for text in right))


def anls(answer: str, right: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest right answer, 0 where it is below `ANLS_THRESHOLD`.

    Its mean over all questions is ANLS. Texts are compared without case, and any white space is one space. Source:
    Biten et al., 2019 (arXiv 1905.13648), as the evaluation of DocVQA computes it: the distance is that of the compared
    texts, and it is divided by the length of the longer text as it was given. At the threshold itself the score counts.
    """
    best = max(_similarity(answer, text) for text in right)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is a number within 5 % of a right one, or the same text without regard to case.

    "12 %" written as "12%" is 0.12. A right answer of 0 is compared as text. Source: Masry et al., 2022 (ChartQA,
    arXiv 2203.10244, section 5.1), after Methani et al., 2020.
    """
    return float(any(_is_near(answer.strip(), text.strip()) for text in right))


def choice_accuracy(answer: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """1 if the answer names a right choice; both are letters ("B") or texts of choices. See `named_choice`."""
    named = named_choice(answer, choices)
    return float(named is not None and named in {right_choice(text, choices) for text in right})


def named_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the place of the choice that an answer names, or None where it names none.

    The rules are those of MMMU (Yue et al., 2024, `eval_utils.py`): a letter in parentheses, else a letter that stands
    alone, else, in an answer of more than five words, the text of a choice; of several, the last that is named. They
    are completed where MMMU would guess at random: an answer that is the text of a choice names it, and so does one
    that begins with a letter and a stop, colon or parenthesis. An answer that names nothing is wrong, and no guess.
    """
    texts = [normalized(text) for text in choices]
    if normalized(answer) in texts:
        return texts.index(normalized(answer))
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    padded, lowered = f" {answer} ", answer.lower()
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    found = _last([padded.rfind(f"({letter})") for letter in letters])
    if found is None:
        found = _last([padded.rfind(f" {letter} ") for letter in letters])
    if found is None and (begins := re.match(r"\s*([A-Z])[.:)]", answer)) and begins[1] in letters:
        found = letters.index(begins[1])
    if found is None and len(answer.split()) > 5:
        found = _last([lowered.rfind(text.lower()) for text in choices])
    return found


def right_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return the place of a choice that data give as its text or as its letter; None where it is neither."""
    if text in choices:
        return list(choices).index(text)
    place = ord(text.strip()) - ord("A") if len(text.strip()) == 1 else -1
    return place if 0 <= place < len(choices) else None


@dataclass(frozen=True)
class Score:
    """How one metric scores a case.

    Attributes:
        of: the score of an answer to a case.
        applies: whether a case can be scored.
        is_binary: whether every score is 0 or 1.
    """

    of: Callable[[str, Case], float]
    applies: Callable[[Case], bool] = lambda case: True
    is_binary: bool = True


SCORES = {
    "exact_match": Score(lambda answer, case: exact_match(answer, case.answers)),
    "normalized_match": Score(lambda answer, case: normalized_match(answer, case.answers)),
    "contains": Score(lambda answer, case: contains(answer, case.answers, case.is_formula)),
    "anls": Score(lambda answer, case: anls(answer, case.answers), is_binary=False),
    "relaxed_accuracy": Score(lambda answer, case: relaxed_accuracy(answer, case.answers)),
    "choice_accuracy": Score(
        lambda answer, case: choice_accuracy(answer, case.answers, case.choices), lambda case: bool(case.choices)
    ),
}


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval.

    Attributes:
        value: the mean.
        low, high: the ends of the interval.
        method: "wilson" for shares, "bootstrap" for other means.
    """

    value: float
    low: float
    high: float
    method: str


def wilson(right: int, asked: int) -> Estimate:
    """Estimate a share with Wilson's score interval (Wilson, 1927).

    It also holds for few questions, and near 0 and 1. NaN where nothing was asked.
    """
    if asked == 0:
        return Estimate(math.nan, math.nan, math.nan, "wilson")
    share, square = right / asked, _Z * _Z / asked
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    # The ends are 0 and 1 at the ends of the scale; rounding would leave 1e-17 there.
    low, high = (0.0 if right == 0 else middle - half), (1.0 if right == asked else middle + half)
    return Estimate(share, low, high, "wilson")


def bootstrap(scores: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate a mean with the percentile bootstrap (Efron, 1979): 10,000 resamples, the same for the same scores.

    NaN where there are no scores.
    """
    if not scores:
        return Estimate(math.nan, math.nan, math.nan, "bootstrap")
    values, rng = np.asarray(scores, np.float64), np.random.default_rng(seed)
    at_once = max(1, _DRAWN // len(values))
    means = [
        values[rng.integers(0, len(values), (min(at_once, RESAMPLES - begun), len(values)))].mean(axis=1)
        for begun in range(0, RESAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), [_LOW, _HIGH])
    return Estimate(float(values.mean()), float(low), float(high), "bootstrap")


def estimate(scores: Sequence[float], is_binary: bool) -> Estimate:
    """Estimate the mean of scores: Wilson's interval where each is 0 or 1, else the bootstrap."""
    return wilson(round(sum(scores)), len(scores)) if is_binary else bootstrap(scores)


def _last(places: Sequence[int]) -> int | None:
    """Return the index of the largest place; None where all are -1."""
    return places.index(max(places)) if places and max(places) >= 0 else None


def _similarity(answer: str, right: str) -> float:
    longest = max(len(answer), len(right))
    if longest == 0:
        return 1.0
    one, other = (" ".join(text.lower().split()) for text in (answer, right))
    return 1 - _distance(one, other) / longest


def _distance(one: str, other: str) -> int:
    """Levenshtein distance (Wagner and Fischer, 1974), row by row; each row is one pass of numpy.

    An insertion costs 1, so the smallest sum over insertions from the left is a running minimum of `row - place`.
    """
    if len(one) < len(other):
        one, other = other, one
    codes = np.array(list(map(ord, other)), np.int64)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for number, character in enumerate(one, start=1):
        new = np.empty_like(row)
        new[0] = number
        new[1:] = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))
        row = np.minimum.accumulate(new - places) + places
    return int(row[-1])


def _is_near(answer: str, right: str) -> bool:
    found, wanted = _number(answer), _number(right)
    if found is None or not wanted:
        return answer.lower() == right.lower()
    return abs(found - wanted) / abs(wanted) <= RELAXED_TOLERANCE


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
