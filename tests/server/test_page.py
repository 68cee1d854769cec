"""The page as a file: it needs nothing from elsewhere, and its policy lets nothing but itself run."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from helpers.repository import REPOSITORY
from internvl_edge.server.page import content_security_policy, load_page

FILE = REPOSITORY / "internvl_edge" / "server" / "page.html"
TEXT = FILE.read_text(encoding="utf-8")
SCRIPT = TEXT.partition('<script type="module">')[2].partition("</script>")[0]
STYLE = TEXT.partition("<style>")[2].partition("</style>")[0]


class _Elements(HTMLParser):
    """Every element of the page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(TEXT)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


ELEMENTS = _Elements().found


def directives(policy: str) -> dict[str, str]:
    return dict(part.strip().split(" ", 1) for part in policy.split(";"))


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_no_address_of_another_host_is_in_the_page() -> None:
    addresses = re.findall(r"(?:https?:)?//[a-zA-Z0-9][^\s\"'<>)]*", re.sub(r"^\s*//.*$", "", TEXT, flags=re.MULTILINE))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}, "the name of SVG is no address that a browser asks"
    assert "@import" not in STYLE
    assert "url(" not in STYLE
    assert "@font-face" not in STYLE


def test_the_page_loads_no_file() -> None:
    loaded = [
        (tag, name, value)
        for tag, attributes in ELEMENTS
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "action", "data", "poster", "ping", "background")
    ]
    assert [entry for entry in loaded if not (entry[2] or "").startswith(("#", "data:image/svg+xml,"))] == []
    assert {tag for tag, _ in ELEMENTS}.isdisjoint({"base", "iframe", "object", "embed", "frame", "portal"})


def test_nothing_in_the_page_needs_a_weaker_policy() -> None:
    """Attributes with code or style would not work under the policy; the script has no way from text to markup."""
    assert [name for _, attributes in ELEMENTS for name in attributes if name == "style" or name.startswith("on")] == []
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert word not in SCRIPT
    assert not re.search(r"set(Timeout|Interval)\(\s*[\"'`]", SCRIPT)


def test_the_policy_names_script_and_style_by_their_hash_and_nothing_else() -> None:
    found = directives(content_security_policy(TEXT))
    assert found["default-src"] == "'none'"
    assert found["script-src"] == sha256(SCRIPT)
    assert found["style-src"] == sha256(STYLE)
    assert found["connect-src"] == "'self'"
    assert found["frame-ancestors"] == found["base-uri"] == found["form-action"] == "'none'"
    assert found["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in " ".join(found.values())
    assert "*" not in " ".join(found.values())


@pytest.mark.parametrize(
    ("html", "script", "style"),
    [
        ("<p>none</p>", "'none'", "'none'"),
        ("<script>a</script><SCRIPT type=module>b</SCRIPT>", f"{sha256('a')} {sha256('b')}", "'none'"),
        ("<style>\r\n a > b {}\r</style>", "'none'", sha256("\n a > b {}\n")),
        ("<script>x &amp; y // <style></script>", sha256("x &amp; y // <style>"), "'none'"),
        ("<!-- <script>no</script> --><script></script>", sha256(""), "'none'"),
    ],
)
def test_the_policy_of_other_pages(html: str, script: str, style: str) -> None:
    found = directives(content_security_policy(html))
    assert (found["script-src"], found["style-src"]) == (script, style)


def test_a_change_of_the_script_changes_the_policy() -> None:
    assert content_security_policy(TEXT) != content_security_policy(TEXT.replace("const $", "const  $"))


def test_the_page_is_served_as_it_is_installed() -> None:
    page = load_page()
    assert page.body == FILE.read_bytes()
    assert page.headers["Content-Security-Policy"] == content_security_policy(TEXT)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"


def test_the_page_stays_small() -> None:
    """It is kept in memory, read by people, and sent over slow links to phones."""
    assert len(load_page().body) < 60_000


def test_every_element_that_the_script_asks_for_is_there_once() -> None:
    ids = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'\$\("([^"]+)"\)', SCRIPT))
    assert len(asked) > 15
    assert asked <= set(ids)


def test_every_field_has_a_name() -> None:
    labeled = {attributes["for"] for tag, attributes in ELEMENTS if tag == "label" and "for" in attributes}
    fields = [attributes for tag, attributes in ELEMENTS if tag in ("input", "textarea")]
    assert len(fields) > 8
    unnamed = [
        field
        for field in fields
        if field.get("type") != "radio" and field.get("id") not in labeled and "aria-label" not in field
    ]
    assert unnamed == []


def test_the_key_is_stored_nowhere() -> None:
    assert "sessionStorage" not in SCRIPT
    assert "cookie" not in SCRIPT
    assert re.findall(r"localStorage\.setItem\(([^)]*)\)", SCRIPT) == ['"appearance", target.value']
