"""Requests that meet on one model: threads wait for each other; in one thread the later question ends the earlier."""

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
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InternVL]:
    bundle = export_bundle(CHECKPOINT, tmp_path_factory.mktemp("turns") / "bundle")
    with InternVL.load(bundle, engine="onnxruntime", threads=1) as loaded:
        yield loaded


def test_eight_threads_get_their_own_answers(model: InternVL) -> None:
    """8 x 50 requests; without turns nearly all of them are wrong."""
    questions = demo_questions()

    def ask(number: int) -> int:
        order = random.Random(number)
        wrong = 0
        for _ in range(50):
            asked = order.choice(questions)
            wrong += model.chat(asked.question, [asked.image]).text != asked.expected
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


def test_a_later_question_of_the_same_thread_ends_an_unfinished_answer(model: InternVL) -> None:
    first, second = demo_questions()[:2]
    left = model.stream(first.question, [first.image])
    next(left)
    assert model.chat(second.question, [second.image]).text == second.expected
    with pytest.raises(PromptError, match="a later question to this model ended this answer"):
        next(left)
    with pytest.raises(PromptError, match="a later question"):
        _ = left.reply


def test_two_streams_read_in_turn_never_mix(model: InternVL) -> None:
    first, second = (model.stream(asked.question, [asked.image]) for asked in demo_questions()[:2])
    next(first)
    text = next(second)
    with pytest.raises(PromptError):
        next(first)
    assert text + "".join(second) == demo_questions()[1].expected


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
        patch.setattr(model.engine, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.chat(asked.question, [asked.image])
    assert model.chat(asked.question, [asked.image]).text == asked.expected


def test_a_closed_model_is_one_line(tmp_path: Path) -> None:
    model = InternVL.load(export_bundle(CHECKPOINT, tmp_path / "bundle"), engine="onnxruntime", threads=1)
    assert repr(model) == "<InternVL qwen2, OnnxRuntimeEngine>"
    begun = model.stream("What does the sign say?")
    next(begun)
    model.close()
    model.close()
    assert repr(model) == "<InternVL qwen2, closed>"
    for use in (lambda: model.chat("x"), lambda: model.trace("x"), lambda: Conversation(model).ask("x")):
        with pytest.raises(EngineError, match="this model is closed"):
            use()
    with pytest.raises(PromptError):
        next(begun)


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
