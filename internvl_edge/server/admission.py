"""How much a server takes at once: requests, bytes, and when to come again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from .errors import queue_full, unavailable
from .settings import RETRY_DRAINING_S, Settings

LEAST_RETRY_S, MOST_RETRY_S = 1, 120
# Seconds that an answer is taken to need before one was measured, and how much one measurement counts.
_FIRST_GUESS_S = 2.0
_WEIGHT = 0.2


class Admission:
    """The requests under way. All of it runs in the event loop.

    Attributes:
        draining: whether the server is about to end and takes no more requests.
        rows: answers that are computed together.
    """

    def __init__(self, settings: Settings) -> None:
        self.draining = False
        self.rows = settings.rows
        self._queue = settings.limits.queue
        self._memory = settings.limits.memory_bytes
        self._bytes = 0
        self._running: set[anyio.CancelScope] = set()
        self._service_s = _FIRST_GUESS_S

    @property
    def running(self) -> int:
        """Requests that were admitted and are not answered."""
        return len(self._running)

    @property
    def retry_after(self) -> int:
        """Seconds until a row is likely to be free for one more request: those that wait x the mean service time."""
        waiting = max(1, self.running - self.rows)
        seconds = waiting * self._service_s / self.rows
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, math.ceil(round(seconds, 3))))

    @contextmanager
    def request(self) -> Iterator[anyio.CancelScope]:
        """Admit a request for the time of the block, and yield the scope that `cancel_all` cancels.

        Raises:
            ApiError: 429 where too many are under way, 503 where the server is about to end.
        """
        if self.draining:
            raise unavailable("draining", "this server is about to end; ask another one", RETRY_DRAINING_S)
        if self.running >= self.rows + self._queue:
            raise queue_full(
                f"{self.running} requests are under way, as many as this server takes; ask again later",
                self.retry_after,
            )
        with anyio.CancelScope() as scope:
            self._running.add(scope)
            try:
                yield scope
            finally:
                self._running.discard(scope)

    def cancel_all(self) -> None:
        """Cancel all requests under way."""
        for scope in list(self._running):
            scope.cancel()

    def served(self, seconds: float) -> None:
        """Take into account that an answer took this long from its row to its end."""
        self._service_s += _WEIGHT * (seconds - self._service_s)

    @contextmanager
    def memory(self) -> Iterator[Reservation]:
        """Yield what a request may take memory with; it is given back at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.take(0)

    def change(self, amount: int) -> None:
        """Add to the bytes that are taken. Raises ApiError 429 where there are too many."""
        if amount > 0 and self._bytes + amount > self._memory:
            raise queue_full("the requests under way fill this server's memory; ask again later", self.retry_after)
        self._bytes += amount


class Reservation:
    """The memory of one request."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._bytes = 0

    def take(self, amount: int) -> None:
        """Take `amount` bytes in all, instead of what was taken before. Raises ApiError 429."""
        self._admission.change(amount - self._bytes)
        self._bytes = amount
