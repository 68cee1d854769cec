"""Options of a question: unknown names, wrong types, None and numpy's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from internvl_edge.base.errors import PromptError
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.options import ChatOptions, checked_options


def test_every_option_that_is_documented_is_checked() -> None:
    given = {
        "max_tiles": 3,
        "history": [("a", "b")],
        "system": "",
        "max_new_tokens": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "answer_start": "It is",
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {7: -100.0},
        "seed": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "answer_format": AnswerFormat.regex("a"),
        "stop": ("x",),
        "speculate": True,
        "exif": False,
        "background": "white",
        "keep_special": True,
        "plain_text": True,
    }
    assert set(given) | {"think"} == set(ChatOptions.__annotations__)
    assert checked_options(given) == given
    assert checked_options(dict.fromkeys(given)) == {}


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("enable_thinking", "did you mean think?"),
        ("max_tokens", "did you mean max_new_tokens?"),
        ("image", r"did you mean images=\[...\]?"),
        ("generation_config", "max_new_tokens="),
        ("do_sample", "temperature: 0 is greedy"),
        ("num_patches_list", "one list for each <image> mark"),
        ("guided_json", "answer_format=AnswerFormat.json_schema"),
        ("max_new_token", "did you mean max_new_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("zzz", "options are max_tiles, history"),
    ],
)
def test_unknown_names_are_refused_with_the_right_one(name: str, right: str) -> None:
    with pytest.raises(PromptError, match=f"there is no option '{name}'; .*{right}"):
        checked_options({name: 1})


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.array(3), 3])
def test_whole_numbers_of_numpy_are_numbers(value: Any) -> None:
    checked = checked_options({"max_new_tokens": value, "max_tiles": value})
    assert checked == {"max_new_tokens": 3, "max_tiles": 3}
    assert all(type(number) is int for number in checked.values())
    assert checked_options({"max_tiles": np.array([1, 2])}) == {"max_tiles": [1, 2]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", True),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "12"),
        ("max_tiles", "12"),
        ("max_tiles", [1, "2"]),
        ("max_tiles", {"a": 1}),
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("top_p", float("inf")),
        ("top_p", 10**400),
        ("min_p", "0.1"),
        ("frequency_penalty", float("nan")),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", {1: "2"}),
        ("logit_bias", {1: float("inf")}),
        ("logprobs", 1),
        ("top_logprobs", 2.0),
        ("seed", 1.0),
        ("system", 3),
        ("answer_format", {"type": "object"}),
        ("answer_format", "json"),
        ("stop", [3]),
        ("stop", b"x"),
        ("speculate", 1),
        ("exif", "yes"),
        ("background", 255),
        ("history", "hello"),
        ("history", {"role": "user"}),
        ("history", [{"role": "user", "content": "hi"}]),
        ("history", [("only one",)]),
        ("history", [("a", None)]),
        ("history", ["ab"]),
        ("history", 3),
    ],
)
def test_values_of_another_type_are_one_line_that_names_the_option(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"^{name}:? ") as caught:
        checked_options({name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
