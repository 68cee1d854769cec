"""A bundle against a suite: how many answers are exactly right, per task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import ChatOptions

from .cases import Case


@dataclass(frozen=True)
class SuiteScore:
    """Right answers of a suite.

    Attributes:
        asked, right: questions and exact answers per task.
        wrong: (case, expected, answered) of every other answer.
    """

    asked: dict[str, int]
    right: dict[str, int]
    wrong: tuple[tuple[str, str, str], ...]

    @property
    def total(self) -> float:
        """Share of exact answers over all questions."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    def share(self, task: str) -> float:
        """Share of exact answers of one task."""
        return self.right.get(task, 0) / self.asked[task]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "exact_match": self.total,
            "asked": sum(self.asked.values()),
            "tasks": {task: {"asked": count, "exact_match": self.share(task)} for task, count in self.asked.items()},
            "wrong": [dict(zip(("case", "expected", "answered"), entry, strict=True)) for entry in self.wrong],
        }


def run_suite(
    model: InternVL, cases: Iterable[Case], options: ChatOptions, progress: Callable[[int], object] = lambda done: None
) -> SuiteScore:
    """Ask every case and compare whole answers, character for character after stripping.

    Raises:
        EdgeError: as `InternVL.chat`.
    """
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong = []
    for case in cases:
        text = model.chat(case.question, list(case.images), **options).text
        asked[case.task] += 1
        if text == case.answer.strip():
            right[case.task] += 1
        else:
            wrong.append((case.name, case.answer, text))
        progress(1)
    tasks = sorted(asked)
    return SuiteScore({task: asked[task] for task in tasks}, {task: right[task] for task in tasks}, tuple(wrong))
