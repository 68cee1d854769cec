"""Render a report as one HTML page that needs nothing else: no script, no network, in the colors the reader prefers.

Everything that comes from data is escaped by the template engine; the page's policy forbids browsers to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from internvl_edge.base import units
from internvl_edge.base.run_record import RunRecord
from internvl_edge.bundle.gate import METRICS, SUITE_METRICS, Verdict, parse_condition
from internvl_edge.checkpoint.record import LinearReport
from internvl_edge.model.components import Stored, weights_text
from internvl_edge.runtime.bench import BenchResult

from ..divergence import MEANINGFUL_PERPLEXITY
from ..suite import MetricResult
from .meaning import changes_in_words, divergence_in_words
from .overview import Overview
from .plots import Plot, divergence_plot, layers_plot, ranges_plot, scale_plot, size_plot
from .report import Report

_TEMPLATE = "page.html.jinja"
_OVERVIEW = "overview.html.jinja"
_STYLE = "page.css"
# Headline figures, the first that are known.
_HEADLINES = ("kl", "top1", *SUITE_METRICS, "same_answers", "perplexity_ratio")
_MOST_HEADLINES = 3
_LABELS = {
    "kl": "KL divergence, mean",
    "top1": "same most probable token",
    "exact_match": "exact answers",
    "normalized_match": "right answers, but for case and form",
    "contains": "answers that hold the right one",
    "anls": "ANLS",
    "relaxed_accuracy": "right answers, numbers within 5 %",
    "choice_accuracy": "right choices",
    "same_answers": "same greedy answers",
    "perplexity_ratio": "perplexity over the reference's",
}
# What `bench` measures that matters most to whoever waits for an answer: its name -> a sentence.
_SPEEDS = {
    "decode at 300": "{} tokens/s after 300 tokens",
    "first token, 1 tile + 300": "the first token of a question with one tile after {} s",
    "load": "loads in {} s",
}
# An outlier channel is this many times as large as the median channel.
_OUTLIER = 10
_OUTLIER_ROWS = 24
# So many wrong answers of a suite are listed; report.json holds all.
_MISTAKES = 40
# Embeddings, overrides and isolates of Unicode's bidirectional algorithm.
_DIRECTION = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def _without_direction(value: Any) -> Any:
    """Remove marks of writing direction from text: one of them in an answer would turn around the page behind it."""
    return value.translate(_DIRECTION) if isinstance(value, str) else value


def render(report: Report) -> str:
    """Render the page."""
    return _fill(
        _TEMPLATE,
        report=report,
        headlines=_headlines(report),
        verdict=_verdict(report),
        figures=_figures(report),
        glance=_at_a_glance(report),
        plots={name: plot and _markup(plot) for name, plot in _plots(report).items()},
        conditions=[_condition(verdict) for verdict in report.quality.gate] if report.quality else [],
        meanings=SUITE_METRICS,
        tag_results=_tag_results(report),
        mistakes=report.suite.mistakes[:_MISTAKES] if report.suite else (),
        largest=max((part.bytes for part in report.components), default=1),
        choices=[linear for linear in _linears(report) if linear.reason],
        outliers=_outliers(_linears(report)),
        runs=_runs(report),
        machines=_machines(_runs(report)),
        summary=_summary(report),
        meaningful_perplexity=int(MEANINGFUL_PERPLEXITY),
        recipe=_flat(report.quantization.recipe) if report.quantization else [],
    )


def render_overview(found: Overview, reports: Sequence[Report]) -> str:
    """Render the page that shows several bundles beside each other."""
    points = [
        (name, report.bytes, report.quality.figures.get("kl") if report.quality else None)
        for name, report in zip(found.names, reports, strict=True)
    ]
    plot = size_plot([(name, count, kl) for name, count, kl in points if kl is not None])
    return _fill(_OVERVIEW, overview=found, plot=plot and _markup(plot))


def _fill(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_without_direction,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size,
        "share": lambda value: f"{value:.1%}",
        "interval": lambda found: f"{found.low:.1%} to {found.high:.1%}",
        "number": number,
        "count": lambda value: f"{value:,}".replace(",", "\N{THIN SPACE}"),
        "duration": units.duration,
        "rounded": units.rounded,
        "difference": difference,
    }
    package = files(__package__)
    css = Markup(package.joinpath(_STYLE).read_text("utf-8"))
    return environment.from_string(package.joinpath(template).read_text("utf-8")).render(css=css, **values)


def size(count: float) -> str:
    """Write bytes for people, never broken between number and unit."""
    return units.size(count).replace(" ", "\N{NO-BREAK SPACE}")


def number(value: float | None, digits: int = 3) -> str:
    """Write a figure with so many digits that count; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def difference(text: str, other: str) -> Markup:
    """Mark in `text` what comes after the part that both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(text), len(other)))
    if common == len(text):
        return escape(text)
    return escape(text[:common]) + Markup("<mark>") + escape(text[common:]) + Markup("</mark>")


def _figures(report: Report) -> dict[str, float]:
    return report.quality.figures if report.quality else {}


def _headlines(report: Report) -> list[tuple[str, str]]:
    alone = f"; weights alone {weights_text(report.components)}" if report.components else ""
    rows = [(size(report.bytes), f"all files{alone}")]
    figures = _figures(report)
    others = [name for name in SUITE_METRICS if not report.suite or name != report.suite.metric]
    known = [name for name in _HEADLINES if name in figures and name not in others][:_MOST_HEADLINES]
    rows += [(METRICS[name].show(figures[name]), f"{_LABELS[name]}, {_asked(report, name)}") for name in known]
    if report.quantization and report.quantization.tower and len(rows) < 1 + _MOST_HEADLINES:
        rows.append((f"{report.quantization.tower.cosine:.5f}", "cosine of the image embeddings to the float tower's"))
    errors = report.quantization.errors if report.quantization else {}
    if errors and not figures:
        rows.append((f"{sum(errors.values()) / len(errors):.3f}", "output error of a linear, mean"))
    return rows


def _asked(report: Report, metric: str) -> str:
    """Say over how many questions a figure was measured."""
    how = report.quality.measured.get(METRICS[metric].run) if report.quality else None
    return f"{how.questions} questions" if how else "number of questions not recorded"


def _at_a_glance(report: Report) -> list[tuple[str, str]]:
    """Answer what everybody asks first: (question, answer) rows."""
    rows = []
    figures = _figures(report)
    if "kl" in figures:
        rows.append(("Is this divergence small?", divergence_in_words(figures["kl"])))
    if report.comparison:
        rows.append(("What changed in the answers?", changes_in_words(report.comparison)))
    if report.kind == "bundle":
        rows.append(("How fast is it?", _speed(report.speed) or f"Not measured yet: {_BENCH} {report.name} --report"))
    return rows


_BENCH = "internvl-edge bench"


def _speed(found: BenchResult | None) -> str:
    if found is None:
        return ""
    by_name = {figure.name: figure.value for figure in found.figures}
    parts = [text.format(units.rounded(by_name[name])) for name, text in _SPEEDS.items() if name in by_name]
    memory = f"at most {size(found.peak_rss_bytes)} of memory"
    where = f"{found.device}, {found.threads} threads, {found.run.machine}"
    return f"{', '.join([*parts, memory])} ({where})."


def _tag_results(report: Report) -> dict[str, MetricResult]:
    """Return the main metric of a suite for each tag that has questions of it."""
    suite = report.suite
    return {tag: found[suite.metric] for tag, found in suite.tags.items() if suite.metric in found} if suite else {}


def _summary(report: Report) -> str:
    """Say in one sentence what the model is: how many weights, and how those of each part are stored."""
    if not report.components:
        return ""
    weights = sum(part.parameters for part in report.components)
    kinds: dict[str, list[str]] = {}
    for part in report.components:
        stored = dict.fromkeys(_short(kind) for kind in part.stored)
        kinds.setdefault(" and ".join(stored), []).append(part.name)
    parts = "; ".join(f"{_listed(names)} in {kind}" for kind, names in kinds.items() if kind)
    count = f"{weights / 1e9:.2f} billion" if weights >= 1e9 else f"{weights / 1e6:.3g} million"
    return f"{count} weights: {parts}."


def _short(kind: Stored) -> str:
    """Leave out what matters to specialists: "int4 in groups of 128", "int8", "bfloat16"."""
    if kind.scheme is None:
        return kind.dtype
    return f"int{kind.scheme.bits}" + (f" in groups of {kind.scheme.group_size}" if kind.scheme.group_size else "")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _runs(report: Report) -> list[tuple[str, RunRecord]]:
    parts = {
        "Quantized": report.quantization,
        "Compared": report.comparison,
        "Suite": report.suite,
        "Timed": report.speed,
    }
    return [(label, part.run) for label, part in parts.items() if part]


def _machines(runs: Sequence[tuple[str, RunRecord]]) -> list[tuple[str, str]]:
    """List each machine once: (machine with its versions, the runs it made)."""
    found: dict[str, list[str]] = {}
    for label, run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        found.setdefault(f"{run.machine}; {versions}", []).append(label.lower())
    return [(where, ", ".join(labels)) for where, labels in found.items()]


def _verdict(report: Report) -> tuple[str, str]:
    """Return a word for the style sheet, and the words of the verdict."""
    quality = report.quality
    if quality is None:
        return "open", "Quantized, not yet judged"
    measured = "Measured, no gate set" if quality.figures else "Not measured"
    words = {"passed": "Passed its gate", "failed": "Failed its gate", "no gate": measured}[quality.state]
    kind = {"passed": "passed", "failed": "failed", "no gate": "open"}[quality.state]
    return kind, f"{words}, accepted" if quality.accepted else words


def _condition(verdict: Verdict) -> dict[str, Any]:
    condition = parse_condition(verdict.condition)
    metric = METRICS[condition.metric]
    return {
        "metric": condition.metric,
        "meaning": metric.meaning,
        "value": "no number" if math.isnan(verdict.value) else metric.show(verdict.value),
        "limit": f"{condition.sign.replace('<=', '≤').replace('>=', '≥')} {metric.show(condition.limit)}",
        "failed": verdict.failed,
    }


def _linears(report: Report) -> tuple[LinearReport, ...]:
    return report.quantization.linears if report.quantization else ()


def _plots(report: Report) -> dict[str, Plot | None]:
    plots: dict[str, Plot | None] = {}
    if report.comparison:
        plots["scale"] = scale_plot(report.comparison.greedy.kl_mean)
        plots["divergence"] = divergence_plot(report.comparison.histogram, report.comparison.greedy)
    parts = {"vision": "vision.", "decoder": "decoder."}
    for part, prefix in parts.items():
        linears = [linear for linear in _linears(report) if linear.name.startswith(prefix)]
        rounded = [linear for linear in linears if linear.scheme]
        plots[f"{part} sqnr"] = layers_plot(rounded, lambda linear: linear.sqnr_db, "SQNR, dB")
        plots[f"{part} cosine"] = layers_plot(rounded, lambda linear: linear.cosine, "cosine")
        plots[f"{part} ranges"] = ranges_plot(linears)
    return plots


def _markup(plot: Plot) -> Markup:
    return Markup('<div role="img" aria-label="{}">{}</div>').format(plot.description, Markup(plot.svg))


def _outliers(linears: Sequence[LinearReport]) -> list[tuple[LinearReport, float]]:
    """Find linears with channels far larger than the median one, and by how much, the largest first."""
    found = []
    for linear in linears:
        inputs = linear.inputs
        if inputs and inputs.channels and inputs.typical and inputs.channels[0][1] > _OUTLIER * inputs.typical:
            found.append((linear, inputs.channels[0][1] / inputs.typical))
    return sorted(found, key=lambda entry: -entry[1])[:_OUTLIER_ROWS]


def _flat(values: Any, name: str = "") -> list[tuple[str, str]]:
    """List a recipe's nested fields as (name, text) rows; what is empty is left out."""
    if isinstance(values, dict):
        return [row for key, value in values.items() for row in _flat(value, f"{name} {key}".strip())]
    if values in (None, [], ()):
        return []
    if isinstance(values, (list, tuple)):
        parts = [" = ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) for value in values]
        return [(name, ", ".join(parts))]
    return [(name, {True: "yes", False: "no"}.get(values, str(values)) if isinstance(values, bool) else str(values))]
