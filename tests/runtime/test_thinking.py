"""Thinking: its system text, what it excludes, and answers told apart from it, whole or in pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge import Conversation, InternVL, export_bundle
from internvl_edge.base.errors import PromptError
from internvl_edge.demo import CHECKPOINT
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.options import checked_options
from internvl_edge.runtime.reply import Reply
from internvl_edge.runtime.thinking import SYSTEM, split_thinking, told_apart
from internvl_edge.runtime.voting import find_answer

TEXTS = [
    ("<think>\nIt is red.\n</think>\n\nRed", "It is red.", "Red"),
    ("<think>one < two, a</b> and </think", "one < two, a</b> and </think", ""),
    ("<think></think>Red", "", "Red"),
    ("<think>\n\n</think>\n", "", ""),
    (" <think>a</think>b</think>c", "a", "b</think>c"),
    ("Red", None, "Red"),
    ("<thinking>Red", None, "<thinking>Red"),
    ("The tag is <think>a</think>", None, "The tag is <think>a</think>"),
    ("<th", None, "<th"),
    ("", None, ""),
]


def reply(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(text, [1], [1], 0, [], finish_reason, {})


@pytest.mark.parametrize(("text", "thinking", "answer"), TEXTS)
def test_an_answer_is_told_apart_from_its_thinking(text: str, thinking: str | None, answer: str) -> None:
    assert split_thinking(text) == (thinking, answer)
    assert (reply(text).thinking, reply(text).answer) == (thinking, answer)


@given(st.sampled_from([text for text, _, _ in TEXTS]), st.lists(st.integers(0, 40), max_size=8))
def test_pieces_are_told_apart_as_the_whole_is(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    parts = list(told_apart(pieces))
    thinking, answer = split_thinking(text)
    assert "".join(piece for is_thinking, piece in parts if is_thinking) == (thinking or "")
    assert "".join(piece for is_thinking, piece in parts if not is_thinking) == answer


def test_a_piece_is_held_back_only_where_a_tag_may_begin() -> None:
    seen: list[str] = []

    def pieces() -> Any:
        for piece in ("<think>", "I see", " red", ".\n</th", "ink>\n", "R", "ed"):
            yield piece
            seen.append(f"asked after {piece!r}")

    for is_thinking, piece in told_apart(pieces()):
        seen.append(f"{'thought' if is_thinking else 'answer'} {piece!r}")
    assert seen.index("thought 'I see'") < seen.index("asked after 'I see'")
    assert seen.index("thought ' red'") < seen.index("asked after ' red'")
    assert seen.index("answer 'R'") < seen.index("asked after 'R'")


def test_think_stands_for_a_system_text_and_a_temperature() -> None:
    assert checked_options({"think": True, "seed": 1}) == {"temperature": 0.6, "seed": 1, "system": SYSTEM}
    assert checked_options({"think": True, "temperature": 0})["temperature"] == 0
    assert checked_options({"think": False, "system": "a"}) == {"system": "a"}
    with pytest.raises(PromptError, match="leave out system"):
        checked_options({"think": True, "system": ""})
    with pytest.raises(PromptError, match="leave out the form"):
        checked_options({"think": True, "answer_format": AnswerFormat.regex("a")})


def test_the_system_text_is_that_of_the_oracle(small_oracle: Path) -> None:
    golden = json.loads((small_oracle / "families" / "internvl3_5-qwen3-tiny" / "golden.json").read_text())
    (case,) = (case for case in golden["cases"] if case["id"] == "system_message")
    assert case["system"] == SYSTEM


def test_a_model_and_a_conversation_think(tmp_path: Path) -> None:
    with InternVL.load(export_bundle(CHECKPOINT, tmp_path / "bundle"), context=2048, threads=1) as model:
        expected = model.chat("Hello", system=SYSTEM, max_new_tokens=4)
        assert model.chat("Hello", think=True, temperature=0, max_new_tokens=4).output_ids == expected.output_ids
        conversation = Conversation(model, think=True, temperature=0, max_new_tokens=4)
        assert conversation.ask("Hello").prompt_ids == expected.prompt_ids
        sampled = model.chat("Hello", system=SYSTEM, temperature=0.6, seed=3, max_new_tokens=4)
        assert model.chat("Hello", think=True, seed=3, max_new_tokens=4).output_ids == sampled.output_ids


def test_votes_count_the_answers_behind_the_thinking() -> None:
    assert find_answer(reply("<think>Answer: 4</think>\n5"), reason=False) == "5"
    assert find_answer(reply("<think>Answer: 4</think>\nFinal answer: 5"), reason=True) == "5"
    assert find_answer(reply("<think>Answer: 4", "length"), reason=False) is None
