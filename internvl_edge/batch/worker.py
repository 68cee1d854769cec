"""What runs on the nodes of a cluster: an actor that holds the bundle, the items it gets and the reports it leaves."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.files import replacing
from internvl_edge.base.jsonable import decode
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.model import InternVL

from .items import Ask, Item, grouped
from .node_bundle import node_bundle
from .output import flat_row, row_schema
from .run import answers

# Items of one group of rows in the table of items.
_GROUP = 1000


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        bundle: a path that every node sees, or an address such as "s3://bucket/bundle" (see `node_bundle`).
        digest: `journal.bundle_digest` of its manifest; a node with another bundle is refused.
        loading: arguments of `InternVL.load`.
        rows: answers that a worker computes together, on a CPU.
        max_errors: stop as soon as more rows than this have errors; None never does.
    """

    bundle: str
    digest: str
    loading: Mapping[str, Any]
    rows: int
    max_errors: int | None = None


@dataclass(frozen=True)
class WorkerSummary:
    """What one worker did in a run.

    Attributes:
        worker: its name; a worker that was killed comes back under another one.
        node: name of its machine.
        items, failed: rows that it computed, and those of them with an error.
        output_tokens: of these.
        busy_s, loading_s: seconds that it answered, and that it loaded the bundle.
    """

    worker: str
    node: str
    items: int
    failed: int
    output_tokens: int
    busy_s: float
    loading_s: float

    @property
    def items_per_s(self) -> float:
        """Rows in a second of answering."""
        return self.items / max(self.busy_s, 1e-9)


class Worker:
    """An actor of Ray Data: it loads the bundle once, and answers blocks of items."""

    def __init__(self, job: Job, work: str, run: str, kept: list[str]) -> None:
        began = time.monotonic()
        folder = node_bundle(job.bundle, job.digest)
        rows = job.rows if job.loading["device"] == "cpu" else 1
        self._model = InternVL.load(folder, rows=rows, prompts_first=True, **job.loading)
        self._loading_s = time.monotonic() - began
        self._work, self._run, self._kept = Path(work), run, kept
        self._name = f"{socket.gethostname()}-{os.getpid()}"

    def __call__(self, block: Any) -> Any:
        """Return the rows of a block of items, [rows] of `output.row_schema`."""
        import pyarrow

        began = time.monotonic()
        items = [item_of(text, pictures) for text, pictures in zip(*_columns(block, "item", "pictures"), strict=True)]
        found = {item.id: row for item, row in answers(self._model, grouped(items))}
        rows = [found[item.id] for item in items]
        done = WorkerSummary(
            worker=self._name,
            node=socket.gethostname(),
            items=len(rows),
            failed=sum(row.error is not None for row in rows),
            output_tokens=sum(row.output_tokens for row in rows),
            busy_s=time.monotonic() - began,
            loading_s=self._loading_s,
        )
        with replacing(self._work / f"{self._run}-{secrets.token_hex(6)}.json") as path:
            path.write_text(json.dumps(asdict(done)), encoding="utf-8")
        schema = row_schema(pyarrow, self._kept)
        values = [flat_row(json.loads(json.dumps(row.as_json(), default=str))) for row in rows]
        return pyarrow.Table.from_pylist(values, schema)


class WorkLog:
    """What the workers of one run reported."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._seen: set[str] = set()
        self._of: dict[str, WorkerSummary] = {}

    def read(self) -> WorkLog:
        """Read the reports that are new."""
        for entry in os.scandir(self._folder):
            if entry.name in self._seen or not entry.name.startswith(self._run) or not entry.name.endswith(".json"):
                continue
            self._seen.add(entry.name)
            one = decode(WorkerSummary, json.loads(Path(entry.path).read_text(encoding="utf-8")))
            old = self._of.get(one.worker)
            self._of[one.worker] = (
                one
                if old is None
                else replace(
                    one,
                    items=old.items + one.items,
                    failed=old.failed + one.failed,
                    output_tokens=old.output_tokens + one.output_tokens,
                    busy_s=old.busy_s + one.busy_s,
                )
            )
        return self

    @property
    def items(self) -> int:
        """Rows that were computed, repeated ones included."""
        return sum(worker.items for worker in self._of.values())

    @property
    def failed(self) -> int:
        """Rows with an error, repeated ones included."""
        return sum(worker.failed for worker in self._of.values())

    @property
    def output_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(worker.output_tokens for worker in self._of.values())

    def workers(self) -> list[WorkerSummary]:
        """List what each worker did."""
        return sorted(self._of.values(), key=lambda worker: worker.worker)


def write_items(items: Sequence[Item], path: Path) -> None:
    """Write items as Parquet: id, the item as JSON, and the bytes of those images that are no files."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [("id", pyarrow.string()), ("item", pyarrow.string()), ("pictures", pyarrow.list_(pyarrow.binary()))]
    )
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for begun in range(0, len(items), _GROUP):
            rows = [_item_row(item) for item in items[begun : begun + _GROUP]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _item_row(item: Item) -> dict[str, Any]:
    images: list[str | None] = []
    pictures: list[bytes] = []
    for image in item.images:
        if isinstance(image, str | Path):
            images.append(str(image) if isinstance(image, str) else os.path.abspath(image))
        else:
            images.append(None)
            pictures.append(image.read())  # type: ignore[union-attr]  # tables make files and ImageCells, no others
    values = {
        "id": item.id,
        "place": item.place,
        "ask": {**item.ask.described(), "choices": item.ask.choices},
        "images": images,
        "names": item.names,
        "kept": item.kept,
    }
    # In ASCII: the name of a file need not be UTF-8, and a column of texts must be.
    return {"id": item.id, "item": json.dumps(values, default=str), "pictures": pictures}


def item_of(text: str, pictures: Sequence[bytes]) -> Item:
    """Return the item of a row that `write_items` wrote."""
    values = json.loads(text)
    asked, held = values["ask"], iter(pictures)
    choices = None if asked["choices"] is None else tuple(asked["choices"])
    form = None if choices or asked["form"] is None else AnswerFormat(**asked["form"])
    ask = Ask(
        prompt=asked["prompt"],
        answer_format=form,
        choices=choices,
        votes=asked["votes"],
        sure=asked["sure"],
        reason=asked["reason"],
        options=asked["options"],
    )
    images = tuple(next(held) if image is None else image for image in values["images"])
    return Item(values["id"], values["place"], ask, images, tuple(values["names"]), values["kept"])


def _columns(block: Any, *names: str) -> list[list[Any]]:
    return [block.column(name).to_pylist() for name in names]
