"""A conversation becomes the prompt text, with one run of image tokens per `<image>` mark.

Knows how each checkpoint family writes turns and images. Does not know pixels (only how many tiles each image became)
nor token ids. Sources: `chat()` and the `internvl2_5` conversation of the original code; the native chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from internvl_edge.errors import BundleError, PromptError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """How one family of checkpoints writes a conversation; plain strings, stored in the bundle's manifest.

    `system` is the default system text; None means no system turn. `merges_unmarked_images` says what several images do
    when the question has no `<image>` mark: share one run of image tokens (the original), or get one run each.
    """

    name: str
    system: str | None
    system_prefix: str
    user_prefix: str
    assistant_prefix: str
    turn_end: str
    image_start: str
    image_context: str
    image_end: str
    merges_unmarked_images: bool

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """The inverse of `to_dict`.

        Raises:
            BundleError: a field is missing, unknown or of another type.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(names.symmetric_difference(values)))
            raise BundleError(f"prompt template: fields missing or unknown: {wrong}; export the checkpoint again")
        for name, value in values.items():
            good = isinstance(value, bool if name == "merges_unmarked_images" else str)
            if not good and not (name == "system" and value is None):
                raise BundleError(f"prompt template: {name} is {value!r}; export the checkpoint again")
        return cls(**values)


_INTERNVL2_5 = PromptTemplate(
    name="internvl2_5",
    system=(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    system_prefix="<|im_start|>system\n",
    user_prefix="<|im_start|>user\n",
    assistant_prefix="<|im_start|>assistant\n",
    turn_end="<|im_end|>\n",
    image_start="<img>",
    image_context="<IMG_CONTEXT>",
    image_end="</img>",
    merges_unmarked_images=True,
)
_NATIVE = replace(_INTERNVL2_5, name="internvl_native", system=None, merges_unmarked_images=False)
TEMPLATES = {template.name: template for template in (_INTERNVL2_5, _NATIVE)}


def template_for(name: str, system_message: str | None = None) -> PromptTemplate:
    """The template called `name`, with a checkpoint's own `system_message` in place of the default where it has one.

    Raises:
        PromptError: no such template.
    """
    if name not in TEMPLATES:
        raise PromptError(f"prompt template is {name!r}, supported: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return template if system_message is None else replace(template, system=system_message)


def build_prompt(
    template: PromptTemplate,
    question: str,
    tile_counts: Sequence[int] = (),
    *,
    tokens_per_tile: int,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> str:
    """The whole prompt, ending where the assistant's answer begins.

    Args:
        template: how turns and images are written.
        question: what the user says now; may hold `<image>` marks.
        tile_counts: tiles of each image (or group of images under one mark), in the order of the marks.
        tokens_per_tile: image tokens that stand for one tile (256 at 448 pixels).
        history: (question, answer) of the turns before, oldest first; marks in their questions come first. An empty
            text is written as its role only, like the original does.
        system: system text of this prompt; None takes the template's, "" leaves the system turn out.

    Marks in the user's turns and `tile_counts` must match one to one; without history and without any mark, images go
    in front of the question. Other special tokens in texts (`<img>`, `<|im_end|>`) are read as such, like the original.

    Raises:
        PromptError: no question; marks and images that do not match; a literal image token in a text, which would be
            taken for a part of an image.
    """
    if not question.strip():
        raise PromptError("the question is empty; ask something")
    if any(len(turn) != 2 for turn in history):
        raise PromptError("history is not a list of (question, answer) pairs; give both texts of every turn")
    if tile_counts and min(tile_counts) < 1:
        raise PromptError(f"an image has {min(tile_counts)} tiles, expected at least 1")
    system = template.system if system is None else (system or None)
    _refuse_image_tokens(template, [question, system or "", *(text for turn in history for text in turn)])
    if tile_counts and not history and IMAGE_MARK not in question:
        if template.merges_unmarked_images:
            tile_counts = [sum(tile_counts)]
        question = f"{IMAGE_MARK}\n" * len(tile_counts) + question
    questions = _expand(template, [*(asked for asked, _ in history), question], tile_counts, tokens_per_tile)
    parts = [] if system is None else [template.system_prefix, system, template.turn_end]
    for asked, (_, answer) in zip(questions, history, strict=False):
        parts += [_turn(template, template.user_prefix, asked), _turn(template, template.assistant_prefix, answer)]
    parts += [_turn(template, template.user_prefix, questions[-1]), template.assistant_prefix]
    return "".join(parts)


def video_question(question: str, frames: int) -> str:
    """The question behind one marked line per frame: `Frame1: <image>`, `Frame2: <image>`, ... (model cards)."""
    return "".join(f"Frame{index}: {IMAGE_MARK}\n" for index in range(1, frames + 1)) + question


def _turn(template: PromptTemplate, prefix: str, text: str) -> str:
    return prefix + text + template.turn_end if text else prefix


def _refuse_image_tokens(template: PromptTemplate, texts: Sequence[str]) -> None:
    found = sum(text.count(template.image_context) for text in texts)
    if found:
        raise PromptError(
            f"the text holds {template.image_context} {found} times, which only images may become; "
            f"remove it, or write {IMAGE_MARK} where an image belongs"
        )


def _expand(
    template: PromptTemplate, questions: Sequence[str], tile_counts: Sequence[int], tokens_per_tile: int
) -> list[str]:
    """Replace the marks of all questions, in order, by the image tokens of `tile_counts`."""
    marks = sum(text.count(IMAGE_MARK) for text in questions)
    if marks != len(tile_counts):
        raise PromptError(
            f"{marks} {IMAGE_MARK} marks in question and history but {len(tile_counts)} images; "
            f"write one mark per image, in the images' order"
        )
    runs = iter(
        template.image_start + template.image_context * (tiles * tokens_per_tile) + template.image_end
        for tiles in tile_counts
    )
    expanded = []
    for text in questions:
        head, *rest = text.split(IMAGE_MARK)
        expanded.append(head + "".join(next(runs) + tail for tail in rest))
    return expanded
