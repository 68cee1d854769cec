"""Evaluate a bundle: compare it with a reference, ask it a suite, or both, and hold the figures against the gate.

This module writes nothing. It uses the runtime and nothing of how a bundle was made; only a reference that is still a
checkpoint is exported first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from internvl_edge.base.errors import EdgeError, QualityWarning
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.progress import SILENT, Progress, as_progress
from internvl_edge.base.text import shown
from internvl_edge.batch.run import ROWS
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.gate import METRICS, Condition, Verdict, parse_condition, require_measurable
from internvl_edge.bundle.manifest import Manifest, is_bundle
from internvl_edge.bundle.quality import Measurement, Quality
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import MOST_ROWS, InternVL

from .cases import SUITES, Case, QuestionSettings, read_cases
from .compare import COMPARISON_PHASES, Comparison, compare
from .metrics import SCORES
from .reference import REFERENCE_PHASES, reference_bundle
from .suite import Suite, SuiteResult, answers_path, read_suite, run_suite

_CASES = 32
_ANSWER_TOKENS = 64
_SUITE_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of a bundle, and how its answers are computed.

    Attributes:
        bundle: its folder, or a hub id.
        reference: what to compare it with: a checkpoint or a bundle (folder or hub id); None compares with nothing.
        suite: questions with known answers, which are scored: a name in `SUITES`, or a file of one of the formats in
            `suite_files.FORMATS`; None asks no suite.
        images: folder of the images of a suite's file; None is where the format usually has them.
        metric: the metric in `SCORES` by which a suite is mainly judged; None is the usual one of its format.
        rows: how many answers to a suite are computed together on a CPU.
        answers: a folder, made where it is missing, that keeps the answers to a suite, so that an interrupted
            evaluation continues; `suite.remove_answers` removes them. None keeps none.
        data: a folder of images or a JSON Lines file to compare on; None is the built-in set.
        samples: how many questions; None is 32 for the comparison, 500 for a built-in suite, and all of a file.
        seed: which questions, and in which order.
        max_tiles: most tiles of an image; None is the checkpoint's own limit.
        max_new_tokens: most tokens of an answer; None is 64 for the comparison and 256 for a suite.
        fail_if: conditions, such as "kl>0.05", of which none may hold.
        replace_recorded: whether figures may replace recorded ones that come from more questions, longer answers or
            other settings.
        shown: of how many questions the comparison keeps both answers and small pictures.
        device, engine, dialect, context, threads, exact: as `InternVL.load` takes them. Where device and engine are
            "auto", they are ONNX Runtime on the CPU: figures are about the bundle, not about what this machine has.
        revision, reference_revision: branch, tag or commit of a hub id in `bundle` and in `reference`; None is its main
            branch.

    Raises:
        EdgeError: a suite or a metric that is not known, or settings that do not fit together.
    """

    bundle: str | Path
    reference: str | Path | None = None
    suite: str | None = None
    data: str | Path | None = None
    samples: int | None = None
    seed: int = 0
    max_tiles: int | None = None
    max_new_tokens: int | None = None
    fail_if: tuple[str, ...] = ()
    replace_recorded: bool = False
    shown: int = 6
    device: str = "auto"
    engine: str = "auto"
    dialect: str | None = None
    context: int | None = None
    threads: int | None = None
    revision: str | None = None
    reference_revision: str | None = None
    exact: bool = False
    images: str | Path | None = None
    metric: str | None = None
    rows: int = ROWS
    answers: str | Path | None = None

    def __post_init__(self) -> None:
        conditions = self.conditions
        if self.suite is not None and self.suite not in SUITES and not Path(self.suite).is_file():
            raise EdgeError(f"there is no suite {shown(self.suite)}; known are {', '.join(SUITES)}, or give a file")
        if self.images is not None and (self.suite is None or self.suite in SUITES):
            raise EdgeError("--images is the folder of the images of a suite's file; give a file as --suite")
        if self.metric is not None and self.suite is None:
            raise EdgeError("--metric chooses how a --suite is judged; give both or neither")
        if self.metric is not None and self.metric not in SCORES:
            raise EdgeError(f"there is no metric {shown(self.metric)} of a suite; known are {', '.join(SCORES)}")
        if self.reference is None and self.data is not None:
            raise EdgeError("--data is compared with a --reference; a --suite brings its own questions")
        if self.reference is None and self.suite is None and conditions:
            raise EdgeError("--fail-if needs figures; give --reference, --suite or both")
        if self.reference is None and self.reference_revision is not None:
            raise EdgeError("--reference-revision chooses a version of a hub id in --reference; give both or neither")
        if not 1 <= self.rows <= MOST_ROWS:
            raise EdgeError(f"rows is {self.rows}, expected 1 to {MOST_ROWS}")
        if self.samples is not None and self.samples < 1:
            raise EdgeError(f"samples is {self.samples}, expected at least 1")

    @property
    def compared_tokens(self) -> int:
        """The most tokens of an answer that are compared."""
        return self.max_new_tokens or _ANSWER_TOKENS

    @property
    def suite_tokens(self) -> int:
        """The most tokens of an answer to a suite."""
        return self.max_new_tokens or _SUITE_ANSWER_TOKENS

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Parse `fail_if`."""
        return tuple(map(parse_condition, self.fail_if))


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; shares are from 0 to 1, divergences in nats.

    Attributes:
        settings: what was measured.
        comparison, suite: what each found; None where it was not asked for.
        figures: what was just measured, by metric, as `gate.METRICS` names them.
        quality: of the bundle: these figures and earlier ones of the same files, and the verdicts of all conditions.
        replaced: (earlier, newer) conditions where one of the settings replaced a recorded one.
        dropped: recorded conditions that are gone, because the settings say `replace_recorded` and this run did not
            measure their figures.
    """

    settings: EvaluationSettings
    comparison: Comparison | None
    suite: SuiteResult | None
    figures: dict[str, float]
    quality: Quality
    replaced: list[tuple[Condition, Condition]]
    dropped: list[Condition]

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """List the conditions of the settings that were not met; `quality.failed` also holds earlier ones."""
        stated = {str(condition) for condition in self.settings.conditions}
        return tuple(verdict for verdict in self.quality.failed if verdict.condition in stated)


def evaluate(settings: EvaluationSettings, progress: bool | Progress = False) -> EvaluationResult:
    """Measure how good a bundle is.

        from internvl_edge import evaluate
        from internvl_edge.evaluation import EvaluationSettings
        result = evaluate(EvaluationSettings("bundle", reference="checkpoint", fail_if=("kl>0.05",)))
        print(result.figures["kl"], result.failed)

    With a reference, both models answer the same questions, the bundle follows the reference's greedy answers, and
    predictions (divergence in nats) and answers (shares from 0 to 1) are compared. With a suite, answers are compared
    with the right ones; with both, those of the reference too. Nothing is written: `quality_record.record_quality` puts
    `result.quality` into the manifest, and `report.bundle_report` and `report.write_report` make the report.

    Args:
        settings: what to measure. A bundle that cannot be loaded is found out before the reference is exported.
        progress: show the progress on standard error.

    Returns:
        The figures by metric, the comparison and the suite they come from, and the bundle's quality with the verdicts.

    Raises:
        EdgeError: neither reference nor suite, data that cannot be read, a condition on what is not measured, models
            with different prompts, a bundle, a reference or a device that is not usable, or figures that would replace
            recorded ones of a larger or another run; one line each.
    """
    if settings.reference is None and settings.suite is None:
        raise EdgeError("give --reference, a checkpoint or a bundle to compare with, or --suite, or both")
    if settings.engine == "auto" and settings.device in ("auto", "cpu"):
        settings = replace(settings, engine="onnxruntime")
    suite, cases = _read(settings)
    folder = find_bundle(settings.bundle, settings.revision, settings.device)
    settings = replace(settings, bundle=folder, revision=None)
    known = quality_of(Bundle.open(Path(settings.bundle)).manifest)
    if not settings.replace_recorded:
        _require_replaceable(settings, suite, cases, known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        comparison, answered = _measure(settings, suite, cases, as_progress(progress))
    figures = {**(comparison.figures if comparison else {}), **(answered.figures if answered else {})}
    runs = {"comparison": comparison, "suite": answered}
    dates = {kind: found.run.date for kind, found in runs.items() if found}
    measured = _measurements(settings, suite, cases, dates)
    quality = known.with_figures(figures, measured, settings.conditions, drop_unmeasured=settings.replace_recorded)
    return EvaluationResult(
        settings=settings,
        comparison=comparison,
        suite=answered,
        figures=figures,
        quality=quality,
        replaced=known.replaced(settings.conditions),
        dropped=[each for each in known.unmeasured(figures, measured) if each not in quality.conditions],
    )


def _read(settings: EvaluationSettings) -> tuple[Suite | None, list[Case]]:
    """Read the suite and the questions of the comparison, and refuse conditions on what will not be measured."""
    suite, cases = None, []
    if settings.suite is not None:
        images = None if settings.images is None else Path(settings.images)
        suite = read_suite(settings.suite, settings.samples, settings.seed, settings.metric, images)
    if settings.reference is not None:
        source = None if settings.data is None else Path(settings.data)
        cases = read_cases(source, settings.samples or _CASES, settings.seed)
    require_measurable(settings.conditions, _available(settings, suite, cases))
    return suite, cases


def _available(settings: EvaluationSettings, suite: Suite | None, cases: Sequence[Case]) -> list[str]:
    """List what there is to measure with, in the words of `Metric.needs`."""
    available = {
        "reference": settings.reference is not None,
        "suite": suite is not None,
        "choices": suite is not None and "choice_accuracy" in suite.metrics,
        "answers": any(case.answer for case in cases),
    }
    return [name for name, there in available.items() if there]


def _require_replaceable(
    settings: EvaluationSettings, suite: Suite | None, cases: Sequence[Case], known: Quality
) -> None:
    """Refuse to replace recorded figures by those of a run that says less, or that measures something else."""
    planned = _measurements(settings, suite, cases)
    advice = "pass --replace to replace them, or --no-record to look only"
    for kind, newer in planned.items():
        recorded = known.measured.get(kind)
        if recorded and (why := recorded.why_kept(newer)):
            raise EdgeError(f"{settings.bundle} has figures of {recorded}; {why}; {advice}")
    available = _available(settings, suite, cases)
    for condition in known.conditions:
        metric = METRICS[condition.metric]
        if metric.run in planned and not set(metric.needs) <= set(available):
            raise EdgeError(f"{settings.bundle} has the condition {condition}, which this run cannot measure; {advice}")


def _measure(
    settings: EvaluationSettings, suite: Suite | None, cases: Sequence[Case], progress: Progress
) -> tuple[Comparison | None, SuiteResult | None]:
    load_bundle = partial(_load_bundle, settings)
    progress.expect(_phases(settings))
    if settings.reference is None:
        return None, _ask_suite(settings, suite, None, progress) if suite else None
    with progress.phase("loading the bundle"), load_bundle(progress):
        pass  # whatever keeps it from being loaded is found out now, not after hours of the reference's answers
    with reference_bundle(str(settings.reference), progress, settings.reference_revision) as folder:
        load_reference = partial(_load_reference, settings, folder)
        answered = _ask_suite(settings, suite, folder, progress) if suite else None
        comparison = compare(
            load_bundle,
            load_reference,
            cases,
            QuestionSettings(_data_name(settings), settings.seed, settings.max_tiles, settings.compared_tokens),
            progress,
            reference=Path(settings.reference).name,
            shown=settings.shown,
        )
    return comparison, answered


def _ask_suite(settings: EvaluationSettings, suite: Suite, reference: Path | None, progress: Progress) -> SuiteResult:
    """Ask the bundle, and a reference where there is one. Several answers are computed together."""
    questions = QuestionSettings(suite.name, settings.seed, settings.max_tiles, settings.suite_tokens)
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and settings.engine != "auto")
    rows = settings.rows if on_cpu else 1
    several = {"several_rows": rows > 1}
    ours = {name: getattr(settings, name) for name in ("device", "engine", "dialect", "exact")} | several
    asked = {"bundle": (Path(settings.bundle), ours)}
    load_reference = None
    if reference is not None:
        asked["reference"] = (reference, {"several_rows": settings.rows > 1})
        load_reference = partial(_load_reference, settings, reference, settings.rows)
    if settings.answers is not None:
        with readable_disk_errors(Path(settings.answers), "make room", "give another --report, or --no-report"):
            Path(settings.answers).mkdir(parents=True, exist_ok=True)
    kept = {
        who: answers_path(Path(settings.answers), who, Manifest.read(folder), engine, suite, questions)
        for who, (folder, engine) in asked.items()
        if settings.answers is not None
    }
    load = partial(_load_bundle, settings, rows=rows, prompts_first=True)
    return run_suite(load, suite, questions, load_reference, progress, kept)


def _phases(settings: EvaluationSettings) -> int:
    """The number of phases that the progress shows."""
    if settings.reference is None:
        return 1
    export = 0 if is_bundle(Path(settings.reference)) else REFERENCE_PHASES
    return 1 + export + (2 if settings.suite else 0) + COMPARISON_PHASES


def _load_bundle(
    settings: EvaluationSettings, progress: Progress = SILENT, rows: int = 1, prompts_first: bool = False
) -> InternVL:
    return InternVL.load(
        settings.bundle,
        settings.device,
        rows=rows,
        prompts_first=prompts_first,
        engine=settings.engine,
        dialect=settings.dialect,
        context=settings.context,
        threads=settings.threads,
        exact=settings.exact,
        progress=progress,
    )


def _load_reference(settings: EvaluationSettings, folder: Path, rows: int = 1) -> InternVL:
    """Load it for exact answers, whatever runs the bundle: what an engine rounds is part of the bundle's figures."""
    exact = replace(
        settings, bundle=folder, device="cpu", engine="onnxruntime", dialect=None, context=None, exact=False
    )
    return _load_bundle(exact, rows=rows, prompts_first=rows > 1)


def _measurements(
    settings: EvaluationSettings, suite: Suite | None, cases: Sequence[Case], dates: Mapping[str, str] | None = None
) -> dict[str, Measurement]:
    """State how figures are measured, by the kind of run.

    Args:
        settings: what is measured.
        suite: the suite that is asked.
        cases: the questions of the comparison.
        dates: when each kind of run ended, where it did.
    """
    how = partial(
        Measurement,
        seed=settings.seed,
        device=settings.device,
        engine=settings.engine,
        dialect=settings.dialect,
        max_tiles=settings.max_tiles,
        exact=settings.exact,
    )
    dates = dates or {}
    measured = {}
    if settings.reference is not None:
        measured["comparison"] = how(
            _data_name(settings),
            len(cases),
            date=dates.get("comparison", ""),
            reference=Path(settings.reference).name,
            answer_tokens=settings.compared_tokens,
        )
    if suite is not None:
        measured["suite"] = how(
            suite.name,
            len(suite.cases),
            date=dates.get("suite", ""),
            answer_tokens=settings.suite_tokens,
        )
    return measured


def _data_name(settings: EvaluationSettings) -> str:
    return Path(settings.data).name if settings.data else "built-in pictures and texts"
