"""Everything that is refused: the status, the field that is named, and one line that says what to do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.repository import REPOSITORY
from helpers.servers import RunningServer, image_part, running
from internvl_edge.server.chat_request import read_chat
from internvl_edge.server.errors import ApiError
from internvl_edge.server.fields import BY_NAME, FIELDS
from internvl_edge.server.settings import Settings

USER = {"role": "user", "content": "Hello"}


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    ("no messages", {}, "messages"),
    ("null messages", {"messages": None}, "messages"),
    ("empty messages", {"messages": []}, "messages"),
    ("messages no list", {"messages": "hi"}, "messages"),
    ("message no object", {"messages": ["hi"]}, "messages[0]"),
    ("no role", {"messages": [{"content": "hi"}]}, "messages[0].role"),
    ("role tool", {"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ("role function", {"messages": [{"role": "function", "content": "hi"}]}, "messages[0].role"),
    ("role a list", {"messages": [{"role": [], "content": "hi"}]}, "messages[0].role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("content a number", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ("content empty", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("question empty", {"messages": [{"role": "user", "content": " "}]}, "messages"),
    ("system second", {"messages": [USER, {"role": "system", "content": "x"}, USER]}, "messages"),
    ("assistant first", {"messages": [{"role": "assistant", "content": "x"}, USER]}, "messages"),
    ("assistant last", {"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages"),
    (
        "tool calls",
        {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]},
        "messages[1].tool_calls",
    ),
    ("part a text", {"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
    ("part of no type", part(text="x"), "messages[0].content[0].type"),
    ("part text of no text", part(type="text"), "messages[0].content[0].text"),
    *(
        (f"part {kind}", part(type=kind), "messages[0].content[0].type")
        for kind in ("input_audio", "file", "video_url", "refusal", "image", "unknown")
    ),
    ("image of nothing", part(type="image_url"), "messages[0].content[0].image_url"),
    ("image a number", part(type="image_url", image_url=3), "messages[0].content[0].image_url"),
    ("image of no address", part(type="image_url", image_url={}), "messages[0].content[0].image_url"),
    ("image path", part(type="image_url", image_url="/etc/passwd"), "messages[0].content[0].image_url"),
    ("image file", part(type="image_url", image_url="file:///etc/passwd"), "messages[0].content[0].image_url"),
    ("image http", part(type="image_url", image_url="http://127.0.0.1/x.png"), "messages[0].content[0].image_url"),
    ("image no comma", part(type="image_url", image_url="data:image/png"), "messages[0].content[0].image_url"),
    ("image text", part(type="image_url", image_url="data:text/html,hi"), "messages[0].content[0].image_url"),
    ("image video", part(type="image_url", image_url="data:video/jpeg;base64,"), "messages[0].content[0].image_url"),
    ("base64", part(type="image_url", image_url="data:image/png;base64,§§"), "messages[0].content[0].image_url"),
    ("empty image", part(type="image_url", image_url="data:image/png;base64,"), "messages[0].content[0].image_url"),
    (
        "damaged image",
        {"messages": [{"role": "user", "content": [image_part(b"\x89PNG\r\n\x1a\n123")]}]},
        "messages[0].content[0].image_url",
    ),
    (
        "detail",
        part(type="image_url", image_url={"url": "data:,", "detail": "huge"}),
        "messages[0].content[0].image_url.detail",
    ),
    (
        "patches",
        part(type="image_url", image_url={"url": "data:,", "max_dynamic_patch": 999}),
        "messages[0].content[0].image_url.max_dynamic_patch",
    ),
    (
        "assistant's image",
        {"messages": [USER, {"role": "assistant", "content": [image_part(b"x")]}, USER]},
        "messages[1].content[0]",
    ),
    *(
        (f"{name} {value!r}", {"messages": [USER], name: value}, name)
        for name, value in [
            ("temperature", -1),
            ("temperature", 2.1),
            ("temperature", "0"),
            ("temperature", True),
            ("top_p", 0),
            ("top_p", 1.1),
            ("top_k", -2),
            ("top_k", 1.5),
            ("min_p", 2),
            ("seed", "x"),
            ("seed", 1 << 63),
            ("n", 0),
            ("n", 9),
            ("n", 1.0),
            ("votes", 0),
            ("votes", 9),
            ("max_tokens", 0),
            ("max_tokens", "many"),
            ("max_completion_tokens", -1),
            ("stop", ["x"] * 17),
            ("stop", 3),
            ("stop", "x" * 1001),
            ("logprobs", 1),
            ("top_logprobs", 21),
            ("top_logprobs", 2),
            ("stream", "yes"),
            ("stream_options", True),
            ("frequency_penalty", 3),
            ("presence_penalty", -3),
            ("repetition_penalty", 0),
            ("logit_bias", []),
            ("logit_bias", {"a": 1}),
            ("logit_bias", {str(i): 1 for i in range(301)}),
            ("max_tiles", 0),
            ("max_tiles", 1000),
            ("reasoning", "deep"),
            ("response_format", "json"),
            ("structured_outputs", {"json": {}, "regex": "x"}),
            ("structured_outputs", {"grammar": "x"}),
            ("structured_outputs", {"choice": [" x"]}),
        ]
    ),
    ("empty stop", {"messages": [USER], "stop": [""]}, "stop[0]"),
    ("bias value", {"messages": [USER], "logit_bias": {"5": 101}}, "logit_bias.5"),
    ("bias token", {"messages": [USER], "logit_bias": {"999999999": 1}}, "messages"),
    ("stop special", {"messages": [USER], "stop": "<box>"}, "messages"),
    ("usage", {"messages": [USER], "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("format type", {"messages": [USER], "response_format": {"type": "xml"}}, "response_format.type"),
    ("format none", {"messages": [USER], "response_format": {}}, "response_format.type"),
    ("no schema", {"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        "no schema in it",
        {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
    ),
    (
        "large schema",
        {"messages": [USER], "structured_outputs": {"json": {"enum": ["x" * 70_000]}}},
        "structured_outputs",
    ),
    (
        "two forms",
        {"messages": [USER], "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}},
        "structured_outputs",
    ),
    ("votes and n", {"messages": [USER], "votes": 2, "n": 2}, "n"),
    ("votes and logprobs", {"messages": [USER], "votes": 2, "logprobs": True}, "logprobs"),
    (
        "reasoning and form",
        {"messages": [USER], "reasoning": "cot", "response_format": {"type": "json_object"}},
        "reasoning",
    ),
    ("context", {"messages": [USER], "max_tokens": 40_000}, "messages"),
    *(
        (f"refused {name}", {"messages": [USER], name: value}, name)
        for name, value in [
            ("tools", [{"type": "function"}]),
            ("functions", [{}]),
            ("function_call", {"name": "x"}),
            ("tool_choice", {"type": "function"}),
            ("tool_choice", "required"),
            ("audio", {}),
            ("modalities", ["audio"]),
            ("web_search_options", {}),
            ("chat_template", "x"),
            ("chat_template_kwargs", {"a": 1}),
            ("continue_final_message", True),
            ("use_beam_search", True),
            ("best_of", 2),
            ("prompt_logprobs", 1),
            ("ignore_eos", True),
            ("skip_special_tokens", False),
            ("guided_json", {}),
            ("guided_regex", "x"),
            ("guided_choice", ["a"]),
            ("grammar", "x"),
        ]
    ),
]


@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_request_names_its_field(server: RunningServer, fields: dict[str, Any], param: str | None) -> None:
    found = server.post(fields)
    assert found.status == 400, found.body
    assert found.error["type"] == "invalid_request_error"
    assert found.error["param"] == param


HARMLESS = {
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "skip_special_tokens": True,
    "best_of": 1,
    "use_beam_search": False,
    "logit_bias": None,
    "stop": None,
    "response_format": None,
    "tool_calls": None,
    "parallel_tool_calls": False,
    "service_tier": "auto",
    "reasoning_effort": "low",
    "min_p": 0,
}


def test_fields_that_ask_for_nothing_are_ignored(server: RunningServer) -> None:
    found = server.ask("Hello", max_tokens=1, **HARMLESS)
    assert found.status == 200, found.body
    assert found.headers.get("x-ignored-fields") == "tool_calls"  # it belongs to messages


def test_the_guided_fields_name_what_to_use(server: RunningServer) -> None:
    for name in ("guided_json", "guided_regex", "guided_choice", "grammar"):
        assert "structured_outputs" in server.ask("x", **{name: "y"}).error["message"]


def test_another_model_is_not_found(server: RunningServer) -> None:
    found = server.ask("x", model="gpt-4o")
    assert (found.status, found.error["code"], found.error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/embeddings", "/x", "/v1/", "/page.html"])
def test_other_paths_are_not_found(server: RunningServer, path: str) -> None:
    for found in (server.get(path), server.post({}, path)):
        assert found.status == 404
        assert found.error["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("POST", "/livez"), ("PUT", "/tokenize")]
)
def test_other_methods_are_not_allowed(server: RunningServer, method: str, path: str) -> None:
    found = server.request(method, path, headers={"Content-Length": "0"})
    assert found.status == 405
    assert found.error["code"] == "method_not_allowed"
    assert found.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"\xff",
        b'{"messages": [], "messages": []}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b"nul",
    ],
)
def test_a_body_that_is_no_json_object_is_one_line(server: RunningServer, body: bytes) -> None:
    found = server.post(body)
    assert (found.status, found.error["code"]) == (400, "invalid_json")


def test_strict_fields_are_refused(bundle: Any) -> None:
    with running(bundle, strict_fields=True) as strict:
        found = strict.ask("x", zoom=1)
        assert (found.status, found.error["param"], found.error["code"]) == (400, "zoom", "unknown_parameter")
        nested = strict.post({"messages": [{"role": "user", "content": "x", "zoom": 1}]})
        assert nested.error["param"] == "messages.zoom"
        assert strict.ask("x", max_tokens=1, user="me").status == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(sorted(BY_NAME)) | st.sampled_from(["role", "content", "type", "text", "image_url", "url"])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values},
        optional={
            "content": json_values
            | st.lists(
                st.dictionaries(names, json_values | st.sampled_from(["text", "image_url"]), max_size=3), max_size=3
            )
        },
    ),
    max_size=3,
)


@settings(max_examples=600)
@given(st.dictionaries(names, json_values, max_size=5), messages | json_values)
def test_any_values_are_read_or_refused_with_a_line(fields: dict[str, Any], asked: Any) -> None:
    refusal = None
    try:
        read_chat(json.loads(json.dumps({**fields, "messages": asked})), Settings("demo"), 12)
    except ApiError as error:
        refusal = error
    assert refusal is None or (refusal.status in (400, 404) and "\n" not in str(refusal))


def test_the_documented_table_is_the_one_that_checks() -> None:
    text = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")
    for field in FIELDS:
        assert f"`{field.name}`" in text, field.name
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert listed == {field.name for field in FIELDS if field.use == "used"}
