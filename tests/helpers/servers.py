"""A real server on a loopback port, in a thread, and a client of plain sockets that can also misbehave."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_edge import InternVL
from internvl_edge.server.run import EdgeServer, Place
from internvl_edge.server.settings import Limits, Settings

JSON_TYPE = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        found: str = self.json["choices"][0]["message"]["content"]
        return found

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose form is checked."""
        found = self.json
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        message = found["error"]["message"]
        assert message
        assert "\n" not in message
        assert len(message) <= 400
        assert self.headers["content-type"].startswith("application/json")
        error: dict[str, Any] = found["error"]
        return error


class Client:
    """Asks a server."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port = port
        self.key = key

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, self._headers() | (headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, JSON_TYPE | (headers or {}))

    def ask(self, question: Any = "Hello", **fields: Any) -> Answer:
        """Ask one question of the user; texts or parts."""
        return self.post({"messages": [{"role": "user", "content": question}], **fields})

    def open(self, question: Any = "Hello", **fields: Any) -> http.client.HTTPResponse:
        """Ask, and return the response before its body was read; close it to leave."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"messages": [{"role": "user", "content": question}], **fields})
        connection.request("POST", "/v1/chat/completions", body, self._headers() | JSON_TYPE)
        response = connection.getresponse()
        response.connection = connection  # type: ignore[attr-defined]  # closed with it
        return response

    def events(self, question: Any = "Hello", **fields: Any) -> list[Any]:
        """Ask for a stream, and return its events; the last one is "[DONE]"."""
        response = self.open(question, stream=True, **fields)
        assert response.status == 200, response.read()
        return list(read_events(response))

    def raw(self, data: bytes, wait: float = 5.0) -> bytes:
        """Send bytes, and return all that comes until the server closes the connection or nothing comes for a while."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            found = b""
            try:
                while piece := connection.recv(65536):
                    found += piece
            except TimeoutError:
                found += b"<open>"
            return found

    def _headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class RunningServer(Client):
    """A server that runs.

    Attributes:
        server, log: the server, and the lines of its access log.
        model: the latest model that it loaded.
    """

    def __init__(self, bundle: Path, load: Callable[[], InternVL] | None = None, **choices: Any) -> None:
        limits = Limits(**{name: choices.pop(name) for name in Limits.__dataclass_fields__ if name in choices})
        settings = Settings(model="demo", limits=limits, **choices)
        self.model: InternVL | None = None
        self.error: BaseException | None = None
        self._is_ready = threading.Event()

        def load_bundle() -> InternVL:
            self.model = (load or (lambda: load_demo(bundle, settings.rows)))()
            return self.model

        self._lines = io.StringIO()
        self.server = EdgeServer(
            settings,
            load_bundle,
            bundle,
            Place("127.0.0.1", 0),
            access_log=self._lines,
            ready=lambda address: self._is_ready.set(),
        )
        super().__init__(int(self.server.address.rpartition(":")[2]), settings.keys[0] if settings.keys else None)
        self._thread = threading.Thread(target=self._run)

    def start(self) -> RunningServer:
        self._thread.start()
        return self

    def wait_ready(self) -> RunningServer:
        assert self._is_ready.wait(60)
        return self

    def stop(self, timeout: float = 30) -> None:
        self.server.stop()
        self._thread.join(timeout)
        assert not self._thread.is_alive()

    @property
    def log(self) -> list[dict[str, Any]]:
        time.sleep(0.1)  # lines are written by a thread
        return [json.loads(line) for line in self._lines.getvalue().splitlines()]

    def metric(self, name: str) -> float:
        """The value of a metric without its prefix, with its labels as they are written; 0 where it is absent."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"internvl_edge_{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error


@contextmanager
def running(bundle: Path, **choices: Any) -> Iterator[RunningServer]:
    """A server of a bundle that is ready."""
    server = RunningServer(bundle, **choices).start()
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def load_demo(bundle: Path, rows: int = 1, **options: Any) -> InternVL:
    return InternVL.load(bundle, engine="onnxruntime", device="cpu", rows=rows, threads=1, **options)


def read_events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream; comment lines as they are."""
    for block in iter(lambda: _block(response), ""):
        if block.startswith("data: "):
            yield "[DONE]" if block == "data: [DONE]" else json.loads(block[6:])
        else:
            yield block


def _block(response: http.client.HTTPResponse) -> str:
    lines = b""
    while not lines.endswith(b"\n\n"):
        if not (line := response.readline()):
            break
        lines += line
    return lines.decode().rstrip("\n")


def data_url(image: Path | Image.Image | bytes, kind: str = "image/png") -> str:
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        data = stream.getvalue()
    else:
        data = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(image: Path | Image.Image | bytes, **further: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **further}}


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if isinstance(event, dict)
        for choice in event["choices"]
        if choice["index"] == index
    )


def slow_down(model: InternVL | None, seconds: float) -> None:
    """Make every decode step of a model take at least this long."""
    assert model is not None
    engine: Any = model._engine
    decode = engine.decode_rows

    def decode_rows(*arguments: Any) -> Any:
        time.sleep(seconds)
        return decode(*arguments)

    engine.decode_rows = decode_rows
