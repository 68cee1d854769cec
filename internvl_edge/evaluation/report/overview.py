"""Compare several bundles: their sizes, figures, speeds and answers beside each other.

Figures of runs with other settings stand beside each other, too, but a line says so, and none is called the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from internvl_edge.base import units
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.gate import METRICS, SUITE_METRICS
from internvl_edge.bundle.manifest import is_bundle
from internvl_edge.bundle.quality import Measurement
from internvl_edge.bundle.quality_record import quality_of

from .files import JSON, read_report, report_folder
from .report import Report, bundle_report

# The section that says how figures were measured.
RUNS = "Runs"
_RUNS = {"comparison": "compared", "suite": "asked"}
# Metrics of which more is better; of all others less is.
_MORE_IS_BETTER = ("top1", "same_answers", "same_tokens", *SUITE_METRICS)
_MOST_ANSWERS = 24


@dataclass(frozen=True)
class Row:
    """One property of all bundles.

    Attributes:
        section: the heading that it stands under.
        label: what it is.
        texts: its value of each bundle, "" where it is not known.
        best: which bundle has the best value; None where none stands out or they cannot be compared.
    """

    section: str
    label: str
    texts: tuple[str, ...]
    best: int | None = None


@dataclass(frozen=True)
class Answers:
    """One question whose answers differ: `candidates` has the answer of each bundle, None where it was not kept."""

    name: str
    question: str
    pictures: tuple[str, ...]
    reference: str
    candidates: tuple[str | None, ...]


@dataclass(frozen=True)
class Overview:
    """Several bundles beside each other.

    Attributes:
        names: one for each bundle, all different.
        rows: what is known of them.
        answers: questions whose answers differ from the reference's in at least one bundle.
        warnings: which figures must not be compared with which, and why.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    answers: tuple[Answers, ...]
    warnings: tuple[str, ...]


def find_report(folder: Path) -> Report:
    """Collect what is known of a bundle, or read the report in a folder.

    Raises:
        EdgeError: the folder is neither a bundle nor one with a report.
    """
    if is_bundle(folder):
        opened = Bundle.open(folder)
        found = bundle_report(folder, quality_of(opened.manifest))
        return found.completed_by(read_report(report_folder(folder)))
    report = read_report(folder)
    if report is None:
        raise EdgeError(f"{folder} is neither a bundle nor a folder with a {JSON} of this version; give one of both")
    return report


def overview(reports: Sequence[Report], names: Sequence[str]) -> Overview:
    """Put reports beside each other; `names` has one for each, such as its folder."""
    short = [report.name for report in reports]
    shown = tuple(name if short.count(name) == 1 else path for name, path in zip(short, names, strict=True))
    warnings = tuple(_differences(reports, shown))
    comparable = {kind: not any(warning.startswith(f"{word} ") for warning in warnings) for kind, word in _RUNS.items()}
    rows = [*_sizes(reports), *_figures(reports, comparable), *_tags(reports), *_speeds(reports)]
    kept = tuple(row for row in rows if any(row.texts))
    return Overview(shown, kept, tuple(_answers(reports))[:_MOST_ANSWERS], warnings)


def overview_values(reports: Sequence[Report], found: Overview) -> dict[str, Any]:
    """Collect the same for programs: plain numbers in the units of `Report`, None where nothing is known."""
    bundles = [
        {
            "name": name,
            "bytes": report.bytes,
            "components": report.components,
            "quality": report.quality,
            "tags": report.suite.tags if report.suite else None,
            "speed": report.speed,
        }
        for name, report in zip(found.names, reports, strict=True)
    ]
    return {"bundles": bundles, "different_answers": found.answers, "warnings": found.warnings}


def _sizes(reports: Sequence[Report]) -> list[Row]:
    weights = [sum(part.bytes for part in report.components) or None for report in reports]
    bits = [
        sum(part.bits_per_weight * part.parameters for part in report.components)
        / sum(part.parameters for part in report.components)
        if report.components
        else None
        for report in reports
    ]
    return [
        Row("", "verdict", tuple(report.quality.state if report.quality else "" for report in reports)),
        _row("Size", "all files", [report.bytes for report in reports], units.size, more=False),
        _row("Size", "weights alone", weights, units.size, more=False),
        _row("Size", "bits per weight", bits, lambda value: f"{value:.2f}", more=False),
    ]


def _figures(reports: Sequence[Report], comparable: dict[str, bool]) -> list[Row]:
    rows = []
    for name, metric in METRICS.items():
        values = [report.quality.figures.get(name) if report.quality else None for report in reports]
        more = (name in _MORE_IS_BETTER) if comparable[metric.run] else None
        rows.append(_row("Quality", name, values, metric.show, more))
    for kind, word in _RUNS.items():
        how = [report.quality.measured.get(kind) if report.quality else None for report in reports]
        rows.append(Row(RUNS, word, tuple(str(each) if each else "" for each in how)))
    return rows


def _tags(reports: Sequence[Report]) -> list[Row]:
    """The main metric of each suite for each tag of its questions."""
    found: list[dict[str, str]] = [{} for _ in reports]
    for known, report in zip(found, reports, strict=True):
        for tag, results in report.suite.tags.items() if report.suite else ():
            if report.suite and (result := results.get(report.suite.metric)):
                known[f"{tag}, {report.suite.metric}"] = f"{result.bundle.value:.1%} of {result.asked}"
    labels = sorted({label for known in found for label in known})
    return [Row("By tag", label, tuple(known.get(label, "") for known in found)) for label in labels]


def _speeds(reports: Sequence[Report]) -> list[Row]:
    figures = [{figure.name: figure for figure in report.speed.figures} if report.speed else {} for report in reports]
    machines = {
        (report.speed.run.machine, report.speed.threads, report.speed.device) for report in reports if report.speed
    }
    rows = []
    for name in dict.fromkeys(name for known in figures for name in known):
        unit = next(known[name].unit for known in figures if name in known)
        more = (unit == "tokens/s") if len(machines) == 1 else None
        values = [known[name].value if name in known else None for known in figures]
        rows.append(_row("Speed", name, values, partial(_with_unit, unit), more))
    memory = [report.speed.peak_rss_bytes if report.speed else None for report in reports]
    return [*rows, _row("Speed", "peak memory", memory, units.size, False if len(machines) == 1 else None)]


def _with_unit(unit: str, value: float) -> str:
    return f"{units.rounded(value)} {unit}"


def _row(
    section: str, label: str, values: Sequence[float | None], show: Callable[[float], str], more: bool | None
) -> Row:
    """Make a row of numbers; `more` says whether more is better, None that the numbers cannot be compared."""
    texts = tuple("" if value is None else show(value) for value in values)
    known = [(value, place) for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    if more is None or len(known) < 2:
        return Row(section, label, texts)
    ordered = sorted(known, reverse=more)
    best = ordered[0][1] if texts[ordered[0][1]] != texts[ordered[1][1]] else None
    return Row(section, label, texts, best)


def _differences(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    """Say which figures come from runs that do not measure the same."""
    found = []
    for kind, word in _RUNS.items():
        known: list[tuple[str, Measurement]] = [
            (name, report.quality.measured[kind])
            for name, report in zip(names, reports, strict=True)
            if report.quality and kind in report.quality.measured
        ]
        for name, how in known[1:]:
            first, other = known[0]
            if why := other.difference(how):
                found.append(f"{word} otherwise: {first} and {name}: {why}; their figures say nothing of each other")
    machines = {report.speed.run.machine for report in reports if report.speed}
    if len(machines) > 1:
        found.append(f"timed on different machines: {'; '.join(sorted(machines))}")
    return found


def _answers(reports: Sequence[Report]) -> list[Answers]:
    """List the questions that some bundle answers otherwise than the reference, those of most bundles first."""
    samples = [
        {(pair.name, pair.question, pair.reference): pair for pair in report.comparison.samples}
        if report.comparison
        else {}
        for report in reports
    ]
    rows = []
    for key in dict.fromkeys(key for known in samples for key in known):
        pairs = [known.get(key) for known in samples]
        different = [pair for pair in pairs if pair and not pair.same]
        if different:
            candidates = tuple(pair.candidate if pair else None for pair in pairs)
            rows.append((len(different), Answers(*key[:2], different[0].pictures, key[2], candidates)))
    return [answers for _, answers in sorted(rows, key=lambda row: -row[0])]
