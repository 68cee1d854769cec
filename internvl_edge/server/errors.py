"""The errors that a client sees: one form, one line of ours, and never the text of somebody else's exception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_edge.base.errors import BusyError, EdgeError, FormError, ImageError, PromptError
from internvl_edge.base.text import one_line

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An error with the status and the body that a client gets.

    Attributes:
        status: of HTTP.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(one_line(message))
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return the error of a request whose field `param` is wrong."""
    return ApiError(400, message, code=code, param=param)


def no_endpoint(method: str, path: str) -> ApiError:
    """Return the error of a path that does not exist."""
    return ApiError(
        404,
        f"there is no {one_line(method, 20)} {one_line(path, 100)}; POST /v1/chat/completions answers questions, and "
        "/openapi.json lists all paths",
        code="not_found",
    )


def queue_full(message: str, retry_after: int) -> ApiError:
    """Return the error of a server that has too much to do; `retry_after` are seconds."""
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(retry_after)})


def unavailable(code: str, message: str, retry_after: int) -> ApiError:
    """Return the error of a server that cannot answer yet, or no longer."""
    return ApiError(503, message, kind=SERVER, code=code, headers={"Retry-After": str(retry_after)})


def broken(code: str = "engine_error") -> ApiError:
    """Return the error of an answer that failed for a reason that concerns nobody outside."""
    return ApiError(500, "the answer failed inside of the server; its log says why", kind=SERVER, code=code)


def timed_out(seconds: float) -> ApiError:
    """Return the error of a request that took too long. Asking again would take as long."""
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} s, this server's limit; ask for less, or raise "
        "--request-timeout",
        kind=SERVER,
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def from_edge(error: EdgeError, param: str | None = None, retry_after: int = 1) -> ApiError:
    """Return what a client is told of an error of the runtime. Only those about its own request are told in full."""
    if isinstance(error, BusyError):
        return queue_full("too many questions are waiting for this model; ask again later", retry_after)
    if isinstance(error, (PromptError, ImageError)):
        return invalid(param, str(error))
    if isinstance(error, FormError):
        return invalid("response_format", str(error))
    return broken()
