"""Turn a conversation into the prompt text, with one run of image tokens per `<image>` mark.

This module knows how a template writes turns and images. It does not know token ids or pixels, only the number of tiles
of each image. Source: `chat()` of the original code.
"""

from __future__ import annotations

from collections.abc import Sequence

from internvl_edge.base.errors import PromptError

from .template import PromptTemplate

IMAGE_MARK = "<image>"


def build_prompt(
    template: PromptTemplate,
    question: str,
    tile_counts: Sequence[int] = (),
    *,
    tokens_per_tile: int,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> str:
    """Return the whole prompt. It ends where the assistant's answer begins.

    Args:
        template: how turns and images are written.
        question: the user's current question; it can hold `<image>` marks.
        tile_counts: tiles of each image (or group of images under one mark), in the order of the marks.
        tokens_per_tile: number of image tokens for one tile (256 at 448 pixels).
        history: (question, answer) of the previous turns, oldest first. Marks in their questions come first. An empty
            text is written as only its role, as in the original.
        system: system text of this prompt; None takes the template's, "" omits the system turn.

    The marks in the user's turns and `tile_counts` must match one to one. Without history and without any mark, images
    are placed before the question. Other special tokens in texts (`<img>`, `<|im_end|>`) keep their special meaning, as
    in the original.

    Raises:
        PromptError: no question; marks and images that do not match; a literal image token in a text, which would be
            taken for a part of an image.
    """
    if not question.strip():
        raise PromptError("the question is empty; ask something")
    if not all(isinstance(turn, (tuple, list)) and len(turn) == 2 for turn in history):
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
    """Return the question after one marked line per frame: `Frame1: <image>`, `Frame2: <image>`, ... (model cards)."""
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
    """Replace the marks of all questions, in order, with the image tokens of `tile_counts`."""
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
