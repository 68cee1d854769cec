"""`internvl-edge bench BUNDLE`: measure speed and memory on this machine, and compare them with its limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.files import readable_disk_errors, replacing
from internvl_edge.base.machine import processor
from internvl_edge.base.units import rounded, size
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.runtime.bench import BenchResult, Figure, bench
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import MOST_ROWS

from .options import chosen, engine_extra, loading_options
from .output import print_json, print_table, quiet_option, say_written, shown_progress, typed_command


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--repeat", type=int, default=3, show_default=True, help="Number of runs per figure. The median is shown."
)
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    default=1,
    help="Also measure this many answers side by side.  [default: 1, one answer at a time]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--report",
    "into_report",
    is_flag=True,
    help="Also write the figures into the report of the bundle, BUNDLE.report, beside what evaluate found.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a bar plot to this PNG or SVG file.")
@quiet_option
@loading_options
def command(
    bundle: Path,
    repeat: int,
    rows: int,
    as_json: bool,
    into_report: bool,
    plot: Path | None,
    quiet: bool,
    **loading: Any,
) -> None:
    """Measure BUNDLE on this machine, and print the figures.

    The figures are the load time, vision time per tile, prefill and decode rates, time to first token and peak RSS.
    Each decode rate is also shown as a share of what the measured memory bandwidth allows.
    """
    if plot is not None:
        _require_plottable(plot)
    plot_extra = () if plot is None else ("report",)
    require_extras("bench", *engine_extra(bundle, loading["device"], loading["engine"]), *plot_extra)
    with shown_progress(quiet) as progress:
        folder = find_bundle(bundle, loading.pop("revision"), loading["device"])
        with progress.waiting("verifying the bundle"):
            loading |= chosen(folder, loading, progress)
        report = bench(folder, repeat=repeat, rows=rows, progress=progress, **loading)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if plot is not None:
        _plot(report, plot)
    if into_report:
        _write_into_report(bundle, folder, report)


def _write_into_report(given: Path, bundle: Path, speed: BenchResult) -> None:
    """Complete the report of a bundle, which was given as a folder or a hub id.

    This is imported last: its memory would count in the peak RSS of the run.
    """
    from internvl_edge.evaluation.report import (
        bundle_report,
        read_report,
        report_folder,
        require_own_report,
        write_report,
    )

    folder = report_folder(given)
    require_own_report(folder)
    quality = quality_of(Manifest.read(bundle))
    found = bundle_report(bundle, quality, speed=speed, command=typed_command())
    say_written(write_report(found.completed_by(read_report(folder)), folder))


def _print(report: BenchResult) -> None:
    for figure in report.figures:
        limit = report.decode_limit.get(figure.name)
        share = "" if limit is None else f"{limit:.0%} of what memory allows"
        spread = f"± {figure.spread:.0%}" if figure.spread else ""
        click.echo(f"{figure.name:<29} {rounded(figure.value):>8} {figure.unit:<9} {spread:<6} {share}".rstrip())
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


def _plot(report: BenchResult, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in report.figures:  # prompts and answers differ by powers of ten, although their unit is the same
        kind = figure.name.split()[0] if figure.unit == "tokens/s" else ""
        groups.setdefault((kind, figure.unit), []).append(figure)
    chart, axes = pyplot.subplots(1, len(groups), figsize=(4.5 * len(groups), 3.2), layout="constrained")
    for axis, ((kind, unit), figures) in zip(axes, groups.items(), strict=True):
        values = [figure.value for figure in figures]
        errors = [figure.value * figure.spread for figure in figures]
        bars = axis.barh([figure.name for figure in figures], values, xerr=errors, color="#4878a8")
        labels = [rounded(value) for value in values]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.invert_yaxis()
        # Room for the labels inside the frame.
        axis.set_xlim(0, 1.35 * max(value + error for value, error in zip(values, errors, strict=True)))
        axis.set_xlabel(f"{kind} {unit}".strip())
    chart.suptitle(f"{report.bundle}: {processor()}, {report.threads} threads", fontsize=10)
    with readable_disk_errors(path, "make room", "give another file"), replacing(path) as temporary:
        chart.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
