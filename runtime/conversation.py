"""A conversation: turns and their images are kept, and each question continues the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from internvl_edge.model.preprocess import ImageSource
from internvl_edge.model.prompt import IMAGE_MARK

from .model import InternVL
from .options import ChatOptions, checked_options
from .reply import Reply

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Conversation:
    """History for one `InternVL`; the model's KV cache keeps what earlier turns computed.

    `options` hold for every turn (see `ChatOptions`; `history` and one `max_tiles` per image are not meant for here).
    `reply` is the last finished answer.
    """

    def __init__(self, model: InternVL, **options: Unpack[ChatOptions]) -> None:
        self.history: list[tuple[str, str]] = []
        self.images: list[ImageSource] = []
        self.reply: Reply | None = None
        self._model = model
        self._options = checked_options(options)

    def ask(self, question: str, *images: ImageSource) -> Reply:
        """Ask the next question, with new images if any (see `stream`)."""
        for _ in self.stream(question, *images):
            pass
        assert self.reply is not None
        return self.reply

    def stream(self, question: str, *images: ImageSource) -> Iterator[str]:
        """Ask the next question; yields pieces of the answer. The turn joins the history when the answer is complete.

        New images go in front of the question, unless it places them itself with `<image>` marks; several are numbered
        through the conversation (`Image-1: <image>`), as the model was trained.
        """
        if images and IMAGE_MARK not in question:
            question = self._marks(len(images)) + question
        all_images = [*self.images, *images]
        answer = self._model.stream(question, all_images, **(self._options | {"history": self.history}))
        yield from answer
        self.reply = answer.reply
        self.images = all_images
        self.history.append((question, self.reply.text))

    def clear(self) -> None:
        """Forget all turns and images."""
        self.history.clear()
        self.images.clear()

    def _marks(self, count: int) -> str:
        if count == 1 and not self.images:
            return f"{IMAGE_MARK}\n"
        first = len(self.images) + 1
        return "".join(f"Image-{number}: {IMAGE_MARK}\n" for number in range(first, first + count))
