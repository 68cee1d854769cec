"""Say on standard error what a long command is doing: the one style of progress of this project.

A command goes through phases, and each has a label and, where it is known, a number of steps. On a terminal, one line
is rewritten in place and erased at the end. Elsewhere (a log, a pipe), each phase is one plain line when it begins, and
at most one more for each minute that it lasts. Nothing here knows models or files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from .text import one_line
from .units import duration, size

# Reports the number of steps that were just done.
Advance = Callable[[int], object]

# Seconds between two drawings on a terminal, and between two lines of one phase elsewhere.
_REDRAW = 0.1
_PLAIN_EVERY = 60.0
_TICK = 0.5
# Plain lines wait so long for a mistake that is found at once: a mistake is then the only line.
_PATIENCE = 2.0
# From then on, a speed is worth an estimate of the time that is left.
_ESTIMATE_AFTER = 2.0
_ERASE = "\r\x1b[K"
# Who may have a line on the terminal now; other writers of lines ask it to make room.
_active: list[Progress] = []


@dataclass
class Step:
    """A phase in progress. A call reports steps that were just done.

    Attributes:
        label: what is being done.
        total: number of steps; 0 where it is not known.
        unit: what people count: "layers", or "bytes".
        units: how many of these all steps are; the steps themselves where 0.
        detail: what inside the phase is being done, such as the name of a file; "" for nothing.
        facts: what else is said of the phase, such as a rate, also where each minute is one line.
    """

    label: str
    total: int = 0
    unit: str = ""
    units: int = 0
    detail: str = ""
    facts: str = ""
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    _updated: Callable[[], None] = field(default=lambda: None, repr=False)
    # Time and steps of the first report, which in a run that continues counts what an earlier run did.
    _base: tuple[float, int] | None = None
    _last: float = 0.0

    def __call__(self, steps: int) -> None:
        """Report that so many more steps are done."""
        self._report(self.done + steps)

    def at(self, done: int, total: int, detail: str) -> None:
        """Report where a part of the phase is, whose parts are not known before."""
        if detail != self.detail:
            self.detail, self._base = detail, None
        self.total = total
        self._report(done)

    def _report(self, done: int) -> None:
        self.done, self._last = done, time.monotonic()
        self._base = self._base or (self._last, done)
        self._updated()

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds to the end of the phase; None where nothing can be said."""
        if self._base is None or not self.total:
            return None
        began, first = self._base
        if self.done <= first or self._last - began < _ESTIMATE_AFTER:
            return None
        estimated = (self.total - self.done) * (self._last - began) / (self.done - first)
        return max(0.0, estimated - (now - self._last))

    def texts(self, now: float) -> list[str]:
        """Say how far the phase is: count, share and time, the most important first."""
        found = []
        if self.total:
            found.append(f"{min(1.0, self.done / self.total):.0%}")
        if (left := self.seconds_left(now)) is not None:
            found.append(f"{duration(left)} left")
        elif now - self.began >= 1:
            found.append(duration(now - self.began))
        if self.total and self.unit:
            found.append(self._count())
        return [*found, self.facts] if self.facts else found

    def amount(self) -> str:
        """Say how much there is to do in all, such as "24 layers"; "" where nobody counts."""
        if not (self.total and self.unit):
            return ""
        units = self.units or self.total
        return size(units) if self.unit == "bytes" else f"{units} {self.unit}"

    def _count(self) -> str:
        units = self.units or self.total
        done = self.done * units // self.total
        if self.unit == "bytes":
            return f"{size(done)} of {size(units)}"
        return f"{done} of {units} {self.unit}"


class Progress:
    """What one command is doing. As a context, it leaves a clean terminal behind.

    Args:
        stream: where to write; None writes nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._terminal = bool(stream and stream.isatty() and os.environ.get("TERM") != "dumb")
        self._lock = threading.RLock()
        self._steps: list[Step] = []
        self._number = self._expected = 0
        self._drawn = 0.0
        self._line = ""
        self._held: list[str] = []
        self._began: float | None = None
        self._spoke = 0.0
        self._end = threading.Event()
        self._ticker: threading.Thread | None = None

    def expect(self, phases: int) -> None:
        """Number the phases that follow: "[2 of 4]". It has no effect where a caller has numbered them already."""
        if not self._expected:
            self._number, self._expected = 0, phases

    def skip(self, phases: int) -> None:
        """Count phases that an earlier run has finished."""
        self._number += phases

    @contextmanager
    def phase(self, label: str, total: int = 0, unit: str = "", units: int = 0) -> Iterator[Step]:
        """Enter a phase; for the arguments, see `Step`. A phase inside a phase is a part of it, without a number."""
        step = Step(label, total, unit, units, _updated=self._update)
        with self._lock:
            if not self._steps:
                self._number += 1
            self._steps.append(step)
            self._begin(step)
        try:
            yield step
        finally:
            with self._lock:
                self._steps.remove(step)
                self._erase()

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Say on a terminal what is waited for before the work begins, such as a large library.

        In a log this is no line: a mistake that is found next is then the only one.
        """
        if not self._terminal:
            yield
            return
        with self.phase(label):
            yield

    def remark(self, line: str) -> None:
        """Write one line that stays, as part of the progress: nothing where that is silent."""
        with self._lock:
            if self._terminal:
                self._erase()
                self._write(f"{line}\n")
            elif self._stream is not None:
                self._say(line)

    def note(self, line: str) -> None:
        """Write one line that matters, such as a warning, also where progress is silent."""
        with self._lock:
            if self._terminal:
                self.remark(line)
                return
            self._release()
            with suppress(AttributeError):  # there is no standard error under pythonw
                print(line, file=self._stream or sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if ticker := self._ticker:
            ticker.join(timeout=1)
        with self._lock:
            self._erase()
            if kind is None:
                self._release()
            self._held.clear()
            self._stream = None
        _active.remove(self)

    def _begin(self, step: Step) -> None:
        if self._stream is None:
            return
        self._began = self._began or time.monotonic()
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()
        if self._terminal:
            self._draw()
        else:
            amount = step.amount()
            self._say(f"internvl-edge: {self._title()}" + (f", {amount}" if amount else ""))

    def _title(self) -> str:
        number = f"[{self._number} of {self._expected}] " if 1 <= self._number <= self._expected else ""
        return number + one_line(": ".join(step.label for step in self._steps))

    def _say(self, line: str) -> None:
        self._held.append(line)
        self._spoke = time.monotonic()
        self._began = self._began or self._spoke
        if self._spoke - self._began >= _PATIENCE:
            self._release()

    def _release(self) -> None:
        if self._held:
            self._write("".join(f"{line}\n" for line in self._held))
            self._held.clear()

    def _tick(self) -> None:
        while not self._end.wait(_TICK):
            with self._lock:
                if not self._steps:
                    self._ticker = None
                    return
                if self._terminal:
                    self._draw()
                elif self._began is not None and time.monotonic() - self._began >= _PATIENCE:
                    self._release()
                    self._each_minute()

    def _update(self) -> None:
        if self._terminal and time.monotonic() - self._drawn >= _REDRAW:
            with self._lock:
                self._draw()

    def _each_minute(self) -> None:
        now = time.monotonic()
        if self._steps and now - self._spoke >= _PLAIN_EVERY:
            self._say(f"internvl-edge: {self._title()}: {', '.join(self._steps[-1].texts(now))}")

    def _draw(self) -> None:
        if not self._steps:
            return
        self._drawn = time.monotonic()
        step = self._steps[-1]
        texts = step.texts(self._drawn) + ([step.detail] if step.detail else [])
        line = fitting(self._title(), texts, self._columns() - 1)
        if line != self._line:
            self._line = line
            self._write(_ERASE + line)

    def _columns(self) -> int:
        try:
            assert self._stream is not None
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _erase(self) -> None:
        if self._line:
            self._line = ""
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        """Write, or be silent from now on: nobody reads it, and the work is worth more than its progress."""
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                self._stream = None


SILENT = Progress()


def as_progress(progress: bool | Progress) -> Progress:
    """Return the progress that an argument of the library means: True shows it on standard error, False is silent."""
    if isinstance(progress, Progress):
        return progress
    return Progress(sys.stderr) if progress else SILENT


def note(line: str) -> None:
    """Write one line on standard error, beside the progress that a command may be showing."""
    (_active[-1] if _active else SILENT).note(line)


def fitting(title: str, texts: list[str], columns: int) -> str:
    """Join a title and what fits behind it into one line of at most so many columns."""
    line = _cut(title, columns)
    for number, text in enumerate(texts):
        longer = f"{line}{', ' if number else '  '}{text}"
        if _width(longer) > columns:
            break
        line = longer
    else:
        return line
    if texts and line == _cut(title, columns) and columns > 12:  # the share is worth more than the end of the title
        return f"{_cut(title, columns - _width(texts[0]) - 2)}  {texts[0]}"
    return line


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _cut(text: str, columns: int) -> str:
    if _width(text) <= columns:
        return text
    while text and _width(text) > columns - 1:
        text = text[:-1]
    return f"{text}…" if columns > 0 else ""
