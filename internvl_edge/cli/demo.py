"""`internvl-edge demo`: export the shipped demo model and ask it about the shipped images."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from internvl_edge.base.extras import install, requires
from internvl_edge.base.folders import scratch_folder
from internvl_edge.demo import CHECKPOINT, Question, demo_questions
from internvl_edge.runtime.model import InternVL

from .output import print_columns, print_json


@click.command("demo")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Checkpoint folder of another small model.  [default: the shipped one]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder that keeps the bundle.  [default: a temporary folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(checkpoint: Path | None, output: Path | None, as_json: bool) -> None:
    """Export the small model that comes with this package to a bundle, and ask it about images that also come with it.

    Each line of the output shows an image, a question, the answer and the expected answer.
    """
    checkpoint = checkpoint or CHECKPOINT
    with _folder(output) as folder:
        started = time.perf_counter()
        bundle = _export(checkpoint, Path(folder) if output else Path(folder) / "bundle")
        exported = time.perf_counter() - started
        with InternVL.load(bundle) as model:
            questions = demo_questions()
            answers = [model.chat(asked.question, [asked.image]).text for asked in questions]
        seconds = time.perf_counter() - started
    facts = [_facts(asked, answer) for asked, answer in zip(questions, answers, strict=True)]
    if as_json:
        print_json({"checkpoint": str(checkpoint), "seconds": round(seconds, 2), "answers": facts})
        return
    click.echo(f"{checkpoint}: exported in {exported:.1f} s, {len(facts)} questions in {seconds - exported:.1f} s\n")
    print_columns(list(facts[0]), [list(row.values()) for row in facts])
    click.echo("\nIt reads what it was trained on: printed lines, receipts, meters, charts, simple scenes.")
    if output:
        click.echo(f'Next: internvl-edge run {output} --image {facts[0]["image"]} "Read all the text."')
    else:
        command = f"internvl-edge quantize {checkpoint} -o demo-int4 --group-size 64 --lm-head int8"
        click.echo(f"Next, with {install('quantize')}: {command}")


def _folder(output: Path | None) -> AbstractContextManager[str | Path]:
    return nullcontext(output) if output else scratch_folder("demo")


def _export(checkpoint: Path, bundle: Path) -> Path:
    with requires("cpu,export", "the demo"):
        from internvl_edge.export import export_bundle
    return export_bundle(checkpoint, bundle)


def _facts(asked: Question, answer: str) -> dict[str, str]:
    image = asked.image
    shown = image.relative_to(Path.cwd()) if image.is_relative_to(Path.cwd()) else image
    return {"image": str(shown), "question": asked.question, "answer": answer, "expected": asked.expected}
