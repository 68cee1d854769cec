"""The finished answer (`Reply`), and an iterator over the text of an answer in progress (`ReplyStream`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from internvl_edge.base.errors import PromptError

from .logprobs import TokenLogprob
from .scheduler import Scheduler, Task
from .thinking import split_thinking


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

    @property
    def thinking(self) -> str | None:
        """What `text` has between `<think>` at its beginning and `</think>`; None where it does not begin so."""
        return split_thinking(self.text)[0]

    @property
    def answer(self) -> str:
        """`text` without its thinking; empty where the thinking did not come to an end."""
        return split_thinking(self.text)[1]


class ReplyStream:
    """An iterator over pieces of an answer's text. Each piece has whole characters; all joined are `reply.text`.

    The answer begins with the first piece that is asked for, or with `begin`, and goes on in the background. `close`,
    or forgetting the iterator, ends it early. One thread at a time may read.
    """

    def __init__(self, scheduler: Scheduler, task: Task, finish: Callable[[], tuple[str, Reply]]) -> None:
        self._scheduler = scheduler
        self._task = task
        self._pieces = self._read(finish)
        self._began = False
        self._reply: Reply | None = None

    def begin(self) -> None:
        """Begin to compute the answer, if it has not begun.

        Raises:
            EngineError: the model is closed, or too many questions wait for it.
        """
        if not self._began:
            self._scheduler.submit(self._task)
            self._began = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.begin()
        return next(self._pieces)

    def __del__(self) -> None:
        if hasattr(self, "_began"):
            self._scheduler.cancel(self._task, wait=False)

    def _read(self, finish: Callable[[], tuple[str, Reply]]) -> Generator[str, None, None]:
        yield from self._task.pieces()
        rest, reply = finish()
        if rest:
            yield rest
        self._reply = reply

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
        """End the answer, and read no more of it. The model is free within one step."""
        self._began = True
        self._scheduler.cancel(self._task)
        self._pieces.close()
