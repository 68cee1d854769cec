"""The scheduler over an engine whose answers are known: whatever arrives, leaves or fails, each answer is its own."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.remembering_engine import VOCABULARY, RememberingEngine, greedy, logits_after
from internvl_edge.base.errors import BusyError, EngineError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.demo import CHECKPOINT
from internvl_edge.runtime import scheduler as scheduling
from internvl_edge.runtime.decoding import Decoding
from internvl_edge.runtime.engines import finish
from internvl_edge.runtime.lookup import PromptLookup
from internvl_edge.runtime.prefixes import Prefixes, Prompt
from internvl_edge.runtime.sampling import Sampler, Sampling
from internvl_edge.runtime.scheduler import Scheduler, Task

DECODER = read_config(CHECKPOINT).decoder


def scheduler_for(engine: RememberingEngine, **settings: int) -> Scheduler:
    return Scheduler(engine, DECODER, lambda token: np.array([token], np.float32), **settings)


def prompt_of(tokens: list[int]) -> Prompt:
    def embed() -> Generator[None, None, np.ndarray]:
        yield  # a tile
        return np.array(tokens, np.float32)[:, None]

    return Prompt(np.array(tokens, np.int64), embed)


def task_for(tokens: list[int], count: int, prompt: Prompt | None = None, **sampling: float) -> Task:
    def accept(token: int) -> bool:
        task.emit(str(token))
        return False

    lookup = PromptLookup(tokens) if sampling.pop("guesses", 0) else None
    chooser = Sampler(Sampling(**sampling))  # type: ignore[arg-type]
    task = Task(prompt or prompt_of(tokens), Decoding(chooser, (), count, accept, lookup))
    return task


def ask(scheduler: Scheduler, tokens: list[int], count: int, **sampling: float) -> list[int]:
    task = task_for(tokens, count, **sampling)
    scheduler.submit(task)
    return [int(piece) for piece in task.pieces()]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_random_arrivals_cancellations_and_failures(rows: int) -> None:
    """Hundreds of requests of many threads, of which some stop reading and some meet an engine that fails."""
    engine = RememberingEngine(rows, chunk=8)
    scheduler = scheduler_for(engine)
    common = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]

    def one(number: int) -> str:
        choice = random.Random(number)
        tokens = common[: choice.randrange(1, 12)] + [choice.randrange(VOCABULARY) for _ in range(choice.randrange(30))]
        count = choice.randrange(1, 80)
        fate = choice.choice(["answer", "answer", "answer", "guess", "leave", "fail"])
        if fate == "fail":
            engine.failing = ValueError("planted")
        task = task_for(tokens, count, guesses=float(fate == "guess"))
        scheduler.submit(task)
        found: list[int] = []
        try:
            for piece in task.pieces():
                found.append(int(piece))
                if fate == "leave" and len(found) == count // 2:
                    scheduler.cancel(task)
                    return "left"
        except ValueError:
            return "failed"
        assert found == greedy(tokens, count)
        return "right"

    with ThreadPoolExecutor(12) as pool:
        fates = list(pool.map(one, range(400)))
    scheduler.forget()
    assert fates.count("right") > 200
    assert "failed" in fates
    assert ask(scheduler, common, 5) == greedy(common, 5)
    assert engine.most >= min(rows, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=2, max_size=8),
    st.integers(1, 3),
    st.integers(1, 20),
)
def test_what_rows_hold_never_changes_an_answer(prompts: list[list[int]], rows: int, count: int) -> None:
    engine = RememberingEngine(rows, chunk=8)
    scheduler = scheduler_for(engine)
    for tokens in prompts:
        assert ask(scheduler, tokens, count) == greedy(tokens, count)


def test_samples_of_one_prompt_compute_it_once() -> None:
    engine = RememberingEngine(rows=4)
    scheduler = scheduler_for(engine)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    prompt = prompt_of(tokens)
    tasks = [task_for(tokens, 30, prompt, temperature=1.0, seed=seed) for seed in range(6)]
    for task in tasks:
        scheduler.submit(task)
    together = [[int(piece) for piece in task.pieces()] for task in tasks]
    assert engine.computed == len(tokens)
    assert [task.computed for task in tasks] == [len(tokens), 0, 0, 0, 0, 0]
    alone = scheduler_for(RememberingEngine())
    assert together == [ask(alone, tokens, 30, temperature=1.0, seed=seed) for seed in range(6)]
    assert len({tuple(sample) for sample in together}) > 1


def test_a_prefix_that_another_row_holds_is_copied() -> None:
    engine: Any = RememberingEngine(rows=2)
    both = threading.Event()
    decode = engine.decode_rows
    engine.decode_rows = lambda *arguments: (both.wait(20), decode(*arguments))[1]
    scheduler = scheduler_for(engine)
    system = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first, second = task_for([*system, 3], 400), task_for([*system, 5], 5)
    scheduler.submit(first)
    pieces = first.pieces()
    next(pieces)
    scheduler.submit(second)
    both.set()
    assert [int(piece) for piece in second.pieces()] == greedy([*system, 5], 5)
    assert engine.copied == 8
    assert [int(piece) for piece in pieces] == greedy([*system, 3], 400)[1:]


def test_the_row_with_the_longest_prefix_is_taken() -> None:
    engine = RememberingEngine(rows=3, chunk=4)
    prefixes = Prefixes(engine, DECODER)
    held = [prompt_of([1] * 9), prompt_of([1] * 6 + [2] * 10), prompt_of([2] * 9)]
    for prompt in held:
        row = prefixes.take(prompt)
        assert row is not None
        start = prefixes.begin(prompt, row)
        finish(engine.prefill_steps(np.array(prompt.keys[start:], np.float32)[:, None], row))
        prefixes.hold(prompt, row)
    assert prefixes.take(held[0]) is None
    for row in range(3):
        prefixes.release(row)
    again = prompt_of([1] * 6 + [2] * 7 + [3])
    row = prefixes.take(again)
    assert row == 1
    assert prefixes.begin(again, row) == 12
    assert engine.tokens[1][: engine.cache.length(1)] == [1] * 6 + [2] * 6


def test_an_answer_under_way_goes_on_while_a_long_prompt_is_computed() -> None:
    engine = RememberingEngine(rows=2, chunk=1)
    scheduler = scheduler_for(engine)
    times: list[int] = []
    long, answering = task_for([5] * 400, 1), task_for([1, 2], 9_000)
    answering.emit = lambda _: times.append(engine.computed)  # type: ignore[method-assign]
    scheduler.submit(answering)
    while not times:
        time.sleep(0.001)
    scheduler.submit(long)
    list(long.pieces())
    list(answering.pieces())
    during = [each for each in times if 2 < each < 402]  # computed prompt tokens at each token of the answer
    assert len(during) > 400
    assert np.diff(during).max() <= 1


def tiled(
    log: list[str], name: str, tiles: int, image: int, text: int = 4, meanwhile: Callable[[], object] = lambda: None
) -> Task:
    """A task about an image. Each of its tiles is logged under its name, after `meanwhile` was called."""
    keys = [-image * 1000 - place for place in range(tiles * 8)] + [5] * text

    def embed() -> Generator[None, None, np.ndarray]:
        for _ in range(tiles):
            meanwhile()
            log.append(name)
            yield
        return np.array([abs(key) % VOCABULARY for key in keys], np.float32)[:, None]

    return task_for(keys, 1, Prompt(np.array(keys, np.int64), embed))


def test_a_short_prompt_goes_ahead_between_the_tiles_of_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_TOKENS_PER_PROMPT_STEP", 4)
    engine, log = RememberingEngine(rows=3, chunk=8), list[str]()
    scheduler, prefill, filled = scheduler_for(engine), engine.prefill_steps, list[int]()
    short, late = tiled(log, "short", 1, image=2), tiled(log, "late", 1, image=3)
    long = tiled(log, "long", 6, 1, 300, lambda: log.count("long") == 2 and scheduler.submit(short))

    def prefill_steps(embeds: np.ndarray, row: int = 0) -> Generator[None, None, np.ndarray]:
        for step in prefill(embeds, row):
            if filled.count(row) == 5:  # the long prompt is in the decoder
                scheduler.submit(late)
            filled.append(row)
            yield step
        return logits_after(engine.tokens[row])

    engine.prefill_steps = prefill_steps  # type: ignore[method-assign]
    scheduler.submit(long)
    for task in (long, short, late):
        list(task.pieces())
    assert log == ["long"] * 3 + ["short"] + ["long"] * 3 + ["late"]
    assert len(list(itertools.groupby(filled))) == 3, "a prompt in the decoder is not interrupted"
    assert long.computed == 348


def test_short_prompts_do_not_starve_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt takes two or three steps. The long one, whose 84 tokens count as 21 steps, lets so many pass."""
    monkeypatch.setattr(scheduling, "_TOKENS_PER_PROMPT_STEP", 4)
    log = list[str]()
    scheduler = scheduler_for(RememberingEngine(rows=3))
    shorts = [tiled(log, "short", 1, 3)]
    for number in range(4, 200):
        shorts.append(tiled(log, "short", 1, number, meanwhile=partial(scheduler.submit, shorts[-1])))
    long = tiled(log, "long", 10, 1)
    scheduler.submit(
        tiled(log, "short", 1, 2, meanwhile=lambda: (scheduler.submit(long), scheduler.submit(shorts[-1])))
    )
    for task in [long, *shorts]:
        list(task.pieces())
    assert 3 < log[: len(log) - log[::-1].index("long")].count("short") <= 12


def test_questions_about_one_image_compute_it_once() -> None:
    """The second one is shorter, and comes while the first one is in the tower."""
    log = list[str]()
    scheduler = scheduler_for(RememberingEngine(rows=2))
    second = tiled(log, "second", 6, 1)
    first = tiled(log, "first", 6, 1, 200, lambda: log == ["first"] and scheduler.submit(second))
    scheduler.submit(first)
    for task in (first, second):
        list(task.pieces())
    assert log[:6] == ["first"] * 6
    assert second.computed < 16, "the tokens of the image are those of the first one's row"


@pytest.mark.parametrize("prompts_first", [False, True])
def test_prompts_can_come_first(prompts_first: bool) -> None:
    """An answer under way waits for a prompt, or is decoded between its steps; the tokens are the same."""
    engine = RememberingEngine(rows=2, chunk=4)
    scheduler = scheduler_for(engine, prompts_first=prompts_first)
    short, long = [1, 2, 3], [7] * 100
    steps: list[str] = []
    prefill, decode, gate = engine.prefill_steps, engine.decode_rows, threading.Event()

    def prefill_steps(embeds: np.ndarray, row: int = 0) -> Generator[None, None, np.ndarray]:
        for step in prefill(embeds, row):
            steps.append("prompt")
            yield step
        return logits_after(engine.tokens[row])

    def decode_rows(embeds: np.ndarray, rows: list[int]) -> list[np.ndarray]:
        gate.wait()
        steps.append("decode")
        return decode(embeds, rows)

    engine.prefill_steps, engine.decode_rows = prefill_steps, decode_rows  # type: ignore[method-assign]
    tasks = [task_for(short, 40), task_for(long, 5)]
    for task in tasks:
        scheduler.submit(task)
    gate.set()
    found = [[int(piece) for piece in task.pieces()] for task in tasks]
    assert found == [greedy(short, 40), greedy(long, 5)]
    last = len(steps) - steps[::-1].index("prompt")
    assert steps[:last].count("prompt") > 20
    decodes = steps[:last].count("decode")
    assert decodes <= 1 if prompts_first else decodes > 30


def test_cancelling_ends_the_call_that_the_engine_is_in() -> None:
    """Only that of the cancelled task: a decode step is of all answers under way, and short."""
    engine = RememberingEngine(rows=2)
    scheduler = scheduler_for(engine)
    inside, interrupted = threading.Event(), threading.Event()

    def endless() -> Iterator[None]:
        inside.set()
        assert interrupted.wait(timeout=60)
        raise EngineError("the computation was interrupted")
        yield

    engine.interrupt = interrupted.set  # type: ignore[method-assign]
    long, waiting = task_for([1], 2), task_for([2], 3)
    long.prompt.embed = endless  # type: ignore[method-assign,assignment]
    scheduler.submit(long)
    scheduler.submit(waiting)
    assert inside.wait(timeout=60)
    scheduler.cancel(waiting)
    assert not interrupted.is_set()
    scheduler.cancel(long)
    assert ask(scheduler, [2], 3) == greedy([2], 3)


def test_who_waits_too_much_is_told_so() -> None:
    engine = RememberingEngine()
    scheduler = scheduler_for(engine, most_waiting=2)
    gate = threading.Event()
    first = task_for([1], 2)
    first.prompt.embed = lambda: _waits_for(gate)  # type: ignore[method-assign]
    scheduler.submit(first)
    while scheduler._waiting:
        time.sleep(0.001)
    others = [task_for([2], 3), task_for([3], 3)]
    for task in others:
        scheduler.submit(task)
    with pytest.raises(BusyError, match="2 questions are waiting for this model; ask again later"):
        scheduler.submit(task_for([4], 3))
    gate.set()
    assert [[int(piece) for piece in task.pieces()] for task in others] == [greedy([2], 3), greedy([3], 3)]


def _waits_for(gate: threading.Event) -> Iterator[None]:
    gate.wait(timeout=60)
    yield
    return np.array([[1]], np.float32)  # type: ignore[return-value]


def test_a_chooser_that_fails_ends_its_own_answer_only() -> None:
    scheduler = scheduler_for(RememberingEngine(rows=3))
    tasks = [task_for([number], 50) for number in (1, 2, 3)]
    choose, calls = tasks[1].decoding._chooser.choose, []

    def failing(logits: np.ndarray) -> int:
        calls.append(1)
        return choose(logits) if len(calls) < 10 else int(1 / 0)

    tasks[1].decoding._chooser.choose = failing  # type: ignore[method-assign]
    for task in tasks:
        scheduler.submit(task)
    assert [int(piece) for piece in tasks[0].pieces()] == greedy([1], 50)
    with pytest.raises(ZeroDivisionError):
        list(tasks[1].pieces())
    assert [int(piece) for piece in tasks[2].pieces()] == greedy([3], 50)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_after_an_error_of_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_for(RememberingEngine(rows=2))
    tasks = [task_for([1], 2000), task_for([2], 2000), task_for([3], 5)]
    take, calls = Prefixes.take, []

    def failing(self: Prefixes, prompt: Prompt) -> int | None:
        calls.append(1)
        return take(self, prompt) if len(calls) < 3 else int(1 / 0)

    with monkeypatch.context() as patch:
        patch.setattr(Prefixes, "take", failing)
        for task in tasks:
            scheduler.submit(task)
        for task in tasks:
            with pytest.raises(ZeroDivisionError):
                list(task.pieces())
    assert ask(scheduler, [2], 5) == greedy([2], 5)


def test_a_closed_scheduler_ends_what_runs_and_waits_and_refuses_the_rest() -> None:
    scheduler = scheduler_for(RememberingEngine())
    tasks = [task_for([1], 9_000), task_for([2], 9_000)]
    for task in tasks:
        scheduler.submit(task)
    next(tasks[0].pieces())
    scheduler.close()
    for task in tasks:
        with pytest.raises(EngineError, match="this model was closed before the answer was finished"):
            list(task.pieces())
    with pytest.raises(EngineError, match="this model is closed"):
        scheduler.submit(task_for([1], 1))


def test_no_thread_is_left_when_nothing_is_asked() -> None:
    scheduler = scheduler_for(RememberingEngine(rows=2))
    for _ in range(3):
        ask(scheduler, [1, 2, 3], 4)
    scheduler.forget()
    assert not [thread for thread in threading.enumerate() if thread.name == "internvl-edge" and thread.is_alive()]


def test_forgetting_an_answer_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector forgets answers in any thread, also in one that is just starting."""
    scheduler = scheduler_for(RememberingEngine())
    start = threading.Thread.start

    def checked(thread: threading.Thread) -> None:
        assert not scheduler._lock._is_owned()  # type: ignore[attr-defined]
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", checked)
    task = task_for([1], 3)
    scheduler.submit(task)
    assert [int(piece) for piece in task.pieces()] == greedy([1], 3)
    with scheduler._lock:
        forgetting = threading.Thread(target=scheduler.cancel, args=(task_for([2], 3),), kwargs={"wait": False})
        start(forgetting)
        forgetting.join(timeout=10)
        assert not forgetting.is_alive()
