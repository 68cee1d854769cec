"""`internvl-edge report BUNDLE...`: show what is known of bundles, beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from internvl_edge.evaluation.report import (
    Overview,
    find_report,
    overview,
    report_folder,
    require_own_report,
    write_overview,
    write_report,
)
from internvl_edge.evaluation.report.overview import RUNS, overview_values

from .output import print_columns, print_json, say_written


@click.command("report")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the page.  [default: BUNDLE.report for one bundle; no page for several]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(bundles: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Show what is known of BUNDLES, beside each other: size, quality, speed, and where their answers differ.

    Nothing is measured: evaluate and bench --report do that. A folder with a report.json, such as a quantized
    checkpoint, is shown as well. Figures of runs with other settings are named, and no value of them is called the
    best.
    """
    reports = [find_report(folder) for folder in bundles]
    found = overview(reports, [str(folder) for folder in bundles])
    if as_json:
        print_json(overview_values(reports, found))
    else:
        _print(found)
    for warning in found.warnings:
        click.echo(warning, err=True)
    if len(reports) == 1:
        folder = output or report_folder(bundles[0])
        require_own_report(folder)
        say_written(write_report(reports[0], folder))
    elif output is not None:
        say_written(write_overview(found, reports, output))


def _print(found: Overview) -> None:
    """Print the rows as a table. How figures were measured is longer than a column, so it follows, each run once."""
    rows = [row for row in found.rows if row.section != RUNS]
    print_columns(("", *found.names), [(row.label, *_texts(row.texts, row.best)) for row in rows])
    for row in found.rows:
        runs: dict[str, list[str]] = {}
        for name, text in zip(found.names, row.texts, strict=True):
            if row.section == RUNS and text:
                runs.setdefault(text, []).append(name)
        for text, names in runs.items():
            click.echo(f"{', '.join(names)} {row.label}: {text}")


def _texts(texts: tuple[str, ...], best: int | None) -> list[str]:
    """Mark the best value as a terminal without bold letters can."""
    return [f"{text or '-'} *" if place == best else text or "-" for place, text in enumerate(texts)]
