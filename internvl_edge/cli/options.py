"""Options that `run` and `chat` share: how a bundle is loaded and how it answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from internvl_edge.bundle.names import DECODERS
from internvl_edge.runtime.engines.choice import ENGINES
from internvl_edge.runtime.model import DEFAULT_CONTEXT, DEVICES, InternVL
from internvl_edge.runtime.options import ChatOptions

Command = Callable[..., Any]

_LOADING = (
    click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True),
    click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="auto",
        show_default=True,
        help="On the CPU; openvino computes tiles and prompts, onnxruntime answers.",
    ),
    click.option("--dialect", type=click.Choice(list(DECODERS)), help="Decoder graph to run [default: the fastest]."),
    click.option(
        "--context", type=int, default=DEFAULT_CONTEXT, show_default=True, help="Tokens of prompt and answer."
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all cores]."),
)
_ANSWERING = (
    click.option(
        "--max-tiles", type=int, multiple=True, help="Most tiles of an image: once for all, or one per image."
    ),
    click.option("--system", help="System text instead of the checkpoint's; empty leaves it out."),
    click.option("--max-new-tokens", type=int, default=1024, show_default=True),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Sample among the k most probable tokens."),
    click.option("--top-p", type=float, default=1.0, help="Sample among the tokens that make up this probability."),
    click.option("--repetition-penalty", type=float, default=1.0),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
    click.option("--speculate", is_flag=True, help="Guess tokens from the prompt and verify several at once."),
    click.option("--exif", is_flag=True, help="Turn photos upright; the original model code does not."),
)


def loading_options(command: Command) -> Command:
    """Adds --device, --engine, --dialect, --context, --threads."""
    return _apply(_LOADING, command)


def answering_options(command: Command) -> Command:
    """Adds what `ChatOptions` holds, except history."""
    return _apply(_ANSWERING, command)


def load_model(folder: Path, values: dict[str, Any]) -> InternVL:
    """Load a bundle as the options say; takes its options out of `values`."""
    names = ("device", "engine", "dialect", "context", "threads")
    return InternVL.load(folder, **{name: values.pop(name) for name in names})


def chat_options(values: dict[str, Any]) -> ChatOptions:
    """The rest of `values` as `ChatOptions`."""
    tiles = values.pop("max_tiles")
    options: ChatOptions = {"max_tiles": tiles[0] if len(tiles) == 1 else (tiles or None)}
    options.update(values)  # type: ignore[typeddict-item]  # the commands' options are the fields of ChatOptions
    return options


def _apply(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
