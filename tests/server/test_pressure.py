"""A server under pressure: queues, deadlines, clients that leave, engines that fail, and the end."""

from __future__ import annotations

import gc
import json
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from helpers.servers import RunningServer, load_demo, read_events, running, slow_down, text_of
from internvl_edge import InternVL
from internvl_edge.base.errors import EngineError
from internvl_edge.demo import demo_questions
from internvl_edge.server import engine as engine_module
from internvl_edge.server.admission import MOST_RETRY_S, Admission
from internvl_edge.server.errors import ApiError
from internvl_edge.server.http_protocol import EdgeProtocol
from internvl_edge.server.settings import Limits, Settings

# A question whose answer does not end by itself for a while.
LONG: dict[str, Any] = {"logit_bias": {}, "max_tokens": 400, "temperature": 2, "seed": 1}


@pytest.fixture
def slow(bundle: Path) -> Iterator[RunningServer]:
    """One row, two places in the queue, and steps of 20 ms. Answers never end by themselves."""
    with running(bundle, rows=1, queue=2) as server:
        assert server.model is not None
        server.model._stop_ids = []
        slow_down(server.model, 0.02)
        yield server


def busy(server: RunningServer) -> int:
    assert server.model is not None
    load = server.model.load_now
    return load.computed + load.waiting


def test_a_full_queue_says_when_to_come_again(slow: RunningServer) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: slow.ask("Hello", max_tokens=40), range(6)))
    refused = [answer for answer in found if answer.status == 429]
    assert sorted(answer.status for answer in found) == [200] * 3 + [429] * 3
    for answer in refused:
        assert answer.error["code"] == "queue_full"
        assert answer.error["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert slow.metric('requests_total{outcome="rejected"}') == 3
    assert slow.ask("Hello", max_tokens=2).status == 200


def test_retry_after_follows_the_measured_times() -> None:
    async def measure() -> list[int]:
        admission = Admission(Settings("demo", rows=2, limits=Limits(queue=6)))
        scopes = [admission.request() for _ in range(8)]
        for scope in scopes:
            scope.__enter__()
        found = []
        for seconds in (1.0, 10.0, 1000.0):
            for _ in range(60):
                admission.served(seconds)
            found.append(admission.retry_after)
            with pytest.raises(ApiError) as refusal, admission.request():
                pass
            assert refusal.value.headers["Retry-After"] == str(found[-1])
        for scope in reversed(scopes):
            scope.__exit__(None, None, None)
        return found

    import anyio

    assert anyio.run(measure) == [3, 30, MOST_RETRY_S]  # 6 wait for 2 rows


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_its_row_within_a_step(slow: RunningServer, streamed: bool) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5000, "stream": streamed})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"

    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        slow.wait_for(lambda: busy(slow) == 1)
        if streamed:
            assert b"200 OK" in connection.recv(1000)
    left = time.monotonic()
    slow.wait_for(lambda: busy(slow) == 0)
    assert time.monotonic() - left < 1
    slow.wait_for(lambda: slow.metric('requests_total{outcome="cancelled"}') == 1)
    assert slow.log[-2]["outcome"] == "cancelled" or slow.log[-1]["outcome"] == "cancelled"


def test_a_client_that_leaves_while_it_waits_is_never_computed(slow: RunningServer) -> None:
    first = slow.open("Hello", stream=True, max_tokens=60)
    waiting = slow.open("Hello again", stream=True, max_tokens=60)
    slow.wait_for(lambda: busy(slow) == 2)
    waiting.connection.close()  # type: ignore[attr-defined]
    waiting.close()
    slow.wait_for(lambda: busy(slow) == 1)
    assert list(read_events(first))[-1] == "[DONE]"
    assert slow.metric("queue_seconds_count") == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_has_a_deadline(bundle: Path, streamed: bool) -> None:
    with running(bundle, rows=1, request_s=1.0) as server:
        assert server.model is not None
        server.model._stop_ids = []
        slow_down(server.model, 0.05)
        started = time.monotonic()
        if streamed:
            last = server.events("Hello", max_tokens=3000)[-1]
            assert last["error"]["code"] == "timeout"
        else:
            found = server.ask("Hello", max_tokens=3000)
            assert (found.status, found.error["code"]) == (504, "timeout")
            assert found.headers["x-should-retry"] == "false"
        assert 0.9 < time.monotonic() - started < 3
        server.wait_for(lambda: busy(server) == 0)


def test_an_answer_without_a_limit_leaves_half_of_a_small_context(bundle: Path) -> None:
    with running(bundle, load=lambda: load_demo(bundle, context=64)) as server:
        assert server.model is not None
        server.model._stop_ids = []
        found = server.ask("Hello").json
        assert found["usage"]["completion_tokens"] == 32
        assert server.ask("Hello", max_tokens=60).status == 400


def test_the_rows_are_those_of_the_model(bundle: Path) -> None:
    with running(bundle, load=lambda: load_demo(bundle, rows=1), rows=4, queue=0) as server:
        assert server.model is not None
        server.model._stop_ids = []
        slow_down(server.model, 0.02)
        first = server.open("Hello", stream=True, max_tokens=30)
        assert server.ask("Hello").status == 429
        assert list(read_events(first))[-1] == "[DONE]"


def test_requests_that_wait_get_their_own_answers(bundle: Path) -> None:
    asked = demo_questions()
    from helpers.servers import image_part

    def ask(number: int) -> bool:
        question = asked[number % len(asked)]
        content = [image_part(question.image), {"type": "text", "text": question.question}]
        if number % 2:
            return text_of(server.events(content)) == question.expected
        return server.ask(content).text == question.expected

    with running(bundle, rows=2, queue=64) as server, ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(48)))


def test_the_end_lets_streams_end_whole_and_refuses_new_ones(slow: RunningServer) -> None:
    stream = slow.open("Hello", stream=True, max_tokens=60)
    events = read_events(stream)
    assert next(events)["choices"][0]["delta"]["role"] == "assistant"
    slow.server.stop()
    slow.wait_for(lambda: slow.get("/readyz").status == 503)
    refused = slow.ask("Hello")
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) > 0
    assert slow.get("/livez").status == 200
    found = list(events)
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    slow.stop()
    with pytest.raises(OSError, match="refused"):
        slow.get("/livez")


def test_the_end_does_not_wait_for_ever(bundle: Path) -> None:
    with running(bundle, rows=1, drain_s=0.5) as server:
        assert server.model is not None
        server.model._stop_ids = []
        slow_down(server.model, 0.05)
        stream = server.open("Hello", stream=True, max_tokens=3000)
        started = time.monotonic()
        server.server.stop()
        last = list(read_events(stream))[-1]
        assert last["error"]["code"] == "draining"
        server.stop()
        assert time.monotonic() - started < 5


def test_while_it_loads_a_server_says_so(bundle: Path) -> None:
    go = threading.Event()

    def load() -> InternVL:
        assert go.wait(30)
        return load_demo(bundle)

    server = RunningServer(bundle, load=load).start()
    try:
        server.wait_for(lambda: answers(server))
        for path in ("/readyz", "/health"):
            found = server.get(path)
            assert (found.status, found.error["code"]) == (503, "loading")
            assert int(found.headers["retry-after"]) > 0
        assert server.get("/livez").status == 200
        assert server.ask("Hello").error["code"] == "loading"
        go.set()
        server.wait_ready()
        assert server.get("/readyz").status == 200
        assert server.ask("Hello", max_tokens=1).status == 200
    finally:
        go.set()
        server.stop()


def answers(server: RunningServer) -> bool:
    try:
        return server.get("/livez").status > 0
    except OSError:
        return False


def test_a_model_that_cannot_be_loaded_ends_the_server(bundle: Path) -> None:
    def load() -> InternVL:
        raise EngineError("planted")

    server = RunningServer(bundle, load=load).start()
    server.wait_for(lambda: server.error is not None)
    assert isinstance(server.error, EngineError)
    server.stop()


def test_an_answer_that_fails_once_fails_alone(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(bundle, rows=1) as server:
        model: Any = server.model
        decode = model._engine.decode_rows

        def fail(*arguments: Any) -> Any:
            model._engine.decode_rows = decode
            raise RuntimeError("0x7f001234 secret of the library")

        model._engine.decode_rows = fail
        found = server.ask("Hello", max_tokens=5)
        assert found.status == 500
        assert found.error["type"] == "server_error"
        assert b"secret" not in found.body
        server.wait_for(lambda: server.get("/readyz").status == 200)
        assert server.ask("Hello", max_tokens=5).status == 200
        assert server.model is model
        assert server.metric('requests_total{outcome="error"}') == 1
    written = capfd.readouterr()
    assert "RuntimeError at" in written.err
    assert "secret" not in written.err + written.out


def _break(server: RunningServer) -> Any:
    """Let the engine fail in its next prompt, and ask; return the broken model."""
    broken: Any = server.model
    broken._engine.prefill_steps = _fail
    assert server.ask("Hello").status == 500
    return broken


def _fail(*arguments: Any) -> Any:
    """A step of a prompt, of an engine that fails."""
    raise RuntimeError("planted")
    yield


def test_an_engine_that_stays_broken_is_loaded_again(bundle: Path) -> None:
    with running(bundle, rows=1) as server:
        broken = _break(server)
        server.wait_for(lambda: server.model is not broken and server.get("/readyz").status == 200)
        assert server.ask("Hello", max_tokens=1).status == 200


def test_an_engine_that_cannot_be_loaded_again_says_so_for_good(bundle: Path) -> None:
    loads = []

    def load() -> InternVL:
        loads.append(1)
        if len(loads) > 1:
            raise EngineError("planted")
        return load_demo(bundle)

    with running(bundle, load=load) as server:
        _break(server)
        server.wait_for(lambda: server.get("/livez").status == 503)
        found = server.ask("Hello")
        assert (found.status, found.error["code"]) == (503, "engine_failed")
        assert found.headers["x-should-retry"] == "false"
        assert server.get("/readyz").status == 503


def test_a_reload_that_hangs_turns_livez(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STUCK_S", 0.5)
    loads: list[int] = []
    go = threading.Event()

    def load() -> InternVL:
        loads.append(1)
        if len(loads) > 1:
            go.wait(20)
        return load_demo(bundle)

    with running(bundle, load=load) as server:
        _break(server)
        server.wait_for(lambda: server.get("/livez").status == 503)
        go.set()
        server.wait_for(lambda: server.get("/readyz").status == 200)
        assert server.get("/livez").status == 200


def test_nothing_is_kept_of_clients_that_left(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is reset while it is idle, as many clients do, and one that is left in a stream."""
    kept: weakref.WeakSet[EdgeProtocol] = weakref.WeakSet()
    made: list[int] = []
    begin = EdgeProtocol.__init__

    def remembered(self: EdgeProtocol, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        kept.add(self)
        made.append(id(self))

    monkeypatch.setattr(EdgeProtocol, "__init__", remembered)
    with running(bundle) as server:
        before = len(kept)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200 OK" in connection.recv(1000)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            left = server.open("Hello", stream=True, max_tokens=300, temperature=2)
            left.connection.close()  # type: ignore[attr-defined]
            left.close()
        assert len(made) >= 10
        server.wait_for(lambda: gc.collect() >= 0 and len(kept) <= before)


def test_a_stuck_engine_turns_livez(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STUCK_S", 0.5)
    go = threading.Event()
    with running(bundle, rows=1) as server:
        model: Any = server.model
        decode = model._engine.decode_rows
        model._engine.decode_rows = lambda *arguments: (go.wait(20), decode(*arguments))[1]
        stream = server.open("Hello", stream=True, max_tokens=3)
        assert server.get("/livez").status == 200
        server.wait_for(lambda: server.get("/livez").status == 503)
        go.set()
        assert list(read_events(stream))[-1] == "[DONE]"
        assert server.get("/livez").status == 200


def test_a_stream_with_nothing_to_say_says_that_it_waits(slow: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_edge.server import chat

    monkeypatch.setattr(chat, "WAITING_S", 0.2)
    first = slow.open("Hello", stream=True, max_tokens=50)
    events = slow.events("Hello", max_tokens=2)
    assert ": waiting" in events
    assert events[-1] == "[DONE]"
    assert list(read_events(first))[-1] == "[DONE]"


def test_what_requests_hold_in_memory_is_bounded(bundle: Path) -> None:
    with running(bundle, rows=1, memory_bytes=1 << 20) as server:
        found = server.ask("x" * 400_000, max_tokens=1)
        assert (found.status, found.error["code"]) == (429, "queue_full")
        assert server.ask("Hello", max_tokens=1).status == 200


def test_a_form_that_fails_in_the_middle_is_the_clients_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    from internvl_edge.base.errors import FormError
    from internvl_edge.runtime.grammar import Constrained

    def fail(*arguments: Any) -> Any:
        raise FormError("the form of this answer failed: planted; give a simpler one")

    monkeypatch.setattr(Constrained, "choose", fail)
    with running(bundle, rows=1) as server:
        found = server.ask("Hello", structured_outputs={"regex": "[0-9]{3}"})
        assert (found.status, found.error["param"]) == (400, "response_format")
        assert server.ask("Hello", max_tokens=1).status == 200
