"""The journal of a batch: a JSONL file of finished rows that survives `kill -9`, and a record of what they rest on.

A row is one write and is on the disk before the next one begins. A process that is killed in a write leaves part of a
line at the end, which the next start cuts off. The record beside the journal (`NAME.batch.json`) holds everything that
decides answers and is the same for all rows. A journal is continued only under the same record, and an item counts as
finished only if its row answers what it asks now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.files import readable_disk_errors, replace_text, replacing, sync
from internvl_edge.base.json_files import parse, read_object
from internvl_edge.base.jsonable import encode
from internvl_edge.base.locks import only_writer
from internvl_edge.base.progress import Progress
from internvl_edge.base.run_record import run_record
from internvl_edge.base.text import shown
from internvl_edge.bundle.manifest import Manifest, manifest_digest

from .items import Ask, Item
from .rows import Row

RECORD_SUFFIX = ".batch.json"
FORMAT = 1
_OTHER = "give another --output"
# Of the record, what may differ from one start to the next: it is said, and not refused.
VERSIONS = "versions"


class Journal:
    """The finished rows of one batch. Get one from `open_journal`.

    Attributes:
        path: the JSONL file.
        finished: id -> request, for every row in it.
        failed: ids of the rows with an error.
        changed: the versions of packages under which it was begun, where others are installed now; else empty.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], other: str = _OTHER) -> None:
        self.path = path
        self._other = other
        self.finished: dict[str, str] = {}
        self.failed: set[str] = set()
        self.changed: Mapping[str, str] = {}
        self._record = record
        self._descriptor = -1
        self._size = 0

    def write(self, row: Row) -> None:
        """Append a row, and wait until it is on the disk.

        Raises:
            EdgeError: the disk is full or refuses; the rows before this one stay.
        """
        line = line_of(row)
        with readable_disk_errors(self.path, "finished rows were kept; make room and start again", self._other):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(line)
        self.finished[row.id] = row.request
        if row.error is not None:
            self.failed.add(row.id)

    def unfinished(self, items: list[Item]) -> list[Item]:
        """Return the items without a row.

        Raises:
            EdgeError: a row of the same id answers something else.
        """
        for item in items:
            if (found := self.finished.get(item.id)) is not None and found != item.request:
                raise EdgeError(
                    f"{self.path} has an answer for {shown(item.id)} to another prompt, image or option than "
                    f"{item.place} asks now; {self._other}, or remove it"
                )
        return [item for item in items if item.id not in self.finished]

    def drop_failed(self) -> None:
        """Remove the rows with errors, so that their items are asked again."""
        if not self.failed:
            return
        with readable_disk_errors(self.path, "nothing was changed, make room", self._other):
            with replacing(self.path) as temporary, temporary.open("wb") as file, self.path.open("rb") as old:
                file.writelines(line for line in old if parse(line)["id"] not in self.failed)
            self.close()
            self._open()
        for each in self.failed:
            del self.finished[each]
        self.failed.clear()

    def start(self) -> None:
        """Read what is there, cut off half a row, and open the file for appending."""
        if self.path.exists() and not self.path.is_file():
            raise EdgeError(f"{self.path} is no file; {self._other}")
        if self.path.exists() and self.path.stat().st_size:
            if not record_path(self.path).exists():
                what = f"it has no record {record_path(self.path).name} beside it"
                raise EdgeError(
                    f"{self.path} exists and is no batch that could go on ({what}); {self._other}, or remove it"
                )
            self._read()
        self._check_record()
        self._open()
        sync(self.path.parent)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = _row_of(line)
                if row is None:
                    if file.read(1):  # a killed process leaves half a row at the end, and nowhere else
                        raise EdgeError(f"{self.path}, line {number} is no row of a batch; repair it, or {self._other}")
                    return
                self.finished[row["id"]] = row["request"]
                if row["error"] is not None:
                    self.failed.add(row["id"])
                self._size += len(line)

    def _check_record(self) -> None:
        path = record_path(self.path)
        self.changed = check_record(path, self.path, self._record, self._other, is_new=not self.finished)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        if os.fstat(self._descriptor).st_size > self._size:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
        self._size = os.fstat(self._descriptor).st_size


@contextmanager
def open_journal(path: Path, record: Mapping[str, Any], other: str = _OTHER) -> Iterator[Journal]:
    """Begin or continue a journal, as its one writer.

    Args:
        path: the JSONL file; its folder exists.
        record: what decides the answers of all rows, as values of JSON; see `answering_record`.
        other: what to do where this file cannot be used, for messages: "give another --output".

    Raises:
        EdgeError: another process writes it, it was begun under another record, or the disk refuses.
    """
    if not path.parent.is_dir():
        raise EdgeError(f"{path.parent} is no folder; make it, or {other}")
    journal = Journal(path, record, other)
    with ExitStack() as stack:
        with readable_disk_errors(path, "make room", other):
            stack.enter_context(only_writer(path, other))
            stack.callback(journal.close)
            journal.start()
        yield journal


def check_record(
    path: Path, target: Path, record: Mapping[str, Any], other: str = _OTHER, *, is_new: bool = False
) -> Mapping[str, str]:
    """Write the record of an output where there is none, else refuse an output that was begun under another one.

    Args:
        path: the record.
        target: the output, for messages.
        record: what decides all answers, as values of JSON.
        other: what to do where the output cannot be used, for messages.
        is_new: whether the output has no rows, so that a record of it means nothing.

    Returns:
        The versions of packages under which the output was begun, where others are installed now; else nothing.

    Raises:
        EdgeError: the record differs, or cannot be read.
    """
    record = json.loads(json.dumps({"format": FORMAT, **record}))
    if is_new or not path.exists():
        replace_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return {}
    found = read_object(path, EdgeError, f"{other}, or remove it and its rows")
    for name in {**found, **record}:
        before, now = found.get(name), record.get(name)
        if name != VERSIONS and before != now:
            what, before, now = _difference(name, before, now)
            raise EdgeError(
                f"{target} was begun with {what} {shown(before)}, and not {shown(now)}; {other}, or go on as it"
                " was begun"
            )
    return (found.get(VERSIONS) or {}) if found.get(VERSIONS) != record.get(VERSIONS) else {}


def warn_of_versions(changed: Mapping[str, str], target: Path, progress: Progress) -> None:
    """Say that an output was begun under other versions of packages, where `check_record` found some."""
    if changed:
        before = shown(", ".join(f"{name} {version}" for name, version in changed.items()), 200)
        progress.note(f"internvl-edge: warning: {target} was begun with other versions: {before}")


def record_path(path: Path) -> Path:
    """Return the record of a journal."""
    return path.with_name(path.name + RECORD_SUFFIX)


def bundle_digest(manifest: Manifest) -> str:
    """Return the digest of everything in a bundle that decides answers: not of the quality recorded in it."""
    return manifest_digest(encode(replace(manifest, quality=None)))


def answering_record(manifest: Manifest, engine: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
    """Return the record of a batch: everything beside its items that decides answers.

    Args:
        manifest: the bundle's, which has the hash of each of its files. Its measured quality decides nothing.
        engine: what the engine computes and how, where answers may differ by it.
        ask: how items are asked.
    """
    return {"bundle": bundle_digest(manifest), **engine, **ask.described(), VERSIONS: run_record(0).versions}


def line_of(row: Row) -> bytes:
    """Return a row as one line of JSON."""
    text = json.dumps(row.as_json(), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "replace") + b"\n"


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the place in bytes and the values of each whole row of a journal."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            if (row := _row_of(line)) is not None:
                yield place, row
            place += len(line)


def _row_of(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line; None if it is no whole row."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("id", "request")):
        return None
    return row if "error" in row else None


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the name and the two values of what differs, inside of an object where it can be named."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(each for each in {**before, **now} if before.get(each) != now.get(each))
        return _difference(inner, before.get(inner), now.get(inner))
    return name, before, now
