"""The finished answer (`Reply`), and an iterator over the text of an answer in progress (`ReplyStream`)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from internvl_edge.base.errors import PromptError

from .logprobs import TokenLogprob
from .turns import Turns


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
        logprobs: one entry for each of `output_ids`, where the option `logprobs` asks for them; else None.
    """

    text: str
    output_ids: list[int]
    prompt_ids: list[int]
    image_tokens: int
    tiles: list[int]
    finish_reason: str
    timings: dict[str, float]
    logprobs: list[TokenLogprob] | None = None


class ReplyStream:
    """An iterator over pieces of an answer's text. Each piece has whole characters; all joined are `reply.text`.

    The answer has the model from its first piece to its end. `close` ends it early. So does a later question of the
    same thread, and reading on is then a PromptError.
    """

    def __init__(self, pieces: Generator[str | Reply, None, None], turns: Turns) -> None:
        self._pieces = pieces
        self._turns = turns
        self._reply: Reply | None = None
        self._began = self._interrupted = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._interrupted:
            raise PromptError("a later question to this model ended this answer; read one answer to its end first")
        if not self._began:
            self._turns.enter(self)
            self._began = True
        try:
            piece = next(self._pieces)
        except BaseException:
            self.close()
            raise
        if isinstance(piece, Reply):
            self._reply = piece
            self.close()
            raise StopIteration
        return piece

    def __del__(self) -> None:
        if hasattr(self, "_began"):
            self.close()

    @property
    def reply(self) -> Reply:
        """The finished answer. Reading this generates the rest of the answer first.

        Raises:
            PromptError: the answer was ended before it was finished.
        """
        for _ in self:
            pass
        if self._reply is None:
            raise PromptError("this answer was closed before it was finished; ask again")
        return self._reply

    def close(self) -> None:
        """End the answer; what it has computed so far is kept for the next question."""
        self._pieces.close()
        if self._began:
            self._turns.leave(self)

    def interrupt(self) -> None:
        """End the answer because another one begins."""
        self._interrupted = True
        self.close()
