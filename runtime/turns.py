"""One answer at a time: an engine has one KV cache, so answers that were computed together would mix.

Threads wait for each other. In one thread nothing can wait for an answer that is only half read: a new question ends
it, and reading on in it is an error.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from internvl_edge.base.errors import EngineError


class Interruptible(Protocol):
    """An answer under way."""

    def interrupt(self) -> None:
        """End the answer, and leave its turn."""


class Turns:
    """Whose turn it is with one engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._key: int | None = None  # of the answer, also while it is being deleted and its reference is dead
        self._current: weakref.ref[Interruptible] | None = None
        self._closed = False

    def enter(self, answer: Interruptible) -> None:
        """Wait until other threads' answers are finished, end an unfinished one of this thread, and begin.

        Raises:
            EngineError: the model is closed.
        """
        self._take()
        if self._closed:
            self._lock.release()
            raise EngineError("this model is closed; load the bundle again")
        self._thread, self._key, self._current = threading.get_ident(), id(answer), weakref.ref(answer)

    def leave(self, answer: Interruptible) -> None:
        """End the turn of an answer that has it; any other call does nothing."""
        if self._key == id(answer):
            self._key = self._thread = self._current = None
            self._lock.release()

    def close(self) -> None:
        """Wait as `enter` does; every later turn is refused."""
        self._take()
        self._closed = True
        self._lock.release()

    def _take(self) -> None:
        current = self._current() if self._current is not None else None
        if current is not None and self._thread == threading.get_ident():
            current.interrupt()
        self._lock.acquire()
