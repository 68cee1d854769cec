"""Read calibration data as images, prompts and answers, before they become tokens.

There are three sources: a folder of images, a JSON Lines file of {"images": [...], "prompt": ..., "answer"?: ...}, or
the built-in set. The built-in set holds synthetic documents, charts, signs and scenes in two languages, and texts. The
seed alone decides which items are used and in which order.
"""

from __future__ import annotations

import codecs
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_edge.base import json_files
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.text import shown
from internvl_edge.model.preprocess import IMAGE_SUFFIXES, file_path
from internvl_edge.model.prompt import IMAGE_MARK

from .texts import IMAGE_PROMPTS, TEXTS

# One built-in item in this many is text without an image, because decoders also answer such prompts.
_TEXT_EVERY = 4
# Most bytes of a JSON Lines file, and of one line.
DATA_BYTES = 1 << 30
_LINE_BYTES = json_files.FILE_BYTES
_ADVICE = "expected UTF-8 JSON Lines"
# The beginning of an address; a file's name in one of these forms would be a strange one.
_ADDRESS = re.compile(r"(?i)(https?|data|s3|gs|oss):")
# Who speaks, in the words of InternVL's "conversations" and of ms-swift's "messages".
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class CalibrationItem:
    """The source of one calibration sample. `prompt` can hold `<image>` marks. An answer is part of the token sequence.

    `history` holds earlier questions and answers, whose marks take the first images; `system` replaces the checkpoint's
    system text. `problem` is set instead where the source's entry is not valid.
    """

    name: str
    prompt: str = ""
    images: tuple[Path | Image.Image, ...] = ()
    answer: str = ""
    problem: str = ""
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None


def read_items(source: Path | None, seed: int = 0) -> Iterator[CalibrationItem]:
    """Return the items of a folder, of a JSON Lines file or (None) of the built-in set, in the order of the seed.

    The built-in set is endless. Broken entries have their `problem` set. Images are not opened here.

    Raises:
        EdgeError: no such file or folder, or it is empty.
    """
    if source is None:
        return _built_in(seed)
    if not source.exists():
        raise EdgeError(f"calibration data {source} does not exist; give a folder of images or a .jsonl file")
    items = _folder(source, seed) if source.is_dir() else _json_lines(source)
    if not items:
        wanted = "images" if source.is_dir() else "lines"
        raise EdgeError(f"calibration data {source} holds no {wanted}; give a folder of images or a .jsonl file")
    random.Random(seed).shuffle(items)
    return iter(items)


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder and of folders in it, sorted. Hidden ones are those of a system, not of a user."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _folder(folder: Path, seed: int) -> list[CalibrationItem]:
    paths = image_files(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    prompts = random.Random(f"prompts/{seed}").choices(IMAGE_PROMPTS, k=len(paths))
    return [CalibrationItem(name, prompt, (path,)) for name, prompt, path in zip(names, prompts, paths, strict=True)]


def _json_lines(path: Path) -> list[CalibrationItem]:
    items = []
    for name, line in read_lines(path):
        try:
            items.append(read_item(path.parent, name, parse_line(line)))
        except ValueError as problem:
            items.append(CalibrationItem(name, problem=str(problem)))
    return items


def read_lines(path: Path) -> list[tuple[str, bytes]]:
    """Return the lines of a JSON Lines file that are not empty, each with its name (FILE:NUMBER).

    Raises:
        EdgeError: the file cannot be read, or is larger than 1 GiB.
    """
    content = json_files.read_bytes(path, EdgeError, _ADVICE, limit=DATA_BYTES)
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(f"{path.name}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the object in one line.

    Raises:
        ValueError: it is no JSON object, or longer than 8 MiB.
    """
    try:
        if len(line) > _LINE_BYTES:
            raise ValueError(f"a line of more than {_LINE_BYTES >> 20} MiB")
        values: Any = json_files.parse(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}, expected an object")
    return values


def read_item(folder: Path, name: str, values: dict[str, Any]) -> CalibrationItem:
    """Read one object in any of the three forms; its images are relative to the folder.

    Raises:
        ValueError: it is of none of them.
    """
    values = {key: value for key, value in values.items() if value is not None}  # a table writes null for "absent"
    for form in ("conversations", "messages"):
        if form in values:
            return _conversation(folder, name, values, form)
    prompt, answer = values.get("prompt"), values.get("answer", "")
    if unknown := sorted(set(values) - {"images", "prompt", "answer"}):
        raise ValueError(
            f"unknown field {shown(unknown[0])}, expected images, prompt and answer; or conversations or messages"
        )
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError("prompt or answer is not a text")
    images = values.get("images", [])
    return CalibrationItem(name, prompt, read_images(folder, images if isinstance(images, list) else None), answer)


def _conversation(folder: Path, name: str, values: dict[str, Any], form: str) -> CalibrationItem:
    """Read a conversation: the last question and its answer, and the turns before them as history."""
    if other := next((key for key in ("video", "videos", "audio", "audios") if values.get(key)), None):
        raise ValueError(f"{other} is not read, only images are")
    images = read_images(folder, values.get("image") or values.get("images") or [])
    inline: list[Any] = []
    system: str | None = None
    turns: list[list[str]] = []
    for number, message in enumerate(values[form] if isinstance(values[form], list) else [None], start=1):
        role, text = _message(message, form, number, inline)
        if role == "system" and number == 1:
            system = text
        elif role == "user" and (not turns or len(turns[-1]) == 2):
            turns.append([text])
        elif role == "assistant" and turns and len(turns[-1]) == 1:
            turns[-1].append(text)
        else:
            raise ValueError(f"{form}[{number - 1}] is of {role} out of turn, expected user and assistant in turns")
    if not turns:
        raise ValueError(f"{form} holds no question")
    if images and inline:
        raise ValueError("images are named beside the messages and inside them, expected one of the two")
    images = images or read_images(folder, inline)
    if images and not any(IMAGE_MARK in turn[0] for turn in turns):  # as in the training of the model
        turns[0][0] = f"{IMAGE_MARK}\n" * len(images) + turns[0][0]
    *earlier, last = turns
    history = tuple((asked, answered) for asked, answered in earlier)
    return CalibrationItem(name, last[0], images, last[1] if len(last) == 2 else "", history=history, system=system)


def _message(message: Any, form: str, number: int, images: list[Any]) -> tuple[str, str]:
    """Return role (user, assistant or system) and text of one message.

    Where a message of ms-swift is a list of parts, its images are appended to `images`, and marks stand in the text.
    """
    role_name, text_name = ("from", "value") if form == "conversations" else ("role", "content")
    role = message.get(role_name) if isinstance(message, dict) else None
    text = message.get(text_name) if isinstance(message, dict) else None
    if isinstance(text, list) and form == "messages":
        text = "".join(_part(part, images) for part in text)
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise ValueError(
            f"{form}[{number - 1}] is {shown(message)}, expected {role_name} (one of {', '.join(_ROLES)}) and "
            f"{text_name}, a text"
        )
    return _ROLES[role], text


def _part(part: Any, images: list[Any]) -> str:
    """Return the text of one part of a message; an image is a mark in it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image":
        images.append(part.get("image"))
        return IMAGE_MARK
    raise ValueError(f"a part of a message is {shown(part)}, expected type text with text, or type image with image")


def read_images(folder: Path, value: Any) -> tuple[Path, ...]:
    """Return the image files that one entry names, one or several: paths relative to the folder, or `file://`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("images is not a list of file names")
    names: list[Any] = [each.get("path") if isinstance(each, dict) else each for each in value]
    if not all(isinstance(each, str) and each and "\0" not in each for each in names):
        raise ValueError("images is not a list of file names")
    if fetched := next((each for each in names if _ADDRESS.match(each)), None):
        raise ValueError(f"image {shown(fetched)} is an address, only files are read; download it first")
    return tuple(folder / file_path(each) for each in names)


def _built_in(seed: int) -> Iterator[CalibrationItem]:
    from .synthetic import sample  # fonts are packages of an extra; only this source needs them

    chooser = random.Random(f"built-in/{seed}")
    texts = list(TEXTS)
    chooser.shuffle(texts)
    index = 0
    while True:
        if index % _TEXT_EVERY == _TEXT_EVERY - 1:
            prompt, answer = texts[index // _TEXT_EVERY % len(texts)]
            yield CalibrationItem(f"built-in text {index}", prompt, (), answer)
        else:
            drawn = sample("train", index, seed)
            yield CalibrationItem(f"built-in {drawn.task} {index}", drawn.question, (drawn.image,), drawn.answer)
        index += 1
