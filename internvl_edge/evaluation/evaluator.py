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
from internvl_edge.base.progress import SILENT, Progress, as_progress
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.gate import METRICS, Condition, Verdict, parse_condition, require_measurable
from internvl_edge.bundle.manifest import is_bundle
from internvl_edge.bundle.quality import Measurement, Quality
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import InternVL

from .cases import SUITES, Case, QuestionSettings, read_cases
from .compare import COMPARISON_PHASES, Comparison, compare
from .reference import REFERENCE_PHASES, reference_bundle
from .suite import SuiteResult, run_suite

_CASES = 32
_SUITE_QUESTIONS = 500
_SUITE_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of a bundle, and how its answers are computed.

    Attributes:
        bundle: its folder, or a hub id.
        reference: what to compare it with: a checkpoint or a bundle (folder or hub id); None compares with nothing.
        suite: a name in `SUITES`, whose exact answers are counted; None asks no suite.
        data: a folder of images or a JSON Lines file to compare on; None is the built-in set.
        samples: how many questions; None is 32 for the comparison and 500 for a suite.
        seed: which questions, and in which order.
        max_tiles: most tiles of an image; None is the checkpoint's own limit.
        max_new_tokens: most tokens of an answer that are compared.
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
    max_new_tokens: int = 64
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

    def __post_init__(self) -> None:
        conditions = self.conditions
        if self.suite is not None and self.suite not in SUITES:
            raise EdgeError(f"there is no suite {self.suite!r}; known are {', '.join(SUITES)}")
        if self.reference is None and self.data is not None:
            raise EdgeError("--data is compared with a --reference; a --suite brings its own questions")
        if self.reference is None and self.suite is None and conditions:
            raise EdgeError("--fail-if needs figures; give --reference, --suite or both")
        if self.reference is None and self.reference_revision is not None:
            raise EdgeError("--reference-revision chooses a version of a hub id in --reference; give both or neither")
        if self.samples is not None and self.samples < 1:
            raise EdgeError(f"samples is {self.samples}, expected at least 1")

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
    cases = _cases(settings)
    folder = find_bundle(settings.bundle, settings.revision, settings.device)
    settings = replace(settings, bundle=folder, revision=None)
    known = quality_of(Bundle.open(Path(settings.bundle)).manifest)
    if not settings.replace_recorded:
        _require_replaceable(settings, cases, known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        comparison, suite = _measure(settings, cases, as_progress(progress))
    figures = {**(comparison.figures if comparison else {}), **(suite.figures if suite else {})}
    runs = {"comparison": comparison, "suite": suite}
    measured = _measurements(settings, len(cases), {kind: found.run.date for kind, found in runs.items() if found})
    quality = known.with_figures(figures, measured, settings.conditions, drop_unmeasured=settings.replace_recorded)
    return EvaluationResult(
        settings=settings,
        comparison=comparison,
        suite=suite,
        figures=figures,
        quality=quality,
        replaced=known.replaced(settings.conditions),
        dropped=[each for each in known.unmeasured(figures, measured) if each not in quality.conditions],
    )


def _cases(settings: EvaluationSettings) -> list[Case]:
    """Read the questions of the comparison, and refuse conditions on what will not be measured."""
    cases = []
    if settings.reference is not None:
        source = None if settings.data is None else Path(settings.data)
        cases = read_cases(source, settings.samples or _CASES, settings.seed)
    require_measurable(settings.conditions, _available(settings, cases))
    return cases


def _available(settings: EvaluationSettings, cases: Sequence[Case]) -> list[str]:
    """List what there is to measure with, in the words of `Metric.needs`."""
    available = {
        "reference": settings.reference is not None,
        "suite": settings.suite is not None,
        "answers": any(case.answer for case in cases),
    }
    return [name for name, there in available.items() if there]


def _require_replaceable(settings: EvaluationSettings, cases: Sequence[Case], known: Quality) -> None:
    """Refuse to replace recorded figures by those of a run that says less, or that measures something else."""
    planned = _measurements(settings, len(cases))
    advice = "pass --replace to replace them, or --no-record to look only"
    for kind, newer in planned.items():
        recorded = known.measured.get(kind)
        if recorded and (why := recorded.why_kept(newer)):
            raise EdgeError(f"{settings.bundle} has figures of {recorded}; {why}; {advice}")
    available = _available(settings, cases)
    for condition in known.conditions:
        metric = METRICS[condition.metric]
        if metric.run in planned and not set(metric.needs) <= set(available):
            raise EdgeError(f"{settings.bundle} has the condition {condition}, which this run cannot measure; {advice}")


def _measure(
    settings: EvaluationSettings, cases: Sequence[Case], progress: Progress
) -> tuple[Comparison | None, SuiteResult | None]:
    load_bundle = partial(_load_bundle, settings)
    questions = QuestionSettings(settings.suite or "", settings.seed, settings.max_tiles, _SUITE_ANSWER_TOKENS)
    ask_suite = partial(run_suite, load_bundle, questions, settings.samples or _SUITE_QUESTIONS, progress=progress)
    progress.expect(_phases(settings))
    if settings.reference is None:
        return None, ask_suite()
    with progress.phase("loading the bundle"), load_bundle(progress):
        pass  # whatever keeps it from being loaded is found out now, not after hours of the reference's answers
    with reference_bundle(str(settings.reference), progress, settings.reference_revision) as folder:
        load_reference = partial(_load_reference, settings, folder)
        suite = ask_suite(load_reference=load_reference) if settings.suite else None
        comparison = compare(
            load_bundle,
            load_reference,
            cases,
            replace(questions, data=_data_name(settings), max_new_tokens=settings.max_new_tokens),
            progress,
            reference=Path(settings.reference).name,
            shown=settings.shown,
        )
    return comparison, suite


def _phases(settings: EvaluationSettings) -> int:
    """The number of phases that the progress shows."""
    if settings.reference is None:
        return 1
    export = 0 if is_bundle(Path(settings.reference)) else REFERENCE_PHASES
    return 1 + export + (2 if settings.suite else 0) + COMPARISON_PHASES


def _load_bundle(settings: EvaluationSettings, progress: Progress = SILENT) -> InternVL:
    return InternVL.load(
        settings.bundle,
        settings.device,
        engine=settings.engine,
        dialect=settings.dialect,
        context=settings.context,
        threads=settings.threads,
        exact=settings.exact,
        progress=progress,
    )


def _load_reference(settings: EvaluationSettings, folder: Path) -> InternVL:
    """Load it for exact answers, whatever runs the bundle: what an engine rounds is part of the bundle's figures."""
    return _load_bundle(
        replace(settings, bundle=folder, device="cpu", engine="onnxruntime", dialect=None, context=None, exact=False)
    )


def _measurements(
    settings: EvaluationSettings, cases: int, dates: Mapping[str, str] | None = None
) -> dict[str, Measurement]:
    """State how figures are measured, by the kind of run.

    Args:
        settings: what is measured.
        cases: how many questions the comparison has.
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
            cases,
            date=dates.get("comparison", ""),
            reference=Path(settings.reference).name,
            answer_tokens=settings.max_new_tokens,
        )
    if settings.suite is not None:
        measured["suite"] = how(
            settings.suite,
            settings.samples or _SUITE_QUESTIONS,
            date=dates.get("suite", ""),
            answer_tokens=_SUITE_ANSWER_TOKENS,
        )
    return measured


def _data_name(settings: EvaluationSettings) -> str:
    return Path(settings.data).name if settings.data else "built-in pictures and texts"
