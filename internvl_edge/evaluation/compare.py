"""Compare a bundle with a reference: both see the same questions, and the bundle follows the reference's answers.

One model is in memory at a time: the reference answers first, its logits wait in a temporary folder. Both run as they
would answer a user, each with its own vision tower, decoding one token at a time.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.folders import scratch_folder
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.run_record import RunRecord, run_record
from internvl_edge.model.preprocess import load_image
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.options import ChatOptions
from internvl_edge.runtime.trace import Trace

from .cases import Case, QuestionSettings
from .divergence import Divergence, DivergenceSummary, Histogram, divergence, histogram, summarize

Load = Callable[[], InternVL]
# Phases of the progress that `compare` shows.
COMPARISON_PHASES = 2

# Small pictures of a question: at most so many, so many pixels wide or high, in this JPEG quality.
_PICTURES = 3
_PICTURE_SIDE = 480
_PICTURE_QUALITY = 78


@dataclass(frozen=True)
class AnswerPair:
    """One question with what both models answered, each by itself.

    Attributes:
        name: of the case.
        question: with its `<image>` marks.
        pictures: small JPEG images as `data:` addresses, at most three.
        reference, candidate: the answers.
        expected: the right answer, "" where none is known.
        kl: mean divergence along the reference's answer, nats.
        same: whether the answers are the same, token for token.
    """

    name: str
    question: str
    pictures: tuple[str, ...]
    reference: str
    candidate: str
    expected: str
    kl: float
    same: bool


@dataclass(frozen=True)
class Comparison:
    """What comparing two models found; shares are from 0 to 1.

    Attributes:
        reference: name of what the bundle was compared with, for people.
        settings: which questions were asked.
        cases: how many.
        image_tokens: of all prompts.
        greedy: figures along the reference's greedy answers.
        kinds: the same apart for questions with pictures ("images") and without ("text"), where there are any.
        same_answers: share of answers that are the same, token for token, when both decode greedily.
        same_prefix: share of all answered tokens that come before the first difference of their answer.
        answers: figures along the given answers (perplexity among them); None where the data has none.
        worst_case: name of the case with the largest divergence at a token.
        histogram: of the divergence at each token of the greedy answers.
        samples: some cases with both answers: first those that differ, then the worst and evenly spaced others.
        run: of the whole comparison.
    """

    reference: str
    settings: QuestionSettings
    cases: int
    image_tokens: int
    greedy: DivergenceSummary
    kinds: dict[str, DivergenceSummary]
    same_answers: float
    same_prefix: float
    answers: DivergenceSummary | None
    worst_case: str
    histogram: Histogram
    samples: tuple[AnswerPair, ...]
    run: RunRecord

    @property
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
        if self.answers and self.answers.has_perplexity:
            figures["perplexity_ratio"] = self.answers.candidate_perplexity / self.answers.reference_perplexity
        return figures


def compare(
    load_candidate: Load,
    load_reference: Load,
    cases: Sequence[Case],
    settings: QuestionSettings,
    progress: Progress = SILENT,
    *,
    reference: str = "",
    shown: int = 0,
) -> Comparison:
    """Ask both models all cases.

    Args:
        load_candidate, load_reference: load a model; each is closed before the other is loaded.
        cases: at least one.
        settings: the limits of each, and what the comparison says of them.
        progress: shows the answers so far.
        reference: its name, for people.
        shown: of how many cases both answers are kept as samples.

    Raises:
        EdgeError: no cases, or models whose prompts differ (another tokenizer, template or tile size).
    """
    if not cases:
        raise EdgeError("there are no cases to compare with; give --samples 1 or more")
    started, total, options = time.perf_counter(), len(cases), settings.options
    expected: list[_ReferenceAnswer] = []
    followed: list[_CandidateAnswer] = []
    with scratch_folder("logits") as folder:
        store = _LogitStore(folder)
        answering = progress.phase("answering with the reference", total, "questions")
        with answering as advance, load_reference() as model:
            for index, case in enumerate(cases):
                expected.append(_ask(model, case, options, store, index))
                advance(1)
        answering = progress.phase("answering with the bundle", total, "questions")
        with answering as advance, load_candidate() as model:
            for index, case in enumerate(cases):
                followed.append(_follow(model, case, options, store, index, expected[index]))
                advance(1)
            samples = [
                _sample(model, cases[index], options, expected[index], followed[index])
                for index in _chosen(cases, followed, shown)
            ]
    run = run_record(time.perf_counter() - started)
    return _joined(reference, settings, cases, followed, samples, run)


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


@dataclass(frozen=True)
class _ReferenceAnswer:
    """What the reference said to one case, for the candidate to follow."""

    prompt_ids: list[int]
    greedy: list[int]
    answer: list[int]
    text: str


@dataclass(frozen=True)
class _CandidateAnswer:
    """How the candidate followed the reference in one case."""

    greedy: Divergence
    answer: Divergence | None
    image_tokens: int


def _ask(model: InternVL, case: Case, options: ChatOptions, store: _LogitStore, index: int) -> _ReferenceAnswer:
    trace = _trace(model, case, None, options)
    store.put(index, "greedy", trace.logits)
    answer = model.answer_ids(case.answer) if case.answer else []
    if answer:
        store.put(index, "answer", _trace(model, case, answer, options).logits)
    return _ReferenceAnswer(trace.reply.prompt_ids, trace.reply.output_ids, answer, trace.reply.text)


def _follow(
    model: InternVL, case: Case, options: ChatOptions, store: _LogitStore, index: int, expected: _ReferenceAnswer
) -> _CandidateAnswer:
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
    return _CandidateAnswer(greedy, answer, trace.reply.image_tokens)


def _chosen(cases: Sequence[Case], followed: Sequence[_CandidateAnswer], count: int) -> list[int]:
    """Choose the cases to show. Cases whose answers differ come first, of these pictures and large divergences.

    What is left of `count` goes to the others with pictures (to all others, without any): the one with the largest
    divergence, and evenly spaced ones.
    """
    divergences = [float(part.greedy.kl.mean()) for part in followed]
    different = [index for index, part in enumerate(followed) if not part.greedy.same_answer]
    different = sorted(different, key=lambda index: (not cases[index].images, -divergences[index]))[:count]
    same = [index for index in range(len(cases)) if index not in different]
    pool = [index for index in same if cases[index].images] or same
    left = count - len(different)
    if not left or not pool:
        return different
    worst = max(pool, key=lambda index: divergences[index])
    others = [index for index in pool if index != worst]
    step = max(1.0, len(others) / max(1, left - 1))
    return [*different, *sorted([worst, *(others[int(n * step)] for n in range(min(left - 1, len(others))))])]


def _sample(
    model: InternVL, case: Case, options: ChatOptions, expected: _ReferenceAnswer, followed: _CandidateAnswer
) -> AnswerPair:
    """Let the candidate answer by itself; where every most probable token was the reference's, that is its answer."""
    same = followed.greedy.same_answer
    return AnswerPair(
        name=case.name,
        question=case.question,
        pictures=tuple(small_picture(image) for image in case.images[:_PICTURES]),
        reference=expected.text,
        candidate=expected.text if same else model.chat(case.question, list(case.images), **case.options(options)).text,
        expected=case.answer,
        kl=float(followed.greedy.kl.mean()),
        same=same,
    )


def small_picture(source: Path | Image.Image) -> str:
    """Encode a small JPEG of a picture as a `data:` address."""
    picture = load_image(source).convert("RGB")
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_PICTURE_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _trace(model: InternVL, case: Case, answer: list[int] | None, options: ChatOptions) -> Trace:
    try:
        return model.trace(case.question, list(case.images), answer, **case.options(options))
    except EdgeError as error:
        raise EdgeError(f"{case.name}: {error}") from None


def _joined(
    reference: str,
    settings: QuestionSettings,
    cases: Sequence[Case],
    followed: Sequence[_CandidateAnswer],
    samples: Sequence[AnswerPair],
    run: RunRecord,
) -> Comparison:
    greedy = [part.greedy for part in followed]
    answers = [part.answer for part in followed if part.answer is not None]
    worst = max(range(len(greedy)), key=lambda index: greedy[index].kl.max())
    kinds: dict[str, list[Divergence]] = {}
    for case, part in zip(cases, greedy, strict=True):
        kinds.setdefault("images" if case.images else "text", []).append(part)
    return Comparison(
        reference=reference,
        settings=settings,
        cases=len(cases),
        image_tokens=sum(part.image_tokens for part in followed),
        greedy=summarize(greedy),
        kinds={kind: summarize(parts) for kind, parts in kinds.items()},
        same_answers=sum(part.same_answer for part in greedy) / len(greedy),
        same_prefix=sum(part.same_prefix for part in greedy) / sum(len(part.kl) for part in greedy),
        answers=summarize(answers) if answers else None,
        worst_case=cases[worst].name,
        histogram=histogram(np.concatenate([part.kl for part in greedy])),
        samples=tuple(samples),
        run=run,
    )
