"""What a server needs: answers that are polled, images that are tiled ahead, votes in steps, load and progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import BusyError, PromptError
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.runtime.reply import ReplyStream
from internvl_edge.runtime.request import Tiles
from internvl_edge.runtime.voting import vote_steps

QUESTIONS = demo_questions()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("polled") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(bundle, engine="onnxruntime", device="cpu", rows=2, threads=1) as loaded:
        yield loaded


def polled(stream: ReplyStream) -> list[str]:
    """Read a stream as an event loop does: only after it was woken."""
    news = threading.Event()
    stream.begin(news.set)
    texts = []
    while not stream.finished:
        assert news.wait(30)
        news.clear()
        texts.append(stream.poll())
    return texts


@pytest.mark.parametrize("asked", QUESTIONS[:4], ids=lambda asked: asked.question[:20])
def test_what_is_polled_is_the_answer(model: InternVL, asked: Any) -> None:
    stream = model.stream(asked.question, [asked.image])
    assert "".join(polled(stream)) == asked.expected == stream.reply.text
    assert stream.poll() == ""


def test_polling_does_not_wait(model: InternVL) -> None:
    stream = model.stream("Hello", max_new_tokens=3)
    assert stream.poll() == ""
    assert not stream.finished
    stream.close()


def test_polling_raises_what_ended_the_answer(bundle: Path) -> None:
    with InternVL.load(bundle, engine="onnxruntime", device="cpu", threads=1) as model:
        engine: Any = model._engine

        def fail(*arguments: Any) -> Any:
            raise ValueError("planted")

        engine.decode_rows = fail
        with pytest.raises(ValueError, match="planted"):
            polled(model.stream("Hello", max_new_tokens=5))


def test_log_probabilities_are_polled_once_each(model: InternVL) -> None:
    asked = QUESTIONS[0]
    stream = model.stream(asked.question, [asked.image], logprobs=True, top_logprobs=1)
    news = threading.Event()
    stream.begin(news.set)
    found = []
    while not stream.finished:
        assert news.wait(30)
        news.clear()
        stream.poll()
        found += stream.new_logprobs()
    found += stream.new_logprobs()
    assert found == stream.reply.logprobs
    assert model.stream("Hello").new_logprobs() == []


def test_an_image_that_is_tiled_ahead_stands_for_the_image(model: InternVL) -> None:
    asked = QUESTIONS[0]
    tiles = model.requests.tile(asked.image, 2)
    assert isinstance(tiles, Tiles)
    ahead = model.chat(asked.question, [tiles])
    assert ahead.output_ids == model.chat(asked.question, [asked.image], max_tiles=2).output_ids
    assert ahead.tiles == [len(tiles.pixels)]
    assert model.chat(asked.question, tiles).output_ids == ahead.output_ids
    assert model.chat(f"<image>\n{asked.question}", [[tiles]]).output_ids == ahead.output_ids


@pytest.mark.parametrize("most", [1, 2, 6, None])
def test_tiles_are_counted_without_pixels(model: InternVL, most: int | None) -> None:
    from PIL import Image

    from internvl_edge.model.preprocess import image_size

    for asked in QUESTIONS:
        with Image.open(asked.image) as image:
            assert image_size(asked.image.read_bytes()) == image.size
            assert model.requests.tile_count(*image.size, most) == len(model.requests.tile(asked.image, most).pixels)


def test_limits_of_tiles_can_be_left_to_the_checkpoint(model: InternVL) -> None:
    asked = QUESTIONS[0]
    whole = model.chat(asked.question, [asked.image]).tiles
    images = [asked.image, asked.image]
    assert model.chat("<image> and <image>?", images, max_tiles=[None, 1], max_new_tokens=1).tiles == [*whole, 1]


def test_a_vote_in_steps_is_the_vote(model: InternVL) -> None:
    asked = QUESTIONS[0]
    arguments = (asked.question, [asked.image], 5, False, None, None, {"seed": 3})
    steps = vote_steps(model, *arguments)
    polls = 0
    try:
        while True:
            stream = next(steps)
            polls += 1
            while not stream.finished:
                stream.poll()
                time.sleep(0.001)
    except StopIteration as end:
        found = end.value
    expected = model.vote(asked.question, [asked.image], 5, seed=3)
    assert (found.answer, found.counts) == (expected.answer, expected.counts)
    assert polls == len(found.replies)


def test_a_vote_that_is_left_leaves_nothing_running(model: InternVL) -> None:
    steps = vote_steps(model, "Hello", (), 4, False, None, None, {"temperature": 1.0, "max_new_tokens": 2000})
    next(steps)
    steps.close()
    deadline = time.monotonic() + 5
    while model.load_now.computed + model.load_now.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_load_and_the_progress_are_known(bundle: Path) -> None:
    with InternVL.load(bundle, engine="onnxruntime", device="cpu", threads=1, most_waiting=1) as model:
        assert (model.load_now.computed, model.load_now.waiting, model.load_now.stalled_s) == (0, 0, 0.0)
        engine: Any = model._engine
        decode, go = engine.decode_rows, threading.Event()
        engine.decode_rows = lambda *arguments: (go.wait(20), decode(*arguments))[1]
        streams = [model.stream("Hello", max_new_tokens=4) for _ in range(3)]
        streams[0].begin()
        deadline = time.monotonic() + 10
        while model.load_now.computed != 1:
            assert time.monotonic() < deadline
        streams[1].begin()
        assert model.load_now.waiting == 1
        with pytest.raises(BusyError):
            streams[2].begin()
        while model.load_now.stalled_s < 0.3:  # the prompt takes its time on a busy machine
            assert time.monotonic() < deadline + 10
            time.sleep(0.01)
        go.set()
        assert all(stream.reply.text is not None for stream in streams[:2])
        while model.load_now.computed:  # its thread leaves the row a moment after the last piece
            assert time.monotonic() < deadline + 10
        assert model.load_now.stalled_s == 0.0


def test_tokens_are_counted_as_text(model: InternVL) -> None:
    ids = model.requests.text_tokens("Hello <|im_end|>")
    assert model._tokenizer.token_id("<|im_end|>") not in ids
    reply = model.chat("What?", [QUESTIONS[0].image], max_new_tokens=1)
    assert model.requests.prompt_tokens("What?", [QUESTIONS[0].image], {}) == reply.prompt_ids
    with pytest.raises(PromptError):
        model.requests.prompt_tokens("", (), {})
