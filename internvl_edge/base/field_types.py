"""Check the values that a user's own Python code gives to this project: the fields of dataclasses, and arguments."""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from typing import Any

from .errors import EdgeError
from .text import shown


def require_types(value: Any) -> None:
    """Raise EdgeError for the first field of a dataclass that is not of the type of its annotation.

    A list counts as a tuple, and a whole number as a float.
    """
    kinds = typing.get_type_hints(type(value))
    for field in fields(value):
        found = getattr(value, field.name)
        if not _fits(kinds[field.name], found):
            raise EdgeError(f"{field.name} is {shown(found)}, expected {field.type}")


def require_type(name: str, value: object, kind: type[Any], advice: str) -> None:
    """Raise EdgeError where an argument is not of a type; the advice says how to make one."""
    if not isinstance(value, kind):
        raise EdgeError(f"{name} is {shown(value)}, expected a {kind.__name__}: {advice}")


def _fits(kind: Any, value: object) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(part, value) for part in arguments)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
