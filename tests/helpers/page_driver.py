"""Drives the page of the server in a browser as a person would, and watches what it asks for meanwhile."""

from __future__ import annotations

import base64
from typing import Any

from helpers.repository import REPOSITORY

DEMO = REPOSITORY / "internvl_edge" / "demo"


class Visit:
    """Open the page in a context of its own; on exit, check that it was a quiet visit."""

    def __init__(self, browser: Any, address: str, width: int = 1200, height: int = 800, **options: Any) -> None:
        self._address = address
        self._context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self._requests: list[str] = []
        self._problems: list[str] = []

    def __enter__(self) -> Any:
        page = self._context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: self._requests.append(request.url))
        page.on("pageerror", lambda error: self._problems.append(str(error)))
        page.on("console", lambda message: self._problems.append(message.text))
        page.goto(self._address)
        return page

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._context.close()
        if kind is None:
            own = (self._address, "data:", f"blob:{self._address}")
            assert [url for url in self._requests if not url.startswith(own)] == []
            assert [text for text in self._problems if not text.startswith("Failed to load resource")] == []


def give(page: Any, event: str, *given: tuple[str, str, bytes]) -> None:
    """Drop or paste files of a name, a type and bytes."""
    page.evaluate(
        """([event, files]) => {
            const carried = new DataTransfer();
            for (const [name, type, data] of files) {
                carried.items.add(new File([Uint8Array.from(atob(data), (each) => each.charCodeAt(0))], name, {type}));
            }
            const options = {bubbles: true, cancelable: true};
            if (event === 'paste') {
                document.activeElement.dispatchEvent(new ClipboardEvent(event, {...options, clipboardData: carried}));
            } else {
                for (const each of event === 'drop' ? ['dragenter', 'dragover', 'drop'] : [event]) {
                    document.querySelector('main').dispatchEvent(
                        new DragEvent(each, {...options, dataTransfer: carried}));
                }
            }
        }""",
        [event, [(name, kind, base64.b64encode(data).decode()) for name, kind, data in given]],
    )


def drop_receipt(page: Any, name: str = "receipt.png") -> str:
    """Drop the receipt of the demo; return its data URL."""
    data = (DEMO / "receipt.png").read_bytes()
    give(page, "drop", (name, "image/png", data))
    page.wait_for_selector("#attached li")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")


def finished(page: Any, number: int = 1) -> Any:
    """Wait for the end of a turn and return it."""
    turn = page.locator(f"#turns > li:nth-child({number})")
    turn.locator(".actions").wait_for()
    return turn


def text(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())
