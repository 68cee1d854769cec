"""`InternVL` and `Conversation`: reuse of images and prompts changes time, never answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from helpers.reference import Reference, tile_image
from helpers.remembering_engine import RememberingEngine
from internvl_edge import Conversation, InternVL, export_bundle
from internvl_edge.base.errors import EngineError, PromptError
from internvl_edge.bundle.bundle import Bundle, sha256
from internvl_edge.bundle.manifest import FileEntry
from internvl_edge.runtime.engines import finish
from internvl_edge.runtime.image_cache import ImageCache
from internvl_edge.runtime.prefixes import image_keys


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), text="internlm2")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def model(bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))


def test_an_answer_is_the_references(model: InternVL, checkpoint: Path, picture: Image.Image) -> None:
    reply = model.chat("What is this?", [picture], max_new_tokens=10)
    expected = Reference(checkpoint).generate(reply.prompt_ids, tile_image(picture, 12, size=56), max_new_tokens=10)
    assert reply.output_ids == expected.ids


def test_a_second_question_about_the_same_image_computes_neither_vision_nor_the_shared_prompt(
    model: InternVL, bundle: Path, picture: Image.Image
) -> None:
    first = model.chat("What is this?", [picture], max_new_tokens=6)
    encoded: list[Any] = []
    model._engine.encode = lambda tiles: encoded.append(tiles)  # type: ignore[method-assign,func-returns-value,assignment]
    second = model.chat("And what colour?", [picture], max_new_tokens=6)
    assert encoded == []
    assert first.timings["prefill_tokens"] == len(first.prompt_ids)
    assert second.timings["prefill_tokens"] < len(second.prompt_ids) - second.image_tokens
    with InternVL.load(bundle, threads=1) as fresh:
        assert second.output_ids == fresh.chat("And what colour?", [picture], max_new_tokens=6).output_ids


def test_other_pixels_of_the_same_shape_are_not_mistaken_for_the_cached_ones(
    model: InternVL, bundle: Path, picture: Image.Image
) -> None:
    model.chat("What is this?", [picture], max_new_tokens=6)
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    answer = model.chat("What is this?", [other], max_new_tokens=6)
    with InternVL.load(bundle, threads=1) as fresh:
        assert answer.output_ids == fresh.chat("What is this?", [other], max_new_tokens=6).output_ids


def test_dynamic_ntk_requests_leave_no_trace(tmp_path: Path) -> None:
    """Short, longer than the maximum, growing past it while answering, short again: each as from a fresh load."""
    checkpoint = tiny.write_checkpoint(
        tmp_path / "checkpoint",
        text="internlm2",
        max_position_embeddings=128,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        rope_theta=1e4,
    )
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    reference = Reference(checkpoint)
    questions = ["Hi", "long " * 60, "Hi", "grow " * 5, "grow " * 5 + "on", "Hi"]
    with InternVL.load(bundle, threads=1) as model:
        for question in questions:
            reply = model.chat(question, max_new_tokens=40)
            expected = reference.generate(reply.prompt_ids, max_new_tokens=40, stop_ids=list(model._stop_ids))
            assert reply.output_ids == expected.ids, question


def test_conversation_is_the_same_as_passing_history(model: InternVL, bundle: Path, picture: Image.Image) -> None:
    conversation = Conversation(model, max_new_tokens=5, max_tiles=1)
    first = conversation.ask("What is this?", picture)
    second = conversation.ask("Why?")
    third = conversation.ask("And these?", picture, picture)
    assert third.timings["prefill_tokens"] < len(third.prompt_ids)
    history = [("<image>\nWhat is this?", first.text), ("Why?", second.text)]
    with InternVL.load(bundle, threads=1) as fresh:
        options: dict[str, Any] = {"max_new_tokens": 5, "max_tiles": 1}
        question = "Image-2: <image>\nImage-3: <image>\nAnd these?"
        again = fresh.chat(question, [picture, picture, picture], history=history, **options)
    assert again.prompt_ids == third.prompt_ids
    assert again.output_ids == third.output_ids
    conversation.clear()
    assert conversation.ask("Hi").tiles == []


def test_closing_twice_is_no_mistake(bundle: Path) -> None:
    with InternVL.load(bundle, threads=1) as model:
        model.close()


def test_an_abandoned_stream_does_not_disturb_the_next_answer(model: InternVL, bundle: Path) -> None:
    expected = model.chat("Tell me more", max_new_tokens=8)
    stream = model.stream("Tell me everything", max_new_tokens=20)
    next(stream)
    del stream
    assert model.chat("Tell me more", max_new_tokens=8).output_ids == expected.output_ids


def test_stop_strings_end_the_answer_and_are_not_part_of_it(model: InternVL) -> None:
    whole = model.chat("Hello", max_new_tokens=30)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = model.chat("Hello", max_new_tokens=30, stop=[stop])
    assert stopped.text == whole.text[: whole.text.find(stop)].strip()
    assert stopped.finish_reason == "stop"
    assert len(stopped.output_ids) < len(whole.output_ids)


def test_the_stop_token_ends_an_answer(tmp_path: Path) -> None:
    """The head of a tiny checkpoint is turned so that the end token always wins."""
    from safetensors.torch import load_file, save_file

    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["language_model.lm_head.weight"]
    bundle = export_bundle(folder, tmp_path / "plain")
    with InternVL.load(bundle, threads=1) as model:
        (end,) = model._stop_ids
        chosen = model.chat("Hello", max_new_tokens=1).output_ids[0]
    head[end] = head[chosen] * 2
    save_file(tensors, folder / "model.safetensors")
    with InternVL.load(export_bundle(folder, tmp_path / "ending"), threads=1) as model:
        reply = model.chat("Hello", max_new_tokens=9)
    assert (reply.output_ids, reply.text, reply.finish_reason) == ([end], "", "stop")


def test_context_overflow_is_found_before_any_work(bundle: Path, picture: Image.Image) -> None:
    with InternVL.load(bundle, context=100, threads=1) as model:
        model._engine.encode = None  # type: ignore[method-assign,assignment]  # would fail if vision were computed
        with pytest.raises(PromptError, match="context of 100"):
            model.chat("x", [picture], max_new_tokens=64)
    with pytest.raises(EngineError, match="context of 1 "):
        InternVL.load(bundle, context=1)


def test_more_tokens_than_the_cache_holds_are_refused_and_change_nothing(bundle: Path) -> None:
    with InternVL.load(bundle, engine="onnxruntime", context=40) as model:
        embeds = np.zeros((41, model.config.decoder.hidden_size), np.float32)
        model.engine.prefill(embeds[:30])
        for append in (model.engine.prefill, model.engine.score):
            with pytest.raises(EngineError, match=r"11 tokens do not fit the cache, 30 of 40 are used; .*--context 41"):
                append(embeds[:11])
        assert model.engine.cache.length() == 30
        model.engine.prefill(embeds[:10])
        with pytest.raises(EngineError, match="1 tokens do not fit"):
            model.engine.decode(embeds[0])


def test_the_whole_context_can_be_used(bundle: Path) -> None:
    with InternVL.load(bundle, threads=1) as model:
        prompt = len(model.chat("Hello", max_new_tokens=1).prompt_ids)
        expected = model.chat("Hello", max_new_tokens=20).output_ids
    with InternVL.load(bundle, context=prompt + 20, threads=1) as model:
        assert model.chat("Hello", max_new_tokens=20).output_ids == expected


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "seed": 3}])
def test_guessing_changes_no_token(bundle: Path, sampling: dict[str, Any]) -> None:
    """A prompt and an answer full of repetition, so that guesses are made, accepted and refused."""
    question = "total 12.50 tax 1.25 total 12.50 tax 1.25 " * 4
    with InternVL.load(bundle, threads=1) as model:
        plain = model.chat(question, max_new_tokens=60, **sampling)
        score, scored = model.engine.score, []
        model._engine.score = lambda embeds, row: (scored.append(len(embeds)), score(embeds, row))[1]  # type: ignore[method-assign,func-returns-value]
        guessed = model.chat(question, max_new_tokens=60, speculate=True, **sampling)
        assert guessed.output_ids == plain.output_ids
        assert model.chat("And now?", max_new_tokens=5).output_ids == fresh_answer(bundle)
    if not sampling:
        assert scored


def fresh_answer(bundle: Path) -> list[int]:
    with InternVL.load(bundle, threads=1) as fresh:
        return fresh.chat("And now?", max_new_tokens=5).output_ids


def test_image_cache_is_bounded_and_forgets_the_oldest() -> None:
    calls: list[int] = []

    class Encoder(RememberingEngine):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            calls.append(int(pixels[0, 0, 0, 0]))
            return np.zeros((1, 4, 8), np.float32)

    cache = ImageCache(Encoder(), max_bytes=2 * 4 * 8 * 4)
    images = [np.full((1, 2, 2, 3), value, np.uint8) for value in range(3)]
    for index in (0, 1, 0, 2, 0, 1):
        finish(cache.encode_steps(images[index]))
    assert calls == [0, 1, 2, 1]


def test_image_keys_never_equal_tokens_and_differ_between_images() -> None:
    one, two = image_keys(b"a" * 16, 3328), image_keys(b"b" * 16, 3328)
    assert (one < 0).all()
    assert len(set(one.tolist()) | set(two.tolist())) == 2 * 3328


def test_a_token_that_has_no_row_in_the_table_is_a_prompt_error(tmp_path: Path) -> None:
    """Older versions exported tokenizers with more tokens than the model has rows for."""
    opened = Bundle.open(export_bundle(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"))
    rows = opened.manifest.model.decoder.vocab_size
    path = opened.path("tokenizer.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"].append(values["added_tokens"][-1] | {"id": rows, "content": "<loc0>", "special": False})
    path.write_text(json.dumps(values), encoding="utf-8")
    files = opened.manifest.files | {path.name: FileEntry(path.stat().st_size, sha256(path))}
    replace(opened.manifest, files=files).write(opened.folder)
    with InternVL.load(opened.folder, threads=1) as model:
        with pytest.raises(PromptError, match=f"'<loc0>', token {rows}, but the model has {rows} tokens"):
            model.chat("Where is <loc0>?", max_new_tokens=2)
        assert model.chat("Hi", max_new_tokens=2).output_ids


def test_the_native_layout_stops_at_each_of_its_ends(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", layout="native")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": []}')
    with InternVL.load(export_bundle(checkpoint, tmp_path / "one"), threads=1) as model:
        free = model.chat("Hi", max_new_tokens=8)
    assert free.finish_reason == "length"
    end = free.output_ids[3]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, free.output_ids[0] ^ 1]}))
    with InternVL.load(export_bundle(checkpoint, tmp_path / "two"), threads=1) as model:
        reply = model.chat("Hi", max_new_tokens=8)
    assert reply.finish_reason == "stop"
    assert reply.output_ids == free.output_ids[: free.output_ids.index(end) + 1]
