"""The scheduler owns an engine: answers come from any thread, wait, get a row of the KV cache, and leave it.

One thread at a time computes: it starts with the first answer and ends with the last one. Each turn of it is one decode
step of all answers that are under way, or one step of a prompt: some tiles, or one chunk of tokens. Decode steps go on
between steps of prompts, and a short prompt goes ahead between the tiles of a long one, so nobody starves.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import BusyError, EngineError
from internvl_edge.model.config import DecoderConfig

from .decoding import Decoding
from .engines import ChoosingEngine, Engine
from .prefixes import Prefixes, Prompt

MOST_WAITING = 256
# Decode steps between two steps of prompts. A step of a prompt takes as long as about 30 decode steps on a CPU: one
# step between two of them would make answers under way look frozen, and four delay the prompt by about a seventh.
_DECODES_PER_PROMPT_STEP = 4
# Tokens of a prompt for one step: a tile has 256 tokens, and takes a step in the tower and about one in the decoder.
_TOKENS_PER_PROMPT_STEP = 128


@dataclass(frozen=True)
class Load:
    """What a scheduler has to do.

    Attributes:
        computed: answers that have a row.
        waiting: answers that wait for one.
        progress: `time.monotonic()` of the last step, or of the answer that ended the last pause.
    """

    computed: int
    waiting: int
    progress: float

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step, while there is something to do; else 0."""
        return time.monotonic() - self.progress if self.computed or self.waiting else 0.0


class Task:
    """One answer to be computed.

    Args:
        prompt: the prompt, which other tasks may share.
        decoding: takes the tokens.

    Attributes:
        seconds: "waiting_s" until there was a row; "vision_s" and "prefill_s" in the steps of its prompt, without those
            of others between them; "decode_s" from the first token to the last.
        computed: tokens of the prompt that were computed for this task.
        wake: is called in the scheduler's thread whenever there is something new to read; it must return at once.
    """

    def __init__(self, prompt: Prompt, decoding: Decoding) -> None:
        self.prompt = prompt
        self.decoding = decoding
        self.seconds = dict.fromkeys(("waiting_s", "vision_s", "prefill_s", "decode_s"), 0.0)
        self.computed = 0
        self.row: int | None = None
        self.steps: Generator[None, None, None] | None = None
        self.due = 0.0  # the step of prompts at which its own would end, if it had been computed since it came
        self.begun = False  # whether a step of its prompt was computed
        self.cancelled = False
        self.wake: Callable[[], None] | None = None
        self._began = 0.0
        self._pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

    def emit(self, piece: str) -> None:
        """Give a piece of text to the thread that reads `pieces`."""
        self._put(piece)

    def pieces(self) -> Iterator[str]:
        """Yield what is emitted, and wait for it, until the answer is complete. Raises what ended it before."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more will be emitted, because the answer is complete or because of an error."""
        if self._began:
            self.seconds["decode_s"] = time.perf_counter() - self._began
        self._put(error)

    @property
    def has_news(self) -> bool:
        """Whether `pieces` can go on without waiting."""
        return not self._pieces.empty()

    def _put(self, piece: str | BaseException | None) -> None:
        self._pieces.put(piece)
        if self.wake is not None:
            self.wake()

    def begin(self, logits: NDArray[np.float32]) -> None:
        """Take the first token from the logits [vocab] after the prompt."""
        self._began = time.perf_counter()
        self.decoding.begin(logits)


class Scheduler:
    """Computes tasks on one engine, as many at a time as its cache has rows.

    Args:
        engine: nothing else may use it meanwhile.
        decoder: the model's decoder.
        embed: returns the row [hidden] of a token in the token table.
        most_waiting: tasks that may wait for a row.
        prompts_first: do not decode while a task with a row waits for its prompt, and compute prompts in the order of
            their arrival. Answers under way stand still meanwhile, and later each decode step serves more of them.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: DecoderConfig,
        embed: Callable[[int], NDArray[np.float32]],
        most_waiting: int = MOST_WAITING,
        prompts_first: bool = False,
    ) -> None:
        self._engine = engine
        self._decoder = decoder
        self._prefixes = Prefixes(engine, decoder)
        self._embed = embed
        self._most_waiting = most_waiting
        self._prompts_first = prompts_first
        self._decodes_per_prompt_step = 0 if prompts_first else _DECODES_PER_PROMPT_STEP
        # The garbage collector may cancel a forgotten answer in any thread and at any moment. So the lock is reentrant,
        # no thread waits for another one while it holds it, and forgetting an answer does not wait for it.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._closed = False
        self._waiting: deque[tuple[Task, float]] = deque()
        self._prompts: list[Task] = []  # they have a row, and their prompts are computed or wait for it
        self._answers: list[Task] = []  # they are decoded
        self._interruptible: Task | None = None  # only this one is computed by the engine's present call
        self._decodes = 0  # since the last step of a prompt
        self._prompt_steps = 0  # of all prompts so far
        self._progress = time.monotonic()

    @property
    def load(self) -> Load:
        """What there is to do at this moment."""
        return Load(len(self._prompts) + len(self._answers), len(self._waiting), self._progress)

    def submit(self, task: Task) -> None:
        """Compute a task as soon as there is a row for it.

        Raises:
            EngineError: the scheduler is closed.
            BusyError: too many tasks wait.
        """
        with self._lock:
            if self._closed:
                raise EngineError("this model is closed; load the bundle again")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{len(self._waiting)} questions are waiting for this model; ask again later")
            self._waiting.append((task, time.perf_counter()))
            if self._thread is not None:
                return
            self._progress = time.monotonic()
            thread = self._thread = threading.Thread(target=self._work, name="internvl-edge", daemon=True)
            self._idle.clear()
        atexit.register(self.close)
        thread.start()

    def cancel(self, task: Task, *, wait: bool = True) -> None:
        """Drop a task within one step. A task that has ended stays as it is.

        Without `wait`, a call of the engine is left to end by itself where another thread is about to change what runs.
        """
        task.cancelled = True
        if self._lock.acquire(blocking=wait):
            try:
                if self._interruptible is task:
                    self._engine.interrupt()
            finally:
                self._lock.release()

    def forget(self) -> None:
        """Wait until all tasks have ended, and forget what the rows hold."""
        self._wait()
        self._prefixes.forget()

    def close(self) -> None:
        """End all tasks with an EngineError, within one step, and refuse later ones."""
        with self._lock:
            self._closed = True
            if self._interruptible is not None:
                self._engine.interrupt()
        self._wait()

    def _wait(self) -> None:
        if self._thread is not threading.current_thread():
            self._idle.wait()

    def _work(self) -> None:
        try:
            while self._admit():
                wants_step = self._prompts and (not self._answers or self._decodes >= self._decodes_per_prompt_step)
                if wants_step:
                    self._decodes = 0
                    self._prompt_steps += 1
                    self._prompt_step(self._next_prompt())
                else:
                    self._decodes += 1
                    self._decode_step()
                self._progress = time.monotonic()
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """End all tasks because of an error of the scheduler itself, so that nobody waits for ever."""
        with self._lock:
            for task in [*self._answers, *self._prompts, *(task for task, _ in self._waiting)]:
                task.end(error)
            self._answers.clear()
            self._prompts.clear()
            self._waiting.clear()
            self._prefixes = Prefixes(self._engine, self._decoder)
            self._end_thread()

    def _admit(self) -> bool:
        """Drop cancelled tasks, give free rows to waiting ones, and return whether there is anything to do."""
        with self._lock:
            for task in [*self._prompts, *self._answers]:
                if task.cancelled or self._closed:
                    self._leave(task, _closed() if self._closed else None)
            kept: deque[tuple[Task, float]] = deque()
            for task, since in self._waiting:
                if task.cancelled or self._closed:
                    task.end(_closed() if self._closed else None)
                elif not kept and (row := self._prefixes.take(task.prompt)) is not None:
                    task.seconds["waiting_s"] = time.perf_counter() - since
                    task.row, task.steps = row, self._compute(task, row)
                    task.due = self._prompt_steps + len(task.prompt.keys) / _TOKENS_PER_PROMPT_STEP
                    self._prompts.append(task)
                else:
                    kept.append((task, since))
            self._waiting = kept
            if self._prompts or self._answers:
                return True
            self._end_thread()
            return False

    def _end_thread(self) -> None:
        atexit.unregister(self.close)
        self._thread = None
        self._idle.set()

    def _compute(self, task: Task, row: int) -> Generator[None, None, None]:
        """Compute a task's prompt, step by step, and take its first token."""
        prompt = task.prompt
        start = self._prefixes.begin(prompt, row)
        if start < len(prompt.keys):
            embeds = yield from prompt.embed()
            task.computed = len(prompt.keys) - start
            prompt.logits = (yield from self._engine.prefill_steps(embeds[start:], row)).copy()
        self._prefixes.hold(prompt, row)
        assert prompt.logits is not None
        task.begin(prompt.logits)

    def _next_prompt(self) -> Task:
        """Return the task whose prompt goes on: the one that would end first if it had been computed since it came.

        A short prompt thus goes ahead of a long one, and a long one is delayed by at most about its own length. It is
        not interrupted in the decoder, where an engine takes one prompt at a time; nor for a prompt that waits for the
        same image, which would compute it twice.
        """
        if self._prompts_first:
            return self._prompts[0]
        begun = [task for task in self._prompts if task.begun]
        for task in begun:
            if task.computed:
                return task
        free = [task for task in self._prompts if not any(_share_image(task, other) for other in begun)]
        return min([*begun, *free], key=lambda task: task.due)

    def _prompt_step(self, task: Task) -> None:
        with self._lock:
            self._interruptible = task
        assert task.steps is not None
        task.begun = True
        began = time.perf_counter()
        try:
            next(task.steps)
        except StopIteration:
            self._prompts.remove(task)
            self._answers.append(task)
            self._settle(task)
        except BaseException as error:
            self._leave(task, _closed() if self._closed else error)
        finally:
            with self._lock:
                self._interruptible = None
            task.seconds["prefill_s" if task.computed else "vision_s"] += time.perf_counter() - began

    def _decode_step(self) -> None:
        """Give each answer under way its next token: all together, but those with guesses one by one.

        What a step computes for an answer depends on this answer alone, and so does its rounding.
        """
        for task in list(self._answers):
            self._guarded([task], self._decode_guesses, task)
        single = [task for task in self._answers if not task.decoding.guessed]
        if single:
            self._guarded(single, self._decode_together, single)

    def _decode_guesses(self, task: Task) -> None:
        tokens = task.decoding.next_tokens()
        if len(tokens) == 1:
            return
        row = _row(task)
        start = self._engine.cache.length(row)
        logits = self._engine.score(np.stack([self._embed(token) for token in tokens]), row)
        self._engine.cache.reset(start + 1 + task.decoding.advance(list(logits)), row)

    def _decode_together(self, tasks: list[Task]) -> None:
        engine, rows = self._engine, [_row(task) for task in tasks]
        embeds = np.stack([self._embed(task.decoding.tokens[-1]) for task in tasks])
        if engine.cache.rows == 1 and isinstance(engine, ChoosingEngine) and tasks[0].decoding.takes_the_best:
            tasks[0].decoding.advance_to(engine.decode_token(embeds[0], rows[0]), engine.last_logits)
            return
        for task, logits in zip(tasks, engine.decode_rows(embeds, rows), strict=True):
            self._guarded([task], task.decoding.advance, [logits])

    def _guarded(self, tasks: list[Task], action: Callable[..., object], *arguments: Any) -> None:
        """Do something for tasks. An error ends them; so does the end of their answers."""
        try:
            action(*arguments)
        except BaseException as error:
            for task in tasks:
                self._leave(task, error)
        for task in tasks:
            self._settle(task)

    def _settle(self, task: Task) -> None:
        if task.decoding.finished and task in self._answers:
            self._leave(task)

    def _leave(self, task: Task, error: BaseException | None = None) -> None:
        for group in (self._prompts, self._answers):
            if task in group:
                group.remove(task)
        if task.steps is not None:
            task.steps.close()
        task.end(error)
        self._prefixes.release(_row(task))


def _share_image(one: Task, other: Task) -> bool:
    """Whether two prompts have an image in common: the keys of its tokens, which are negative."""
    keys = one.prompt.keys
    return bool(np.isin(keys[keys < 0], other.prompt.keys).any())


def _row(task: Task) -> int:
    assert task.row is not None
    return task.row


def _closed() -> EngineError:
    return EngineError("this model was closed before the answer was finished; load the bundle again")
