"""The page as people use it, in Chromium: images, streams, stops, refusals, copies, keys, narrow and dark screens.

The server is a stand-in that answers what each test planned.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import format_datetime
from importlib.resources import files
from pathlib import Path
from time import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.browser import launched_browser
from helpers.page_driver import DEMO, Visit, ask, drop_receipt, finished, give, text
from helpers.stand_in_server import MODEL, Plan, StandIn, stand_in

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=\"document.title='ran'\"><script>document.title='ran'</script> & \u202e"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_browser() as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


@pytest.fixture
def opened(browser: Any, server: StandIn) -> Iterator[Any]:
    """The page on a desktop; at the end, nothing was asked of another host and no script has failed."""
    with Visit(browser, server.url) as page:
        yield page


def noise(width: int, height: int, kind: str = "PNG") -> bytes:
    """An image that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


# ---- images and questions ----


def test_a_dropped_image_is_asked_about_and_the_answer_streams(opened: Any, server: StandIn) -> None:
    url = drop_receipt(opened)
    assert opened.locator("#over").is_hidden()
    hold = threading.Event()
    server.plans.append(Plan(("The total ", "is 46.09."), hold=hold))
    ask(opened, "What is the total?")
    opened.wait_for_selector(".answer[aria-busy=true]")
    assert text(opened, ".answer").strip() == "The total"
    assert opened.locator("#send").is_hidden()
    hold.set()
    turn = finished(opened)
    assert turn.locator(".answer").inner_text() == "The total is 46.09."
    assert turn.locator(".answer").get_attribute("aria-busy") == "false"
    (question,) = server.questions
    assert question == {
        "model": MODEL,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is the total?"},
                ],
            }
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_figures_are_shown_under_the_answer(opened: Any, server: StandIn) -> None:
    ask(opened, "How long?")
    shown = " ".join(finished(opened).locator(".figures").inner_text().split())
    assert re.fullmatch(
        r"First token \d+\.\d\d s Tokens/s 38\.1 Tiles 7 Prompt 1,842 tokens, 1,536 cached Answer 96 tokens", shown
    )


def test_the_conversation_goes_along_with_its_images(opened: Any, server: StandIn) -> None:
    receipt = drop_receipt(opened)
    ask(opened, "What is the total?")
    finished(opened)
    sign = (DEMO / "sign.png").read_bytes()
    opened.focus("#question")
    give(opened, "paste", ("image.png", "image/png", sign))
    opened.wait_for_selector("#attached img[alt='pasted-1.png']")
    ask(opened, "And here?")
    finished(opened, 2)
    first, answer, second = server.questions[1]["messages"]
    assert first["content"][0]["image_url"]["url"] == receipt
    assert answer == {"role": "assistant", "content": "45.00"}
    assert base64.b64decode(second["content"][0]["image_url"]["url"].partition(",")[2]) == sign
    opened.click("#fresh")
    assert opened.locator("#welcome").is_visible()
    ask(opened, "Hello?")
    finished(opened)
    assert [message["content"] for message in server.questions[2]["messages"]] == ["Hello?"]


def test_images_are_picked_and_removed(opened: Any, server: StandIn) -> None:
    with opened.expect_file_chooser() as chooser:
        opened.click(".zone button:has-text('Choose images')")
    assert chooser.value.is_multiple()
    chooser.value.set_files([DEMO / "receipt.png", DEMO / "sign.png", DEMO / "chart.png"])
    opened.wait_for_selector("#attached li:nth-child(3)")
    opened.get_by_role("button", name="Remove sign.png").click()
    names = opened.eval_on_selector_all("#attached img", "images => images.map(image => image.alt)")
    assert names == ["receipt.png", "chart.png"]
    ask(opened, "Compare them.")
    finished(opened)
    assert len(server.questions[0]["messages"][0]["content"]) == 3


def test_a_phone_takes_a_photo(browser: Any, server: StandIn) -> None:
    with Visit(browser, server.url, 390, 800, has_touch=True, is_mobile=True) as page:
        assert page.get_attribute("#camera", "capture") == "environment"
        with page.expect_file_chooser() as chooser:
            page.tap(".zone button:has-text('Take a photo')")
        chooser.value.set_files([DEMO / "sign.png"])
        page.wait_for_selector("#attached li")


def test_what_is_no_image_is_named_and_left_out(opened: Any) -> None:
    broken = (DEMO / "receipt.png").read_bytes()[:30]
    give(opened, "drop", ("notes.txt", "text/plain", b"hello"), ("broken.png", "image/png", broken))
    opened.wait_for_selector("#notice:not(:empty)")
    assert text(opened, "#notice") == (
        "notes.txt was not attached: it is not one of PNG, JPEG, WEBP, GIF, BMP. "
        "broken.png was not attached: it cannot be opened as an image."
    )
    assert opened.locator("#attached li").count() == 0


def test_a_drag_shows_where_to_drop(opened: Any) -> None:
    give(opened, "dragenter", ("a.png", "image/png", b"x"))
    assert opened.locator("#over").is_visible()
    give(opened, "dragleave", ("a.png", "image/png", b"x"))
    assert opened.locator("#over").is_hidden()


def test_a_question_is_needed(opened: Any, server: StandIn) -> None:
    opened.click("#send")
    assert text(opened, "#notice") == "Write a question first."
    assert server.questions == []


# ---- limits of the server ----


@pytest.mark.parametrize("limit", [{"body_bytes": 1_000_000}, {"pixels": 300_000}])
def test_images_are_reduced_when_they_are_over_a_limit_and_only_then(
    browser: Any, server: StandIn, limit: dict[str, int]
) -> None:
    server.limits = limit
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state[data-state=ready]")
        small = drop_receipt(page)
        give(page, "drop", ("photo.png", "image/png", noise(1500, 1000)))
        page.wait_for_selector("#attached li:nth-child(2)")
        ask(page, "What is it?")
        finished(page)
    sent = [part["image_url"]["url"] for part in server.questions[0]["messages"][0]["content"][:2]]
    assert sent[0] == small, "an image that is not in the way is sent as it is"
    reduced = Image.open(io.BytesIO(base64.b64decode(sent[1].partition(",")[2])))
    assert len(json.dumps(server.questions[0])) < limit.get("body_bytes", 10**9)
    assert reduced.width * reduced.height <= limit.get("pixels", 1499 * 999)
    assert reduced.width / reduced.height == pytest.approx(1.5, abs=0.01)


def test_a_reduced_image_is_named(browser: Any, server: StandIn) -> None:
    server.limits = {"pixels": 300_000}
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state[data-state=ready]")
        give(page, "drop", ("photo.png", "image/png", noise(900, 600)))
        page.wait_for_selector("#attached li")
        ask(page, "What is it?")
        remark = finished(page).locator(".remark").inner_text()
    assert remark == ("photo.png was reduced from 900 × 600 to 670 × 447 pixels: it is over what this server accepts.")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_photograph_is_sent_upright(opened: Any, server: StandIn, orientation: int, order: str) -> None:
    """The note of a camera is not applied by the model's own code, but every browser shows it."""
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112] = "maker", orientation
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:20, :40] = 255  # white in the upper left as it is stored
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", exif=exif)
    give(opened, "drop", ("photo.jpg", "image/jpeg", data.getvalue()))
    opened.wait_for_selector("#attached li")
    ask(opened, "What is it?")
    turn = finished(opened)
    url = server.questions[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    white = {1: "upper left", 3: "lower right", 6: "upper right", 8: "lower left"}[orientation]
    found = np.asarray(sent.convert("L"))
    height, width = found.shape
    places = {
        "upper left": found[: height // 2, : width // 2],
        "upper right": found[: height // 2, width // 2 :],
        "lower left": found[height // 2 :, : width // 2],
        "lower right": found[height // 2 :, width // 2 :],
    }
    assert max(places, key=lambda place: places[place].mean()) == white
    assert (width, height) == ((80, 40) if orientation in (1, 3) else (40, 80))
    assert sent.getexif().get(0x0112, 1) == 1
    assert (base64.b64decode(url.partition(",")[2]) == data.getvalue()) == (orientation == 1)
    assert turn.locator(".remark").count() == (orientation != 1)


def test_what_cannot_be_reduced_enough_is_said_and_not_sent(browser: Any, server: StandIn) -> None:
    server.limits = {"body_bytes": 1000}
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state[data-state=ready]")
        drop_receipt(page)
        ask(page, "What is it?")
        shown = finished(page).locator(".trouble").inner_text()
    assert shown.startswith("This is more than the server accepts in one request.")
    assert "0.0 MB are accepted" in shown
    assert server.questions == []


def test_too_many_images_are_said_and_not_sent(browser: Any, server: StandIn) -> None:
    server.limits = {"images": 1}
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state[data-state=ready]")
        for number in (1, 2):
            drop_receipt(page)
            ask(page, "What is it?")
            finished(page, number)
        assert "has 2, at most 1 are accepted" in finished(page, 2).locator(".trouble").inner_text()
    assert len(server.questions) == 1


# ---- streams, stops and refusals ----


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_stream_may_arrive_in_any_pieces(opened: Any, server: StandIn, cut: int, line: str) -> None:
    answer = ("Straße 4,50 €\n", "合计 ¥12.30 ", "\U0001f9fe end")
    server.plans.append(Plan(answer, cut=cut, line=line))
    ask(opened, "Read it.")
    assert finished(opened).locator(".answer").inner_text() == "".join(answer)


def test_a_stop_ends_the_request_and_keeps_what_was_said(opened: Any, server: StandIn) -> None:
    server.plans.append(Plan(("Once upon ", "a time"), hold=threading.Event()))
    ask(opened, "Tell a story.")
    opened.wait_for_selector(".answer[aria-busy=true]")
    opened.click("#stop")
    turn = finished(opened)
    assert server.gone.wait(5), "the server learns that nobody reads"
    assert turn.locator(".answer").inner_text() == "Once upon"
    assert turn.locator(".remark").inner_text() == "You stopped this answer."
    assert opened.locator("#stop").is_hidden()
    assert opened.evaluate("document.activeElement.id") == "question"
    ask(opened, "Go on.")
    finished(opened, 2)
    assert server.questions[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


def test_what_comes_from_outside_is_text(browser: Any, server: StandIn) -> None:
    server.plans.append(Plan((HOSTILE,)))
    server.plans.append(Plan(status=400, message=HOSTILE))
    with Visit(browser, server.url) as page:
        drop_receipt(page, f"{HOSTILE}.png")
        ask(page, HOSTILE)
        turn = finished(page)
        assert turn.locator(".answer").inner_text() == HOSTILE
        assert turn.locator(".question").inner_text() == HOSTILE
        assert turn.locator("img").get_attribute("alt") == f"{HOSTILE}.png"
        ask(page, "Again")
        assert HOSTILE in finished(page, 2).locator(".trouble").inner_text()
        assert page.locator("#turns img").count() == 1
        assert page.title() == "internvl-edge"


def test_the_policy_is_in_force(browser: Any, server: StandIn) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    refused = page.evaluate(
        """async () => {
            const outcomes = {};
            const attempt = async (name, work) => {
                try { await work(); outcomes[name] = 'allowed'; } catch (error) { outcomes[name] = error.name; }
            };
            await attempt('markup', () => { document.body.innerHTML = '<b>x</b>'; });
            await attempt('fetch', () => fetch('http://127.0.0.2:9/'));
            await attempt('script', () => {
                const script = document.createElement('script');
                script.append('document.title = "ran"');
                document.body.append(script);
            });
            outcomes.title = document.title;
            return outcomes;
        }"""
    )
    assert refused["markup"] == refused["fetch"] == "TypeError"
    assert refused["title"] == "internvl-edge"
    context.close()


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.parametrize(("status", "heading"), [(429, "The server is busy"), (503, "The server does not answer")])
def test_a_server_without_time_says_when_to_ask_again(
    opened: Any, server: StandIn, status: int, heading: str, form: str
) -> None:
    after = (
        "42" if form == "seconds" else format_datetime(datetime.fromtimestamp(time() + 42, timezone.utc), usegmt=True)
    )
    server.plans.append(Plan(status=status, headers={"Retry-After": after}, message="8 questions wait already."))
    ask(opened, "What is the total?")
    turn = finished(opened)
    shown = turn.locator(".trouble").inner_text()
    assert shown.startswith(heading)
    assert "8 questions wait already." in shown
    found = re.search(r"It expects to have time at (\d\d?:\d\d:\d\d).*, in (\d+) seconds\.", shown)
    assert found is not None
    assert 38 <= int(found[2]) <= 43
    turn.get_by_role("button", name="Ask again").click()
    turn.locator(".figures").wait_for()
    assert turn.locator(".answer").inner_text() == "45.00"
    assert turn.locator(".trouble").count() == 0
    assert server.questions[0] == server.questions[1]


def test_the_seconds_run_down(opened: Any, server: StandIn) -> None:
    server.plans.append(Plan(status=429, headers={"Retry-After": "1"}))
    ask(opened, "Now?")
    finished(opened)
    opened.wait_for_selector(".trouble p:has-text('ask again now')")


@pytest.mark.parametrize(
    ("plan", "heading", "detail"),
    [
        (
            Plan(status=400, message="temperature is -1, expected 0 to 2"),
            "The server did not accept",
            "expected 0 to 2",
        ),
        (Plan(status=404, message="no such model"), "The server does not know", "no such model"),
        (Plan(status=413, message="21 MB, at most 20 MB"), "The request is too large", "at most 20 MB"),
        (Plan(status=403, message="the Host is not allowed"), "The server did not accept", "Host is not allowed"),
        (Plan(status=504, message="not complete after 300 s"), "The answer took longer", "300 s"),
        (Plan(status=500, message="the engine stopped"), "The server failed on this question (status 500)", "engine"),
        (Plan(("half ",), error="out of time"), "The server ended the answer early.", "out of time"),
    ],
)
def test_every_failure_is_said_in_words(opened: Any, server: StandIn, plan: Plan, heading: str, detail: str) -> None:
    server.plans.append(plan)
    ask(opened, "What is the total?")
    turn = finished(opened)
    assert turn.locator(".trouble strong").inner_text().startswith(heading)
    assert detail in turn.locator(".trouble").inner_text()
    assert turn.locator(".answer").text_content() == "".join(plan.pieces).strip()
    assert heading in text(opened, "#spoken"), "a screen reader hears it"
    assert turn.get_by_role("button", name="Ask again").is_visible()


def test_a_question_without_an_answer_is_no_history(opened: Any, server: StandIn) -> None:
    server.plans.append(Plan(status=500, message="the engine stopped"))
    ask(opened, "First?")
    finished(opened)
    ask(opened, "Second?")
    finished(opened, 2)
    assert server.questions[1]["messages"] == [{"role": "user", "content": "Second?"}]
    assert opened.locator("#turns > li:nth-child(1) button:has-text('Ask again')").count() == 0, "only the last one"


def test_a_new_conversation_ends_the_answer_of_the_old_one(opened: Any, server: StandIn) -> None:
    server.plans.append(Plan(("Once upon ", "a time"), hold=threading.Event()))
    ask(opened, "Tell a story.")
    opened.wait_for_selector(".answer[aria-busy=true]")
    opened.click("#fresh")
    assert server.gone.wait(5)
    opened.wait_for_selector("#send")
    assert opened.locator("#turns > li").count() == 0
    ask(opened, "Hello?")
    assert finished(opened).locator(".answer").inner_text() == "45.00"


def test_one_question_at_a_time(opened: Any, server: StandIn) -> None:
    hold = threading.Event()
    server.plans.append(Plan(("One", " two"), hold=hold))
    ask(opened, "Count.")
    opened.wait_for_selector(".answer[aria-busy=true]")
    opened.fill("#question", "And on?")
    opened.keyboard.press("Enter")
    assert opened.input_value("#question") == "And on?", "what was written stays"
    hold.set()
    finished(opened)
    assert len(server.questions) == 1


def test_a_connection_that_breaks_leaves_what_was_said(opened: Any, server: StandIn) -> None:
    hold = threading.Event()
    server.plans.append(Plan(("half ", "way"), hold=hold, finish_reason=None))
    ask(opened, "Count.")
    opened.wait_for_selector(".answer[aria-busy=true]")
    hold.set()
    turn = finished(opened)
    assert turn.locator(".answer").inner_text().startswith("half")
    assert turn.locator(".trouble strong").inner_text() == "The connection was lost in the middle of the answer."


def test_a_server_that_is_gone(opened: Any, server: StandIn) -> None:
    opened.wait_for_selector("#state[data-state=ready]")
    opened.route("**/*", lambda route: route.abort("connectionrefused"))
    ask(opened, "Are you there?")
    assert finished(opened).locator(".trouble strong").inner_text() == "This server does not answer."
    opened.wait_for_selector("#state[data-state=away]")
    assert text(opened, "#state") == "No connection"
    opened.unroute("**/*")
    opened.wait_for_selector("#state[data-state=ready]")


def test_an_answer_that_was_cut_says_so(opened: Any, server: StandIn) -> None:
    server.plans.append(Plan(("One two",), finish_reason="length"))
    ask(opened, "Count.")
    assert "cut at the limit" in finished(opened).locator(".remark").inner_text()


def test_a_loading_server_becomes_ready(browser: Any, server: StandIn) -> None:
    server.ready = (503, "1", "loading the model")
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state:has-text('Loading')")
        server.ready = (200, None, "ready")
        page.wait_for_selector("#state[data-state=ready]")
        assert text(page, "#model") == MODEL
        asked = server.paths.count("/readyz")
        page.wait_for_timeout(1500)
        assert server.paths.count("/readyz") == asked, "a server that is ready is left alone"


def test_a_key_is_asked_for_sent_and_kept_in_memory_alone(browser: Any, server: StandIn) -> None:
    server.key = "secret-key"
    with Visit(browser, server.url) as page:
        page.wait_for_selector("#state:has-text('Needs a key')")
        ask(page, "What is the total?")
        turn = finished(page)
        assert turn.locator(".trouble strong").inner_text() == "The server asks for an API key."
        turn.get_by_role("button", name="Enter the key").click()
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("secret-key")
        turn.get_by_role("button", name="Ask again").click()
        turn.locator(".figures").wait_for()
        assert server.keys == [None, "Bearer secret-key"]
        page.wait_for_selector("#state[data-state=ready]")
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "secret" not in kept
        page.reload()
        assert page.input_value("#key") == ""


# ---- settings ----


def test_settings_become_fields_of_the_request(opened: Any, server: StandIn) -> None:
    opened.fill("#system", "Answer in one word.")
    opened.fill("#length", "32")
    for number, (value, expected) in enumerate([("low", "low"), ("auto", None), ("high", "high")]):
        opened.check(f"input[name=detail][value={value}]", force=True)
        drop_receipt(opened)
        ask(opened, "What is it?")
        finished(opened)
        question = server.questions[number]
        assert question["messages"][0] == {"role": "system", "content": "Answer in one word."}
        assert question["max_tokens"] == 32
        assert question["messages"][1]["content"][0]["image_url"].get("detail") == expected
        assert "max_tiles" not in question
        opened.click("#fresh")
    opened.check("input[name=detail][value=own]", force=True)
    opened.fill("#tiles", "9")
    ask(opened, "What is it?")
    finished(opened)
    assert server.questions[3]["max_tiles"] == 9


@pytest.mark.parametrize(("field", "value"), [("tiles", "0"), ("tiles", ""), ("length", "-5"), ("length", "1.5")])
def test_a_setting_that_is_no_number_is_said_before_anything_is_sent(
    opened: Any, server: StandIn, field: str, value: str
) -> None:
    opened.check("input[name=detail][value=own]", force=True)
    opened.fill(f"#{field}", value)
    ask(opened, "What is it?")
    name = {"tiles": "Most tiles of an image", "length": "Most tokens of an answer"}[field]
    assert text(opened, "#notice").startswith(name)
    assert server.questions == []
    assert opened.input_value("#question") == "What is it?"


# ---- copies ----

WORDS = 'What\'s "it"? $HOME `id` $(id) \\n\nJSON\n€ \\u0000image 0'


@pytest.fixture
def told(browser: Any, server: StandIn, tmp_path: Path) -> Iterator[Any]:
    """A conversation of two questions with images of awkward names, whose files lie in the folder of the test."""
    data = (DEMO / "receipt.png").read_bytes()
    names = ['it\'s a "receipt" $HOME.png', "sign.png"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    server.plans.append(Plan((f"So: {WORDS}",)))
    with Visit(browser, server.url) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.wait_for_selector("#state[data-state=ready]")
        page.fill("#system", "Say: $1")
        page.fill("#length", "7")
        page.fill("#key", "k")
        for number, name in enumerate(names, 1):
            give(page, "drop", (name, "image/png", data))
            page.wait_for_selector("#attached li")
            ask(page, WORDS)
            finished(page, number)
        yield page


def copied(page: Any, what: str) -> str:
    page.get_by_role("button", name=f"Copy as {what}").last.click()
    page.wait_for_selector(".actions button:has-text('Copied')")
    return str(page.evaluate("navigator.clipboard.readText()"))


def plain(question: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in question.items() if not name.startswith("stream")}


def test_the_copied_curl_command_asks_the_same(told: Any, server: StandIn, tmp_path: Path) -> None:
    command = copied(told, "curl")
    assert "$INTERNVL_EDGE_API_KEY" in command
    environment = {"PATH": "/usr/bin:/bin", "INTERNVL_EDGE_API_KEY": "from-environment"}
    subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=30
    )
    assert server.questions[2] == plain(server.questions[1])
    assert server.keys[2] == "Bearer from-environment"


def test_the_copied_python_asks_the_same(
    told: Any, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package openai is a stand-in here; what the code hands to it is what counts."""
    code = copied(told, "Python")
    asked: dict[str, Any] = {}

    class OpenAI:
        def __init__(self, **options: Any) -> None:
            asked.update(client=options)
            self.chat = self.completions = self
            self.choices = [self]
            self.message = self
            self.content = "45.00"

        def create(self, **fields: Any) -> OpenAI:
            asked.update(fields=fields)
            return self

    module = ModuleType("openai")
    monkeypatch.setattr(module, "OpenAI", OpenAI, raising=False)
    monkeypatch.setitem(sys.modules, "openai", module)
    monkeypatch.setenv("INTERNVL_EDGE_API_KEY", "from-environment")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "copied", "exec"), {"__name__": "copied"})
    assert asked["client"] == {"base_url": f"{server.url}v1", "api_key": "from-environment"}
    assert asked["fields"] == plain(server.questions[1])


def test_copying_works_without_the_clipboard_api(browser: Any, server: StandIn) -> None:
    """A page over plain HTTP from another machine has no `navigator.clipboard`."""
    with Visit(browser, server.url) as page:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate(
            """addEventListener('copy', () => {
                const {value, selectionStart, selectionEnd} = document.activeElement;
                window.taken = value.slice(selectionStart, selectionEnd);
            })"""
        )
        ask(page, "What is the total?")
        finished(page).get_by_role("button", name="Copy answer").click()
        page.wait_for_selector(".actions button:has-text('Copied')")
        assert page.evaluate("window.taken") == "45.00"


# ---- keyboard, screens, screen readers ----


def test_everything_is_reached_and_used_by_keyboard(opened: Any, server: StandIn) -> None:
    assert opened.evaluate("document.activeElement.id") == "question"
    opened.keyboard.type("One")
    opened.keyboard.press("Shift+Enter")
    opened.keyboard.type("two")
    opened.evaluate(  # the Enter that accepts a word of an input method asks nothing
        "document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert server.questions == []
    server.plans.append(Plan(("first",), hold=threading.Event()))
    opened.keyboard.press("Enter")
    opened.wait_for_selector(".answer[aria-busy=true]")
    opened.keyboard.press("Escape")
    finished(opened)
    assert server.questions[0]["messages"][0]["content"] == "One\ntwo"
    assert opened.evaluate("document.activeElement.id") == "question"
    opened.evaluate("document.activeElement.blur(); document.body.focus()")
    reached = []
    for _ in range(40):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    for name in (
        "Skip to the question",
        "fresh",
        "Copy answer",
        "Copy as curl",
        "Copy as Python",
        "Ask again",
        "question",
    ):
        assert name in reached
    for name in ("Add images", "send", "tiles", "system", "length", "key"):
        assert name in reached or name == "tiles", "the field of tiles is there once it is asked for"
    shown = opened.evaluate(
        """() => { document.querySelector('#fresh').focus();
            const style = getComputedStyle(document.activeElement);
            return document.activeElement.matches(':focus-visible') && parseFloat(style.outlineWidth) >= 2; }"""
    )
    assert shown, "the place of the keyboard is visible"


def test_the_sheet_of_settings_gives_the_focus_back(browser: Any, server: StandIn) -> None:
    with Visit(browser, server.url, 700) as page:
        page.focus("#open-settings")
        page.keyboard.press("Enter")
        assert page.locator("#sheet").is_visible()
        assert page.evaluate("document.querySelector('#sheet').contains(document.activeElement)")
        page.keyboard.press("Escape")
        assert page.locator("#sheet").is_hidden()
        assert page.evaluate("document.activeElement.id") == "open-settings"
        page.set_viewport_size({"width": 1300, "height": 800})
        page.wait_for_selector("aside #settings")
        page.set_viewport_size({"width": 700, "height": 800})
        page.wait_for_selector("#sheet #settings", state="attached")


def test_a_screen_reader_hears_the_answer_once_it_is_whole(opened: Any, server: StandIn) -> None:
    hold = threading.Event()
    server.plans.append(Plan(("Forty", "-five"), hold=hold))
    ask(opened, "What is the total?")
    opened.wait_for_selector(".answer[aria-busy=true]")
    assert opened.locator("#spoken").text_content() == "Asked. Waiting for the answer."
    hold.set()
    finished(opened)
    assert opened.locator("#spoken").text_content() == "Answer: Forty-five"
    assert opened.locator("#spoken").get_attribute("role") == "status"
    assert opened.get_by_role("heading", name="What is the total?", level=3).count() == 1


def tell(page: Any, server: StandIn) -> None:
    """A conversation with images, a long word and a refusal."""
    drop_receipt(page)
    server.plans.append(Plan((f"{'long' * 60} and\n\n  spaced",)))
    ask(page, f"What is {'x' * 200}?")
    finished(page)
    give(page, "drop", ("wide.png", "image/png", noise(1500, 90)), ("tall.png", "image/png", noise(60, 900)))
    page.wait_for_selector("#attached li:nth-child(2)")
    server.plans.append(Plan(status=429, headers={"Retry-After": "30"}, message="busy " * 30))
    ask(page, "And now?")
    finished(page, 2)
    drop_receipt(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 768, 320])
def test_every_screen_shows_everything(browser: Any, server: StandIn, width: int, scheme: str) -> None:
    with Visit(browser, server.url, width, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tell(page, server)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        light, ink = (
            page.evaluate(f"getComputedStyle(document.documentElement).{name}.match(/\\d+/g).map(Number)[1]")
            for name in ("backgroundColor", "color")
        )
        assert (light > 200, light > ink) == ((True, True) if scheme == "light" else (False, False))
        box = page.locator("#composer").bounding_box()
        assert box["y"] + box["height"] <= 800, "the question is always at hand"
        small = page.evaluate(
            """[...document.querySelectorAll('button, input, textarea')].filter(element => {
                const {width, height} = (element.type === 'radio' ? element.parentElement : element)
                    .getBoundingClientRect();
                return width && (width < 24 || height < 24);
            }).map(element => element.outerHTML)"""
        )
        assert small == [], "WCAG 2.2 asks for 24 pixels"


def test_the_appearance_is_chosen_and_kept(browser: Any, server: StandIn) -> None:
    with Visit(browser, server.url, color_scheme="light") as page:
        shade = "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)[0]"
        assert page.evaluate(shade) > 200
        page.check("input[name=appearance][value=dark]", force=True)
        assert page.evaluate(shade) < 60
        page.reload()
        assert page.evaluate(shade) < 60
        page.check("input[name=appearance][value=system]", force=True)
        assert page.evaluate(shade) > 200


def test_nothing_moves_for_those_who_asked_for_it(browser: Any, server: StandIn) -> None:
    with Visit(browser, server.url, reduced_motion="reduce") as page:
        hold = threading.Event()
        server.plans.append(Plan(("One", " two"), hold=hold))
        ask(page, "Count.")
        page.wait_for_selector(".answer[aria-busy=true]")
        assert page.evaluate("document.getAnimations().length") == 0
        hold.set()
        finished(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_axe_finds_no_serious_violation(browser: Any, server: StandIn, width: int, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python")
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    checked = 0

    def check(page: Any, state: str) -> None:
        nonlocal checked
        results = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (state, violation["id"], node["html"], node["failureSummary"])
            for violation in results["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]
        assert serious == []
        assert results["testEngine"]["name"] == "axe-core"
        checked += 1

    with Visit(browser, server.url, width, color_scheme=scheme, bypass_csp=False) as page:
        page.wait_for_selector("#state[data-state=ready]")
        page.evaluate(axe)
        check(page, "empty")
        drop_receipt(page)
        page.click("#send")
        check(page, "an image and a notice")
        hold = threading.Event()
        server.plans.append(Plan(("Forty", "-five"), hold=hold))
        ask(page, "What is the total?")
        page.wait_for_selector(".answer[aria-busy=true]")
        check(page, "a stream")
        hold.set()
        finished(page)
        page.click("#fresh")
        tell(page, server)
        check(page, "a conversation and a refusal")
        if width < 1000:
            page.click("#open-settings")
            check(page, "settings")
    assert checked >= 4
