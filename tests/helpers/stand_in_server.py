"""A stand-in for the server, for tests of its page: it answers what a test planned, in the form of the API."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from internvl_edge.server.page import load_page

MODEL = "internvl2_5-1b-int4"
USAGE = {
    "prompt_tokens": 1842,
    "completion_tokens": 96,
    "total_tokens": 1938,
    "prompt_tokens_details": {"cached_tokens": 1536},
}
TIMINGS = {"first_token_s": 0.42, "decode_tokens_per_s": 38.1, "tiles": [4, 3]}


@dataclass
class Plan:
    """How one question is answered.

    Attributes:
        pieces: texts of the answer, one chunk each.
        status, headers, message: an answer that is no stream, with an error in the API's form.
        hold: wait for this event after the first piece.
        finish_reason: of the last chunk; None breaks the connection off without an end.
        error: an error in the middle of the stream, in place of its end.
        cut: send the stream in pieces of so many bytes, wherever characters and lines begin.
        line: the end of a line.
    """

    pieces: tuple[str, ...] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    hold: threading.Event | None = None
    finish_reason: str | None = "stop"
    error: str | None = None
    cut: int | None = None
    line: str = "\n"

    def events(self) -> Iterator[dict[str, Any] | str]:
        """Yield the chunks of the stream; texts are lines of their own."""
        yield _chunk({"role": "assistant", "content": ""})
        yield ": waiting"
        for piece in self.pieces:
            yield _chunk({"content": piece})
        if self.error is not None:
            yield {"error": {"message": self.error, "type": "server_error", "param": None, "code": None}}
        elif self.finish_reason is not None:
            yield _chunk({}, self.finish_reason)
            yield {"choices": [], "usage": USAGE, "timings": TIMINGS}
            yield "data: [DONE]"


class StandIn:
    """The server of a test.

    Attributes:
        plans: answers to come, the first one next; without any, the answer is "45.00".
        questions: bodies of the questions that came, as JSON.
        keys: the Authorization header of each question.
        gone: set when a client broke its connection off during a stream.
        ready: status, Retry-After and text of `/readyz`.
        key: the API key, if one is needed.
        limits: what `/v1/models` says of them.
    """

    def __init__(self) -> None:
        self.plans: deque[Plan] = deque()
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.gone = threading.Event()
        self.ready: tuple[int, str | None, str] = (200, None, "ready")
        self.key: str | None = None
        self.limits: dict[str, int] = {}
        self.url = ""


class _Server(ThreadingHTTPServer):
    """The server of one stand-in."""

    daemon_threads = True

    def __init__(self, state: StandIn) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state
        self.page = load_page()


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection from the state that its server holds."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server.state
        state.paths.append(self.path)
        if self.path == "/":
            self._send(200, self.server.page.body, self.server.page.headers)
        elif self.path == "/livez":
            self._send(200, b"{}", _JSON)
        elif self.path == "/readyz":
            status, after, text = state.ready
            self._send(status, text.encode(), {"Retry-After": after} if after else {})
        elif self.path == "/v1/models" and self._admitted():
            entry = {"id": MODEL, "object": "model", "limits": state.limits}
            self._send(200, json.dumps({"object": "list", "data": [entry]}).encode(), _JSON)
        elif self.path != "/v1/models":
            self._refuse(404, f"There is no {self.path} here.")

    def do_POST(self) -> None:
        state = self.server.state
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state.questions.append(json.loads(body))
        state.keys.append(self.headers.get("Authorization"))
        if not self._admitted():
            return
        plan = state.plans.popleft() if state.plans else Plan(("45", ".00"))
        if plan.status != 200:
            self._refuse(plan.status, plan.message, plan.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._stream(plan)
        except OSError:
            state.gone.set()

    def _stream(self, plan: Plan) -> None:
        end = plan.line * 2
        sent = 0
        for event in plan.events():
            text = event if isinstance(event, str) else f"data: {json.dumps(event, ensure_ascii=False)}"
            data = (text + end).encode()
            step = plan.cut or len(data)
            for start in range(0, len(data), step):
                self._write(data[start : start + step])
            sent += isinstance(event, dict)
            while plan.hold is not None and sent == 2 and not plan.hold.wait(0.05):
                self._write(f": waiting{end}".encode())
        if plan.finish_reason is not None:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _admitted(self) -> bool:
        key = self.server.state.key
        admitted = key is None or self.headers.get("Authorization") == f"Bearer {key}"
        if not admitted:
            self._refuse(401, "Give the key as 'Authorization: Bearer KEY'.")
        return admitted

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        self._send(status, json.dumps(error).encode(), {**_JSON, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Run a stand-in on a port of this machine that is free."""
    state = StandIn()
    server = _Server(state)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_JSON = {"Content-Type": "application/json"}


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
