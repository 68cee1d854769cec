"""HTTP/1.1 for strangers: uvicorn's protocol with limits of time, a bound of connections and errors of our form."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import INVALID, ApiError
from .settings import HEAD_S, MOST_CONNECTIONS, UNREAD_S

# uvicorn's own messages hold what clients send.
logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


class EdgeProtocol(H11Protocol):
    """One connection.

    A client that does not send the whole head of a request in time is dropped, and so is one that does not read what it
    asked for. Without this, each such client holds a connection for ever.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn leaves it, and so the connection, after an error
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes. While they are the head of a request, time runs."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the form of all errors, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of a response
            return
        error = ApiError(400, "the request is not valid HTTP/1.1", kind=INVALID, code="invalid_http")
        body = json.dumps(error.body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        """Run the timer exactly while the head of a request is awaited, and keep-alive does not count the time."""
        idle = self.cycle is None or self.cycle.response_complete
        if not idle or self.timeout_keep_alive_task is not None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()
