"""The output of a batch in the order of its input, as JSONL or as Parquet, made from a complete journal.

Only places of rows are in memory, never the rows. The file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import requires
from internvl_edge.base.files import readable_disk_errors, replacing
from internvl_edge.base.json_files import parse

from .items import Item
from .journal import rows_of
from .rows import FIELDS, SECONDS

# Rows of one group of a Parquet file.
_GROUP = 1000


def write_jsonl(journal: Path, items: Sequence[Item], path: Path) -> None:
    """Write the rows of items, in their order, as JSONL.

    Raises:
        EdgeError: the disk is full or refuses.
    """
    with _replacing(path) as temporary, journal.open("rb") as rows, temporary.open("wb") as file:
        for line in _lines(journal, rows, items):
            file.write(line)


def write_parquet(journal: Path, items: Sequence[Item], path: Path) -> None:
    """Write the rows of items, in their order, as Parquet.

    `json` is JSON text there, and so is each kept column whose value is no text.

    Raises:
        EdgeError: pyarrow is missing, or the disk is full or refuses.
    """
    require_parquet()
    import pyarrow
    from pyarrow import parquet

    kept = list(dict.fromkeys(name for item in items for name in item.kept))
    schema = row_schema(pyarrow, kept)
    with (
        _replacing(path) as temporary,
        journal.open("rb") as rows,
        parquet.ParquetWriter(temporary, schema) as writer,
    ):
        group: list[dict[str, Any]] = []
        for line in _lines(journal, rows, items):
            group.append(flat_row(parse(line)))
            if len(group) == _GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group.clear()
        writer.write_table(pyarrow.Table.from_pylist(group, schema))


def require_parquet() -> None:
    """Raise EdgeError where pyarrow is not installed."""
    with requires("parquet", "Parquet output", EdgeError, "or choose an --output that ends with .jsonl"):
        import pyarrow  # noqa: F401


def _lines(journal: Path, rows: BinaryIO, items: Sequence[Item]) -> Iterator[bytes]:
    places = {row["id"]: place for place, row in rows_of(journal)}
    for item in items:
        rows.seek(places[item.id])
        yield rows.readline()


def row_schema(pyarrow: Any, kept: list[str]) -> Any:
    """Return the schema of rows in Parquet, with the columns that are kept behind the fields."""
    kinds = {
        "agreement": pyarrow.float64(),
        **dict.fromkeys(("replies", "prompt_tokens", "image_tokens", "output_tokens"), pyarrow.int32()),
        "tiles": pyarrow.list_(pyarrow.int32()),
        "timings": pyarrow.struct([(name, pyarrow.float64()) for name in SECONDS]),
    }
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in (*FIELDS, *kept)])


def flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with texts in the place of values of any kind."""
    for name, value in row.items():
        if value is not None and (name == "json" or (name not in FIELDS and not isinstance(value, str))):
            row[name] = json.dumps(value, ensure_ascii=False)
    return row


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    advice = "all rows are in the journal; make room and start again"
    with readable_disk_errors(path, advice, "all rows are in the journal"), replacing(path) as temporary:
        yield temporary
