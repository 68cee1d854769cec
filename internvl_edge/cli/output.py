"""How commands print: JSON objects, sizes, and plain two-column tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
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


def say_written(written: Written) -> None:
    """Where a report is, on standard error: standard output belongs to figures."""
    click.echo(f"report: {written.html or written.json}", err=True)
    if written.hint:
        click.echo(written.hint, err=True)
