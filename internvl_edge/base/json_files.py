"""JSON that somebody else may have written, read strictly: the one reader for every JSON file and text.

Python's own decoder accepts more than JSON is: the last of two equal names wins, NaN and infinity are numbers, halves
of a surrogate pair are text. It also fails in ways that are no ValueError. Here all of that is one ValueError, and for
files one line of the caller's own kind of error that names the file.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import EdgeError
from .text import one_line, shown

# Most bytes of a file. Tokenizers are large: 11 MB for 150,000 tokens. Everything else is not.
FILE_BYTES = 8 << 20
TOKENIZER_BYTES = 128 << 20
# Most containers inside each other, and most digits of a whole number: every one of those fits a float.
MAX_DEPTH = 127
MAX_DIGITS = 308

# What the decoder may make half of a surrogate pair of.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: not JSON or not UTF-8; a name that stands twice in an object, NaN or infinity, an integer of more
            than `MAX_DIGITS` digits, more than `MAX_DEPTH` containers inside each other, half of a surrogate pair.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8") from None
    try:
        values = _DECODER.decode(text)
    except _NumberError as refusal:
        raise ValueError(f"{_name_of(refusal.literal, text)} is {one_line(refusal.literal, 80)}, {refusal}") from None
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} objects and lists inside each other") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(values)
    if _SURROGATE.search(text):
        _check_surrogates(values)
    return values


def read(path: Path, error: type[EdgeError], advice: str, *, limit: int = FILE_BYTES) -> Any:
    """The values in a JSON file.

    Args:
        path: a regular file.
        error: the kind of error to raise.
        advice: what to do about a file that cannot be read, for the message.
        limit: most bytes of the file.

    Raises:
        EdgeError: of the kind `error`, naming the file: it cannot be read, is larger, or `parse` refuses it.
    """
    data = read_bytes(path, error, advice, limit=limit)
    try:
        return parse(data)
    except ValueError as refusal:
        raise error(f"{path} is not valid JSON ({refusal}); {advice}") from None


def read_object(path: Path, error: type[EdgeError], advice: str, *, limit: int = FILE_BYTES) -> dict[str, Any]:
    """The object in a JSON file; arguments and errors as of `read`."""
    values = read(path, error, advice, limit=limit)
    if not isinstance(values, dict):
        raise error(f"{path} holds a {type(values).__name__}, expected an object; {advice}")
    return values


def read_bytes(path: Path, error: type[EdgeError], advice: str, *, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; errors as of `read`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is no file; {advice}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as refusal:  # a name with a NUL is a ValueError
        raise error(f"{path} cannot be read ({getattr(refusal, 'strerror', None) or refusal}); {advice}") from None
    if len(data) > limit:
        raise error(f"{path} has more than {limit >> 20} MiB, too much for such a file; {advice}")
    return data


class _NumberError(ValueError):
    def __init__(self, literal: str, reason: str) -> None:
        super().__init__(reason)
        self.literal = literal


def _name_of(literal: str, text: str) -> str:
    """The first name in the text that such a number belongs to, alone or in a list."""
    found = re.search(r'"([^"\\]{1,80})"\s*:\s*(?:\[[\s\d.,+eE-]{0,999})?' + re.escape(literal[:400]), text)
    return found[1] if found else "a number"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return values


def _whole(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise _NumberError(digits, f"an integer of more than {MAX_DIGITS} digits")
    return -0.0 if digits == "-0" else int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NumberError(digits, "too large for a float")
    return value


def _constant(name: str) -> Any:
    raise _NumberError(name, "which is no number in JSON")


def _containers(values: Any) -> Iterator[list[Any]]:
    """The members of all objects and lists, level by level; without recursion."""
    level = [values]
    while level := [value for value in level if isinstance(value, dict | list)]:
        members: list[Any] = []
        for container in level:
            members += container.values() if isinstance(container, dict) else container
        yield [*(name for container in level if isinstance(container, dict) for name in container), *members]
        level = members


def _check_depth(values: Any) -> None:
    for depth, _ in enumerate(_containers(values), start=1):
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} objects and lists inside each other")


def _check_surrogates(values: Any) -> None:
    for members in [[values], *_containers(values)]:
        for text in members:
            if isinstance(text, str):
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{shown(text)} holds half of a surrogate pair") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_real, parse_constant=_constant)
