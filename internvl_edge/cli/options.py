"""Options that several commands share.

All commands that load a bundle share how it is loaded; `run`, `chat` and `batch` also share how it answers, `run` and
`batch` the form of answers and votes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from internvl_edge.base.errors import PromptError
from internvl_edge.base.json_files import read_bytes
from internvl_edge.base.progress import Progress
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import DECODERS, ENGINE_RECORD
from internvl_edge.bundle.names import ENGINES as ENGINE_FOLDERS
from internvl_edge.model.context import DEFAULT_CONTEXT
from internvl_edge.runtime.answer_format import MOST_BYTES, AnswerFormat
from internvl_edge.runtime.engines.choice import ENGINES, choose
from internvl_edge.runtime.engines.device import DEVICES, choose_device, has_tensorrt, most_rows
from internvl_edge.runtime.find import find_bundle
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.native.choice import choose_attention
from internvl_edge.runtime.options import ChatOptions
from internvl_edge.runtime.voting import MOST_VOTES

from .checkpoint_options import revision_option

Command = Callable[..., Any]
LOADING_NAMES = ("revision", "device", "engine", "dialect", "context", "threads", "exact")

_LOADING = (
    revision_option,
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
        "does both; auto takes the faster one that the memory allows, and says which.",
    ),
    click.option(
        "--dialect",
        type=click.Choice(list(DECODERS)),
        help="Decoder graph to run.  [default: the fastest that the bundle has]",
    ),
    click.option(
        "--context",
        type=int,
        help="Capacity of the KV cache: maximum number of tokens of prompt and answer together.  "
        f"[default: {DEFAULT_CONTEXT}, or the most that the model or the TensorRT engines can have]",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads.  [default: all cores]"),
    click.option(
        "--exact",
        is_flag=True,
        help="Compute in the types of the bundle: OpenVINO does not round to bfloat16, --engine auto takes ONNX "
        "Runtime, and attention stays with its own operators.",
    ),
)
_IMAGES = (
    click.option(
        "--exif",
        is_flag=True,
        help="Turn photographs upright as their EXIF orientation says. The original model code does not.",
    ),
    click.option(
        "--background",
        metavar="COLOR",
        help="Color behind transparent pixels, such as white or #f0f0f0.  [default: transparency is dropped, as in "
        "the original model code, which usually leaves black]",
    ),
)
_ANSWERING = (
    click.option(
        "--max-tiles",
        type=int,
        multiple=True,
        help="Maximum number of tiles per image. Give it once for all images, or once for each image.  [default: the "
        "checkpoint's limit]",
    ),
    click.option(
        "--system",
        help="System text of the prompt; an empty text leaves the system turn out.  [default: the checkpoint's]",
    ),
    click.option(
        "--think",
        is_flag=True,
        help="Ask for thinking before the answer, with the system text that InternVL3.5 was trained with, and "
        "temperature 0.6 unless set. Give --max-new-tokens room for it.",
    ),
    click.option(
        "--max-new-tokens", type=int, default=1024, show_default=True, help="Maximum number of tokens of the answer."
    ),
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
        "--min-p",
        type=float,
        default=0.0,
        help="Sample among the tokens that have at least this share of the probability of the most probable one.  "
        "[default: 0, which keeps all]",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Penalty on tokens that the answer already has; above 1 makes them less probable.  [default: 1.0, none]",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="Taken from the logit of a token once for each time that the answer has it, -2 to 2.  [default: 0, none]",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="Taken from the logit of each token that the answer has, -2 to 2.  [default: 0, none]",
    ),
    click.option("--seed", type=int, help="Seed of the random generator for sampling.  [default: a new one each time]"),
    click.option("--stop", multiple=True, help="Text that ends the answer and is not part of it (repeatable)."),
    click.option(
        "--speculate",
        is_flag=True,
        help="Guess tokens from the prompt and verify several in one step. The answer is the same.",
    ),
    *_IMAGES,
    click.option(
        "--plain-text",
        is_flag=True,
        help="Read special tokens such as <|im_end|>, and <image> marks, in texts as plain text. The original model "
        "code does not.",
    ),
    click.option(
        "--keep-special",
        is_flag=True,
        help="Keep special tokens such as <box> in the answer. The original model code drops them.",
    ),
)
_VOTING = (
    click.option(
        "--votes",
        type=click.IntRange(1, MOST_VOTES),
        help="Sample this many answers (temperature 0.6 and top-p 0.95 unless set), and take the one that most replies "
        "give.",
    ),
    click.option(
        "--sure",
        type=float,
        help="With --votes: stop as soon as the leading answer has the majority with this probability, such as 0.95.  "
        "[default: stop when the outcome is certain]",
    ),
    click.option("--reason", is_flag=True, help="Ask for step by step reasoning before the answer."),
)
_FORM = (
    click.option(
        "--json-schema",
        type=click.Path(path_type=Path),
        help="File with a JSON schema that the answer follows. Ask for such an answer in the question too.",
    ),
    click.option("--regex", help="Regular expression that the whole answer matches."),
    click.option("--choice", "choices", multiple=True, help="Answer to choose (repeatable). Nothing else comes out."),
)


def loading_options(command: Command) -> Command:
    """Add --revision, --device, --engine, --dialect, --context, --threads and --exact to a command."""
    return _apply(_LOADING, command)


def image_options(command: Command) -> Command:
    """Add --exif and --background to a command."""
    return _apply(_IMAGES, command)


def answering_options(command: Command) -> Command:
    """Add one option for each field of `ChatOptions` to a command, except those that are for programs alone."""
    return _apply(_ANSWERING, command)


def voting_options(command: Command) -> Command:
    """Add --votes, --sure and --reason to a command."""
    return _apply(_VOTING, command)


def form_options(command: Command) -> Command:
    """Add --json-schema, --regex and --choice to a command; `answer_format` reads them."""
    return _apply(_FORM, command)


def answer_format(json_schema: Path | None, regex: str | None, choices: tuple[str, ...]) -> AnswerFormat | None:
    """Return the form of the answer, from the options that give one."""
    given = {"--json-schema": json_schema is not None, "--regex": regex is not None, "--choice": bool(choices)}
    if sum(given.values()) > 1:
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise PromptError(f"{names} cannot be combined; give one form of the answer")
    if json_schema is not None:
        schema = read_bytes(json_schema, PromptError, "give a file with a JSON schema", limit=MOST_BYTES)
        try:
            return AnswerFormat.json_schema(schema.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PromptError(f"{json_schema} is not UTF-8 at byte {error.start}; give a JSON schema") from None
    if regex is not None:
        return AnswerFormat.regex(regex)
    return AnswerFormat.choice(choices) if choices else None


def is_given(name: str) -> bool:
    """Whether an option of the running command was given, and is no default."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def load_model(folder: Path, values: dict[str, Any], progress: Progress, rows: int = 1, **scheduling: Any) -> InternVL:
    """Load a bundle, a folder or a hub id, as the options say. This removes the loading options from `values`.

    There are as many rows as the device has, up to `rows`.
    """
    options = {name: values.pop(name) for name in LOADING_NAMES}
    folder = find_bundle(folder, options.pop("revision"), options["device"])
    with progress.phase(f"loading {folder}"):
        options |= chosen(folder, options, progress)
        if rows > 1:
            rows = min(rows, most_rows(Bundle.open(folder), options["device"]))
        return InternVL.load(folder, rows=rows, progress=progress, **options, **scheduling)


def engine_extra(folder: Path, device: str, engine: str) -> tuple[str, ...]:
    """Return the extra that runs a bundle on a device; where TensorRT may run it, it says itself what it needs.

    Whether a bundle that is not downloaded yet has engines is not known; they matter where there is a TensorRT.
    """
    engines = any(folder.glob(f"{ENGINE_FOLDERS}/*/{ENGINE_RECORD}")) if folder.exists() else has_tensorrt()
    if device == "tensorrt" or (device == engine == "auto" and engines):
        return ()
    return ("gpu" if device == "cuda" else "openvino" if engine == "openvino" else "cpu",)


def chosen(folder: Path, options: dict[str, Any], progress: Progress) -> dict[str, str]:
    """Return the device and the engine to load; say what "auto" takes, and why."""
    device, engine, dialect, exact = (options[name] for name in ("device", "engine", "dialect", "exact"))
    opened = Bundle.open(folder)
    if device == "auto":
        further = {name: options[name] for name in ("context", "threads")}
        found = choose_device(opened, engine=engine, dialect=dialect, exact=exact, **further)
        progress.remark(f"device: {found}")
        device = found.device
    if engine == "auto" and device == "cpu":
        choice = choose(opened.manifest, dialect, exact)
        progress.remark(f"engine: {choice}")
        engine = choice.engine
    if device == "cpu":
        _say_attention(opened.manifest, exact, progress)
    return {"device": device, "engine": engine}


def _say_attention(manifest: Manifest, exact: bool, progress: Progress) -> None:
    """Say what computes attention, where the native operators may; compile them first where that is to be done."""
    with progress.waiting("compiling the attention operators"):
        attention = choose_attention(manifest, exact)
    if attention.graphs:
        progress.remark(f"attention: {attention}")


def chat_options(values: dict[str, Any]) -> ChatOptions:
    """Return the answering options, which are all that remain in `values`, as `ChatOptions`."""
    tiles = values.pop("max_tiles")
    options: ChatOptions = {"max_tiles": tiles[0] if len(tiles) == 1 else (tiles or None)}
    options.update(values)  # type: ignore[typeddict-item]  # the commands' options are the fields of ChatOptions
    if options.get("think") and not is_given("temperature"):
        del options["temperature"]
    return options


def _apply(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
