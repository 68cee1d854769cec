"""Print what commands find and do: JSON objects, tables, progress, hints, and the figures of `evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from internvl_edge.base.extras import install, missing_modules
from internvl_edge.base.jsonable import encode
from internvl_edge.base.progress import Progress
from internvl_edge.base.signals import terminating_as_interrupt
from internvl_edge.base.text import command_line
from internvl_edge.base.units import rounded, share

if TYPE_CHECKING:
    from internvl_edge.bundle.manifest import Manifest
    from internvl_edge.evaluation import (
        Comparison,
        DivergenceSummary,
        Estimate,
        EvaluationResult,
        MetricResult,
        SuiteResult,
    )
    from internvl_edge.evaluation.report.files import Written
    from internvl_edge.runtime.reply import Reply

Row = tuple[str, object]
# Options that change nothing of a result.
_SHOWN_ONLY = ("as_json", "quiet")

# What `evaluate --json` prints of a comparison, whose fields these are.
_COMPARISON = (
    *("cases", "image_tokens", "greedy", "kinds"),
    *("same_answers", "same_prefix", "answers", "worst_case"),
)


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Around a long command: Ctrl-C and SIGTERM end it cleanly and say what becomes of its work.

    Of one inside another, as around the last part of a command, the advice of the inner one is said.
    """
    with terminating_as_interrupt():
        try:
            yield
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(str(stop) or advice) from None


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show no progress and no hints, only results, warnings and errors."
)


def shown_progress(quiet: bool) -> Progress:
    """Return the progress to show on standard error, as a context; nothing is shown where the user wants quiet."""
    return Progress(None if quiet else sys.stderr)


def tower_text(manifest: Manifest) -> str:
    """Say how many linears of an int8 vision tower are int8, and which are not."""
    count = len(manifest.schemes("vision.")) + len(manifest.schemes("projector."))
    floats = manifest.floats("vision.", "projector.")
    return f"{count} linears of the tower in int8" + (f"; floats in {', '.join(floats)}" if floats else "")


def reading(images: int) -> str:
    """Say what happens before the first token of an answer."""
    return f"reading {images} image{'s' if images > 1 else ''} and the question" if images else "reading the question"


def timing_line(reply: Reply) -> str:
    """Say how fast an answer was."""
    first, rate = reply.timings["first_token_s"], reply.timings["decode_tokens_per_s"]
    tokens = len(reply.output_ids)
    speed = f", then {rounded(rate)} tokens/s" if tokens > 1 else ""
    return f"first token after {first:.2g} s{speed}; {tokens} token{'s' if tokens > 1 else ''}"


def hint(*words: object, after: str = "Next") -> None:
    """Print a command to run next. Its words are quoted for a shell, so that it can be copied."""
    click.echo(f"{after}: {command_line(*words)}")


def print_json(values: Any) -> None:
    """Print one JSON value on one line, as `jsonable` encodes it."""
    click.echo(json.dumps(encode(values), ensure_ascii=False, allow_nan=False))


def print_table(rows: Iterable[Row]) -> None:
    """Print names and values, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def print_columns(
    heading: Sequence[str], rows: Sequence[Sequence[object]], groups: Mapping[int, str] | None = None
) -> None:
    """Print a table; columns of numbers and their units line up at the right, text at the left.

    Args:
        heading: names of the columns.
        rows: the cells of each row.
        groups: number of a row -> a line to print before it, which begins a group of rows.
    """
    cells = [list(heading), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    right = [
        all(row[column][:1].isdecimal() or row[column][:1] in ("", "-", "<") for row in cells[1:])
        for column in range(len(widths))
    ]
    for number, row in enumerate(cells):
        if groups and number - 1 in groups:
            click.echo(groups[number - 1])
        line = "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        click.echo(line.rstrip())


def typed_command() -> str:
    """Return the command that is running, as it can be typed again, without options that change only what is shown.

    It goes into reports, which travel: of a path that is absolute, only the part inside the present folder is said, or
    the name.
    """
    context = click.get_current_context()
    options: list[object] = []
    arguments: list[object] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        typed = context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)
        if not typed or name in _SHOWN_ONLY:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            arguments.append(_travelling(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            options.append(parameter.opts[0] if value else (parameter.secondary_opts or parameter.opts)[0])
        else:
            for each in value if parameter.multiple else (value,):
                options += [parameter.opts[0], _travelling(each)]
    return command_line(context.command.name or "", *arguments, *options)


def _travelling(value: Any) -> Any:
    path = Path(value) if isinstance(value, (str, Path)) else None
    if path is None or not path.is_absolute():
        return value
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)


def say_missing_page(quiet: bool) -> None:
    """Say before hours of work that there will be no page, and how to get one."""
    if (missing := missing_modules("report")) and not quiet:
        click.echo(
            f"report.html will not be written, report.json will: it needs {', '.join(missing)}: {install('report')}",
            err=True,
        )


def say_written(written: Written) -> None:
    """Say on standard error where a report is: standard output belongs to figures."""
    click.echo(f"report: {written.html or written.json}", err=True)
    if written.hint:
        click.echo(written.hint, err=True)


def evaluation_values(result: EvaluationResult) -> dict[str, Any]:
    """Collect what `evaluate --json` prints, for `print_json`."""
    settings, suite = result.settings, result.suite
    values: dict[str, Any] = {"bundle": str(settings.bundle), "seed": settings.seed}
    if result.comparison:
        values |= {"reference": str(settings.reference), "data": str(settings.data or "built-in")}
        values |= {name: getattr(result.comparison, name) for name in _COMPARISON}
    if suite:
        values |= {"suite": suite.settings.data, "metric": suite.metric, "asked": suite.asked}
        values |= {"scores": suite.total, "tags": suite.tags, "wrong": suite.mistakes}
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
    kl = f"mean {rounded(greedy.kl_mean)}, p99 {rounded(greedy.kl_p99)}, max {rounded(greedy.kl_max)} nats"
    rows: list[Row] = [
        ("questions", f"{found.cases}, {found.image_tokens} image tokens"),
        ("tokens compared", greedy.positions),
        ("KL divergence", kl),
        ("same most probable token", share(greedy.top1_agreement)),
        ("largest in", found.worst_case),
        ("greedy answers the same", share(found.same_answers)),
        ("greedy tokens the same", f"{share(found.same_prefix)} before the first difference"),
    ]
    if answers:
        rows.append(("perplexity of the answers", _perplexities(answers)))
        rows.append(("KL on the answers", f"mean {rounded(answers.kl_mean)} nats over {answers.positions} tokens"))
    return rows


def _perplexities(answers: DivergenceSummary) -> str:
    from internvl_edge.evaluation.divergence import MEANINGFUL_PERPLEXITY

    if answers.has_perplexity:
        return f"{rounded(answers.candidate_perplexity, 4)}, reference {rounded(answers.reference_perplexity, 4)}"
    return (
        f"left out: the reference's is {rounded(answers.reference_perplexity)}, above {MEANINGFUL_PERPLEXITY:,.0f}, so "
        "the model would not say these answers"
    )


def _suite_rows(found: SuiteResult) -> list[Row]:
    """List the main metric in all and by tag, then the other metrics, beside those of a reference."""
    rows: list[Row] = [("suite", f"{found.asked} question{'s' if found.asked > 1 else ''} of {found.settings.data}")]
    for name, result in found.total.items():
        rows.append((name, _score(result)))
        if name == found.metric:
            rows += [(f"  {tag}", _score(results[name])) for tag, results in found.tags.items() if name in results]
    methods = {
        estimate.method for result in found.total.values() for estimate in (result.bundle, result.loss) if estimate
    }
    rows.append(("intervals", f"95 %, {' and '.join(sorted(methods, reverse=True))}"))
    return rows


def _score(result: MetricResult) -> str:
    """Write a score with its interval, and how much of the reference's is lost."""
    text = f"{_estimate(result.bundle)} of {result.asked}"
    if result.reference and result.loss:
        text += f", reference {share(result.reference.value)}, loss {_estimate(result.loss)}"
    return text


def _estimate(found: Estimate) -> str:
    return f"{share(found.value)} ({share(found.low)} to {share(found.high)})"
