"""One row of a batch's output, and how an item becomes one: the question is asked, and what goes wrong is its error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.json_files import parse
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.reply import Reply
from internvl_edge.runtime.voting import reasoning_question

from .items import Item

SECONDS = ("preprocess_s", "waiting_s", "vision_s", "prefill_s", "decode_s")


@dataclass(frozen=True)
class Row:
    """The answer to one item, or why there is none.

    Attributes:
        id: the item's.
        answer: the text; the one that most replies give, where there were votes. None where there is none.
        json: the values of the answer, where a JSON schema was asked for.
        finish_reason: "stop", or "length" where `max_new_tokens` ended the answer; of the first reply.
        agreement: share of the replies that gave the answer; None without votes.
        replies: how many replies were counted.
        prompt_tokens, image_tokens: of the prompt.
        output_tokens: of all replies.
        tiles: of each image.
        timings: seconds of the first reply, as in `Reply.timings`. Rows that are computed together share their time.
        error: one line; None where there is an answer.
        request: a digest of what was asked (see `Item.request`).
        kept: columns of the item's table that were asked to be kept.
    """

    id: str
    answer: str | None = None
    json: Any = None
    finish_reason: str | None = None
    agreement: float | None = None
    replies: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    tiles: Sequence[int] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    request: str = ""
    kept: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the object of this row in the output. What is kept follows the fields."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {**values, "tiles": list(self.tiles), "timings": dict(self.timings), **self.kept}


FIELDS = tuple(each.name for each in dataclasses.fields(Row) if each.name != "kept")


def answer(model: InternVL, item: Item) -> Row:
    """Ask a model one item.

    Raises:
        EngineError: the engine failed, or the model is closed: no error of this item alone.
    """
    try:
        row = _voted(model, item) if item.ask.is_vote else _asked(model, item)
    except EngineError:
        raise
    except EdgeError as error:
        row = Row(item.id, error=str(error))
    return dataclasses.replace(row, request=item.request, kept=item.kept)


def _asked(model: InternVL, item: Item) -> Row:
    ask = item.ask
    assert ask.prompt is not None
    question = reasoning_question(ask.prompt) if ask.reason else ask.prompt
    reply = model.chat(question, list(item.images), answer_format=ask.form, **ask.options)
    return _row(item, reply.answer if ask.options.get("think") else reply.text, [reply])


def _voted(model: InternVL, item: Item) -> Row:
    ask = item.ask
    assert ask.prompt is not None
    form: dict[str, Any] = {} if ask.answer_format is None else {"answer_format": ask.answer_format}
    voting: dict[str, Any] = {"votes": ask.votes or 1, "reason": ask.reason, "choices": ask.choices, "sure": ask.sure}
    vote = model.vote(ask.prompt, list(item.images), **voting, **form, **ask.options)
    row = _row(item, vote.answer, vote.replies)
    if vote.answer is None:
        row = dataclasses.replace(
            row, error=f"none of {len(vote.replies)} replies holds an answer; raise max_new_tokens"
        )
    return dataclasses.replace(row, agreement=round(vote.agreement, 4))


def _row(item: Item, text: str | None, replies: Sequence[Reply]) -> Row:
    first = replies[0]
    values, error = None, None
    if text is not None and item.ask.answer_format is not None and item.ask.answer_format.kind == "json_schema":
        try:
            values = parse(text)
        except ValueError as refusal:
            ended = "ended by max_new_tokens; raise it" if first.finish_reason == "length" else str(refusal)
            error = f"the answer is no complete JSON: {ended}"
    return Row(
        id=item.id,
        answer=text,
        json=values,
        finish_reason=first.finish_reason,
        replies=len(replies),
        prompt_tokens=len(first.prompt_ids),
        image_tokens=first.image_tokens,
        output_tokens=sum(len(reply.output_ids) for reply in replies),
        tiles=first.tiles,
        timings={name: first.timings[name] for name in SECONDS},
        error=error,
    )
