"""How good is a bundle? Compared with a reference, token by token, or judged by the exact answers of a suite.

Uses the runtime and nothing of how a bundle was made; only a reference that is still a checkpoint is exported first.
"""

from __future__ import annotations

from .cases import SUITES, Case, read_cases
from .compare import Answered, Comparison, compare
from .reference import reference_bundle
from .suite import SuiteScore, run_suite

__all__ = [
    "SUITES",
    "Answered",
    "Case",
    "Comparison",
    "SuiteScore",
    "compare",
    "read_cases",
    "reference_bundle",
    "run_suite",
]
