"""`run --think`: the answer alone on standard output, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import internvl_edge
from internvl_edge.base.errors import PromptError
from internvl_edge.cli import run
from internvl_edge.runtime.reply import Reply


class Stream:
    """A finished answer in pieces."""

    def __init__(self, pieces: list[str], finish_reason: str = "stop") -> None:
        self.pieces, self.reply = pieces, Reply("".join(pieces), [1], [1], 0, [], finish_reason, {})

    def __iter__(self) -> Any:
        return iter(self.pieces)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_command_prints_the_answer_alone_on_standard_output(
    capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    stream: Any = Stream(["<think>\nI see", " red.\n</thi", "nk>\n\nRe", "d"])
    run._print_answer(stream, [], think=True, quiet=quiet)
    printed = capsys.readouterr()
    assert printed.out == "Red\n"
    assert printed.err == ("" if quiet else "I see red.\n")


def test_thinking_without_an_end_is_a_mistake_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    stream: Any = Stream(["<think>I see"], "length")
    with pytest.raises(PromptError, match="raise --max-new-tokens"):
        run._print_answer(stream, [], think=True, quiet=False)
    assert capsys.readouterr().out == ""


def test_the_command_asks_for_thinking(bundle: Path) -> None:
    asked = ("run", bundle, "Hello", "--json", "--max-new-tokens", "3")
    thinking, plain = (json.loads(internvl_edge(*asked, *more).stdout) for more in (("--think",), ()))
    assert thinking["prompt_tokens"] > plain["prompt_tokens"] + 100
    assert (thinking["thinking"], thinking["answer"]) == (None, thinking["text"])
    assert "thinking" not in plain
    voted = json.loads(internvl_edge(*asked, "--think", "--votes", "2").stdout)
    assert voted["replies"][0]["prompt_tokens"] == thinking["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--system", "Be brief."), "leave out system"),
        (("--reason",), "--reason and --think both ask for reasoning"),
        (("--choice", "a", "--choice", "b"), "leave out the form of the answer"),
    ],
)
def test_what_thinking_excludes_is_one_line(bundle: Path, options: tuple[str, ...], message: str) -> None:
    made = internvl_edge("run", bundle, "Hello", "--think", "--quiet", *options)
    assert made.returncode == 2
    assert message in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
