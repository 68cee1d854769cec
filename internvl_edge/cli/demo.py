"""`internvl-edge demo`: export the shipped demo model and ask it about the shipped images."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from internvl_edge.base.extras import install, require_extras, requires
from internvl_edge.base.folders import scratch_folder
from internvl_edge.base.progress import Progress
from internvl_edge.demo import CHECKPOINT, Question, demo_questions
from internvl_edge.runtime.model import InternVL

from .output import hint, print_columns, print_json, quiet_option, shown_progress


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
@quiet_option
def command(checkpoint: Path | None, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Export the bundled demo model and run it on the bundled sample images.

    Each line of the output shows an image, a question, the answer and the expected answer.
    """
    checkpoint = checkpoint or CHECKPOINT
    require_extras("the demo", "cpu", "export")
    questions = demo_questions()
    with _folder(output) as folder, shown_progress(quiet) as progress:
        progress.expect(3)
        started = time.perf_counter()
        bundle = _export(checkpoint, Path(folder) if output else Path(folder) / "bundle", progress)
        exported = time.perf_counter() - started
        answering = progress.phase("answering", len(questions), "questions")
        answers = []
        with answering as advance, InternVL.load(bundle) as model:
            for asked in questions:
                answers.append(model.chat(asked.question, [asked.image]).text)
                advance(1)
        seconds = time.perf_counter() - started
    facts = [_facts(asked, answer) for asked, answer in zip(questions, answers, strict=True)]
    if as_json:
        print_json({"checkpoint": str(checkpoint), "seconds": round(seconds, 2), "answers": facts})
        return
    click.echo(f"{checkpoint}: exported in {exported:.1f} s, {len(facts)} questions in {seconds - exported:.1f} s\n")
    print_columns(list(facts[0]), [list(row.values()) for row in facts])
    click.echo("\nIt reads what it was trained on: printed lines, receipts, meters, charts, simple scenes.")
    if quiet:
        return
    if output:
        hint("run", output, "--image", facts[0]["image"], "Read all the text.")
    else:
        words = ("quantize", checkpoint, "-o", "demo-int4", "--group-size", 64, "--lm-head", "int8")
        hint(*words, after=f"Next, with {install('quantize')}")


def _folder(output: Path | None) -> AbstractContextManager[str | Path]:
    return nullcontext(output) if output else scratch_folder("demo")


def _export(checkpoint: Path, bundle: Path, progress: Progress) -> Path:
    with requires("cpu,export", "the demo"):
        from internvl_edge.export import export_bundle
    return export_bundle(checkpoint, bundle, progress=progress)


def _facts(asked: Question, answer: str) -> dict[str, str]:
    image = asked.image
    shown = image.relative_to(Path.cwd()) if image.is_relative_to(Path.cwd()) else image
    return {"image": str(shown), "question": asked.question, "answer": answer, "expected": asked.expected}
