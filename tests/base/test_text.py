"""Messages are one line of bounded length, whatever they echo; names of files are names."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.base.errors import CheckpointError, EdgeError
from internvl_edge.base.text import MESSAGE_LENGTH, is_plain_name, one_line, shown
from internvl_edge.base.toml import parse


@given(st.text(alphabet=st.characters(codec=None), max_size=2000))
def test_a_message_is_one_line_that_can_be_printed(text: str) -> None:
    message = str(EdgeError(text))
    assert len(message) <= MESSAGE_LENGTH
    assert len(message.splitlines()) <= 1
    message.encode()


def test_beginning_and_end_of_a_long_message_stay() -> None:
    message = str(CheckpointError(f"model.json: name is {'x' * 10_000_000}; download it again"))
    assert message.startswith("model.json: name is xxx")
    assert message.endswith("xxx; download it again")
    assert str(CheckpointError("short 图\u3000 message")) == "short 图\u3000 message"
    assert str(pickle.loads(pickle.dumps(CheckpointError("a\nb")))) == "a\\nb"


def test_what_breaks_lines_and_terminals_is_escaped() -> None:
    assert one_line("a\nb\r\u2028\x1b[1m\udcff\u202e") == "a\\nb\\r\\u2028\\x1b[1m\\udcff\\u202e"


def test_values_are_shown_shortened() -> None:
    assert shown("8") == "'8'"
    assert len(shown([1] * 10_000)) == 80
    assert shown(10**5000) == "a int too large to show"


@pytest.mark.parametrize("name", ["rtx", "orin-nano-8gb", "my_board.2", "8.7", "A" * 100])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/a",
        ".hidden",
        "-force",
        "a b",
        "a\n",
        "\u00e9",
        "a\0",
        "A" * 101,
        None,
        3,
    ],
)
def test_paths_and_other_things_are_no_plain_names(name: object) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = inf", "a is inf"),
        ("[t]\nb = [1.0, -nan]", "t.b is nan"),
        ("a = " + "9" * 400, "a is an integer beyond all limits"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("a = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_toml_holds_finite_numbers(text: str, message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse(text, "x.toml", CheckpointError)
    assert str(raised.value).startswith("x.toml")
    assert message in str(raised.value)
