"""The page for people: one file, and the headers that keep a browser from running or loading anything else.

The page has its style and its script inside. The policy names both by their SHA-256, so that an answer, a file name or
an error text could never run, even if the page had a fault and put it into the document as markup.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """What `GET /` answers.

    Attributes:
        body: the page in UTF-8.
        headers: those that a page needs beside what every response has.
    """

    body: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Return the page of the package with its headers. The hashes are those of the file as it is installed."""
    html = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(html),
        "Cache-Control": "no-cache",
        "Permissions-Policy": "geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
    }
    return Page(html.encode("utf-8"), headers)


def content_security_policy(html: str) -> str:
    """Return the Content-Security-Policy for a page whose scripts and styles are inline.

    Scripts and styles run by their hash alone; requests go to the page's own server; images are those that the user
    attached (`blob:`) and the icon (`data:`). Trusted types are required and none exists, so that a browser that knows
    them refuses every way in which a text could become markup.

    Args:
        html: the page. Attributes with code or style (`onclick`, `style`) and files of other addresses do not work
            under this policy.

    Source: Content Security Policy Level 3, https://www.w3.org/TR/CSP3/.
    """
    found = _Inline()
    found.feed(html.replace("\r\n", "\n").replace("\r", "\n"))  # a browser reads, and hashes, line feeds alone
    found.close()
    directives = {
        "default-src": "'none'",
        "script-src": _hashes(found.texts["script"]),
        "style-src": _hashes(found.texts["style"]),
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hashes(texts: list[str]) -> str:
    digests = (hashlib.sha256(text.encode("utf-8")).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests) or "'none'"


class _Inline(HTMLParser):
    """The texts of a page's script and style elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.texts:
            self._inside = tag
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.texts[self._inside][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None
