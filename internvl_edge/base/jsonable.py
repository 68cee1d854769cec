"""Frozen dataclasses as JSON values and back, by their annotations. Values that are no numbers become null."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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


def decode(kind: type[T], value: Any) -> T:
    """The dataclass that `encode` made JSON values of; entries that this version does not know are passed over.

    Raises:
        ValueError, TypeError, KeyError: the values are not of this form.
    """
    decoded: T = _decode(kind, value)
    return decoded


def _decode(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode(next(part for part in arguments if part is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"a list was expected, not {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(part, item) for part, item in zip(kinds, value, strict=True))
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _decode(hint, value[name]) for name, hint in hints.items() if name in value})  # type: ignore[operator]
    if kind is float:
        return math.nan if value is None else float(value)
    if kind is not Any and not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} was expected, not {value!r}")
    return value
