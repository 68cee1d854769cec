"""POST /v1/chat/completions against the runtime itself: what is answered over HTTP is what the model says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from helpers.photographs import sideways
from helpers.servers import RunningServer, data_url, image_part, running, text_of
from internvl_edge import InternVL
from internvl_edge.demo import Question, demo_questions
from internvl_edge.model.prompt import IMAGE

QUESTIONS = demo_questions()
RECEIPT = next(each for each in QUESTIONS if each.image.name == "receipt.png")


def parts(asked: Question, **detail: Any) -> list[dict[str, Any]]:
    return [image_part(asked.image, **detail), {"type": "text", "text": asked.question}]


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: f"{asked.image.stem}-{asked.question[:20]}")
def test_an_answer_is_the_models(server: RunningServer, model: InternVL, asked: Question) -> None:
    found = server.ask(parts(asked))
    assert found.status == 200
    body, reply = found.json, model.chat(asked.question, [asked.image], max_tiles=6, plain_text=False)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": asked.expected, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (body["object"], body["model"]) == ("chat.completion", "demo")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", body["id"])
    assert body["usage"]["prompt_tokens"] == len(reply.prompt_ids)
    assert body["usage"]["completion_tokens"] == len(reply.output_ids)
    assert body["usage"]["total_tokens"] == len(reply.prompt_ids) + len(reply.output_ids)
    assert body["timings"]["tiles"] == reply.tiles


def test_photographs_are_turned_and_transparency_filled_on_request(bundle: Path, tmp_path: Path) -> None:
    see_through = Image.open(RECEIPT.image).convert("RGBA")
    dark = np.asarray(see_through.convert("L")) < 128
    see_through.putdata([(0, 0, 0, 255) if pixel else (0, 0, 0, 0) for pixel in dark.flatten().tolist()])
    pictures = [sideways(RECEIPT.image, tmp_path / "photo.png"), see_through]
    asked = [[image_part(picture), {"type": "text", "text": RECEIPT.question}] for picture in pictures]
    with running(bundle, exif=True, background="white") as server:
        upright, filled = (server.ask(content).json["choices"][0]["message"]["content"] for content in asked)
    assert upright == filled == RECEIPT.expected


def test_a_stream_has_the_form_of_the_interface(server: RunningServer) -> None:
    events = server.events(parts(RECEIPT), stream_options={"include_usage": True})
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    assert text_of(events) == RECEIPT.expected
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["delta"] == {}
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in events[-1]


def test_a_stream_says_how_it_is_to_be_handled(server: RunningServer) -> None:
    response = server.open("Hello", stream=True)
    headers = dict(response.getheaders())
    response.read()
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_earlier_turns_keep_their_images(server: RunningServer, model: InternVL) -> None:
    first, second = QUESTIONS[0], QUESTIONS[-1]
    messages = [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": parts(first)},
        {"role": "assistant", "content": first.expected},
        {"role": "user", "content": parts(second)},
    ]
    found = server.post({"messages": messages}).json
    asked = [IMAGE, "\n", first.question]
    reply = model.chat(
        ["Image-2: ", IMAGE, "\n", second.question],
        [first.image, second.image],
        history=[(asked, first.expected)],
        system="Answer shortly.",
        max_tiles=6,
        plain_text=True,
    )
    assert found["choices"][0]["message"]["content"] == reply.text
    assert found["usage"]["prompt_tokens"] == len(reply.prompt_ids)


@pytest.mark.parametrize("first", ["text", "image"])
def test_images_before_or_after_the_text_stand_in_front_of_it(server: RunningServer, first: str) -> None:
    content = parts(RECEIPT) if first == "image" else parts(RECEIPT)[::-1]
    assert server.ask(content).text == RECEIPT.expected


def test_an_image_between_texts_stays_there(server: RunningServer, model: InternVL) -> None:
    content = [{"type": "text", "text": "Before"}, image_part(RECEIPT.image), {"type": "text", "text": "after"}]
    found = server.ask(content, max_tokens=8).json
    reply = model.chat(
        ["Before", "\n", IMAGE, "\n", "after"], [RECEIPT.image], max_tiles=6, plain_text=True, max_new_tokens=8
    )
    assert found["choices"][0]["message"]["content"] == reply.text
    assert found["usage"]["prompt_tokens"] == len(reply.prompt_ids)


def test_an_image_may_be_a_plain_text(server: RunningServer) -> None:
    content = [{"type": "image_url", "image_url": data_url(RECEIPT.image)}, {"type": "text", "text": RECEIPT.question}]
    assert server.ask(content).text == RECEIPT.expected


@pytest.mark.parametrize(
    ("detail", "most"), [("low", 1), ("auto", 6), ("medium", 6), (None, 6), ("high", 12), ("original", 12)]
)
def test_detail_is_a_limit_of_tiles(server: RunningServer, model: InternVL, detail: str | None, most: int) -> None:
    from PIL import Image

    wide = Image.new("RGB", (900, 450), "white")
    limit = min(most, model.config.max_tiles) if detail in ("high", "original") else most
    found = server.ask([image_part(wide, **({"detail": detail} if detail else {})), {"type": "text", "text": "What?"}])
    assert found.json["timings"]["tiles"] == [model.requests.tile_count(900, 450, limit)]


def test_limits_of_single_images(server: RunningServer, model: InternVL) -> None:
    from PIL import Image

    wide = Image.new("RGB", (900, 450), "white")
    content = [image_part(wide, detail="low"), image_part(wide, max_dynamic_patch=2), image_part(wide)]
    found = server.ask([*content, {"type": "text", "text": "What?"}], max_tiles=4, max_tokens=2)
    assert found.json["timings"]["tiles"] == [model.requests.tile_count(900, 450, most) for most in (1, 2, 4)]


def test_samples_are_those_of_the_runtime(server: RunningServer, model: InternVL) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 7}
    found = server.ask("Tell me something.", n=3, max_tokens=20, **options).json
    replies = model.samples("Tell me something.", count=3, max_new_tokens=20, **options)
    assert [choice["message"]["content"] for choice in found["choices"]] == [reply.text for reply in replies]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == len(replies[0].prompt_ids)
    assert found["usage"]["completion_tokens"] == sum(len(reply.output_ids) for reply in replies)
    assert len({reply.text for reply in replies}) > 1


def test_samples_are_streamed_side_by_side(server: RunningServer, model: InternVL) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "seed": 7}
    events = server.events("Tell me something.", n=3, max_tokens=20, **options)
    replies = model.samples("Tell me something.", count=3, max_new_tokens=20, **options)
    assert [text_of(events, index) for index in range(3)] == [reply.text for reply in replies]
    ends = [event["choices"][0] for event in events[:-1] if event["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_are_those_of_the_answers_tokens(
    server: RunningServer, model: InternVL, streamed: bool
) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    if streamed:
        events = server.events(parts(RECEIPT), **fields)
        choices = [event["choices"][0] for event in events[:-1]]
        content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        content = server.ask(parts(RECEIPT), **fields).json["choices"][0]["logprobs"]["content"]
    reply = model.chat(RECEIPT.question, [RECEIPT.image], max_tiles=6, **fields)
    assert reply.logprobs is not None
    expected = [token for token in reply.logprobs if token.token not in model.stop_ids]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == RECEIPT.expected
    assert [entry["token"] for entry in content] == [token.text for token in expected]
    assert [entry["logprob"] for entry in content] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_stop_texts_and_the_token_limit_end_answers(server: RunningServer) -> None:
    whole = RECEIPT.expected
    cut = server.ask(parts(RECEIPT), stop=[whole[2:4]])
    assert (cut.text, cut.json["choices"][0]["finish_reason"]) == (whole[:2].strip(), "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        short = server.ask(parts(RECEIPT), **{name: 2}).json
        assert short["choices"][0]["finish_reason"] == "length"
        assert short["usage"]["completion_tokens"] == 2
    both = server.ask(parts(RECEIPT), max_tokens=1, max_completion_tokens=2).json
    assert both["usage"]["completion_tokens"] == 2


def test_the_default_is_greedy_and_penalties_and_biases_count(server: RunningServer, model: InternVL) -> None:
    assert server.ask(parts(RECEIPT)).text == server.ask(parts(RECEIPT)).text
    first = model.chat(RECEIPT.question, [RECEIPT.image], max_tiles=6).output_ids[0]
    for name, options in {
        "logit_bias": {str(first): -100},
        "presence_penalty": 2,
        "frequency_penalty": 2,
        "repetition_penalty": 5.0,
    }.items():
        value: Any = {first: -100.0} if name == "logit_bias" else options
        expected = model.chat(RECEIPT.question, [RECEIPT.image], max_tiles=6, max_new_tokens=12, **{name: value}).text
        assert server.ask(parts(RECEIPT), max_tokens=12, **{name: options}).text == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_vote_is_one_choice_with_its_counts(server: RunningServer, model: InternVL, streamed: bool) -> None:
    vote = model.vote(RECEIPT.question, [RECEIPT.image], 5, seed=3, max_tiles=6)
    if streamed:
        events = server.events(parts(RECEIPT), votes=5, seed=3)
        facts, text = events[-2]["vote"], text_of(events)
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        body = server.ask(parts(RECEIPT), votes=5, seed=3).json
        (choice,) = body["choices"]
        facts, text = body["vote"], choice["message"]["content"]
    assert text == vote.answer
    assert facts == {
        "answer": vote.answer,
        "agreement": vote.agreement,
        "votes": len(vote.replies),
        "counts": dict(vote.counts),
        "stopped_early": vote.stopped_early,
    }


def test_reasoning_puts_the_instruction_before_the_question(server: RunningServer) -> None:
    plain = server.ask("What?", max_tokens=2).json["usage"]["prompt_tokens"]
    reasoned = server.ask("What?", max_tokens=2, reasoning="cot").json["usage"]["prompt_tokens"]
    assert reasoned > plain + 30


def test_answers_in_a_form(server: RunningServer) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"total": {"type": "string", "maxLength": 8}}, "required": ["total"]}
    import json

    forms: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}, json.loads),
        ({"structured_outputs": {"json": schema}}, json.loads),
        ({"response_format": {"type": "regex_schema", "regex_schema": "[0-9]{3}"}}, int),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, int),
        ({"structured_outputs": {"choice": ["left", "right"]}}, ["left", "right"].index),
    ]
    for fields, reads in forms:
        found = server.ask(parts(RECEIPT), max_tokens=120, **fields)
        assert found.status == 200, found.body
        reads(found.text)
    assert server.ask(parts(RECEIPT), response_format={"type": "text"}).text == RECEIPT.expected
    ended = server.metric("grammar_truncated_total")
    assert (
        server.ask("x", max_tokens=2, structured_outputs={"regex": "[0-9]{30}"}).json["choices"][0]["finish_reason"]
        == "length"
    )
    assert server.metric("grammar_truncated_total") == ended + 1


def test_reasoning_ends_with_a_choice(server: RunningServer) -> None:
    pytest.importorskip("llguidance")
    found = server.ask(
        "Left or right?", reasoning="cot", structured_outputs={"choice": ["left", "right"]}, max_tokens=8
    )
    assert found.text in ("left", "right")
    assert found.json["vote"]["votes"] == 1


def test_a_form_that_is_not_supported_is_refused_and_never_ignored(server: RunningServer) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string"}}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    found = server.ask("x", **fields)
    assert found.status == 400
    assert "not supported" in found.error["message"]


def test_unknown_fields_are_named_and_counted(server: RunningServer) -> None:
    before = server.metric('ignored_fields_total{field="zoom"}')
    found = server.ask("Hello", max_tokens=1, zoom=3, user="me", metadata={"a": 1}, store=False)
    assert found.status == 200
    assert found.headers["x-ignored-fields"] == "zoom"
    assert server.metric('ignored_fields_total{field="zoom"}') == before + 1


def test_each_answer_is_counted(server: RunningServer, model: InternVL) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "image_tiles_total", 'requests_total{outcome="stop"}')
    before = [server.metric(name) for name in names]
    found = server.ask(parts(RECEIPT)).json
    tiles = sum(found["timings"]["tiles"])
    added = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert added == [found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"], tiles, 1]


def test_a_prompt_that_is_still_there_counts_as_cached(server: RunningServer) -> None:
    server.ask(parts(RECEIPT))
    again = server.ask(parts(RECEIPT)).json["usage"]
    assert 0 < again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]


def test_tokens_are_counted_before_asking(server: RunningServer, model: InternVL) -> None:
    found = server.post({"prompt": "Hello <|im_end|> <image>"}, "/tokenize").json
    assert found["count"] == len(found["tokens"])
    assert model._tokenizer.decode(found["tokens"], skip_special=True) == "Hello <|im_end|> <image>"
    messages = [{"role": "user", "content": parts(RECEIPT)}]
    counted = server.post({"messages": messages}, "/tokenize").json["count"]
    assert counted == server.ask(parts(RECEIPT)).json["usage"]["prompt_tokens"]
    assert found["max_model_len"] == model.context


def test_the_model_is_listed(server: RunningServer, bundle: Path) -> None:
    (entry,) = server.get("/v1/models").json["data"]
    assert entry["id"] == "demo"
    assert server.get("/v1/models/demo").json == entry
    assert server.get("/v1/models/gpt").error["code"] == "model_not_found"
    assert 'bundle="demo"' in server.get("/metrics").body.decode()
