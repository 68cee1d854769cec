"""`internvl-edge bench BUNDLE`: measure speed and memory on this machine, and compare them with its limits."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import install
from internvl_edge.base.files import readable_disk_errors, replacing
from internvl_edge.base.units import size
from internvl_edge.runtime.bench import BenchResult, bench

from .options import loading_options
from .output import print_json, print_table


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--repeat", type=int, default=3, show_default=True, help="Number of runs per figure. The median is shown."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a bar plot to this PNG or SVG file.")
@loading_options
def command(bundle: Path, repeat: int, as_json: bool, plot: Path | None, **loading: Any) -> None:
    """Measure BUNDLE on this machine, and print the figures.

    The figures are the load time, vision time per tile, prefill and decode rates, time to first token and peak RSS.
    Each decode rate is also shown as a share of what the measured memory bandwidth allows.
    """
    if plot is not None:
        _require_plottable(plot)
    report = bench(bundle, repeat=repeat, **loading)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if plot is not None:
        _plot(report, plot)


def _print(report: BenchResult) -> None:
    for figure in report.figures:
        limit = report.decode_limit.get(figure.name)
        share = "" if limit is None else f"{limit:.0%} of what memory allows"
        spread = f"± {figure.spread:.0%}" if figure.spread else ""
        click.echo(f"{figure.name:<26} {figure.value:10.2f} {figure.unit:<9} {spread:<6} {share}".rstrip())
    print_table(
        [
            ("peak memory", size(report.peak_rss_bytes)),
            ("on disk", size(report.disk_bytes)),
            ("device", report.device),
            ("machine", f"{report.threads} threads, reads {report.bandwidth / 1e9:.1f} GB/s"),
            ("", f"float32 products {report.matrix_rate / 1e9:.0f} GFLOP/s"),
        ]
    )


def _require_plottable(path: Path) -> None:
    """Check that a plot can be written, before anything is measured.

    This does not import matplotlib, because its memory would count in the peak RSS of the run.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise EdgeError(f"--plot {path}: bar plots are PNG or SVG files; end the name in .png or .svg")
    if not path.parent.is_dir():
        raise EdgeError(f"--plot {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise EdgeError(f"--plot {path}: it cannot be written; give another file")
    if find_spec("matplotlib") is None:
        raise EdgeError(f"--plot needs the package matplotlib: {install('report')}")


def _plot(report: BenchResult, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    units = list(dict.fromkeys(figure.unit for figure in report.figures))
    chart, axes = pyplot.subplots(1, len(units), figsize=(4 * len(units), 3.2), layout="constrained")
    for axis, unit in zip(axes, units, strict=True):
        figures = [figure for figure in report.figures if figure.unit == unit]
        values = [figure.value for figure in figures]
        errors = [figure.value * figure.spread for figure in figures]
        bars = axis.barh([figure.name for figure in figures], values, xerr=errors, color="#4878a8")
        axis.bar_label(bars, fmt="%.3g", padding=4)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel(unit)
    chart.suptitle(f"{report.bundle}, {report.threads} threads")
    with readable_disk_errors(path, "make room", "give another file"), replacing(path) as temporary:
        chart.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
