"""A conversation: it keeps the turns and their images, so that each question sees all earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from internvl_edge.model.preprocess import ImageSource
from internvl_edge.model.prompt import IMAGE_MARK, Text, image_places, marked_text

from .model import InternVL
from .options import ChatOptions, checked_options
from .reply import Reply

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Conversation:
    """The history of one conversation with an `InternVL`. The model's KV cache holds what earlier turns computed.

    `options` apply to every turn (see `ChatOptions`). Do not pass `history`, or one `max_tiles` per image. `reply` is
    the last finished answer.
    """

    def __init__(self, model: InternVL, **options: Unpack[ChatOptions]) -> None:
        self.history: list[tuple[Text, str]] = []
        self.images: list[ImageSource] = []
        self.reply: Reply | None = None
        self._model = model
        self._options = checked_options(options)

    def ask(self, question: str, *images: ImageSource) -> Reply:
        """Ask the next question, with new images if there are any (see `stream`), and return the answer."""
        for _ in self.stream(question, *images):
            pass
        assert self.reply is not None
        return self.reply

    def stream(self, question: str, *images: ImageSource) -> Iterator[str]:
        """Ask the next question, and yield pieces of the answer. The history receives the turn when it is complete.

        New images go in front of the question, unless the question has `<image>` marks. Where the conversation has
        several images, each new one gets a number (`Image-1: <image>`), as in the training of the model. With
        `plain_text`, marks in the question are text.
        """
        asked: Text = question
        if self._options.get("plain_text"):
            asked = [*image_places(len(images), len(self.images)), question]
        elif images and IMAGE_MARK not in question:
            asked = marked_text(image_places(len(images), len(self.images))) + question
        all_images = [*self.images, *images]
        answer = self._model.stream(asked, all_images, **(self._options | {"history": self.history}))
        yield from answer
        self.reply = answer.reply
        self.images = all_images
        self.history.append((asked, self.reply.text))

    def clear(self) -> None:
        """Forget all turns and images."""
        self.history.clear()
        self.images.clear()
