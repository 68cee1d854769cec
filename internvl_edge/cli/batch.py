"""`internvl-edge batch BUNDLE INPUT -o OUT`: answer every image of a folder, or every row of a table.

Exit status 1 where rows have errors.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError, PromptError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.json_files import read_bytes
from internvl_edge.base.text import shown
from internvl_edge.base.units import rounded
from internvl_edge.batch.cluster import Fleet, parse_workers
from internvl_edge.batch.fleet import FleetSummary, run_fleet
from internvl_edge.batch.inputs import read_items
from internvl_edge.batch.items import Ask
from internvl_edge.batch.journal import answering_record, bundle_digest, open_journal, warn_of_versions
from internvl_edge.batch.node_bundle import is_address, node_bundle
from internvl_edge.batch.output import require_parquet, write_jsonl, write_parquet
from internvl_edge.batch.run import ROWS, Summary, run
from internvl_edge.batch.worker import Job
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import MOST_ROWS

from .options import (
    LOADING_NAMES,
    answer_format,
    answering_options,
    chat_options,
    chosen,
    engine_extra,
    form_options,
    is_given,
    load_model,
    loading_options,
    voting_options,
)
from .output import print_columns, print_json, quiet_option, shown_progress, stoppable

_LINES = (".jsonl", ".ndjson")
_PROMPT_BYTES = 1 << 20


@click.command(
    "batch",
    epilog="Exit status: 0 every row has an answer, 1 some rows have an error (their column error says it), 2 a "
    "mistake, with finished rows kept.",
)
@click.argument("bundle", type=click.Path())
@click.argument("inputs", metavar="INPUT", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="File of answers, .jsonl or .parquet. An interrupted batch continues with the same command.",
)
@click.option("--prompt", metavar="TEXT|@FILE", help="Question of every row that has none of its own.")
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    default=ROWS,
    show_default=True,
    help="Number of answers that are computed together on a CPU.",
)
@click.option("--ordered", is_flag=True, help="Write JSONL in the order of INPUT, when all rows are finished.")
@click.option("--keep", multiple=True, metavar="COLUMN", help="Column of the table to copy to the output (repeatable).")
@click.option("--limit", type=click.IntRange(min=1), help="Take only this many rows of INPUT.")
@click.option("--max-errors", type=click.IntRange(min=0), help="Stop when more rows than this have errors.")
@click.option("--retry-errors", is_flag=True, help="Ask the rows again that have errors from an earlier run.")
@click.option(
    "--ray", metavar="ADDRESS|auto", help="Ray cluster that answers; --output is then a folder. See docs/fleet.md."
)
@click.option("--workers", metavar="N|MIN:MAX", help="Workers on the cluster.  [default: as many as fit]")
@click.option(
    "--cpus-per-worker", type=click.FloatRange(min=0.01), help="CPUs of a worker on the cluster.  [default: 1]"
)
@click.option("--gpus-per-worker", type=click.FloatRange(min=0), help="GPUs of a worker on the cluster.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
@quiet_option
@voting_options
@form_options
@loading_options
@answering_options
@stoppable("finished rows are kept; repeat the command to continue")
def command(
    bundle: str,
    inputs: tuple[str, ...],
    output: Path,
    prompt: str | None,
    rows: int,
    ordered: bool,
    keep: tuple[str, ...],
    limit: int | None,
    max_errors: int | None,
    retry_errors: bool,
    ray: str | None,
    workers: str | None,
    cpus_per_worker: float | None,
    gpus_per_worker: float | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Ask BUNDLE about every row of INPUT, and write one row for each answer.

    INPUT is a folder of images, a quoted pattern such as 'scans/**/*.png', or a table: .jsonl, .csv or .parquet with
    the columns id, images and prompt, and any of json_schema, regex, choices, votes, reason, max_tiles,
    max_new_tokens, seed, temperature and so on. Finished rows survive a kill, a full disk and a power failure.
    """
    if len(inputs) > 1:
        raise PromptError(f"{len(inputs)} inputs were given, expected one; quote a pattern: 'scans/*.png'")
    fleet = _fleet(ray, workers, cpus_per_worker, gpus_per_worker, ordered or retry_errors)
    journal_path = output if fleet else _journal_path(output, ordered)
    if not fleet and output.suffix.lower() == ".parquet":
        require_parquet()
    ask = _ask(prompt, values)
    done: Summary
    with shown_progress(quiet) as progress:
        progress.expect(2)
        with progress.waiting(f"reading {inputs[0]}"):
            found = read_items(inputs[0], ask, keep=keep, limit=limit)
        if found.unused:
            progress.remark(f"columns not used: {shown(', '.join(found.unused), 200)} (--keep copies one)")
        structured = ("structured",) if any(item.ask.form for item in found.items) else ()
        folder, source = _found(bundle, values, fleet is not None)
        if fleet and values["device"] == "auto" and not fleet.gpus:
            values["device"] = "cpu"
        require_extras("batch", *engine_extra(folder, values["device"], values["engine"]), *structured)
        if not fleet or values["device"] == "cpu":
            values |= chosen(folder, values, progress)
        several = rows > 1 and values["device"] == "cpu"
        engine = {name: values[name] for name in ("device", "engine", "dialect", "exact")} | {"several_rows": several}
        manifest = Manifest.read(folder)
        record = answering_record(manifest, engine, ask)
        if fleet:
            loading = {name: values[name] for name in LOADING_NAMES}
            done = run_fleet(
                Job(source, bundle_digest(manifest), loading, rows, max_errors),
                found.items,
                output,
                record,
                fleet,
                progress,
            )
        else:
            with open_journal(journal_path, record) as journal:
                if retry_errors:
                    journal.drop_failed()
                warn_of_versions(journal.changed, output, progress)
                load = partial(load_model, folder, values, progress, rows=rows, prompts_first=True)
                done = run(load, found.items, journal, max_errors=max_errors, progress=progress)
                if journal_path != output and not done.stopped:
                    write = write_jsonl if output.suffix.lower() in _LINES else write_parquet
                    with progress.phase(f"writing {output}"):
                        write(journal_path, found.items, output)
    _say(done, output, as_json)
    return 1 if done.failed else 0


def _found(bundle: str, values: dict[str, Any], on_cluster: bool) -> tuple[Path, str]:
    """Return the folder of a bundle here, and what the nodes of a cluster take it from. `values` lose the revision."""
    revision, values["revision"] = values["revision"], None
    if is_address(bundle) and on_cluster:
        return node_bundle(bundle), bundle
    folder = find_bundle(bundle, revision, values["device"])
    return node_bundle(str(folder)) if on_cluster else folder, os.path.abspath(folder)


def _fleet(
    ray: str | None, workers: str | None, cpus: float | None, gpus: float | None, alone_only: bool
) -> Fleet | None:
    """Return the cluster that the options name; None for this machine alone."""
    if ray is None:
        if any(each is not None for each in (workers, cpus, gpus)):
            raise EdgeError("--workers, --cpus-per-worker and --gpus-per-worker are for a cluster; give --ray, or none")
        return None
    if alone_only:
        raise EdgeError("--ordered and --retry-errors are for one machine; leave them out with --ray")
    least, most = parse_workers(workers)
    return Fleet(ray, least, most, 1.0 if cpus is None else cpus, gpus or 0.0)


def _journal_path(output: Path, ordered: bool) -> Path:
    """Return where finished rows are kept: the output itself, or a file beside one that is written at the end."""
    suffix = output.suffix.lower()
    if suffix not in (*_LINES, ".parquet"):
        raise PromptError(f"--output {output} has no known ending; give a name with .jsonl or .parquet")
    beside = output.with_name(f"{output.name}.journal")
    if suffix in _LINES and not ordered:
        if beside.exists():
            raise EdgeError(f"{beside} was begun with --ordered; give --ordered again, or another --output")
        return output
    if output.exists() and not beside.exists():
        raise EdgeError(f"{output} exists and has no journal {beside.name}; give another --output, or remove it")
    return beside


def _ask(prompt: str | None, values: dict[str, Any]) -> Ask:
    """Return how rows are asked, from the options that are given; this leaves the loading options in `values`."""
    if prompt is not None and prompt.startswith("@"):
        text = read_bytes(Path(prompt[1:]), PromptError, "give --prompt @FILE, or a text", limit=_PROMPT_BYTES)
        try:
            prompt = text.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise PromptError(f"{prompt[1:]} is not UTF-8 at byte {error.start}; give a text") from None
    form = answer_format(values.pop("json_schema"), values.pop("regex"), values["choices"])
    voting = {name: values.pop(name) for name in ("votes", "sure", "reason", "choices")}
    choices = voting.pop("choices") or None
    names = [name for name in values if name not in LOADING_NAMES]
    options = chat_options({name: values.pop(name) for name in names})
    return Ask(
        prompt=prompt,
        answer_format=None if choices else form,
        choices=choices,
        options={name: value for name, value in options.items() if is_given(name)},
        **voting,
    )


def _say(done: Summary, output: Path, as_json: bool) -> None:
    fleet = done if isinstance(done, FleetSummary) else None
    if as_json:
        values = {
            "output": str(output),
            "items": done.items,
            "answered": done.answered,
            "failed": done.failed,
            "earlier": done.earlier,
            "output_tokens": done.output_tokens,
            "seconds": round(done.seconds, 3),
            "items_per_s": round(done.items_per_s, 4),
            "stopped": done.stopped or None,
        }
        more = {"repeated": fleet.repeated, "restarts": fleet.restarts, "workers": fleet.workers} if fleet else {}
        print_json(values | more)
    else:
        earlier = f", {done.earlier} of them earlier" if done.earlier else ""
        errors = f", {done.failed} have errors" if done.failed else ""
        rate = f"; {rounded(done.items_per_s)} items/s" if done.items > done.earlier else ""
        click.echo(f"{output}: {done.answered} of {done.items} rows answered{earlier}{errors}{rate}")
        if fleet and fleet.repeated:
            click.echo(f"{fleet.repeated} rows were computed again after a worker or a node was lost")
        if fleet and fleet.workers:
            rows = [
                (each.worker, each.items, each.failed, rounded(each.items_per_s), rounded(each.loading_s))
                for each in fleet.workers
            ]
            print_columns(("worker", "rows", "errors", "rows/s", "loading, s"), rows)
    if done.stopped:
        click.echo(f"stopped: {done.stopped}; finished rows are kept", err=True)
