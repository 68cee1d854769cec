"""`internvl-edge serve` as a user starts it: who may listen where, what a mistake says, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from helpers.commands import PROGRAM, assert_one_line, internvl_edge

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

QUICK = ("--port", 0, "--threads", 1, "--quiet")


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    command = [*PROGRAM, "serve", str(bundle), *map(str, (*QUICK, *options))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, int(read_line(process.stderr).rpartition(":")[2].partition("/")[0])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    assert "answers at http" in line, line + stream.read()
    return line


def ask(port: int, path: str = "/readyz", body: dict[str, object] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_a_network_needs_a_key_or_a_word(bundle: Path, host: str) -> None:
    assert_one_line(internvl_edge("serve", bundle, "--host", host, *QUICK), "--api-key-file", "--no-auth")


@pytest.mark.parametrize("options", [("--no-auth",), ("--api-key-file", "keys")])
def test_a_network_with_a_key_or_the_word(
    bundle: Path, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("sk-a-key-for-tests\n")
    with serving(bundle.resolve(), "--host", "0.0.0.0", *options) as (process, port):
        assert ask(port).status == 200
        assert ask(port, "/v1/models").status == (200 if options == ("--no-auth",) else 401)
        process.terminate()
        assert process.wait(20) == 0


def test_a_key_may_be_in_the_environment(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_EDGE_API_KEY", "sk-a-key-for-tests")
    with serving(bundle) as (_, port):
        assert ask(port, "/v1/models").status == 401


def test_tls(bundle: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*made, "-days", "1", *names], cwd=tmp_path, check=True, capture_output=True)
    with serving(bundle, "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem") as (_, port):
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(port)


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(internvl_edge("serve", bundle, "--port", port, "-q"), f"127.0.0.1:{port} cannot be bound")
    assert_one_line(internvl_edge("serve", tmp_path, *QUICK), "is not a bundle")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, "--api-key-file", tmp_path / "none"), "cannot be read")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, "--tls-cert", "x"), "belong together")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, "--background", "nocolor"), "is no color")
    (tmp_path / "x").write_text("no certificate")
    files = ("--tls-cert", tmp_path / "x", "--tls-key", tmp_path / "x")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, *files), "TLS cannot use")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, "--host", "no.such.host.invalid", "--no-auth"), "no address")
    assert_one_line(internvl_edge("serve", bundle, *QUICK, "--context", 1), "a context of 1 tokens")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_end_whole(bundle: Path, number: int) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 300, "temperature": 2}
    with serving(bundle) as (process, port):
        response = ask(port, "/v1/chat/completions", body)
        assert response.readline().startswith(b"data: ")
        os.kill(process.pid, number)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in (process.stdout or []) if line.strip()]
        assert lines[-1]["path"] == "/v1/chat/completions"


def test_an_idle_server_ends_at_once(bundle: Path) -> None:
    with serving(bundle) as (process, _):
        started = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 5


def test_nobody_needs_to_read_the_log(bundle: Path) -> None:
    with serving(bundle) as (process, port):
        assert process.stdout is not None
        process.stdout.close()
        for _ in range(50):
            assert ask(port).status == 200
