"""Frozen dataclasses as JSON and back, by their annotations: the one codec of everything that this project stores.

Figures that are no numbers (NaN, infinity) are null in JSON and NaN when they are read. Reading checks types, names the
place of a mistake, and passes over entries that this version does not know.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_WIDTH = 120
_INDENT = "  "


def encode(value: Any) -> Any:
    """A dataclass, and what it holds, as JSON values."""
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
    """A dataclass, or values, as the text of a JSON file: what fits on a line of 120 characters stands on one."""
    return _text(encode(value), "") + "\n"


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """The dataclass that `encode` made JSON values of.

    Args:
        kind: the class, or any annotation that `encode` can write.
        value: JSON values.
        where: what `value` is called in messages.

    Raises:
        ValueError: the values are not of this form; the place is named.
    """
    decoded: T = _decode(kind, value, where)
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
    """Whether containers stand inside, which read better one to a line."""
    items = value.values() if isinstance(value, dict) else value
    return any(isinstance(item, (dict, list)) and item for item in items)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode(_without_none(arguments), value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if kind is float:
        return _number(value, where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{_place(where)} is {value!r}, expected {kind.__name__}")
    return value


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    values, hints = _object(value, where), typing.get_type_hints(kind)
    given = {name: _decode(hint, values[name], f"{where}.{name}") for name, hint in hints.items() if name in values}
    try:
        return kind(**given)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{_place(where)}: {error}") from None


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{_place(where)} is {value!r}, expected a list")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"{_place(where)} has {len(value)} entries, expected {len(kinds)}")
    return tuple(_decode(part, item, f"{where}[{n}]") for n, (part, item) in enumerate(zip(kinds, value, strict=True)))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_place(where)} is {value!r}, expected an object")
    return value


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_place(where)} is {value!r}, expected a number")
    return float(value)


def _without_none(arguments: tuple[Any, ...]) -> Any:
    return next(part for part in arguments if part is not type(None))


def _place(where: str) -> str:
    return where.lstrip(".") or "the value"
