"""Answer many items with one model: images are read ahead, rows of different items decode together.

`answers` is the loop, for any source of items and any use of rows. `run` writes them into a journal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from queue import Full, Queue

from internvl_edge.base.progress import SILENT, Progress, Step
from internvl_edge.base.text import one_line
from internvl_edge.base.units import rounded
from internvl_edge.runtime.model import InternVL

from .items import Item, grouped
from .journal import Journal
from .rows import Row, answer

# Answers that are computed together on a CPU; more are hardly faster (docs/performance.md).
ROWS = 8
# Items beyond the rows of the model whose images are read, cut into tiles and held in memory: 7 MB for 12 tiles.
READ_AHEAD = 2
Rows = Generator[tuple[Item, Row], None, None]
Load = Callable[[], AbstractContextManager[InternVL]]
# Errors that are said as they come; all of them are in the output.
_SHOWN_ERRORS = 3
# Seconds after which a thread that waits looks whether it is still wanted.
_LOOK = 0.2


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        items: of the input.
        earlier: of these, finished by an earlier run.
        answered, failed: of these, rows without and with an error, earlier runs included.
        output_tokens: of the answers of this run.
        seconds: of this run.
        stopped: why it ended before the last item; "" otherwise.
    """

    items: int
    earlier: int
    answered: int
    failed: int
    output_tokens: int
    seconds: float
    stopped: str = ""

    @property
    def items_per_s(self) -> float:
        """Items of this run in a second."""
        return (self.answered + self.failed - self.earlier) / max(self.seconds, 1e-9)


def answers(model: InternVL, items: Iterable[Item], read_ahead: int = READ_AHEAD) -> Rows:
    """Yield each item with its row, in the order in which they are finished.

    As many items are under way as the model has rows, and `read_ahead` more; one with several votes counts as so many.
    Whoever stops early lets those under way end in the background; closing the model ends them at once.

    Raises:
        EngineError: as `rows.answer`.
    """
    work = _Work(model, iter(items), model.rows + read_ahead)
    try:
        yield from work.results()
    finally:
        work.stop()


def run(
    load: Load,
    items: list[Item],
    journal: Journal,
    *,
    max_errors: int | None = None,
    progress: Progress = SILENT,
    label: str = "answering",
    unit: str = "items",
) -> Summary:
    """Answer the items that a journal does not have, and write each row into it as soon as it is finished.

    Args:
        load: loads the model, which is closed at the end. It is not called where the journal has all rows.
        items: what is asked; those about the same images are asked one after the other.
        journal: an open one.
        max_errors: stop as soon as more rows than this have errors, those of earlier runs included.
        progress: shows rate, time left and failures.
        label, unit: what the progress calls this work and what it counts.

    Raises:
        EdgeError: the disk is full, or a row of the journal answers another question (see `Journal.unfinished`).
        EngineError: the engine failed.
    """
    todo = journal.unfinished(items)
    failed = len(journal.failed.intersection(item.id for item in items))
    earlier, tokens, began = len(items) - len(todo), 0, time.monotonic()
    if todo and too_many(failed, max_errors) is None:
        with load() as model, progress.phase(label, len(items), unit) as step:
            step(earlier)
            began = time.monotonic()
            with closing(answers(model, grouped(todo))) as results:
                for done, (_, row) in enumerate(results, start=1):
                    journal.write(row)
                    tokens += row.output_tokens
                    failed += row.error is not None
                    if row.error is not None and failed <= _SHOWN_ERRORS:
                        progress.remark(one_line(f"{row.id}: {row.error}"))
                    _tell(step, done, failed, time.monotonic() - began)
                    if too_many(failed, max_errors):
                        break
    finished = len(journal.finished.keys() & {item.id for item in items})
    seconds = time.monotonic() - began
    stopped = too_many(failed, max_errors) or ""
    return Summary(len(items), earlier, finished - failed, failed, tokens, seconds, stopped)


def too_many(failed: int, most: int | None) -> str | None:
    """Say that there are more errors than `--max-errors` allows; None where there are not."""
    if most is None or failed <= most:
        return None
    return f"{failed} rows have errors, more than --max-errors {most}"


def _tell(step: Step, done: int, failed: int, seconds: float) -> None:
    rate = f"{rounded(done / max(seconds, 1e-9))} {step.unit}/s"
    step.facts = f"{rate}, {failed} with errors" if failed else rate
    step(1)


class _Work:
    """Threads that take items from one source, ask a model, and put rows into one queue."""

    def __init__(self, model: InternVL, items: Iterator[Item], size: int) -> None:
        self._model = model
        self._items = items
        self._results: Queue[tuple[Item, Row] | BaseException | None] = Queue(size)
        self._free = self._size = size
        self._stopped = False
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, name=f"item-{n}", daemon=True) for n in range(size)]

    def results(self) -> Iterator[tuple[Item, Row]]:
        """Begin, and yield what is finished."""
        for thread in self._threads:
            thread.start()
        ended = 0
        while ended < len(self._threads):
            found = self._results.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                ended += 1
            else:
                yield found

    def stop(self) -> None:
        """Take no more items. Those under way end by themselves, and nobody waits for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _ask(self) -> None:
        try:
            while (item := self._next()) is not None:
                try:
                    self._put((item, answer(self._model, item)))
                finally:
                    self._leave(item)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _next(self) -> Item | None:
        """Take the next item, and wait until there is room for its answers. Items are taken in their order."""
        with self._turn:
            item = None if self._stopped else next(self._items, None)
            if item is None:
                return None
            with self._changed:
                while not self._stopped and self._free < self._weight(item):
                    self._changed.wait()
                if self._stopped:
                    return None
                self._free -= self._weight(item)
            return item

    def _leave(self, item: Item) -> None:
        with self._changed:
            self._free += self._weight(item)
            self._changed.notify_all()

    def _weight(self, item: Item) -> int:
        return min(item.ask.votes or 1, self._size)

    def _put(self, found: tuple[Item, Row] | BaseException | None) -> None:
        while not self._stopped:
            try:
                self._results.put(found, timeout=_LOOK)
                return
            except Full:
                continue
