"""How good is a bundle? Compared with a reference, token by token, or judged by the exact answers of a suite.

`evaluate` measures and judges; `report` makes files of what it returns. What it returns is what these files hold.
"""

from __future__ import annotations

from .cases import SUITES, Case, QuestionSettings, read_cases
from .compare import AnswerPair, Comparison, compare
from .divergence import DivergenceSummary
from .evaluator import EvaluationResult, EvaluationSettings, evaluate
from .reference import reference_bundle
from .suite import Mistake, SuiteResult, TaskResult, run_suite

__all__ = [
    "SUITES",
    "AnswerPair",
    "Case",
    "Comparison",
    "DivergenceSummary",
    "EvaluationResult",
    "EvaluationSettings",
    "Mistake",
    "QuestionSettings",
    "SuiteResult",
    "TaskResult",
    "compare",
    "evaluate",
    "read_cases",
    "reference_bundle",
    "run_suite",
]
