"""`internvl-edge run BUNDLE QUESTION`: answer one question about images or a video."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import PromptError
from internvl_edge.model.prompt import video_question
from internvl_edge.runtime.reply import Reply

from .options import answering_options, chat_options, load_model, loading_options
from .output import print_json, say_device


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("question")
@click.option(
    "--image",
    "images",
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
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with text, tokens and timings instead of streaming the text.",
)
@loading_options
@answering_options
def command(
    bundle: Path, question: str, images: tuple[str, ...], video: Path | None, frames: int, as_json: bool, **values: Any
) -> None:
    """Ask BUNDLE one QUESTION about images or a video, and print the answer.

    An image takes the place of its <image> mark in QUESTION. Without marks, images go in front of QUESTION.
    """
    sources: list[Any] = list(images)
    if video is not None:
        if sources:
            raise PromptError("--video and --image cannot be combined; ask about one of them")
        from internvl_edge.model.video import load_video

        sources = list(load_video(video, frames))
        question, values["max_tiles"] = video_question(question, len(sources)), (1,)
    if not question.strip():
        raise PromptError("the question is empty; ask something")
    with load_model(bundle, values) as model:
        stream = model.stream(question, sources, **chat_options(values))
        say_device(model.choice)
        if as_json:
            print_json(_as_json(stream.reply))
            return
        for piece in stream:
            click.echo(piece, nl=False)
        click.echo()
        if sys.stderr.isatty():
            timings = stream.reply.timings
            first, rate = timings["first_token_s"], timings["decode_tokens_per_s"]
            click.secho(f"first token after {first:.2f} s, then {rate:.1f} tokens/s", dim=True, err=True)


def _as_json(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "output_ids": reply.output_ids,
        "prompt_tokens": len(reply.prompt_ids),
        "image_tokens": reply.image_tokens,
        "tiles": reply.tiles,
        "finish_reason": reply.finish_reason,
        "timings": reply.timings,
    }
