"""Rows of the TensorRT engine over a fake GPU: each row computes what it computes alone, whoever else is there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers.fake_gpu import FakeCuda
from helpers.tensorrt_engines import CAPACITY, FLAVOURS, OLD, open_engine, write_engines
from internvl_edge import InternVL
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines import finish
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine
from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, engine_folder

ROWS = 4
LATER = 12  # tokens after each prompt
SLOTS = 128  # of a row, for a capacity of 96
pytestmark = pytest.mark.usefixtures("small_windows")
KINDS = [*FLAVOURS.items(), ("tensorrt", OLD)]


@pytest.fixture
def engine(exported: Bundle) -> Iterator[TensorRTEngine]:
    write_engines(exported, "tensorrt", profiles=2, rows=ROWS)
    with open_engine(exported, FakeCuda(), profiles=2, rows=ROWS)[0] as opened:
        yield opened


def embeds_of(bundle: Bundle, count: int, seed: int) -> np.ndarray[Any, Any]:
    width = bundle.manifest.model.decoder.hidden_size
    return (0.6 * np.random.default_rng(seed).standard_normal((count, width))).astype(np.float32)


class Alone:
    """One sequence, and what it gives on the CPU and in an engine whose other rows are empty."""

    def __init__(self, bundle: Bundle, engine: TensorRTEngine, prompt: int, seed: int) -> None:
        self.prompt, self.done = prompt, 0
        self.embeds = embeds_of(bundle, prompt + LATER, seed)
        cpu = OnnxRuntimeEngine(bundle, dialect="standard", capacity=CAPACITY, threads=1)
        self.expected, self.logits = (
            [
                target.prefill(self.embeds[:prompt]).copy(),
                *(target.decode(embed).copy() for embed in self.embeds[prompt:]),
            ]
            for target in (cpu, engine)
        )
        engine.cache.reset()

    def check(self, logits: np.ndarray[Any, Any], tolerance: float) -> None:
        """Compare the logits of the next token."""
        np.testing.assert_array_equal(logits, self.logits[self.done])
        assert np.abs(logits - self.expected[self.done]).max() < tolerance * self.expected[self.done].std()
        self.done += 1


@pytest.mark.parametrize(("flavour", "version"), KINDS)
@pytest.mark.parametrize(("cache", "tolerance"), [("exported", 0.03), ("rounded", 0.2)])
def test_rows_of_unequal_length_are_as_alone(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    version: str,
    cache: str,
    tolerance: float,
) -> None:
    """Random sets of 1 to 4 rows decode; rows leave, and others begin in their place, a chunk between two steps."""
    monkeypatch.setitem(FLAVOURS, flavour, version)
    bundle: Bundle = request.getfixturevalue(cache)
    write_engines(bundle, flavour, profiles=2, rows=ROWS)
    cuda, choice, sizes = FakeCuda(), random.Random(0), set()
    with open_engine(bundle, cuda, flavour, profiles=2, rows=ROWS)[0] as engine:
        waiting = [Alone(bundle, engine, prompt, seed) for seed, prompt in enumerate((3, 30, 17, 64, 1, 45, 84, 8))]
        running: dict[int, Alone] = {}

        def step(rows: list[int]) -> None:
            sizes.add(len(rows))
            ones = [running[row] for row in rows]
            embeds = np.stack([one.embeds[one.prompt + one.done - 1] for one in ones])
            for one, logits in zip(ones, engine.decode_rows(embeds, rows), strict=True):
                one.check(logits, tolerance)

        def some() -> list[int]:
            rows = [row for row, one in running.items() if one.done <= LATER and choice.random() < 0.8]
            choice.shuffle(rows)
            return rows

        while waiting or running:
            if waiting and len(running) < ROWS and choice.random() < 0.4:
                row = choice.choice([each for each in range(ROWS) if each not in running])
                one = waiting.pop()
                engine.cache.reset(0, row)
                prompt = engine.prefill_steps(one.embeds[: one.prompt], row)
                while (logits := next_step(prompt)) is None:
                    if rows := some():
                        step(rows)
                one.check(logits, tolerance)
                running[row] = one
            if rows := some():
                step(rows)
            for row in [row for row, one in running.items() if one.done > LATER]:
                assert engine.cache.length(row) == running.pop(row).prompt + LATER
    assert sizes == set(range(1, ROWS + 1))
    assert cuda.leaks == {}


def next_step(prompt: Any) -> np.ndarray[Any, Any] | None:
    """Compute one step of a prompt, and return the logits at its end."""
    try:
        next(prompt)
    except StopIteration as end:
        logits: np.ndarray[Any, Any] = end.value
        return logits
    return None


@pytest.mark.parametrize(("flavour", "version"), KINDS)
@pytest.mark.parametrize("cache", ["exported", "rounded"])
def test_a_copied_prefix_is_the_prefix(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, flavour: str, version: str, cache: str
) -> None:
    monkeypatch.setitem(FLAVOURS, flavour, version)
    bundle: Bundle = request.getfixturevalue(cache)
    write_engines(bundle, flavour, profiles=2, rows=ROWS)
    with open_engine(bundle, FakeCuda(), flavour, profiles=2, rows=ROWS)[0] as engine:
        one = Alone(bundle, engine, 40, seed=9)
        engine.prefill(embeds_of(bundle, 70, seed=1), 3)
        engine.prefill(one.embeds[:40], 2)
        for target in (0, 3):
            engine.cache.reset(0, target)
            engine.copy(2, target, 40)
        engine.copy(2, 1, 20)
        assert [engine.cache.length(row) for row in range(ROWS)] == [40, 20, 40, 40]
        assert np.abs(engine.prefill(one.embeds[20:40], 1) - one.logits[0]).max() < 0.05 * one.logits[0].std()
        for index in range(LATER):
            found = engine.decode_rows(np.stack([one.embeds[40 + index]] * 3), [3, 0, 2])
            for logits in found:
                np.testing.assert_array_equal(logits, one.logits[1 + index])


def test_a_full_row_keeps_what_it_holds_while_others_decode(exported: Bundle, engine: TensorRTEngine) -> None:
    """A step computes all rows. What it computes for a full one goes behind its last token."""
    embeds = embeds_of(exported, CAPACITY, seed=2)
    expected = engine.prefill(embeds, 1).copy()
    before = engine.score(embeds[:3], 0)
    assert [engine.cache.length(row) for row in range(ROWS)] == [3, CAPACITY, 0, 0]
    for embed in embeds[3:20]:
        engine.decode_rows(embed[None], [0])
    with pytest.raises(EngineError, match="1 tokens do not fit the cache, 96 of 96 are used; give --context 97"):
        engine.decode_rows(embeds[:2], [0, 1])
    assert engine.cache.length(0) == 20
    for length in (CAPACITY - 1, CAPACITY - 9):
        engine.cache.reset(length, 1)
        np.testing.assert_allclose(engine.prefill(embeds[length:], 1), expected, atol=0.02 * expected.std())
    engine.cache.reset()
    np.testing.assert_array_equal(engine.score(embeds[:3], 0), before)


def test_tokens_are_chosen_and_guesses_scored_in_any_row(exported: Bundle, engine: TensorRTEngine) -> None:
    one = Alone(exported, engine, 20, seed=4)
    for row in (2, 0, 3):
        engine.prefill(one.embeds[:20], row)
        assert engine.decode_token(one.embeds[20], row) == one.logits[1].argmax()
        np.testing.assert_array_equal(engine.last_logits(), one.logits[1])
        found = engine.score(one.embeds[21:27], row)
        assert np.abs(found - np.stack(one.logits[2:8])).max() < 0.03 * found.std()
        assert engine.cache.length(row) == 27


def test_all_steps_of_all_rows_are_one_graph_over_the_whole_cache(exported: Bundle) -> None:
    write_engines(exported, "tensorrt", profiles=2, rows=ROWS)
    cuda = FakeCuda()
    with open_engine(exported, cuda, profiles=2, rows=ROWS)[0] as engine:
        embeds = embeds_of(exported, CAPACITY, seed=5)
        for row in range(ROWS):
            engine.prefill(embeds[: 10 + 20 * row], row)
        for index in range(20):
            rows = list(range(1 + index % ROWS))
            engine.decode_rows(embeds[: len(rows)], rows)
        assert cuda.calls["cudaGraphInstantiate"] == 1
        assert cuda.calls["cudaGraphLaunch"] == 19
        context = next(each for each in engine._contexts)._context
        assert set(context.windows) == {SLOTS}
        assert {dict(shape)["inputs_embeds"][:2] for shape in context.shapes} == {(ROWS, 1)}
    assert cuda.leaks == {}


def test_fewer_rows_than_were_built_and_more(exported: Bundle) -> None:
    write_engines(exported, "tensorrt", profiles=2, rows=ROWS)
    cuda = FakeCuda()
    with pytest.raises(EngineError, match=r"fake hold 4 rows, asked for are 5; ask for fewer, or build with --rows 5$"):
        open_engine(exported, cuda, profiles=2, rows=5)
    assert cuda.leaks == {}
    with open_engine(exported, cuda, profiles=2, rows=2, warm=True)[0] as engine:
        assert (engine.cache.rows, engine.cache.capacity) == (2, CAPACITY)
        one = Alone(exported, engine, 7, seed=6)
        engine.prefill(one.embeds[:7], 1)
        np.testing.assert_array_equal(engine.decode_rows(one.embeds[7:8], [1])[0], one.logits[1])
    with open_engine(exported, cuda, profiles=2)[0] as engine:
        assert engine.cache.rows == 1
        logits = finish(engine.prefill_steps(one.embeds[:7]))
        np.testing.assert_array_equal(logits, one.logits[0])
    assert cuda.leaks == {}


def test_records_before_rows_are_of_one_row(exported: Bundle) -> None:
    record = write_engines(exported, "tensorrt")
    path = engine_folder(exported, "fake") / "engine.json"
    text = path.read_text()
    assert '"rows": 1' in text
    path.write_text(text.replace(',\n    "rows": 1', ""))
    assert EngineRecord.read(path.parent) == record
    several = replace(record, options=replace(record.options, rows=2))
    assert not record.same_build(several)
    for rows in (0, 65):
        path.write_text(text.replace('"rows": 1', f'"rows": {rows}'))
        with pytest.raises(EngineError, match=rf"options\.rows is {rows}, expected a number from 1 to 64"):
            EngineRecord.read(path.parent)


def test_answers_side_by_side_are_the_answers_alone(exported: Bundle) -> None:
    """Eight questions from eight threads, and samples of one prompt, on four rows."""
    write_engines(exported, "tensorrt", profiles=2, rows=ROWS)
    cuda = FakeCuda()
    model = InternVL(exported, open_engine(exported, cuda, profiles=2, rows=ROWS)[0])
    options: dict[str, Any] = {"max_new_tokens": 6, "system": ""}
    questions = ["Hello" + " you" * index for index in range(8)]
    alone = [model.chat(question, **options).output_ids for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: model.chat(question, **options).output_ids, questions))
    assert together == alone
    samples = model.samples("Hello", count=5, temperature=1.0, seed=3, **options)
    assert [reply.output_ids for reply in samples] == [
        model.chat("Hello", temperature=1.0, seed=3 + index, **options).output_ids for index in range(5)
    ]
    model.close()
    assert cuda.leaks == {}
