"""Rows of JSONL, CSV and Parquet tables that somebody else wrote, read strictly and one after the other.

A reader knows nothing of what columns mean, except how a cell of a CSV file, which is always text, becomes a value.
"""

from __future__ import annotations

import csv
import hashlib
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from internvl_edge.base.errors import PromptError
from internvl_edge.base.extras import requires
from internvl_edge.base.json_files import parse
from internvl_edge.base.text import one_line, shown

# Longest line of a JSONL or CSV file, which may hold images as data: addresses.
MOST_LINE_BYTES = 64 << 20
# Columns of a CSV file that are text as they stand; a list in one of the second kind begins with a bracket. All others
# are numbers, true or false.
_TEXTS = frozenset(("id", "prompt", "question", "system", "json_schema", "regex", "background", "answer_start"))
_LISTS = frozenset(("images", "image", "choices", "stop"))
_VALUES = frozenset(
    (
        *("votes", "sure", "reason", "max_tiles", "max_new_tokens", "temperature", "top_k", "top_p", "min_p"),
        *("repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "speculate", "exif", "plain_text"),
        *("keep_special", "think"),
    )
)
# Rows of a Parquet file in memory while it is read; they may hold images.
_ROWS_AT_ONCE = 32
_ADVICE = "give a table of questions"


@dataclass(frozen=True)
class Cells:
    """One row.

    Attributes:
        number: of the row, from 1.
        place: where it stands, in words: "line 7".
        values: column -> value; None where there is none.
    """

    number: int
    place: str
    values: Mapping[str, Any]


def read_jsonl(path: Path, columns: Container[str]) -> Iterator[Cells]:
    """Yield the objects of a JSONL file. Lines of whitespace are skipped.

    Args:
        path: the file.
        columns: whose values are needed; those of others may be None.

    Raises:
        PromptError: a line is no JSON object, or the file cannot be read.
    """
    number = 0
    with _opened(path, "rb") as file:
        line = 0
        while text := file.readline(MOST_LINE_BYTES + 1):
            line += 1
            _require_length(path, line, text)
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if not text.strip():
                continue
            try:
                values = parse(text)
            except ValueError as error:
                raise PromptError(f"{path}, line {line} is no JSON ({error}); {_ADVICE}, one object a line") from None
            if not isinstance(values, dict):
                raise PromptError(f"{path}, line {line} is a {type(values).__name__}, expected an object")
            number += 1
            yield Cells(number, f"line {line}", values)


def read_csv(path: Path, columns: Container[str]) -> Iterator[Cells]:
    """Yield the rows of a CSV file, whose first row names the columns. An empty cell has no value.

    Args:
        path, columns: as of `read_jsonl`.

    Raises:
        PromptError: a row has another number of cells, a cell is no value of its column, or the file cannot be read.
    """
    csv.field_size_limit(MOST_LINE_BYTES)  # of the whole process; 128 KiB otherwise, less than many an image
    with _opened(path, "r", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), strict=True)
        heading: list[str] | None = None
        number, began = 0, 1
        while True:
            try:
                cells = next(reader, None)
            except UnicodeDecodeError:
                raise PromptError(f"{path} is not UTF-8 behind line {reader.line_num}; save it as UTF-8") from None
            except csv.Error as error:
                raise PromptError(f"{path}, line {reader.line_num} is no CSV ({error}); {_ADVICE}") from None
            if cells is None:
                return
            line, began = began, reader.line_num + 1
            if not cells:
                continue
            if heading is None:
                heading = _heading(path, cells)
                continue
            if len(cells) != len(heading):
                raise PromptError(
                    f"{path}, line {line} has {len(cells)} cells, the heading has {len(heading)}; quote cells with "
                    "commas"
                )
            number += 1
            try:
                values = {name: _value(name, text) for name, text in zip(heading, cells, strict=True)}
            except ValueError as error:
                raise PromptError(f"{path}, line {line}: {error}") from None
            yield Cells(number, f"line {line}", values)


def read_parquet(path: Path, columns: Container[str]) -> Iterator[Cells]:
    """Yield the rows of a Parquet file. Bytes of images become files that are read when they are needed.

    Args:
        path, columns: as of `read_jsonl`. Other columns are not read at all: they may be large, or of any type.

    Raises:
        PromptError: pyarrow is missing, or the file or a value in it cannot be read.
    """
    with requires("parquet", "a Parquet file", PromptError, "or give a JSONL or CSV file"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_different_names(path, names)
            others = dict.fromkeys(names)
            needed = [name for name in names if name in columns]
            cells, number = _ImageCells(path), 0
            for group in range(file.num_row_groups):
                first = number
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=needed):
                    found = {name: _column(path, batch, name, number) for name in needed}
                    for row in range(batch.num_rows):
                        number += 1
                        values = others | {name: column[row] for name, column in found.items()}
                        for name in ("images", "image"):
                            if name in values:
                                values[name] = cells.instead(values[name], name, group, number - 1 - first)
                        yield Cells(number, f"row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise PromptError(f"{path} cannot be read as Parquet ({reason}); {_ADVICE}") from None


def _column(path: Path, batch: Any, name: str, before: int) -> list[Any]:
    """Return the values of a column of some rows."""
    try:
        values: list[Any] = batch.column(name).to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time that Python has no value for
        where = f"rows {before + 1} to {before + batch.num_rows}"
        raise PromptError(
            f"{path}, {where}: a value of the column {shown(name)} cannot be read ({one_line(str(error), 120)}); "
            "convert the column"
        ) from None
    return values


TABLES: dict[str, Callable[[Path, Container[str]], Iterator[Cells]]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}


def _opened(path: Path, mode: str, **options: Any) -> Any:
    try:
        return path.open(mode, **options)
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}); {_ADVICE}") from None


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield the lines of a text file, and refuse one that is too long before it is in memory."""
    number = 0
    while text := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        _require_length(path, number, text)
        yield text


def _require_length(path: Path, line: int, text: str | bytes) -> None:
    if len(text) > MOST_LINE_BYTES:
        raise PromptError(f"{path}, line {line} has more than {MOST_LINE_BYTES >> 20} MiB; give paths of images")


def _heading(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (separator := next((each for each in ";\t|" if each in names[0]), None)):
        raise PromptError(
            f"the heading of {path} is one column {shown(names[0])}, separated with {shown(separator)}; separate "
            "columns with commas"
        )
    _require_different_names(path, names)
    return names


def _require_different_names(path: Path, names: list[str]) -> None:
    for name in names:
        if not name or names.count(name) > 1:
            what = f"the name {shown(name)} twice" if name else "a column without a name"
            raise PromptError(f"the heading of {path} has {what}; name each column once")


def _value(name: str, text: str) -> Any:
    """Return the value of a cell.

    Raises:
        ValueError: it is none of this column.
    """
    if not text.strip():
        return None
    if name in _LISTS and text.lstrip().startswith("["):
        return parse(text)
    if name not in _VALUES:
        return text
    text = text.strip()
    lower = text.lower()
    if lower in ("true", "false"):
        return lower == "true"
    try:
        return parse(text)
    except ValueError:
        raise ValueError(f"{name} is {shown(text)}, expected a number, true or false") from None


class _ImageCells:
    """The images that a Parquet file itself holds, as bytes or as {"bytes", "path"}. One group of rows is in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._held: tuple[int, str] | None = None
        self._column: Any = None

    def instead(self, value: Any, column: str, group: int, row: int) -> Any:
        """Return a value of a column with files in the place of bytes."""
        entries = value if isinstance(value, list) else [value]
        found = [self._file(entry, column, group, row, index) for index, entry in enumerate(entries)]
        return found if isinstance(value, list) else found[0]

    def read(self, name: str, column: str, group: int, row: int, index: int) -> bytes:
        """Return the bytes of one image, whose digest is `name`.

        Raises:
            OSError: the file is gone, or holds something else there now.
        """
        from pyarrow import parquet

        try:
            with self._lock:
                if self._held != (group, column):
                    with parquet.ParquetFile(self._path) as file:
                        self._column = file.read_row_group(group, columns=[column]).column(column)
                    self._held = group, column
                value = self._column[row].as_py()
            data = _bytes_of(value[index] if isinstance(value, list) else value)
        except (LookupError, ValueError):  # of pyarrow, too
            data = None
        if data is None or _digest(data) != name:
            raise OSError(f"{self._path} was changed")
        return data

    def _file(self, entry: Any, column: str, group: int, row: int, index: int) -> Any:
        data = _bytes_of(entry)
        if data is not None:
            return ImageCell(self, _digest(data), (column, group, row, index))
        return entry.get("path") if isinstance(entry, dict) else entry


@dataclass(frozen=True)
class ImageCell:
    """An image in a Parquet file, as an open file of `load_image`. `name` is a digest of its bytes."""

    _cells: _ImageCells
    name: str
    _place: tuple[str, int, int, int]

    def read(self) -> bytes:
        """Return its bytes."""
        return self._cells.read(self.name, *self._place)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _bytes_of(entry: Any) -> bytes | None:
    value = entry.get("bytes") if isinstance(entry, dict) else entry
    return value if isinstance(value, bytes) else None
