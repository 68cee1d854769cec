"""The architecture as a test: rooms import only from rooms below them, and each is found where packages are looked for.

`docs/architecture.md` shows the same table and says what each room is for.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY

PACKAGE = REPOSITORY / "internvl_edge"
LINKED = ("calibration", "export", "quantize", "runtime")
# From the ground up. A room imports from rooms on lower levels, and from itself; rooms on one level do not meet.
LEVELS = (
    {"base", "demo"},
    {"model"},
    {"checkpoint", "recipe"},
    {"bundle"},
    {"planning"},
    {"calibration", "export", "runtime"},
    {"batch", "quantize"},
    {"evaluation"},
    {"adapters", "cli"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted(
    Path(folder) / name
    for folder, _, names in os.walk(PACKAGE, followlinks=True)
    for name in names
    if name.endswith(".py")
)
TORCH_FREE = ("base", "demo", "model", "recipe", "bundle", "planning", "export", "runtime", "batch")


def room_of(path: Path) -> str | None:
    """None for the package's own files, which only hand names on."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, wherever in it the import stands."""
    package = ("internvl_edge", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = [*start, *(node.module or "").split(".")] if node.module else [*start]
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "internvl_edge" and len(name) > 1 and name[1] in LEVEL_OF)


def upward_imports(path: Path) -> list[str]:
    room = room_of(path)
    if room is None:
        return []
    return [other for other in imported_rooms(path) if other != room and LEVEL_OF[other] >= LEVEL_OF[room]]


def test_every_room_has_a_level() -> None:
    assert {room for path in MODULES if (room := room_of(path))} == set(LEVEL_OF)


@pytest.mark.parametrize("room", sorted(LEVEL_OF))
def test_imports_only_go_down(room: str) -> None:
    found = {str(path.relative_to(PACKAGE)): upward_imports(path) for path in MODULES if room_of(path) == room}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


@pytest.mark.parametrize("line", ["from internvl_edge.runtime.model import InternVL", "import internvl_edge.cli"])
def test_an_import_that_goes_up_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PACKAGE / "model" / "config.py"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"def late():\n    {line}\n")
    assert upward_imports(path)


def test_every_room_says_what_it_is_for() -> None:
    for room in LEVEL_OF:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))), room


def test_every_folder_with_modules_is_a_package() -> None:
    for path in MODULES:
        assert (path.parent / "__init__.py").is_file(), path.parent


@pytest.mark.parametrize("name", LINKED)
def test_the_top_level_folders_are_linked_into_the_package(name: str) -> None:
    assert (PACKAGE / name).resolve() == REPOSITORY / name


@pytest.mark.parametrize("room", TORCH_FREE)
def test_rooms_that_run_without_torch_do_not_import_it(room: str) -> None:
    for path in (path for path in MODULES if room_of(path) == room):
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not any(name.split(".")[0] == "torch" for name in names), path


def test_running_a_bundle_needs_neither_torch_nor_the_export_packages() -> None:
    code = (
        "import sys, internvl_edge.runtime.model, internvl_edge.runtime.conversation, internvl_edge.cli.run\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'sentencepiece', 'transformers', 'ml_dtypes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    long = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 420} == {}
