"""Conversations as messages: who says what, with images between the texts, as chat interfaces on the network have them.

`question_from` turns them into the arguments of `InternVL.chat`. Texts are plain: a special token or an `<image>` mark
in one is nothing but its characters, so no text can pass for another role or for an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internvl_edge.base.errors import PromptError
from internvl_edge.model.preprocess import ImageSource
from internvl_edge.model.prompt import IMAGE, ImagePlace, Text, image_places

from .request import Tiles

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Picture:
    """An image of a message, and the most tiles that it may get; None is the checkpoint's own limit."""

    source: ImageSource | Tiles
    max_tiles: int | None = None


@dataclass(frozen=True)
class Message:
    """What one side says: texts and images in their order."""

    role: Role
    parts: Sequence[str | Picture]

    @property
    def text(self) -> str:
        """Its texts, one per line."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class AskedQuestion:
    """The arguments of `InternVL.chat`: `chat(asked.question, asked.images, **asked.options)`."""

    question: Text
    images: list[ImageSource | Tiles]
    options: dict[str, Any]


def question_from(messages: Sequence[Message]) -> AskedQuestion:
    """Return the question that messages ask.

    A system message may be the first one. Then the user and the assistant take turns, and the user has the last word.
    Messages of one side in a row are one turn. Only the user shows images. Those that stand before or after all texts
    of a turn go in front of it, as in the training of the model, and get numbers where the conversation has several;
    those between texts stay where they are, on lines of their own.

    Raises:
        PromptError: messages in another order, or with images of another side.
    """
    system, turns = _turns(messages)
    if not turns or turns[-1][0] != "user":
        raise PromptError("the last message is not the user's; end with a question")
    pictures: list[Picture] = []
    texts: list[Text] = []
    for role, parts in turns:
        found = [part for part in parts if isinstance(part, Picture)]
        texts.append(_placed(parts, len(pictures)) if role == "user" else Message(role, parts).text)
        pictures += found
    history = list(zip(texts[:-1:2], texts[1::2], strict=True))
    options: dict[str, Any] = {"history": history, "plain_text": True}
    if system is not None:
        options["system"] = system
    if pictures:
        options["max_tiles"] = [picture.max_tiles for picture in pictures]
    return AskedQuestion(texts[-1], [picture.source for picture in pictures], options)


def _turns(messages: Sequence[Message]) -> tuple[str | None, list[tuple[Role, list[str | Picture]]]]:
    """The system text and the turns of the others."""
    system: str | None = None
    turns: list[tuple[Role, list[str | Picture]]] = []
    for number, message in enumerate(messages):
        if message.role != "user" and any(isinstance(part, Picture) for part in message.parts):
            raise PromptError(f"message {number} is the {message.role}'s and has an image; only the user shows images")
        if message.role == "system":
            if number:
                raise PromptError(f"message {number} is a system message; only the first one may be")
            system = message.text
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend(message.parts)
        elif not turns and message.role == "assistant":
            raise PromptError("the assistant's message comes before any of the user; begin with the user's")
        else:
            turns.append((message.role, list(message.parts)))
    return system, turns


def _placed(parts: Sequence[str | Picture], earlier: int) -> Text:
    """The text of a user's turn with the places of its images; `earlier` images belong to turns before it."""
    kinds = "".join("t" if isinstance(part, str) else "i" for part in parts)
    text = "\n".join(part for part in parts if isinstance(part, str))
    count = kinds.count("i")
    if not count:
        return text
    if re.fullmatch("i*t*|t*i*", kinds):
        return [*image_places(count, earlier), text]
    lines: list[str | ImagePlace] = []
    for part in parts:
        lines += [part if isinstance(part, str) else IMAGE, "\n"]
    return lines[:-1]
