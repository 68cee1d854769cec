"""Text of unknown origin, made fit for a message: on one line, without control characters, of bounded length."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import PurePath
from typing import Any

# Longer than any message of ours; what is echoed in one can be of any length.
MESSAGE_LENGTH = 400
_VALUE_LENGTH = 80
_GAP = " ... "
_FILE_NAME_BYTES = 255
# Of folders and files that are made from a name. A leading dot would hide them, a leading dash is read as an option.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
PLAIN_NAME = "letters, digits, '.', '_' and '-', the first a letter or digit"


def one_line(text: str, length: int = MESSAGE_LENGTH) -> str:
    """Escape what would break a line or a terminal, and cut what is too long out of the middle.

    The beginning of a message says what was found, and its end what to do; both stay.
    """
    if len(text) > 2 * length:  # nothing of the middle is shown, so none of it needs escaping
        text = text[:length] + text[-length:]
    text = "".join(character if _is_plain(character) else _escaped(character) for character in text)
    if len(text) <= length:
        return text
    end = (length - len(_GAP)) // 2
    return text[: length - len(_GAP) - end] + _GAP + text[-end:]


def shown(value: Any, length: int = _VALUE_LENGTH) -> str:
    """A value as Python writes it, on one line and of bounded length, for messages."""
    try:
        return one_line(repr(value), length)
    except (ValueError, RecursionError):  # an integer of thousands of digits; containers too deep
        return f"a {type(value).__name__} too large to show"


def command_line(*words: object) -> str:
    """A command of this program, for people to copy: its words are quoted for a shell.

    A path that begins with a dash is written so that it is no option. Words in capitals stand for the user's own.
    """
    texts = [f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join(["internvl-edge", *texts])


def is_plain_name(name: object) -> bool:
    """Whether a text is one name that can stand in a path, never a path itself; `PLAIN_NAME` says it in words."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def is_file_name(name: object) -> bool:
    """Whether a text in a file can name a file beside it: it is no path, and not longer than systems allow."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        return False
    return len(name.encode("utf-8", "replace")) <= _FILE_NAME_BYTES


def _is_plain(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
