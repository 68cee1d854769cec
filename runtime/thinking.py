"""Thinking before the answer: the system text that asks for it, and telling the two apart in what comes.

InternVL3.5 was trained to think between `<think>` and `</think>` where this system text asks for it, and to answer
after that. Source: `R1_SYSTEM_PROMPT` of the original code and of the model cards, which sample with temperature 0.6.
This module knows texts, not tokens: the tags need not be tokens of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from internvl_edge.base.errors import PromptError

OPENING, CLOSING = "<think>", "</think>"
SYSTEM = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason "
    f"through the problem step-by-step. Enclose this entire thinking process within {OPENING} and {CLOSING} tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the "
    "answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final answer should be "
    "standalone and not reference the thinking section."
)
# Greedy thinking tends to repeat itself without an end.
TEMPERATURE = 0.6


def thinking_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which `think` has become the system text and the temperature that stand for it.

    Raises:
        PromptError: options that thinking excludes.
    """
    others = {name: value for name, value in options.items() if name != "think"}
    if not options.get("think"):
        return others
    if "system" in others:
        raise PromptError("think is a system text of its own; leave out system, or write both into one system text")
    if "answer_format" in others:
        raise PromptError("think asks for free text before the answer; leave out the form of the answer, or think")
    return {"temperature": TEMPERATURE} | others | {"system": SYSTEM}


def told_apart(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield pieces of an answer as (whether it is thinking, text); all of one kind joined are as in `split_thinking`.

    A piece is held back only as long as it may be the beginning of a tag, or blanks before one.
    """
    text, thinking, answer = "", "", ""
    for piece, is_last in _with_end(pieces):
        text += piece
        thought, answered = _split(text, is_last)
        if new := (thought or "")[len(thinking) :]:
            yield True, new
        if new := answered[len(answer) :]:
            yield False, new
        thinking, answer = thought or "", answered


def split_thinking(text: str) -> tuple[str | None, str]:
    """Return the thinking of a whole answer and what follows it, without the tags and the blanks around them.

    There is no thinking (None) where the first thing is not `<think>`, and no answer where `</think>` never comes.
    """
    return _split(text, is_whole=True)


def _split(text: str, is_whole: bool) -> tuple[str | None, str]:
    begun = text.lstrip()
    if not begun.startswith(OPENING):
        is_undecided = not is_whole and OPENING.startswith(begun)
        return None, "" if is_undecided else text
    thinking, closing, answer = begun.removeprefix(OPENING).partition(CLOSING)
    if not closing and not is_whole:
        held = max((n for n in range(1, len(CLOSING)) if thinking.endswith(CLOSING[:n])), default=0)
        thinking = thinking[: len(thinking) - held]
    return thinking.strip(), answer.lstrip()


def _with_end(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield (piece, False) for each piece, and ("", True) after them."""
    for piece in pieces:
        yield piece, False
    yield "", True
