"""Count how many of a bundle's answers to a suite are exactly right, per task, beside those of a reference."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from internvl_edge.base.progress import SILENT, Advance, Progress
from internvl_edge.base.run_record import RunRecord, run_record
from internvl_edge.runtime.model import InternVL

from .cases import SUITES, QuestionSettings
from .compare import Load


@dataclass(frozen=True)
class TaskResult:
    """One kind of question.

    Attributes:
        asked: how many questions.
        exact_match: share of exact answers, from 0 to 1.
        reference: the same of the reference; None where no reference was asked.
    """

    asked: int
    exact_match: float
    reference: float | None = None


@dataclass(frozen=True)
class Mistake:
    """A question that was not answered exactly."""

    case: str
    expected: str
    answered: str


@dataclass(frozen=True)
class SuiteResult:
    """What asking a suite's questions found.

    Attributes:
        settings: which questions were asked; `data` is the suite's name.
        total: over all tasks.
        tasks: each by itself.
        mistakes: every answer of the bundle that is not exact.
        run: of the whole suite, the reference's answers included.
    """

    settings: QuestionSettings
    total: TaskResult
    tasks: dict[str, TaskResult]
    mistakes: tuple[Mistake, ...]
    run: RunRecord

    @property
    def figures(self) -> dict[str, float]:
        """The figures that conditions may name, by `gate.METRICS`."""
        figures = {"exact_match": self.total.exact_match}
        if self.total.reference is not None:
            figures["exact_match_loss"] = self.total.reference - self.total.exact_match
        return figures


def run_suite(
    load_candidate: Load,
    settings: QuestionSettings,
    questions: int,
    load_reference: Load | None = None,
    progress: Progress = SILENT,
) -> SuiteResult:
    """Ask every question and compare whole answers, character for character after stripping.

    Args:
        load_candidate, load_reference: load a model; the candidate is closed before the reference is loaded.
        settings: the suite, by its name in `SUITES` (`data`), its seed, and the limits of each question.
        questions: how many.
        progress: shows the answers so far.

    Raises:
        EdgeError: as `InternVL.chat`.
    """
    started = time.perf_counter()
    loads = [load_candidate] if load_reference is None else [load_candidate, load_reference]
    found = []
    for load, who in zip(loads, ("bundle", "reference"), strict=False):
        label = f"answering the suite with the {who}"
        with progress.phase(label, questions, "questions") as advance, load() as model:
            found.append(_ask(model, settings, questions, advance))
    right, mistakes = found[0]
    reference = found[1][0] if load_reference else {}
    return SuiteResult(
        settings=settings,
        total=_task_result(_all(right), _all(reference)),
        tasks={task: _task_result(right[task], reference.get(task)) for task in sorted(right)},
        mistakes=tuple(mistakes),
        run=run_record(time.perf_counter() - started),
    )


def _ask(
    model: InternVL, settings: QuestionSettings, questions: int, advance: Advance
) -> tuple[dict[str, list[bool]], list[Mistake]]:
    """Return whether each answer is right, by task, and what was answered where it is not."""
    right: dict[str, list[bool]] = {}
    mistakes = []
    for case in itertools.islice(SUITES[settings.data](settings.seed), questions):
        text = model.chat(case.question, list(case.images), **settings.options).text
        exact = text == case.answer.strip()
        right.setdefault(case.task, []).append(exact)
        if not exact:
            mistakes.append(Mistake(case.name, case.answer, text))
        advance(1)
    return right, mistakes


def _all(right: dict[str, list[bool]]) -> list[bool]:
    return [answer for answers in right.values() for answer in answers]


def _task_result(right: list[bool], reference: list[bool] | None) -> TaskResult:
    return TaskResult(len(right), _share(right), _share(reference) if reference else None)


def _share(right: list[bool]) -> float:
    return sum(right) / max(1, len(right))
