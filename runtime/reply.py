"""The finished answer (`Reply`), and an iterator over the text of an answer in progress (`ReplyStream`)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from internvl_edge.base.errors import PromptError


@dataclass(frozen=True)
class Reply:
    """An answer, with its tokens and timings.

    Attributes:
        text: the answer, stripped, without special tokens.
        output_ids: the tokens as generated, the stop token included.
        prompt_ids: the tokens of the prompt, image tokens included.
        image_tokens: how many of `prompt_ids` stand for images.
        tiles: tiles of each image, in the order given.
        finish_reason: "stop" (the model or a stop string ended it) or "length" (`max_new_tokens` did).
        timings: seconds in "preprocess_s", "waiting_s" (until the model was free), "vision_s", "prefill_s" and
            "decode_s"; "first_token_s", the sum of the first four; "prefill_tokens",
            the prompt tokens that were computed (without those already in the KV cache);
            and the rates "prefill_tokens_per_s" and "decode_tokens_per_s".
    """

    text: str
    output_ids: list[int]
    prompt_ids: list[int]
    image_tokens: int
    tiles: list[int]
    finish_reason: str
    timings: dict[str, float]


class ReplyStream:
    """An iterator over pieces of an answer's text. Each piece has whole characters; all joined are `reply.text`.

    The answer begins with the first piece that is asked for, and goes on in the background. `close`, or forgetting the
    iterator, ends it early. One thread at a time may read.
    """

    def __init__(self, pieces: Generator[str | Reply, None, None]) -> None:
        self._pieces = pieces
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Reply):
            self._reply = piece
            raise StopIteration
        return piece

    @property
    def reply(self) -> Reply:
        """The finished answer. Reading this waits for the rest of the answer first.

        Raises:
            PromptError: the answer was ended before it was finished.
        """
        for _ in self:
            pass
        if self._reply is None:
            raise PromptError("this answer was closed before it was finished; ask again")
        return self._reply

    def close(self) -> None:
        """End the answer. The model is free within one step."""
        self._pieces.close()
