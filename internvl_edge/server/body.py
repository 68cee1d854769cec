"""Read the body of a request within limits of size and time. Memory is taken as bytes arrive, not as promised."""

from __future__ import annotations

import time

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from .admission import Reservation
from .errors import INVALID, ApiError
from .settings import PIECE_S, SLOWEST_BODY, Limits

# What a body takes in all while it is read: its bytes, the text of its JSON, and the bytes of its images.
_COPIES = 3
# A client that is refused while it sends rarely sees why if the connection just closes. So some more is read.
_DISCARD_S, _DISCARDED_BODIES = 2.0, 4


class Disconnected(Exception):  # noqa: N818
    """The client is gone."""


async def read_body(scope: Scope, receive: Receive, limits: Limits, memory: Reservation) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 408 too slow, 413 too large, 415 not JSON, 429 no memory now.
        Disconnected: the client is gone.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    too_large = ApiError(
        413,
        f"the body has more than {limits.body_bytes} bytes, this server's limit; send smaller or fewer images",
        kind=INVALID,
        code="body_too_large",
        headers={"Connection": "close"},
    )
    # A page of another site can send any text without asking first, but not this type. That keeps it out.
    refusal = None if kind == "application/json" else _no_json(kind)
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        refusal = too_large
    if refusal is not None:
        if headers.get("expect", "").lower() != "100-continue":
            await _discard(receive, limits)
        raise refusal
    body = bytearray()
    started = time.perf_counter()
    while True:
        message = None
        with anyio.move_on_after(PIECE_S):
            message = await receive()
        if message is None or time.perf_counter() - started > PIECE_S + len(body) / SLOWEST_BODY:
            raise ApiError(
                408,
                f"the body arrives too slowly after {len(body)} bytes; send it at once",
                kind=INVALID,
                code="body_too_slow",
                headers={"Connection": "close"},
            )
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > limits.body_bytes:
            await _discard(receive, limits)
            raise too_large
        try:
            memory.take(len(body) * _COPIES)
        except ApiError as full:
            await _discard(receive, limits)
            full.headers["Connection"] = "close"
            raise
        if not message.get("more_body", False):
            return bytes(body)


def _no_json(kind: str) -> ApiError:
    found = f"is {kind[:60]!r}" if kind else "is missing"
    return ApiError(
        415,
        f"the Content-Type {found}; send JSON with Content-Type: application/json",
        kind=INVALID,
        code="not_json",
        headers={"Connection": "close"},
    )


async def _discard(receive: Receive, limits: Limits) -> None:
    left = _DISCARDED_BODIES * limits.body_bytes
    with anyio.move_on_after(_DISCARD_S):
        while left > 0:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))
