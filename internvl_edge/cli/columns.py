"""Tables with a heading and any number of columns, aligned for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click


def print_columns(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; columns of numbers and their units line up at the right, text at the left."""
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
