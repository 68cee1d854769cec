"""`serve_peer.py` reads a server's stream, counts what is refused, and keeps tokens per second by round."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from helpers.repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import serve_peer


class Handler(BaseHTTPRequestHandler):
    """Answers three tokens as llama-server streams them; "refuse" gets 429, "cut" no end and "empty" no text."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        assert body["ignore_eos"] is True
        self.send_response(429 if "refuse" in text else 200)
        self.end_headers()
        if "refuse" in text:
            return
        role = {"choices": [{"delta": {"role": "assistant", "content": None}}]}
        pieces = [{"choices": [{"delta": {"content": "a"}}]}] * 3
        end = {"choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": 3}}
        pieces = [] if "empty" in text else pieces
        for event in [role, *pieces, *([] if "cut" in text else [end])]:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[serve_peer.Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        made = serve_peer.Server("stub", [], http.server_port, "/", {"ignore_eos": True})
        made.process = SimpleNamespace(pid=os.getpid(), send_signal=lambda signal: None)
        yield made
        http.shutdown()


def test_streams_are_read_to_their_end(server: serve_peer.Server) -> None:
    for text in ("one", "refuse", "cut", "empty"):
        server.ask(text)
    assert server.outcomes == {"answered": 1, "status 429": 1, "ended early": 1, "no text": 1}
    assert server.tokens == 3
    assert server.prompt_tokens == [21]
    assert 0 < server.first_s[0] <= server.total_s[0]


def test_a_round_counts_and_warming_up_does_not(server: serve_peer.Server) -> None:
    texts = serve_peer.texts()
    server.load(texts, 2, 0.05, counts=False)
    assert not server.outcomes
    server.load(texts, 2, 0.2, counts=True)
    facts = server.facts()
    assert facts["outcomes"] == {"answered": facts["first_s"]["count"]}
    assert facts["tokens_per_s"]["median"] > 0
    assert facts["rss_mb"] > 1
    line = serve_peer.table({"stub": facts}).splitlines()[-1]
    assert line.startswith(f"| stub | {facts['tokens_per_s']['median']:.1f} | ")
    assert line.endswith(f"{facts['outcomes']['answered']} answered |")


def test_no_two_texts_begin_alike() -> None:
    texts = serve_peer.texts()
    beginnings = [next(texts)[:8] for _ in range(200)]
    assert len(set(beginnings)) == 200
