"""The finished answer (`Reply`), and an iterator over the text of an answer in progress (`ReplyStream`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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
        timings: seconds in "preprocess_s", "vision_s", "prefill_s" and "decode_s"; "first_token_s", the sum of the
            first three; "prefill_tokens", the prompt tokens that were computed (without those already in the KV cache);
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
    """An iterator over pieces of an answer's text. Each piece has whole characters; all joined are `reply.text`."""

    def __init__(self, pieces: Iterator[str | Reply]) -> None:
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
        """The finished answer. Reading this generates the rest of the answer first."""
        for _ in self:
            pass
        assert self._reply is not None
        return self._reply
