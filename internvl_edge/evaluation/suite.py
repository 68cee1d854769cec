"""Ask a bundle the questions of a suite and score its answers, in all and per tag, beside those of a reference.

Questions are asked as a batch: several at a time, with a journal of answers, so that an interrupted suite continues.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.folders import scratch_folder
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.run_record import RunRecord, run_record
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import answering_record, open_journal, rows_of
from internvl_edge.batch.run import run
from internvl_edge.bundle.manifest import Manifest

from .cases import SUITES, Case, QuestionSettings
from .compare import Load
from .metrics import SCORES, Estimate, bootstrap, estimate
from .suite_files import read_suite_file

_BUILT_IN_QUESTIONS = 500
_ANSWERS = "answers-"


@dataclass(frozen=True)
class Suite:
    """Questions with known answers.

    Attributes:
        name: for people and for the manifest: a built-in suite's name, or that of the file.
        cases: the questions.
        metric: by which answers are mainly judged; the others are computed as well.
    """

    name: str
    cases: Sequence[Case]
    metric: str

    @property
    def metrics(self) -> list[str]:
        """List the metrics of `SCORES` that apply to any of the questions, the main one first."""
        there = [name for name, score in SCORES.items() if any(map(score.applies, self.cases))]
        return sorted(there, key=lambda name: name != self.metric)


@dataclass(frozen=True)
class MetricResult:
    """One metric over some questions.

    Attributes:
        asked: how many questions were scored.
        bundle: mean score of the bundle's answers, from 0 to 1.
        reference: the same of the reference; None where no reference was asked.
        loss: mean of the reference's score less the bundle's, question by question.
    """

    asked: int
    bundle: Estimate
    reference: Estimate | None = None
    loss: Estimate | None = None


@dataclass(frozen=True)
class Mistake:
    """An answer of the bundle whose score by the main metric is below 1; `expected` is the first of the right ones."""

    case: str
    expected: str
    answered: str


@dataclass(frozen=True)
class SuiteResult:
    """What asking a suite's questions found.

    Attributes:
        settings: which questions were asked; `data` is the suite's name.
        metric: the main one, by which mistakes are told.
        asked: how many questions.
        total: every metric over all questions, by name, the main one first.
        tags: the same over the questions of each tag. A question counts for each of its tags.
        mistakes: every answer of the bundle that is not right.
        run: of the whole suite, the reference's answers included.
    """

    settings: QuestionSettings
    metric: str
    asked: int
    total: dict[str, MetricResult]
    run: RunRecord
    tags: dict[str, dict[str, MetricResult]] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """The figures that conditions may name, by `gate.METRICS`."""
        figures = {name: result.bundle.value for name, result in self.total.items()}
        return figures | {f"{name}_loss": result.loss.value for name, result in self.total.items() if result.loss}


def read_suite(
    name: str,
    count: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    images: Path | None = None,
) -> Suite:
    """Read a suite.

    Args:
        name: one in `SUITES`, or a file that `read_suite_file` reads.
        count: how many questions; None is 500 of a built-in suite, and all of a file.
        seed: which questions.
        metric: the main metric, by its name in `SCORES`; None is the usual one of the file's format.
        images: folder of the images of a file.

    Raises:
        EdgeError: neither a suite nor a file, a metric that does not apply, or what `read_suite_file` refuses.
    """
    if name in SUITES:
        cases = list(itertools.islice(SUITES[name](seed), count or _BUILT_IN_QUESTIONS))
        suite = Suite(name, cases, metric or "exact_match")
    else:
        cases, usual = read_suite_file(Path(name), images, count, seed)
        suite = Suite(Path(name).name, cases, metric or usual)
    if suite.metric not in suite.metrics:
        raise EdgeError(f"--metric {suite.metric} cannot judge {name}: no question has choices; take another metric")
    return suite


def run_suite(
    load_candidate: Load,
    suite: Suite,
    settings: QuestionSettings,
    load_reference: Load | None = None,
    progress: Progress = SILENT,
    kept: Mapping[str, Path] | None = None,
) -> SuiteResult:
    """Ask every question, and score each answer by every metric that applies.

    Args:
        load_candidate, load_reference: load a model; the candidate is closed before the reference is loaded.
        suite: the questions.
        settings: the limits of each question.
        progress: shows the answers so far.
        kept: journals of the answers of "bundle" and of "reference" (see `answers_path`), where answers that are
            finished are not asked again. Without them, an interrupted suite begins anew.

    Raises:
        EdgeError: as `InternVL.chat`; the message names the question.
    """
    started = time.perf_counter()
    loads = [load_candidate] if load_reference is None else [load_candidate, load_reference]
    items = [_item(case, settings) for case in suite.cases]
    with scratch_folder("suite") as scratch:
        found = [
            _ask(load, items, who, (kept or {}).get(who, scratch / f"{who}.jsonl"), progress)
            for load, who in zip(loads, ("bundle", "reference"), strict=False)
        ]
    answers, reference = found[0], found[1] if load_reference else None
    return SuiteResult(
        settings=settings,
        metric=suite.metric,
        asked=len(suite.cases),
        total=_results(suite, range(len(suite.cases)), answers, reference),
        tags={tag: _results(suite, places, answers, reference) for tag, places in _tagged(suite.cases).items()},
        mistakes=tuple(_mistakes(suite, answers)),
        run=run_record(time.perf_counter() - started),
    )


def answers_path(
    folder: Path, who: str, manifest: Manifest, engine: Mapping[str, Any], suite: Suite, settings: QuestionSettings
) -> Path:
    """Name the journal of answers of a bundle to a suite.

    The name holds a digest of everything that decides the answers: the bundle's files, what computes, the versions of
    packages, the questions, and the size and time of each image. Answers to anything else are never continued.

    Args:
        folder: where journals are.
        who: "bundle" or "reference".
        manifest: of the bundle.
        engine: what computes its answers, as values of JSON.
        suite, settings: the questions.
    """
    record = answering_record(manifest, engine, Ask()) | {"seed": settings.seed}
    requests = [[_item(case, settings).request, *map(_state, case.images)] for case in suite.cases]
    digest = hashlib.blake2b(json.dumps([record, requests], sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder / f"{_ANSWERS}{who}-{digest}.jsonl"


def remove_answers(folder: Path) -> None:
    """Remove the journals in a folder, when what was made of them is stored."""
    for path in folder.glob(f"{_ANSWERS}*.jsonl*"):
        path.unlink(missing_ok=True)


def _state(image: Path | Image.Image) -> list[int]:
    """Return what shows that an image is another one than before."""
    if not isinstance(image, Path):
        return []
    status = image.stat()
    return [status.st_size, status.st_mtime_ns]


def _item(case: Case, settings: QuestionSettings) -> Item:
    """Return a question as one of a batch."""
    options = {name: value for name, value in case.options(settings.options).items() if value not in (None, ())}
    names = tuple(
        str(image) if isinstance(image, Path) else f"{settings.data} {settings.seed} {case.name} {number}"
        for number, image in enumerate(case.images)
    )
    return Item(case.name, case.name, Ask(case.question, options=options), case.images, names)


def _ask(load: Load, items: list[Item], who: str, path: Path, progress: Progress) -> list[str]:
    """Return the text of each answer, from a journal or from a model."""
    label = f"answering the suite with the {who}"
    with open_journal(path, {"suite": who}, other="choose another --report") as journal:
        journal.drop_failed()
        if journal.finished:
            progress.remark(f"{len(journal.finished)} answers of an interrupted evaluation are kept")
        run(load, items, journal, max_errors=0, progress=progress, label=label, unit="questions")
        answered = {row["id"]: row for _, row in rows_of(path)}
    for item in items:
        if (row := answered.get(item.id)) and row["error"] is not None:
            raise EdgeError(f"{item.id}: {row['error']}; mend it and repeat the command, which keeps the other answers")
    return [answered[item.id]["answer"] for item in items]


def _tagged(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Return the places of the questions of each tag."""
    places: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        for tag in dict.fromkeys(case.tags):
            places.setdefault(tag, []).append(place)
    return dict(sorted(places.items()))


def _results(
    suite: Suite, places: Sequence[int], answers: Sequence[str], reference: Sequence[str] | None
) -> dict[str, MetricResult]:
    """Return each metric over the questions at some places."""
    results = {}
    for name in suite.metrics:
        score = SCORES[name]
        scored = [place for place in places if score.applies(suite.cases[place])]
        if not scored:
            continue
        ours = [score.of(answers[place], suite.cases[place]) for place in scored]
        mean = estimate(ours, score.is_binary)
        if reference is None:
            results[name] = MetricResult(len(scored), mean)
            continue
        theirs = [score.of(reference[place], suite.cases[place]) for place in scored]
        loss = bootstrap([their - our for their, our in zip(theirs, ours, strict=True)])
        results[name] = MetricResult(len(scored), mean, estimate(theirs, score.is_binary), loss)
    return results


def _mistakes(suite: Suite, answers: Sequence[str]) -> list[Mistake]:
    score = SCORES[suite.metric]
    pairs = zip(suite.cases, answers, strict=True)
    return [
        Mistake(case.name, case.answer, answer)
        for case, answer in pairs
        if score.applies(case) and score.of(answer, case) < 1
    ]
