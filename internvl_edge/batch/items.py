"""One question of a batch (`Item`), and how it is asked (`Ask`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from internvl_edge.base.errors import PromptError
from internvl_edge.model.preprocess import ImageSource
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.options import checked_options, whole_number
from internvl_edge.runtime.voting import MOST_VOTES, checked_choices

# Options of a question that an item may have.
ROW_OPTIONS = (
    *("system", "max_tiles", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty", "seed", "stop", "speculate", "exif", "background", "plain_text"),
    *("keep_special", "answer_start", "think"),
)


@dataclass(frozen=True)
class Ask:
    """How items are asked, as far as a row of a table says nothing else.

    Attributes:
        prompt: the question; None where every row has its own.
        answer_format: the form of the answers, except choices.
        choices: the possible answers.
        votes, sure, reason: see `InternVL.vote`; without votes each item has one answer.
        options: options of `ChatOptions` that are given, by the names in `ROW_OPTIONS`.
    """

    prompt: str | None = None
    answer_format: AnswerFormat | None = None
    choices: tuple[str, ...] | None = None
    votes: int | None = None
    sure: float | None = None
    reason: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> AnswerFormat | None:
        """The form of an answer, choices included."""
        return AnswerFormat.choice(self.choices) if self.choices else self.answer_format

    @property
    def is_vote(self) -> bool:
        """Whether `InternVL.vote` answers."""
        return self.votes is not None or (self.reason and self.choices is not None)

    def checked(self) -> Ask:
        """Return this with checked options.

        Raises:
            PromptError: something in it is no such value, or does not go together.
        """
        if self.prompt is not None and not self.prompt.strip():
            raise PromptError("the prompt is empty; ask something")
        if self.votes is not None and not 1 <= whole_number("votes", self.votes) <= MOST_VOTES:
            raise PromptError(f"votes is {self.votes}, expected 1 to {MOST_VOTES}")
        if self.sure is not None and self.votes is None:
            raise PromptError("sure is for votes; give votes too, or leave it out")
        if self.sure is not None and not 0.5 < self.sure <= 1:
            raise PromptError(f"sure is {self.sure}, expected above 0.5 and at most 1")
        if self.choices is not None and self.answer_format is not None:
            raise PromptError("choices and another form of the answer cannot be combined; give one")
        if self.is_vote:
            checked_choices(self.choices)
        if self.reason and self.answer_format is not None:
            raise PromptError("reason asks for free text first; leave it out, or give choices for the form of the end")
        if self.form is not None and "answer_start" in self.options:
            raise PromptError("answer_start and a form of the answer cannot be combined; give one")
        return replace(self, options=checked_options(self.options))

    def described(self) -> dict[str, Any]:
        """Return everything in it as values of JSON, for records: equal ones ask the same."""
        form = self.form
        return {
            "prompt": self.prompt,
            "form": form and {"kind": form.kind, "text": form.text, "compact": form.compact},
            "votes": self.votes,
            "sure": self.sure,
            "reason": self.reason,
            "options": {name: self.options[name] for name in sorted(self.options)},
        }


@dataclass(frozen=True)
class Item:
    """One question of a batch. Its answer is one row of the output.

    Attributes:
        id: unique in its batch.
        place: where it stands, for messages: "line 3", or the name of a file.
        ask: how it is asked; its prompt is never None.
        images: one for each `<image>` mark of the prompt; without marks they go in front of it.
        names: what the input calls the images, as part of `request`.
        kept: columns of its row that go into the output as they are.
    """

    id: str
    place: str
    ask: Ask
    images: tuple[ImageSource, ...] = ()
    names: tuple[str, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> str:
        """A digest of all that is asked: two items with the same one ask the same."""
        text = json.dumps([self.ask.described(), self.names], ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def grouped(items: Iterable[Item]) -> list[Item]:
    """Return items with those about the same images behind each other, so that they share a prompt's beginning."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.names or (f"\0{item.id}",), []).append(item)
    return [item for group in groups.values() for item in group]
