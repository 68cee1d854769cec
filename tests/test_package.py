"""What a stranger sees first: the index page, the extras, the license beside the weights, the security policy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers.repository import REPOSITORY
from internvl_edge.base.toml import parse

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = parse((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")[
    "project"
]
PAGES = sorted([REPOSITORY / "SECURITY.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")])


def test_every_extra_has_a_line_of_the_readme() -> None:
    table = README.partition("| extra | for |")[2].partition("\n\n")[0]
    named = [
        name
        for row in table.splitlines()
        for name in re.findall(r"`([a-z]+)`", row.partition("| ")[2].partition(" |")[0])
    ]
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])


def test_no_link_of_the_index_page_is_relative() -> None:
    """The index shows README.md without the files around it."""
    inline = re.findall(r"\]\(([^)]+)\)", README)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", README, re.MULTILINE))
    assert defined
    assert [link for link in [*inline, *defined.values()] if not link.startswith("https://")] == []
    used = re.findall(r"\[([^\]]+)\](?!\(|:)", README)
    assert {name for name in used if name.endswith(".md") and name not in defined} == set()


@pytest.mark.parametrize("name", ["docs/dependencies.md", "SECURITY.md", "docs/formats.md"])
def test_the_readme_leads_to_a_page_that_exists(name: str) -> None:
    assert f"/blob/main/{name}\n" in README
    assert (REPOSITORY / name).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Any) -> None:
    text = page.read_text(encoding="utf-8")
    links = [
        link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))
    ]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_weights_in_the_package_have_a_card_with_a_license() -> None:
    folders = {path.parent for path in (REPOSITORY / "internvl_edge").rglob("*.safetensors")}
    assert folders
    for folder in folders:
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlicense: apache-2.0\n")
        for heading in ("**Training data:**", "**Score:**", "**Limits:**", "**License:**"):
            assert heading in card


def test_the_metadata_is_whole() -> None:
    assert {"authors", "keywords", "classifiers", "license", "license-files", "urls"} <= PROJECT.keys()
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Security"} <= PROJECT["urls"].keys()


def test_the_security_policy_says_how_and_what() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    for heading in ("## Report a vulnerability", "## Supported versions", "## What is defended"):
        assert heading in text
    assert "/security/advisories/new" in text
    assert "weights_only=True" in text
