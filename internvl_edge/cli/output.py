"""Print what commands found: JSON objects, tables, and where a report lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from internvl_edge.base.jsonable import encode

if TYPE_CHECKING:
    from internvl_edge.evaluation.report.files import Written


def print_json(values: Any) -> None:
    """One JSON value on one line of standard output; dataclasses and numbers that are none as `report.codec` has it."""
    click.echo(json.dumps(encode(values), ensure_ascii=False, allow_nan=False))


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values, aligned."""
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
    """Where a report is, on standard error: standard output belongs to figures."""
    click.echo(f"report: {written.html or written.json}", err=True)
    if written.hint:
        click.echo(written.hint, err=True)
