"""Turn a conversation into the prompt text, with one run of image tokens per `<image>` mark.

This module knows how a template writes turns and images. It does not know token ids or pixels, only the number of tiles
of each image. Source: `chat()` of the original code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_edge.base.errors import PromptError

from .template import PromptTemplate

IMAGE_MARK = "<image>"


class ImagePlace:
    """The place of an image in a text that is written as a list: `["Compare ", IMAGE, " with ", IMAGE]`."""

    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = ImagePlace()
# A text, or its parts with the places of images between them.
Text = str | Sequence[str | ImagePlace]


@dataclass(frozen=True)
class Segment:
    """A part of a prompt. `is_template` tells what the template or an image wrote from what somebody typed."""

    text: str
    is_template: bool


def build_prompt(
    template: PromptTemplate,
    question: Text,
    tile_counts: Sequence[int] = (),
    *,
    tokens_per_tile: int,
    history: Sequence[tuple[Text, str]] = (),
    system: str | None = None,
) -> str:
    """Return the whole prompt as one text; see `build_segments`."""
    segments = build_segments(
        template, question, tile_counts, tokens_per_tile=tokens_per_tile, history=history, system=system
    )
    return "".join(segment.text for segment in segments)


def build_segments(
    template: PromptTemplate,
    question: Text,
    tile_counts: Sequence[int] = (),
    *,
    tokens_per_tile: int,
    history: Sequence[tuple[Text, str]] = (),
    system: str | None = None,
    plain: bool = False,
) -> list[Segment]:
    """Return the whole prompt in parts. It ends where the assistant's answer begins.

    Args:
        template: how turns and images are written.
        question: the user's current question; it can hold `<image>` marks, or be a list of texts and `IMAGE`.
        tile_counts: tiles of each image (or group of images under one mark), in the order of the marks.
        tokens_per_tile: number of image tokens for one tile (256 at 448 pixels).
        history: (question, answer) of the previous turns, oldest first. Marks in their questions come first. An empty
            text is written as only its role, as in the original.
        system: system text of this prompt; None takes the template's, "" omits the system turn.
        plain: `<image>` in a text is no mark but text, and an image token in a text is not refused. The caller must
            then encode typed segments as plain text.

    The marks in the user's turns and `tile_counts` must match one to one. Without history and without any mark, images
    are placed before the question. Other special tokens in texts (`<img>`, `<|im_end|>`) keep their special meaning, as
    in the original, unless the caller encodes them as plain text.

    Raises:
        PromptError: no question; marks and images that do not match; a literal image token in a text, which would be
            taken for a part of an image.
    """
    if not all(isinstance(turn, (tuple, list)) and len(turn) == 2 for turn in history):
        raise PromptError("history is not a list of (question, answer) pairs; give both texts of every turn")
    questions = [_pieces(asked, plain) for asked in (*(asked for asked, _ in history), question)]
    if not any(piece is IMAGE or str(piece).strip() for piece in questions[-1]):
        raise PromptError("the question is empty; ask something")
    if tile_counts and min(tile_counts) < 1:
        raise PromptError(f"an image has {min(tile_counts)} tiles, expected at least 1")
    system = template.system if system is None else (system or None)
    if not plain:
        typed = [piece for pieces in questions for piece in pieces if isinstance(piece, str)]
        _refuse_image_tokens(template, [*typed, system or "", *(answer for _, answer in history)])
    if tile_counts and not history and IMAGE not in questions[-1]:
        if template.merges_unmarked_images:
            tile_counts = [sum(tile_counts)]
        questions[-1] = [part for _ in tile_counts for part in (IMAGE, "\n")] + questions[-1]
    _check_places(sum(pieces.count(IMAGE) for pieces in questions), len(tile_counts), plain)
    runs = iter(
        template.image_start + template.image_context * (tiles * tokens_per_tile) + template.image_end
        for tiles in tile_counts
    )
    turns = [[Segment(p, False) if isinstance(p, str) else Segment(next(runs), True) for p in q] for q in questions]
    segments = []
    if system is not None:
        segments += _turn(template, template.system_prefix, [Segment(system, False)])
    for asked, (_, answer) in zip(turns, history, strict=False):
        segments += _turn(template, template.user_prefix, asked)
        segments += _turn(template, template.assistant_prefix, [Segment(answer, False)] if answer else [])
    segments += _turn(template, template.user_prefix, turns[-1])
    return [*segments, Segment(template.assistant_prefix, True)]


def image_places(count: int, earlier: int) -> list[str | ImagePlace]:
    """Return the places of `count` images in front of a question, after `earlier` images of the conversation.

    A lone image has a line. Several, in one turn or over turns, get numbers as in the training of the model
    (`Image-1: <image>`).
    """
    if count == 1 and not earlier:
        return [IMAGE, "\n"]
    numbers = range(earlier + 1, earlier + count + 1)
    return [part for number in numbers for part in (f"Image-{number}: ", IMAGE, "\n")]


def marked_text(text: Text) -> str:
    """Return a text in one piece, with a mark in the place of each image."""
    return "".join(IMAGE_MARK if isinstance(part, ImagePlace) else part for part in _pieces(text, plain=True))


def video_parts(question: str, frames: int) -> list[str | ImagePlace]:
    """Return the parts of the question after one line per frame: `Frame1: <image>`, `Frame2: <image>`, ..."""
    lines: list[str | ImagePlace] = []
    for index in range(1, frames + 1):
        lines += [f"Frame{index}: ", IMAGE, "\n"]
    return [*lines, question]


def video_question(question: str, frames: int) -> str:
    """Return the question after one marked line per frame: `Frame1: <image>`, `Frame2: <image>`, ... (model cards)."""
    return marked_text(video_parts(question, frames))


def _pieces(text: Text, plain: bool) -> list[str | ImagePlace]:
    """Cut a text into what was typed and the places of images; empty pieces are left out."""
    found: list[str | ImagePlace] = []
    for part in [text] if isinstance(text, str) else text:
        if plain or not isinstance(part, str):
            found.append(part if isinstance(part, str) else IMAGE)
            continue
        head, *rest = part.split(IMAGE_MARK)
        found.append(head)
        for tail in rest:
            found += [IMAGE, tail]
    return [piece for piece in found if piece]


def _turn(template: PromptTemplate, prefix: str, segments: list[Segment]) -> list[Segment]:
    opened = Segment(prefix, True)
    return [opened, *segments, Segment(template.turn_end, True)] if segments else [opened]


def _check_places(places: int, images: int, plain: bool) -> None:
    if places != images and plain:
        raise PromptError(
            f"{places} places for images in question and history but {images} images; with plain text, write the "
            "question as a list, with IMAGE in the place of each image"
        )
    if places != images:
        raise PromptError(
            f"{places} {IMAGE_MARK} marks in question and history but {images} images; "
            f"write one mark per image, in the images' order"
        )


def _refuse_image_tokens(template: PromptTemplate, texts: Sequence[str]) -> None:
    found = sum(text.count(template.image_context) for text in texts)
    if found:
        raise PromptError(
            f"the text holds {template.image_context} {found} times, which only images may become; "
            f"remove it, or write {IMAGE_MARK} where an image belongs"
        )
