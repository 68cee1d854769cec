"""`internvl-edge run --votes`: the answer on standard output, the count beside it, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.commands import assert_one_line, internvl_edge
from internvl_edge import export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("votes") / "bundle")


def test_the_answer_of_the_majority_is_printed(bundle: Path) -> None:
    asked = demo_questions()[0]
    done = internvl_edge("run", bundle, asked.question, "--image", asked.image, "--votes", 4, "--seed", 1, "--quiet")
    assert done.stdout == f"{asked.expected}\n"
    assert done.stderr == "3 of 3 replies agree\n"


def test_json_holds_every_reply(bundle: Path) -> None:
    asked = demo_questions()[1]
    options = ("--votes", 3, "--seed", 1, "--json", "--temperature", 0, "--quiet")
    found = json.loads(internvl_edge("run", bundle, asked.question, "--image", asked.image, *options).stdout)
    assert (found["answer"], found["agreement"], found["counts"]) == (asked.expected, 1.0, {asked.expected: 2})
    assert [reply["text"] for reply in found["replies"]] == [asked.expected] * 2
    assert found["stopped_early"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sure", 0.9), "--sure is for votes"),
        (("--votes", 3, "--sure", 0.2), "sure is 0.2, expected above 0.5"),
        (("--reason", "--regex", "[0-9]+"), "--reason asks for free text first"),
        (("--votes", 2, "--choice", "a", "--choice", "A"), "expected two or more that differ"),
    ],
)
def test_what_does_not_go_together_is_one_line(bundle: Path, options: tuple[object, ...], message: str) -> None:
    assert_one_line(internvl_edge("run", bundle, "What is it?", *options, "--quiet"), message)
