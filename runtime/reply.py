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
    or forgetting the iterator, ends it early. One thread at a time may read. A reader that must not wait, such as an
    event loop, gives `begin` a function that wakes it, and calls `poll`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        task: Task,
        finish: Callable[[], tuple[str, Reply]],
        logprobs: Callable[[int], list[TokenLogprob]] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._task = task
        self._pieces = self._read(finish)
        self._logprobs = logprobs
        self._logprobs_read = 0
        self._began = False
        self._reply: Reply | None = None

    def begin(self, wake: Callable[[], None] | None = None) -> None:
        """Begin to compute the answer, if it has not begun.

        Args:
            wake: is called in another thread whenever `poll` has something new; it must return at once.

        Raises:
            EngineError: the model is closed, or too many questions wait for it.
        """
        if not self._began:
            self._task.wake = wake
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
        rest, self._reply = finish()
        if rest:
            yield rest

    def poll(self) -> str:
        """Return the text that came since the last read, often "", without waiting. `finished` says if it is the last.

        Raises:
            EdgeError or any other error: what ended the answer before it was complete.
        """
        text = ""
        while self._task.has_news and self._reply is None:
            text += next(self._pieces, "")
        return text + "".join(self._pieces if self._reply is not None else ())

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and `reply` does not wait."""
        return self._reply is not None

    def new_logprobs(self) -> list[TokenLogprob]:
        """Return the log probabilities of the tokens since the last call, where the option `logprobs` asks for them."""
        found = self._logprobs(self._logprobs_read) if self._logprobs is not None else []
        self._logprobs_read += len(found)
        return found

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


def timings(preprocess_s: float, task: Task) -> dict[str, float]:
    """Return `Reply.timings` of a task whose images took `preprocess_s` to decode and tile."""
    seconds = {"preprocess_s": preprocess_s, **task.seconds}
    rates = {
        "first_token_s": sum(seconds[name] for name in ("preprocess_s", "waiting_s", "vision_s", "prefill_s")),
        "prefill_tokens": task.computed,
        "prefill_tokens_per_s": task.computed / max(seconds["prefill_s"], 1e-9),
        "decode_tokens_per_s": (len(task.decoding.tokens) - 1) / max(seconds["decode_s"], 1e-9),
    }
    return {name: round(value, 4) for name, value in (seconds | rates).items()}
