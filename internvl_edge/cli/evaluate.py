"""`internvl-edge evaluate BUNDLE --reference CHECKPOINT|BUNDLE`, `--suite NAME|FILE`, or both; the gate; the report.

Exit status 1 where a condition of --fail-if holds.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.hub import hub_source
from internvl_edge.batch.run import ROWS
from internvl_edge.bundle.gate import METRICS
from internvl_edge.bundle.manifest import is_bundle
from internvl_edge.bundle.quality_record import accept_quality, record_quality
from internvl_edge.evaluation import SCORES, SUITES, EvaluationResult, EvaluationSettings, evaluate
from internvl_edge.evaluation.report import bundle_report, read_report, report_folder, require_own_report, write_report
from internvl_edge.evaluation.suite import remove_answers
from internvl_edge.evaluation.suite_files import FORMATS
from internvl_edge.model.preprocess import MAX_TILES
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import MOST_ROWS

from . import completion
from .data_options import MOST_SAMPLES
from .options import engine_extra, loading_options
from .output import (
    evaluation_rows,
    evaluation_values,
    print_json,
    print_table,
    quiet_option,
    say_missing_page,
    say_written,
    shown_progress,
    stoppable,
    typed_command,
)

_PUBLIC = [name for name in FORMATS if name != "own"]


@click.command("evaluate", epilog=f"Metrics of --fail-if: {', '.join(METRICS)}.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(), help="Checkpoint (folder or hub id) or bundle to compare with.")
@click.option("--reference-revision", help="Branch, tag or commit of a hub id in --reference.  [default: main]")
@click.option(
    "--suite",
    metavar="NAME|FILE",
    shell_complete=completion.of(SUITES, files=True),
    help=f"Questions with known answers: {', '.join(SUITES)}, or a .jsonl or .json file of your own, or of "
    f"{', '.join(_PUBLIC)}.",
)
@click.option(
    "--metric",
    type=click.Choice(list(SCORES)),
    help="Metric by which a suite is mainly judged; all are computed.  [default: that of the file's format]",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of the images of a suite's file.  [default: the folder of the file]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Images or JSON Lines to compare on, as of calibrate.  [default: the built-in set]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1, max=MOST_SAMPLES),
    help="Number of questions.  [default: 32; 500 of a suite, all of a suite's file]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed that chooses the questions and their order.")
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1, max=MAX_TILES),
    help="Maximum number of tiles per image.  [default: the checkpoint's limit]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens of an answer.  [default: 64 that are compared; 256 with --suite]",
)
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    default=ROWS,
    show_default=True,
    help="Number of answers to a suite that are computed together on a CPU.",
)
@click.option(
    "--fail-if",
    "fail_if",
    multiple=True,
    metavar="CONDITION",
    shell_complete=completion.of(METRICS),
    help='Exit with status 1 if this condition is true, such as "kl>0.05" or "exact_match<0.95" (repeatable).',
)
@click.option(
    "--replace",
    "replace_recorded",
    is_flag=True,
    help="Replace recorded figures even if they come from more questions, longer answers or other settings.",
)
@click.option(
    "--accept",
    metavar="REASON",
    help="Accept a bundle that failed its conditions: loading it gives no warning. The reason is stored in the bundle.",
)
@click.option(
    "--record/--no-record", default=True, show_default=True, help="Store the figures in the bundle's manifest."
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Folder for report.json and report.html.  [default: BUNDLE.report]",
)
@click.option("--no-report", is_flag=True, help="Write no report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
@loading_options
@stoppable("nothing is recorded; repeat the command to measure again")
def command(
    bundle: Path,
    accept: str | None,
    record: bool,
    report: Path | None,
    no_report: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Measure the quality of BUNDLE's answers.

    With --reference, predictions and answers are compared with those of the reference on the same questions. With
    --suite, answers are scored by known answers; with both, those of the reference are too. Figures and conditions
    are stored in the bundle's manifest and in a report. ONNX Runtime computes them unless --engine or --device says
    otherwise.
    """
    found = find_bundle(bundle, values.pop("revision"), values["device"])
    if hub_source(found):  # the cache holds what the hub has, and nothing that was measured here
        record = _unrecorded(bundle, record, accept)
    folder = None if no_report else report or report_folder(bundle)
    bundle = found
    values["replace_recorded"] |= not record
    settings = EvaluationSettings(bundle, shown=6 if folder else 0, answers=folder, **values)
    if settings.reference is None and settings.suite is None and accept is not None:
        accepted = accept_quality(bundle, accept)
        click.echo(f"{bundle}: accepted, {accepted.state}: {accepted.accepted}")
        return 0
    require_extras("evaluate", *_extras(settings), *(("report",) if report else ()))
    _require_writable(bundle if record else None, folder)
    if folder:
        say_missing_page(quiet)
    with shown_progress(quiet) as progress:
        if settings.engine == "auto" and settings.device in ("auto", "cpu"):
            progress.remark(
                "engine: onnxruntime (figures are about the bundle; --engine openvino measures what it rounds)"
            )
        result = evaluate(settings, progress)
    quality = replace(result.quality, accepted=accept or "")
    if as_json:
        print_json({**evaluation_values(result), "report": folder and str(folder)})
    else:
        print_table(evaluation_rows(result))
    _say_conditions(result)
    if record:
        record_quality(bundle, quality)
    if folder:
        with stoppable("the figures are recorded, the report is not written") if record else nullcontext():
            made = bundle_report(bundle, quality, result.comparison, result.suite, command=typed_command())
            say_written(write_report(made.completed_by(read_report(folder)), folder))
            remove_answers(folder)
    return 1 if result.failed else 0


def _unrecorded(bundle: Path, record: bool, accept: str | None) -> bool:
    """Return that nothing is recorded in a bundle of the hub's cache; refuse what only a record is for."""
    if accept is not None:
        raise EdgeError(
            f"--accept is stored in the bundle, and {bundle} is in the hub's cache; give a folder of your own"
        )
    if record:
        click.echo(f"{bundle} is in the hub's cache, so the figures are not recorded in it", err=True)
    return False


def _say_conditions(result: EvaluationResult) -> None:
    """Say on standard error which conditions are others than before, and which ones failed."""
    for earlier, newer in result.replaced:
        click.echo(f"condition {earlier} of an earlier run is replaced by {newer}", err=True)
    for condition in result.dropped:
        click.echo(f"condition {condition} of an earlier run is dropped: this run did not measure its figure", err=True)
    for verdict in result.failed:
        click.echo(f"failed: {verdict}", err=True)


def _extras(settings: EvaluationSettings) -> list[str]:
    """List the extras that an evaluation needs."""
    on_cpu = settings.engine == "auto" and settings.device in ("auto", "cpu")
    extras = [*engine_extra(Path(settings.bundle), settings.device, "onnxruntime" if on_cpu else settings.engine)]
    if settings.reference is not None and not is_bundle(Path(settings.reference)):
        extras.append("export")
    if settings.suite in SUITES or (settings.reference is not None and settings.data is None):
        extras.append("synthetic")
    return extras


def _require_writable(bundle: Path | None, report: Path | None) -> None:
    """Refuse what cannot be written now, not after hours of evaluation."""
    if bundle and bundle.is_dir() and not os.access(bundle, os.W_OK):
        raise EdgeError(f"{bundle} is read-only, so it cannot carry its figures; pass --no-record")
    if report:
        require_own_report(report)
        there = next(folder for folder in (report, *report.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK):
            raise EdgeError(f"the report cannot be written to {report}; give another --report, or --no-report")
