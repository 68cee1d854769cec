"""A bundle against a reference: both see the same questions, and the candidate follows the reference's greedy answers.

One model is in memory at a time: the reference answers first, its logits wait in a temporary folder. Both run as they
would answer a user, each with its own vision tower, decoding one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.folders import scratch_folder
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import ChatOptions
from internvl_edge.runtime.trace import Trace

from .cases import Case
from .divergence import Divergence, Summary, divergence, summarise

Load = Callable[[], InternVL]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Answered:
    """One case with what both models answered, each by itself.

    Attributes:
        reference, candidate: the texts.
        kl: mean divergence along the reference's answer, nats.
        same: whether the answers are the same, token for token.
    """

    case: Case
    reference: str
    candidate: str
    kl: float
    same: bool


@dataclass(frozen=True)
class Comparison:
    """What comparing two models found.

    Attributes:
        cases: how many questions.
        image_tokens: of all prompts.
        greedy: figures along the reference's greedy answers.
        kinds: the same apart for questions with pictures ("images") and without ("text"), where there are any.
        kl: [positions] divergence at each of these tokens, nats.
        same_answers: share of answers that are the same, token for token, when both decode greedily.
        same_prefix: share of all answered tokens that come before the first difference of their answer.
        answers: figures along the given answers (perplexity among them); None where the data has none.
        worst: name of the case with the largest divergence.
        answered: some cases with both answers: the worst, and others at even distances, pictures first.
    """

    cases: int
    image_tokens: int
    greedy: Summary
    kinds: dict[str, Summary]
    kl: NDArray[np.float64]
    same_answers: float
    same_prefix: float
    answers: Summary | None
    worst: str
    answered: tuple[Answered, ...] = ()

    def figures(self) -> dict[str, float]:
        """The figures that conditions may name, by `gate.METRICS`."""
        figures = {
            "kl": self.greedy.kl_mean,
            "kl_p99": self.greedy.kl_p99,
            "kl_max": self.greedy.kl_max,
            "top1": self.greedy.top1_agreement,
            "same_answers": self.same_answers,
            "same_tokens": self.same_prefix,
        }
        if self.answers:
            figures["perplexity_ratio"] = self.answers.candidate_perplexity / self.answers.reference_perplexity
        return figures

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "cases": self.cases,
            "image_tokens": self.image_tokens,
            "greedy": self.greedy.to_dict(),
            "kinds": {kind: summary.to_dict() for kind, summary in self.kinds.items()},
            "same_answers": self.same_answers,
            "same_prefix": self.same_prefix,
            "answers": self.answers.to_dict() if self.answers else None,
            "worst_case": self.worst,
        }


@dataclass(frozen=True)
class _Expected:
    """What the reference said to one case, for the candidate to follow."""

    prompt_ids: list[int]
    greedy: list[int]
    answer: list[int]
    text: str


def compare(
    load_candidate: Load,
    load_reference: Load,
    cases: Sequence[Case],
    options: ChatOptions,
    progress: Progress = lambda done: None,
    shown: int = 0,
) -> Comparison:
    """Ask both models all cases.

    Args:
        load_candidate, load_reference: load a model; each is closed before the other is loaded.
        cases: at least one.
        options: `max_tiles` and `max_new_tokens` of every question.
        progress: called with 1 for each case and model.
        shown: of how many cases both answers are kept as texts.

    Raises:
        EdgeError: no cases, or models whose prompts differ (another tokenizer, template or tile size).
    """
    if not cases:
        raise EdgeError("there are no cases to compare with; give --samples 1 or more")
    with scratch_folder("logits") as folder:
        store = _LogitStore(folder)
        with load_reference() as model:
            expected = [_ask(model, case, options, store, index, progress) for index, case in enumerate(cases)]
        with load_candidate() as model:
            found = [
                _follow(model, case, options, store, index, expected[index], progress)
                for index, case in enumerate(cases)
            ]
            answered = [
                _answered(model, cases[index], options, expected[index], found[index])
                for index in _chosen(cases, found, shown)
            ]
    return _joined(cases, found, answered)


class _LogitStore:
    """Logits of the reference on disk, by case and kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, index: int, kind: str, logits: NDArray[np.float32]) -> None:
        try:
            np.save(self._folder / f"{index}-{kind}.npy", logits)
        except OSError as error:
            raise EdgeError(
                f"cannot keep the reference's logits in {self._folder.parent} ({error.strerror or error}), which take "
                f"{logits.nbytes / 1e6:.0f} MB a case; set TMPDIR to a folder with more room or give fewer --samples"
            ) from None

    def take(self, index: int, kind: str) -> NDArray[np.float32]:
        """Read once; the file is removed."""
        path = self._folder / f"{index}-{kind}.npy"
        logits: NDArray[np.float32] = np.load(path)
        path.unlink()
        return logits


def _ask(
    model: InternVL, case: Case, options: ChatOptions, store: _LogitStore, index: int, progress: Progress
) -> _Expected:
    trace = _trace(model, case, None, options)
    store.put(index, "greedy", trace.logits)
    answer = model.answer_ids(case.answer) if case.answer else []
    if answer:
        store.put(index, "answer", _trace(model, case, answer, options).logits)
    progress(1)
    return _Expected(trace.reply.prompt_ids, trace.reply.output_ids, answer, trace.reply.text)


@dataclass(frozen=True)
class _Found:
    """One case as the candidate took it."""

    greedy: Divergence
    answer: Divergence | None
    image_tokens: int


def _follow(
    model: InternVL,
    case: Case,
    options: ChatOptions,
    store: _LogitStore,
    index: int,
    expected: _Expected,
    progress: Progress,
) -> _Found:
    trace = _trace(model, case, expected.greedy, options)
    if trace.reply.prompt_ids != expected.prompt_ids:
        raise EdgeError(
            f"{case.name}: {len(trace.reply.prompt_ids)} prompt tokens, the reference has others "
            f"({len(expected.prompt_ids)}); compare bundles of the same model"
        )
    greedy = divergence(store.take(index, "greedy"), trace.logits, expected.greedy)
    answer = None
    if expected.answer:
        logits = _trace(model, case, expected.answer, options).logits
        answer = divergence(store.take(index, "answer"), logits, expected.answer)
    progress(1)
    return _Found(greedy, answer, trace.reply.image_tokens)


def _chosen(cases: Sequence[Case], found: Sequence[_Found], count: int) -> list[int]:
    """Indices of the cases to show: of those with pictures (of all, without any) the worst and evenly spaced ones."""
    pool = [index for index, case in enumerate(cases) if case.images] or list(range(len(cases)))
    if not count:
        return []
    worst = max(pool, key=lambda index: found[index].greedy.kl.mean())
    others = [index for index in pool if index != worst]
    step = max(1.0, len(others) / max(1, count - 1))
    return sorted([worst, *(others[int(n * step)] for n in range(min(count - 1, len(others))))])


def _answered(model: InternVL, case: Case, options: ChatOptions, expected: _Expected, found: _Found) -> Answered:
    """What the candidate says by itself; where every most probable token was the reference's, that is its answer."""
    same = found.greedy.same_prefix == len(found.greedy.kl)
    text = expected.text if same else model.chat(case.question, list(case.images), **options).text
    return Answered(case, expected.text, text, float(found.greedy.kl.mean()), same)


def _trace(model: InternVL, case: Case, answer: list[int] | None, options: ChatOptions) -> Trace:
    try:
        return model.trace(case.question, list(case.images), answer, **options)
    except EdgeError as error:
        raise EdgeError(f"{case.name}: {error}") from None


def _joined(cases: Sequence[Case], found: list[_Found], answered: list[Answered]) -> Comparison:
    greedy = [part.greedy for part in found]
    answers = [part.answer for part in found if part.answer is not None]
    worst = max(range(len(found)), key=lambda index: greedy[index].kl.max())
    kinds: dict[str, list[Divergence]] = {}
    for case, part in zip(cases, greedy, strict=True):
        kinds.setdefault("images" if case.images else "text", []).append(part)
    return Comparison(
        cases=len(cases),
        image_tokens=sum(part.image_tokens for part in found),
        greedy=summarise(greedy),
        kinds={kind: summarise(parts) for kind, parts in kinds.items()},
        kl=np.concatenate([part.kl for part in greedy]),
        same_answers=sum(part.same_prefix == len(part.kl) for part in greedy) / len(greedy),
        same_prefix=sum(part.same_prefix for part in greedy) / sum(len(part.kl) for part in greedy),
        answers=summarise(answers) if answers else None,
        worst=cases[worst].name,
        answered=tuple(answered),
    )
