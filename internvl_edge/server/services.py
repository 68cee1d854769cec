"""What the endpoints of one server share, and what is noted about one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from .admission import Admission
from .engine import ServedModel
from .images import ImageReader
from .metrics import Metrics
from .settings import Settings


@dataclass
class Services:
    """What the endpoints of one server share."""

    settings: Settings
    served: ServedModel
    admission: Admission
    images: ImageReader
    metrics: Metrics
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@dataclass
class Call:
    """One request, and what the log says about it.

    Attributes:
        number: the request's own id, which the response has in X-Request-Id.
        headers: further headers of the response.
        facts: for the log; nothing that a client wrote but names of fields.
    """

    number: str
    started: float = field(default_factory=time.perf_counter)
    headers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds since the head of the request."""
        return time.perf_counter() - self.started


def call_of(scope: Scope) -> Call:
    """Return what is noted about a request."""
    call: Call = scope["internvl_edge.call"]
    return call
