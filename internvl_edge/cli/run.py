"""`internvl-edge run BUNDLE QUESTION`: answer one question about images or a video."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import PromptError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.text import shown
from internvl_edge.model.prompt import Text, video_parts
from internvl_edge.runtime.reply import Reply, ReplyStream
from internvl_edge.runtime.thinking import told_apart
from internvl_edge.runtime.voting import SAMPLING, reasoning_question

from .options import (
    answer_format,
    answering_options,
    chat_options,
    engine_extra,
    form_options,
    is_given,
    load_model,
    loading_options,
    voting_options,
)
from .output import print_json, quiet_option, reading, shown_progress, timing_line

# More rows would not be much faster on a CPU.
_MOST_ROWS = 8


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("question")
@click.option(
    "--image",
    "images",
    type=click.Path(),
    multiple=True,
    help="An image file (repeatable; images take the <image> marks of QUESTION in order).",
)
@click.option("--video", type=click.Path(path_type=Path), help="A video file. Its frames become the images.")
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of frames to take from the video.",
)
@voting_options
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with text, tokens and timings instead of streaming the text.",
)
@form_options
@quiet_option
@loading_options
@answering_options
def command(
    bundle: Path,
    question: str,
    images: tuple[str, ...],
    video: Path | None,
    frames: int,
    votes: int | None,
    sure: float | None,
    reason: bool,
    as_json: bool,
    quiet: bool,
    json_schema: Path | None,
    regex: str | None,
    choices: tuple[str, ...],
    **values: Any,
) -> None:
    """Ask BUNDLE one QUESTION about images or a video, and print the answer.

    An image takes the place of its <image> mark in QUESTION. Without marks, images go in front of QUESTION.
    """
    video_extra = () if video is None else ("video",)
    require_extras("run", *engine_extra(bundle, values["device"], values["engine"]), *video_extra)
    if not question.strip():
        raise PromptError("the question is empty; ask something")
    asked, sources = (
        (question, list(images)) if video is None else _about_video(question, images, video, frames, values)
    )
    values["answer_format"] = answer_format(json_schema, regex, choices)
    if reason:
        _check_reasoning(values, choices)
    if votes is not None or (reason and choices):
        voting = {"votes": votes or 1, "sure": sure, "reason": reason, "choices": choices or None}
        _vote(bundle, asked, sources, voting, as_json, quiet, values)
        return
    if sure is not None:
        raise PromptError("--sure is for votes; give --votes too, or leave it out")
    if reason:
        asked = reasoning_question(asked)
    with ExitStack() as stack:
        with shown_progress(quiet) as progress:
            progress.expect(2)
            model = stack.enter_context(load_model(bundle, values, progress))
            with progress.phase(reading(len(sources))):
                stream = model.stream(asked, sources, **chat_options(values))
                first = [stream.reply.text] if as_json else list(islice(stream, 1))
        if as_json:
            print_json(_as_json(stream.reply, values["think"]))
            return
        _print_answer(stream, first, values["think"], quiet)
        if sys.stderr.isatty() and not quiet:
            click.secho(timing_line(stream.reply), dim=True, err=True)


def _check_reasoning(values: dict[str, Any], choices: tuple[str, ...]) -> None:
    if values["think"]:
        raise PromptError("--reason and --think both ask for reasoning before the answer; give one of them")
    if values["answer_format"] and not choices:
        raise PromptError("--reason asks for free text first; leave it out, or give --choice for the form of the end")


def _print_answer(stream: ReplyStream, first: list[str], think: bool, quiet: bool) -> None:
    """Print the answer as it comes; thinking before it is dimmed, on standard error, and left out if `quiet`."""
    pieces, answered = chain(first, stream), False
    for is_thinking, piece in told_apart(pieces) if think else ((False, piece) for piece in pieces):
        if not is_thinking:
            answered = True
            click.echo(piece, nl=False)
        elif not quiet:
            click.secho(piece, dim=True, nl=False, err=True)
    if think and stream.reply.thinking is not None and not quiet:
        click.echo(err=True)
    if think and not answered and stream.reply.finish_reason == "length":
        raise PromptError("the tokens were used up before the end of the thinking; raise --max-new-tokens")
    click.echo()


def _about_video(
    question: str, images: tuple[str, ...], video: Path, frames: int, values: dict[str, Any]
) -> tuple[Text, list[Any]]:
    """Return a question about the frames of a video, and these."""
    if images:
        raise PromptError("--video and --image cannot be combined; ask about one of them")
    from internvl_edge.model.video import load_video

    sources = list(load_video(video, frames))
    values["max_tiles"] = (1,)
    return video_parts(question, len(sources)), sources


def _vote(
    bundle: Path,
    question: Text,
    images: list[Any],
    voting: dict[str, Any],
    as_json: bool,
    quiet: bool,
    values: dict[str, Any],
) -> None:
    if voting["choices"]:
        values["answer_format"] = None
    given = {name for name in SAMPLING if is_given(name)}
    with ExitStack() as stack, shown_progress(quiet) as progress:
        progress.expect(2)
        model = stack.enter_context(load_model(bundle, values, progress, rows=min(voting["votes"], _MOST_ROWS)))
        options: dict[str, Any] = dict(chat_options(values))
        for name in SAMPLING.keys() - given:
            options.pop(name, None)
        with progress.phase(f"{reading(len(images))}, {voting['votes']} votes"):
            outcome = model.vote(question, images, **voting, **options)
    if as_json:
        print_json(
            {
                "answer": outcome.answer,
                "agreement": outcome.agreement,
                "counts": outcome.counts,
                "stopped_early": outcome.stopped_early,
                "replies": [_as_json(reply, options["think"]) for reply in outcome.replies],
            }
        )
        return
    if outcome.answer is None:
        raise PromptError(f"none of {len(outcome.replies)} replies holds an answer; raise --max-new-tokens")
    click.echo(outcome.answer)
    first = outcome.counts[outcome.answer]
    others = "".join(f", {count} {shown(answer)}" for answer, count in list(outcome.counts.items())[1:])
    click.secho(f"{first} of {len(outcome.replies)} replies agree{others}", dim=True, err=True)


def _as_json(reply: Reply, think: bool) -> dict[str, Any]:
    return {
        "text": reply.text,
        **({"thinking": reply.thinking, "answer": reply.answer} if think else {}),
        "output_ids": reply.output_ids,
        "prompt_tokens": len(reply.prompt_ids),
        "image_tokens": reply.image_tokens,
        "tiles": reply.tiles,
        "finish_reason": reply.finish_reason,
        "timings": reply.timings,
    }
