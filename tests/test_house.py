"""The house of the tests: folders mirror the rooms of the product, and test files share through `helpers` alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY

TESTS = REPOSITORY / "tests"
ROOMS = {path.parent.name for path in (REPOSITORY / "internvl_edge").glob("*/__init__.py")}
# Folders of tests that are no room: scripts of benchmarks and examples, the whole model, the helpers themselves.
OTHERS = {"benchmarks", "end_to_end", "helpers"}
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
HELPERS = sorted(path for path in (TESTS / "helpers").glob("*.py") if path not in TEST_FILES)


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever in it the import stands; dots of relative imports in front."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of_tests(path: Path) -> list[str]:
    """Imports of a test file or of `conftest.py`, and those that reach for one by `tests.` or by dots."""
    stems = {test.stem for test in TEST_FILES} | {"conftest"}
    return [
        name
        for name in imported_names(path)
        if name.startswith((".", "tests.")) or name == "tests" or stems & set(name.split("."))
    ]


def test_nothing_is_imported_from_a_test_file() -> None:
    found = {str(path.relative_to(TESTS)): imports_of_tests(path) for path in [*TEST_FILES, *HELPERS]}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import test_rooms",
        "from test_rooms import room_of",
        "from tests.test_rooms import room_of",
        "from helpers.test_tiny import KINDS",
        "from helpers import test_tiny",
        "from .test_rooms import room_of",
        "from conftest import REPOSITORY",
    ],
)
def test_an_import_from_a_test_file_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "test_late.py"
    path.write_text(f"def late():\n    {line}\n", encoding="utf-8")
    assert imports_of_tests(path)


def test_folders_are_rooms_of_the_product() -> None:
    found = {path.relative_to(TESTS).parts[0] for path in TEST_FILES if path.parent != TESTS}
    assert found <= ROOMS | OTHERS


def test_every_helper_says_what_it_holds() -> None:
    for path in HELPERS:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_only_the_reader_of_configurations_asks_for_a_text_model_by_name() -> None:
    """An architecture is data. The adapter of AutoAWQ names the only one that AutoAWQ knows."""
    allowed = {"checkpoint/config_reader.py", "adapters/autoawq.py"}
    package = REPOSITORY / "internvl_edge"
    compared = re.compile(r"""(==|!=|\bin)\s*[(\["']*(qwen|internlm|llama|Hermes|internvl2_5)""")
    for path in sorted(path for room in package.iterdir() for path in room.rglob("*.py")):
        if path.relative_to(package).as_posix() not in allowed:
            assert not compared.search(path.read_text(encoding="utf-8")), path
