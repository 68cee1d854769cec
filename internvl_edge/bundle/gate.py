"""Conditions on quality figures, "kl>0.05": when one holds, the bundle fails.

Knows the metrics by name, no bundle and no model.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from internvl_edge.base.errors import EdgeError


@dataclass(frozen=True)
class Metric:
    """A figure that conditions may name.

    Attributes:
        meaning: for people, with its unit.
        needs: what must be there to measure it: "reference", "answers" (in the data), "suite", "choices" (in it).
        is_share: a share from 0 to 1, shown in percent.
    """

    meaning: str
    needs: tuple[str, ...]
    is_share: bool = False

    @property
    def run(self) -> str:
        """What measures it, as `Quality.measured` names it: "suite" or "comparison"."""
        return "suite" if "suite" in self.needs else "comparison"

    def show(self, value: float) -> str:
        """The value for people: as many digits as make a difference."""
        if math.isnan(value):
            return "not measured"
        if self.is_share:
            return f"{value:.2%}"
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


# What a suite measures; `evaluation.metrics.SCORES` says how.
SUITE_METRICS = {
    "exact_match": "share of a suite's questions that are answered exactly",
    "normalized_match": "share of a suite's questions that are answered right, but for case, quotes and such",
    "contains": "share of a suite's answers that hold a right answer somewhere",
    "anls": "average normalized Levenshtein similarity of a suite's answers to the right ones",
    "relaxed_accuracy": "share of a suite's answers that are right, numbers within 5 %",
    "choice_accuracy": "share of a suite's multiple-choice questions that are answered with the right choice",
}


def _suite_metrics() -> dict[str, Metric]:
    """Return the metrics of a suite, and what each loses against the reference."""
    metrics = {}
    for name, meaning in SUITE_METRICS.items():
        needs = ("suite", "choices") if name == "choice_accuracy" else ("suite",)
        metrics[name] = Metric(meaning, needs, is_share=True)
        metrics[f"{name}_loss"] = Metric(f"the reference's {name} less the bundle's", (*needs, "reference"), True)
    return metrics


METRICS = {
    "kl": Metric("mean KL divergence of the bundle's predictions from the reference's, in nats", ("reference",)),
    "kl_p99": Metric("99th percentile of the KL divergence over all tokens, in nats", ("reference",)),
    "kl_max": Metric("largest KL divergence at one token, in nats", ("reference",)),
    "top1": Metric(
        "top-1 agreement: share of tokens for which both models find the same token most probable",
        ("reference",),
        is_share=True,
    ),
    "same_answers": Metric(
        "share of greedy answers that equal the reference's, token for token", ("reference",), is_share=True
    ),
    "same_tokens": Metric(
        "share of answered tokens that come before the first difference of their answer", ("reference",), is_share=True
    ),
    "perplexity_ratio": Metric(
        "perplexity of the given answers, divided by the reference's perplexity", ("reference", "answers")
    ),
} | _suite_metrics()
_NEEDS = {
    "reference": "--reference",
    "answers": "data that holds answers",
    "suite": "--suite",
    "choices": "a suite with choices",
}
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FORM = re.compile(r"\s*(?P<metric>[A-Za-z]\w*)\s*(?P<sign>[<>]=?)\s*(?P<limit>\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A bundle fails where `metric sign limit` holds, or where the figure is no number."""

    metric: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{str(self.limit).removesuffix('.0')}"

    def fails(self, value: float) -> bool:
        """Whether a figure fails this condition; NaN always does."""
        return math.isnan(value) or bool(_OPERATORS[self.sign](value, self.limit))


def parse_condition(text: str) -> Condition:
    """The condition that a text like "exact_match<0.95" states.

    Raises:
        EdgeError: not METRIC, a comparison and a number, or a metric that is not known; the known ones are listed.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise EdgeError(f"condition {text!r} is not METRIC, one of < <= > >=, and a number; an example: kl>0.05")
    if found["metric"] not in METRICS:
        raise EdgeError(f"condition {text!r}: there is no metric {found['metric']!r}; known are {', '.join(METRICS)}")
    try:
        limit = float(found["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise EdgeError(f"condition {text!r}: {found['limit']!r} is not a number; an example: kl>0.05")
    return Condition(found["metric"], found["sign"], limit)


def require_measurable(conditions: Iterable[Condition], available: Collection[str]) -> None:
    """Refuse conditions on what will not be measured; `available` are words of `Metric.needs`.

    Raises:
        EdgeError: names the condition and what it needs.
    """
    for condition in conditions:
        missing = [_NEEDS[need] for need in METRICS[condition.metric].needs if need not in available]
        if missing:
            raise EdgeError(f"condition {condition} needs {' and '.join(missing)}")


@dataclass(frozen=True)
class Verdict:
    """One condition with the figure it was held against."""

    condition: str
    value: float
    failed: bool

    def __str__(self) -> str:
        metric = parse_condition(self.condition).metric
        return f"{metric} is {METRICS[metric].show(self.value)} ({self.condition})"


def judge(conditions: Iterable[Condition], figures: Mapping[str, float]) -> tuple[Verdict, ...]:
    """Hold each condition against its figure; one without a figure fails."""
    held = ((condition, figures.get(condition.metric, math.nan)) for condition in conditions)
    return tuple(Verdict(str(condition), value, condition.fails(value)) for condition, value in held)
