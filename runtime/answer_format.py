"""The form that an answer must have: a JSON schema, a regular expression, one of some choices, or any JSON object.

This module checks a form and bounds a schema. `grammar` makes it a rule for tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from internvl_edge.base.errors import PromptError
from internvl_edge.base.json_files import parse
from internvl_edge.base.text import shown

from .schema_bounds import bounded

Kind = Literal["json_schema", "regex", "choice"]

# A schema is compiled before any work starts, so its size and its depth are bounded. A regular expression is too.
MOST_BYTES = 64 << 10
_MOST_DEPTH = 64
_MOST_CHOICES = 1000


@dataclass(frozen=True)
class AnswerFormat:
    """The form of an answer. Make one with `json_schema`, `json_object`, `regex` or `choice`.

    Attributes:
        kind: what `text` is.
        text: a JSON schema with the bounds of `schema_bounds`, a regular expression, or a JSON list of texts.
        compact: JSON without whitespace between its parts. Otherwise there is at most one newline and eight spaces.
    """

    kind: Kind
    text: str
    compact: bool = False

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any], compact: bool = False) -> AnswerFormat:
        """Return the form of JSON that a schema (a JSON text, or its values) describes.

        Raises:
            PromptError: it is no schema, is larger than 64 KB, or has more than 64 objects and lists inside each other.
        """
        values = _values(schema)
        try:
            text = json.dumps(bounded(values), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"the JSON schema is no JSON ({error}); give a schema of JSON's own types") from None
        return cls("json_schema", text, compact)

    @classmethod
    def json_object(cls, compact: bool = False) -> AnswerFormat:
        """Return the form of any JSON object, within the bounds of `schema_bounds`."""
        return cls.json_schema({"type": "object"}, compact)

    @classmethod
    def regex(cls, pattern: str) -> AnswerFormat:
        """Return the form of texts that match a regular expression as a whole.

        The syntax is that of Rust's `regex`, without look-around and word boundaries.

        Raises:
            PromptError: it is no text, or has more than 64 KB. Its syntax is checked when it is compiled.
        """
        if not isinstance(pattern, str):
            raise PromptError(f"the regular expression is {shown(pattern)}, expected a text")
        _check_size("the regular expression", pattern)
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Iterable[str]) -> AnswerFormat:
        """Return the form of one of these texts, and nothing else.

        Raises:
            PromptError: there is none, or one is empty or has whitespace at an end, which answers never have.
        """
        if isinstance(choices, (str, bytes, Mapping)) or not hasattr(choices, "__iter__"):
            raise PromptError(f"the choices are {shown(choices)}, expected a list of texts")
        texts = list(choices)
        for text in texts:
            if not isinstance(text, str) or not text or text != text.strip():
                raise PromptError(
                    f"a choice is {shown(text)}, expected a text that is not empty and has no space at its ends"
                )
        texts = list(dict.fromkeys(texts))
        if not 0 < len(texts) <= _MOST_CHOICES:
            raise PromptError(f"there are {len(texts)} choices, expected 1 to {_MOST_CHOICES}")
        encoded = json.dumps(texts, ensure_ascii=False)
        _check_size("the choices", encoded)
        return cls("choice", encoded)


def _values(schema: Any) -> dict[str, Any] | bool:
    """The values of a schema, read strictly, from its text or through it."""
    if not isinstance(schema, str):
        try:
            schema = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"the JSON schema is no JSON ({error}); give a schema of JSON's own types") from None
    _check_size("the JSON schema", schema)
    try:
        values = parse(schema)
    except ValueError as error:
        raise PromptError(f"the JSON schema is not valid JSON ({error})") from None
    if not isinstance(values, (dict, bool)):
        raise PromptError(f"the JSON schema is a {type(values).__name__}, expected an object")
    if (depth := _depth(values)) > _MOST_DEPTH:
        raise PromptError(
            f"the JSON schema has {depth} objects and lists inside each other, expected at most {_MOST_DEPTH}; "
            'move parts to "$defs"'
        )
    return values


def _check_size(what: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PromptError(f"{what} holds half of a surrogate pair, which is no character; remove it") from None
    if size > MOST_BYTES:
        raise PromptError(f"{what} has {size} bytes, expected at most {MOST_BYTES}; make it smaller")


def _depth(values: Any) -> int:
    if isinstance(values, dict):
        return 1 + max(map(_depth, values.values()), default=0)
    return 1 + max(map(_depth, values), default=0) if isinstance(values, list) else 0
