"""Requests that meet on one model, with one row and with several: each answer is that of its own request."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from internvl_edge import Conversation, InternVL, export_bundle
from internvl_edge.base.errors import EngineError, PromptError
from internvl_edge.demo import CHECKPOINT, demo_questions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("threads") / "bundle")


@pytest.fixture(scope="module", params=[1, 3], ids=["one row", "three rows"])
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(bundle, engine="onnxruntime", rows=request.param, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("requests", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_eight_threads_get_their_own_answers(model: InternVL, requests: int) -> None:
    """8 x 15 or 8 x 50 requests, some of them sampled, guessing or abandoned."""
    questions = demo_questions()

    def ask(number: int) -> int:
        order = random.Random(number)
        wrong = 0
        for _ in range(requests):
            asked = order.choice(questions)
            if order.random() < 0.2:
                next(model.stream(asked.question, [asked.image]))
            options = order.choice([{}, {"speculate": True}, {"temperature": 0.01, "top_k": 1}])
            wrong += model.chat(asked.question, [asked.image], **options).text != asked.expected
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 0


def test_streams_of_several_threads_do_not_mix(model: InternVL) -> None:
    questions = demo_questions()

    def ask(number: int) -> bool:
        asked = questions[number % len(questions)]
        return "".join(model.stream(asked.question, [asked.image])) == asked.expected

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(24)))


def test_answers_read_in_turn_are_each_their_own(model: InternVL) -> None:
    asked = demo_questions()[:3]
    streams = [model.stream(each.question, [each.image]) for each in asked]
    texts = [""] * len(streams)
    unfinished = set(range(len(streams)))
    while unfinished:
        for number in sorted(unfinished):
            piece = next(streams[number], None)
            if piece is None:
                unfinished.remove(number)
            else:
                texts[number] += piece
    assert texts == [each.expected for each in asked]


def test_a_question_beside_an_unfinished_answer_changes_neither(model: InternVL) -> None:
    first, second = demo_questions()[:2]
    begun = model.stream(first.question, [first.image])
    piece = next(begun)
    assert model.chat(second.question, [second.image]).text == second.expected
    assert piece + "".join(begun) == first.expected


def test_an_abandoned_answer_does_not_keep_others_waiting(model: InternVL) -> None:
    asked = demo_questions()[0]

    def begin_and_forget() -> None:
        next(model.stream(asked.question, [asked.image]))

    thread = threading.Thread(target=begin_and_forget)
    thread.start()
    thread.join()
    gc.collect()
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(model.chat(asked.question, [asked.image]).text))
    other.start()
    other.join(timeout=60)
    assert found == [asked.expected]


def test_a_closed_answer_says_so(model: InternVL) -> None:
    asked = demo_questions()[0]
    stream = model.stream(asked.question, [asked.image])
    next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(PromptError, match="closed before it was finished"):
        _ = stream.reply
    assert model.chat(asked.question, [asked.image]).text == asked.expected


def test_an_error_in_an_answer_gives_the_turn_back(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = demo_questions()[0]
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "decode_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.chat(asked.question, [asked.image])
    assert model.chat(asked.question, [asked.image]).text == asked.expected


def test_a_closed_model_is_one_line(bundle: Path) -> None:
    model = InternVL.load(bundle, engine="onnxruntime", threads=1)
    assert repr(model) == "<InternVL qwen2, OnnxRuntimeEngine>"
    begun = model.stream("What does the sign say? " * 20, max_new_tokens=3000)
    next(begun)
    model.close()
    model.close()
    assert repr(model) == "<InternVL qwen2, closed>"
    for use in (lambda: model.chat("x"), lambda: model.trace("x"), lambda: Conversation(model).ask("x")):
        with pytest.raises(EngineError, match="this model is closed"):
            use()


def test_closing_ends_the_answers_of_other_threads_with_one_line(bundle: Path) -> None:
    model = InternVL.load(bundle, engine="onnxruntime", rows=2, threads=1)
    running = threading.Barrier(5)

    def ask(_: int) -> str:
        stream = model.stream("Tell me everything. " * 50, max_new_tokens=20_000, repetition_penalty=1.2)
        running.wait(timeout=60)
        try:
            return "".join(stream)
        except EngineError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = pool.map(ask, range(4))
        running.wait(timeout=60)
        model.close()
        for text in found:
            assert text.startswith("this model ")


def test_unknown_options_are_refused_by_every_way_to_ask(model: InternVL) -> None:
    for use in (model.chat, model.stream, model.trace):
        with pytest.raises(PromptError, match="did you mean max_new_tokens"):
            use("x", max_tokens=2)  # type: ignore[call-arg]
    with pytest.raises(PromptError, match="did you mean images="):
        Conversation(model, image="x")  # type: ignore[call-arg]


def test_none_is_the_default_of_every_option(model: InternVL) -> None:
    asked = demo_questions()[0]
    names = ("max_tiles", "history", "system", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    options = dict.fromkeys((*names, "repetition_penalty", "speculate", "exif", "background", "keep_special"))
    assert model.chat(asked.question, asked.image, **options).text == asked.expected  # type: ignore[arg-type]
    assert model.chat("What is it?", None).text == model.chat("What is it?").text
