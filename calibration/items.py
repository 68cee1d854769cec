"""Read calibration data as images, prompts and answers, before they become tokens.

There are three sources: a folder of images, a JSON Lines file of {"images": [...], "prompt": ..., "answer"?: ...}, or
the built-in set. The built-in set holds synthetic documents, charts, signs and scenes in two languages, and texts. The
seed alone decides which items are used and in which order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_edge.base import json_files
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.text import shown

from .texts import IMAGE_PROMPTS, TEXTS

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2"}
# One built-in item in this many is text without an image, because decoders also answer such prompts.
_TEXT_EVERY = 4
# Most bytes of a JSON Lines file, and of one line.
_DATA_BYTES = 1 << 30
_LINE_BYTES = json_files.FILE_BYTES
_ADVICE = "expected UTF-8 JSON Lines"


@dataclass(frozen=True)
class CalibrationItem:
    """The source of one calibration sample. `prompt` can hold `<image>` marks. An answer is part of the token sequence.

    `problem` is set instead where the source's entry is not valid.
    """

    name: str
    prompt: str = ""
    images: tuple[Path | Image.Image, ...] = ()
    answer: str = ""
    problem: str = ""


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


def _folder(folder: Path, seed: int) -> list[CalibrationItem]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    prompts = random.Random(f"prompts/{seed}").choices(IMAGE_PROMPTS, k=len(paths))
    return [CalibrationItem(name, prompt, (path,)) for name, prompt, path in zip(names, prompts, paths, strict=True)]


def _json_lines(path: Path) -> list[CalibrationItem]:
    lines = json_files.read_bytes(path, EdgeError, _ADVICE, limit=_DATA_BYTES).split(b"\n")
    return [_one_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _one_line(path: Path, number: int, line: bytes) -> CalibrationItem:
    name = f"{path.name}:{number}"
    try:
        if len(line) > _LINE_BYTES:
            raise ValueError(f"a line of more than {_LINE_BYTES >> 20} MiB")
        values: Any = json_files.parse(line)
    except ValueError as error:
        return CalibrationItem(name, problem=f"not JSON ({error})")
    if not isinstance(values, dict):
        return CalibrationItem(name, problem=f"a {type(values).__name__}, expected an object")
    images, prompt, answer = values.get("images", []), values.get("prompt"), values.get("answer", "")
    if unknown := sorted(set(values) - {"images", "prompt", "answer"}):
        return CalibrationItem(name, problem=f"unknown field {shown(unknown[0])}, expected images, prompt, answer")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return CalibrationItem(name, problem="prompt or answer is not a text")
    if not isinstance(images, list) or not all(isinstance(image, str) and "\0" not in image for image in images):
        return CalibrationItem(name, problem="images is not a list of file names")
    return CalibrationItem(name, prompt, tuple(path.parent / image for image in images), answer)


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
