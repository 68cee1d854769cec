"""A hub on this machine: the answers that the client of the hub needs, and those that it gets from something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><body>Welcome to the hotel. Please accept the terms.</body></html>"


class FakeHub:
    """One repository with one commit.

    Attributes:
        repository: its hub id.
        files: path -> content.
        revisions: branches, tags and short names of the one commit.
        asked: "METHOD path" of each request.
        answer: path -> (status, headers, body), or None for what a hub answers.
        cut: send only so many bytes of a file's content, under the headers of all.
    """

    def __init__(self, repository: str, files: dict[str, bytes], revisions: tuple[str, ...] = ("main",)) -> None:
        self.repository = repository
        self.files = files
        self.revisions = (*revisions, COMMIT)
        self.asked: list[str] = []
        self.answer: Callable[[str], tuple[int, dict[str, str], bytes] | None] = lambda path: None
        self.cut: int | None = None
        self.endpoint = ""

    def response(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        if special := self.answer(path):
            return special
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            if name != self.repository:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if revision not in self.revisions:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {"Content-Type": "application/json"}, json.dumps(self._described(kind)).encode()
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name != self.repository or parts[2] != "resolve" or file not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        digest = hashlib.sha1(self.files[file]).hexdigest()
        return 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, self.files[file]

    def received(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for something that was sent; this hub takes nothing."""
        return 403, {}, b"{}"

    def _described(self, kind: str) -> object:
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.files.items()
        ]
        if kind == "tree":
            return listed
        siblings = [{"rfilename": path} for path in self.files]
        return {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings}


def ask(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the client of this process ask the hub, with a cache of its own and nobody logged in."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub on the loopback interface, at `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.response(self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut is not None and "/resolve/" in self.path:
                body, self.close_connection = body[: hub.cut], True
            self.wfile.write(body)

        def do_POST(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            length = int(self.headers.get("Content-Length") or 0)
            status, headers, body = hub.received(self.command, self.path, self.rfile.read(length), dict(self.headers))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815
        do_PUT = do_POST  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
