"""Options that several commands share.

`run`, `chat`, `bench` and `evaluate` share how a bundle is loaded; `run` and `chat` also share how it answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from internvl_edge.bundle.names import DECODERS
from internvl_edge.runtime.engines.choice import ENGINES
from internvl_edge.runtime.engines.device import DEVICES
from internvl_edge.runtime.model import DEFAULT_CONTEXT, InternVL
from internvl_edge.runtime.options import ChatOptions

from .output import shown_steps

Command = Callable[..., Any]

_LOADING = (
    click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="auto",
        show_default=True,
        help="Device that runs the bundle. tensorrt runs the engines that build made; cuda runs ONNX Runtime on the "
        "GPU, for a bundle exported with --activations float16; auto takes the first of tensorrt, cuda and cpu that "
        "works, and says which.",
    ),
    click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="auto",
        show_default=True,
        help="Engine on the CPU. openvino runs the vision tower and prefill, and ONNX Runtime decodes; onnxruntime "
        "does both; auto takes the faster one.",
    ),
    click.option(
        "--dialect",
        type=click.Choice(list(DECODERS)),
        help="Decoder graph to run.  [default: the fastest that the bundle has]",
    ),
    click.option(
        "--context",
        type=int,
        help="Capacity of the KV cache: most tokens of prompt and answer together.  "
        f"[default: {DEFAULT_CONTEXT}, or that of the TensorRT engines]",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads.  [default: all cores]"),
)
_ANSWERING = (
    click.option(
        "--max-tiles",
        type=int,
        multiple=True,
        help="Most tiles of an image. Give it once for all images, or once for each image.  [default: the checkpoint's "
        "limit]",
    ),
    click.option(
        "--system",
        help="System text of the prompt; an empty text leaves the system turn out.  [default: the checkpoint's]",
    ),
    click.option("--max-new-tokens", type=int, default=1024, show_default=True, help="Most tokens of the answer."),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="Sampling temperature; 0 always takes the most probable token (greedy).",
    ),
    click.option(
        "--top-k",
        type=int,
        default=0,
        help="Sample among this many most probable tokens.  [default: 0, which keeps all]",
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample among the most probable tokens whose probabilities sum to at least this.  [default: 1.0, which "
        "keeps all]",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Penalty on tokens that the answer already has; above 1 makes them less probable.  [default: 1.0, none]",
    ),
    click.option("--seed", type=int, help="Seed of the random generator for sampling.  [default: a new one each time]"),
    click.option("--stop", multiple=True, help="Text that ends the answer and is not part of it (repeatable)."),
    click.option(
        "--speculate",
        is_flag=True,
        help="Guess tokens from the prompt and verify several in one step. The answer is the same.",
    ),
    click.option(
        "--exif", is_flag=True, help="Rotate images as their EXIF orientation says. The original model code does not."
    ),
    click.option(
        "--background",
        metavar="COLOUR",
        help="Colour behind transparent pixels, such as white or #f0f0f0.  [default: transparency is dropped, as in "
        "the original model code, which usually leaves black]",
    ),
    click.option(
        "--keep-special",
        is_flag=True,
        help="Keep special tokens such as <box> in the answer. The original model code drops them.",
    ),
)


def loading_options(command: Command) -> Command:
    """Add --device, --engine, --dialect, --context and --threads to a command."""
    return _apply(_LOADING, command)


def answering_options(command: Command) -> Command:
    """Add one option for each field of `ChatOptions` except `history` to a command."""
    return _apply(_ANSWERING, command)


def load_model(folder: Path, values: dict[str, Any]) -> InternVL:
    """Load a bundle as the options say. This removes the loading options from `values`."""
    names = ("device", "engine", "dialect", "context", "threads")
    return InternVL.load(folder, **{name: values.pop(name) for name in names}, progress=shown_steps(sys.stderr))


def chat_options(values: dict[str, Any]) -> ChatOptions:
    """Return the answering options, which are all that remain in `values`, as `ChatOptions`."""
    tiles = values.pop("max_tiles")
    options: ChatOptions = {"max_tiles": tiles[0] if len(tiles) == 1 else (tiles or None)}
    options.update(values)  # type: ignore[typeddict-item]  # the commands' options are the fields of ChatOptions
    return options


def _apply(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
