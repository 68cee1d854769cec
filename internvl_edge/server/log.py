"""What a server writes down: one line of JSON for each request. Prompts, images and answers are in none of them."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from internvl_edge.base.errors import EdgeError, FormError, ImageError, PromptError
from internvl_edge.base.text import one_line

_MOST_WAITING = 10_000


class AccessLog:
    """Writes lines in a thread of its own, so that a full pipe never stops the server; then lines are lost instead.

    Args:
        stream: where the lines go; None writes none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.lost = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        if stream is not None:
            self._thread.start()

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write one line with the time and these facts; those that are None are left out."""
        if self._stream is None:
            return
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = {"time": moment} | {name: value for name, value in facts.items() if value is not None}
        try:
            self._lines.put_nowait(json.dumps(line, separators=(",", ":")))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is left, for a second at most."""
        if self._stream is not None:
            with suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(1.0)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                assert self._stream is not None
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # nobody reads it any more
                self.lost += 1


class ServerMessages(logging.Handler):
    """Prints what the server itself has to say as one line each on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        with suppress(OSError, ValueError):
            print(f"internvl-edge: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


def failure(error: BaseException) -> str:
    """Return an error as its type and the places in the code that it came through.

    Its text may hold something of a request, so only a text of our own that is not about requests is shown.
    """
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    ours = isinstance(error, EdgeError) and not isinstance(error, (PromptError, ImageError, FormError))
    text = f" ({one_line(str(error), 200)})" if ours else ""
    return f"{type(error).__name__}{text} at {places}"
