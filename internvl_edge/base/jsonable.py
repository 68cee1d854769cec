"""Convert frozen dataclasses to JSON and back, by their annotations. All stored data of this project uses this module.

NaN and infinity are null in JSON, and null is read as NaN. Reading checks types, and an error names the place.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from .text import shown

T = TypeVar("T")

_WIDTH = 120
_INDENT = "  "


def encode(value: Any) -> Any:
    """Return a dataclass, and everything in it, as JSON values."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(value: Any) -> str:
    """Return a dataclass, or JSON values, as the text of a JSON file.

    A value that fits a line of 120 characters is on one line, unless it contains other non-empty objects or lists.
    """
    return _text(encode(value), "") + "\n"


def decode(kind: type[T], value: Any, *, strict: bool = False) -> T:
    """Return the dataclass that these JSON values encode.

    Args:
        kind: the dataclass.
        value: JSON values.
        strict: whether an entry that this version does not know is an error. Otherwise it is ignored.

    Raises:
        ValueError: the values do not fit the class; the message names the place.
    """
    decoded: T = _Decoder(strict).decode(kind, value, "")
    return decoded


def _text(value: Any, indent: str) -> str:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or (len(indent) + len(line) <= _WIDTH and not _holds_rows(value)):
        return line
    inner = indent + _INDENT
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
    else:
        rows = [inner + _text(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(rows) + f"\n{indent}{closing}"


def _holds_rows(value: dict[str, Any] | list[Any]) -> bool:
    """Return whether a value contains non-empty objects or lists. These are easier to read with one per line."""
    items = value.values() if isinstance(value, dict) else value
    return any(isinstance(item, (dict, list)) and item for item in items)


class _Decoder:
    """Decodes values by annotations. `where` is the place in the JSON values, for error messages."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def decode(self, kind: Any, value: Any, where: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if origin in (types.UnionType, typing.Union):
            some = next(part for part in arguments if part is not type(None))
            return None if value is None else self.decode(some, value, where)
        if origin is tuple:
            return self._tuple(arguments, value, where)
        if origin is list:
            return list(self._tuple((arguments[0], Ellipsis), value, where))
        if origin is dict:
            items = _object(value, where).items()
            return {key: self.decode(arguments[1], item, f"{where}.{key}") for key, item in items}
        if is_dataclass(kind):
            return self._fields(kind, _object(value, where), where)
        if kind is float:
            return _number(value, where)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{_place(where)} is {shown(value)}, expected {kind.__name__}")
        return value

    def _fields(self, kind: Any, values: dict[str, Any], where: str) -> Any:
        hints = _hints(kind)
        if self._strict and (unknown := sorted(values.keys() - hints.keys())):
            raise ValueError(f"{_place(f'{where}.{unknown[0]}')} is not known")
        required = {field.name for field in fields(kind) if _has_no_default(field)}
        if missing := sorted(required - values.keys()):
            raise ValueError(f"{_place(f'{where}.{missing[0]}')} is missing")
        return kind(
            **{name: self.decode(hints[name], values[name], f"{where}.{name}") for name in hints if name in values}
        )

    def _tuple(self, arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{_place(where)} is {shown(value)}, expected a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError(f"{_place(where)} has {len(value)} entries, expected {len(kinds)}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(self.decode(part, item, f"{where}[{index}]") for index, (part, item) in pairs)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_place(where)} is {shown(value)}, expected an object")
    return value


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_place(where)} is {shown(value)}, expected a number")
    return float(value)


def _place(where: str) -> str:
    return where.lstrip(".") or "the value"
