"""How good is a bundle? Compared with a reference, token by token, or scored by the known answers of a suite.

`evaluate` measures and judges; `report` makes files of what it returns. What it returns is what these files hold.
"""

from __future__ import annotations

from .cases import SUITES, Case, QuestionSettings, read_cases
from .compare import AnswerPair, Comparison, compare
from .divergence import DivergenceSummary
from .evaluator import EvaluationResult, EvaluationSettings, evaluate
from .metrics import SCORES, Estimate
from .reference import reference_bundle
from .suite import MetricResult, Mistake, Suite, SuiteResult, read_suite, run_suite

__all__ = [
    "SCORES",
    "SUITES",
    "AnswerPair",
    "Case",
    "Comparison",
    "DivergenceSummary",
    "Estimate",
    "EvaluationResult",
    "EvaluationSettings",
    "MetricResult",
    "Mistake",
    "QuestionSettings",
    "Suite",
    "SuiteResult",
    "compare",
    "evaluate",
    "read_cases",
    "read_suite",
    "reference_bundle",
    "run_suite",
]
