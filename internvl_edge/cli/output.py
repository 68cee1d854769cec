"""Print what commands found: JSON objects, tables, where a report lies, and the figures of `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from internvl_edge.base.jsonable import encode

if TYPE_CHECKING:
    from internvl_edge.evaluation import Comparison, EvaluationResult, SuiteResult
    from internvl_edge.evaluation.report.files import Written
    from internvl_edge.runtime.engines.device import DeviceChoice

Row = tuple[str, object]

# What `evaluate --json` prints of a comparison, whose fields these are.
_COMPARISON = (
    *("cases", "image_tokens", "greedy", "kinds"),
    *("same_answers", "same_prefix", "answers", "worst_case"),
)


def print_json(values: Any) -> None:
    """Print one JSON value on one line, as `jsonable` encodes it."""
    click.echo(json.dumps(encode(values), ensure_ascii=False, allow_nan=False))


def print_table(rows: Iterable[Row]) -> None:
    """Print names and values, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def print_columns(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers and their units line up at the right, text at the left."""
    cells = [list(heading), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    right = [
        all(row[column][:1].isdecimal() or row[column] in ("", "-") for row in cells[1:])
        for column in range(len(widths))
    ]
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        click.echo(line.rstrip())


def say_written(written: Written) -> None:
    """Say on standard error where a report is: standard output belongs to figures."""
    click.echo(f"report: {written.html or written.json}", err=True)
    if written.hint:
        click.echo(written.hint, err=True)


def say_device(choice: DeviceChoice | None) -> None:
    """Say on standard error which device "auto" took, and why; nothing where the user chose."""
    if choice is not None:
        click.echo(f"device: {choice}", err=True)


def shown_steps(stream: TextIO) -> Callable[[str, int, int], None]:
    """Return a function that shows a phase, its steps done and all its steps: one line, rewritten on a terminal."""

    def show(phase: str, done: int, total: int) -> None:
        if stream.isatty():
            stream.write("\r\x1b[K" if done == total else f"\r\x1b[K{phase} {done}/{total}")
        elif not done:
            stream.write(f"{phase}: {total} steps\n")
        stream.flush()

    return show


def evaluation_values(result: EvaluationResult) -> dict[str, Any]:
    """Collect what `evaluate --json` prints, for `print_json`."""
    settings, suite = result.settings, result.suite
    values: dict[str, Any] = {"bundle": str(settings.bundle), "seed": settings.seed}
    if result.comparison:
        values |= {"reference": str(settings.reference), "data": str(settings.data or "built-in")}
        values |= {name: getattr(result.comparison, name) for name in _COMPARISON}
    if suite:
        tasks = {name: {"asked": task.asked, "exact_match": task.exact_match} for name, task in suite.tasks.items()}
        total = {"exact_match": suite.total.exact_match, "asked": suite.total.asked}
        values |= {"suite": suite.settings.data, **total, "tasks": tasks, "wrong": suite.mistakes}
    if suite and suite.total.reference is not None:
        values["reference_exact_match"] = suite.total.reference
    return values | {"figures": result.figures, "gate": result.quality.gate}


def evaluation_rows(result: EvaluationResult) -> list[Row]:
    """List what `evaluate` prints, for `print_table`: figures, and the gate where there are conditions."""
    rows = _comparison_rows(result.comparison) if result.comparison else []
    rows += _suite_rows(result.suite) if result.suite else []
    if result.quality.gate:
        rows.append(("gate", result.quality.state))
        rows += [(f"  {'failed' if verdict.failed else 'passed'}", verdict) for verdict in result.quality.gate]
    return rows


def _comparison_rows(found: Comparison) -> list[Row]:
    greedy, answers = found.greedy, found.answers
    rows: list[Row] = [
        ("questions", f"{found.cases}, {found.image_tokens} image tokens"),
        ("tokens compared", greedy.positions),
        ("KL divergence", f"mean {greedy.kl_mean:.5f}, p99 {greedy.kl_p99:.4f}, max {greedy.kl_max:.3f} nats"),
        ("same most probable token", f"{greedy.top1_agreement:.2%}"),
        ("largest in", found.worst_case),
        ("greedy answers the same", f"{found.same_answers:.1%}"),
        ("greedy tokens the same", f"{found.same_prefix:.1%} before the first difference"),
    ]
    if answers:
        perplexities = f"{answers.candidate_perplexity:.4f}, reference {answers.reference_perplexity:.4f}"
        rows.append(("perplexity of the answers", perplexities))
        rows.append(("KL on the answers", f"mean {answers.kl_mean:.5f} nats over {answers.positions} tokens"))
    return rows


def _suite_rows(found: SuiteResult) -> list[Row]:
    """List exact answers, in all and by task, beside those of a reference."""
    rows: list[Row] = []
    for name, task in (("exact answers", found.total), *found.tasks.items()):
        beside = "" if task.reference is None else f", reference {task.reference:.1%}"
        rows.append((name, f"{task.exact_match:.1%} of {task.asked}{beside}"))
    return rows
