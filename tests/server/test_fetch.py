"""Images from addresses: only of allowed hosts, only public, resolved once, and within limits."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from helpers.servers import running
from internvl_edge.demo import demo_questions
from internvl_edge.server import fetch as fetch_module
from internvl_edge.server.errors import ApiError
from internvl_edge.server.fetch import Fetcher, Streams, Target, is_public, parse_url

PUBLIC = "93.184.215.14"
ASKED = next(each for each in demo_questions() if each.image.name == "receipt.png")


class _Handler(BaseHTTPRequestHandler):
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        type(self).seen.append((self.path, self.headers["Host"]))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 65536)
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"x")
            self.wfile.flush()
            threading.Event().wait(3)
        elif self.path == "/promised":
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
        elif self.path == "/gzip":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")
        elif self.path == "/image.png":
            data = ASKED.image.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_response(404)
            self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def website() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    handler = type("Handler", (_Handler,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, handler.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Network:
    """Stands for names and routes: every connection to a public address goes to a website of the test.

    `answers` are what the name server says, one after the other. `reached` are the addresses that were connected to.
    """

    def __init__(self, port: int, *answers: Sequence[str]) -> None:
        self.port = port
        self.answers = list(answers) or [[PUBLIC]]
        self.asked: list[str] = []
        self.reached: list[tuple[str, int, str]] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    async def connect(self, address: str, port: int, context: ssl.SSLContext | None, host: str) -> Streams:
        self.reached.append((address, port, host))
        return await asyncio.open_connection("127.0.0.1", self.port)


def fetch(network: Network, url: str, hosts: Sequence[str] = ("images.example",), most: int = 1 << 20) -> bytes:
    fetcher = Fetcher(hosts, most, network.resolve, network.connect)
    return anyio.run(fetcher.fetch, url, "image")


def refusal(network: Network, url: str, **options: Any) -> str:
    with pytest.raises(ApiError) as refused:
        fetch(network, url, **options)
    assert refused.value.status == 400
    assert refused.value.param == "image"
    return str(refused.value)


def test_an_image_of_an_allowed_host_is_fetched_from_the_address_of_its_name() -> None:
    with website() as (port, seen):
        network = Network(port)
        assert fetch(network, "http://images.example/image.png") == ASKED.image.read_bytes()
        assert seen == [("/image.png", "images.example")]
        assert network.reached == [(PUBLIC, 80, "images.example")]


def test_a_name_is_resolved_once(tmp_path: Path) -> None:
    """DNS rebinding: a name that is public when it is checked, and this machine when it is used."""
    with website() as (port, _):
        network = Network(port, [PUBLIC], ["127.0.0.1"])
        fetch(network, "http://images.example/image.png")
        assert network.asked == ["images.example"]
        assert {address for address, _, _ in network.reached} == {PUBLIC}
        assert "no" in refusal(network, "http://images.example/image.png")
        assert len(network.reached) == 1


NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12:3456::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::",
    "::127.0.0.1",
    "not an address",
    "",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public_are_never_connected_to(address: str) -> None:
    assert not is_public(address)
    network = Network(1, [address])
    assert "not that of a public address" in refusal(network, "http://images.example/image.png")
    mixed = Network(1, [PUBLIC, address])
    refusal(mixed, "http://images.example/image.png")
    assert network.reached == mixed.reached == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


ODD = [
    "http://images.example@127.0.0.1/",
    "http://127.0.0.1#images.example/",
    "http://127.0.0.1\\@images.example/",
    "http://images.example\\@127.0.0.1/",
    "http://images.example%2f@127.0.0.1/",
    "http://images.example:80:80/",
    "http://images.example:0/",
    "http://images.example:99999/",
    "http:/images.example/x",
    "http:images.example/x",
    "http:///images.example/x",
    "http://user:pass@images.example/",
    "http://[::1]/",
    "http://[::ffff:7f00:1]/",
    "http://images。example/",
    "http://ⓘmages.example/",
    "http://images.example /",
    " http://images.example/",
    "http://images.example/\r\nHost: x",
    "http://images.example/a b",
    "http://images.example/#x",
    "http://-a/",
    "http://images.example/" + "x" * 3000,
    "http://images.example\t/",
    "http://images.example./x",
    "https://images.example:443@evil.example/",
]


@pytest.mark.parametrize("url", ODD)
def test_addresses_written_oddly_are_refused(url: str) -> None:
    network = Network(1)
    refusal(network, url)
    assert network.asked == network.reached == []


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/",
        "http://images.example.evil.example/",
        "http://evilimages.example/",
        "http://images.example:8080/",
        "https://images.example:80/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://localhost/",
        "http://metadata.google.internal/",
    ],
)
def test_other_hosts_and_ports_are_refused(url: str) -> None:
    network = Network(1)
    assert "does not fetch from" in refusal(network, url)
    assert network.asked == network.reached == []


def test_a_number_that_is_allowed_must_still_be_public() -> None:
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost"):

        async def really(host: str, port: int) -> Sequence[str]:
            return await fetch_module._resolve(host, port)

        network = Network(1)
        network.resolve = really  # type: ignore[method-assign]
        refusal(network, f"http://{host}/", hosts=(host,))
        assert network.reached == []


def test_a_port_can_be_allowed_by_name() -> None:
    with website() as (port, seen):
        network = Network(port)
        fetch(network, "http://images.example:8080/image.png", hosts=("images.example:8080",))
        assert seen == [("/image.png", "images.example:8080")]
        refusal(network, "http://images.example/image.png", hosts=("images.example:8080",))


def test_the_name_of_a_host_has_no_case() -> None:
    assert parse_url("HTTPS://Images.Example") == Target("https", "images.example", 443, "/")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("redirect", "it redirects"),
        ("endless", "more than 65536 bytes"),
        ("promised", "more than 65536 bytes"),
        ("gzip", "compressed"),
        ("missing", "its status is 404"),
        ("image.png?x", "404"),
    ],
)
def test_what_is_no_image_within_limits_is_refused(path: str, reason: str) -> None:
    with website() as (port, seen):
        assert reason in refusal(Network(port), f"http://images.example/{path}", most=65536)
        assert [found for found, _ in seen] == [f"/{path}"]


def test_a_slow_host_has_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_module.FETCH_S == 10
    monkeypatch.setattr(fetch_module, "FETCH_S", 0.3)
    with website() as (port, _):
        assert "more than 0.3 s" in refusal(Network(port), "http://images.example/slow")


def test_a_host_that_is_not_there_is_one_line() -> None:
    assert "the connection failed" in refusal(Network(1), "http://images.example/x")


def test_tls_proves_the_name_and_not_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    async def open_connection(host: str, port: int, **options: Any) -> Streams:
        seen.update(options, host=host, port=port)
        raise OSError("enough")

    monkeypatch.setattr(fetch_module.asyncio, "open_connection", open_connection)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return [PUBLIC]

    fetcher = Fetcher(["images.example"], 1000, resolve)
    with pytest.raises(ApiError):
        anyio.run(fetcher.fetch, "https://images.example/x", "image")
    assert (seen["host"], seen["port"], seen["server_hostname"]) == (PUBLIC, 443, "images.example")
    assert seen["ssl"].verify_mode == ssl.CERT_REQUIRED
    assert seen["ssl"].check_hostname


def test_a_server_answers_about_an_address_that_is_allowed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "http://images.example/image.png"}},
        {"type": "text", "text": ASKED.question},
    ]
    with website() as (port, _):
        network = Network(port)
        monkeypatch.setattr(Fetcher.__init__, "__defaults__", (network.resolve, network.connect))
        with running(bundle, image_hosts=("images.example",)) as server:
            assert server.ask(content).text == ASKED.expected
            inside = [{"type": "image_url", "image_url": "http://169.254.169.254/latest"}, content[1]]
            assert server.ask(inside).error["param"] == "messages[0].content[0].image_url"
        with running(bundle) as server:
            refused = server.ask(content)
            assert refused.status == 400
            assert "not fetched" in refused.error["message"]
        assert len(network.reached) == 1
