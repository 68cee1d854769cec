"""Read what a batch asks: a folder or a pattern of images, or the rows of a JSONL, CSV or Parquet table.

Everything that can be wrong with a row but its images is found before any work starts, and named by its line. Images
are opened when their item's turn comes.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError, PromptError
from internvl_edge.base.json_files import parse
from internvl_edge.base.text import one_line, shown
from internvl_edge.model.preprocess import IMAGE_SUFFIXES, ImageSource
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.options import whole_number

from .items import ROW_OPTIONS, Ask, Item
from .rows import FIELDS
from .tables import TABLES, Cells

COLUMNS = ("id", "images", "prompt", "json_schema", "regex", "choices", "votes", "sure", "reason", *ROW_OPTIONS)
_ALIASES = {"image": "images", "question": "prompt"}
# How other tables name our columns. To take no notice of such a column would be to ask another question.
_MEANT = {
    **dict.fromkeys(("path", "paths", "filepath", "file_path", "file", "files", "filename", "file_name"), "images"),
    **dict.fromkeys(("img", "imgs", "picture", "pictures", "photo", "photos", "url"), "images"),
    **dict.fromkeys(("image_path", "image_paths", "image_file", "image_name", "image_url", "img_path"), "images"),
    **dict.fromkeys(("text", "query", "instruction"), "prompt"),
    **dict.fromkeys(("schema", "guided_json"), "json_schema"),
    "max_tokens": "max_new_tokens",
}
_FORMS = ("json_schema", "regex", "choices")


@dataclass(frozen=True)
class Items:
    """The items of one input.

    Attributes:
        items: in the order of the input.
        unused: columns of a table that have no meaning for a batch and were not asked to be kept.
    """

    items: list[Item]
    unused: tuple[str, ...] = ()


def read_items(source: str | Path, ask: Ask, *, keep: Sequence[str] = (), limit: int | None = None) -> Items:
    """Read what a batch asks.

    Args:
        source: a folder, whose images are taken with those in its folders; a pattern such as "scans/**/*.png"; an
            image; or a table, `.jsonl`, `.csv` or `.parquet`. The id of an image is its path below the folder, or below
            the part of the pattern that has no wildcard. Paths in a table are relative to its folder; a row without an
            id has its number as id.
        ask: how items are asked where their row says nothing else.
        keep: columns of a table to copy into the output.
        limit: take only so many items.

    Raises:
        PromptError: there are no items, or one cannot be asked or has the id of another; the message names its line.
    """
    ask = ask.checked()
    path, rest = Path(source), limit
    reader = TABLES.get(path.suffix.lower())
    if path.is_dir():
        found = _of_files(path, _files_below(path), ask)
        nothing = f"the folder {path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
    elif reader and path.exists():
        unused: dict[str, None] = {}
        rows = reader(path, {*COLUMNS, *_ALIASES, *keep})
        items = _unique(path, islice((_of_row(path, row, ask, keep, unused) for row in rows), rest))
        if not items:
            raise PromptError(f"{path} has no rows; give a table with one row for each question")
        _check_kept(path, keep, items)
        _check_asked(path, ask, items, list(unused))
        return Items(items, tuple(unused))
    elif path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        found, nothing = _of_files(path.parent, iter([path]), ask), ""
    elif glob.has_magic(str(source)):
        found, nothing = _of_pattern(str(source), ask), f"no file matches the pattern {shown(str(source))}"
    else:
        what = "is no image and no table" if path.exists() else "does not exist"
        kinds = ", ".join(sorted(TABLES))
        raise PromptError(f"{one_line(str(source), 120)} {what}; give a folder, a pattern or a table ({kinds})")
    if keep:
        raise PromptError("images have no columns to keep; leave --keep out, or give a table")
    items = _unique(path, islice(found, rest))
    if not items:
        raise PromptError(f"{nothing}; check the path")
    return Items(items)


def _unique(path: Path, items: Iterable[Item]) -> list[Item]:
    places: dict[str, str] = {}
    found = []
    for item in items:
        if item.id in places:
            raise PromptError(
                f"{path}: {places[item.id]} and {item.place} have the same id {shown(item.id)}; give each row an id of "
                "its own"
            )
        places[item.id] = item.place
        found.append(item)
    return found


def _check_asked(path: Path, ask: Ask, items: list[Item], unused: list[str]) -> None:
    """Refuse a row of nothing but the prompt of all rows, where the table shows that more was meant.

    Its answer would be made up, and would look like the others.
    """
    if not unused and not any(item.images for item in items):
        return
    for item in items:
        if not item.images and item.ask.prompt == ask.prompt:
            if any(each.images for each in items):
                raise PromptError(
                    f"{path}, {item.place} has neither an image nor a prompt of its own, as other rows have; give it "
                    "one, or remove it"
                )
            raise PromptError(
                f"{path}, {item.place} has neither an image nor a prompt of its own, and its columns "
                f"{shown(', '.join(unused), 120)} have no meaning; name the column of the images images"
            )


# ---- images ----


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and its folders, without hidden ones, in the order of their paths.

    Raises:
        PromptError: one of the folders cannot be read. Its images would be missing in silence.
    """

    def refuse(error: OSError) -> None:
        raise PromptError(f"the folder {error.filename} cannot be read ({error.strerror}); mend or remove it")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(root, name)


def _of_pattern(pattern: str, ask: Ask) -> Iterator[Item]:
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    files = [Path(each) for each in sorted(glob.glob(pattern, recursive=True))]
    for path in files:
        if path.suffix.lower() in TABLES:
            raise PromptError(
                f"the pattern {shown(pattern)} matches the table {shown(str(path))}; give one table at a time, or a "
                "pattern of images"
            )
    return _of_files(Path(*parts[:fixed]), (path for path in files if not path.is_dir()), ask)


def _of_files(root: Path, files: Iterator[Path], ask: Ask) -> Iterator[Item]:
    if ask.prompt is None:
        raise PromptError("images alone ask nothing; give --prompt, or a table with a column prompt")
    for path in files:
        # A name need not be UTF-8, but what is written into the output must be.
        name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
        yield Item(name, name, ask, (path,), (name,))


# ---- rows of tables ----


def _of_row(path: Path, row: Cells, ask: Ask, keep: Sequence[str], unused: dict[str, None]) -> Item:
    """Return the item of one row. Columns without a meaning are added to `unused`."""
    place = row.place
    try:
        values = _columns(row.values, keep, unused)
        kept = {name: _kept(name, row.values[name]) for name in keep if name in row.values}
        own = _own_ask(ask, values).checked()
        if own.prompt is None:
            raise PromptError("it has no prompt; add a column prompt, or give --prompt")
        names, images = _images(path.parent, values.get("images"))
        return Item(_id(values.get("id"), row.number), place, own, images, names, kept)
    except EdgeError as error:
        raise PromptError(f"{path}, {place}: {error}") from None


def _columns(cells: Mapping[str, Any], keep: Sequence[str], unused: dict[str, None]) -> dict[str, Any]:
    """Return the cells that have a meaning and a value, by our names.

    Raises:
        PromptError: a column is named almost like one of ours, or twice.
    """
    found: dict[str, Any] = {}
    for column, value in cells.items():
        name = _ALIASES.get(column, column)
        if name not in COLUMNS:
            if column not in keep and column not in unused:
                near = [_MEANT.get(column.lower(), ""), *get_close_matches(column.lower(), COLUMNS, n=1, cutoff=0.8)]
                meant = next(filter(None, near), None)
                if meant and meant not in (_ALIASES.get(each, each) for each in cells):
                    raise PromptError(
                        f"there is no column {shown(column)}; did you mean {meant}? Rename it, or keep it with --keep"
                    )
                unused[column] = None
        elif value is not None:
            if name in found:
                raise PromptError(f"there are two columns for {name}; give one")
            found[name] = value
    return found


def _own_ask(ask: Ask, values: Mapping[str, Any]) -> Ask:
    """Return how a row asks, where it differs from the others."""
    changes: dict[str, Any] = {}
    for name, kind in (("prompt", str), ("reason", bool), ("regex", str)):
        if name in values and not isinstance(values[name], kind):
            expected = "a text" if kind is str else "true or false"
            raise PromptError(f"{name} is {shown(values[name])}, expected {expected}")
    if "prompt" in values:
        changes["prompt"] = values["prompt"]
    if forms := [name for name in _FORMS if name in values]:
        if len(forms) > 1:
            raise PromptError(f"{' and '.join(forms)} cannot be combined; give one form of the answer")
        changes |= _form(forms[0], values[forms[0]])
    if "votes" in values:
        changes["votes"] = whole_number("votes", values["votes"])
    if "sure" in values:
        changes["sure"] = _number("sure", values["sure"])
    if "reason" in values:
        changes["reason"] = values["reason"]
    options = {name: values[name] for name in ROW_OPTIONS if name in values}
    if options:
        changes["options"] = {**ask.options, **options}
    return replace(ask, **changes) if changes else ask


def _form(name: str, value: Any) -> dict[str, Any]:
    if name == "choices":
        return {"choices": choices_of(value), "answer_format": None}
    made = AnswerFormat.json_schema(value) if name == "json_schema" else AnswerFormat.regex(value)
    return {"answer_format": made, "choices": None}


def choices_of(value: Any) -> tuple[str, ...]:
    """Return choices as a tuple of texts; raises PromptError for anything else."""
    return tuple(parse(AnswerFormat.choice(value).text))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PromptError(f"{name} is {shown(value)}, expected a number")
    return float(value)


def _kept(name: str, value: Any) -> Any:
    """Return a value of a kept column as JSON can hold it: NaN and infinity are no values there.

    Raises:
        PromptError: bytes.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_kept(name, each) for each in value]
    if isinstance(value, dict):
        return {key: _kept(name, each) for key, each in value.items()}
    if isinstance(value, bytes) or hasattr(value, "read"):
        raise PromptError(f"the column {shown(name)} holds bytes, which the output cannot keep; leave its --keep out")
    return value


def _id(value: Any, number: int) -> str:
    if value is None:
        return str(number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value:
        return value
    raise PromptError(f"its id is {shown(value)}, expected a text or a whole number")


def _images(folder: Path, value: Any) -> tuple[tuple[str, ...], tuple[ImageSource, ...]]:
    """Return the names of a row's images, and the images. A path is relative to the table."""
    entries = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    names, images = [], []
    for entry in entries:
        if isinstance(entry, str) and entry:
            names.append(entry)
            images.append(entry if _is_address(entry) else folder / entry)
        elif hasattr(entry, "read") and isinstance(getattr(entry, "name", None), str):
            names.append(entry.name)
            images.append(entry)
        else:
            raise PromptError(f"images has {shown(entry)}, expected paths of images, or one path")
    return tuple(names), tuple(images)


def _is_address(text: str) -> bool:
    scheme, colon, rest = text.partition(":")
    return bool(colon) and (scheme.lower() == "data" or rest.startswith("//"))


def _check_kept(path: Path, keep: Sequence[str], items: list[Item]) -> None:
    for name in keep:
        if name in FIELDS:
            raise PromptError(f"--keep {name}: the output has a column of this name; rename the column of the table")
        if not any(name in item.kept for item in items):
            raise PromptError(f"{path} has no column {shown(name)} to keep; check its name")
