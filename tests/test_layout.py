"""The house itself: folders, packages, links and the direction of imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = ("export", "quantize", "runtime", "calibration")
MODULES = [path for folder in ("internvl_edge", *STAGES) for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Stages that a file imports from; `from .x` inside a stage is its own."""
    names = re.findall(r"internvl_edge\.(\w+)", path.read_text(encoding="utf-8"))
    return set(names) & set(STAGES)


def test_every_module_is_seen_by_the_type_checker() -> None:
    """typetree/ is what static tools read; a module without a link there would silently go unchecked."""
    for path in MODULES:
        relative = path.relative_to(REPOSITORY)
        parts = relative.parts[1:] if relative.parts[0] == "internvl_edge" else relative.parts
        linked = REPOSITORY / "typetree" / "internvl_edge" / Path(*parts)
        assert linked.is_file(), f"link {linked.parent}/{parts[0]} is missing"
        assert linked.resolve() == path


def test_every_folder_with_modules_is_a_package() -> None:
    for path in MODULES:
        assert (path.parent / "__init__.py").is_file(), path.parent


@pytest.mark.parametrize("stage", ["runtime", "export"])
def test_arrows_point_one_way(stage: str) -> None:
    allowed = {"runtime": {"runtime"}, "export": {"export"}}[stage]
    for path in sorted((REPOSITORY / stage).rglob("*.py")):
        assert imports_of(path) <= allowed, path
        assert not re.search(r"^\s*(import|from) torch", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_running_a_bundle_needs_neither_torch_nor_the_export_packages() -> None:
    code = (
        "import sys, internvl_edge.runtime.model, internvl_edge.runtime.conversation, internvl_edge.cli.run\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'sentencepiece', 'transformers', 'ml_dtypes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    long = {str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 420} == {}
