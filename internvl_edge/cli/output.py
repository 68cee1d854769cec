"""How commands print: JSON objects, sizes, and plain two-column tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click


def print_json(values: Any) -> None:
    """One JSON value on one line of standard output."""
    click.echo(json.dumps(values, ensure_ascii=False))


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values, aligned."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def size(count: float) -> str:
    """A number of bytes for people: "1.88 GB" (powers of ten, as disks count)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
