"""The page and the server together: the demo bundle answers a person in a browser."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import launched_browser
from helpers.page_driver import DEMO, Visit, ask, drop_receipt, finished, give, text
from helpers.servers import RunningServer, image_part, running, slow_down

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_browser() as opened:
        yield opened


@pytest.fixture
def opened(browser: Any, server: RunningServer) -> Iterator[Any]:
    with Visit(browser, f"{server.server.address}/") as page:
        page.wait_for_selector("#state[data-state=ready]")
        yield page


def test_the_demo_reads_the_receipt(opened: Any, server: RunningServer) -> None:
    url = drop_receipt(opened)
    ask(opened, "What is the total?")
    turn = finished(opened)
    part = {"type": "image_url", "image_url": {"url": url}}
    expected = server.ask([part, {"type": "text", "text": "What is the total?"}])
    assert turn.locator(".answer").inner_text() == expected.text
    shown = " ".join(turn.locator(".figures").inner_text().split())
    usage, tiles = expected.json["usage"], sum(expected.json["timings"]["tiles"])
    assert re.search(rf"Tiles {tiles} Prompt {usage['prompt_tokens']:,} tokens", shown)
    assert f"Answer {usage['completion_tokens']:,} tokens" in shown
    assert text(opened, "#model") == "demo"
    sign = base64.b64encode((DEMO / "sign.png").read_bytes()).decode()
    give(opened, "drop", ("sign.png", "image/png", base64.b64decode(sign)))
    opened.wait_for_selector("#attached li")
    ask(opened, "What does the sign say?")
    assert finished(opened, 2).locator(".trouble").count() == 0


def test_a_stop_frees_the_row(browser: Any, bundle: Path) -> None:
    with running(bundle) as server, Visit(browser, f"{server.server.address}/") as page:
        slow_down(server.model, 1)
        page.wait_for_selector("#state[data-state=ready]")
        drop_receipt(page)
        ask(page, "What is the total?")
        page.wait_for_selector(".answer[aria-busy=true]")
        page.click("#stop")
        assert finished(page).locator(".remark").inner_text() == "You stopped this answer."
        server.wait_for(lambda: server.metric("slots_busy") == 0)
        assert 'outcome="cancelled"} 1.0' in server.get("/metrics").body.decode()


def test_a_server_with_a_key_gives_the_page_and_nothing_else(browser: Any, bundle: Path) -> None:
    with running(bundle, keys=("a-long-secret",)) as server, Visit(browser, f"{server.server.address}/") as page:
        page.wait_for_selector("#state:has-text('Needs a key')")
        page.fill("#key", "a-long-secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#state[data-state=ready]")
        ask(page, "What is the total?")
        assert finished(page).locator(".trouble").count() == 0


def test_a_full_server_says_when_it_has_time(browser: Any, bundle: Path) -> None:
    with running(bundle, rows=1, queue=0) as server, Visit(browser, f"{server.server.address}/") as page:
        slow_down(server.model, 1)
        page.wait_for_selector("#state[data-state=ready]")
        other = server.open([image_part(DEMO / "receipt.png"), {"type": "text", "text": "The total?"}], stream=True)
        other.readline()
        ask(page, "What is the total?")
        shown = finished(page).locator(".trouble").inner_text()
        assert shown.startswith("The server is busy")
        assert re.search(r"It expects to have time at \d", shown)
        other.connection.close()  # type: ignore[attr-defined]


def test_the_page_knows_the_limits_of_its_server(browser: Any, bundle: Path) -> None:
    """A photograph over the limit of pixels is reduced and answered, where the server alone would refuse it."""
    with running(bundle, pixels=40_000) as server, Visit(browser, f"{server.server.address}/") as page:
        page.wait_for_selector("#state[data-state=ready]")
        drop_receipt(page)
        size = page.eval_on_selector("#attached img", "image => [image.naturalWidth, image.naturalHeight]")
        assert size[0] * size[1] > 40_000
        ask(page, "What is the total?")
        turn = finished(page)
        assert turn.locator(".trouble").count() == 0
        assert "was reduced from" in turn.locator(".remark").inner_text()


def test_the_page_has_its_headers_once(server: RunningServer) -> None:
    answer = server.get("/")
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
