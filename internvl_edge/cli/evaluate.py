"""`internvl-edge evaluate BUNDLE --reference CHECKPOINT|BUNDLE`, `--suite NAME`, or both; the gate; the report.

Exit status 1 where a condition of --fail-if holds.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError, QualityWarning
from internvl_edge.base.run_record import run_record
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.gate import METRICS, Condition, parse_condition, require_measurable
from internvl_edge.bundle.quality import Measurement, Quality
from internvl_edge.bundle.quality_record import quality_of, record_quality
from internvl_edge.evaluation import (
    SUITES,
    Case,
    Comparison,
    SuiteScore,
    compare,
    read_cases,
    reference_bundle,
    run_suite,
)
from internvl_edge.evaluation.report.bundle_report import Asked, bundle_report, comparison_facts, suite_facts
from internvl_edge.evaluation.report.content import ComparisonFacts, SuiteFacts
from internvl_edge.evaluation.report.files import read_report, require_own_report, write_report
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import ChatOptions

from .evaluate_rows import Row, comparison_rows, gate_rows, suite_rows
from .options import load_model, loading_options
from .output import print_json, print_table, say_written

_SUITE_ANSWER_TOKENS = 256
_SHOWN = 6


@click.command("evaluate", epilog=f"Metrics of --fail-if: {', '.join(METRICS)}.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", help="What to compare with: a checkpoint (folder or hub id) or a bundle.")
@click.option("--suite", type=click.Choice(list(SUITES)), help="Count exact answers to a suite's questions.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Images or JSON Lines to compare on [default: the built-in set]."
)
@click.option("--samples", type=click.IntRange(min=1), help="How many [default: 32, of a suite 500].")
@click.option("--seed", type=int, default=0, show_default=True, help="Which samples, and in which order.")
@click.option("--max-tiles", type=click.IntRange(min=1), help="Most tiles of an image.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Compared per answer."
)
@click.option(
    "--fail-if",
    "fail_if",
    multiple=True,
    metavar="CONDITION",
    help='A condition such as "kl>0.05" or "exact_match<0.95", of which none may hold (repeatable).',
)
@click.option("--accept", metavar="REASON", help="Use the bundle although its gate failed: no warnings.")
@click.option("--record/--no-record", default=True, show_default=True, help="Put the figures into the manifest.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Folder for report.json and report.html [default: BUNDLE.report]."
)
@click.option("--no-report", is_flag=True, help="Write no report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@loading_options
def command(bundle: Path, as_json: bool, **values: Any) -> int:
    """Measure how good BUNDLE is.

    With --reference, both answer the same questions: how far do predictions and answers differ? With --suite, answers
    are compared with the right ones; with both, those of the reference too. Figures and conditions go into the bundle's
    manifest and into a report. ONNX Runtime computes them unless --engine or --device says otherwise.
    """
    accept = values.pop("accept")
    request = _request(bundle, values)
    if request.reference is None and request.suite is None:
        if accept is None:
            raise EdgeError("give --reference, a checkpoint or a bundle to compare with, or --suite, or both")
        _accept(bundle, accept)
        return 0
    _require_writable(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        found = _measure(request)
    manifest = Bundle.open(bundle).manifest
    quality = quality_of(manifest).with_figures(found.figures, found.measured(request), request.conditions)
    quality = replace(quality, accepted=accept or "")
    if as_json:
        print_json(_as_json(request, found, quality))
    else:
        print_table([*found.rows(), *gate_rows(quality)])
    asked_for = {str(condition) for condition in request.conditions}
    failed = [verdict for verdict in quality.failed if verdict.condition in asked_for]
    for verdict in failed:
        click.echo(f"failed: {verdict}", err=True)
    if request.record:
        record_quality(bundle, quality)
    if request.report is not None:
        content = bundle_report(bundle, manifest, quality, found.comparison_facts, found.suite_facts)
        say_written(write_report(content.completed_by(read_report(request.report)), request.report))
    return 1 if failed else 0


@dataclass(frozen=True)
class _Request:
    """What the user asked for, checked as far as it can be before anything is loaded."""

    bundle: Path
    reference: str | None
    suite: str | None
    data: Path | None
    cases: list[Case]
    suite_cases: int
    seed: int
    options: ChatOptions
    conditions: tuple[Condition, ...]
    record: bool
    report: Path | None
    loading: dict[str, Any]

    @property
    def asked(self) -> Asked:
        """For people: names instead of paths."""
        return Asked(
            reference=Path(self.reference or "").name,
            data=self.data.name if self.data else "built-in pictures and texts",
            seed=self.seed,
            max_tiles=self._max_tiles,
            max_new_tokens=self.options["max_new_tokens"],
        )

    @property
    def _max_tiles(self) -> int | None:
        tiles = self.options["max_tiles"]
        assert tiles is None or isinstance(tiles, int)
        return tiles

    def load_bundle(self) -> InternVL:
        return load_model(self.bundle, dict(self.loading))

    def load_reference(self, folder: Path) -> InternVL:
        """As exactly as it can be computed, whatever runs the bundle: what an engine rounds is part of the figures."""
        device = "cpu" if self.loading["device"] == "tensorrt" else self.loading["device"]
        return load_model(folder, {**self.loading, "device": device, "engine": "onnxruntime", "dialect": None})


def _request(bundle: Path, values: dict[str, Any]) -> _Request:
    reference, suite, data, samples = (values.pop(name) for name in ("reference", "suite", "data", "samples"))
    conditions = tuple(map(parse_condition, values.pop("fail_if")))
    if reference is None and data is not None:
        raise EdgeError("--data is compared with a --reference; a --suite brings its own questions")
    if reference is None and suite is None and conditions:
        raise EdgeError("--fail-if needs figures; give --reference, --suite or both")
    seed = values.pop("seed")
    cases = read_cases(data, samples or 32, seed) if reference is not None else []
    available = {"reference": reference, "suite": suite, "answers": any(case.answer for case in cases)}
    require_measurable(conditions, [name for name, there in available.items() if there])
    report, no_report = values.pop("report"), values.pop("no_report")
    if values["engine"] == "auto":  # figures are about the bundle, not about what this machine has installed
        values["engine"] = "onnxruntime"
    return _Request(
        bundle=bundle,
        reference=reference,
        suite=suite,
        data=data,
        cases=cases,
        suite_cases=samples or 500,
        seed=seed,
        options={"max_tiles": values.pop("max_tiles"), "max_new_tokens": values.pop("max_new_tokens")},
        conditions=conditions,
        record=values.pop("record"),
        report=None if no_report else report or default_report(bundle),
        loading=values,
    )


def _require_writable(request: _Request) -> None:
    """Found out now, not after hours of evaluation."""
    if request.record and request.bundle.is_dir() and not os.access(request.bundle, os.W_OK):
        raise EdgeError(f"{request.bundle} is read-only, so it cannot carry its figures; pass --no-record")
    if request.report is not None:
        require_own_report(request.report)
        there = next(folder for folder in (request.report, *request.report.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK):
            raise EdgeError(f"the report cannot be written to {request.report}; give another --report, or --no-report")


def default_report(bundle: Path) -> Path:
    """Beside the bundle, whose own files are verified: BUNDLE.report."""
    named = bundle if bundle.name else bundle.resolve()
    return named.with_name(f"{named.name}.report")


@dataclass(frozen=True)
class _Found:
    """What was measured, as found and as the report shows it."""

    comparison: Comparison | None = None
    comparison_facts: ComparisonFacts | None = None
    suite: SuiteScore | None = None
    reference_suite: SuiteScore | None = None
    suite_facts: SuiteFacts | None = None

    @property
    def figures(self) -> dict[str, float]:
        figures = self.comparison.figures() if self.comparison else {}
        if self.suite:
            figures["exact_match"] = self.suite.total
        if self.suite and self.reference_suite:
            figures["exact_match_loss"] = self.reference_suite.total - self.suite.total
        return figures

    def measured(self, request: _Request) -> dict[str, Measurement]:
        """How, for the manifest."""
        where = {name: request.loading[name] for name in ("device", "engine", "dialect")}
        measured = {}
        if facts := self.comparison_facts:
            asked = facts.data, facts.cases, facts.seed
            measured["comparison"] = Measurement(*asked, **where, date=facts.run.date, reference=facts.reference)
        if score := self.suite_facts:
            measured["suite"] = Measurement(score.name, score.total.asked, score.seed, **where, date=score.run.date)
        return measured

    def rows(self) -> list[Row]:
        """For the terminal."""
        rows = comparison_rows(self.comparison) if self.comparison else []
        return rows + (suite_rows(self.suite, self.reference_suite) if self.suite else [])


def _measure(request: _Request) -> _Found:
    if request.reference is None:
        return _suite(request, None)
    with request.load_bundle():
        pass  # whatever keeps it from being loaded is found out now, not after hours of the reference's answers
    with reference_bundle(request.reference, progress=sys.stderr.isatty()) as folder:
        found = _suite(request, folder) if request.suite else _Found()
        started = time.perf_counter()
        with _bar(2 * len(request.cases)) as advance:
            comparison = compare(
                request.load_bundle,
                lambda: request.load_reference(folder),
                request.cases,
                request.options,
                advance,
                shown=_SHOWN if request.report else 0,
            )
        facts = comparison_facts(comparison, request.asked, run_record(time.perf_counter() - started))
        return replace(found, comparison=comparison, comparison_facts=facts)


def _suite(request: _Request, reference: Path | None) -> _Found:
    """A suite's score, and that of the reference where there is one."""
    assert request.suite is not None
    started = time.perf_counter()
    options: ChatOptions = {**request.options, "max_new_tokens": _SUITE_ANSWER_TOKENS}
    scores = []
    loads: list[Callable[[], InternVL]] = [request.load_bundle]
    if reference is not None:
        loads.append(partial(request.load_reference, reference))
    with _bar(len(loads) * request.suite_cases) as advance:
        for load in loads:
            cases = itertools.islice(SUITES[request.suite](request.seed), request.suite_cases)
            with load() as model:
                scores.append(run_suite(model, cases, options, advance))
    score, expected = scores[0], scores[1] if reference else None
    run = run_record(time.perf_counter() - started)
    facts = suite_facts(request.suite, request.seed, score, expected, run)
    return _Found(suite=score, reference_suite=expected, suite_facts=facts)


def _accept(bundle: Path, reason: str) -> None:
    manifest = Bundle.open(bundle).manifest
    quality = replace(quality_of(manifest), accepted=reason.strip())
    if not quality.accepted:
        raise EdgeError("--accept needs a reason; it is kept in the bundle for whoever uses it next")
    record_quality(bundle, quality)
    click.echo(f"{bundle}: accepted, {quality.state}: {quality.accepted}")


def _as_json(request: _Request, found: _Found, quality: Quality) -> dict[str, Any]:
    """For `print_json`."""
    values: dict[str, Any] = {"bundle": str(request.bundle), "seed": request.seed}
    if found.comparison:
        values |= {"reference": request.reference, "data": str(request.data or "built-in")}
        values |= found.comparison.to_dict()
    if found.suite:
        values |= {"suite": request.suite, **found.suite.to_dict()}
    if found.reference_suite:
        values["reference_exact_match"] = found.reference_suite.total
    return values | {
        "figures": found.figures,
        "gate": quality.gate,
        "report": request.report and str(request.report),
    }


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal's standard error."""
    with click.progressbar(length=total, label="evaluate", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield bar.update
