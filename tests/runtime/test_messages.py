"""Messages become a question: turns, places of images, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from internvl_edge.base.errors import PromptError
from internvl_edge.model.prompt import IMAGE
from internvl_edge.runtime.messages import Message, Picture, question_from

A, B, C = (Picture(name.encode(), tiles) for name, tiles in (("a", None), ("b", 1), ("c", 6)))


def user(*parts: Any) -> Message:
    return Message("user", parts)


def assistant(text: str) -> Message:
    return Message("assistant", [text])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["Hello"], "Hello"),
        (["One", "two"], "One\ntwo"),
        ([A, "What?"], [IMAGE, "\n", "What?"]),
        (["What?", A], [IMAGE, "\n", "What?"]),
        ([A, B, "What?"], ["Image-1: ", IMAGE, "\n", "Image-2: ", IMAGE, "\n", "What?"]),
        (["One", "two", A, B], ["Image-1: ", IMAGE, "\n", "Image-2: ", IMAGE, "\n", "One\ntwo"]),
        (["One", A, "two"], ["One", "\n", IMAGE, "\n", "two"]),
        ([A, "between", B], [IMAGE, "\n", "between", "\n", IMAGE]),
        ([A, "one", B, "two"], [IMAGE, "\n", "one", "\n", IMAGE, "\n", "two"]),
    ],
)
def test_where_images_stand(parts: list[Any], expected: Any) -> None:
    asked = question_from([user(*parts)])
    assert asked.question == expected
    assert asked.images == [part.source for part in parts if isinstance(part, Picture)]
    assert asked.options["plain_text"] is True


def test_a_conversation_keeps_its_turns_images_and_limits() -> None:
    asked = question_from(
        [
            Message("system", ["Be", "short."]),
            user(A, "First?"),
            assistant("One."),
            user("Second?"),
            assistant("Two."),
            user("Third?", B, C),
        ]
    )
    assert asked.options == {
        "history": [([IMAGE, "\n", "First?"], "One."), ("Second?", "Two.")],
        "plain_text": True,
        "system": "Be\nshort.",
        "max_tiles": [None, 1, 6],
    }
    assert asked.question == ["Image-2: ", IMAGE, "\n", "Image-3: ", IMAGE, "\n", "Third?"]
    assert asked.images == [b"a", b"b", b"c"]


def test_messages_of_one_side_in_a_row_are_one_turn() -> None:
    asked = question_from([user("a"), user(A), assistant("b"), assistant("c"), user("d"), user("e")])
    assert asked.question == "d\ne"
    assert asked.options["history"] == [([IMAGE, "\n", "a"], "b\nc")]


def test_an_empty_system_text_is_not_the_checkpoints() -> None:
    assert question_from([Message("system", [""]), user("a")]).options["system"] == ""
    assert "system" not in question_from([user("a")]).options


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "not the user's"),
        ([assistant("a")], "comes before any"),
        ([assistant("a"), user("b")], "comes before any"),
        ([user("a"), assistant("b")], "not the user's"),
        ([Message("system", ["a"])], "not the user's"),
        ([user("a"), Message("system", ["b"]), user("c")], "message 1 is a system message"),
        ([Message("system", [A]), user("c")], "message 0 is the system's and has an image"),
        ([user("a"), Message("assistant", [A]), user("c")], "message 1 is the assistant's and has an image"),
    ],
)
def test_other_orders_are_refused(messages: list[Message], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        question_from(messages)
